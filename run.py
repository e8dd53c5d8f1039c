"""Retune without installing anything first: `python run.py demo | test | bench | fuzz | kill | comfyui`.

Needs only Python 3.10 or newer. Everything is installed into `.venv` beside this file; no other Python is touched.
"""

from __future__ import annotations

import argparse
import configparser
import hashlib
import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
MARKER = VENV / "retune-setup.json"  # what has been installed, each with a key of what it was made from
LOG = VENV / "retune-setup.log"
COMFYUI_BASE = ROOT / "output" / "comfyui"  # input, output and settings of the ComfyUI that this file starts
TESTED_TORCH = ["torch==2.13.0"]  # what the tests run on without ComfyUI
# What they run on with ComfyUI. Nothing in torchaudio names the torch it fits: the newest of both can fail at import.
TESTED_TRIO = ["torch==2.12.1", "torchvision==0.27.1", "torchaudio==2.11.0"]
IMPORT_TRIO = "import torch, torchvision, torchaudio"
NO_COMFYUI = (
    "No ComfyUI found. Set COMFYUI_PATH to a checkout, or install one: pip install comfy-cli, then comfy install."
)
# Two tests at a time, one where there is one core; a -n, --dist or --pdb among pytest's own arguments has its way.
WORKERS = ["-n", "logical", "--maxprocesses", "2"]


