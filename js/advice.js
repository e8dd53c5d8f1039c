// Buttons for what an error of a training node advises: another run name, the value back, a new start.
import { button, setWidget, t } from "./dom.js";

/**
 * node: the training node. error: a retune.error. done: gets a text, and what undoes the change when the run begins, once
 * a button has changed an input; the user starts the run.
 */
export function advice(node, error, done) {
  if (error.setting === undefined) return [];
  const found = [], { other_name: other, setting, before } = error, name = setting?.replace("settings.", "");
  const offer = (text, target, value, after) => {
    if (!target) return;
    const apply = () => {
      const { node: owner, widget } = target, old = widget.value;
      setWidget(owner, widget, value);
      const undo = widget.name === "resume" ? () => setWidget(owner, widget, old) : null; // for one run only
      done(`${after} ${t("Run the workflow again.")}`, undo);
    };
    found.push(button(text, "", apply));
  };
  if (other) offer(t('Use "{name}"', { name: other }), inputOf(node, "run_name"), other, `run_name: ${other}.`);
  if (Array.isArray(before) || ["number", "string", "boolean"].includes(typeof before))
    offer(t("Set {name} back to {before}", { name, before }), inputOf(node, setting), before, `${name}: ${before}.`);
  offer(t("Begin again"), inputOf(node, "resume"), "restart", t("The old folder is moved aside."));
  return found;
}

/** The node and widget that set an input: of this node, or of the one on `settings`; nothing where a link sets it. */
function inputOf(node, name) {
  const [first, rest] = name.split("."), slot = node.findInputSlot(first);
  const isLinked = slot >= 0 && node.isInputConnected(slot);
  if (rest) return isLinked ? inputOf(node.getInputNode(slot) ?? node, rest) : undefined;
  const widget = isLinked ? undefined : node.widgets?.find((found) => found.name === first);
  return widget && { node, widget };
}
