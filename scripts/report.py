"""A page about each run folder, and one table over all of them: report.html, results.csv, results.md.

python -m scripts.report output/quickstart
python -m scripts.report output/seed1 output/seed2 output/seed3 --output_dir output/seeds

A run is a folder of pipeline.sh, quickstart.sh or run_category.sh, or any folder with *.metrics.json files below it.
Every page needs no other file and no network. With several runs each gets its own page, and one over all of them, with
means and spreads over seeds, is written to --output_dir.
"""

from __future__ import annotations

from dataclasses import dataclass

from minionerec.common.cli import flag, parse_flags, run_command
from minionerec.common.settings import DryRunFlags


@dataclass
class ReportFlags(DryRunFlags):
    """Runs."""

    folders: list[str] = flag(help="the run folders; the first words without a flag are taken for them")
    output_dir: str | None = flag(
        None,
        "folder of results.csv, results.md and, with several runs, of the page over all of them",
        default_text="the run's folder; with several runs the folder that all of them are in",
    )


if __name__ == "__main__":
    # Before the imports below, which take seconds: --help and a wrong flag answer at once.
    FLAGS = parse_flags(ReportFlags, positional="folders")

import os
from pathlib import Path

from minionerec.common.files import InputError
from minionerec.common.processes import say_outputs
from minionerec.reports.page import PAGE, write_overview, write_page
from minionerec.reports.results import TABLES, write_results
from minionerec.reports.runs import read_run


def report(flags: ReportFlags) -> None:
    """Write the pages and tables of run folders.

    Raises:
        InputError: no folder, one that is no run, or one that is given twice.
    """
    if not flags.folders:
        raise InputError("--folders: expected a run folder")
    resolved = [Path(folder).resolve() for folder in flags.folders]
    for number, folder in enumerate(resolved):
        if folder in resolved[:number]:
            raise InputError(f"--folders: {flags.folders[number]} is given twice")
    runs = [read_run(folder) for folder in flags.folders]
    several = len(runs) > 1
    shared = Path(os.path.commonpath([folder.parent for folder in resolved]) if several else resolved[0])
    output = Path(flags.output_dir) if flags.output_dir else shared
    if several and output.resolve() in resolved:
        raise InputError(f"--output_dir {output}: is one of the runs, whose page would be overwritten")
    if flags.dry_run:
        pages = [run.folder / PAGE for run in runs] + ([output / PAGE] if several else [])
        say_outputs([*pages, *(output / name for name in TABLES)], dry_run=True)
        return
    paths = [write_page(run) for run in runs]
    output.mkdir(parents=True, exist_ok=True)
    paths += [write_overview(runs, output)] if several else []
    paths += write_results(runs, output)
    say_outputs(paths)


if __name__ == "__main__":
    run_command(report, FLAGS)
