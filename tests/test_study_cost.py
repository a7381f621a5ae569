"""What a grid costs before it starts: against the plan of each row alone."""

import io
import json
from dataclasses import replace
from functools import partial

import pytest
from rich.console import Console

from commvlm.app.answer_planning import LAYER, Load, Reader, answering_hours
from commvlm.app.planning import Planner, Text, machine
from commvlm.cli import main
from commvlm.microworld.writer import write_world
from commvlm.model import build_config
from commvlm.study.cost import grid_cost
from commvlm.study.experiments import rows_of
from commvlm.study.runs import Places, Run, runs_of
from commvlm.study.settings import load_scale
from commvlm.study.study import asked, chosen, grid_table, planned
from commvlm.train.assemble import model_settings
from commvlm.train.recipe import load_recipe


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("cost") / "world", train=8, test=4)


def last_stage(run: Run) -> Run:
    """A run that has no other: half as many steps to be counted."""
    train = run.recipe.train
    return replace(run, recipe=replace(run.recipe, train=replace(train, stages=train.stages[-1:])))


@pytest.mark.slow
def test_every_row_costs_what_its_own_plan_says(world, tmp_path):
    scale = replace(load_scale("micro"), seeds=2)
    rows = [row for row in rows_of(scale, ["table-1", "peers"]) if row.name in ("clip last", "COMM", "peer mmvp-imof")]
    runs = [last_stage(run) for run in runs_of(scale, rows, data=str(world))]
    on = machine("h100", 1)
    done = Places(tmp_path).result(runs[0].key)
    done.parent.mkdir(parents=True)
    done.write_text("{}")
    cost = grid_cost(runs, Places(tmp_path), on, load=Load(900, 30))
    assert {name: row.left for name, row in cost.rows.items()} == {"clip last": 1, "COMM": 2, "peer mmvp-imof": 2}
    cheaper = next(
        run.recipe for run in runs if run.row.name == "clip last"
    )  # the others were planned, this was derived
    planner = Planner(cheaper, on)
    alone = sum(planner.plan(stage).hours for stage in cheaper.train.stages)
    assert cost.rows["clip last"].training == pytest.approx(alone, rel=0.02)
    assert cost.rows["COMM"].training > 1.02 * cost.rows["clip last"].training
    assert cost.rows["peer mmvp-imof"].answering > cost.rows["COMM"].answering  # twice the visual tokens
    assert cost.hours == pytest.approx(sum((row.training + row.answering) * row.left for row in cost.rows.values()))


def test_answering_costs_what_reading_and_growing_do():
    """A Llama of 7B on an H100, by hand: 12 questions about 4 images of 576 tokens, four at once, answers of 20 tokens."""
    reader, on = Reader(body=6_476_000_000, head=131_000_000, layers=32), machine("h100", 1, 0.5)
    cost = partial(answering_hours, reader, tokens=576, visual=4e11, batch=4, text=Text(front=40, words=60, answer=20))
    read = 4 * (4e11 + 2 * 6.476e9 * 616) + 12 * 2 * 6.476e9 * 40
    step = 32 * LAYER  # longer than to read the weights (13.2 GB at 3.35 TB/s: 4 ms) or to compute (53 GFLOPs: 0.1 ms)
    assert cost(Load(12, 4), on, half=True) == pytest.approx((read / (0.5 * 989.4e12) + 3 * 20 * step) / 3600)
    slow = replace(on, bandwidth=3e11)
    step = 4 * 6.607e9 / 3e11  # in fp32 reading them is what takes longest
    assert cost(Load(12, 4), slow, half=False) == pytest.approx((read / (0.5 * 989.4e12) + 3 * 20 * step) / 3600)
    assert cost(Load(12, 4), replace(on, count=2), half=True) == pytest.approx(cost(Load(12, 4), on, half=True) / 2)


def test_what_reads_the_answers_is_counted_as_its_shape_says():
    """Llama's formula: four attention matrices, three of the MLP, two norms a block, and the last norm."""
    with_it = build_config(**model_settings(load_recipe("comm-7b").model))
    found = Reader.of(with_it)
    h, i = 4096, 11008
    vocabulary = with_it.text_config.vocab_size
    assert (found.body, found.head) == (32 * (4 * h * h + 3 * h * i + 2 * h) + h, h * vocabulary)
    assert found.layers == 32


def test_a_scale_on_real_data_is_priced_before_anything_starts(world, tmp_path, capsys):
    text = "name: priced\nrecipe: micro\nencoders:\n  - {name: clip, checkpoint: 'micro:clip'}\n"
    text += "  - {name: mae, checkpoint: 'micro:mae'}\npair: [clip, mae]\nlayers: [4, 8]\nseeds: 2\n"
    (tmp_path / "priced.yaml").write_text(text)
    words = [
        "study",
        "figure-2",
        "--scale",
        str(tmp_path / "priced.yaml"),
        "--data",
        str(world),
        "--list",
        "--gpu",
        "l40s",
    ]
    assert main([*words, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "8 runs, " in said
    assert "1 x l40s" in said
    assert "assumed: 40%" in said
    assert not (tmp_path / "out" / "runs").exists()
    assert main([*words[:-1], "l4s0", "--out", str(tmp_path / "out")]) == 2
    assert "l40s" in capsys.readouterr().err


def test_what_is_left_of_a_micro_grid_is_reckoned_from_what_is_done(tmp_path):
    scale = tmp_path / "small.yaml"
    scale.write_text(
        "name: small\nrecipe: micro\nencoders:\n  - {name: clip, checkpoint: 'micro:clip'}\n"
        "  - {name: mae, checkpoint: 'micro:mae'}\n"
        "pair: [clip, mae]\nlayers: [4, 8]\nseeds: 2\nworld: {train: 8, test: 4}\n"
    )
    wanted = asked(["figure-2"], scale=str(scale), out=tmp_path / "out", seeds=None, data=None)
    _, runs = planned(wanted)
    places = Places(wanted.root)
    for key, seconds in ((runs[0].key, 100.0), (runs[1].key, 300.0)):
        places.result(key).parent.mkdir(parents=True, exist_ok=True)
        places.result(key).write_text(json.dumps({"seconds": {"train": seconds - 10, "evaluate": 10.0}}))
    table = partial(grid_table, wanted, console=Console(file=io.StringIO()))
    assert table(runs).endswith("4 rows, 8 runs, 2 of them done; 200 s a run, so 0.3 core-hours are left")
    assert table(chosen(runs, ["mae*", "clip 8"])).startswith("clip 8\nmae 4\nmae 8\n3 rows, 6 runs, ")
    with pytest.raises(ValueError, match=r"--rows: no row is called 'clpi 4'; did you mean 'clip 4'\?"):
        chosen(runs, ["mae*", "clpi 4"])


def test_rows_are_chosen_for_training_alone(tmp_path, capsys):
    words = ["study", "all", "--scale", "micro", "--out", str(tmp_path), "--rows", "COMM", "--report"]
    assert main(words) == 2
    assert "--rows chooses what is trained or listed" in capsys.readouterr().err
