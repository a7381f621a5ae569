"""What a study's folder holds, read back: rows, their results by seed, estimates per task, costs."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..evaluate.receipts import write_json
from ..model.cost import inspect_visual_half
from ..model.measure import measure
from ..model.spec import build_config
from ..train.assemble import model_settings
from .rows import Row
from .runs import Places
from .statistics import Estimate, estimates
from .tallies import Tally

LATE = 10
"""Logged losses, the last ones, that a run's training loss at its end is the mean of."""


@dataclass(frozen=True)
class Results:
    """rows: name -> at, pixels, model, runs (seed -> key). runs: key -> what its worker wrote. estimates: task -> row ->
    estimate, from the seeds that are done."""

    grid: Mapping[str, Any]
    runs: Mapping[str, Mapping[str, Any]]
    estimates: Mapping[str, Mapping[str, Estimate]] = field(default_factory=dict)

    @property
    def rows(self) -> Mapping[str, Any]:
        return self.grid["rows"]

    def of_row(self, name: str) -> dict[int, Mapping[str, Any]]:
        """Seed -> result, of what is done."""
        return {int(s): self.runs[key] for s, key in self.rows[name]["runs"].items() if key in self.runs}

    def seeds(self, name: str) -> int:
        return len(self.of_row(name)) if name in self.rows else 0

    def late_losses(self, name: str) -> list[float]:
        """Of each seed that is done, its training loss at the end: nats a token, within the last stage's mixture. Rows have
        the same examples in the same order, so losses of one seed can be compared."""
        ends = []
        for _, result in sorted(self.of_row(name).items() if name in self.rows else ()):
            losses = [loss for stage, _, loss in result["losses"] if stage == result["losses"][-1][0]][-LATE:]
            ends += [sum(losses) / len(losses)] if losses else []
        return ends


def read_results(places: Places) -> Results:
    """Raises ValueError where the folder holds no study, or a broken file."""
    grid = _json(places.root / "grid.json", f"{places.root} holds no study: it has no grid.json; run `commvlm study`")
    keys = [key for row in grid["rows"].values() for key in row["runs"].values()]
    runs = {key: _json(places.result(key), "") for key in dict.fromkeys(keys) if places.done(key)}
    bare = Results(grid, runs)
    tasks = sorted({task for result in runs.values() for task in result["tallies"]})
    by_task = {}
    names: dict[frozenset[str], list[str]] = {}  # of each set of runs: several rows may be names of one
    for name, row in grid["rows"].items():
        names.setdefault(frozenset(row["runs"].values()), []).append(name)
    for task in tasks:
        tallies = {
            name: found for alike in names.values() for found in [_tallies(bare, alike[0], task)] for name in alike
        }
        by_task[task] = estimates({name: tallies[name] for name in grid["rows"] if tallies[name]})
    return Results(grid, runs, by_task)


def _tallies(results: Results, name: str, task: str) -> dict[int, Tally]:
    found = results.of_row(name)
    return {s: Tally.from_json(r["tallies"][task]) for s, r in sorted(found.items()) if task in r["tallies"]}


def costs(rows: Mapping[str, Row], cache: Path, *, runs: int, precision: str = "bf16") -> dict[str, dict[str, Any]]:
    """Row -> parameters and FLOPs of its visual half, visual tokens, and with `runs` passes its seconds and peak bytes.

    precision: of the passes. Counted and measured once, kept in `cache`: measurements of one study belong to one machine.
    """
    kept = _costs_in(cache)
    for name, row in rows.items():
        of = hashlib.sha256(json.dumps(asdict(row.model), sort_keys=True).encode()).hexdigest()[:16]
        if name in kept and kept[name].get("of") == of and (not runs or _measured_in(precision, kept[name])):
            continue
        kept = _with_cost(cache, name, {"of": of, **_cost(row, runs=runs, precision=precision)})
    return {name: kept[name] for name in rows}


def _costs_in(cache: Path) -> dict[str, Any]:
    return _json(cache, "") if cache.is_file() else {}


def _with_cost(cache: Path, name: str, cost: dict[str, Any]) -> dict[str, Any]:
    """What `cache` has now, and this: a study may measure while a report is drawn. What was measured of the same model stays
    where this was not."""
    cache.parent.mkdir(parents=True, exist_ok=True)
    with cache.with_name(f".{cache.name}.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        kept = _costs_in(cache)
        known = kept.get(name, {})
        if cost["measured"] or known.get("of") != cost["of"] or not known["measured"]:
            kept[name] = cost
            write_json(kept, cache)
    return kept


def _measured_in(precision: str, cost: Mapping[str, Any]) -> bool:
    return (cost["measured"] or {}).get("dtype") == precision


def _cost(row: Row, *, runs: int, precision: str) -> dict[str, Any]:
    config = build_config(**model_settings(row.model))
    parts = inspect_visual_half(config)
    taken = asdict(measure(config, runs=runs, dtype=precision)) if runs else {}
    kept = ("seconds", "peak_bytes", "threads", "dtype", "device")
    return {
        "tokens": config.num_image_tokens,
        "parameters": sum(part.parameters for part in parts),
        "trained": sum(part.parameters for part in parts if part.part != "encoders"),
        "flops": sum(part.flops for part in parts),
        "measured": {name: taken[name] for name in kept} if taken else None,
    }


def _json(path: Path, lacking: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(lacking or f"{path} is gone") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is no JSON ({error.msg}); remove it and run the study again") from error
