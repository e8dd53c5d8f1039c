// Advanced inputs, folded in the classic renderer too, behind one button; Nodes 2.0 has a button of its own.
import { app } from "../../scripts/app.js";
import { extend, t } from "./dom.js";

/**
 * Folds the advanced widgets of a new node. What is seen is reordered, basics and the view of the run first; the
 * widgets themselves, and so the saved values, stay in the schema's order. `showAdvanced` is the frontend's own flag of
 * a node, for both renderers, and is saved with it.
 */
export function fold(node) {
  const folded = node.widgets?.filter((widget) => widget.options?.advanced) ?? [];
  if (!folded.length || !node.getLayoutWidgets) return;
  const options = { serialize: false, canvasOnly: true }; // not in Nodes 2.0, nor in the properties panel
  const button = node.addWidget("button", "retune_advanced", null, () => toggle(node), options);
  button.serialize = false;
  node.showAdvanced = false;
  const update = () => {
    for (const widget of folded) widget.advanced = !isLinked(node, widget);
    const count = folded.filter((widget) => widget.advanced).length;
    button.label = node.showAdvanced ? t("fewer inputs") : t("{count} more inputs", { count });
  };
  const { getLayoutWidgets } = node;
  node.getLayoutWidgets = function () {
    update();
    const visible = getLayoutWidgets.call(this).filter((widget) => this.isWidgetVisible(widget));
    return visible.sort((a, b) => Number(Boolean(a.advanced)) - Number(Boolean(b.advanced)));
  };
  update();
  shrink(node, 0);
  extend(node, "onConfigure", (saved) => {
    if (saved.showAdvanced !== undefined) return;
    node.showAdvanced = false;
    update();
    shrink(node, node.size[1] - heightOf(node, true)); // saved when all inputs were in sight
  });
}

const isLinked = (node, widget) => {
  const slot = node.findInputSlot(widget.name);
  return slot >= 0 && node.isInputConnected(slot);
};

/** The smallest height of a node with or without its advanced widgets. */
function heightOf(node, showAdvanced) {
  const before = node.showAdvanced;
  node.showAdvanced = showAdvanced;
  const height = node.computeSize()[1];
  node.showAdvanced = before;
  return height;
}

/** Sets a node's height to its smallest and what a user gave it beyond. */
function shrink(node, more) {
  node.setSize([Math.max(node.size[0], node.computeSize()[0]), node.computeSize()[1] + Math.max(0, more)]);
}

function toggle(node) {
  const more = node.size[1] - heightOf(node, node.showAdvanced);
  node.showAdvanced = !node.showAdvanced;
  shrink(node, more);
  app.canvas.setDirty(true, true);
}
