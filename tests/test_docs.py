"""README and docs: their size, their links, the commands, files and folders that they name."""

import importlib.util
import re
import shlex
from pathlib import Path

import pytest
from retune.benchmarks import __main__ as benchmarks
from retune.training.__main__ import parser
from retune.training.config.checks import check_run_name

ROOT = Path(__file__).resolve().parent.parent
DEMO = ROOT / "training" / "demo" / "weights" / "README.md"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), DEMO])
MOST_README_BYTES = 8000
RUN, VERBS = r"python run\.py", r"(?:python|accelerate launch.*) -m retune\.training"


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fenced(page: Path) -> list[str]:
    """Commands of the code blocks of a page, one a line, without comments."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text_of(page), re.DOTALL | re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def spans(page: Path) -> list[str]:
    """Code within sentences and tables."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text_of(page), flags=re.DOTALL | re.MULTILINE))


def commands(pattern: str, *, whole: bool) -> list[tuple[str, str]]:
    """(page, what follows the pattern) of every command; whole: those that can be parsed, without `...` and `<...>`."""
    found = []
    for page in PAGES:
        if page.name == "CHANGELOG.md":  # it also names commands of earlier versions
            continue
        for line in [*fenced(page), *spans(page)]:
            if (match := re.match(rf"{pattern} +(.+)", line)) and not (whole and re.search(r"\.\.\.|<[a-z ]+>", line)):
                found.append((name_of(page), match[1]))
    return found


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", text_of(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.fixture(scope="module")
def command_line():
    return parser()


@pytest.fixture(scope="module")
def verbs(command_line) -> set[str]:
    return set(next(action.choices for action in command_line._actions if action.dest == "verb"))


def run_py_parser():
    spec = importlib.util.spec_from_file_location("run_py_of_docs", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.parse


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_bytes()) <= MOST_README_BYTES


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page):
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text_of(page)) if not link.startswith("http")]
    for link in links:
        path, _, anchor = link.replace("%20", " ").partition("#")
        target = page.parent / path if path else page
        assert target.exists(), f"{name_of(page)}: {link}"
        assert not anchor or anchor in anchors(target), f"{name_of(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_files_that_are_named_exist(page):
    tops = r"(?:benchmarks|docs|js|locales|nodes|tests|tools|training)/"
    named = [span for span in spans(page) if re.fullmatch(rf"{tops}[\w./-]+\.\w+", span)]
    assert not [span for span in named if not (ROOT / span).is_file()]


def test_verbs_of_the_command_line_exist_with_their_flags(command_line, verbs):
    named = commands(VERBS, whole=False)
    first = [(page, rest.replace("--verbose ", "").split()[0]) for page, rest in named]
    assert not [(page, verb) for page, verb in first if verb not in verbs and not verb.startswith("<")]
    for page, rest in commands(VERBS, whole=True):
        if len(shlex.split(rest)) > 1:
            try:
                check_run_name(getattr(command_line.parse_args(shlex.split(rest)), "run_name", "run"))
            except SystemExit:
                pytest.fail(f"{page}: {rest}")


def test_the_command_line_page_lists_every_verb(verbs):
    table = text_of(ROOT / "docs" / "command_line.md").split("## Verbs")[1].split("\n## ")[0]
    assert set(re.findall(r"^\| `([\w-]+)` \|", table, re.MULTILINE)) == verbs


def test_commands_of_run_py_exist_with_their_flags(command_line):
    parse = run_py_parser()
    for page, rest in commands(RUN, whole=False):
        try:
            options = parse(shlex.split(rest))
            if options.command == "demo":
                command_line.parse_args(["demo", *options.rest])
            if options.command == "bench":
                benchmarks.read_flags(benchmarks.parser().parse_args(options.rest), benchmarks.BenchConfig)
        except SystemExit:
            pytest.fail(f"{page}: python run.py {rest}")


def test_the_architecture_page_lists_every_folder():
    tops = ("benchmarks", "nodes", "tools", "training")
    there = {file.parent.relative_to(ROOT).as_posix() for top in tops for file in (ROOT / top).rglob("__init__.py")}
    page = text_of(ROOT / "docs" / "architecture.md")
    assert set(re.findall(r"^\| `([\w/]+)/` \|", page, re.MULTILINE)) == there


@pytest.mark.parametrize("module", ["retune.benchmarks", "retune.tools.build_demo"])
def test_modules_of_a_checkout_exist(module):
    assert f"python -m {module}" in text_of(ROOT / "docs" / "command_line.md")
    assert importlib.util.find_spec(f"{module}.__main__")


def test_the_nodes_page_links_every_help_page():
    links = re.findall(r"\(\.\./js/docs/(\w+\.md)\)", text_of(ROOT / "docs" / "nodes.md"))
    assert sorted(links) == sorted(file.name for file in (ROOT / "js" / "docs").glob("*.md"))


def test_the_changelog_begins_with_this_version():
    version = re.search(r'^version = "(.+)"', text_of(ROOT / "pyproject.toml"), re.MULTILINE)[1]
    assert re.findall(r"^## (\d\S+)", text_of(ROOT / "CHANGELOG.md"), re.MULTILINE)[0] == version
