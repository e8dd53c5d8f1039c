"""Kills trainings at random instants and lets them go on: `python run.py kill --count 100 --json`.

Each of the four trainers first runs undisturbed. Then a worker that has imported everything forks the same run, kills
it at a moment drawn by chance, or right before the n-th time it opens, renames or truncates a file, up to three times,
and lets it end. Every file must have the same bytes, apart from the report and from timings.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures" / "version_0_1"
SHARED = ("--steps", "6", "--gradient-accumulation", "2", "--ema-decay", "0.9", "--save-every", "2")
SHARED += ("--validate-every", "3", "--sample-every", "3")
TRAINERS = {
    "train": ("--optimizer", "Prodigy", "--learning-rate", "1"),
    "lora": ("--optimizer", "AdamW8bit"),
    "embedding": (),
    "reward": (),
}
"""Trainer -> its own flags, on top of those of the fixture's run of its name."""
NEEDED = {"Prodigy": "prodigyopt", "AdamW8bit": "bitsandbytes"}
EVENTS = ("open", "os.rename", "os.remove", "os.truncate", "os.mkdir")
KILLS_A_RUN = 3
UNEQUAL = ("report.html", "error.log")
"""Files that have the time in them."""
TIMINGS = ("seconds", "time", "memory", "changed", "environment")


@dataclass
class Plain:
    """An undisturbed run: its folder, seconds, and how often it touched a file."""

    folder: Path
    seconds: float
    touches: int


@dataclass(frozen=True)
class Chain:
    """A run that was killed and went on: where it was killed, and which files differ in the end."""

    trainer: str
    number: int
    kills: tuple[str, ...]
    differences: tuple[str, ...]


def arguments(trainer: str, output: Path) -> list[str]:
    """The command line of a trainer's run; an optimiser that is not installed is left out."""
    words = json.loads((FIXTURES / "runs" / trainer / "arguments.json").read_bytes())
    own = TRAINERS[trainer]
    if own and importlib.util.find_spec(NEEDED[own[1]]) is None:
        own = ()
    here = [word.replace("{here}", str(FIXTURES)).replace("{output}", str(output)) for word in words]
    return [*here, *SHARED, *own]


def run_in_fork(words: Sequence[str], prepare: Callable[[], None], log: Path) -> int:
    """The wait status of a command line in a process of its own; its output goes to a file."""
    child = os.fork()
    if child == 0:
        os.setsid()
        output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(output, 1), os.dup2(output, 2)
        prepare()
        from retune.training.__main__ import main

        os._exit(main(list(words)))
    return os.waitpid(child, 0)[1]


def on_touch(root: Path, act: Callable[[], None]) -> None:
    """Calls `act` right before this process opens a file below `root` for writing, or renames or removes one."""

    def hook(event: str, values: tuple) -> None:
        if event in EVENTS and isinstance(values[0], str | os.PathLike) and str(values[0]).startswith(str(root)):
            if event != "open" or values[2] & (os.O_WRONLY | os.O_RDWR):
                act()

    sys.addaudithook(hook)


def undisturbed(trainer: str, folder: Path) -> Plain:
    """Runs a trainer to its end."""
    touches = folder / "touches"

    def count() -> None:
        with_number = iter(range(1, 10**6))
        handle = os.open(touches, os.O_WRONLY | os.O_CREAT)
        on_touch(folder / "out", lambda: os.pwrite(handle, str(next(with_number)).encode(), 0))

    begun = time.monotonic()
    status = run_in_fork(arguments(trainer, folder / "out"), count, folder / "log")
    if status:
        raise SystemExit(f"the undisturbed run of {trainer} failed:\n{(folder / 'log').read_text()[-2000:]}")
    return Plain(folder / "out" / "r", time.monotonic() - begun, int(touches.read_text()))


def killed(trainer: str, number: int, plain: Plain, folder: Path, random: Random, most: int) -> Chain:
    """A run that is killed up to `most` times, and then goes on to its end."""
    words, kills = arguments(trainer, folder / "out"), []
    for _ in range(most):
        moment, prepare = _moment(plain, folder / "out", random)
        status = run_in_fork(words, prepare, folder / "log")
        if not os.WIFSIGNALED(status):
            break
        kills.append(moment)
    status = run_in_fork(words, lambda: None, folder / "log")
    if status:
        last = (folder / "log").read_text()[-500:]
        return Chain(trainer, number, tuple(kills), (f"it did not go on: {last}",))
    return Chain(trainer, number, tuple(kills), tuple(differences(plain.folder, folder / "out" / "r")))


