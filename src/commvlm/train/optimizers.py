"""What steps on the weights: AdamW, or Muon on the hidden matrices with AdamW on the rest."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from .muon import Muon

Groups = list[dict[str, Any]]
BETAS = (0.9, 0.999)


def optimizer_of(
    kind: str,
    trained: Mapping[str, Sequence[nn.Parameter]],
    rates: Mapping[str, float],
    *,
    decay: float,
    words: set[int],
) -> Optimizer:
    """trained: part -> its parameters. rates: part -> learning rate. decay: weight decay, of matrices alone.

    kind: "adamw", or "muon", which steps on all that `is_hidden` at rates that mean what they mean to AdamW.
    """
    if kind == "adamw":
        return AdamW(_groups(trained, rates, decay, lambda p: True), betas=BETAS, eps=1e-8)
    hidden = _groups(trained, rates, decay, lambda p: is_hidden(p, words))
    rest = _groups(trained, rates, decay, lambda p: not is_hidden(p, words))
    parts: list[Optimizer] = []
    if hidden:
        parts.append(Muon(hidden))
    if rest:
        parts.append(AdamW(rest, betas=BETAS, eps=1e-8))
    return Together(parts)


def words_of(model: Any) -> set[int]:
    """The ids of the parameters that are words: the language model's table of embeddings, and of its output."""
    tables = (model.model.language_model.get_input_embeddings(), model.get_output_embeddings())
    return {id(p) for table in tables for p in table.parameters()}


def is_hidden(p: nn.Parameter, words: set[int]) -> bool:
    """Whether Muon steps on it: matrices, both sides longer than 1, that are no `words` (by id)."""
    return p.ndim == 2 and min(p.shape) > 1 and id(p) not in words


def _groups(
    trained: Mapping[str, Sequence[nn.Parameter]], rates: Mapping[str, float], decay: float,
    wanted: Callable[[nn.Parameter], bool],
) -> Groups:  # fmt: skip
    """One group for the matrices of every part and one for its vectors, which do not decay."""
    groups = []
    for part, parameters in trained.items():
        chosen = [p for p in parameters if wanted(p)]
        for share, some in ((decay, [p for p in chosen if p.ndim > 1]), (0.0, [p for p in chosen if p.ndim <= 1])):
            if some:
                groups.append({"params": some, "lr": rates[part], "weight_decay": share, "part": part})
    return groups


class Together(Optimizer):
    """Several optimizers as one: their groups in one list, so that one schedule moves the rates of all."""

    def __init__(self, parts: Sequence[Optimizer]) -> None:
        self.parts = list(parts)
        super().__init__([group for part in self.parts for group in part.param_groups], {})
        self._gather()

    def _gather(self) -> None:
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if closure is not None:
            raise ValueError("several optimizers cannot share a closure")
        for part in self.parts:
            part.step()

    def state_dict(self) -> dict[str, Any]:
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self._gather()
