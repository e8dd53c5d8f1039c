"""One variant, in the process that `processes.run_case` starts: `python -m retune.benchmarks.variant JSON`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import sys

from .anonymous_memory import PeakMemory
from .comparisons import COMPARISONS, STARTUP
from .processes import NOT_ENOUGH_MEMORY, Case
from .recorder import Recorder

LIBRARIES = ("diffusers.models.unets.unet_2d_condition", "transformers.models.clip.modeling_clip", "lycoris", "peft")


def run(case: Case) -> dict:
    """Runs a variant; memory is counted from after the imports, which are the same for all."""
    variant = COMPARISONS[case.bench].variants[case.variant]
    module = importlib.import_module(f".{variant.module}", __package__)
    if case.bench != STARTUP:
        for name in LIBRARIES:
            if importlib.util.find_spec(name.partition(".")[0]) is not None:
                importlib.import_module(name)
        if hasattr(module, "prepare"):
            module.prepare(case)
    with PeakMemory() as memory:
        recorder = Recorder(case, memory)
        getattr(module, variant.function)(case, recorder, **variant.options)
    return recorder.figures()


def main(arguments: list[str]) -> int:
    """Prints the figures as one JSON line."""
    import torch

    try:
        figures = run(Case(**json.loads(arguments[0])))
    except torch.cuda.OutOfMemoryError:
        return NOT_ENOUGH_MEMORY
    sys.stdout.write("\n" + json.dumps(figures) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
