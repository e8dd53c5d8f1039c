"""What ComfyUI, its Manager, pip and the registry rely on: import directions, package lists, node ids, help pages."""

import ast
import json
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from retune.training.commands.demo_in_comfyui import WORKFLOW

ROOT = Path(__file__).resolve().parent.parent
COMFYUI_MODULES = {"comfy", "comfy_api", "comfy_execution", "comfy_extras", "comfyui_version"}
COMFYUI_MODULES |= {"folder_paths", "nodes", "server"}
COMFYUI_MODULES |= {"latent_preview"}
HEAVY = {"accelerate", "diffusers", "lycoris", "matplotlib", "open_clip", "peft", "pandas", "sklearn"}
HEAVY |= {"scipy", "torchvision", "transformers"}  # ComfyUI may have imported these itself
COMMAND_LINE_ONLY = {"accelerate"}  # several processes or machines; ComfyUI trains in one
COMFYUI_BRINGS = set(
    "filelock numpy pillow psutil safetensors scipy sentencepiece tokenizers torch tqdm transformers".split()
)
DISTRIBUTIONS = {"PIL": "pillow", "lycoris": "lycoris-lora", "aiohttp": None}
"""Import name -> distribution. aiohttp: only to talk to ComfyUI, which brings it."""


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), str(file))


def imported(tree: ast.AST) -> set[str]:
    """Top-level names of all absolute imports in a syntax tree."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(node.module.split(".")[0])
    return names


def pyproject_list(name: str) -> list[str]:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    return ast.literal_eval(re.search(rf"^{name} = (\[.*?\])", text, re.DOTALL | re.MULTILINE)[1])


def python(program: str, *arguments: str, cwd: Path) -> str:
    """Standard output of a program in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", program, *arguments], cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def node_classes() -> dict[str, str]:
    """Node id by class name, read from the source as the Manager's scanner does."""
    found = {}
    for file in sources("nodes"):
        for node in tree_of(file).body:
            if isinstance(node, ast.ClassDef) and {ast.unparse(base) for base in node.bases} & NODE_BASES:
                found[node.name] = literal_node_id(node)
    return found


NODE_BASES = {"io.ComfyNode", "ComfyNode"}


def literal_node_id(node: ast.ClassDef) -> str:
    """The `node_id` that a node class gives literally."""
    ids = [keyword.value for keyword in ast.walk(node) if isinstance(keyword, ast.keyword) and keyword.arg == "node_id"]
    assert len(ids) == 1 and isinstance(ids[0], ast.Constant), f"{node.name} must give one literal node_id"
    return ids[0].value


def listed_classes() -> set[str]:
    """Class names that the extension's `get_node_list` returns."""
    functions = (node for node in ast.walk(tree_of(ROOT / "nodes" / "__init__.py")) if hasattr(node, "name"))
    lists = [node for f in functions if f.name == "get_node_list" for node in ast.walk(f) if isinstance(node, ast.List)]
    return {ast.unparse(element).split(".")[-1] for found in lists for element in found.elts}


def test_pyproject_names_every_package():
    folders = [file.parent for top in ("nodes", "training") for file in (ROOT / top).rglob("__init__.py")]
    expected = {"retune", *(".".join(["retune", *folder.relative_to(ROOT).parts]) for folder in folders)}
    assert set(pyproject_list("packages")) == expected


def test_every_import_is_a_declared_requirement():
    declared = {re.split(r"[^\w-]", name)[0] for name in pyproject_list("dependencies")}
    for file in [*sources("training"), *sources("nodes")]:
        foreign = imported(tree_of(file)) - set(sys.stdlib_module_names) - COMFYUI_MODULES
        needed = {DISTRIBUTIONS.get(name, name) for name in foreign} - {None}
        assert needed <= declared, f"{file.name} imports {needed - declared}"


def test_requirements_are_what_comfyui_lacks():
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    names = {line for line in lines if line and not line.startswith("#")}
    assert names == set(pyproject_list("dependencies")) - COMFYUI_BRINGS - COMMAND_LINE_ONLY  # and so: no pins


def test_comfyui_brings_what_we_count_on(comfyui):
    lines = (comfyui / "requirements.txt").read_text(encoding="utf-8").lower().splitlines()
    assert {re.split(r"[^\w-]", line)[0] for line in lines} >= COMFYUI_BRINGS


def test_the_root_module_imports_nothing(tmp_path):
    assert not [node for node in tree_of(ROOT / "__init__.py").body if isinstance(node, ast.Import | ast.ImportFrom)]
    program = "import sys; before = set(sys.modules); import retune; print(sorted(set(sys.modules) - before))"
    added = ast.literal_eval(python(program, cwd=tmp_path))
    assert [name for name in added if not name.startswith("__editable__")] == ["retune"]


def test_the_core_never_names_comfyui_or_the_nodes():
    for file in sources("training"):
        assert not imported(tree_of(file)) & COMFYUI_MODULES, file
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ImportFrom) and node.level:
                depth = len(file.parent.relative_to(ROOT).parts)  # so many dots stay inside training/
                assert node.level <= depth, f"{file} line {node.lineno} imports from outside training/"


IMPORT_CORE = """
import importlib, json, pkgutil, sys
import retune.training
for module in pkgutil.walk_packages(retune.training.__path__, "retune.training."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
print(json.dumps(sorted({name.split(".")[0] for name in sys.modules} | {n for n in sys.modules if "retune" in n})))
"""


