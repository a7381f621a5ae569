"""One run in several processes: which of them writes, and how all stop when one fails.

torchrun, Slurm or `commvlm train --processes` start the processes and say RANK, WORLD_SIZE and where to meet; the library
does the rest. Alone, everything here is as if it were not.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import gather_object

LOST = ("gloo", "NCCL", "ProcessGroup", "Connection reset", "Connection closed", "store")
"""Words of what torch says when another process of the run went away."""


class LostProcess(ConnectionError):
    """Another process of the run ended."""


PATIENCE = timedelta(hours=2)
"""For which one process waits for another that writes a large checkpoint; torch's own 10 minutes are few on a slow disk."""


def processes() -> PartialState:
    """This process among those of the run: `process_index`, `num_processes`, `is_main_process`. Waits for the others."""
    return PartialState(cpu=not torch.cuda.is_available(), timeout=PATIENCE)


@contextmanager
def together() -> Iterator[None]:
    """What every process does on its own; none goes on before all are done, and all stop where one failed.

    The first that failed raises its error, the others leave in silence with SystemExit 2: one line is said, not eight.
    """
    failure: Exception | None = None
    try:
        yield
    except (ValueError, OSError) as error:
        failure = error
    failed = gather_object([failure is not None])
    if not any(failed):
        return
    leave()  # a process that ends while the group stands is at times ended by SIGABRT, which would be told as the reason
    if failure is not None and failed.index(True) == processes().process_index:
        raise failure
    raise SystemExit(2)


@contextmanager
def hearing() -> Iterator[None]:
    """Raises LostProcess where another process is gone, in place of what its going away looks like from here."""
    try:
        yield
    except RuntimeError as error:
        if processes().num_processes == 1 or not any(word in str(error) for word in LOST):
            raise
        raise LostProcess(
            "another process of this run ended, so this one does; the last whole checkpoint stays, "
            f"and the same command goes on from it (torch says: {str(error).strip().splitlines()[0][:160]})"
        ) from error


def leave() -> None:
    """Ends the group of processes: after a run that went well, or where all know that one failed."""
    if processes().num_processes > 1:
        processes().destroy_process_group()


def speaks() -> bool:
    """Whether this process may say what all of them know; asked without waiting for the others."""
    return os.environ.get("RANK", "0") == "0"
