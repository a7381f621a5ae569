"""The study's scales and rows: what can be built is, what cannot is named, what is the same is one run."""

import json
import re
import shutil
import textwrap
from dataclasses import fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from transformers import Dinov2Config

from commvlm.microworld.writer import write_world
from commvlm.model.checkpoints import find_checkpoint, published_facts
from commvlm.model.spec import build_config
from commvlm.study.claims import claims_of
from commvlm.study.controls import scaled
from commvlm.study.experiments import EXPERIMENTS, experiments_named, rows_of
from commvlm.study.rows import Row, encoder, layers_for
from commvlm.study.runs import FORMATS, runs_of, weights_hash
from commvlm.study.settings import Scale, World, load_scale, shipped_scales
from commvlm.study.study import asked, chosen, planned
from commvlm.train.assemble import located, model_settings


def test_every_row_of_every_experiment_can_be_built(scale, world):
    rows = rows_of(scale, ["all"])
    scale = replace(scale, seeds=2)
    assert len({row.name for row in rows}) == len(rows)
    assert {row.name for e in EXPERIMENTS.values() for row in e.rows(scale)} == {row.name for row in rows}
    runs = runs_of(scale, rows, data=str(world))
    assert len(runs) == len(rows) * scale.seeds
    assert [run.seed for run in runs] == sorted(run.seed for run in runs)


def test_one_model_said_in_two_ways_is_one_run(scale, world, tmp_path):
    clip = scale.encoder("clip")
    rows = [Row("a", scale.model(encoder(clip, -1))), Row("b", scale.model(encoder(clip, 8)))]
    rows += [Row("c", scale.model(encoder(clip, 8, name="other"))), Row("d", scale.model(encoder(clip, 7)))]
    rows += [Row("e", scale.model(encoder(clip, 8)), pixels="grey")]
    rows += [Row("f", scale.model(encoder(clip, 8, weights="random")))]
    keys = [run.key for run in runs_of(replace(scale, seeds=1), rows, data=str(world))]
    assert keys[0] == keys[1] == keys[2]
    assert len(set(keys)) == 4
    moved = shutil.copytree(Path(located("micro:clip")), tmp_path / "moved")
    elsewhere = Row("g", scale.model(replace(encoder(clip, 8), checkpoint=str(moved))))
    again = lambda: runs_of(replace(scale, seeds=1), [elsewhere], data=str(world))[0].key  # noqa: E731
    assert again() == keys[0]
    (moved / "card.json").write_text("{}")
    weights_hash.cache_clear()
    assert again() == keys[0]  # what is told about the weights is no part of them
    with (moved / "model.safetensors").open("ab") as file:
        file.write(b" ")
    weights_hash.cache_clear()
    assert again() != keys[0]


def test_some_rows_have_more_seeds_by_whichever_of_their_names(scale, world):
    clip = scale.encoder("clip")
    rows = [Row("a", scale.model(encoder(clip, -1))), Row("b", scale.model(encoder(clip, 8)))]
    rows += [Row("c", scale.model(encoder(clip, 7))), Row("d", scale.model(encoder(clip, 8)), pixels="grey")]
    runs = runs_of(replace(scale, seeds=1, more_seeds={"[bx]": 3}), rows, data=str(world))
    assert [f"{run.row.name}{run.seed}" for run in runs] == ["a0", "b0", "c0", "d0", "a1", "b1", "a2", "b2"]


def test_more_seeds_are_in_place_of_none_that_are_asked_for(tmp_path):
    (tmp_path / "mine.yaml").write_text(shipped_scales()["micro"].read_text() + 'more_seeds: {"COM": 5}\n')
    scale = asked(["table-1"], scale=str(tmp_path / "mine.yaml"), out=tmp_path / "out")
    with pytest.raises(ValueError, match="more_seeds: no row is called 'COM'; did you mean 'COMM'"):
        planned(replace(scale, scale=replace(scale.scale, world=World(2, 1))))
    assert asked(["table-1"], scale=str(tmp_path / "mine.yaml"), out=None, seeds=2).scale.more_seeds == {}


def test_other_data_are_another_run(scale, tmp_path):
    row = rows_of(scale, ["figure-2"])[:1]
    one, other = (write_world(tmp_path / str(size), train=size, test=2) for size in (4, 5))
    keys = [runs_of(replace(scale, seeds=1), row, data=str(folder))[0].key for folder in (one, other)]
    assert keys[0] != keys[1]


