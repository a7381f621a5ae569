"""Starting a run's processes: on this machine, or as a job on a cluster.

Both run the very command that a person would give, `commvlm train RECIPE --out DIR ...`, in each process. A study's run in
several processes starts here, too.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .keys import RecipeError


def run_here(command: Sequence[str], *, processes: int, module: str = "commvlm.cli") -> int:
    """`commvlm command` in so many processes of this machine, one GPU each where there are any; the exit code.

    module: what `python -m` starts in place of `commvlm`.

    As `torchrun --nproc-per-node`, but where a process dies what is said is one line.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    os.environ.setdefault("TORCHELASTIC_ERROR_FILE", os.devnull)
    logging.getLogger("torch.distributed.elastic").setLevel(
        logging.CRITICAL
    )  # it is said below, or by the process itself
    config = LaunchConfig(
        min_nodes=1, max_nodes=1, nproc_per_node=processes, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
        run_id="commvlm", max_restarts=0, monitor_interval=0.2,
    )  # fmt: skip
    try:
        elastic_launch(config, sys.executable)("-m", module, *command)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        if failure.exitcode > 0:
            return failure.exitcode  # it said why itself
        print(
            f"commvlm: error: process {rank} was ended by {failure.signal_name()}; the last whole checkpoint stays, "
            "and the same command goes on from it",
            file=sys.stderr,
        )
        return 128 - failure.exitcode
    return 0


@dataclass(frozen=True)
class Job:
    """`commvlm command` as one process of a job: submitit calls it on every task."""

    command: tuple[str, ...]

    def __call__(self) -> None:
        """Raises SystemExit with the command's exit code when it fails."""
        from submitit.helpers import TorchDistributedEnvironment  # pyright: ignore[reportMissingImports]

        TorchDistributedEnvironment().export(set_cuda_visible_devices=False)
        code = subprocess.run([sys.executable, "-m", "commvlm.cli", *self.command], check=False).returncode
        if code:
            raise SystemExit(code)

    def checkpoint(self, *args: Any, **kwargs: Any) -> Any:
        """When the job's time is over or another takes its place: the same once more, which goes on where this ended."""
        from submitit.helpers import DelayedSubmission  # pyright: ignore[reportMissingImports]

        return DelayedSubmission(self)


def submit(
    command: Sequence[str], logs: Path, *, cluster: str, nodes: int, processes: int, options: Mapping[str, Any]
) -> Any:
    """Hands `commvlm command` to a cluster, `processes` on each of `nodes`; returns submitit's job.

    cluster: "slurm", or "local" to try the same on this machine. options: submitit's own, such as timeout_min, mem_gb,
    slurm_partition, slurm_account. logs: the folder of what the job prints. Raises RecipeError without submitit (extra
    `cluster`), and for an option that it does not take.
    """
    try:
        import submitit  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise RecipeError("submitting needs submitit: pip install 'commvlm[cluster]'") from None
    if cluster == "local" and nodes > 1:
        raise RecipeError("--submit local is this machine alone: --nodes must be 1")
    gpus = {"gpus_per_node": processes} if cluster == "slurm" else {}
    try:
        executor = submitit.AutoExecutor(folder=logs, cluster=cluster)
        executor.update_parameters(name="commvlm", nodes=nodes, tasks_per_node=processes, **gpus, **options)
        return executor.submit(Job(tuple(command)))
    except (NameError, AssertionError, TypeError, ValueError) as error:  # what submitit says of options
        raise RecipeError(f"--cluster: {str(error).splitlines()[0][:300]}") from error
    except (FileNotFoundError, RuntimeError) as error:
        raise RecipeError(f"no {cluster} takes jobs here ({' '.join(str(error).split())[:200]})") from error