def say(message: str) -> None:
    """Progress goes to stderr: stdout is for results."""
    print(message, file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------------
# ComfyUI
# ---------------------------------------------------------------------------------------------------------------------


def is_comfyui(folder: Path) -> bool:
    """True when `folder` is a ComfyUI checkout."""
    return (folder / "comfyui_version.py").is_file() and (folder / "main.py").is_file()


def comfy_cli_folders() -> list[Path]:
    """Where comfy-cli keeps ComfyUI: its configured workspaces, then its default one."""
    home = Path(os.path.expanduser("~"))
    config_folder, default = {
        "win32": (home / "AppData" / "Local", home / "Documents" / "comfy" / "ComfyUI"),
        "darwin": (home / "Library" / "Application Support", home / "Documents" / "comfy" / "ComfyUI"),
    }.get(sys.platform, (home / ".config", home / "comfy" / "ComfyUI"))
    config = configparser.ConfigParser(interpolation=None)
    config.read(config_folder / "comfy-cli" / "config.ini", encoding="utf-8")
    configured = [config["DEFAULT"].get(key) for key in ("default_workspace", "recent_workspace")]
    return [Path(folder) for folder in configured if folder] + [default, home / "comfy" / "ComfyUI"]


def find_comfyui() -> Path | None:
    """The ComfyUI checkout to use: `COMFYUI_PATH`, the one this folder is installed in, then comfy-cli's workspace.

    `COMFYUI_PATH=none` looks for none. Raises ValueError when `COMFYUI_PATH` names a folder that is not a checkout.
    """
    wanted = os.environ.get("COMFYUI_PATH", "").strip()
    if wanted.lower() == "none":
        return None
    if wanted:
        folder = Path(wanted).expanduser().resolve()
        if not is_comfyui(folder):
            raise ValueError(
                f"COMFYUI_PATH is {wanted!r}; expected a folder with ComfyUI's main.py. Correct or unset it."
            )
        return folder
    parents = [ROOT.parent.parent] if ROOT.parent.name == "custom_nodes" else []
    return next((folder.resolve() for folder in [*parents, *comfy_cli_folders()] if is_comfyui(folder)), None)


def offer_comfyui() -> Path:
    """Ask, on a terminal, whether to install ComfyUI with comfy-cli; raises ValueError when there is none then."""
    if not sys.stdin.isatty() or not sys.stderr.isatty():
        raise ValueError(NO_COMFYUI)
    say("No ComfyUI found (set COMFYUI_PATH if you have one).")
    if input("Install it with comfy-cli now? [y/N] ").strip().lower() not in ("y", "yes"):
        raise ValueError(NO_COMFYUI)
    python = make_venv()
    pip(python, "comfy-cli", "comfy-cli")
    command = [python, "-m", "comfy_cli", "--skip-prompt", "install", "--skip-torch-or-directml", "--skip-requirement"]
    code = subprocess.run([*command, "--cpu"]).returncode  # --cpu picks no torch build here: both installs are skipped
    found = find_comfyui()
    if code or found is None:
        raise ValueError(
            f"`comfy install` failed with code {code}. It clones ComfyUI from github.com: is it reachable? "
            "You can also clone it yourself and set COMFYUI_PATH."
        )
    return found


def server_module():
    """The package's ComfyUI starter, which needs nothing installed."""
    spec = importlib.util.spec_from_file_location(
        "comfyui_server", ROOT / "training" / "commands" / "comfyui_server.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_model_paths(comfyui: Path, file: Path) -> None:
    """A ComfyUI extra_model_paths file (JSON is YAML) that names every models folder of `comfyui`."""
    folders = {folder.name: folder.name for folder in (comfyui / "models").iterdir() if folder.is_dir()}
    content = {"installed": {"base_path": str(comfyui / "models"), **folders}}
    file.write_text(json.dumps(content, indent=1), encoding="utf-8")


# ---------------------------------------------------------------------------------------------------------------------
# .venv
# ---------------------------------------------------------------------------------------------------------------------


def venv_python() -> Path:
    return VENV / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def succeeds(command: list) -> bool:
    return subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).returncode == 0


def make_venv() -> Path:
    """The Python of `.venv`, which is made if it is missing or unusable."""
    python = venv_python()
    if python.is_file() and succeeds([python, "-c", "import pip"]):
        return python
    say(f"Making {VENV} with Python {sys.version.split()[0]}")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", VENV], capture_output=True, text=True)
    if made.returncode:
        hint = "On Debian and Ubuntu: apt install python3-venv. Elsewhere, use a Python from python.org or conda."
        raise ValueError(f"could not make {VENV}.\n{(made.stdout + made.stderr).strip()}\n{hint}")
    return python


def pip(python: Path, what: str, *arguments: str) -> None:
    """pip install with one line per package; raises ValueError with the end of pip's output when it fails."""
    say(f"Installing {what}")
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--no-input", *arguments]
    lines = []
    with LOG.open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, encoding="utf-8", errors="replace"
        )
        for line in process.stdout:
            log.write(line)
            lines.append(line.rstrip())
            report(line)
    if process.wait():
        raise ValueError(f"pip could not install {what}; all of its output is in {LOG}:\n" + "\n".join(lines[-12:]))


def report(line: str) -> None:
    """One short line for each package that pip fetches, and one when it unpacks them."""
    if fetched := re.match(r"\s*(?:Downloading|Using cached|Processing)\s+(\S+)(?: (\([\d.]+ \w+\)))?", line):
        name = re.split(r"[/\\]", fetched[1])[-1]
        if wheel := re.fullmatch(r"([^-]+)-([^-]+)-.*\.whl", name):
            say(f"  {wheel[1]} {wheel[2]} {fetched[2] or ''}".rstrip())
    elif line.startswith("Installing collected packages:"):
        say(f"  unpacking {line.count(',') + 1} packages")


def key(*parts: str) -> str:
    return hashlib.sha256("\n".join([str(ROOT), *parts]).encode()).hexdigest()[:16]


def read_marker() -> dict:
    try:
        return json.loads(MARKER.read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}


def once(name: str, made_from: str, install) -> None:
    """Call `install` unless the marker says that this was done from the same parts."""
    done = read_marker()
    if done.get(name) == made_from:
        return
    install()
    temporary = MARKER.with_suffix(".tmp")
    temporary.write_text(json.dumps({**done, name: made_from}), encoding="utf-8")
    os.replace(temporary, MARKER)


