"""The study's rows, runs and schedule: what is asked is run once, what fails is told, what is killed goes on."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from commvlm.microworld.writer import write_world
from commvlm.model.spec import build_config
from commvlm.study.controls import scaled
from commvlm.study.executors import EXECUTORS
from commvlm.study.experiments import EXPERIMENTS, experiments_named, rows_of
from commvlm.study.rows import Row, encoder
from commvlm.study.runs import Places, runs_of, weights_hash, write_jobs
from commvlm.study.schedule import go_over, locked
from commvlm.study.settings import Scale, load_scale, shipped_scales
from commvlm.study.study import Asked, asked, planned, remember
from commvlm.study.worker import alone
from commvlm.study.worker import main as worker
from commvlm.train.assemble import located, model_settings

QUIET = Console(file=io.StringIO())


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return write_world(tmp_path_factory.mktemp("study") / "world", train=8, test=4)


@pytest.fixture
def scale() -> Scale:
    return load_scale("micro")


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


def test_other_data_are_another_run(scale, tmp_path):
    row = rows_of(scale, ["figure-2"])[:1]
    one, other = (write_world(tmp_path / str(size), train=size, test=2) for size in (4, 5))
    keys = [runs_of(replace(scale, seeds=1), row, data=str(folder))[0].key for folder in (one, other)]
    assert keys[0] != keys[1]


def test_rows_that_cannot_be_run_are_all_named_before_anything_starts(scale, world):
    bad = [Row("too deep", scale.model(encoder(scale.encoder("clip"), 9)))]
    bad.append(Row("odd merge", scale.model(encoder(scale.encoder("clip"), "all", "mode"))))
    with pytest.raises(ValueError, match=r"2 of 2 rows cannot be run: too deep: .*9.*; odd merge: .*mode"):
        runs_of(scale, bad, data=str(world))


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seeeds": 3}, r"unknown key 'seeeds'.*seeds"),
        ({"pair": ["clip", "clap"]}, r"pair names 'clap', which is none of"),
        ({"seeds": 0}, r"seeds is 0"),
        ({"layers": []}, r"layers is empty"),
        ({"depths": []}, r"depths is empty"),
        ({"tasks": ["recc"]}, r"no task 'recc'; did you mean 'rec'"),
        ({"seeds": "many"}, r"seeds"),
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


WORK = """
import json, sys, time, pathlib
root, key, bad = sys.argv[1:]
print("working on", key)
time.sleep(0.05)
if key == bad:
    sys.exit("broken: no such thing")
