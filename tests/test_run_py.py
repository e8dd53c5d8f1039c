"""run.py: where it finds ComfyUI, what it installs once, and how it hands results on."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run_py():
    spec = importlib.util.spec_from_file_location("run_py_under_test", ROOT / "run.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def home(tmp_path, monkeypatch):
    """An empty home folder, on every system."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.delenv("COMFYUI_PATH", raising=False)
    return tmp_path


@pytest.fixture
def package_elsewhere(run_py, tmp_path, monkeypatch):
    """As if this folder lay outside every ComfyUI."""
    monkeypatch.setattr(run_py, "ROOT", tmp_path / "retune")


def checkout(folder: Path) -> Path:
    folder.mkdir(parents=True)
    for name in ("main.py", "comfyui_version.py"):
        (folder / name).touch()
    return folder


def write_comfy_cli_config(run_py, monkeypatch, home: Path, **values) -> None:
    monkeypatch.setattr(run_py.sys, "platform", "linux")
    folder = home / ".config" / "comfy-cli"
    folder.mkdir(parents=True)
    lines = "".join(f"{name} = {value}\n" for name, value in values.items())
    (folder / "config.ini").write_text(f"[DEFAULT]\n{lines}", encoding="utf-8")


def test_an_empty_home_has_no_comfyui(run_py, home, package_elsewhere):
    assert run_py.find_comfyui() is None


def test_comfyui_path_comes_first(run_py, home, package_elsewhere, monkeypatch):
    checkout(home / "comfy" / "ComfyUI")
    wanted = checkout(home / "mine")
    monkeypatch.setenv("COMFYUI_PATH", str(wanted))
    assert run_py.find_comfyui() == wanted.resolve()


