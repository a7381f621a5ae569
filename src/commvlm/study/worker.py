"""One run: trained, asked, tallied. `python -m commvlm.study.worker FOLDER KEY TASKS KEEP PROCESSES` is what every executor
starts; with several processes it starts them, and each of them does the same with its share."""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from ..app.evaluation import evaluate
from ..evaluate.predictions import read_predictions
from ..evaluate.receipts import versions, write_json
from ..evaluate.run import score
from ..evaluate.tasks import Score
from ..model.storage import writing
from ..train.launch import run_here
from ..train.parallel import hearing, leave, processes, speaks, together
from ..train.recipe import Recipe, load_recipe
from ..train.run import train
from .alignments import alignment_facts
from .runs import BUSY, AtWork, Places, alone
from .tallies import Tally, joined, tallies_of


def work(places: Places, key: str, *, tasks: Sequence[str] = (), keep: bool = False) -> Path:
    """Trains jobs/KEY.yaml into runs/KEY, asks it `tasks`, and writes results/KEY.json; a run that was killed goes on.

    keep: whether the trained model stays; answers, logs and receipts always do. Of several processes each trains and asks its
    share, and the first one writes the result.
    """
    target, first = places.result(key), processes().is_main_process
    if target.is_file():
        return target
    recipe, folder = load_recipe(places.job(key)), places.run(key)
    earlier = 0.0
    with hearing(), together():
        if first:
            if (folder / "run.json").exists() and not (folder / "model").is_dir():
                shutil.rmtree(folder)  # its result is gone, and its model too: it begins again
            earlier = earlier_seconds(places, key)
    began = time.perf_counter()
    train(recipe, folder)
    trained = time.perf_counter()
    scores = evaluate(folder, tasks=tasks)
    if not first:
        return target
    sets = {name: [one for one in scores if name in (one, scores[one].task)] for name in tasks or scores}
    result = {
        "name": recipe.name,
        "key": key,
        "seconds": {"train": earlier + trained - began, "evaluate": time.perf_counter() - trained},
        "scores": {name: mean_of([scores[one] for one in own]).as_json() for name, own in sets.items()},
        "tallies": _tallies(folder, sets, recipe.evaluate.rules),
        **_run_facts(folder, recipe),
        "versions": versions(),
    }
    write_json(result, target)
    places.clock(key).unlink(missing_ok=True)
    if not keep:
        shutil.rmtree(folder / "model", ignore_errors=True)
    return target


def earlier_seconds(places: Places, key: str) -> float:
    """Of the processes of this run that were stopped, each up to the last that it wrote into its log or answers. Told once by
    each process, before it writes: it is counted from now."""
    clock, run, earlier = places.clock(key), places.run(key), 0.0
    if clock.is_file():
        said = json.loads(clock.read_text(encoding="utf-8"))
        written = [p.stat().st_mtime for p in (run / "log.jsonl", *run.glob("predictions/*.jsonl")) if p.is_file()]
        earlier = said["earlier"] + max([0.0, *(stamp - said["began"] for stamp in written)])
    write_json({"earlier": earlier, "began": time.time()}, clock)
    return earlier


def mean_of(scores: Sequence[Score]) -> Score:
    """Sets of one task as one score: the mean of theirs, without what is said of one set alone."""
    if len(scores) == 1:
        return scores[0]
    return Score(
        scores[0].task, scores[0].metric, scores[0].rule, value=sum(s.value for s in scores) / len(scores),
        standard_error=None, interval=None, n=sum(s.n for s in scores), unparsable=sum(s.unparsable for s in scores),
        extra={"sets": len(scores)},
    )  # fmt: skip


def _tallies(folder: Path, sets: Mapping[str, Sequence[str]], rules: Mapping[str, str]) -> dict[str, Any]:
    """sets: what is scored -> its sets of questions. rules: the recipe's, by task."""
    made: dict[str, Any] = {}
    for name, own in sets.items():
        parts: dict[str, dict[str, Tally]] = {}
        for one in own:
            path = folder / "predictions" / f"{one}.jsonl"
            records = read_predictions(path)
            (found,) = score(
                path, rules={task: rules[task] for task in {r.task for r in records} & set(rules)}
            ).values()
            for title, tally in tallies_of(found, records).items():
                parts.setdefault(name + title.removeprefix(found.task), {})[one] = tally
        made |= {title: joined(of).as_json() if len(of) > 1 else of[own[0]].as_json() for title, of in parts.items()}
    return made


def _run_facts(folder: Path, recipe: Recipe) -> dict[str, Any]:
    """What the run's own files say: learned weights, the loss curve's end, and how gradients fare in the alignments."""
    facts = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    lines = (folder / "log.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return {
        "layer_weights": facts["layer_weights"],
        "losses": [[row["stage"], row["step"], round(row["loss"], 5)] for row in rows],
        "alignments": alignment_facts(recipe, folder / "model"),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """FOLDER KEY TASKS KEEP PROCESSES -> exit code; a fault is one line on stderr. Where another process is at work on the
    run, it is left to that one, with the exit code `BUSY`."""
    root, key, tasks, keep, count = sys.argv[1:] if argv is None else argv
    if int(count) > 1:
        return run_here([root, key, tasks, keep, "1"], processes=int(count), module="commvlm.study.worker")
    places = Places(Path(root))
    try:
        with writing(places.root), alone(places.lock(key)) if speaks() else nullcontext():
            work(places, key, tasks=[name for name in tasks.split(",") if name], keep=keep == "keep")
        leave()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return BUSY if isinstance(error, AtWork) else 2
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
