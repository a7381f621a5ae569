"""The study's schedule: what is asked is run once, what fails is told, what is killed goes on."""

import io
import json
import os
import shutil
import sys
import time
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import yaml
from rich.console import Console

from commvlm.cli import main
from commvlm.study.executors import EXECUTORS, gpus, worker_command
from commvlm.study.experiments import rows_of
from commvlm.study.rows import Row, encoder
from commvlm.study.runs import BUSY, Places, alone, runs_of, weights_hash, write_jobs
from commvlm.study.schedule import go_over, locked
from commvlm.study.settings import shipped_scales
from commvlm.study.study import Asked, planned, remember
from commvlm.study.worker import earlier_seconds
from commvlm.study.worker import main as worker
from commvlm.train.assemble import located
from commvlm.train.recipe import load_recipe

QUIET = Console(file=io.StringIO())


WORK = """
import json, sys, time, pathlib
root, key, bad = sys.argv[1:]
print("working on", key)
time.sleep(0.05)
if key == bad:
    sys.exit("broken: no such thing")
path = pathlib.Path(root) / "results" / f"{key}.json"
path.parent.mkdir(exist_ok=True)
path.write_text(json.dumps({"key": key, "seconds": {"train": 1.0}}))
"""


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


@pytest.mark.parametrize("name", ["local", "submitit", "ray"])
def test_what_is_cancelled_ends_with_all_that_it_started(name, tmp_path):
    if name != "local":
        pytest.importorskip(name)
    said = tmp_path / "pid"
    code = "import os, sys, time; open(sys.argv[1], 'w').write(f'{os.getpid()} '); time.sleep(300)"
    engine = EXECUTORS[name](tmp_path)
    try:
        job = engine.submit([sys.executable, "-c", code, str(said)], tmp_path / "log.txt")
        assert job.exit_code() is None
        until(lambda: said.is_file() and said.read_text().endswith(" "))
        job.cancel()
        until(lambda: not alive(int(said.read_text())))
    finally:
        engine.close()


def until(true, *, seconds=60):
    """Waits for it."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.05)


def alive(pid):
    """Whether a process is there and has not ended."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_what_is_done_is_not_done_again(few, tmp_path):
    places, asked = Places(tmp_path), []
    places.result(few[0].key).parent.mkdir()
    places.result(few[0].key).write_text('{"seconds": {}}')

    def command(key):
        asked.append(key)
        return [sys.executable, "-c", WORK, str(tmp_path), key, ""]

    assert not go_over([*few, *few], places, EXECUTORS["local"](tmp_path), jobs=3, command=command, console=QUIET)
    assert asked == [run.key for run in few[1:]]


def test_a_result_is_made_by_one_process_alone(few, tmp_path, capsys):
    key = few[0].key
    with alone(tmp_path / "locks" / key):
        assert worker([str(tmp_path), key, "rec", "drop", "1"]) == BUSY
    assert f"{key} is at work in another process" in capsys.readouterr().err


def test_the_seconds_of_a_stopped_run_are_those_of_all_its_processes(tmp_path, monkeypatch):
    places, now = Places(tmp_path), [1000.0]
    monkeypatch.setattr("commvlm.study.worker.time.time", lambda: now[0])

    def stopped(after: float, file: str) -> None:
        path = places.run("k") / file
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
        os.utime(path, (0, now[0] + after))

    assert earlier_seconds(places, "k") == 0
    stopped(50, "log.jsonl")
    now[0] = 5000
    assert earlier_seconds(places, "k") == 50
    now[0] = 6000  # stopped before it wrote anything
    assert earlier_seconds(places, "k") == 50
    stopped(20, "log.jsonl")
    stopped(30, "predictions/rec.jsonl")
    now[0] = 9000
    assert earlier_seconds(places, "k") == 80


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


def test_a_run_that_two_rows_share_is_not_begun_again(scale, world, tmp_path):
    """ "clip 8" and "clip last" are one run: what is there of it outlives every call, also of the other row alone."""
    places = Places(tmp_path)
    runs = [r for r in runs_of(scale, rows_of(scale, ["figure-2", "figure-3"]), data=str(world)) if r.seed == 0]
    one, other = (next(r for r in runs if r.row.name == name) for name in ("clip 8", "clip last"))
    assert one.key == other.key
    for call in ([one, other], [one, other], [other], [one]):
        write_jobs(places, call)
        places.run(one.key).mkdir(parents=True, exist_ok=True)
        (places.run(one.key) / f"checkpoint-{len(list(places.run(one.key).iterdir()))}").touch()
    assert len(list(places.run(one.key).iterdir())) == 4
    places.job(one.key).write_text("broken: [")
    with alone(places.lock(one.key)), pytest.raises(ValueError, match="is at work in another process"):
        write_jobs(places, [one])
    write_jobs(places, [one])
    assert not places.run(one.key).exists()


