"""A run that another process has, since the study that started it was killed: it is left to it, and nothing is lost."""

import io
import json
import subprocess
import sys
import time
from contextlib import ExitStack

import pytest
import yaml
from rich.console import Console

from commvlm.cli import main
from commvlm.study.executors import EXECUTORS
from commvlm.study.runs import BUSY, Places, alone, at_work, write_jobs
from commvlm.study.schedule import go_over
from commvlm.study.settings import shipped_scales
from commvlm.study.worker import main as worker

HOLD = """
import fcntl, json, pathlib, sys
lock, result = map(pathlib.Path, sys.argv[1:])
lock.parent.mkdir(exist_ok=True)
with lock.open("a") as file:
    fcntl.flock(file, fcntl.LOCK_EX)
    print("held", flush=True)
    sys.stdin.readline()
    result.parent.mkdir(exist_ok=True)
    result.write_text(json.dumps({"seconds": {"train": 7.0}}))
"""
WORK = """
import fcntl, json, pathlib, sys
lock, result, busy = sys.argv[1:]
with open(lock, "a") as file:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(int(busy))
    path = pathlib.Path(result)
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"seconds": {"train": 1.0}}))
"""


@pytest.fixture
def holding(tmp_path):
    """holding(key) -> a process that has the run, makes its result when it reads a line, and ends with the test."""
    places, started = Places(tmp_path), []

    def hold(key):
        words = [sys.executable, "-c", HOLD, str(places.lock(key)), str(places.result(key))]
        started.append(subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield hold
    for process in started:
        process.kill()
        process.communicate()


@pytest.mark.parametrize("name", ["local", "submitit", "ray"])
def test_a_run_that_another_process_has_is_left_to_it(name, few, tmp_path, holding):
    """The first ends well there; the second is taken by another process while it is started here, whose process is killed."""
    if name != "local":
        pytest.importorskip(name)
    places, said, asked = Places(tmp_path), io.StringIO(), []
    first, second, third, last = (run.key for run in few)
    processes = {first: holding(first)}

    def command(key):
        asked.append(key)
        if key == second and second not in processes:
            processes[second] = holding(second)
        if key == last:
            assert places.done(third)  # the rest goes on meanwhile
            processes[first].communicate("\n")
            processes[second].kill()
        places.lock(key).parent.mkdir(exist_ok=True)
        return [sys.executable, "-c", WORK, str(places.lock(key)), str(places.result(key)), str(BUSY)]

    engine, console = EXECUTORS[name](tmp_path), Console(file=said)
    try:
        assert not go_over(few, places, engine, jobs=3, command=command, console=console)
    finally:
        engine.close()
    assert asked == [second, third, last, second]
    assert [json.loads(places.result(run.key).read_text())["seconds"]["train"] for run in few] == [7, 1, 1, 1]
    waits = [line for line in said.getvalue().splitlines() if "is at work in another process" in line]
    assert waits == [f"{run.name} is at work in another process: waiting for its result" for run in few[:2]]
    assert not (tmp_path / "failed.json").exists() or not json.loads((tmp_path / "failed.json").read_text())


def test_a_run_that_another_process_has_is_one_of_those_at_work(few, tmp_path, monkeypatch):
    """Wherever it stands in the grid, and where there are more of them than jobs: what ends there is not started here."""
    places, looks, asked, held = Places(tmp_path), [], [], ExitStack()
    for run in few[2:]:
        held.enter_context(alone(places.lock(run.key)))

    def made(key):
        places.result(key).parent.mkdir(exist_ok=True)
        places.result(key).write_text('{"seconds": {}}')

    def look(seconds):
        looks.append(seconds)
        if len(looks) == 3:
            made(few[2].key)
            made(few[3].key)
            held.close()

    class Engine:
        def submit(self, command, log):
            asked.append((len(looks), *command))
            made(*command)
            return Ended()

    class Ended:
        exit_code = staticmethod(lambda: 0)

    monkeypatch.setattr("commvlm.study.schedule.time.sleep", look)
    console = Console(file=io.StringIO())
    assert not go_over(few, places, Engine(), jobs=1, command=lambda key: [key], console=console)  # type: ignore[arg-type]
    assert asked == [(3, few[0].key), (4, few[1].key)]


def test_whether_a_process_is_at_work_is_asked_of_its_lock(tmp_path, holding):
    places = Places(tmp_path)
    assert not at_work(places.lock("k"))
    assert not places.lock("k").exists()
    process = holding("k")
    assert at_work(places.lock("k"))
    process.kill()
    process.wait()
    assert not at_work(places.lock("k"))


@pytest.mark.slow
def test_several_processes_leave_their_run_with_one_exit_code(few, tmp_path):
    places = Places(tmp_path)
    write_jobs(places, few[:1])
    with alone(places.lock(few[0].key)):
        assert worker([str(tmp_path), few[0].key, "rec", "drop", "2"]) == BUSY
    assert not places.run(few[0].key).exists()


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_after_a_study_was_killed_the_same_command_goes_on(tmp_path, capfd, count):
    """Its process alone is killed: the run that it started is waited for, also where that is several processes."""
    said = yaml.safe_load(shipped_scales()["micro"].read_text())
    stages = [{"name": "align", "steps": 60, "batch": 2, "trains": {"project": 1e-3, "align": 1e-3, "merge": 1e-3}}]
    said |= {"name": "tiny", "layers": [8], "seeds": 1, "tasks": ["pope"], "world": {"train": 6, "test": 3}}
    said |= {"features": None, "encoders": said["encoders"][:2], "processes": count}
    said["options"] = {"train.stages": stages, "data.group": 2, "train.precision": "fp32", "evaluate.max_new_tokens": 4}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(said))
    call = ["study", "figure-2", "--scale", str(tmp_path / "tiny.yaml"), "--out", str(tmp_path / "out"), "--jobs", "1"]
    study = subprocess.Popen([sys.executable, "-m", "commvlm.cli", *call], stderr=subprocess.DEVNULL)
    while not any((tmp_path / "out").glob("runs/*/log.jsonl")):
        assert study.poll() is None
        time.sleep(0.1)
    study.kill()
    study.wait()
    (begun,) = (path.parent.name for path in (tmp_path / "out").glob("runs/*/log.jsonl"))
    assert at_work(Places(tmp_path / "out").lock(begun))
    assert main(call) == 0
    told = capfd.readouterr().err
    assert told.count("is at work in another process: waiting for its result") == 1
    assert "2 of 2 runs" in told
    assert Places(tmp_path / "out").log(begun).read_text().count("stage align") == 1
