"""A node's error in the page: what it says, and what it advises as data that buttons are made from.

retune.error   when a node ends with an error: node, run (None for a node without one), state (refused or failed),
               message, and of a `RunConflict` other_name, setting and before
"""

from __future__ import annotations

from typing import Any

last_states: dict[str, str] = {}
"""Name of a run -> its state when it was last heard of, since its node began."""


def tell_error(node_id: str | None, run: Any, error: Exception, state: str = "") -> None:
    """Sends an error to the page that queued the prompt; does nothing in a script without a server.

    Args:
        node_id: of the node; None where the node is not told.
        run: name of its run, or None.
        error: what it ends with.
        state: refused or failed; "" is failed for a run that says so, else refused.
    """
    import server

    from ...training.runs.folder import RunConflict
    from ...training.runs.index import finite

    instance = getattr(server.PromptServer, "instance", None)
    if instance is None or node_id is None:
        return
    state = state or ("failed" if last_states.get(run) == "failed" else "refused")
    about = {"node": node_id, "run": run, "state": state, "message": str(error) or type(error).__name__}
    if isinstance(error, RunConflict):
        about |= {"other_name": error.other_name, "setting": error.setting, "before": error.before}
    instance.send_sync("retune.error", finite(about), instance.client_id)
