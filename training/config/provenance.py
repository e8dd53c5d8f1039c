"""What a saved file says of the run it comes from."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_NO_SETTINGS = ("run_name", "samples", "resume")


def about_run(run: Mapping[str, Any], ending: Mapping[str, Any]) -> dict[str, Any]:
    """What a file says of the run it comes from.

    run: what its config.json holds. ending: how it ended. The result has the run's name, its kind, `rewards` (kind,
    weight, files), `settings` (what trained, method, gradient_steps K, sampling_steps T, cfg, steps, learning_rate,
    seed, ...) and `base`, the fingerprints of what it began with.
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