def test_importing_the_whole_core_loads_neither_comfyui_nor_the_nodes(tmp_path):
    loaded = set(json.loads(python(IMPORT_CORE, cwd=tmp_path)))
    assert not loaded & (COMFYUI_MODULES | {"retune.nodes"})


IMPORT_NODES = """
import asyncio, json, sys, time
sys.path.insert(0, sys.argv[1])
import comfy.options
comfy.options.enable_args_parsing(False)
from comfy.cli_args import args
args.cpu, args.base_directory = True, sys.argv[2]
import nodes, server, comfy_api.latest
before, start = set(sys.modules), time.process_time()
import retune
extension = asyncio.run(retune.comfy_entrypoint())
ids = [node.GET_SCHEMA().node_id for node in asyncio.run(extension.get_node_list())]
seconds = time.process_time() - start
print(json.dumps({"ids": ids, "added": sorted(set(sys.modules) - before), "seconds": seconds}))
"""


def test_comfyui_starts_as_fast_with_the_package(comfyui, tmp_path):
    output = python(IMPORT_NODES, str(comfyui), str(tmp_path), cwd=tmp_path)
    loaded = json.loads(output.splitlines()[-1])
    assert sorted(loaded["ids"]) == sorted(node_classes().values())
    assert not {name.split(".")[0] for name in loaded["added"]} & HEAVY
    assert loaded["seconds"] < 0.5  # 0.2 s of wall time is the aim; processor time with room for a slow machine


def test_the_extension_lists_every_node_class():
    assert listed_classes() == set(node_classes())


def test_node_ids_start_with_the_package_name_and_differ():
    ids = list(node_classes().values())
    assert len(set(ids)) == len(ids) and all(node_id.startswith("Retune") for node_id in ids)


def test_every_input_and_output_has_a_tooltip():
    for file in sources("nodes"):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("Input", "Output"):
                keywords = {keyword.arg for keyword in node.keywords}
                assert keywords & {"tooltip", None}, f"{file.name} line {node.lineno}: no tooltip"


@pytest.fixture(scope="module")
def tracked() -> list[Path]:
    """Files under version control; a folder that was unpacked from an archive has none to check."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def test_no_file_names_a_place_on_somebodys_machine(tracked):
    place = re.compile(rb"(?<![\w.~])/(?:root|work|home/\w+|Users/\w+)/|[A-Z]:\\Users\\\w", re.ASCII)
    text = (file for file in tracked if file.suffix not in (".safetensors", ".jpg", ".png"))
    assert not [str(file) for file in text if file != Path(__file__).resolve() and place.search(file.read_bytes())]


@pytest.fixture(scope="module")
def packed(tracked) -> set[str]:
    """What the registry gets: the files under version control that `.comfyignore` does not name."""
    patterns = ["git", "ls-files", "-z", "--cached", "--ignored", "--exclude-from=.comfyignore"]
    ignored = subprocess.run(patterns, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return {file.relative_to(ROOT).as_posix() for file in tracked} - set(ignored.split("\0"))


def test_the_registry_gets_what_a_user_needs_and_nothing_else(packed):
    assert {name.split("/")[0] for name in packed} == {
        *("__init__.py", "CHANGELOG.md", "LICENSE", "README.md", "pyproject.toml", "requirements.txt"),
        *("example_workflows", "js", "locales", "nodes", "tests", "training"),
    }
    there = {name for name in packed if name.startswith("tests/")}  # what the demo runs in a ComfyUI, and nothing else
    assert WORKFLOW.relative_to(ROOT).as_posix() in there
    assert all(name.startswith("tests/workflows/") for name in there)
    assert not [name for name in packed if name.endswith((".pyc", ".zip", ".log", ".tmp"))]
    weights = {file for file in packed if file.startswith("training/demo/weights/")}
    assert len([name for name in weights if name.endswith(".safetensors")]) >= 4 and len(weights) >= 10
    assert {f"js/docs/{node_id}.md" for node_id in node_classes().values()} <= packed
    assert sum((ROOT / name).stat().st_size for name in packed) <= 24e6


@pytest.mark.slow
def test_comfy_cli_finds_no_fault_and_packs_the_same(packed, comfy_cli, tmp_path):
    copy = tmp_path / "retune"
    subprocess.run(["git", "clone", "--quiet", ROOT, copy], check=True)  # as committed
    for verb, says in (("validate", "All validation checks passed"), ("pack", "Created zip file")):
        done = comfy_cli("node", verb, cwd=copy)
        assert done.returncode == 0 and says in done.stdout + done.stderr, done.stdout + done.stderr
    with zipfile.ZipFile(copy / "node.zip") as file:
        assert set(file.namelist()) == packed


def test_the_packed_package_works_by_itself(packed, tmp_path):
    for name in packed:
        target = tmp_path / "retune" / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, target)
    program = "import sys; sys.path.insert(0, sys.argv[1]); import retune.training.__main__ as m; print(m.__file__)"
    program += IMPORT_CORE
    output = python(program, str(tmp_path), cwd=tmp_path).splitlines()
    assert Path(output[0]).is_relative_to(tmp_path)


def test_nothing_large_or_generated_is_tracked(tracked):
    names = {file.relative_to(ROOT).parts[0] for file in tracked}
    assert not names & {".venv", "output", "build", "dist", "retune.egg-info"}
    tensors = [file for file in tracked if file.suffix == ".safetensors"]
    fixtures = [file for file in tensors if file.is_relative_to(ROOT / "tests")]
    assert sum(file.stat().st_size for file in tensors) - sum(file.stat().st_size for file in fixtures) <= 24e6
    assert sum(file.stat().st_size for file in fixtures) <= 5e6
