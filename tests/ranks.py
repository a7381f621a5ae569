"""Runs of `commvlm` in processes of their own, one or several that work together: to be watched, and to be killed.

They are forked from a server that has imported everything once, so that a start costs nothing.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
CONTEXT: Any = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["commvlm.train.run"])


@dataclass
class Ranks:
    """Processes of one run. said: the files of what each one printed, both streams."""

    processes: list[BaseProcess]
    said: list[Path]

    def wait(self, seconds: float = 120) -> list[int]:
        """Their exit codes, when all have ended by themselves; -9 is a killed one's. Fails if one hangs."""
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
        hanging = [process for process in self.processes if process.exitcode is None]
        for process in hanging:
            process.kill()
            process.join()
        assert not hanging, "a process hangs"
        return [int(process.exitcode or 0) for process in self.processes]

    def stop_others(self, seconds: float = 20) -> list[int]:
        """As torchrun does when one ends badly: the others are given a while, then told to end. Exit codes."""
        while all(process.exitcode in (None, 0) for process in self.processes):
            if all(process.exitcode == 0 for process in self.processes):
                break
            self.processes[0].join(0.01)
            time.sleep(0.01)
        end = time.monotonic() + seconds
        for process in self.processes:
            process.join(max(0.1, end - time.monotonic()))
            if process.exitcode is None:  # it may be waiting for the dead one to come to the meeting
                process.terminate()
        return self.wait(30)

    def kill(self, *ranks: int) -> None:
        for rank in ranks:
            self.processes[rank].kill()

    def lines(self, rank: int = 0) -> list[str]:
        return self.said[rank].read_text(errors="replace").replace("\r", "\n").splitlines()


def start(
    argv: Sequence[str], folder: Path, *, count: int = 1, spies: Sequence[Callable[[int, Path], None]] = ()
) -> Ranks:
    """Starts `commvlm argv` in `count` processes. folder: of what they print. spies: called in each with its rank and the
    folder before it begins."""
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    said = [folder / f"said-{rank}.txt" for rank in range(count)]
    processes = []
    for rank in range(count):
        world = {} if count == 1 else {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
        }  # fmt: skip
        processes.append(CONTEXT.Process(target=_run, args=(list(argv), world, str(said[rank]), folder, rank, spies)))
        processes[-1].start()
    return Ranks(processes, said)


def _run(argv: list[str], world: dict[str, str], said: str, folder: Path, rank: int, spies: Any) -> None:
    os.environ.update(world)
    handle = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for stream in (1, 2):
        os.dup2(handle, stream)
    for spy in spies:
        spy(rank, folder)
    from commvlm.cli import main

    sys.exit(main(argv))


def spy_on_data(rank: int, folder: Path) -> None:
    """Writes down which places of the mixture this process draws, in order."""
    from commvlm.data.mixture import Mixture

    draw = Mixture.__getitem__
    file = (folder / f"drawn-{rank}.txt").open("a", buffering=1)

    def drawing(self: Any, index: int) -> Any:
        file.write(f"{index}\n")
        return draw(self, index)

    Mixture.__getitem__ = drawing  # type: ignore[method-assign]


def spy_on_images(rank: int, folder: Path) -> None:
    """Writes down of every batch whether it had images of its own."""
    from commvlm.train.imageless import EveryBranch

    collate = EveryBranch.__call__
    file = (folder / f"images-{rank}.txt").open("a", buffering=1)

    def collating(self: Any, groups: Any) -> Any:
        file.write(f"{any(group[0].image is not None for group in groups)}\n")
        return collate(self, groups)

    EveryBranch.__call__ = collating  # type: ignore[method-assign]


def spy_on_gradients(rank: int, folder: Path) -> None:
    """Saves the first step's gradients, as they are before clipping."""
    import torch

    from commvlm.train.sharded import whole
    from commvlm.train.trainer import StageTrainer

    clip = StageTrainer._clip_grad_norm

    def clipping(self: Any, model: Any) -> Any:
        path = folder / f"gradients-{rank}.pt"
        if not path.exists():
            found = {n: whole(p.grad).clone() for n, p in self.model.named_parameters() if p.grad is not None}
            torch.save(found, path)
        return clip(self, model)

    StageTrainer._clip_grad_norm = clipping  # type: ignore[method-assign]


def spy_on_shards(rank: int, folder: Path) -> None:
    """Writes down the classes that are units of FSDP, and how many numbers of the model this process holds."""
    from torch.distributed.fsdp import FSDPModule

    from commvlm.train import sharded

    check = sharded.check_sharded

    def checking(model: Any) -> None:
        check(model)
        units = sorted({type(m).__name__.removeprefix("FSDP") for m in model.modules() if isinstance(m, FSDPModule)})
        held = sum(p.to_local().numel() for p in model.parameters())
        row = {"units": units, "held": held, "all": sum(p.numel() for p in model.parameters())}
        (folder / f"shards-{rank}.json").write_text(json.dumps(row))

    sharded.check_sharded = checking


class Slices:
    """A spy that lets the loss have the logits of `rows` positions at once, and writes down how many each batch asks for."""

    def __init__(self, rows: int) -> None:
        self.rows = rows

    def __call__(self, rank: int, folder: Path) -> None:
        from commvlm.model import loss

        summed = loss.summed_loss
        file = (folder / f"supervised-{rank}.txt").open("a", buffering=1)

        def summing(head: Any, states: Any, targets: Any, *, vocabulary: int) -> Any:
            file.write(f"{len(targets)}\n")
            loss.AT_ONCE = self.rows * vocabulary
            return summed(head, states, targets, vocabulary=vocabulary)

        loss.summed_loss = summing


class KillAtStep:
    """A spy that kills the process of a rank in an update, when it has its gradients."""

    def __init__(self, step: int, rank: int = 0) -> None:
        self.step, self.rank = step, rank

    def __call__(self, rank: int, folder: Path) -> None:
        from commvlm.train.trainer import StageTrainer

        clip = StageTrainer._clip_grad_norm

        def clipping(trainer: Any, model: Any) -> Any:
            if rank == self.rank and trainer.state.global_step + 1 == self.step:
                os.kill(os.getpid(), signal.SIGKILL)
            return clip(trainer, model)

        StageTrainer._clip_grad_norm = clipping  # type: ignore[method-assign]


class KillAtFile:
    """A spy that kills its own process at the n-th file operation in `out`, in the midst of whatever that belongs to."""

    EVENTS = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree")

    def __init__(self, out: Path, number: int, rank: int = 0) -> None:
        self.out, self.left, self.rank = str(out), number, rank

    def __call__(self, rank: int, folder: Path) -> None:
        if rank == self.rank:
            sys.addaudithook(self.heard)

    def heard(self, event: str, args: tuple[Any, ...]) -> None:
        if event in self.EVENTS and args and str(args[0]).startswith(self.out):
            self.left -= 1
            if not self.left:
                os.kill(os.getpid(), signal.SIGKILL)


def kill_in_save(ranks: Ranks, stages: Path, rng: random.Random, *ranks_to_kill: int, skip: int = 0) -> None:
    """Waits for a checkpoint or a stage's model to be half-written (the `skip` first ones are let pass) and kills then, or a
    little later. stages: the folder of all stages."""
    seen = False
    while any(process.is_alive() for process in ranks.processes):
        there = any(stages.glob("*/part/*")) or any(stages.glob("*/model.part/*"))
        if there and not seen and not skip:
            time.sleep(rng.random() * 0.03)
            ranks.kill(*ranks_to_kill)
            return
        skip -= there and not seen and skip > 0
        seen = there
        time.sleep(0.0005)