def install_torch(python: Path, index: str | None) -> None:
    """The tested torch, unless `.venv` has one and no index was named."""
    if index:
        pip(python, f"torch from {index}", "torch", "--index-url", index)
    elif not succeeds([python, "-c", "import importlib.metadata as m; m.version('torch')"]):
        pip(python, f"{TESTED_TORCH[0]} (tested)", *TESTED_TORCH)


def install_comfyui_requirements(python: Path, comfyui: Path, index: str | None) -> None:
    """torch, torchvision and torchaudio that fit each other, and what ComfyUI's requirements.txt lists."""
    if index or not succeeds([python, "-c", IMPORT_TRIO]):
        trio = [name.split("==")[0] for name in TESTED_TRIO]
        subprocess.run([python, "-m", "pip", "uninstall", "--yes", "--quiet", *trio], stderr=subprocess.DEVNULL)
        pip(python, "torch for ComfyUI", *(trio + ["--index-url", index] if index else TESTED_TRIO))
    if not succeeds([python, "-c", IMPORT_TRIO]):
        raise ValueError(
            f"torch, torchvision and torchaudio in {VENV} do not fit each other (`{IMPORT_TRIO}` fails). Name an index "
            "that has all three with --torch-index https://..., or delete that folder and try again."
        )
    pip(python, f"what {comfyui} requires", "-r", str(comfyui / "requirements.txt"))


