"""Muon beside AdamW, against the library's own optimizers on copies, and in whole runs."""

import copy
import io

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.optim.lr_scheduler import LambdaLR

from commvlm.train.keys import RecipeError
from commvlm.train.muon import Muon, orthogonal
from commvlm.train.optimizers import Together, optimizer_of
from commvlm.train.run import train
from commvlm.train.trainer import StageTrainer

STAGE = {"name": "only", "steps": 4, "batch": 2, "warmup": 0.0, "schedule": "linear"}
RATES = {"project": 1e-2, "language_model": 3e-3}


class Parts(nn.Module):
    """Two parts: a matrix and its bias; words, a matrix, a row of weights and a kernel."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = nn.Linear(6, 4)
        self.words = nn.Embedding(9, 4)
        self.hidden = nn.Linear(4, 9, bias=False)
        self.row = nn.Parameter(torch.randn(1, 9))
        self.kernel = nn.Parameter(torch.randn(2, 3, 3))

    def parts(self) -> dict[str, list[nn.Parameter]]:
        own = [self.words.weight, self.hidden.weight, self.row, self.kernel]
        return {"project": list(self.project.parameters()), "language_model": own}

    def backward(self, step: int) -> None:
        x = torch.randn(5, 6, generator=torch.Generator().manual_seed(step))
        said = self.hidden(self.project(x) + self.words.weight[step]) * self.row
        (said.square().mean() + self.kernel.pow(3).sum()).backward()


def optimizer_for(model, kind="muon", decay=0.1):
    return optimizer_of(kind, model.parts(), RATES, decay=decay, words={id(model.words.weight)})


def stepped(model, optimizer, schedule, steps):
    for step in steps:
        model.backward(step)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()


def halving(optimizer):
    return LambdaLR(optimizer, lambda step: 0.5**step)


def test_each_parameter_is_stepped_on_by_its_own_optimizer():
    ours, theirs = Parts(), Parts()
    together = optimizer_for(ours)
    schedule = halving(together)
    matrices = [(theirs.project.weight, 1e-2), (theirs.hidden.weight, 3e-3)]
    muon = Muon([{"params": [p], "lr": rate} for p, rate in matrices], weight_decay=0.1)
    adamw = torch.optim.AdamW(
        [
            {"params": [theirs.project.bias], "lr": 1e-2, "weight_decay": 0.0},
            {"params": [theirs.words.weight, theirs.row, theirs.kernel], "lr": 3e-3, "weight_decay": 0.1},
        ]
    )
    schedules = [halving(muon), halving(adamw)]
    for step in range(4):
        stepped(ours, together, schedule, [step])
        theirs.backward(step)
        for optimizer, own in zip((muon, adamw), schedules, strict=True):
            optimizer.step()
            own.step()
            optimizer.zero_grad()
    start = Parts().state_dict()
    for name, value in theirs.state_dict().items():
        assert torch.equal(ours.state_dict()[name], value), name
        assert not torch.equal(value, start[name]), name
    assert schedule.get_last_lr() == pytest.approx([1e-2 / 16, 3e-3 / 16] * 2)


@pytest.mark.parametrize("shape", [(4, 6), (9, 4), (64, 192)])
def test_muon_goes_where_the_librarys_goes(shape):
    """The library's computes in bf16, and we do not: to 2 % of the way, decay and all."""
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=draw)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    optimizers = [
        Muon([ours], lr=1e-2, weight_decay=0.1),
        torch.optim.Muon([theirs], lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
    ]
    for _ in range(4):
        gradient = torch.randn(shape, generator=draw)
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = gradient.clone()
            optimizer.step()
        assert (ours - theirs).norm() < 0.02 * (theirs - start).norm()


def test_momentum_is_made_orthogonal():
    """Singular vectors stay, by the singular value decomposition; tall, wide and square ones, stacked or alone."""
    for shape in ((3, 24, 8), (2, 8, 24), (1, 8, 8)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        found = orthogonal(x)
        u, _, v = torch.linalg.svd(x, full_matrices=False)
        inside = u.mT @ found @ v.mT
        values = inside.diagonal(dim1=1, dim2=2)
        assert (inside - torch.diag_embed(values)).abs().max() < 1e-3
        assert 0.65 < values.min() < values.max() < 1.25
        assert torch.allclose(orthogonal(x[:1])[0], found[0], atol=1e-5)


def test_large_matrices_are_stepped_on_few_at_a_time(monkeypatch):
    """Three at once, two and one, each alone: stacks as large as said, and the same weights, decimals aside."""
    draw = torch.Generator().manual_seed(0)
    start = [torch.randn(4, 6, generator=draw) for _ in range(3)]
    gradients = [torch.randn(4, 6, generator=draw) for _ in range(3)]
    ends = {}
    for numbers, sizes in ((2**24, [3]), (50, [2, 1]), (20, [1, 1, 1])):
        seen = []
        monkeypatch.setattr("commvlm.train.muon.AT_ONCE", numbers)
        watched = lambda x, n, seen=seen: seen.append(len(x)) or orthogonal(x, n)  # noqa: E731
        monkeypatch.setattr("commvlm.train.muon.orthogonal", watched)
        own = [nn.Parameter(p.clone()) for p in start]
        for p, gradient in zip(own, gradients, strict=True):
            p.grad = gradient
        Muon(own, lr=1e-1, weight_decay=0.1).step()
        assert seen == sizes
        ends[numbers] = torch.stack([p.detach() for p in own])
    assert torch.allclose(ends[2**24], ends[50], atol=1e-6)
    assert torch.allclose(ends[2**24], ends[20], atol=1e-6)
    assert not torch.allclose(ends[20], torch.stack(start), atol=1e-2)


def test_what_is_no_matrix_is_refused():
    with pytest.raises(ValueError, match=r"one parameter has the shape \(3,\)"):
        Muon([nn.Parameter(torch.zeros(3))])


def test_adamw_is_one_optimizer_whose_vectors_do_not_decay():
    optimizer = optimizer_for(Parts(), "adamw")
    assert type(optimizer) is torch.optim.AdamW
    found = [(g["part"], g["lr"], g["weight_decay"], len(g["params"])) for g in optimizer.param_groups]
    assert found == [("project", 1e-2, 0.1, 1), ("project", 1e-2, 0.0, 1), ("language_model", 3e-3, 0.1, 4)]


def test_it_goes_on_from_its_state():
    model = Parts()
    optimizer = optimizer_for(model)
    schedule = halving(optimizer)
    stepped(model, optimizer, schedule, range(2))
    file = io.BytesIO()
    torch.save({"optimizer": optimizer.state_dict(), "schedule": schedule.state_dict()}, file)
    again = Parts()
    again.load_state_dict(copy.deepcopy(model.state_dict()))
    stepped(model, optimizer, schedule, range(2, 4))

    file.seek(0)
    state = torch.load(file, weights_only=True)
    other = optimizer_for(again)
    other_schedule = halving(other)
    other.load_state_dict(state["optimizer"])
    other_schedule.load_state_dict(state["schedule"])
    stepped(again, other, other_schedule, range(2, 4))
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())


def test_a_closure_is_refused():
    optimizer = optimizer_for(Parts())
    assert isinstance(optimizer, Together)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


def weights_after(small, folder, *options, **changes):
    trains = {"merge": 1e-3, "align": 1e-3, "project": 1e-3, "language_model": 1e-3}
    recipe = small("--train.precision", "fp32", *options, stages=[{**STAGE, "trains": trains, **changes}])
    train(recipe, folder)
    return load_file(folder / "model" / "model.safetensors")


def test_in_a_run_words_and_vectors_are_adamws_and_matrices_are_not(small, tmp_path):
    """After one step both optimizers have seen one gradient."""
    adamw = weights_after(small, tmp_path / "adamw", steps=1)
    muon = weights_after(small, tmp_path / "muon", "--train.optimizer", "muon", steps=1)
    start = weights_after(small, tmp_path / "start", steps=1, trains={"merge": 0.0})
    moved = {name for name in start if not torch.equal(start[name], adamw[name])}
    other = {name for name in moved if not torch.equal(adamw[name], muon[name])}
    assert any("embed_tokens" in name for name in moved)
    assert all(adamw[name].ndim == 2 and "embed" not in name and "lm_head" not in name for name in other)
    assert {name for name in moved if "_proj.weight" in name} <= other


def test_an_interrupted_run_ends_as_if_it_had_not_been(small, tmp_path, monkeypatch):
    whole = weights_after(small, tmp_path / "whole", "--train.optimizer", "muon")
    step = StageTrainer.training_step

    def stopping(self, *args, **kwargs):
        if self.state.global_step == 3:
            raise ValueError("stopped")
        return step(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(StageTrainer, "training_step", stopping)
        with pytest.raises(ValueError, match="stopped"):
            weights_after(small, tmp_path / "parts", "--train.optimizer", "muon")
    assert (tmp_path / "parts" / "stages" / "only" / "checkpoint-3").is_dir()
    again = weights_after(small, tmp_path / "parts", "--train.optimizer", "muon")
    assert all(torch.equal(value, again[name]) for name, value in whole.items())


def test_shared_out_matrices_are_refused(small, tmp_path):
    with pytest.raises(RecipeError, match=r"train\.optimizer muon needs whole matrices: engine ddp, not fsdp"):
        train(small("--train.optimizer", "muon", "--train.engine", "fsdp"), tmp_path / "run")
    assert not (tmp_path / "run").exists()
