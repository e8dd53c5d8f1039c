"""Mutates valid files and reads them: `python run.py fuzz --cases N --minutes M --json`.

A worker imports everything once and forks for each case. A case must end well or with a ValueError or FileNotFoundError
that names the file; within ten seconds; with at most twice the file's size and 1 GB of memory; without running code in
the file, without a connection, and without writing outside of the case's folder.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import logging
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

from loaders import Loader, loaders
from mutations import mutate
from odd import CANARY

SECONDS = 10
"""Processor time, or waiting time, after which a case counts as hanging."""
GB = 1 << 30
SHOWN = 20
MEMORY_WORDS = ("can't allocate memory", "more memory than there is", "Cannot allocate memory")
FORBIDDEN = ("os.system", "subprocess.Popen", "os.exec", "os.posix_spawn", "os.fork", "socket.connect", "pty.spawn")


@dataclass(frozen=True)
class Result:
    """How a case ended.

    Attributes:
        case: Its number, which with the seed repeats it.
        loader: The loader's name.
        mutation: What was done to the file.
        outcome: "read", "refused", or what is wrong: "raw", "unnamed", "crash", "hang", "memory", "code", "write".
        message: The error's type and text, or the place of a write.
        at: The code line that raised it.
    """

    case: int
    loader: str
    mutation: str
    outcome: str
    message: str = ""
    at: str = ""

    @property
    def good(self) -> bool:
        return self.outcome in ("read", "refused")


def run_case(case: int, seed: int, known: Sequence[Loader], folder: Path) -> Result:
    """Mutates one file and reads it in a fork.

    Args:
        case: Number of the case.
        seed: Of the whole series.
        known: The loaders to choose from.
        folder: For the case's files; it is emptied.
    """
    random = Random(f"{seed}/{case}")
    loader = random.choice(known)
    path = folder / "case" / loader.seed.name
    _copy(loader.seed, path)
    file = path / loader.file if loader.file else path
    mutation = mutate(file, random, [other.seed for other in known if other.seed.is_file()])
    size = file.stat().st_size if file.is_file() and file.resolve().is_relative_to(folder) else 0
    outcome, message, at = _read_in_fork(loader, path, file, size)
    if (file.parent / CANARY).exists():
        outcome, message = "code", "code in the file was run"
    shutil.rmtree(folder / "case")
    return Result(case, loader.name, mutation, outcome, message, at)


def _copy(seed: Path, path: Path) -> None:
    path.parent.mkdir(parents=True)
    (shutil.copytree if seed.is_dir() else shutil.copy)(seed, path)


def _read_in_fork(loader: Loader, path: Path, file: Path, size: int) -> tuple[str, str, str]:
    """(outcome, message, code line) of reading a file in a process of its own."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        _child(loader, path, file, size, writer)
    os.close(writer)
    hung = _wait(child)
    with open(reader, "rb") as pipe:
        report = pipe.read()
    _, status = os.waitpid(child, 0)
    if hung or os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGXCPU, signal.SIGKILL):
        return "hang", "", ""
    if os.WIFSIGNALED(status):
        return "crash", signal.Signals(os.WTERMSIG(status)).name, ""
    return tuple(json.loads(report)) if report else ("crash", f"exit status {os.WEXITSTATUS(status)}", "")


def _wait(child: int) -> bool:
    """Waits for a process to end; True, after killing it, when it has slept for ten seconds."""
    handle, slept = os.pidfd_open(child), 0.0
    try:
        while not select.select([handle], [], [], 0.5)[0]:
            state = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()[0]
            slept += 0.5 if state in "SD" else 0.0
            if slept > SECONDS:
                os.kill(child, signal.SIGKILL)
                return True
        return False
    finally:
        os.close(handle)


def _child(loader: Loader, path: Path, file: Path, size: int, writer: int) -> None:
    """Reads the file under limits, reports how it ended, and ends the process."""
    os.setsid()
    faulthandler.disable()  # pytest's would print a crash that is asked for
    for stream in (1, 2):  # progress bars of libraries
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    wrongs: list[str] = []
    _watch(path.parent, wrongs)
    _limit(size)
    report = ("read", "", "")
    try:
        loader.load(path)
    except BaseException as error:
        report = _judged(error, path, file)
    if wrongs:
        report = ("write", wrongs[0], "")
    resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    os.write(writer, json.dumps(report).encode())
    os._exit(0)