def test_a_merge_that_is_trained_otherwise_now_is_another_run(scale, world, monkeypatch):
    clip = scale.encoder("clip")
    rows = [Row(m, scale.model(encoder(clip, "all", m))) for m in ("mean", "conv-layerscale")]
    rows.append(Row("said at length", scale.model(encoder(clip, "all", {"kind": "conv-layerscale", "kernel": 5}))))
    of = lambda: [run.key for run in runs_of(replace(scale, seeds=1), rows, data=str(world))]  # noqa: E731
    before = of()
    monkeypatch.setitem(FORMATS, "conv-layerscale", 99)
    assert [old == new for old, new in zip(before, of(), strict=True)] == [True, False, False]


def test_rows_that_cannot_be_run_are_all_named_before_anything_starts(scale, world):
    bad = [Row("too deep", scale.model(encoder(scale.encoder("clip"), 9)))]
    bad += [Row(name, scale.model(encoder(scale.encoder("clip"), "all", "mode"))) for name in ("odd", "odd too")]
    with pytest.raises(ValueError, match=r"3 of 3 rows cannot be run: too deep: .*9.*; odd, odd too: .*mode"):
        runs_of(scale, bad, data=str(world))


@pytest.mark.parametrize(
    ("place", "change", "named", "spared", "reason"),
    [
        (0, {"merged": "3-99"}, ["COMM", "first encoder, larger image"], "peer", "layer 99 is beyond the last one"),
        (
            0,
            {"image_size": 33},
            ["peer shikra", "first encoder, larger image"],
            "mae",
            "image_size 33 is not a multiple",
        ),
        (1, {"checkpoint": "/nowhere"}, ["COMM", "peer mmvp-imof"], "peer llava-1.5", "'/nowhere' is not a folder"),
        (2, {"checkpoint": "/nowhere"}, ["deit 2", "deit 6", "deit 8"], "COMM", "'/nowhere' is not a folder"),
        (0, {"last": -99}, ["clip -99", "pair, no merging"], "COMM", "layer -99 is beyond the last one"),
    ],
)
def test_rows_that_follow_from_one_that_cannot_be_built_are_named_with_it(
    tmp_path, place, change, named, spared, reason
):
    """And no data are made before."""
    said = yaml.safe_load(shipped_scales()["micro"].read_text())
    said["encoders"][place] |= change
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(said))
    wanted = asked(["all"], scale=str(tmp_path / "mine.yaml"), out=tmp_path / "out")
    with pytest.raises(ValueError, match=rf"^\d+ of 4\d rows cannot be run: .*: .*{reason}") as error:
        planned(wanted)
    rows = str(error.value).partition("cannot be run: ")[2].partition(": ")[0]
    assert [name for name in named if name not in rows] == []
    assert spared not in rows
    assert not (tmp_path / "out").exists()


def test_what_is_wrong_with_a_merged_branch_stops_no_experiment_that_has_none(tmp_path):
    said = yaml.safe_load(shipped_scales()["micro"].read_text()) | {"world": {"train": 2, "test": 1}}
    said["encoders"][0]["merged"] = "3-99"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(said))
    assert planned(asked(["figure-2"], scale=str(tmp_path / "mine.yaml"), out=tmp_path / "out", seeds=1))[1]


def test_an_unknown_experiment_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no experiment 'figure2'; did you mean figure-2"):
        experiments_named(["figure2"])


def test_peers_keep_their_shape_on_other_encoders(scale):
    rows = {row.name: row for row in EXPERIMENTS["peers"].rows(scale)}
    config = build_config(**model_settings(rows["peer prismatic-dinosiglip"].model)).vision_config
    assert [branch["name"] for branch in config.branches] == [scale.pair[1], scale.pair[0]]  # its DINOv2 first
    assert [branch["layers"] for branch in config.branches] == [[7], [7]]  # the second last, as there
    sci = build_config(**model_settings(rows["peer dense-connector-sci"].model)).vision_config
    assert sci.branches[0]["layers"] == [3, 5, 7]  # 8, 16 and 23 of 24


def test_layers_keep_their_relative_depth_or_their_distance_from_the_end():
    assert scaled([8, 16, 24], 24, 8) == (3, 5, 8)
    assert scaled([22, 23, 24], 24, 8) == (6, 7, 8)
    assert scaled(range(1, 25), 24, 8) == tuple(range(1, 9))


def test_an_encoder_more_is_one_line_and_shows_in_every_sweep(tmp_path):
    said = yaml.safe_load(shipped_scales()["micro"].read_text())
    said["encoders"].append({"name": "third", "checkpoint": "micro:clip", "weights": "random"})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(said))
    scale = load_scale(str(tmp_path / "mine.yaml"))
    names = {name: {row.name for row in rows_of(scale, [name])} for name in ("figure-2", "figure-3", "table-7")}
    assert {f"third {layer}" for layer in said["layers"]} <= names["figure-2"]
    assert {"third last", "third mean half", "third mean all", "third lln-layerscale all"} <= names["figure-3"]
    assert {"third 6", "third 8"} <= names["table-7"]
    assert not any(name.startswith("deit") for name in names["figure-3"])  # its line says merges: false
    claims = [claim for claim in claims_of(scale) if claim.finding == "E"]
    assert {claim.task for claim in claims} == {*said.get("tasks", scale.tasks), "rec mean_iou"}
    assert {frozenset(claim.terms) for claim in claims} == {frozenset({"third 8", f"{one} last"}) for one in scale.pair}
    assert not any(claim.finding == "E" for claim in claims_of(load_scale("micro")))


