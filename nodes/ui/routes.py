"""HTTP routes of the runs panel and of the charts in nodes.

Names from a client are compared with fresh listings of run folders (see `training.runs`), so that none becomes part of
a path. Files are read in threads, not on the event loop.
"""

from __future__ import annotations

import asyncio
import html
from collections.abc import Awaitable, Callable
from typing import Any

from aiohttp import web

REPORT_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'; \
form-action 'none'; base-uri 'none'"><title>{title}</title>
<style>html,body{{margin:0;height:100%;overflow:hidden}}iframe{{border:0;width:100%;height:100%}}</style>
<iframe sandbox title="{title}" srcdoc="{report}"></iframe></html>
"""
"""A report, which may come with a run folder from an unknown source, in a frame: the policy, which it inherits, forbids
scripts, network and forms, also pages that it would go to; the sandbox refreshes, pop-ups and the tab's address. A
header does not work, since ComfyUI's --disable-api-nodes overwrites it."""


def register() -> None:
    """Adds the routes to ComfyUI's server; does nothing in a script without a server."""
    from server import PromptServer

    instance = getattr(PromptServer, "instance", None)
    if instance is None:
        return
    routes = instance.routes
    routes.get("/retune/runs")(_with_errors(_list))
    routes.get("/retune/runs/{id}")(_with_errors(_details))
    routes.get("/retune/runs/{id}/samples/{file}")(_with_errors(_sample))
    routes.get("/retune/runs/{id}/report")(_with_errors(_report))
    routes.get("/retune/runs/{id}/workflow")(_with_errors(_workflow))
    routes.post("/retune/runs/{id}/finish")(_with_errors(_finish))
    routes.delete("/retune/runs/{id}")(_with_errors(_delete))


def _json(value: Any, status: int = 200) -> web.Response:
    """Strict JSON: ComfyUI's prompts and metrics may hold NaN or infinity, which browsers refuse."""
    from ...training.runs.index import finite

    return web.json_response(finite(value), status=status)


Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def _with_errors(handler: Handler) -> Handler:
    """A handler that answers errors with {"error": message}: 404 for a missing run or file, 409 for other errors."""
    from ...training.runs.index import NoSuchRun

    async def answer(request: web.Request) -> web.StreamResponse:
        try:
            return await handler(request)
        except NoSuchRun as error:
            return _json({"error": str(error.args[0])}, status=404)
        except (ValueError, OSError) as error:
            return _json({"error": str(error)}, status=409)

    return answer


async def _call(function: Callable, request: web.Request, *names: str):
    """Calls a function of training/runs in a thread, with the runs folder and parts of the request's address."""
    from ..common.paths import runs_folder

    return await asyncio.to_thread(function, runs_folder(), *(request.match_info[name] for name in names))


async def _list(request: web.Request) -> web.Response:
    from ...training.runs.index import list_runs

    return _json(await _call(list_runs, request))


async def _details(request: web.Request) -> web.Response:
    """204 for a run that does not exist (yet): a node asks before its first run, and browsers log a 404 as an error."""
    from ...training.runs.index import NoSuchRun, run_details
    from .progress import last_steps

    try:
        run = await _call(run_details, request, "id")
    except NoSuchRun:
        return web.Response(status=204)
    return _json(run | {"live": last_steps.get(run["id"])})


async def _sample(request: web.Request) -> web.FileResponse:
    from ...training.runs.index import sample_file

    path = await _call(sample_file, request, "id", "file")
    return web.FileResponse(path, headers={"Cache-Control": "no-cache"})


async def _report(request: web.Request) -> web.Response:
    from ...training.runs.index import report_file

    path = await _call(report_file, request, "id")
    report = await asyncio.to_thread(path.read_bytes)
    page = framed(path.parent.name, report.decode("utf-8", "replace"))
    return web.Response(text=page, content_type="text/html", charset="utf-8", headers={"Cache-Control": "no-cache"})


def framed(title: str, report: str) -> str:
    """The page that shows a report in its frame."""
    from ...training.common.foreign import printable

    return REPORT_PAGE.format(title=html.escape(printable(title)), report=html.escape(report))


async def _workflow(request: web.Request) -> web.Response:
    from ...training.runs.index import workflow_of

    return _json(await _call(workflow_of, request, "id"))


async def _finish(request: web.Request) -> web.Response:
    """Asks a run in progress to end cleanly after its next step."""
    from ...training.runs.index import run_details
    from .running import finish

    name = (await _call(run_details, request, "id"))["id"]
    if not finish(name):
        raise ValueError(f"run {name!r} is not in progress in this ComfyUI; expected one that is.")
    return _json({"finishing": name})


async def _delete(request: web.Request) -> web.Response:
    from ...training.runs.index import delete_run

    await _call(delete_run, request, "id")
    return _json({"deleted": request.match_info["id"]})
