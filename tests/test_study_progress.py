"""What a grid says while it goes on: lines where there is no terminal, a bar on one; and what is left."""

import io
import json

import pytest
from rich.console import Console

from commvlm.study.progress import share_done, time_left
from commvlm.study.runs import Places
from commvlm.study.schedule import go_over


class Going:
    """An executor whose runs are seen at two fifths of their steps, then at their questions, then done."""

    def __init__(self, root):
        self.places = Places(root)

    def submit(self, command, log):
        (key,) = command
        return Stepping(self.places, key)

    def close(self):
        pass


class Stepping:
    """Of the micro recipe's 1,080 and 420 steps."""

    def __init__(self, places, key):
        self.places, self.key, self.looks = places, key, 0

    def exit_code(self):
        self.looks += 1
        if self.looks == 3:
            self.places.result(self.key).parent.mkdir(exist_ok=True)
            self.places.result(self.key).write_text(json.dumps({"seconds": {"train": 3600.0, "evaluate": 2400.0}}))
            return 0
        log = self.places.run(self.key) / "log.jsonl"
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text(json.dumps(dict(zip(("stage", "step"), AT[self.looks], strict=True))) + "\n")
        return None

    def reason(self):
        return ""

    def cancel(self):
        pass


AT = {1: ("align", 600), 2: ("instruct", 420)}


@pytest.fixture
def told(few, tmp_path, monkeypatch):
    """told(console) -> what it was told of two runs, one after the other."""
    monkeypatch.setattr("commvlm.study.schedule.POLL", 0)

    def of(**terminal):
        console = Console(file=io.StringIO(), **terminal)
        command = lambda key: [key]  # noqa: E731
        assert not go_over(few[:2], Places(tmp_path), Going(tmp_path), jobs=1, command=command, console=console)
        return console.file.getvalue()

    return of


def test_off_a_terminal_a_grid_is_told_in_lines(told, monkeypatch):
    """A run that answers is not done: training was three fifths of the first one, and asking the rest."""
    monkeypatch.setattr("commvlm.study.progress.EVERY", 0)
    assert told().splitlines() == [
        "0 of 2 runs, time left unknown until a run is done; at work: clip 2, seed 0 40%",
        "0 of 2 runs, time left unknown until a run is done; at work: clip 2, seed 0 answering",
        "clip 2, seed 0 done in 6000 s; 1 of 2 runs, about 1.7 h left",
        "1 of 2 runs, about 76 min left; at work: clip 4, seed 0 40%",
        "1 of 2 runs, about 40 min left; at work: clip 4, seed 0 answering",
        "clip 4, seed 0 done in 6000 s; 2 of 2 runs, about 0 min left",
    ]


def test_what_is_at_work_is_told_every_few_minutes_off_a_terminal(told, monkeypatch):
    now = iter(range(0, 10_000, 100))
    monkeypatch.setattr("commvlm.study.progress.time.monotonic", lambda: next(now))
    assert [line.partition("; ")[0] for line in told().splitlines()] == [
        "0 of 2 runs, time left unknown until a run is done",
        "clip 2, seed 0 done in 6000 s",
        "1 of 2 runs, about 40 min left",
        "clip 4, seed 0 done in 6000 s",
    ]


def test_on_a_terminal_there_is_a_bar_and_no_line(told):
    said = told(force_terminal=True, width=200)
    assert "━" in said
    assert "2/2" in said
    assert "of 2 runs" not in said


def test_a_run_is_at_its_questions_from_the_end_of_training(few, tmp_path):
    """Its last step may not be logged."""
    (tmp_path / "log.jsonl").write_text('{"stage": "instruct", "step": 419}\n')
    assert 0.99 < share_done(tmp_path, few[0].recipe) < 1
    (tmp_path / "run.json").write_text("{}")
    assert share_done(tmp_path, few[0].recipe) == 1


def test_time_left_is_of_as_many_runs_at_once_as_there_still_are():
    took = [{"train": 1800.0, "evaluate": 1800.0}]
    assert time_left([], 3, [], 1) == "time left unknown until a run is done"
    assert time_left(took, 4, [], 2) == "about 2.0 h left"
    assert time_left(took, 0, [1.0], 2) == "about 30 min left"
    assert time_left(took, 1, [0.5, 1.0], 2) == "about 68 min left"
    assert time_left([{}], 1, [0.5], 1) == "about 0 min left"