def _moment(plain: Plain, root: Path, random: Random) -> tuple[str, Callable[[], None]]:
    """When a run is killed, in words and as what the process does at its start."""
    if random.random() < 0.5:
        seconds = random.uniform(0.0, plain.seconds)
        return f"after {seconds:.2f} s", lambda: _timer(seconds)
    touch = random.randint(1, plain.touches)
    left = iter(range(touch - 1, -1, -1))
    return f"at touch {touch}", lambda: on_touch(root, lambda: next(left, 1) or _die())


def _timer(seconds: float) -> None:
    timer = threading.Timer(seconds, _die)
    timer.daemon = True
    timer.start()


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def differences(whole: Path, other: Path) -> Iterator[str]:
    """Files below two folders that differ, apart from those with timings; JSON is compared without its timings."""
    names = {path.relative_to(root).as_posix() for root in (whole, other) for path in root.rglob("*") if path.is_file()}
    for name in sorted(names - set(UNEQUAL)):
        one, two = whole / name, other / name
        if not one.exists() or not two.exists():
            yield f"{name} is only in one of them"
        elif one.read_bytes() != two.read_bytes() and not (name.endswith((".json", ".jsonl")) and _alike(one, two)):
            yield f"{name} differs"


def _alike(one: Path, two: Path) -> bool:
    """Whether two files of JSON, or of JSON lines, are equal without their timings and paths."""
    parsed = []
    for path in (one, two):
        lines = path.read_text(encoding="utf-8").splitlines() if path.suffix == ".jsonl" else [path.read_text()]
        parsed.append([_untimed(json.loads(line)) for line in lines if line])
    return parsed[0] == parsed[1]


def _untimed(value: object) -> object:
    if isinstance(value, dict):
        return {k: _untimed(v) for k, v in value.items() if not any(word in k for word in TIMINGS)}
    return [_untimed(item) for item in value] if isinstance(value, list) else value


def kill(options: argparse.Namespace) -> dict:
    """Kills runs until the number of kills is reached; returns the figures and the chains that differ."""
    begun, chains, count = time.monotonic(), [], 0
    with tempfile.TemporaryDirectory(prefix="kill") as name:
        folder = Path(name).resolve()
        trainers = [trainer for trainer in TRAINERS if options.trainer in trainer]
        plain = {}
        for trainer in trainers:
            (folder / trainer).mkdir()
            plain[trainer] = undisturbed(trainer, folder / trainer)
        while count < options.count and time.monotonic() - begun < 60 * options.minutes:
            number = len(chains)
            random, trainer = Random(f"{options.seed}/{number}"), trainers[number % len(trainers)]
            place = folder / f"chain {number}"
            place.mkdir()
            most = min(KILLS_A_RUN, options.count - count)
            chains.append(killed(trainer, number, plain[trainer], place, random, most))
            count += len(chains[-1].kills)
            if not options.json:
                sys.stderr.write(f"{json.dumps(asdict(chains[-1]))}\n")
    wrong = [asdict(chain) for chain in chains if chain.differences]
    seconds = round(time.monotonic() - begun, 1)
    return {"kills": count, "runs": len(chains), "seconds": seconds, "wrong": wrong}


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="run.py kill", description=__doc__.partition("\n")[0])
    parser.add_argument("--count", type=int, default=100, help="kills in all")
    parser.add_argument("--minutes", type=float, default=120.0, help="end after this time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trainer", default="", help="only this one: train, lora, embedding or reward")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line, nothing before it")
    return parser.parse_args(words)


def main() -> int:
    options = parse()
    if not hasattr(os, "fork"):
        raise SystemExit("kill: this system cannot fork; expected Linux or macOS.")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import retune.training.__main__  # noqa: F401  (imported once, for all forks)
    import torch
    from diffusers import AutoencoderKL, UNet2DConditionModel  # noqa: F401
    from transformers import CLIPTextModel, CLIPTokenizer  # noqa: F401

    torch.set_num_threads(1)
    figures = kill(options)
    sys.stdout.write(json.dumps(figures, indent=None if options.json else 1) + "\n")
    return 1 if figures["wrong"] or not figures["kills"] else 0


if __name__ == "__main__":
    sys.exit(main())
