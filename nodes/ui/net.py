"""The net below every node: an error that no check foresaw becomes one that names the node and the run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ...training.common.foreign import unforeseen
from .errors import last_states, tell_error

log = logging.getLogger(__name__)


def guarded(node: type) -> type:
    """A node class whose `execute` is in the net; the class itself, so that ComfyUI knows it by its name."""
    execute = node.__dict__["execute"].__func__

    @functools.wraps(execute)
    def in_net(cls, *inputs, **options):
        with _net(node, options.get("run_name"), cls.hidden.unique_id if cls.hidden else None):
            return execute(cls, *inputs, **options)

    node.execute = classmethod(in_net)
    return node


@contextmanager
def _net(node: type, run: Any, node_id: str | None) -> Iterator[None]:
    """Raises ValueError in place of an exception that no check foresaw; the traceback goes to ComfyUI's log.

    What checks raise, a lack of memory (ComfyUI then unloads models) and interrupts pass. Every error is told to the
    page, which shows it in the node.
    """
    import comfy.model_management

    last_states.pop(run, None)
    try:
        yield
    except (ValueError, OSError) as error:
        tell_error(node_id, run, error)
        raise
    except Exception as error:
        if comfy.model_management.is_oom(error):
            tell_error(node_id, run, error, "failed")
            raise
        what = f"{node.GET_SCHEMA().display_name}{f', run {run}' if run else ''}"
        log.exception("%s failed", what)
        advice = f"{unforeseen(what, error)} Please report it with the traceback in ComfyUI's log."
        tell_error(node_id, run, ValueError(advice), "failed")
        raise ValueError(advice) from error
