"""The nodes as shared workflows rely on them, against `tests/contract/nodes.json`.

The file holds every public node as it was released, with its inputs in schema order: workflows keep widget values by
position. Allowed are new nodes, new optional inputs after the old ones, appended outputs, appended combo values and
other texts. A released input is added to the file, never changed there.
"""

import json
from copy import deepcopy
from pathlib import Path

import pytest

CONTRACT = Path(__file__).parents[1] / "contract" / "nodes.json"
GROUPS = ("required", "optional")


@pytest.fixture(scope="module")
def contract():
    return json.loads(CONTRACT.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def nodes(schemas):
    """What /object_info answers, through JSON as a browser reads it."""
    return json.loads(json.dumps(schemas))


def inputs_of(info: dict) -> dict[str, tuple[str, list]]:
    """Input name -> (group, spec), in schema order."""
    return {name: (group, spec) for group in GROUPS for name, spec in info["input"].get(group, {}).items()}


def input_breaks(was: dict, group: str, spec: list) -> list[str]:
    """What of a released input has changed."""
    options = spec[1] if len(spec) > 1 else {}
    pairs = {"type": (spec[0], was["type"]), "group": (group, was["group"])}
    if "default" in was:
        pairs["default"] = (options.get("default"), was["default"])
    breaks = [f"{what} {now!r}, was {old!r}" for what, (now, old) in pairs.items() if now != old]
    values = options.get("options", [])
    gone = [value for value in was.get("options", []) if value not in values and not isinstance(value, dict)]
    return breaks + ([f"values gone: {gone}"] if gone else [])


def node_breaks(old: dict, info: dict) -> list[str]:
    """What of a released node has changed."""
    released, inputs = list(old["inputs"]), inputs_of(info)
    breaks = [f"{name}: gone" for name in released if name not in inputs]
    for name, was in old["inputs"].items():
        breaks += [f"{name}: {text}" for text in (input_breaks(was, *inputs[name]) if name in inputs else ())]
    if [name for name in inputs if name in old["inputs"]] != [name for name in released if name in inputs]:
        breaks.append("order of inputs changed")
    new = [name for name in inputs if name not in old["inputs"]]
    if new and list(inputs)[-len(new) :] != new:
        breaks.append(f"new inputs {new}; expected them after the old ones")
    breaks += [f"{name}: new and required; expected optional" for name in new if inputs[name][0] == "required"]
    if info["output"][: len(old["outputs"])] != old["outputs"]:
        breaks.append(f"outputs {info['output']}, were {old['outputs']}")
    return breaks


def contract_breaks(contract: dict, nodes: dict) -> list[str]:
    """One line for everything that would break a shared workflow."""
    breaks = [f"{node}: gone" for node in contract if node not in nodes]
    for node, old in contract.items():
        breaks += [f"{node}.{text}" for text in (node_breaks(old, nodes[node]) if node in nodes else ())]
    return breaks


def test_the_nodes_are_as_released(contract, nodes):
    assert not contract_breaks(contract, nodes)


def test_a_running_server_lists_the_nodes_as_released(contract, comfyui_server):
    assert not contract_breaks(contract, json.loads(comfyui_server.request("/object_info")))


def test_a_title_names_this_package_where_comfyui_has_the_same_and_only_there(comfyui_server):
    served = json.loads(comfyui_server.request("/object_info"))
    titles = {node: info["display_name"] for node, info in served.items() if not node.startswith("Retune")}
    for node, info in served.items():
        if node.startswith("Retune"):
            title = info["display_name"].removesuffix(" (Retune)")
            assert (title in titles.values()) == (title != info["display_name"]), node


def remove_node(nodes):
    del nodes["RetuneLoadT5"]


def remove_input(nodes):
    del nodes["RetuneTrainLora"]["input"]["optional"]["dropout"]


def change_type(nodes):
    nodes["RetuneTrainLora"]["input"]["required"]["rank"][0] = "FLOAT"


def change_default(nodes):
    nodes["RetuneTrainLora"]["input"]["required"]["rank"][1]["default"] = 8


def change_group(nodes):
    groups = nodes["RetuneTrainLora"]["input"]
    groups["required"] |= {"preset": groups["optional"].pop("preset")}


def remove_value(nodes):
    nodes["RetuneTrainLora"]["input"]["required"]["algorithm"][1]["options"].remove("DoRA")


def reorder_inputs(nodes):
    groups = nodes["RetuneTrainLora"]["input"]
    groups["required"] = dict(reversed(groups["required"].items()))


def insert_input(nodes):
    groups = nodes["RetuneTrainLora"]["input"]
    groups["optional"] = {"new": ["INT", {"default": 1}], **groups["optional"]}


def require_input(nodes):
    nodes["RetuneRunChart"]["input"]["required"]["new"] = ["INT", {"default": 1}]


def reorder_outputs(nodes):
    nodes["RetuneTrainLora"]["output"].reverse()


@pytest.mark.parametrize(
    "change",
    [
        *(remove_node, remove_input, change_type, change_default, change_group),
        *(remove_value, reorder_inputs, insert_input, require_input, reorder_outputs),
    ],
)
def test_a_change_that_breaks_workflows_is_found(contract, nodes, change):
    changed = deepcopy(nodes)
    change(changed)
    assert contract_breaks(contract, changed)


def test_additions_are_allowed(contract, nodes):
    grown = deepcopy(nodes)
    grown["RetuneTrainLora"]["input"]["optional"]["new"] = ["INT", {"default": 1}]
    grown["RetuneTrainLora"]["input"]["required"]["algorithm"][1]["options"].append("OFT")
    grown["RetuneTrainLora"]["output"].append("STRING")
    grown["RetuneNew"] = grown["RetuneTrainLora"]
    assert not contract_breaks(contract, grown)
