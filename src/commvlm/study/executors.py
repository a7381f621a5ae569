"""Where runs are executed: processes here, Slurm through submitit, or Ray. One small protocol, chosen by a flag.

Each executor is told how many processes a run is, and gives it as many GPUs where there are any.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

RAISED = re.compile(r'^ +File ".*\n(?: .*\n)*(\S.*)', re.MULTILINE)
"""The line after a trace: what was raised."""


class Job(Protocol):
    """One started command."""

    def exit_code(self) -> int | None:
        """None while it goes on; 0 when it went well."""
        ...

    def reason(self) -> str:
        """Why the scheduler says that it failed, in one line; empty where it says nothing."""
        ...

    def cancel(self) -> None:
        """Ends it, if it still goes on."""
        ...


class Executor(Protocol):
    """Starts commands; how many at once is the caller's business."""

    def submit(self, command: Sequence[str], log: Path) -> Job:
        """Starts `command`; what it prints goes to the end of `log`."""
        ...

    def close(self) -> None: ...


def run_command(command: Sequence[str], log: str) -> int:
    """Runs to the end on one core, wherever it is called, or until this process is interrupted; returns the exit code."""
    process = _started(command, Path(log))
    try:
        return process.wait()
    finally:
        LocalJob(process).cancel()


def gpus() -> list[str]:
    """The GPUs that this process sees, as CUDA_VISIBLE_DEVICES calls them."""
    import torch

    said = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return (
        [str(k) for k in range(count)] if said is None else [name for name in said.split(",") if name.strip()][:count]
    )


def _started(command: Sequence[str], log: Path, shown: Sequence[str] = ()) -> subprocess.Popen[bytes]:
    log.parent.mkdir(parents=True, exist_ok=True)
    threads = {name: os.environ.get(name, "1") for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    device = {"CUDA_VISIBLE_DEVICES": ",".join(shown)} if shown else {}
    with log.open("ab") as output:
        return subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=output, stderr=subprocess.STDOUT,
            env={**os.environ, **threads, **device, "TQDM_MININTERVAL": "5"},
        )  # fmt: skip


