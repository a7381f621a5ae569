"""Recipes: what a YAML file and the command line give, and what they answer to a slip."""

from __future__ import annotations

import dataclasses
import json
from importlib import resources
from pathlib import Path

import pytest
import yaml

from commvlm.cli import main
from commvlm.data.readers import READERS
from commvlm.evaluate.tasks import TASKS
from commvlm.train.keys import RecipeError
from commvlm.train.recipe import Recipe, as_yaml, find_recipe, load_recipe
from commvlm.train.run import check

RECIPES = Path(str(resources.files("commvlm") / "recipes"))
SHIPPED = sorted(path.relative_to(RECIPES).as_posix().removesuffix(".yaml") for path in RECIPES.rglob("*.yaml"))

TEXT = """\
name: mine
model:
  encoders:
    - {name: clip, checkpoint: "micro:clip", layers: "5-8"}
    - {name: dino, checkpoint: "micro:dinov2", merge: mean, image_size: 64}
  language_model: "micro:lm"
data:
  root: pictures
  sources:
    - {name: rec, format: refer-jsonl, images: images, files: {annotations: rec.jsonl}, options: {task: rec}}
train:
  seed: 7
  stages:
    - name: first
      steps: 10
      batch: 4
      trains: {merge: 2e-3, project: 1.0e-3}
    - {name: second, steps: 5, batch: 2, trains: {language_model: 1e-4}}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(TEXT)
    return path


def refused(path: Path | str, *options: str) -> str:
    """The error's text, which must be one line."""
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, options)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


def test_a_file_fills_the_dataclasses_and_defaults(file):
    recipe = load_recipe(file)
    assert recipe.name == "mine"
    assert [(e.name, e.layers, e.merge) for e in recipe.model.encoders] == [
        ("clip", "5-8", "lln-layerscale"),
        ("dino", "all", "mean"),
    ]
    assert (recipe.model.encoders[0].image_size, recipe.model.encoders[1].image_size) == (None, 64)
    assert recipe.train.stages[0].trains == {"merge": 0.002, "project": 0.001}  # YAML alone reads 2e-3 as a text
    assert (recipe.train.seed, recipe.train.precision, recipe.data.group) == (7, "bf16", 1)
    assert recipe.data.sources[0].files == {"annotations": "rec.jsonl"}
    assert recipe.evaluate.sources == []
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.name = "other"  # type: ignore[misc]


