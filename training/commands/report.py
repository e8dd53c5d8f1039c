"""The verb `report`: a run's report.html, written again."""

from __future__ import annotations

import argparse
from pathlib import Path

from .verb import Verb


def run_report(arguments: argparse.Namespace) -> dict:
    from ..runs.folder import RunFolder
    from ..runs.report import write_report

    folder = RunFolder(arguments.run_folder)
    if folder.config() is None:
        raise ValueError(f"{folder.path} has no config.json; expected a run's folder, such as output/retune/my run.")
    return {"report": str(write_report(folder))}


def add_report_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", type=Path, help="the run's folder, such as 'output/retune/my run'")


VERBS = {
    "report": Verb(
        "write a run's report.html again, also while the run trains or after it was stopped",
        add_report_flags,
        run_report,
    )
}