def test_each_process_sees_one_gpu_the_one_with_the_fewest(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    engine = EXECUTORS["local"](tmp_path)
    tell = "import os, time, sys; print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True); time.sleep(float(sys.argv[1]))"

    def start(name, seconds):
        return engine.submit([sys.executable, "-c", tell, str(seconds)], tmp_path / name)

    def done(job):
        while job.exit_code() is None:
            time.sleep(0.05)

    first, second = start("a", 60), start("b", 0)
    done(second)
    third = start("c", 0)
    done(third)
    first.cancel()
    assert [(tmp_path / name).read_text().strip() for name in "abc"] == ["3", "5", "5"]
    pair = EXECUTORS["local"](tmp_path, 2)
    done(pair.submit([sys.executable, "-c", tell, "0"], tmp_path / "d"))
    assert (tmp_path / "d").read_text().strip() == "3,5"
    with pytest.raises(ValueError, match="a run takes 3 GPUs, one for each of its processes, and this machine has 2"):
        EXECUTORS["local"](tmp_path, 3)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert gpus() == []
    EXECUTORS["local"](tmp_path, 3)


def test_wrong_words_for_slurm_are_told(tmp_path, monkeypatch):
    pytest.importorskip("submitit")
    for said in ("partitions=a", "mem_gb=80GB"):
        monkeypatch.setenv("COMMVLM_SLURM", said)
        with pytest.raises(ValueError, match="COMMVLM_SLURM is none of submitit's settings"):
            EXECUTORS["submitit"](tmp_path)


def test_what_changes_an_answer_changes_the_key(scale, world):
    rows = rows_of(scale, ["figure-2"])[:1]
    scales = [scale, replace(scale, features="int8"), replace(scale, features=None), replace(scale, tasks=["rec"])]
    keys = [runs_of(replace(one, seeds=1), rows, data=str(world))[0].key for one in scales]
    assert keys[0] == keys[2]  # exact features are the encoders' own
    assert len(set(keys)) == 3


def test_what_is_written_beside_a_result_is_no_part_of_its_key(scale, world, tmp_path):
    """Nor a reason to begin again what was begun."""
    rows = rows_of(scale, ["figure-2"])[:1]

    def of(**options):
        one = replace(scale, seeds=1, options={**scale.options, **{f"train.{k}": v for k, v in options.items()}})
        return runs_of(one, rows, data=str(world))[0]

    plain, rarely = of(), of(save_every=7, keep=1, report_to=["tensorboard"])
    assert rarely.key == plain.key != of(log_every=5).key  # what is logged is a part of the result
    places = Places(tmp_path / "study")
    for run in (plain, rarely):
        write_jobs(places, [run])
        assert load_recipe(places.job(run.key)).train.save_every == run.recipe.train.save_every
    begun = places.run(rarely.key) / "checkpoint"
    begun.mkdir(parents=True)
    write_jobs(places, [plain])
    assert begun.is_dir()
    assert load_recipe(places.job(plain.key)).train.save_every == 7  # as it was begun


def test_a_run_whose_weights_were_moved_is_begun_again(scale, world, tmp_path):
    """By the same key, since they are the same; another folder of the same weights is as good while it is there."""
    folders = [tmp_path / "a", tmp_path / "b"]
    places = Places(tmp_path / "study")
    shutil.copytree(located("micro:clip"), folders[0])
    of = lambda folder: runs_of(replace(scale, seeds=1), [row_of(folder)], data=str(world))[0]  # noqa: E731
    row_of = lambda folder: Row("a", scale.model(replace(encoder(scale.encoders[0], 2), checkpoint=str(folder))))  # noqa: E731
    write_jobs(places, [first := of(folders[0])])
    begun = places.run(first.key) / "checkpoint"
    begun.mkdir(parents=True)
    shutil.copytree(folders[0], folders[1])
    write_jobs(places, [of(folders[1])])
    assert begun.is_dir()
    shutil.rmtree(folders[0])
    weights_hash.cache_clear()
    moved = of(folders[1])
    write_jobs(places, [moved])
    assert (moved.key, begun.is_dir()) == (first.key, False)
    assert load_recipe(places.job(first.key)).model.encoders[0].checkpoint == str(folders[1])


def logging_much(recipe):
    """4 KB soon: small steps, each of them logged."""
    stages = [replace(stage, batch=2) for stage in recipe.train.stages]
    data, train = replace(recipe.data, group=2), replace(recipe.train, log_every=1, stages=stages)
    return replace(recipe, data=data, train=train)


def test_a_full_disk_ends_the_grid_and_is_told(few, tmp_path):
    """The workers may write files of 4 KB at most, which a disk that is full looks like."""
    said, places = io.StringIO(), Places(tmp_path)
    few = [replace(run, recipe=logging_much(run.recipe)) for run in few]
    write_jobs(places, few)
    limit = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    start = "from commvlm.study.worker import main; sys.exit(main(sys.argv[1:]))"
    command = lambda key: [sys.executable, "-c", limit + start, str(tmp_path), key, "rec", "drop", "1"]  # noqa: E731
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
        remember(places, planned(wanted)[1], wanted)
        seen.append(json.loads((tmp_path / "grid.json").read_text()))
    assert seen[1]["experiments"] == ["table-1", "weights"]
    assert seen[1]["rows"] == seen[0]["rows"]
    assert {len(row["runs"]) for row in seen[1]["rows"].values()} == {2}


def test_a_row_that_was_given_more_seeds_keeps_them_and_gives_none_to_others(scale, world, tmp_path):
    scale = replace(scale, world=None, seeds=1)
    for names, seeds in ((["weights"], 2), (["controls"], 1)):
        wanted = Asked(names, replace(scale, seeds=seeds), tmp_path, world)
        remember(Places(tmp_path), planned(wanted)[1], wanted)
    grid = json.loads((tmp_path / "grid.json").read_text())
    assert {name: len(row["runs"]) for name, row in grid["rows"].items()} == {
        row.name: 2 if row.name in {own.name for own in rows_of(scale, ["weights"])} else 1
        for row in rows_of(scale, ["weights", "controls"])
    }


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


@pytest.mark.slow
@pytest.mark.parametrize("way", ["ddp", "fsdp"])
def test_a_run_in_two_processes_is_that_of_one(scale, world, tmp_path, way):
    """Losses and answers; and what is wrong is the log's last line."""
    results = []
    for count, engine in ((1, "ddp"), (2, way)):
        places = Places(tmp_path / str(count))
        tiny = replace(scale, seeds=1, processes=count, options={**TINY, "train.log_every": 1, "train.engine": engine})
        (run,) = runs_of(tiny, rows_of(tiny, ["figure-2"])[:1], data=str(world))
        write_jobs(places, [run])
        command = partial(worker_command, places.root, tasks=["rec", "pope"], keep=False, processes=count)
        local = EXECUTORS["local"](places.root, count)
        assert not go_over([run], places, local, jobs=1, command=command, console=QUIET)
        results.append(json.loads(places.result(run.key).read_text()))
    one, two = results
    assert json.loads((places.run(run.key) / "run.json").read_text())["processes"] == 2
    assert len(one["losses"]) > 1
    assert [loss for *_, loss in two["losses"]] == pytest.approx([loss for *_, loss in one["losses"]], abs=1e-4)
    assert two["tallies"] == one["tallies"]
    places.result(run.key).unlink()
    (places.run(run.key) / "run.json").unlink()
    (places.run(run.key) / "recipe.yaml").unlink()
    (failed,) = go_over([run], places, local, jobs=1, command=command, console=QUIET)
    assert failed.reason.startswith(f"error: {places.run(run.key)} is not empty and holds no run of ours")


def test_the_whole_study_of_two_rows_and_its_report(tmp_path, capsys):
    said = yaml.safe_load(shipped_scales()["micro"].read_text())
    said |= {"name": "tiny", "layers": [8], "seeds": 1, "depths": [1], "ratios": [], "tasks": ["rec", "pope"]}
    rec = {"format": "refer-jsonl", "images": "images", "files": {"annotations": "test/rec.jsonl"}}
    pope = {"name": "pope", "format": "pope", "images": "images", "files": {"questions": "test/pope_random.json"}}
    sources = [{"name": "rec-one", **rec}, {"name": "rec-other", **rec}, pope]
    said |= {"world": {"train": 6, "test": 3}, "encoders": said["encoders"][:2]}
    said |= {"options": {**TINY, "evaluate.sources": sources}}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(said))
    root = tmp_path / "study"
    tiny = ["study", "figure-2", "--scale", str(tmp_path / "tiny.yaml")]
    call = [*tiny, "--out", str(root), "--jobs", "2"]
    assert main([*call, "--rows", "clip*"]) == 0
    first = json.loads((root / "results.json").read_text())
    assert (first["runs"], list(first["rows"])) == (1, ["clip 8"])
    assert set(json.loads((root / "grid.json").read_text())["rows"]) == {"clip 8", "mae 8"}
    capsys.readouterr()
    assert main(call) == 0
    page = (root / "report.html").read_text()
    assert capsys.readouterr().out.strip() == str(root / "report.html")
    assert "http" not in page.replace("http://www.w3.org", "")
    assert '<th scope="col">REC mean IoU</th>' in page
    results = json.loads((root / "results.json").read_text())
    assert results["runs"] == 2
    assert {f"{name} 8" for name in said["pair"]} == set(results["rows"])
    line = (root / "results.csv").read_text().splitlines()[1].split(",")
    key = line[2]
    result = json.loads((root / "results" / f"{key}.json").read_text())
    assert result["tallies"]["rec"]["groups"] == result["tallies"]["rec mean_iou"]["groups"] == ["rec.one", "rec.other"]
    lines = (root / "world" / "test" / "rec.jsonl").read_text().splitlines()
    assert (set(result["scores"]), result["scores"]["rec"]["n"]) == ({"rec", "pope"}, 2 * len(lines))
    assert not (root / "runs" / key / "model").exists()
    assert (root / "runs" / key / "receipts" / "rec.other.json").is_file()
    stamp = (root / "results" / f"{key}.json").stat().st_mtime_ns
    into = tmp_path / "findings.md"
    into.write_text("# Ours\n<!-- study: begin -->\nold\n<!-- study: end -->\nlast\n")
    swapped = tmp_path / "swapped.md"
    swapped.write_text("<!-- study: end -->\n<!-- study: begin -->\nkept\n")
    assert (main([*call, "--report", "--into", str(swapped)]), swapped.read_text().count("kept")) == (2, 1)
    assert main([*call, "--report", "--into", str(into)]) == 0
    told = into.read_text()
    assert told.startswith("# Ours\n<!-- study: begin -->\nScale tiny: 6 training and 3 test scenes; 2 of 2 runs")
    assert f"| {said['pair'][0]} 8 | 1 | " in told
    assert told.endswith("<!-- study: end -->\nlast\n")
    assert "\nold\n" not in told
    assert (root / "results" / f"{key}.json").stat().st_mtime_ns == stamp
    bundle = tmp_path / "runs.jsonl.xz"
    capsys.readouterr()
    assert main([*call, "--export", str(bundle)]) == 0
    assert capsys.readouterr().out == f"{bundle}: the results of 2 runs\n"
    assert main([*tiny, "--out", str(tmp_path / "there"), "--import", str(bundle), "--report"]) == 0
    assert f"2 results taken from {bundle}; 2 of this grid's runs are done" in capsys.readouterr().err
    assert (tmp_path / "there" / "jobs" / f"{key}.yaml").is_file()
    assert "runs.jsonl.xz" in (tmp_path / "there" / "report.html").read_text()
    for name in ("results.csv", "tables/claims.md"):
        assert (tmp_path / "there" / name).read_bytes() == (root / name).read_bytes()
    there = json.loads((tmp_path / "there" / "results.json").read_text())
    assert all(row.pop("costs")["ms"] > 0 for row in results["rows"].values())  # measured here alone
    assert all("ms" not in row.pop("costs") for row in there["rows"].values())
    assert there == results
    assert main([*tiny, "--out", str(tmp_path / "typo"), "--import", str(tmp_path / "runs.xz")]) == 2
    assert "runs.xz is no file" in capsys.readouterr().err
    assert not (tmp_path / "typo").exists()
    said["tasks"] = ["rec", "vqa"]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump(said))
    assert main(["study", "figure-2", "--scale", str(tmp_path / "more.yaml"), "--out", str(tmp_path / "more")]) == 2
    assert "the recipe asks nothing of 'vqa'; it asks pope, rec.one, rec.other" in capsys.readouterr().err
    assert not (tmp_path / "more" / "jobs").exists()
    assert main(["study", "figure-9"]) == 2
    assert "no experiment 'figure-9'" in capsys.readouterr().err
    assert Path(root / "tables" / "figure-2.tex").read_text().count(r"\\") >= 3