path = pathlib.Path(root) / "results" / f"{key}.json"
path.parent.mkdir(exist_ok=True)
path.write_text(json.dumps({"key": key}))
"""


@pytest.fixture
def few(scale, world):
    return runs_of(replace(scale, seeds=1), rows_of(scale, ["figure-2"])[:4], data=str(world))


@pytest.mark.parametrize("name", ["local", "submitit", "ray"])
def test_every_executor_runs_the_grid_and_tells_what_failed(name, few, tmp_path):
    if name != "local":
        pytest.importorskip(name)
    places, bad = Places(tmp_path), few[1].key
    engine = EXECUTORS[name](tmp_path)
    command = lambda key: [sys.executable, "-c", WORK, str(tmp_path), key, bad]  # noqa: E731
    try:
        failed = go_over(few, places, engine, jobs=2, command=command, console=QUIET)
    finally:
        engine.close()
    assert [one.run.key for one in failed] == [bad]
    assert "broken: no such thing (exit code 1" in failed[0].reason
    assert [places.done(run.key) for run in few] == [True, False, True, True]


def test_what_is_done_is_not_done_again(few, tmp_path):
    places, asked = Places(tmp_path), []
    places.result(few[0].key).parent.mkdir()
    places.result(few[0].key).write_text("{}")

    def command(key):
        asked.append(key)
        return [sys.executable, "-c", WORK, str(tmp_path), key, ""]

    assert not go_over([*few, *few], places, EXECUTORS["local"](tmp_path), jobs=3, command=command, console=QUIET)
    assert asked == [run.key for run in few[1:]]


def test_a_result_is_made_by_one_process_alone(few, tmp_path, capsys):
    key = few[0].key
    with alone(tmp_path / "locks" / key):
        assert worker([str(tmp_path), key, "rec", "drop"]) == 2
    assert f"{key} is at work in another process" in capsys.readouterr().err


def test_a_study_that_was_moved_goes_on(few, tmp_path):
    """The jobs that are not done name the new places, and what was begun for the old ones begins again."""
    places = Places(tmp_path)
    write_jobs(places, few[:2])
    for run in few[:2]:
        places.run(run.key).mkdir(parents=True)
    places.result(few[1].key).parent.mkdir()
    places.result(few[1].key).write_text("{}")
    moved = [
        replace(run, recipe=replace(run.recipe, data=replace(run.recipe.data, root="/elsewhere"))) for run in few[:2]
    ]
    write_jobs(places, moved)
    assert ["/elsewhere" in places.job(run.key).read_text() for run in moved] == [True, False]
    assert [places.run(run.key).exists() for run in moved] == [False, True]


def test_what_changes_an_answer_changes_the_key(scale, world):
    rows = rows_of(scale, ["figure-2"])[:1]
    scales = [scale, replace(scale, features="int8"), replace(scale, features=None), replace(scale, tasks=["rec"])]
    keys = [runs_of(replace(one, seeds=1), rows, data=str(world))[0].key for one in scales]
    assert keys[0] == keys[2]  # exact features are the encoders' own
    assert len(set(keys)) == 3


def test_a_full_disk_ends_the_grid_and_is_told(few, tmp_path):
    """The workers may write files of 4 KB at most, which a disk that is full looks like."""
    said, places = io.StringIO(), Places(tmp_path)
    write_jobs(places, few)
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    start = "from commvlm.study.worker import main; sys.exit(main(sys.argv[1:]))"
    command = lambda key: [sys.executable, "-c", limit + start, str(tmp_path), key, "rec", "drop"]  # noqa: E731
    console = Console(file=said, width=300)
    failed = go_over(few, places, EXECUTORS["local"](tmp_path), jobs=1, command=command, console=console)
    assert [one.run.key for one in failed] == [few[0].key]
    assert f"{tmp_path}" in failed[0].reason
    assert "the disk is full; free some space and run the same command again" in failed[0].reason
    assert "the disk is full: 3 runs are not started" in said.getvalue()


def test_a_call_with_fewer_seeds_or_experiments_forgets_nothing(scale, world, tmp_path):
    scale = replace(scale, world=None)
    places, seen = Places(tmp_path), []
    for names, seeds in ((["table-1"], 2), (["weights"], 1)):
        wanted = Asked(names, replace(scale, seeds=seeds), tmp_path, world)
        rows, runs = planned(wanted)
        remember(places, rows, runs, wanted)
        seen.append(json.loads((tmp_path / "grid.json").read_text()))
    assert seen[1]["experiments"] == ["table-1", "weights"]
    assert seen[1]["rows"] == seen[0]["rows"]
    assert {len(row["runs"]) for row in seen[1]["rows"].values()} == {2}


def test_two_processes_on_one_folder_are_told(tmp_path):
    with locked(tmp_path):
        with pytest.raises(ValueError, match=rf"process {os.getpid()} works on .* already"):
            with locked(tmp_path):
                pass
    with locked(tmp_path):
        pass


def test_an_interrupted_study_ends_what_it_started(few, tmp_path):
    engine, started = EXECUTORS["local"](tmp_path), []
    submit = engine.submit

    def note(command, log):
        started.append(submit(command, log))
        if len(started) == 2:
            raise KeyboardInterrupt
        return started[-1]

    engine.submit = note
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        go_over(
            few, Places(tmp_path), engine, jobs=2, command=lambda key: [sys.executable, "-c", "import time; time.sleep(60)"],
            console=QUIET,
        )  # fmt: skip
    assert started[0].exit_code() not in (None, 0)
    assert time.monotonic() - began < 20
    started[1].cancel()


TINY = {
    "train.stages": [
        {"name": "align", "steps": 2, "batch": 2, "trains": {"project": 1e-3, "align": 1e-3, "merge": 1e-3}},
    ],
    "data.group": 2,
    "train.precision": "fp32",
    "evaluate.max_new_tokens": 4,
}


def test_the_whole_study_of_two_rows_and_its_report(tmp_path, scale):
    said = yaml.safe_load(shipped_scales()["micro"].read_text())
    said |= {"name": "tiny", "layers": [8], "seeds": 1, "depths": [1], "ratios": [], "tasks": ["rec", "pope"]}
    said |= {"world": {"train": 6, "test": 3}, "options": TINY, "encoders": said["encoders"][:2]}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(said))
    root = tmp_path / "study"
    call = [sys.executable, "-m", "commvlm.cli", "study", "figure-2", "--scale", str(tmp_path / "tiny.yaml")]
    call += ["--out", str(root), "--jobs", "2"]
    done = subprocess.run(call, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    page = (root / "report.html").read_text()
    assert done.stdout.strip() == str(root / "report.html")
    assert "http" not in page.replace("http://www.w3.org", "")
    results = json.loads((root / "results.json").read_text())
    assert results["runs"] == 2
    assert {f"{name} 8" for name in said["pair"]} == set(results["rows"])
    line = (root / "results.csv").read_text().splitlines()[1].split(",")
    key = line[2]
    assert json.loads((root / "results" / f"{key}.json").read_text())["scores"]["rec"]["n"] > 0
    assert not (root / "runs" / key / "model").exists()
    assert (root / "runs" / key / "receipts" / "rec.json").is_file()
    stamp = (root / "results" / f"{key}.json").stat().st_mtime_ns
    into = tmp_path / "findings.md"
    into.write_text("# Ours\n<!-- study: begin -->\nold\n<!-- study: end -->\nlast\n")
    swapped = tmp_path / "swapped.md"
    swapped.write_text("<!-- study: end -->\n<!-- study: begin -->\nkept\n")
    wrong = subprocess.run([*call, "--report", "--into", str(swapped)], capture_output=True, text=True, timeout=280)
    assert (wrong.returncode, swapped.read_text().count("kept")) == (2, 1)
    again = subprocess.run([*call, "--report", "--into", str(into)], capture_output=True, text=True, timeout=280)
    assert again.returncode == 0
    told = into.read_text()
    assert told.startswith("# Ours\n<!-- study: begin -->\nScale tiny: 6 training and 3 test scenes; 2 of 2 runs")
    assert f"| {said['pair'][0]} 8 | 1 | " in told
    assert told.endswith("<!-- study: end -->\nlast\n")
    assert "old" not in told
    assert (root / "results" / f"{key}.json").stat().st_mtime_ns == stamp
    bundle = tmp_path / "runs.jsonl.xz"
    sent = subprocess.run([*call, "--export", str(bundle)], capture_output=True, text=True, timeout=280)
    assert (sent.returncode, sent.stdout) == (0, f"{bundle}: the results of 2 runs\n")
    there = [*call[:7], "--out", str(tmp_path / "there")]
    drawn = subprocess.run([*there, "--import", str(bundle), "--report"], capture_output=True, text=True, timeout=280)
    assert drawn.returncode == 0, drawn.stderr[-2000:]
    assert f"2 results taken from {bundle}; 2 runs are done" in drawn.stderr
    for name in ("results.json", "results.csv", "tables/claims.md"):
        assert (tmp_path / "there" / name).read_bytes() == (root / name).read_bytes()
    other = subprocess.run([*call[:4], "figure-9"], capture_output=True, text=True, timeout=100)
    assert other.returncode == 2
    assert "no experiment 'figure-9'" in other.stderr
    assert Path(root / "tables" / "figure-2.tex").read_text().count(r"\\") >= 3
