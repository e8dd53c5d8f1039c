"""Texts of the nodes in other languages: exactly those of the schemas, all of them, and ComfyUI serves them.

After a change to a schema `RETUNE_WRITE_LOCALES=1 python -m pytest tests/nodes/test_locales.py` writes the English file
anew. The other languages are written by hand: the failing test prints each key that is missing, left over or changed
with its English text. Tell translated inputs apart as users see them: a text that mentions another input uses that
input's translated name, while values of combos stay as they are, since workflows hold them.
"""

import json
import os
import re
from pathlib import Path

import pytest
from retune.training.runs.records import STATES

LOCALES = Path(__file__).parents[2] / "locales"
TRANSLATED = ("zh", "ja")
LETTERS = {"zh": r"[\u4e00-\u9fff]", "ja": r"[\u3040-\u30ff\u4e00-\u9fff]"}
KEPT = set("CLIP Huber LoRA SNR UNet VAE alpha c cfg dropout gamma".split())
"""Words that both languages use as they are."""
ROWS = 8
"""Translated inputs of one that grows with its connections."""
COMFYUI_TRANSLATES = {"model", "training"}


def groups(inputs: dict) -> list[tuple[str, list]]:
    return [item for group in ("required", "optional") for item in inputs.get(group, {}).items()]


def inputs_of(name: str, spec: list) -> dict[str, dict]:
    """{name, tooltip} of an input and of those below it, by the frontend's key: dots are underscores there."""
    kind, options = spec[0], spec[1] if len(spec) > 1 else {}
    found = {name: {"name": options.get("display_name") or name.split(".")[-1], "tooltip": options.get("tooltip", "")}}
    for option in options["options"] if kind == "COMFY_DYNAMICCOMBO_V3" else ():
        for below, inner in groups(option["inputs"]):
            found |= inputs_of(f"{name}.{below}", inner)
    if kind == "COMFY_AUTOGROW_V3":
        template = options["template"]
        ((_, inner),) = groups(template["input"])
        for row in range(min(template["max"], ROWS)):
            found |= inputs_of(f"{name}.{template['prefix']}{row}", inner)
    return {key.replace(".", "_"): value for key, value in found.items()}


def english(info: dict) -> dict:
    """A node's texts in the frontend's layout; an output that is called as its type has ComfyUI's name for the type."""
    inputs, outputs = {}, {}
    for name, spec in groups(info["input"]):
        inputs |= inputs_of(name, spec)
    for index, (name, kind) in enumerate(zip(info["output_name"], info["output"], strict=True)):
        named = {} if name == kind else {"name": name}
        outputs[str(index)] = named | {"tooltip": info["output_tooltips"][index]}
    texts = {"display_name": info["display_name"], "description": info["description"]}
    return texts | {"inputs": inputs, "outputs": outputs}


def flat(tree: dict, path: str = "") -> dict[str, str]:
    """Leaves of nested dicts by their path."""
    found = {}
    for key, value in tree.items():
        found |= flat(value, f"{path}{key}/") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def read(language: str, name: str = "nodeDefs.json") -> dict:
    return json.loads((LOCALES / language / name).read_text(encoding="utf-8"))


def write(language: str, texts: dict) -> None:
    text = json.dumps(texts, ensure_ascii=False, indent=2) + "\n"
    (LOCALES / language / "nodeDefs.json").write_text(text, encoding="utf-8")


def test_the_english_file_is_the_schemas_own_text(schemas):
    texts = {node_id: english(info) for node_id, info in schemas.items()}
    if os.environ.get("RETUNE_WRITE_LOCALES"):
        write("en", texts)
    ours, stored = flat(texts), flat(read("en"))
    changed = [f"{key}: {ours.get(key)!r}" for key in ours.keys() | stored.keys() if ours.get(key) != stored.get(key)]
    assert not changed, "\n".join(["not as in the schemas:", *sorted(changed)])


@pytest.mark.parametrize("language", TRANSLATED)
def test_a_language_has_every_text_and_no_other(schemas, language):
    ours, stored = flat({node_id: english(info) for node_id, info in schemas.items()}), flat(read(language))
    lacking = [f"lacking {key}: {ours[key]!r}" for key in sorted(ours.keys() - stored.keys())]
    left_over = [f"left over {key}" for key in sorted(stored.keys() - ours.keys())]
    assert not lacking + left_over, "\n".join([language, *lacking, *left_over])


@pytest.mark.parametrize("language", TRANSLATED)
def test_every_text_is_translated(language):
    for key, text in flat(read(language)).items():
        kept = not set(re.findall(r"[A-Za-z]+", text)) - KEPT
        assert re.search(LETTERS[language], text) or kept, f"{language} {key} is still English: {text!r}"


@pytest.mark.parametrize("language", TRANSLATED)
def test_what_must_stay_as_it_is_stays(language):
    texts = flat(read(language))
    for key, text in flat(read("en")).items():
        kept = re.findall(r"arXiv [\d.]+|%\w+%|\{\w*\}|models/\w+|output/\w+|\d+\.\d+", text)
        missing = [part for part in kept if part not in texts[key]]
        assert not missing, f"{language} {key} lacks {missing}: {texts[key]!r}"


@pytest.mark.parametrize("language", TRANSLATED)
def test_texts_name_the_choices_that_the_english_ones_name(schemas, language):
    texts = flat(read(language))
    for node_id, info in schemas.items():
        for name, spec in groups(info["input"]):
            if spec[0] == "COMBO":
                key = f"{node_id}/inputs/{name}/tooltip"
                named = [choice for choice in spec[1]["options"] if f"{choice}: " in spec[1]["tooltip"]]
                assert all(choice in texts[key] for choice in named), f"{language} {key}: {named}"


@pytest.mark.parametrize("language", ("en", *TRANSLATED))
def test_no_name_or_description_holds_what_the_frontend_would_compile(language):
    compiled = {key: text for key, text in flat(read(language)).items() if not key.endswith("tooltip")}
    assert not {key: text for key, text in compiled.items() if re.search(r"[{}@|]", text)}  # vue-i18n's own syntax


@pytest.mark.parametrize("language", TRANSLATED)
def test_node_categories_are_translated(schemas, language):
    parts = {part for info in schemas.values() for part in info["category"].split("/")}
    assert set(read(language, "main.json")["nodeCategories"]) == parts - {"retune"} - COMFYUI_TRANSLATES


@pytest.mark.parametrize("language", TRANSLATED)
def test_the_texts_of_the_page_are_translated(language):
    scripts = "".join(file.read_text(encoding="utf-8") for file in (LOCALES.parent / "js").glob("*.js"))
    shown = {double or single for double, single in re.findall(r"""\bt\((?:"([^"]+)"|'([^']+)')""", scripts)}
    texts = read(language, "main.json")["retune"]
    assert shown | set(STATES) <= set(texts)
    for text, translated in texts.items():
        assert set(re.findall(r"{\w+}", text)) == set(re.findall(r"{\w+}", translated)), text


def test_comfyui_serves_the_translations(comfyui_server):
    served = json.loads(comfyui_server.request("/i18n"))
    for language in TRANSLATED:
        assert served[language]["nodeDefs"] == read(language)
        assert served[language]["nodeCategories"] == read(language, "main.json")["nodeCategories"]
