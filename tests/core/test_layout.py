"""The layout contract: each folder imports only from those below it (`[tool.importlinter]` in pyproject.toml)."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(config_filename='{}', no_cache=True))"
MOST_FOLDERS = 25


def lint(config: Path) -> subprocess.CompletedProcess:
    """import-linter with this configuration file."""
    program = LINT.format(config.as_posix())
    return subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)


def folders() -> list[Path]:
    """Folders of the package that hold modules."""
    tops = ("training", "nodes", "benchmarks", "tools")
    files = [file for top in tops for file in (ROOT / top).rglob("*.py") if file.name != "__init__.py"]
    return sorted({file.parent for file in files})


def module_file(importer: Path, node: ast.ImportFrom) -> Path | None:
    """What a `from` of `importer` names: a module's file, a folder, or None where it is not of this package."""
    if node.level:
        base = importer.parents[node.level - 1]
    elif (node.module or "").split(".")[0] == "retune":
        base = ROOT.parent
    else:
        return None
    path = base.joinpath(*(node.module or "").replace("retune", ROOT.name, not node.level).split("."))
    return path.with_suffix(".py") if path.with_suffix(".py").is_file() else path


@cache
def offered(module: Path) -> set[str]:
    """Names that can be imported from a module's file, or from a folder and its `__init__.py`."""
    if module.is_dir():
        inside = {entry.stem for entry in module.iterdir()}
        return inside | (offered(module / "__init__.py") if (module / "__init__.py").is_file() else set())
    names: set[str] = set()
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.alias):
            names.add((node.asname or node.name).split(".")[0])
    return names


def unresolved(file: Path) -> list[str]:
    """Imports of `file`, those inside its functions too, of names that their modules do not have."""
    found = []
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        module = module_file(file, node) if isinstance(node, ast.ImportFrom) else None
        if module is not None:
            names = offered(module) if module.exists() else set()
            found += [f"{file.name}:{node.lineno} {alias.name}" for alias in node.names if alias.name not in names]
    return found


def test_the_layout_contract_holds():
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_layout_contract_fails_without_one_of_its_lines(tmp_path):
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    shorter = re.sub(r'^    "recipes",\n', "", text, flags=re.MULTILINE)
    (tmp_path / "pyproject.toml").write_text(shorter, encoding="utf-8")
    done = lint(tmp_path / "pyproject.toml")
    assert shorter != text and done.returncode != 0 and "recipes" in done.stdout


def test_every_folder_says_in_three_lines_at_most_what_lives_there():
    assert len(folders()) <= MOST_FOLDERS
    for folder in folders():
        tree = ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))
        description = ast.get_docstring(tree) or ""
        assert description and len(description.splitlines()) <= 3, f"{folder.relative_to(ROOT)}/__init__.py"


def test_every_import_names_what_its_module_has(tmp_path):
    """Imports inside functions and in modules that need ComfyUI too, which no import of the tests may reach."""
    files = [file for folder in folders() for file in folder.glob("*.py")] + list((ROOT / "tests").glob("*/*.py"))
    assert len(files) > 300
    assert [found for file in files for found in unresolved(file)] == []
    (tmp_path / "one.py").write_text("here = 1\n", encoding="utf-8")
    (tmp_path / "two.py").write_text("def run():\n    from .one import here, gone\n    from .three import x\n")
    assert unresolved(tmp_path / "two.py") == ["two.py:2 gone", "two.py:3 x"]
