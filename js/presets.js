// Presets: choosing one fills the widgets in, changing one of them afterwards says "custom".
import { extend, setWidget } from "./dom.js";

/** node: new, with an input `preset` whose options name the values of each preset. */
export function followPresets(node, nodeData) {
  const preset = node.widgets?.find(({ name }) => name === "preset");
  const presets = { ...nodeData?.input?.required, ...nodeData?.input?.optional }.preset?.[1]?.values_of;
  if (!preset || !presets) return;
  const named = node.widgets.filter(({ name }) => Object.values(presets).some((values) => name in values));
  let filling = false;
  const fill = () => {
    filling = true;
    for (const widget of named) {
      const value = presets[preset.value]?.[widget.name];
      if (value !== undefined && widget.value !== value) setWidget(node, widget, value);
    }
    filling = false;
  };
  extend(preset, "callback", fill);
  extend(node, "onConfigure", fill); // the preset wins in a saved workflow too
  for (const widget of named)
    extend(widget, "callback", () => {
      const value = presets[preset.value]?.[widget.name];
      if (!filling && value !== undefined && widget.value !== value) setWidget(node, preset, "custom");
    });
}
