"""What several test files share: a small micro world, and recipes on it that train in seconds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from commvlm.microworld.writer import write_world
from commvlm.train.recipe import Recipe, load_recipe

# Before anything imports the hub's client: a name that is not at hand is answered at once, whoever runs the tests and how.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

ALL = {"merge": 1e-3, "align": 1e-3, "project": 1e-3, "language_model": 5e-4}
STAGES = [
    {"name": "align", "steps": 6, "batch": 2, "trains": ALL},
    {"name": "instruct", "steps": 6, "batch": 2, "trains": {"merge": 5e-4, "project": 5e-4, "language_model": 2e-4}},
]


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 12 test scenes. Tests leave it as it is."""
    return write_world(tmp_path_factory.mktemp("world") / "world", train=40, test=12)


def small_options(world: Path, *options: str, stages: list[dict[str, Any]] | None = None) -> list[str]:
    """The shipped micro recipe's options for two layers of each encoder, few steps, a checkpoint at step 3."""
    return [
        "--data.root", str(world),
        "--data.group", "2",
        "--model.encoders.clip.layers", "[1, 2]",
        "--model.encoders.dinov2.layers", "[1, 2]",
        "--train.stages", json.dumps(STAGES if stages is None else stages),
        "--train.visual_scale", "1.5",
        "--train.save_every", "3",
        "--train.log_every", "2",
        *options,
    ]  # fmt: skip


@pytest.fixture(scope="session")
def small(world: Path) -> Callable[..., Recipe]:
    """small(*options, stages=...) -> the recipe of `small_options`."""
    return lambda *options, stages=None: load_recipe("micro", small_options(world, *options, stages=stages))


@pytest.fixture
def scale():
    """The study's micro scale."""
    from commvlm.study.settings import load_scale

    return load_scale("micro")


@pytest.fixture
def few(scale, world):
    """Four runs of the study's micro scale."""
    from dataclasses import replace

    from commvlm.study.experiments import rows_of
    from commvlm.study.runs import runs_of

    return runs_of(replace(scale, seeds=1), rows_of(scale, ["figure-2"])[:4], data=str(world))
