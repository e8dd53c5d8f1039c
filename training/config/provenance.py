"""The metadata that a saved file has of the run it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_SETTINGS = ("run_name", "samples", "resume")


def about_run(run: Mapping[str, Any], ending: Mapping[str, Any]) -> dict[str, Any]:
    """The metadata of a run, for a file made by it.

    Args:
        run: the content of its config.json.
        ending: how it ended; copied into the result.

    Returns:
        The run's name and kind, `rewards` (kind, weight, files), `settings` (what trained, method, gradient_steps K,
        sampling_steps T, cfg, steps, learning_rate, seed, ...), `base` (fingerprints of the model it started from) and
        `prompts`.
    """
    identity, config = run.get("identity", {}), run.get("config", {})
    return {
        "run": config.get("run_name", ""),
        "kind": identity.get("kind", ""),
        "rewards": run.get("rewards", []),
        "settings": {name: value for name, value in config.items() if name not in _NO_SETTINGS},
        "base": {name: identity[name] for name in ("model", "text_encoder", "vae") if name in identity},
        "prompts": identity.get("prompts", ""),
        **ending,
    }