def test_paths_are_the_files_own_or_the_command_lines(file, tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_recipe(file).data.root == str(tmp_path / "pictures")
    assert load_recipe(file, ["--data.root", "pictures"]).data.root == str(tmp_path / "elsewhere" / "pictures")
    assert load_recipe(file, ["--data.root", "/there"]).data.root == "/there"


@pytest.mark.parametrize(
    ("options", "value"),
    [
        (["--train.seed", "3"], lambda r: r.train.seed == 3),
        (["--train.seed=3", "--name=12"], lambda r: (r.train.seed, r.name) == (3, "12")),
        (["--train.seed", "3", "--train.seed", "4"], lambda r: r.train.seed == 4),
        (["--train.max_length", "null"], lambda r: r.train.max_length is None),
        (["--train.stages.first.steps", "99"], lambda r: [s.steps for s in r.train.stages] == [99, 5]),
        (["--train.stages.second.trains.merge", "3e-4"],
         lambda r: r.train.stages[1].trains == {"language_model": 1e-4, "merge": 3e-4}),
        (["--model.encoders.dino.layers", "[1, -1]"], lambda r: r.model.encoders[1].layers == [1, -1]),
        (["--model.encoders.dino.layers", "19-24"], lambda r: r.model.encoders[1].layers == "19-24"),
        (["--model.encoders.clip.layers", "-1"], lambda r: r.model.encoders[0].layers == -1),
        (["--model.encoders.clip.align", "{kind: mlp, ratio: 2}"],
         lambda r: r.model.encoders[0].align == {"kind": "mlp", "ratio": 2}),
        (["--model.encoders", json.dumps([{"name": "a", "checkpoint": "b"}])],
         lambda r: [(e.name, e.checkpoint) for e in r.model.encoders] == [("a", "b")]),
        (["--data.sources.rec.options.task", "reg"], lambda r: r.data.sources[0].options == {"task": "reg"}),
        (["--evaluate.batch", "2"], lambda r: r.evaluate.batch == 2),
    ],
)  # fmt: skip
def test_any_key_is_an_option_items_of_lists_by_name(file, options, value):
    before = file.read_text()
    assert value(load_recipe(file, options))
    assert file.read_text() == before
    assert not value(load_recipe(file))


@pytest.mark.parametrize("name", [*SHIPPED, None])
def test_written_out_and_read_it_is_the_same(name, file, tmp_path):
    options = [] if name else ["--train.stages.first.trains.align", "1e-5", "--data.pixels", "grey"]
    recipe = load_recipe(name or file, options)
    written = tmp_path / "deep" / "recipe.yaml"
    written.parent.mkdir()
    written.write_text(as_yaml(recipe))
    assert load_recipe(written) == recipe
    assert set(yaml.safe_load(written.read_text())["train"]) == {f.name for f in dataclasses.fields(recipe.train)}


UNKNOWN = [
    ("modle: {}\n", "'modle'", "'model'"),
    ("train: {sed: 1}\n", "'train.sed'", "'seed'"),
    ("data: {sources: [{name: a, formt: pope}]}\n", "'data.sources[0].formt'", "'format'"),
    ("model: {encoders: [{name: a}, {name: b, layer: 3}]}\n", "'model.encoders[1].layer'", "'layers'"),
    ("evaluate: {sources: [{name: a, imges: x}]}\n", "'evaluate.sources[0].imges'", "'images'"),
    ("train: {stages: [{name: a, step: 3}]}\n", "'train.stages[0].step'", "'steps'"),
]


@pytest.mark.parametrize(("text", "key", "nearest"), UNKNOWN)
def test_an_unknown_key_names_the_nearest_one(tmp_path, text, key, nearest):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert refused(path) == f"odd.yaml: unknown key {key}; did you mean {nearest}?"


def test_a_key_like_no_other_is_answered_with_all(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_text("zzzzzz: 1\n")
    assert refused(path).endswith("known: data, evaluate, model, name, train")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train.sed", "1"], "unknown option '--train.sed'; did you mean '--train.seed'?"),
        (["--trian.seed=1"], "unknown option '--trian.seed'; did you mean '--train.seed'?"),
        (["--seed", "1"], "unknown option '--seed'; did you mean '--train.seed'?"),
        (["--train.stages.first.stepz", "1"],
         "unknown option '--train.stages.first.stepz'; did you mean '--train.stages.first.steps'?"),
        (["--train.stages.frist.steps", "1"], "there is no 'frist'; did you mean 'first'?"),
        (["--train.stages.steps", "1"], "there is no 'steps'; did you mean 'first'?"),
        (["--train.stages", "[{stepz: 1}]"], "unknown key 'train.stages[0].stepz'; did you mean 'steps'?"),
        (["--train.seed.x", "1"], "unknown option '--train.seed.x'"),
        (["--qqqq", "1"], "unknown option '--qqqq'; known: name, model, data, train, evaluate"),
        (["--train.stages.first", "{}"], "names an item of a list"),
        (["--train.seed"], "option '--train.seed' has no value"),
        (["--train.seed", "--data.root", "x"], "option '--train.seed' has no value"),
        (["seed", "1"], "'seed' is no option"),
        (["--train.stages", "[1, "], "is not YAML"),
        (["--train.stages", "3"], "train.stages must be a list"),
        (["--train.seed", "three"], "train.seed: expected int. Got value: 'three'"),
        (["--train.precision", "fp16"], "train.precision: expected 'bf16' or 'fp32'. Got value: 'fp16'"),
        (["--data", "other.yaml"], "data must be a mapping"),
    ],
)  # fmt: skip
def test_a_slip_on_the_command_line_is_named_there(file, options, said):
    error = refused(file, *options)
    assert error.startswith("the command line: ")
    assert said in error


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("steps: 10", "steps: many", "train.stages[0].steps: expected int. Got value: 'many'"),
        ("steps: 10", "steps: 1.5", "steps: expected int. Got value: 1.5"),
        ("steps: 10", "steps: true", "steps: expected int. Got value: True"),
        ("seed: 7", "seed: [7]", "train.seed: expected int"),
        ("seed: 7", "seed: null", "train.seed: expected int. Got value: null"),
        ("seed: 7", "max_length: many", "train.max_length: expected int or null. Got value: 'many'"),
        (
            'layers: "5-8"',
            "layers: 1.5",
            "model.encoders[0].layers: expected int or str or list[int | str]. Got value: 1.5",
        ),
        ("merge: 2e-3", "merge: fast", "train.stages[0].trains: expected dict[str, float]. Got value: {"),
        ("name: mine", "name: 12", "name: expected str. Got value: 12"),
        (
            "files: {annotations: rec.jsonl}",
            "files: rec.jsonl",
            "data.sources[0].files: expected dict[str, str]. Got value: 'rec.jsonl'",
        ),
        ("      steps: 10\n", "", "train.stages[0].steps must be given"),
        ("name: mine\n", "", "mine.yaml: name must be given"),
        ('  language_model: "micro:lm"\n', "", "model.language_model must be given"),
        ("root: pictures", "root: [a]", "data.root"),
        ("seed: 7", "seed: 7\n  attention: [1]", "train.attention"),
    ],
)
def test_wrong_types_and_missing_keys(file, old, new, said):
    assert old in TEXT
    file.write_text(TEXT.replace(old, new))
    error = refused(file)
    assert error.startswith("mine.yaml: ")
    assert said in error
    if "must be given" not in said:  # the file's own fault stays the file's when there are options
        assert refused(file, "--evaluate.batch", "1").startswith("mine.yaml: ")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("name: x\nmodel: [1, 2\ndata: {}\n", ":3: not YAML"),
        ("name: 'x\n", "not YAML"),
        ("name: x\n\tmodel: y\n", ":2: not YAML"),
        ("- name: x\n", "a recipe is a mapping with the keys name, model, data, train, evaluate"),
        ("", "a recipe is a mapping"),
        ("name: x\ndata: 3\n", "data must be a mapping with the keys sources"),
        ("name: x\ntrain:\n", "train must be a mapping"),
        ("name: x\nmodel: {encoders: {}, language_model: y}\n", "model.encoders must be a list"),
        ("name: x\nmodel: {encoders: [clip], language_model: y}\n", "model.encoders[0] must be a mapping"),
        ("!!python/object/apply:os.getcwd []\n", "not YAML"),
    ],
)
def test_what_is_no_recipe_is_told_with_its_place(tmp_path, text, said):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    error = refused(path)
    assert "odd.yaml" in error
    assert said in error


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "odd.yaml"
    path.write_bytes(b"\xff\xfe\x00name")
    assert "not YAML" in refused(path)


