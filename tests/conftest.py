"""What several test files share: a small micro world, and recipes on it that train in seconds."""

from __future__ import annotations

import gc
import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import settings

from commvlm.cli import main
from commvlm.microworld.writer import write_world
from commvlm.train.recipe import Recipe, load_recipe

# Before anything imports the hub's client: a name that is not at hand is answered at once, whoever runs the tests and how.
os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")

# One thread, as `make test` has it: a forked process could not use a pool that this one has started.
torch.set_num_threads(1)
# A machine that does something else for a while is no fault.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

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


@pytest.fixture(scope="module")
def imported() -> None:
    """The Trainer collects garbage after every stage; what the imports left need not be looked through each time."""
    gc.collect()
    gc.freeze()


def called(argv: list[str]) -> int:
    """The exit code, whether it is returned or raised."""
    try:
        return main(argv)
    except SystemExit as left:
        return int(left.code or 0)


def said(stderr: str) -> list[str]:
    """The lines that are no progress bars."""
    return [line for line in re.split(r"[\r\n]+", stderr) if line.strip() and not re.search(r"\d+%\|", line)]


@pytest.fixture
def refused(capfd) -> Callable[..., str]:
    """refused(*argv) -> the one line on stderr of a command that must end with exit code 2."""

    def run(*argv: str | Path) -> str:
        capfd.readouterr()
        assert called([str(word) for word in argv]) == 2
        lines = said(capfd.readouterr().err)
        assert len(lines) == 1, lines
        assert lines[0].startswith("commvlm: error: ")
        assert len(lines[0]) < 600
        return lines[0].removeprefix("commvlm: error: ")

    return run


@pytest.fixture(scope="session")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run, which tests leave as it is."""
    out = tmp_path_factory.mktemp("cli") / "run"
    stages = [{"name": "only", "steps": 1, "batch": 1, "trains": {"project": 1e-3}}]
    options = small_options(world, "--evaluate.max_new_tokens", "4", stages=stages)
    assert main(["train", "micro", "--out", str(out), *options]) == 0
    return out


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """One's own copy of it."""
    return shutil.copytree(finished, tmp_path / "run")


@pytest.fixture
def figures(capsys) -> Callable[..., dict[str, Any]]:
    """figures("pope", "--references", ...) -> the JSON of `commvlm score`."""

    def run(*argv: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        assert main(["score", *map(str, argv), "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


@pytest.fixture
def refused_score(capsys) -> Callable[..., str]:
    """refused_score("pope", "--references", ...) -> the one line of a `commvlm score` that ends with exit code 2."""

    def run(*argv: str | Path) -> str:
        capsys.readouterr()
        assert main(["score", *map(str, argv)]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    return run
