"""train, quickstart: runs that learn."""

from __future__ import annotations

import argparse
from pathlib import Path

from .command import OVERRIDES, RECIPE, add_command, count, mapping, recipe_of


def add_train(commands: argparse._SubParsersAction) -> None:
    what = "train a recipe's stages; the same command resumes an interrupted run"
    example = (
        "  commvlm microworld write world\n  commvlm train micro --out runs/first --data.root world\n"
        "  commvlm train comm-7b --data.root data --out runs/comm --processes 8 --train.engine fsdp\n"
        "  commvlm train comm-7b --data.root data --out runs/comm --submit slurm --nodes 2 --processes 8 \\\n"
        "      --cluster '{slurm_partition: gpu}'\n"
        "  torchrun --nproc-per-node 8 -m commvlm.cli train comm-7b --data.root data --out runs/comm\n" + OVERRIDES
    )
    parser = add_command(commands, "train", _train, what, example, overridable=True)
    parser.add_argument("recipe", help=RECIPE)
    parser.add_argument("--out", type=Path, required=True, help="folder of the run")
    parser.add_argument(
        "--weights",
        default="checkpoint",
        choices=("checkpoint", "random"),
        help="random needs configs and the tokenizer",
    )
    parser.add_argument("--processes", type=count, default=1, help="on this machine (or each node), one GPU each")
    parser.add_argument("--submit", choices=("slurm", "local"), help="hand the run to a cluster (extra cluster)")
    parser.add_argument("--nodes", type=count, default=1, help="machines, with --submit slurm")
    parser.add_argument("--cluster", default="{}", help="submitit's options as YAML, such as '{timeout_min: 1440}'")


def _train(options: argparse.Namespace) -> int:
    recipe = recipe_of(options)
    if options.submit or options.processes > 1:
        return _launch(options)
    from ..train.parallel import leave, speaks
    from ..train.run import train

    folder = train(recipe, options.out, weights=options.weights)
    if speaks():
        print(f"the model is in {folder}")
    leave()
    return 0


def _launch(options: argparse.Namespace) -> int:
    """The same command in several processes, without what says how many."""
    from ..train.launch import run_here, submit

    command = ["train", options.recipe, "--out", str(options.out), "--weights", options.weights, *options.overrides]
    if not options.submit:
        return run_here(command, processes=options.processes)
    settings = mapping(options.cluster, "--cluster")
    logs = options.out.with_name(options.out.name + "-jobs")
    job = submit(
        command, logs, cluster=options.submit, nodes=options.nodes, processes=options.processes, options=settings
    )
    print(f"job {job.job_id}; what it says is in {logs}")
    return 0


def add_quickstart(commands: argparse._SubParsersAction) -> None:
    what = "train and evaluate COMM beside its controls on the micro world, and write the report (make demo)"
    parser = add_command(commands, "quickstart", _quickstart, what, "  commvlm quickstart --out runs/demo")
    parser.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder of the demo")
    parser.add_argument("--jobs", type=count, default=2, help="runs side by side, one core each")


def _quickstart(options: argparse.Namespace) -> None:
    from ..app.quickstart import run_quickstart

    print(run_quickstart(options.out, jobs=options.jobs))
