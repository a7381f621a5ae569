"""What goes wrong in a study: why is told, and the rest goes on."""

import errno
import io
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from rich.console import Console

from commvlm.study.bundle import keep
from commvlm.study.executors import EXECUTORS, RayJob, SubmititJob
from commvlm.study.progress import time_left
from commvlm.study.runs import Places, note_failed
from commvlm.study.runs import failed as failures
from commvlm.study.schedule import go_over
from commvlm.study.study import asked

QUIET = Console(file=io.StringIO())


def test_an_attempt_that_says_nothing_is_not_told_with_the_words_of_an_earlier_one(few, tmp_path):
    places = Places(tmp_path)
    for run in few:
        places.log(run.key).parent.mkdir(exist_ok=True)
        places.log(run.key).write_text("error: the disk is full; free some space\n")
    command = lambda key: [sys.executable, "-c", "raise SystemExit(3)"]  # noqa: E731
    failed = go_over(few, places, EXECUTORS["local"](tmp_path), jobs=2, command=command, console=QUIET)
    assert [one.reason.split(";")[0] for one in failed] == ["it said nothing (exit code 3"] * len(few)


TRACE = 'Traceback (most recent call last):\n  File "a.py", line 3, in f\n    raise it\n'
DIED = "The worker died unexpectedly while executing this task."
SCHEDULED = {
    "out of time": (
        "Job 7 (task: 0) with path x.pkl\nhas not produced any output (state: TIMEOUT)\nError stream produced:\n----\nsrun",
        "Job 7 (task: 0) with path x.pkl has not produced any output (state: TIMEOUT)",
    ),
    "raised": (
        f"Job (task=0) failed during processing with trace:\n----\n{TRACE}OSError: no such folder\n\n----\nYou can check",
        "OSError: no such folder",
    ),
    "ray's": (f"ray::run_command() (pid=1)\n{TRACE.partition(':')[2]}KeyError: 'a'", "KeyError: 'a'"),
    "lost": (DIED, DIED),
}


class Broken(Exception):
    """As a scheduler raises it."""


def submitit_job(error):
    return SubmititJob(SimpleNamespace(done=lambda: True, exception=lambda: error))


def ray_job(error):
    def get(reference):
        raise error

    exceptions = SimpleNamespace(RayError=Broken)
    return RayJob(SimpleNamespace(wait=lambda jobs, timeout: (jobs, []), get=get, exceptions=exceptions), "job")


class Engine:
    """An executor that submits by `submit`."""

    def __init__(self, submit):
        self.submit = submit

    def close(self):
        pass


@pytest.mark.parametrize("kind", [submitit_job, ray_job])
@pytest.mark.parametrize(("said", "told"), SCHEDULED.values(), ids=SCHEDULED)
def test_a_scheduler_says_why_it_ended_a_run(few, tmp_path, kind, said, told):
    """Beside the run's own last line, where it had one."""

    def submit(command, log):
        log.parent.mkdir(exist_ok=True)
        log.write_text("" if command == [few[0].key] else "40 %|####      |\n")
        return kind(Broken(said))

    failed = go_over(few[:2], Places(tmp_path), Engine(submit), jobs=2, command=lambda key: [key], console=QUIET)
    assert [one.reason.partition(" (exit code 1;")[0] for one in failed] == [told, f"40 %|####      |; {told}"]


