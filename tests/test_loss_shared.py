"""A head whose weights are put together by all processes at every call of it: each calls it as often as the others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ranks import CONTEXT
from torch import distributed as dist
from torch.nn import functional as F

from commvlm.model import loss

ROWS, DIM, WORDS = 3, 5, 11


def data(numbers: list[int]) -> tuple[torch.nn.Linear, list[torch.Tensor], list[torch.Tensor]]:
    """A head, and each process's states (1, n + 1, d) and labels (1, n + 1), of which n are supervised."""
    torch.manual_seed(3)
    head = torch.nn.Linear(DIM, WORDS)
    states = [torch.randn(1, n + 1, DIM) for n in numbers]
    return head, states, [torch.randint(0, WORDS, (1, n + 1)) for n in numbers]


def work(rank: int, folder: Path, numbers: list[int]) -> None:
    """One process's share, with a head as ZeRO-3 marks it."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=len(numbers))
    loss.AT_ONCE = ROWS * WORDS
    head, states, labels = data(numbers)
    head.weight.ds_id = 0  # type: ignore[assignment]
    calls: list[int] = []
    head.register_forward_hook(lambda module, given, made: calls.append(len(made)))
    hidden = states[rank].requires_grad_()
    total = loss.supervised_loss(head, hidden, labels[rank], vocabulary=WORDS, number=7)
    total.backward()
    found = {"loss": total.detach(), "weight": head.weight.grad, "states": hidden.grad, "calls": calls}
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("numbers", [[2, 10], [0, 7], [3, 1], [0, 0]])
def test_processes_call_a_head_equally_often_and_together_are_as_one(tmp_path, numbers):
    processes = [CONTEXT.Process(target=work, args=(rank, tmp_path, numbers)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]
    found = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2)]
    assert len(found[0]["calls"]) == len(found[1]["calls"])
    assert max(found[0]["calls"] + found[1]["calls"]) <= ROWS

    head, states, labels = data(numbers)
    hidden = [state.requires_grad_() for state in states]
    logits = torch.cat([head(state[0, :-1]) for state in hidden])
    expected = F.cross_entropy(logits, torch.cat([label[0, 1:] for label in labels]), reduction="sum") / 7
    expected.backward()
    torch.testing.assert_close(found[0]["loss"] + found[1]["loss"], expected.detach())
    torch.testing.assert_close(found[0]["weight"] + found[1]["weight"], head.weight.grad)
    for rank in range(2):
        torch.testing.assert_close(found[rank]["states"], hidden[rank].grad)
