"""Random number generators by seed and name.

Every draw of a run (noise, sigma, crop, dropout, order, ...) comes from `generator(seed, purpose, ...)`. No draw
depends on earlier ones, so a resumed run repeats an uninterrupted one bit for bit.
"""

import hashlib

import torch


def derive_seed(seed: int, *name: str | int) -> int:
    """A 63-bit seed from a run's seed and a name such as ("noise", step, index); equal names give equal seeds."""
    text = "\x1f".join(str(part) for part in (seed, *name))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def generator(seed: int, *name: str | int) -> torch.Generator:
    """A CPU generator for one purpose. Draw on the CPU and move the result: the numbers are then device independent."""
    return torch.Generator("cpu").manual_seed(derive_seed(seed, *name))
