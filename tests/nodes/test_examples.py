"""The example workflows as users get them: labelled, valid for a running ComfyUI, runnable on the demo model."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = sorted(path.stem for path in (ROOT / "example_workflows").glob("*.json"))
NOTES = ("MarkdownNote", "Note")
WIDGETS = ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
DYNAMIC_COMBO, AUTOGROW = "COMFY_DYNAMICCOMBO_V3", "COMFY_AUTOGROW_V3"
ACTIVE, BYPASSED = 0, 4
TITLE = 30  # pixels of a node's title bar, above its position


def read(title: str) -> dict:
    return json.loads((ROOT / "example_workflows" / f"{title}.json").read_text(encoding="utf-8"))


def specs(about: dict) -> list[tuple[str, object, dict, bool]]:
    """(name, kind, options, required) of a node's inputs in ComfyUI's order; kind is a list of choices or a type."""
    found = []
    for group in ("required", "optional"):
        for name, spec in about.get(group, {}).items():
            options = spec[1] if len(spec) > 1 else {}
            kind = options["options"] if spec[0] == "COMBO" else spec[0]
            found.append((name, kind, options, group == "required"))
    return found


def expand(spec: tuple, chosen: str | None) -> list[tuple]:
    """An input with those that a dynamic combo adds below it for the chosen key."""
    name, kind, options, _ = spec
    if kind != DYNAMIC_COMBO:
        return [spec]
    about = {option["key"]: option["inputs"] for option in options["options"]}[chosen]
    return [(name, list_of_keys(options), options, True), *((f"{name}.{n}", *rest) for n, *rest in specs(about))]


def list_of_keys(options: dict) -> list[str]:
    return [option["key"] for option in options["options"]]


def widget_values(node: dict, about: dict) -> dict:
    """The values of a node's widgets by input name, as the frontend reads them; later additions get their defaults."""
    values = iter(node.get("widgets_values") or [])
    found = {}
    for spec in specs(about):
        if spec[1] == DYNAMIC_COMBO:
            chosen = next(values)
            found[spec[0]] = chosen
            below = expand(spec, chosen)[1:]
        else:
            below = [spec]
        for name, kind, options, _ in below:
            if isinstance(kind, list) or kind in WIDGETS:
                default = options.get("default", kind[0] if isinstance(kind, list) else None)
                found[name] = next(values, default)
                if options.get("control_after_generate"):
                    next(values, None)
    assert not list(values), f"{node['type']} has more widget values than widgets"
    return found


def source(graph: dict, link: int) -> list | None:
    """[node id, output] that feeds a link, through bypassed nodes by type as in the frontend; None from a muted one."""
    links = {entry[0]: entry for entry in graph["links"]}
    nodes = {node["id"]: node for node in graph["nodes"]}
    while True:
        _, origin, slot, _, _, kind = links[link]
        node = nodes[origin]
        if node["mode"] != BYPASSED:
            return [str(origin), slot] if node["mode"] == ACTIVE else None
        same = node["inputs"][slot : slot + 1] + node["inputs"]
        link = next(each["link"] for each in same if each["type"] == kind)
        if link is None:
            return None


def to_prompt(graph: dict, known: dict) -> dict:
    """A saved graph without subgraphs as an API-format prompt: what the frontend's graphToPrompt sends."""
    prompt = {}
    for node in graph["nodes"]:
        if node["type"] in NOTES or node["mode"] != ACTIVE:
            continue
        inputs = widget_values(node, known[node["type"]]["input"])
        for entry in node["inputs"]:
            if entry.get("link") is not None and (feeding := source(graph, entry["link"])):
                inputs[entry["name"]] = feeding
        prompt[str(node["id"])] = {"class_type": node["type"], "inputs": inputs}
    return prompt


def problems(prompt: dict, known: dict) -> list[str]:
    """What /object_info says against a prompt: names, missing inputs, types, choices, ranges."""
    found = []
    for number, node in prompt.items():
        given = dict(node["inputs"])
        for top in specs(known[node["class_type"]]["input"]):
            for name, kind, options, required in expand(top, given.get(top[0])):
                where = f"node {number} ({node['class_type']}), {name}"
                if kind == AUTOGROW:
                    rows = [given.pop(key) for key in list(given) if key.startswith(f"{name}.")]
                    wanted = next(iter(options["template"]["input"]["required"].values()))[0]
                    found += [f"{where}: too few"] * (len(rows) < options["template"]["min"])
                    found += [
                        f"{where}: {complaint}" for row in rows if (complaint := wrong(row, wanted, {}, prompt, known))
                    ]
                elif name in given:
                    complaint = wrong(given.pop(name), kind, options, prompt, known)
                    found += [f"{where}: {complaint}"] if complaint else []
                elif required:
                    found.append(f"{where} is missing")
        found += [f"node {number} ({node['class_type']}) has no input {name}" for name in given]
    return found


