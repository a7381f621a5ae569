"""What a grid on real checkpoints and data needs, had and read once before its first run: a fault there is to cost minutes,
not days."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.console import Console

from ..train.assemble import assemble
from ..train.checking import prepare_recipe
from .runs import Run


def have_checkpoints(runs: Sequence[Run], console: Console) -> None:
    """Builds models of the runs until every checkpoint was read once; what is not there is fetched.

    Raises CheckpointError for the first whose weights or tokenizer are not to be had.
    """
    had: set[str] = set()
    for run in sorted(runs, key=lambda run: -len(run.recipe.model.encoders)):
        model = run.recipe.model
        wanted = {branch.checkpoint for branch in model.encoders if branch.weights == "checkpoint"}
        wanted.add(model.language_model)
        if not wanted <= had:
            with console.status(f"reading {', '.join(sorted(wanted - had))}"):
                assemble(model, dtype=torch.bfloat16)
            had |= wanted


def have_stores(runs: Sequence[Run], console: Console) -> None:
    """`commvlm data prepare` of the runs' data, unless they are prepared: or every process of every run reads them whole."""
    for recipe in {run.recipe.data.root: run.recipe for run in runs}.values():
        try:
            prepare_recipe(recipe)
        except OSError as error:
            said = f"the data cannot be prepared ({error}), so every process of every run reads them whole"
            console.print(said, highlight=False, soft_wrap=True, markup=False)
