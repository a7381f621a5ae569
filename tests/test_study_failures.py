"""What goes wrong in a study: why is told, and the rest goes on."""

import io
import sys

from rich.console import Console

from commvlm.study.executors import EXECUTORS
from commvlm.study.runs import Places
from commvlm.study.schedule import go_over

QUIET = Console(file=io.StringIO())


def test_an_attempt_that_says_nothing_is_not_told_with_the_words_of_an_earlier_one(few, tmp_path):
    places = Places(tmp_path)
    for run in few:
        places.log(run.key).parent.mkdir(exist_ok=True)
        places.log(run.key).write_text("error: the disk is full; free some space\n")
    command = lambda key: [sys.executable, "-c", "raise SystemExit(3)"]  # noqa: E731
    failed = go_over(few, places, EXECUTORS["local"](tmp_path), jobs=2, command=command, console=QUIET)
    assert [one.reason.split(";")[0] for one in failed] == ["it said nothing (exit code 3"] * len(few)