def test_a_log_is_in_the_study_s_folder_on_whatever_machine_a_run_is(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    roots = [asked(["figure-2"], scale="quick", out=out).root for out in (None, Path("mine"))]
    assert roots == [tmp_path / "runs" / "study" / "quick", tmp_path / "mine"]


def finished(root):
    """(command, log) -> a run of which nothing is left to do."""

    def submit(command, log):
        result = Places(root).result(command[0])
        result.parent.mkdir(exist_ok=True)
        result.write_text(json.dumps({"seconds": {"train": 90.0, "evaluate": 30.0}}))
        return SubmititJob(SimpleNamespace(done=lambda: True, exception=lambda: None, result=lambda: 0))

    return submit


def with_faults(root, *faults):
    """Raises these, one a run, in place of starting it; None starts it."""
    left = [*faults]

    def submit(command, log):
        fault = left.pop(0)
        if fault is not None:
            raise fault
        return finished(root)(command, log)

    return Engine(submit)


def test_a_run_that_cannot_be_started_is_told_and_the_rest_goes_on(few, tmp_path):
    busy = Broken("sbatch: error: Socket timed out\nBatch job submission failed\nlast")
    engine = with_faults(tmp_path, busy, busy, None, busy)
    failed = go_over(few, Places(tmp_path), engine, jobs=2, command=lambda key: [key], console=QUIET)
    assert [one.run for one in failed] == [few[0], few[1], few[3]]
    reason = "it could not be started: sbatch: error: Socket timed out Batch job submission failed"
    assert {one.reason for one in failed} == {reason}


@pytest.mark.parametrize(
    ("fault", "times", "why"),
    [
        (Broken("no such partition"), 3, "3 in a row could not be started: 1 runs are not started"),
        (OSError(errno.ENOSPC, "no space"), 1, "the disk is full: 3 runs are not started"),
    ],
)
def test_where_nothing_can_be_started_no_more_is_tried(few, tmp_path, fault, times, why):
    said = io.StringIO()
    console = Console(file=said, width=300)
    engine = with_faults(tmp_path, *[fault] * times)
    failed = go_over(few, Places(tmp_path), engine, jobs=2, command=lambda key: [key], console=console)
    assert [one.run for one in failed] == few[:times]
    assert why in said.getvalue()


def test_time_left_is_reckoned_from_the_runs_that_are_done(few, tmp_path, monkeypatch):
    """Those of earlier calls too, and none that failed: one that is done took two minutes."""
    told = []
    monkeypatch.setattr("commvlm.study.schedule.time_left", lambda *of: told.append(time_left(*of)))
    engines = [Engine(finished(tmp_path)), Engine(lambda command, log: submitit_job(Broken("lost")))]
    for runs, engine in zip((few[:1], few), engines, strict=True):
        go_over(runs, Places(tmp_path), engine, jobs=1, command=lambda key: [key], console=QUIET)
    assert told == [f"about {minutes} min left" for minutes in (0, 4, 2, 0)]


def test_a_result_that_is_broken_is_told_before_anything_starts(few, tmp_path):
    places = Places(tmp_path)
    places.result(few[0].key).parent.mkdir()
    places.result(few[0].key).write_text("{")
    with pytest.raises(ValueError, match=rf"{few[0].key}\.json is no JSON .*; remove it and run the study again"):
        go_over(few, places, Engine(finished(tmp_path)), jobs=1, command=lambda key: [key], console=QUIET)


def test_a_failure_is_remembered_until_its_run_is_done(few, tmp_path):
    places, lost = Places(tmp_path), Engine(lambda command, log: submitit_job(Broken("lost")))
    assert failures(places) == {}
    go_over(few[:2], places, lost, jobs=2, command=lambda key: [key], console=QUIET)
    reason = f"lost (exit code 1; all of it in logs/{few[0].key}.txt)"
    assert failures(places)[few[0].key] == {"row": few[0].row.name, "seed": 0, "reason": reason}
    assert set(failures(places)) == {run.key for run in few[:2]}
    go_over(few[:1], places, Engine(finished(tmp_path)), jobs=1, command=lambda key: [key], console=QUIET)
    assert set(json.loads((tmp_path / "failed.json").read_text())) == {few[1].key}
    keep({few[1].key: "{}"}, Path("runs.xz"), places)
    assert json.loads((tmp_path / "failed.json").read_text()) == {}


def test_a_failure_that_a_full_disk_forgets_ends_nothing(few, tmp_path, monkeypatch):
    def full(value, path):
        raise OSError(errno.ENOSPC, "no space")

    note_failed(Places(tmp_path), (few[0], "old"))
    monkeypatch.setattr("commvlm.study.runs.write_json", full)
    note_failed(Places(tmp_path), (few[1], "new"))
    assert [about["reason"] for about in failures(Places(tmp_path)).values()] == ["old"]