def test_comfyui_path_none_looks_for_none(run_py, home, monkeypatch):
    checkout(home / "comfy" / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", "none")
    assert run_py.find_comfyui() is None


def test_a_wrong_comfyui_path_is_an_error_that_names_it(run_py, home, monkeypatch):
    checkout(home / "comfy" / "ComfyUI")
    monkeypatch.setenv("COMFYUI_PATH", str(home))
    with pytest.raises(ValueError, match="COMFYUI_PATH is .*main.py"):
        run_py.find_comfyui()


def test_inside_custom_nodes_the_parent_is_used(run_py, home, monkeypatch):
    checkout(home / "comfy" / "ComfyUI")
    parent = checkout(home / "other")
    monkeypatch.setattr(run_py, "ROOT", parent / "custom_nodes" / "retune")
    assert run_py.find_comfyui() == parent.resolve()


def test_the_workspace_of_comfy_cli_is_found(run_py, home, package_elsewhere, monkeypatch):
    default = checkout(home / "comfy" / "ComfyUI")
    assert run_py.find_comfyui() == default.resolve()
    workspace = checkout(home / "work %20 space")  # a percent sign is no interpolation
    write_comfy_cli_config(run_py, monkeypatch, home, default_workspace=workspace)
    assert run_py.find_comfyui() == workspace.resolve()


def test_a_workspace_that_is_gone_is_passed_over(run_py, home, package_elsewhere, monkeypatch):
    default = checkout(home / "comfy" / "ComfyUI")
    write_comfy_cli_config(run_py, monkeypatch, home, default_workspace=home / "deleted", recent_workspace="")
    assert run_py.find_comfyui() == default.resolve()


def test_unknown_arguments_reach_the_program_in_their_order(run_py):
    options = run_py.parse(["test", "-m", "", "-k", "a or b", "--all", "tests/core", "-x"])
    assert options.all and options.rest == ["-m", "", "-k", "a or b", "tests/core", "-x"]


def test_pytest_gets_two_workers_and_whatever_else_is_given_last(run_py, monkeypatch):
    commands = []

    def run(command, **_):
        commands.append(command[2:])
        return SimpleNamespace(returncode=len(commands) - 1)

    monkeypatch.setattr(run_py.subprocess, "run", run)
    for arguments in (["test", "-n", "0", "tests/core"], ["test", "--all"]):
        with pytest.raises(SystemExit) as ended:
            run_py.test(Path("python"), run_py.parse(arguments), None)
    pytest_in_workers = ["pytest", "-n", "logical", "--maxprocesses", "2"]
    ruff = [["ruff", "check", "."], ["ruff", "format", "--check", "."]]
    assert commands == [[*pytest_in_workers, "-n", "0", "tests/core"], *ruff, [*pytest_in_workers, "-m", ""]]
    assert ended.value.code == 1  # of the first step that failed


def test_a_step_is_done_once_per_key(run_py, tmp_path, monkeypatch):
    monkeypatch.setattr(run_py, "MARKER", tmp_path / "marker.json")
    calls = []
    for key in ("a", "a", "b", "b"):
        run_py.once("torch", key, lambda key=key: calls.append(key))
    run_py.once("package", "a", lambda: calls.append("package"))
    assert calls == ["a", "b", "package"]
    assert run_py.read_marker() == {"torch": "b", "package": "a"}


def test_a_step_that_fails_is_done_again(run_py, tmp_path, monkeypatch):
    monkeypatch.setattr(run_py, "MARKER", tmp_path / "marker.json")
    with pytest.raises(ZeroDivisionError):
        run_py.once("torch", "a", lambda: 1 / 0)
    assert run_py.read_marker() == {}


def test_a_failed_install_shows_what_pip_said(run_py, tmp_path, monkeypatch):
    monkeypatch.setattr(run_py, "LOG", tmp_path / "log")
    with pytest.raises(ValueError, match="(?s)could not install nothing.*no-such-folder"):
        run_py.pip(Path(sys.executable), "nothing", "--no-index", str(tmp_path / "no-such-folder"))
    assert "no-such-folder" in run_py.LOG.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ("  Downloading numpy-2.4.6-cp311-cp311-manylinux_2_28_x86_64.whl (16.9 MB)\n", "  numpy 2.4.6 (16.9 MB)\n"),
        ("Processing ./wheels/torch-2.13.0+cpu-cp311-cp311-win_amd64.whl (from torch)\n", "  torch 2.13.0+cpu\n"),
        ("  Downloading tqdm-4.70.1-py3-none-any.whl.metadata (57 kB)\n", ""),
        ("Installing collected packages: a, b, c\n", "  unpacking 3 packages\n"),
        ("Requirement already satisfied: numpy in somewhere\n", ""),
    ],
)
def test_one_short_line_per_package(run_py, capsys, line, shown):
    run_py.report(line)
    assert capsys.readouterr().err == shown


def test_progress_goes_to_stderr_and_the_last_line_is_the_result(run_py, capsys):
    program = "print('step 1'); print('step 2'); print('{\"seconds\": 1}')"
    assert json.loads(run_py.last_line([sys.executable, "-c", program])) == {"seconds": 1}
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err == "step 1\nstep 2\n"


def test_a_failing_program_passes_its_exit_code_on(run_py):
    with pytest.raises(SystemExit) as stopped:
        run_py.last_line([sys.executable, "-c", "raise SystemExit(3)"])
    assert stopped.value.code == 3


def test_models_of_the_installed_comfyui_are_named(run_py, tmp_path):
    for name in ("loras", "text_encoders"):
        (tmp_path / "models" / name).mkdir(parents=True)
    run_py.write_model_paths(tmp_path, tmp_path / "paths.yaml")
    written = json.loads((tmp_path / "paths.yaml").read_text(encoding="utf-8"))
    expected = {"base_path": str(tmp_path / "models"), "loras": "loras", "text_encoders": "text_encoders"}
    assert written == {"installed": expected}


@pytest.mark.parametrize("command", ["comfyui", "bench lora-loss"])
def test_without_comfyui_what_needs_it_says_how_to_get_it(home, command):
    """As a user runs it, without a terminal to ask on; the .venv of this checkout is not touched."""
    lonely = home / "retune"
    lonely.mkdir()
    (lonely / "run.py").write_bytes((ROOT / "run.py").read_bytes())
    command = [sys.executable, str(lonely / "run.py"), *command.split()]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 1 and "COMFYUI_PATH" in done.stderr and "Traceback" not in done.stderr
