"""The layout contract: each folder imports only from those below it (`[tool.importlinter]` in pyproject.toml)."""

import ast
import re
import subprocess
import sys
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
