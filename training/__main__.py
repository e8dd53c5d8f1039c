"""The command line: `python -m retune.training <verb>`; `accelerate launch -m retune.training <verb>` on many GPUs."""

from __future__ import annotations

import argparse
import sys

from .commands import demo, evaluate, lora_files, report, reset, score, train
from .commands.terminal import run_verb
from .commands.verb import Verb, config_verb

FILE_VERBS = {name: config_verb(*verb) for name, verb in (lora_files.VERBS | score.VERBS).items()}
VERBS: dict[str, Verb] = train.VERBS | evaluate.VERBS | report.VERBS | reset.VERBS | FILE_VERBS | demo.VERBS
"""In the order of the help; flags and work of each are in its file in `commands/`."""


def parser(preset: str = "custom") -> argparse.ArgumentParser:
    """All verbs and their flags, with the defaults of a preset where a verb has it."""
    top = argparse.ArgumentParser(prog="retune", description="Change how a text-to-image model reads text.")
    top.add_argument("--verbose", action="store_true", help="print what is logged as well")
    verbs = top.add_subparsers(dest="verb", required=True)
    for name, verb in VERBS.items():
        flags = verbs.add_parser(name, help=verb.help, epilog=verb.epilog)
        verb.add_flags(flags)
        flags.add_argument("--json", action="store_true", help="print one JSON object as the last line")
        flags.set_defaults(function=verb.run, **verb.presets.get(preset, {}))
    return top


def main(argv: list[str] | None = None) -> int:
    arguments = parser().parse_args(argv)
    if getattr(arguments, "preset", "custom") != "custom":
        arguments = parser(arguments.preset).parse_args(argv)
    return run_verb(arguments.function, arguments)


if __name__ == "__main__":
    sys.exit(main())