def test_an_encoder_of_another_depth_is_read_at_the_same_share_of_it(tmp_path):
    """12 blocks as DINOv2's small one has, 40 as its giant, where the scale's layers are those of a CLIP of 24."""
    said = yaml.safe_load(shipped_scales()["analysis"].read_text())
    for name, depth in (("small", 12), ("giant", 40)):
        Dinov2Config(num_hidden_layers=depth).save_pretrained(tmp_path / name)
        said["encoders"].append({"name": name, "checkpoint": str(tmp_path / name), "image_size": 336})
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(said))
    scale = load_scale(str(tmp_path / "mine.yaml"))
    layers = lambda name: layers_for(scale, scale.encoder(name), [4, 8, 12, 16, 18, 20, 22, 24])  # noqa: E731
    assert layers("clip") == layers("mae") == [4, 8, 12, 16, 18, 20, 22, 24]
    assert layers("small") == [2, 4, 6, 8, 9, 10, 11, 12]
    assert layers("giant") == [7, 13, 20, 27, 30, 33, 37, 40]
    rows = {row.name: row for row in rows_of(scale, ["figure-2", "table-7"])}
    for name, depth in (("small", 12), ("giant", 40)):
        build_config(**model_settings(rows[f"{name} {depth}"].model))
    assert {"small 10", "small 11", "giant 33", "giant 37", "mae 20", "mae 22"} <= set(rows)
    assert {"small 11", "giant 37"} <= {name for claim in claims_of(scale) for name in claim.terms}


@pytest.mark.parametrize("blocks", [0, "many"])
def test_an_encoder_without_depth_is_told_in_one_line(tmp_path, blocks):
    said = yaml.safe_load(shipped_scales()["micro"].read_text())
    shutil.copytree(Path(located("micro:clip")), tmp_path / "odd")
    config = json.loads((tmp_path / "odd" / "config.json").read_text())
    half = config.get("vision_config", config)
    half["num_hidden_layers"] = blocks
    (tmp_path / "odd" / "config.json").write_text(json.dumps(config))
    said["encoders"][0]["checkpoint"] = str(tmp_path / "odd")
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(ValueError, match=r"odd(' has no usable config.json|.*the encoder has 0 layers)") as error:
        build_config(**model_settings(rows_of(load_scale(str(tmp_path / "mine.yaml")), ["figure-2"])[0].model))
    assert "\n" not in str(error.value)


def test_claims_are_about_rows_that_experiments_have(tmp_path):
    """Wherever Table 7 reads the others, and whatever layers are listed; each row once in its table, and to be chosen."""
    said = yaml.safe_load(shipped_scales()["micro"].read_text()) | {"others": [7], "ratios": [4, 16]}
    said["encoders"][1]["merged"] = [5, 6, 7]
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(said))
    scale = replace(load_scale(str(tmp_path / "mine.yaml")), seeds=1)
    names = [row.name for row in rows_of(scale, ["all"])]
    assert {name for claim in claims_of(scale) for name in claim.terms} <= set(names)
    table = [row.name for row in EXPERIMENTS["table-6"].rows(scale)]
    assert len(set(table)) == len(table)
    run = SimpleNamespace(row=SimpleNamespace(name="mae lln-layerscale [5, 6, 7]"))
    assert run.row.name in names
    assert chosen([run], [run.row.name]) == chosen([run], ["mae lln*"]) == [run]  # type: ignore[list-item]


def test_a_study_starts_from_no_whole_model(tmp_path):
    said = yaml.safe_load(shipped_scales()["micro"].read_text())
    said["options"]["train.start"] = "runs/comm"
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump(said))
    with pytest.raises(ValueError, match=r"train.start gives one model's weights"):
        rows_of(load_scale(str(tmp_path / "mine.yaml")), ["figure-2"])


