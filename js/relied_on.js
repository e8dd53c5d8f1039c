// What these scripts use of ComfyUI's page: one line in the console names what this version lacks.
import { api } from "../../scripts/api.js";
import { app } from "../../scripts/app.js";

const NODE = "addDOMWidget addWidget computeSize setSize getLayoutWidgets isWidgetVisible findInputSlot".split(" ");
NODE.push("isInputConnected", "getInputNode");

/** Names of missing attributes. */
export function missing() {
  const parts = {
    api: [api, ["addCustomEventListener", "addEventListener", "fetchApi", "apiURL"]],
    app: [app, ["registerExtension", "loadGraphData", "loadApiJson", "canvas", "extensionManager"]],
    extensionManager: [app.extensionManager, ["registerSidebarTab", "toast", "dialog", "setting"]],
    LGraphNode: [globalThis.LiteGraph?.LGraphNode?.prototype, NODE],
  };
  return Object.entries(parts).flatMap(([name, [object, attributes]]) =>
    attributes.filter((attribute) => !(attribute in (object ?? {}))).map((attribute) => `${name}.${attribute}`));
}

export function sayMissing() {
  const names = missing();
  if (names.length) console.error(`Retune: this ComfyUI's page lacks ${names.join(", ")}. Please update ComfyUI.`);
}
