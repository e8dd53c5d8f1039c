// A view of the run in every training node; the runs panel in the sidebar.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";
import { RunView, nameWidget, views } from "./run_view.js";
import { RunsPanel } from "./runs_panel.js";

let panel = null;

// Before setup: a run may be in progress; ComfyUI warns of events without listeners.
for (const kind of ["step", "sample", "state"])
  api.addCustomEventListener(`retune.${kind}`, ({ detail }) => {
    views.forEach((view) => view.event(kind, detail));
    panel?.event(kind, detail);
  });
for (const ending of ["execution_interrupted", "execution_error", "execution_success", "reconnected"])
  api.addEventListener(ending, () => {
    views.forEach((view) => view.queueEnded());
    panel?.refreshSoon();
  });

function close() {
  panel?.destroy();
  panel = null;
}

function extend(object, name, more) {
  const before = object[name];
  object[name] = function (...values) {
    before?.apply(this, values);
    more(...values);
  };
}

app.registerExtension({
  name: "retune",

  setup() {
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
    views.forEach((view) => graphs.includes(view.node.graph) || view.dispose());
  },

  nodeCreated(node) {
    const name = nameWidget(node);
    if (!name || !node.comfyClass?.startsWith("Retune")) return;
    const view = new RunView(node);
    extend(name, "callback", () => view.load(undefined, 400));
    extend(node, "onExecuted", (output) => view.load(output?.retune_run?.[0]));
    extend(node, "onRemoved", () => view.dispose());
  },
});
