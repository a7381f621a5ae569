"""study: the paper's figures and tables, and the controls beside them."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from .command import add_command, count

if TYPE_CHECKING:
    from ..study.runs import Places
    from ..study.settings import Scale

EXAMPLES = """  commvlm study figure-2 --scale quick
  commvlm study all --scale micro --seeds 3 --jobs 2
  commvlm study table-1 controls --scale analysis --data DIR --list
  commvlm study table-1 --scale analysis --data DIR --processes 4 --jobs 2    # two runs on eight GPUs
  commvlm study all --scale micro --rows "COMM*" "clip last"
  commvlm study all --scale micro --report          # only draws the report anew
  commvlm study all --scale micro --report --into docs/findings.md
  commvlm study all --scale micro --export micro.runs.jsonl.xz    # what is done, as one file
  commvlm study all --scale micro --import micro.runs.jsonl.xz --report"""


def add_study(commands: argparse._SubParsersAction) -> None:
    what = "train and compare visual halves: each figure and table of the paper, controls and peers; the same command resumes"
    parser = add_command(commands, "study", _study, what, EXAMPLES)
    parser.add_argument("experiments", nargs="+", help="figure-2, figure-3, table-1, ... or all")
    parser.add_argument("--scale", default="quick", help="quick, micro, analysis, or a YAML file")
    parser.add_argument(
        "--rows",
        nargs="+",
        default=[],
        metavar="NAME",
        help='only these of the rows that --list names; "COMM*" is a pattern',
    )
    parser.add_argument("--seeds", type=count, help="in place of the scale's own")
    parser.add_argument("--out", type=Path, help="folder of the study (runs/study/SCALE)")
    parser.add_argument("--data", type=Path, help="folder of the data, of a scale without a micro world")
    parser.add_argument(
        "--jobs", type=count, help="runs side by side (as many as the GPUs here are enough for; 2 without any)"
    )
    parser.add_argument(
        "--processes", type=count, help="of each run, one GPU or core each, in place of the scale's own"
    )
    parser.add_argument(
        "--executor", default="local", choices=("local", "submitit", "ray"), help="where runs are executed"
    )
    parser.add_argument("--gpu", help="by which the hours of a scale on real data are counted (h100)")
    what_else = parser.add_mutually_exclusive_group()
    what_else.add_argument(
        "--list", action="store_true", help="only print the rows, how many runs they are and what they cost"
    )
    what_else.add_argument("--report", action="store_true", help="only draw the report from what is done")
    parser.add_argument(
        "--import", dest="source", type=Path, metavar="FILE", help="first take the results that FILE has of these runs"
    )
    what_else.add_argument(
        "--export", type=Path, metavar="FILE", help="only write the results of all runs that are done into FILE"
    )
    parser.add_argument("--into", type=Path, help="a Markdown page between whose marks the findings are put, too")


def _study(options: argparse.Namespace) -> int:
    from rich.console import Console

    from ..app.marks import check_marks
    from ..study.bundle import pack
    from ..study.executors import gpus
    from ..study.report import write_report
    from ..study.runs import Places
    from ..study.study import asked, chosen, grid_table, planned, study, take

    wanted = asked(
        options.experiments, scale=options.scale, out=options.out, seeds=options.seeds, data=options.data,
        processes=options.processes, gpu=options.gpu, only=options.rows,
    )  # fmt: skip
    places = Places(wanted.root)
    console = Console(stderr=True)
    if options.into is not None and (options.list or options.export):
        raise ValueError("--into puts a report's findings into a page: --list and --export draw none")
    if options.rows and (options.report or options.export):
        raise ValueError("--rows chooses what is trained or listed: --report and --export take all that is done")
    if options.into is not None:
        check_marks(options.into, "study")
    if options.source is not None:
        taken, done = take(wanted, options.source)
        said = f"{taken} results taken from {options.source}; {done} of this grid's runs are done"
        console.print(said, highlight=False, soft_wrap=True, markup=False)
    if options.export is not None:
        packed = pack(places, options.export)
        print(f"{options.export}: the results of {packed} runs")
        return 0
    if options.list:
        runs = chosen(planned(wanted)[1], wanted.only)
        print(grid_table(wanted, runs, console))
        return 0
    if options.report:
        print(write_report(places, wanted.scale))
        _tell(options.into, places, wanted.scale)
        return 0
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that what it started ends with it
    each = wanted.scale.processes
    jobs = options.jobs or len(gpus()) // each or max(1, 2 // each)
    report, failed = study(wanted, jobs=jobs, executor=options.executor, console=console)
    print(report)
    for one in failed:
        said = f"failed: {one.run.name}: {one.reason}"
        console.print(said, style="red", highlight=False, soft_wrap=True, markup=False)
    _tell(options.into, places, wanted.scale)
    return 1 if failed else 0


def _tell(page: Path | None, places: Places, scale: Scale) -> None:
    from ..study.findings import write_findings

    if page is not None:
        write_findings(page, places, scale)
