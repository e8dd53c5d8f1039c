"""Two workers: which files they begin with, and which ones never run at the same time."""

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def conftest(pytestconfig):
    return pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))


def test_the_files_that_are_named_exist_and_come_first(conftest):
    files = conftest.LONG_FILES
    assert all((ROOT / name).is_file() for name in files) and set(conftest.LARGE_FILES) < set(files)
    nodeids = [
        f"{name}::test_x[{number}]" for name in ("tests/core/test_optim.py", *reversed(files)) for number in "12"
    ]
    ordered = sorted(nodeids, key=conftest.place)
    assert [nodeid.split("::")[0] for nodeid in ordered[::2]] == [*files, "tests/core/test_optim.py"]


def test_a_worker_takes_whole_files_and_all_of_the_large_ones(conftest):
    large = {conftest.unit(f"{name}::test_x") for name in conftest.LARGE_FILES}
    assert large == {"large models"}
    assert conftest.unit("tests/core/test_optim.py::test_x[a::b]") == "tests/core/test_optim.py"