@pytest.mark.parametrize("name", ["mirco", "recipes/mirco.yaml", "micr0"])
def test_an_unknown_recipe_names_the_nearest_one(name):
    error = refused(name)
    assert f"there is no recipe {name!r}; did you mean 'micro'?" in error
    assert "`commvlm recipes`" in error


def test_recipes_lists_what_is_shipped(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if not line.startswith(" ")] == SHIPPED
    assert "    COMM on the micro world: two tiny encoders" in "\n".join(lines)


@pytest.mark.parametrize("name", ["../recipes/micro", "/recipes/micro", "recipes/../micro", "", "."])
def test_a_shipped_recipe_is_named_not_walked_to(name):
    assert "there is no recipe" in refused(name)


@pytest.mark.parametrize("name", ["micro", "micro.yaml", "recipes/micro", "recipes/micro.yaml"])
def test_a_shipped_recipe_goes_by_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert find_recipe(name) == RECIPES / "micro.yaml"


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_say_what_can_be_done(name):
    recipe: Recipe = load_recipe(name)
    check(recipe, count=8 if recipe.train.engine == "fsdp" else 1)
    assert recipe.name == name.split("/")[-1]
    for source in (*recipe.data.sources, *recipe.evaluate.sources):
        assert source.format in READERS
    assert {s.options["task"] for s in recipe.evaluate.sources if "task" in s.options} <= set(TASKS)
    for stage in recipe.train.stages:
        assert set(stage.weights) <= {source.name for source in recipe.data.sources}