def set_up(options: argparse.Namespace, comfyui: Path | None) -> Path:
    """The Python of `.venv` with everything installed that the command needs; at once when it is there already."""
    python = make_venv()
    index = options.torch_index
    if comfyui:
        made_from = key(str(comfyui), (comfyui / "requirements.txt").read_text(encoding="utf-8"), str(index))
        once("comfyui", made_from, lambda: install_comfyui_requirements(python, comfyui, index))
    else:
        once("torch", key(str(index)), lambda: install_torch(python, index))
    package = (
        ".[test]" if options.command in ("test", "bench") else "."
    )  # peers of benchmarks are among the tests' ones
    made_from = key((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    once(package, made_from, lambda: pip(python, "retune and what it requires", "--editable", package))
    return python


# ---------------------------------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------------------------------


def last_line(command: list) -> str:
    """Run a command, show its output on stderr as it comes, and return the last line of its stdout."""
    process = subprocess.Popen(command, stdout=subprocess.PIPE, encoding="utf-8", errors="replace")
    last = ""
    for line in process.stdout:
        if last:
            say(last)
        last = line.rstrip("\n") or last
    if process.wait():
        say(last)
        raise SystemExit(process.returncode)
    return last


def demo(python: Path, options: argparse.Namespace, found: Path | None) -> None:
    """Swap the demo model's text encoder for T5, retrain, judge; through ComfyUI when there is one."""
    where = ["--comfyui", found, "--output", COMFYUI_BASE] if found else ["--output", ROOT / "output" / "retune"]
    result = last_line([python, "-m", "retune.training", "demo", "--json", *where, *options.rest])
    if options.json:
        print(result, flush=True)
        return
    for name, value in json.loads(result).items():
        print(f"{name:22s} {value:.3f}" if isinstance(value, float) else f"{name:22s} {value}", flush=True)


def test(python: Path, options: argparse.Namespace, found: Path | None) -> None:
    """Run pytest; with --all also the slow tests, after ruff."""
    steps = []
    if options.all:
        steps = [["ruff", "check", "."], ["ruff", "format", "--check", "."]]
    steps += [["pytest", *WORKERS, *(["-m", ""] if options.all else []), *options.rest]]
    codes = [subprocess.run([python, "-m", *step], cwd=ROOT).returncode for step in steps]
    raise SystemExit(next((code for code in codes if code), 0))


def bench(python: Path, options: argparse.Namespace, found: Path | None) -> None:
    """Measure something: `bench` without a name lists what there is."""
    where = ["--comfyui", found] if found else []
    raise SystemExit(subprocess.run([python, "-m", "retune.benchmarks", *options.rest, *where]).returncode)


def fuzz(python: Path, options: argparse.Namespace, found: Path | None) -> None:
    """Read thousands of wrong files: --cases N, --minutes M, --seed S, --loader NAME, --case N, --json."""
    raise SystemExit(subprocess.run([python, ROOT / "tests" / "fuzz" / "fuzz.py", *options.rest], cwd=ROOT).returncode)


def kill(python: Path, options: argparse.Namespace, found: Path | None) -> None:
    """Kill trainings at random instants, and compare their ends: --count N, --minutes M, --trainer NAME, --json."""
    raise SystemExit(subprocess.run([python, ROOT / "tests" / "fuzz" / "kill.py", *options.rest], cwd=ROOT).returncode)


def comfyui(python: Path, options: argparse.Namespace, found: Path | None) -> None:
    """Start ComfyUI with this package in it and its installed models; leaves the ComfyUI folder as it is."""
    server_module().prepare(COMFYUI_BASE)
    models = COMFYUI_BASE / "extra_model_paths.yaml"
    write_model_paths(found, models)
    accelerator = "import torch; raise SystemExit(not (torch.cuda.is_available() or torch.backends.mps.is_available()))"
    device = [] if succeeds([python, "-c", accelerator]) or "--cpu" in options.rest else ["--cpu"]
    command = [python, "main.py", "--base-directory", COMFYUI_BASE, "--extra-model-paths-config", models, *device]
    command += ["--database-url", f"sqlite:///{(COMFYUI_BASE / 'user' / 'comfyui.db').as_posix()}"]
    port = options.rest[options.rest.index("--port") + 1] if "--port" in options.rest[:-1] else "8188"
    say(f"ComfyUI with Retune: http://127.0.0.1:{port} in about ten seconds. Files: {COMFYUI_BASE}. Ctrl-C stops it.")
    raise SystemExit(subprocess.run([*command, *options.rest], cwd=found).returncode)


def parse(arguments: list[str]) -> argparse.Namespace:
    """What to do; arguments unknown here are kept in `rest`, in their order, for the program that is called."""
    shared = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    shared.add_argument("--torch-index", metavar="URL", help="package index to install torch from")
    shared.add_argument("--no-comfyui", action="store_true", help="do without ComfyUI even if there is one")
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    added = {
        function.__name__: commands.add_parser(
            function.__name__, parents=[shared], help=function.__doc__, description=function.__doc__, allow_abbrev=False
        )
        for function in (demo, test, bench, fuzz, kill, comfyui)
    }
    added["demo"].add_argument("--json", action="store_true", help="end with one JSON line on stdout")
    added["test"].add_argument("--all", action="store_true", help="ruff and the slow tests too")
    options, options.rest = parser.parse_known_args(arguments)
    return options


def main(arguments: list[str]) -> None:
    options = parse(arguments)
    try:
        compares = options.command == "bench" and "lora-loss" in options.rest
        uses = compares or any(name in options.rest for name in ("lora", "gpu"))
        without = options.no_comfyui or options.command == "bench" and not uses
        found = None if without else find_comfyui()
        if found is None and (options.command == "comfyui" or compares):
            found = offer_comfyui()
        if options.command in ("demo", "test") and found is None and not options.no_comfyui:
            say(f"{NO_COMFYUI} Going on without it.")
        if options.no_comfyui:
            os.environ["COMFYUI_PATH"] = "none"
        globals()[options.command](set_up(options, found), options, found)
    except ValueError as error:
        raise SystemExit(f"run.py: {error}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None


if __name__ == "__main__":
    if sys.version_info < (3, 10):  # noqa: UP036
        raise SystemExit(f"run.py needs Python 3.10 or newer; this is {sys.version.split()[0]}.")
    main(sys.argv[1:])