class LocalJob:
    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self.process = process

    def exit_code(self) -> int | None:
        return self.process.poll()

    def reason(self) -> str:
        return ""

    def cancel(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()


class Local:
    """Processes of this machine; each run sees as many GPUs as it has processes, those with the fewest runs.

    Raises ValueError where the machine has some GPUs, but too few for one run.
    """

    def __init__(self, folder: Path, processes: int = 1) -> None:
        self.at_work: dict[str, list[LocalJob]] = {name: [] for name in gpus()}
        self.each = processes
        _enough(len(self.at_work), processes, "this machine has")

    def submit(self, command: Sequence[str], log: Path) -> Job:
        for name, jobs in self.at_work.items():
            self.at_work[name] = [job for job in jobs if job.exit_code() is None]
        shown = sorted(self.at_work, key=lambda name: len(self.at_work[name]))[: self.each]
        job = LocalJob(_started(command, log, shown))
        for name in shown:
            self.at_work[name].append(job)
        return job

    def close(self) -> None:
        pass


class SubmititJob:
    def __init__(self, job: Any) -> None:
        self.job, self.error = job, None

    def exit_code(self) -> int | None:
        if not self.job.done():
            return None
        self.error = self.job.exception()
        return 1 if self.error is not None else int(self.job.result())

    def reason(self) -> str:
        return in_one_line(self.error)

    def cancel(self) -> None:
        if not self.job.done():
            self.job.cancel()


class Submitit:
    """Slurm, or processes where there is no Slurm. Time and resources are submitit's own settings, from the environment:
    COMMVLM_SLURM="timeout_min=600,gpus_per_node=1,slurm_partition=a". A run of several processes asks for as many GPUs if
    they do not say."""

    def __init__(self, folder: Path, processes: int = 1) -> None:
        submitit = _extra("submitit", "cluster")
        self.executor = submitit.AutoExecutor(folder=folder / "submitit")
        usual = {"timeout_min": 600, **({"gpus_per_node": processes} if processes > 1 else {})}
        try:
            self.executor.update_parameters(**{**usual, **_settings(os.environ.get("COMMVLM_SLURM", ""))})
        except (
            NameError,
            AssertionError,
            TypeError,
            RuntimeError,
        ) as error:  # an unknown name, a value of another kind
            raise ValueError(f"COMMVLM_SLURM is none of submitit's settings: {' '.join(str(error).split())}") from error

    def submit(self, command: Sequence[str], log: Path) -> Job:
        return SubmititJob(self.executor.submit(run_command, list(command), str(log)))

    def close(self) -> None:
        pass


class RayJob:
    def __init__(self, ray: Any, reference: Any) -> None:
        self.ray, self.reference, self.error = ray, reference, None

    def exit_code(self) -> int | None:
        ready, _ = self.ray.wait([self.reference], timeout=0)
        if not ready:
            return None
        try:
            return int(self.ray.get(self.reference))
        except self.ray.exceptions.RayError as error:
            self.error = error
            return 1

    def reason(self) -> str:
        return in_one_line(self.error)

    def cancel(self) -> None:
        self.ray.cancel(self.reference, force=True)


class Ray:
    """A Ray cluster at RAY_ADDRESS, or one of this machine; a run has a core for each of its processes, and a GPU where the
    cluster has any. Raises ValueError where no machine of it has enough for one run."""

    def __init__(self, folder: Path, processes: int = 1) -> None:
        self.ray = _extra("ray", "ray")
        if not self.ray.is_initialized():
            self.ray.init(include_dashboard=False, log_to_driver=False, configure_logging=False)
        machines = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
        most = max(int(machine.get("GPU", 0)) for machine in machines)
        _enough(most, processes, "the largest machine of the cluster has")
        each = {"num_cpus": processes, "num_gpus": processes if most else 0}
        self.remote = self.ray.remote(**each, max_retries=0)(run_command)

    def submit(self, command: Sequence[str], log: Path) -> Job:
        return RayJob(self.ray, self.remote.remote(list(command), str(log)))

    def close(self) -> None:
        self.ray.shutdown()


EXECUTORS: dict[str, Callable[..., Executor]] = {"local": Local, "submitit": Submitit, "ray": Ray}
"""By name: (the study's folder, processes of a run) -> an executor."""


def in_one_line(error: BaseException | None) -> str:
    """What an error says first, or where that is a trace, what was raised; nothing without one."""
    text = "" if error is None else str(error) or type(error).__name__
    return " ".join(" ".join(RAISED.findall(text)[-1:] or text.splitlines()[:2]).split())


def _enough(there: int, processes: int, whose: str) -> None:
    if 0 < there < processes:
        raise ValueError(
            f"a run takes {processes} GPUs, one for each of its processes, and {whose} {there}: --processes"
        )


def _extra(module: str, extra: str) -> Any:
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(f"{module} is not installed: pip install 'commvlm[{extra}]'") from error


def _settings(text: str) -> dict[str, Any]:
    """ "timeout_min=60,slurm_partition=a" -> their values, numbers as numbers."""
    found: dict[str, Any] = {}
    for entry in text.split(",") if text else ():
        name, equals, value = entry.partition("=")
        if not equals:
            raise ValueError(f"COMMVLM_SLURM has {entry!r}: it is name=value, separated by commas")
        found[name.strip()] = int(value) if value.strip().isdigit() else value.strip()
    return found


def worker_command(root: Path, key: str, *, tasks: Sequence[str], keep: bool, processes: int = 1) -> list[str]:
    """The command of one run."""
    kept = "keep" if keep else "drop"
    said = [str(root.resolve()), key, ",".join(tasks), kept, str(processes)]
    return [sys.executable, "-m", "commvlm.study.worker", *said]