def test_a_recipe_extends_another_key_by_key(file, tmp_path):
    below = load_recipe(file)
    above = tmp_path / "above.yaml"
    above.write_text(
        f"extends: {file.name}\nname: above\nmodel: {{fuse: {{kind: sum}}, project: linear}}\ntrain: {{seed: 9}}\n"
    )
    recipe = load_recipe(above)
    assert (recipe.name, recipe.model.fuse, recipe.train.seed) == ("above", {"kind": "sum"}, 9)
    assert recipe.model.encoders == below.model.encoders
    assert recipe.data == below.data
    assert recipe.train.stages == below.train.stages
    assert load_recipe(above, ["--train.seed", "2"]).train.seed == 2
    saved = tmp_path / "saved.yaml"
    saved.write_text(as_yaml(recipe))
    assert load_recipe(saved) == recipe
    third = tmp_path / "third.yaml"
    third.write_text("extends: above.yaml\nname: third\ndata: {root: here}\n")
    assert load_recipe(third).model == recipe.model
    assert load_recipe(third).data.root == str(tmp_path / "here")


def test_a_choice_with_options_is_replaced_as_a_whole(tmp_path):
    (tmp_path / "a.yaml").write_text(
        "name: a\nmodel: {encoders: [], language_model: x, project: {kind: mlp, hidden: 3, ratio: 2}}\n"
    )
    (tmp_path / "b.yaml").write_text("extends: a.yaml\nname: b\nmodel: {project: {kind: linear}}\n")
    assert load_recipe(tmp_path / "b.yaml").model.project == {"kind": "linear"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("extends: nothing.yaml\nname: x\n", "there is no recipe 'nothing.yaml'"),
        ("extends: odd.yaml\nname: x\n", "extends itself"),
        ("extends: [a]\nname: x\n", "extends must name a recipe"),
        ("extends: micro\nname: x\nmodell: {}\n", "did you mean 'model'"),
    ],
)
def test_what_cannot_be_extended_is_one_line(tmp_path, text, said):
    path = tmp_path / "odd.yaml"
    path.write_text(text)
    assert said in refused(path)


def test_inspect_as_a_table(capsys):
    assert main(["inspect", "micro"]) == 0
    out = capsys.readouterr().out
    assert "8 x 8" in out
    assert "5-8 of 8" in out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--train.stages", "[]"], "train.stages is empty"),
        (["--train.stages.second.name", "first"], "two stages have one name"),
        (["--train.stages.first.name", "../../x"], "its name becomes a folder's"),
        (["--train.stages.first.micro_batch", "3"], "batch a multiple of micro_batch"),
        (["--train.stages.first.micro_batch", "0"], "batch a multiple of micro_batch"),
        (["--train.stages.first.micro_batch", "-2"], "must be positive"),
        (["--train.stages.first.steps", "0"], "must be positive"),
        (["--train.stages.first.batch", "-4"], "must be positive"),
        (["--train.stages.first.warmup", "3"], "from 0 to 1"),
        (["--train.stages.first.trains.merg", "1e-3"], "trains names no part 'merg'; did you mean 'merge'?"),
        (
            ["--train.stages.second.trains.encoders", "1e-3"],
            "trains names encoders, which are trained through lora only",
        ),
        (["--train.stages.second.trains.merge", ".nan"], "must be a number from 0"),
        (["--train.stages.second.trains.merge", "-1"], "must be a number from 0"),
        (["--train.keep", "0"], "at least 1"),
        (["--train.save_every", "0"], "at least 1"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_anything_is_read(file, options, said):
    check(load_recipe(file))
    with pytest.raises(RecipeError, match=r"^[^\n]*$") as caught:
        check(load_recipe(file, options))
    assert said in str(caught.value)
