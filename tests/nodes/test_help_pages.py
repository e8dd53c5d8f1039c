"""Help pages (js/docs) against the nodes' schemas: inputs, outputs, defaults, pictures, links."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "js" / "docs"
WITHOUT_PAPER = {
    *("RetuneDatasetFromImages", "RetuneDemoDataset", "RetuneLoadDataset", "RetuneLoadTextEncoder"),
    *("RetuneSaveTextEncoder", "RetuneScaleConditioning", "RetuneScaleTextEncoder"),
}


def page(node_id: str) -> str:
    return (DOCS / f"{node_id}.md").read_text(encoding="utf-8")


def inputs(info: dict) -> dict[str, dict]:
    """Options of a node's inputs by name; of a dynamic combo's inputs, those of its first choice."""
    found = {}
    for group in ("required", "optional"):
        for name, spec in info["input"].get(group, {}).items():
            found[name] = spec[1] if len(spec) > 1 else {}
            if spec[0] == "COMFY_DYNAMICCOMBO_V3":
                found |= inputs({"input": spec[1]["options"][0]["inputs"]})
    return found


def tables(text: str, heading: str) -> dict[str, list[str]]:
    """Cells of the rows of the table of names below a heading, by each name in backticks in a row's first cell."""
    section = re.split(r"^## ", text.split(f"\n## {heading}\n")[1], maxsplit=1, flags=re.MULTILINE)[0]
    lines = section[section.index("| name |") :].split("\n\n")[0].splitlines()[2:]
    rows = [re.split(r" ?(?<!\\)\| ?", line.strip("|")) for line in lines]
    return {name: row for row in rows for name in re.findall(r"`([^`]+)`", row[0])}


def default_cell(row: list[str], name: str) -> str:
    """What a row says of an input's default: one value for all of its names, or one for each."""
    names, values = re.findall(r"`([^`]+)`", row[0]), row[2].strip().split(", ")
    return values[names.index(name)] if len(values) == len(names) else row[2].strip()


def shown(default) -> str:
    """A default as the pages write it."""
    if isinstance(default, bool):
        return "on" if default else "off"
    return "empty" if default == "" else str(default)


def same_default(cell: str, default) -> bool:
    text = cell.strip().replace("`", "")
    if isinstance(default, int | float) and not isinstance(default, bool) and re.fullmatch(r"-?[\d.e-]+", text):
        return float(text) == float(default)
    return text == shown(default)


def test_every_node_has_its_page_and_no_page_is_left_over(schemas):
    assert {file.stem for file in DOCS.glob("*.md")} == set(schemas)
    for node_id, info in schemas.items():
        text = page(node_id)
        assert text.startswith(f"# {info['display_name']}\n\n") and "\n## When to use it\n" in text, node_id
        assert len(text.split()) > 100, f"{node_id} says little"


def test_pages_name_exactly_the_inputs_and_outputs(schemas):
    for node_id, info in schemas.items():
        text = page(node_id)
        for heading, names in (("Inputs", set(inputs(info))), ("Outputs", set(info["output_name"]))):
            rows = set(tables(text, heading))
            growing = {name for name in rows if re.fullmatch(r"reward\d", name)}
            assert rows - growing == names, f"{node_id}, {heading}: {names - rows} missing, {rows - names} left over"


def test_pages_give_the_schemas_defaults(schemas):
    wrong = []
    for node_id, info in schemas.items():
        rows = tables(page(node_id), "Inputs")
        for name, options in inputs(info).items():
            cell = default_cell(rows[name], name)
            if "default" in options and not same_default(cell, options["default"]):
                wrong.append(f"{node_id}.{name}: the page says {cell}, the schema {shown(options['default'])}")
    assert not wrong, "\n".join(wrong)


def test_ranges_that_pages_advise_can_be_set(schemas):
    number = r"(-?\d[\d.]*(?:e-?\d+)?)"
    wrong = []
    for node_id, info in schemas.items():
        rows = tables(page(node_id), "Inputs")
        for name, options in inputs(info).items():
            if "max" not in options or len(re.findall(r"`([^`]+)`", rows[name][0])) > 1:
                continue
            for pair in re.findall(rf"{number} to {number}", " ".join(rows[name][1:])):
                if not all(options["min"] <= float(end.rstrip(".")) <= options["max"] for end in pair):
                    wrong.append(f"{node_id}.{name}: {' to '.join(pair)}, allowed {options['min']} to {options['max']}")
    assert not wrong, "\n".join(wrong)


def test_pages_have_small_pictures_that_exist(schemas):
    used = {node_id: re.findall(r"!\[[^\]]+\]\(([^)]+)\)", page(node_id)) for node_id in schemas}
    assert not [node_id for node_id, pictures in used.items() if not pictures]
    files = {DOCS / name for pictures in used.values() for name in pictures}  # ComfyUI looks for them beside the pages
    assert files == set((DOCS / "pictures").iterdir())
    sizes = [file.stat().st_size for file in files]
    assert max(sizes) <= 60_000 and sum(sizes) <= 1_200_000


def test_papers_are_links(schemas):
    for node_id in schemas:
        text = page(node_id)
        plain = re.sub(r"\[[^\]]*\]\([^)]*\)", "", text)
        assert not re.findall(r"\d{4}\.\d{5}", plain), f"{node_id} names a paper without a link"
        assert node_id in WITHOUT_PAPER or re.search(r"\]\(https://", text), f"{node_id} has no source"


def test_nodes_inputs_and_outputs_are_explained_and_can_be_found(schemas):
    for node_id, info in schemas.items():
        assert len(info["description"]) > 20 and len(info["search_aliases"]) >= 1, node_id
        short = [name for name, options in inputs(info).items() if len(options.get("tooltip") or "") < 8]
        assert not short, f"{node_id}: no tooltip on {short}"
        assert all(len(tooltip or "") >= 8 for tooltip in info["output_tooltips"]), node_id


def test_comfyui_serves_pages_and_pictures(comfyui_server):
    assert comfyui_server.request("/extensions/retune/docs/RetuneLoadT5.md").startswith(b"# Load T5")
    assert comfyui_server.request("/extensions/retune/docs/pictures/t5.jpg")[:2] == b"\xff\xd8"