def _limit(size: int) -> None:
    """Limits memory to what the process has, twice the file and 1 GB; and its processor time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + 2 * size + GB
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS + 1))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _watch(allowed: Path, wrongs: list[str]) -> None:
    """Records what a reader must not do: programs, connections, and writing anywhere else."""

    def hook(event: str, arguments: tuple) -> None:
        if event in FORBIDDEN:
            wrongs.append(f"{event}{arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], str | bytes | Path) and _writes(*arguments[1:3]):
            place = Path(os.fsdecode(arguments[0])).absolute()
            if not place.is_relative_to(allowed) and not place.is_relative_to("/dev"):
                wrongs.append(f"writes {place}")

    sys.addaudithook(hook)


def _writes(mode: str | None, flags: int) -> bool:
    return bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or any(letter in (mode or "") for letter in "wax+")


def _judged(error: BaseException, path: Path, file: Path) -> tuple[str, str, str]:
    """Whether an error is what a user may see."""
    text = str(error)
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "training" in frame.filename and "site-packages" not in frame.filename]
    at = f"{Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    message = f"{type(error).__name__}: {text}"[:400].encode("utf-8", "replace").decode()
    names = [part for part in file.relative_to(path.parent).parts if len(part) > 1]
    if isinstance(error, MemoryError) or any(words in text for words in MEMORY_WORDS):
        return "memory", message, at
    if not isinstance(error, ValueError | FileNotFoundError) or isinstance(error, UnicodeError | json.JSONDecodeError):
        return "raw", message, at
    return ("refused" if any(name in text for name in names) else "unnamed"), message, at


def fuzz(options: argparse.Namespace) -> dict:
    """Runs cases until their number or the time is reached; returns the figures and all that went wrong."""
    begun, results = time.monotonic(), []
    with tempfile.TemporaryDirectory(prefix="fuzz") as name:
        folder = Path(name).resolve()
        known = [one for one in loaders(folder) if any(word in one.name for word in options.loader.split(","))]
        _expect_valid(known)
        numbers = [options.case] if options.case is not None else range(options.first, options.first + options.cases)
        for case in numbers:
            if time.monotonic() - begun > 60 * options.minutes:
                break
            results.append(run_case(case, options.seed, known, folder))
            if not options.json and not results[-1].good or options.case is not None:
                sys.stderr.write(f"{json.dumps(asdict(results[-1]))}\n")
    wrong = [result for result in results if not result.good]
    return {
        "cases": len(results),
        "seconds": round(time.monotonic() - begun, 1),
        "loaders": len(known),
        "outcomes": dict(Counter(result.outcome for result in results)),
        "places": dict(Counter(f"{r.outcome} {r.at} {r.message.partition(':')[0]}" for r in wrong).most_common()),
        "wrong": [asdict(result) for result in wrong],
    }


def _expect_valid(known: Sequence[Loader]) -> None:
    """Reads every seed once as it is: all imports happen here, and a loader that fails now would hide everything."""
    for loader in known:
        try:
            loader.load(loader.seed)
        except Exception as error:
            raise SystemExit(f"the seed of {loader.name} is not valid: {error!r}") from error


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py fuzz", description=__doc__.partition("\n")[0])
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--minutes", type=float, default=60.0, help="end after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--case", type=int, help="this case alone, with its message")
    parser.add_argument("--loader", default="", help="only loaders with one of these words, separated by commas")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line, nothing before it")
    return parser.parse_args(arguments)


def _silence() -> None:
    """No progress bars of libraries."""
    import diffusers.utils.logging
    import transformers.utils.logging

    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()


def main() -> int:
    options = parse()
    if not hasattr(os, "fork") or not hasattr(os, "pidfd_open"):
        raise SystemExit("fuzz: this system cannot fork with a handle; expected Linux.")
    sys.dont_write_bytecode = True
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(0)
    _silence()
    figures = fuzz(options)
    shown = figures if options.json else figures | {"wrong": figures["wrong"][:SHOWN]}
    sys.stdout.write(json.dumps(shown, indent=None if options.json else 1) + "\n")
    return 1 if figures["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