def wrong(value, kind, options: dict, prompt: dict, known: dict) -> str:
    """Why a value does not fit an input; empty when it does."""
    if isinstance(value, list):
        outputs = known[prompt[value[0]]["class_type"]]["output"]
        fits = value[1] < len(outputs) and (kind == "*" or outputs[value[1]] == kind)
        return "" if fits else f"{value} is no {kind}"
    if isinstance(kind, list):
        return "" if value in kind else f"{value!r} is not among {kind}"
    types = {"INT": (int,), "FLOAT": (int, float), "STRING": (str,), "BOOLEAN": (bool,)}.get(kind)
    if types is None or type(value) not in types:
        return f"{value!r} is no {kind}"
    low, high = options.get("min", value), options.get("max", value)
    return "" if type(value) in (str, bool) or low <= value <= high else f"{value} is outside {low}..{high}"


def boxes(graph: dict) -> list[tuple[str, float, float, float, float]]:
    """(type, left, top, right, bottom) of every node, its title bar included."""
    return [
        (node["type"], x, y - TITLE, x + node["size"][0], y + node["size"][1])
        for node in graph["nodes"]
        for x, y in [node["pos"]]
    ]


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_is_labelled_and_laid_out(title):
    graph, picture = read(title), ROOT / "example_workflows" / f"{title}.jpg"
    assert picture.stat().st_size < 120_000  # ComfyUI's template browser shows the .jpg of the same name
    notes = [node for node in graph["nodes"] if node["type"] in NOTES]
    assert notes[0]["title"] == title and all(len(node["widgets_values"][0]) > 30 for node in notes)
    assert "Run" in notes[0]["widgets_values"][0] and "real model" in notes[0]["widgets_values"][0]
    placed = boxes(graph)
    for i, (name, left, top, right, bottom) in enumerate(placed):
        for other, x0, y0, x1, y1 in placed[:i]:
            assert left >= x1 or x0 >= right or top >= y1 or y0 >= bottom, f"{name} lies on {other}"
    areas = [(x, y, x + width, y + height) for x, y, width, height in (each["bounding"] for each in graph["groups"])]
    for name, left, top, right, bottom in placed:
        inside = [
            area for area in areas if area[0] <= left and area[1] <= top and right <= area[2] and bottom <= area[3]
        ]
        assert name in NOTES or len(inside) == 1, f"{name} lies in {len(inside)} groups"
    fixed = [node["widgets_values"][1] == "fixed" for node in graph["nodes"] if node["type"] == "KSampler"]
    assert fixed and all(fixed)  # the same picture each time, and a finished run is not begun anew


@pytest.mark.parametrize("title", EXAMPLES)
def test_an_example_is_valid_for_this_comfyui(comfyui_server, title):
    known = comfyui_server.object_info()
    prompt = to_prompt(read(title), known)
    assert problems(prompt, known) == []
    assert any(known[node["class_type"]]["output_node"] for node in prompt.values())


def test_a_broken_prompt_is_found(comfyui_server):
    known = comfyui_server.object_info()
    prompt = to_prompt(read("Apply several LoRAs"), known)
    prompt["2"]["inputs"] |= {"count.lora_1": "gone", "count.strength_clip_2": 1000, "clip": ["1", 2], "old": 1}
    del prompt["12"]["inputs"]["cfg"]
    text = "\n".join(problems(prompt, known))
    for part in ("'gone' is not among", "1000 is outside", "is no CLIP", "no input old", "cfg is missing"):
        assert part in text


def twins(known: dict) -> dict[str, tuple[dict, dict]]:
    """(converted example, API-format twin in tests/workflows of the same nodes) by title."""
    found = {}
    stored = [json.loads(file.read_text(encoding="utf-8")) for file in (ROOT / "tests" / "workflows").glob("*.json")]
    for title in EXAMPLES:
        prompt = to_prompt(read(title), known)
        kinds = {number: node["class_type"] for number, node in prompt.items()}
        same = [twin for twin in stored if {number: node["class_type"] for number, node in twin.items()} == kinds]
        if same:
            found[title] = prompt, same[0]
    return found


def test_examples_are_what_their_api_twins_run(comfyui_server):
    known = comfyui_server.object_info()
    found = twins(known)
    assert list(found) == EXAMPLES  # test_headless.py runs the twins to their end
    for title, (prompt, twin) in found.items():
        for number, node in twin.items():
            inputs = prompt[number]["inputs"]
            assert {name: inputs.get(name) for name in node["inputs"]} == node["inputs"], (title, node["class_type"])
            defaults = {
                name: options.get("default") for name, _, options, _ in specs(known[node["class_type"]]["input"])
            }
            more = {name: value for name, value in inputs.items() if name not in node["inputs"]}
            assert all(value == defaults.get(name) for name, value in more.items()), (title, node["class_type"], more)
