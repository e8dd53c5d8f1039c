"""Advice of other packages that does not concern a training."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

KERNELS = "bitsandbytes.backends.cpu.ops"
"""Its logger advises, where bitsandbytes is first imported, to install `kernels`: for 4-bit products on a CPU."""


@contextmanager
def without_kernels_advice() -> Iterator[None]:
    """While entered, bitsandbytes can be imported, also by LyCORIS, without its advice to install `kernels`.

    Nothing here computes in 4 bits. The one logger is silent for the time of the import alone.
    """
    logger = logging.getLogger(KERNELS)
    before, logger.disabled = logger.disabled, True
    try:
        yield
    finally:
        logger.disabled = before