def test_the_scale_of_the_docs_is_one(tmp_path):
    page = (Path(__file__).parents[1] / "docs" / "study.md").read_text()
    said = textwrap.dedent(re.search(r"\n    name: mine\n(?:    .*\n)+", page).group())
    (tmp_path / "mine.yaml").write_text(said.replace("my-recipe.yaml", "comm-7b"))
    scale = load_scale(str(tmp_path / "mine.yaml"))
    assert [row.name for row in EXPERIMENTS["table-1"].rows(scale)][-1] == "COMM"
    keys = re.findall(r"^\| ((?:`\w+`(?:, )?)+) \|", page, flags=re.MULTILINE)
    named = {key for cell in keys for key in re.findall(r"\w+", cell)} | set(yaml.safe_load(said))
    assert {field.name for field in fields(Scale)} <= named


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeeds": 3}, r"unknown key 'seeeds'.*seeds"),
        ({"pair": ["clip", "clap"]}, r"pair names 'clap', which is none of"),
        ({"seeds": 0}, r"seeds is 0"),
        ({"layers": []}, r"layers is empty"),
        ({"layers": [-2, 8]}, r"layers has -2: block outputs are counted from 1"),
        ({"others": [0]}, r"others has 0: block outputs are counted from 1"),
        ({"depths": []}, r"depths is empty"),
        ({"tasks": ["recc"]}, r"no task 'recc'; did you mean 'rec'"),
        ({"seeds": "many"}, r"seeds"),
        ({"more_seeds": {"COMM": 3}}, r"more_seeds.COMM is 3, every row has 3 seeds"),
        ({"tasks": []}, r"tasks is empty"),
        ({"tasks": ["rec", "mme"]}, r"mme, whose total is no mean"),
        ({"world": {"train": 0, "test": 5}}, r"world needs a training and a test scene"),
        ({"features": "fp16"}, r"features is 'fp16', it must be fp32 or bf16 or int8"),
    ],
)
def test_a_scale_that_does_not_fit_is_refused(tmp_path, change, message):
    said = yaml.safe_load(shipped_scales()["micro"].read_text())
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({**said, **change}))
    with pytest.raises(ValueError, match=message):
        load_scale(str(tmp_path / "mine.yaml"))


def test_data_that_a_scale_would_not_read_are_refused(tmp_path):
    with pytest.raises(ValueError, match="quick makes its own micro world and reads no --data"):
        asked(["figure-2"], scale="quick", out=None, seeds=None, data=tmp_path)
    with pytest.raises(ValueError, match="quick makes its own micro world and counts no hours of a --gpu"):
        asked(["figure-2"], scale="quick", out=None, seeds=None, data=None, gpu="h200")


def test_an_unknown_scale_is_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"no scale 'mikro'; did you mean 'micro'"):
        load_scale("mikro")


def test_weights_that_were_fetched_meanwhile_are_the_same_run(world, tmp_path, monkeypatch):
    """The hub's own config files say more than the shipped facts: architectures, dtype, the library's version."""
    scale = replace(load_scale("analysis"), seeds=1)
    model = scale.model(encoder(replace(scale.encoder("dinov2"), align="identity"), 20))
    key = lambda: runs_of(replace(scale, tasks=["pope"]), [Row("a", model)], data=str(world))[0].key  # noqa: E731
    monkeypatch.setattr("commvlm.study.runs._paths", lambda source, root: [])
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    before = key()
    for name, more in {
        "facebook/dinov2-large": {"architectures": ["Dinov2Model"], "torch_dtype": "float32"},
        "lmsys/vicuna-7b-v1.5": {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", "use_cache": True},
    }.items():
        folder = tmp_path / f"models--{name.replace('/', '--')}"
        (folder / "refs").mkdir(parents=True)
        (folder / "refs" / "main").write_text("abc")
        (folder / "snapshots" / "abc").mkdir(parents=True)
        said = {**published_facts()[name]["config"], **more, "transformers_version": "4.31.0"}
        (folder / "snapshots" / "abc" / "config.json").write_text(json.dumps(said))
        assert find_checkpoint(name).source == "hub cache"
    assert key() == before


def test_table_7_has_the_layers_that_a_scale_names():
    scale = load_scale("analysis")
    names = [row.name for row in EXPERIMENTS["table-7"].rows(scale)]
    assert names[-4:] == ["mae 20", "mae 22", "deit 20", "deit 22"]
    names = [row.name for row in EXPERIMENTS["table-7"].rows(replace(scale, others=None))]
    assert names[-4:] == ["mae 22", "mae 24", "deit 22", "deit 24"]


def test_a_recipe_beside_its_scale_is_found_from_anywhere(tmp_path, monkeypatch):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "mine.yaml").write_text("extends: micro\nname: mine\n")
    text = shipped_scales()["micro"].read_text()
    (tmp_path / "own" / "scale.yaml").write_text(text.replace("recipe: micro", "recipe: mine.yaml"))
    monkeypatch.chdir(tmp_path)
    assert load_scale("own/scale.yaml").base.name == "mine"
