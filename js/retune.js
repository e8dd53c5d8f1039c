// A view of the run in every training node, a note in every loader; the runs panel in the sidebar.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { extend, hideProgressText, nodeAt } from "./dom.js";
import { fold } from "./folding.js";
import { Note, hasNote, notes } from "./note.js";
import { followPresets } from "./presets.js";
import { sayMissing } from "./relied_on.js";
import { RunView, nameWidget, views } from "./run_view.js";
import { RunsPanel } from "./runs_panel.js";

let panel = null;
const shown = () => [...views, ...notes];

// Before setup: a run may be in progress; ComfyUI warns of events without listeners.
for (const kind of ["step", "sample", "state"])
  api.addCustomEventListener(`retune.${kind}`, ({ detail }) => {
    views.forEach((view) => view.event(kind, detail));
    panel?.event(kind, detail);
  });
api.addCustomEventListener("retune.error", ({ detail }) => {
  const node = nodeAt(detail.node);
  for (const view of views) if (view.node === node) view.setError(detail);
  for (const note of notes) if (note.node === node) note.say(detail.state, detail.message);
});
api.addEventListener("execution_start", () => views.forEach((view) => view.setError(null)));
api.addEventListener("progress_text", ({ detail }) => {
  const node = nodeAt(detail.nodeId);
  for (const note of notes) if (note.node === node) note.say("loading", detail.text);
  if (shown().some((part) => part.node === node)) setTimeout(() => hideProgressText(node)); // after ComfyUI's listener
});
for (const ending of ["execution_interrupted", "execution_error", "execution_success", "reconnected"])
  api.addEventListener(ending, () => {
    views.forEach((view) => view.queueEnded());
    notes.forEach((note) => note.queueEnded());
    panel?.refreshSoon();
  });

function close() {
  panel?.destroy();
  panel = null;
}

app.registerExtension({
  name: "retune",

  setup() {
    sayMissing();
    app.extensionManager.registerSidebarTab({
      id: "retune-runs",
      icon: "pi pi-chart-line",
      title: "Runs",
      tooltip: "Retune: training runs",
      type: "custom",
      render(element) {
        close();
        panel = new RunsPanel(element);
      },
      destroy: close,
    });
  },

  /** ComfyUI calls no onRemoved in subgraphs of an old workflow. */
  afterConfigureGraph() {
    const root = app.rootGraph ?? app.graph, graphs = [root, ...root.subgraphs.values()];
    shown().forEach((part) => graphs.includes(part.node.graph) || part.dispose());
  },

  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("Retune")) return;
    followPresets(node, node.constructor.nodeData);
    fold(node); // before a view, which stands below the button
    if (hasNote(node)) {
      const note = new Note(node);
      extend(node, "onExecuted", (output) => note.found(output));
      extend(node, "onRemoved", () => note.dispose());
    }
    const name = nameWidget(node);
    if (!name) return;
    const view = new RunView(node);
    extend(name, "callback", () => {
      view.setError(null);
      view.load(undefined, 400);
    });
    extend(node, "onExecuted", (output) => view.load(output?.retune_run?.[0]));
    extend(node, "onRemoved", () => view.dispose());
  },
});
