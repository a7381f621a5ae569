"""What the report says of figures and claims, from results made by hand."""

import csv
import io
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commvlm.evaluate.predictions import append_records
from commvlm.evaluate.receipts import write_json
from commvlm.evaluate.tasks import Record
from commvlm.study.claims import Claim, F, Verdict, claims_of
from commvlm.study.controls import with_mlp, without_mlp
from commvlm.study.experiments import EXPERIMENTS, figure_3, rows_of, table_1
from commvlm.study.gallery import gallery
from commvlm.study.paper import PAPER
from commvlm.study.report import (
    MUON,
    _findings,
    _is_of,
    _words,
    command,
    intervals,
    seeds_done,
    write_report,
)
from commvlm.study.results import Results, costs
from commvlm.study.rows import pair, single, single_name
from commvlm.study.runs import Places
from commvlm.study.settings import load_scale
from commvlm.study.statistics import Estimate
from commvlm.study.tables import as_csv, titled

SCORE = {"metric": "acc@0.5", "rule": "standard", "value": 75.0, "n": 4, "unparsable": 1}
TALLY = {"images": ["a", "b"], "groups": [""], "sums": [[1.2], [0.8]], "counts": [[2], [2]]}
RUN = {
    "key": "k", "seconds": {"train": 2.0, "evaluate": 1.0}, "scores": {"rec": SCORE},
    "tallies": {"rec": {**TALLY, "sums": [[2.0], [1.0]]}, "rec mean_iou": TALLY},
}  # fmt: skip


def page_of(root, runs, *, done=("k",), experiments=()):
    """The page of a study at micro scale. runs: row -> seed -> key. done: keys of those that have a result."""
    grid = {"scale": "micro", "world": {"train": 2, "test": 1}, "experiments": list(experiments)}
    write_json({**grid, "rows": {name: {"runs": own} for name, own in runs.items()}}, root / "grid.json")
    more = {"losses": [], "layer_weights": {}, "alignments": {}, "versions": {}}
    for key in done:
        (root / "results").mkdir(exist_ok=True)
        write_json({**RUN, **more, "key": key}, root / "results" / f"{key}.json")
    return write_report(Places(root), load_scale("micro")).read_text()


def test_the_csv_has_every_figure_that_verdicts_rest_on():
    """REC's overlap too: (1.2 + 0.8) / 4."""
    lines = list(csv.DictReader(io.StringIO(as_csv(Results({"rows": {"clip 8": {"runs": {"0": "k"}}}}, {"k": RUN})))))
    assert [(line["task"], line["metric"], float(line["value"])) for line in lines] == [
        ("rec", "acc@0.5", 75.0), ("rec mean_iou", "mean_iou", 50.0)
    ]  # fmt: skip
    assert {line["n"] for line in lines} == {"4"}


@pytest.mark.parametrize(
    ("task", "said"),
    [
        ("rec", "REC acc@0.5"), ("rec mean_iou", "REC mean IoU"), ("vqa.okvqa", "VQA accuracy, okvqa"),
        ("rec.refcocog-test mean_iou", "REC mean IoU, refcocog-test"), ("new", "new"),
    ],
)  # fmt: skip
def test_a_set_of_a_task_is_called_by_both(task, said):
    assert titled(task) == said


def test_a_scale_that_scores_sets_has_every_claim_on_each():
    scale = load_scale("micro")
    whole = claims_of(scale)
    for claim in whole:
        expect = "less" if " below " in claim.says else "level" if " level with " in claim.says else "more"
        assert claim.expect == expect, claim.says
    sets = claims_of(replace(scale, tasks=["rec.val", "rec.test", "reg", "pope", "vqa", "caption"]))
    on = lambda claims, task: [(c.finding, c.says) for c in claims if c.task == task]  # noqa: E731
    assert {c.finding for c in whole if c.task == "rec"} == {"F1", "F2", "F3", "F4", "F5", "C"}
    for name in ("rec", "rec mean_iou"):
        for one in ("rec.val", "rec.test"):
            assert on(sets, name.replace("rec", one)) == on(whole, name)
    assert on(sets, "pope") == on(whole, "pope")
    assert _is_of("rec.val mean_iou", "rec")
    assert _is_of("rec.val mean_iou", "rec.val")
    assert not _is_of("rec.val mean_iou", "reg")


def test_the_layer_that_stands_for_one_is_called_by_its_number_where_it_is_not_the_last():
    scale = load_scale("analysis")
    first, second = pair(scale)
    assert (single_name(first, first.last), single_name(second, second.last)) == ("clip -2", "dinov2 last")
    assert with_mlp(scale, first).name == "clip -2 + MLP"
    assert without_mlp(scale, second).name == "dinov2 last, linear"
    said = {claim.says: claim for claim in claims_of(scale)}
    assert said["clip: all levels merged above its layer -2"].terms == {"clip lln-layerscale all": 1.0, "clip -2": -1.0}
    assert "dinov2 above clip, last layer against layer -2" in said
    assert "mae above clip, last layer each" in {claim.says for claim in claims_of(load_scale("micro"))}


def verdict(task: str, word: str) -> Verdict:
    draws = {0: np.zeros(3)}
    return Verdict(Claim("F1", "says", task, {}), Estimate({0: 0.0}, draws, 0.0, 2), word, None, 2)


def test_two_figures_of_one_comparison_are_counted_apart():
    verdicts = [verdict("rec", "undecided"), verdict("rec mean_iou", "holds"), verdict("pope", "undecided")]
    found = _findings([v.claim for v in verdicts], verdicts, load_scale("micro"))[0]
    assert found["said"] == "2 of 2 claims have their rows: 2 undecided; by REC's mean IoU, 1 holds"
    assert not found["lacks"]


def test_every_finding_is_on_the_page_and_says_what_trains_its_rows(tmp_path):
    page = page_of(tmp_path, {"clip 4": {"0": "k"}, "clip 8": {"0": "l"}}, done="kl")
    assert [f"<h3>{name}. " in page for name in F if name[1:]] == [True] * 5
    assert "<h3>Controls: " in page
    assert "the paper has not" not in page  # micro has no such encoder
    assert "1 of 3 claims have their rows: 1 undecided; by REC&#39;s mean IoU, 1 undecided." in page
    for experiments in ("figure-2", "table-1 table-6 controls", "table-1 figure-3", "table-7", "table-1"):
        assert f"<code>commvlm study {experiments} --scale micro --seeds 1" in page


def test_a_scale_of_a_file_is_asked_for_by_it_and_failures_of_other_grids_are_left_out(tmp_path):
    page_of(tmp_path, {"clip 4": {"0": "k"}, "clip 8": {"0": "l"}}, done="k")
    grid = json.loads((tmp_path / "grid.json").read_text())
    write_json({**grid, "word": "scales/mine.yaml"}, tmp_path / "grid.json")
    failed = {"row": "clip 8", "seed": 0, "reason": "out of memory"}
    write_json({"l": failed, "another": {**failed, "row": "of before"}}, tmp_path / "failed.json")
    page = write_report(Places(tmp_path), load_scale("micro")).read_text()
    assert "commvlm study figure-2 --scale scales/mine.yaml" in page
    assert "--scale micro" not in page
    assert ("out of memory" in page, "of before" in page) == (True, False)


def test_claims_are_about_rows_that_the_scale_has():
    """quick runs three controls; micro all but that of the pair's size, which it has no encoder for."""
    for name in ("quick", "micro"):
        scale = load_scale(name)
        rows = {row.name for row in rows_of(scale, ["all"])}
        assert {term for claim in claims_of(scale) for term in claim.terms} <= rows


def test_intervals_of_one_seed_are_called_so():
    rows = {"clip 8": {"runs": {"0": "k", "1": "l"}}}
    assert "images alone" in intervals(Results({"rows": rows}, {"k": RUN}))
    assert intervals(Results({"rows": rows}, {"k": RUN, "l": RUN})) == "over seeds and images"


def test_seeds_are_those_that_are_done():
    rows = {"clip 8": {"runs": {"0": "k", "1": "l"}}, "mae 8": {"runs": {"0": "m", "1": "n"}}}
    said = [seeds_done(Results({"rows": rows}, dict.fromkeys(done, RUN))) for done in ("k", "km", "klm", "klmn")]
    assert said == [f"{n} of 2 seeds are done" for n in ("0 to 1", "1", "1 to 2")] + ["2 seeds"]
    assert seeds_done(Results({"rows": {}}, {})) == ""
    rows["COMM"] = {"runs": dict.fromkeys("012", "k")}
    said = [seeds_done(Results({"rows": rows}, dict.fromkeys(done, RUN))) for done in ("klm", "klmn")]
    assert said == ["1 to 3 of 2 to 3 seeds are done", "2 to 3 seeds"]


def test_runs_that_failed_are_told_until_they_are_done(tmp_path):
    told = {key: {"row": "mae 8", "seed": 0, "reason": "<b>no & nothing</b>"} for key in ("k", "l")}
    runs = {"clip 8": {"0": "k", "1": "m"}, "mae 8": {"0": "l", "1": "n"}}
    assert 'id="failed"' not in page_of(tmp_path, runs)
    write_json(told, tmp_path / "failed.json")
    page = page_of(tmp_path, runs)
    assert '3 of 4 runs are not done yet; <a href="#failed">1 of them failed</a>.' in page
    assert "<td>&lt;b&gt;no &amp; nothing&lt;/b&gt;</td>" in page
    assert f"--scale micro --seeds 2 --out {tmp_path}</code> goes on" in page
    assert "goes on" not in page_of(tmp_path, runs, done="klmn")


def test_the_command_that_goes_on_is_as_short_as_may_be():
    scale, rows = load_scale("micro"), {"clip 8": {"runs": {"0": "k"}}}
    places, world = Places(Path("runs/study/micro")), {"train": 2, "test": 1}
    said = [
        command(list(EXPERIMENTS), places, scale, Results({"rows": rows, "world": own}, {})) for own in (world, None)
    ]
    assert said == [f"commvlm study all --scale micro --seeds 1{more}" for more in ("", " --data DIR")]
    rows["COMM"] = {"runs": dict.fromkeys("0123", "m")}
    found = Results({"rows": rows, "world": world}, {})
    shorter = [replace(scale, more_seeds=more) for more in ({"COMM": 4}, {"COMM": 3}, {})]
    said = [command(list(EXPERIMENTS), places, one, found) for one in shorter]
    assert said == ["commvlm study all --scale micro", *["commvlm study all --scale micro --seeds 4"] * 2]


def test_what_muon_leaves_to_adamw_is_said_beside_figure_3(scale):
    assert _words("figure-3", figure_3(scale), scale)[1:] == [MUON]
    assert MUON not in _words("table-1", table_1(scale), scale)
    plain = replace(scale, options={**scale.options, "train.optimizer": "adamw"})
    assert MUON not in _words("figure-3", figure_3(plain), plain)


def test_peers_are_told_with_the_encoders_that_they_have_here(tmp_path):
    page = page_of(tmp_path, {"COMM": {"0": "k"}}, experiments=("peers",))
    assert '<th scope="col">encoders and their layers</th>' in page
    assert "<td>micro:mae: 7; micro:clip: 7</td>" in page  # prismatic-dinosiglip
    assert "<td>micro:clip: 3, 5, 7</td>" in page  # dense-connector-sci
    assert "<td>micro:clip: all; micro:mae: half</td>" in page


def test_costs_are_told_with_how_they_were_measured(tmp_path):
    """In results.json for every row; under the table where it was measured; a file of an earlier version names no device."""
    page = page_of(tmp_path, {"COMM": {"0": "k"}}, experiments=("table-1",))
    assert "which were not measured." in page
    kept = json.loads((tmp_path / "costs.json").read_text())
    measured = {"seconds": 0.0123, "peak_bytes": 4_500_000, "threads": 2, "dtype": "bf16"}
    kept["COMM"]["measured"], kept["mae last"]["measured"] = {**measured, "device": "cpu"}, {**measured, "threads": 1}
    write_json(kept, tmp_path / "costs.json")
    page = page_of(tmp_path, {"COMM": {"0": "k"}}, experiments=("table-1",))
    assert "where the study ran (bf16, 1 thread or bf16, 2 threads, cpu)." in page
    assert json.loads((tmp_path / "results.json").read_text())["rows"]["COMM"]["costs"] == {
        **{name: kept["COMM"][name] for name in ("parameters", "flops", "tokens")},
        **{"ms": 12.3, "mb": 4.5, "dtype": "bf16", "threads": 2, "device": "cpu"},
    }


def test_a_measurement_says_where_and_is_taken_in_the_precision_of_the_runs(scale, tmp_path):
    rows, of = {"clip 2": single(scale, scale.encoders[0], 2)}, {}
    for precision, runs in (("bf16", 1), ("fp32", 1), ("fp32", 1), ("bf16", 0)):
        (cost,) = costs(rows, tmp_path / "costs.json", runs=runs, precision=precision).values()
        assert cost["measured"]["device"] in ("cpu", "cuda")
        of.setdefault(cost["measured"]["dtype"], []).append(cost)
    assert [len(of["bf16"]), len(of["fp32"])] == [1, 3]  # measured anew for another precision, not for a report
    assert of["fp32"][0] == of["fp32"][1] == of["fp32"][2]  # once


def test_a_report_that_is_drawn_meanwhile_loses_no_measurement(scale, tmp_path, monkeypatch):
    """The study measures both rows while a report counts the first one, and the second one is there already."""
    rows = {f"clip {layer}": single(scale, scale.encoders[0], layer) for layer in (2, 4)}
    cache, counting = tmp_path / "costs.json", []

    def cost(row, *, runs, precision):
        if not runs and not counting:
            counting.append(row)
            costs(rows, cache, runs=1)
        return {"measured": {"seconds": 1.0, "dtype": precision} if runs else None}

    monkeypatch.setattr("commvlm.study.results._cost", cost)
    told = costs(rows, cache, runs=0)
    kept = json.loads(cache.read_text())
    assert [kept[name]["measured"]["seconds"] for name in rows] == [1.0, 1.0]
    assert told == kept
    other = {"clip 2": single(scale, scale.encoders[0], 3)}
    assert costs(other, cache, runs=0)["clip 2"]["measured"] is None  # of another model


def test_the_papers_mme_is_told_with_how_to_get_ours(scale):
    mme = [PAPER["table-1"].columns.index(f"MME {part}") for part in ("cognition", "perception")]
    assert [PAPER["table-1"].rows["COMM"][place] for place in mme] == [360.4, 1234.9]
    assert {len(row) for row in PAPER["table-1"].rows.values()} == {len(PAPER["table-1"].columns)}
    assert "commvlm evaluate RUN --tasks mme" in _words("table-1", table_1(scale), scale)[0]


def test_the_gallery_has_answers_of_every_set_of_a_task(tmp_path):
    """Two sets of REC whose ids are the same: each has its own answer of the other row, too."""
    places, key = Places(tmp_path), {"COMM": "k", "clip last": "l"}
    for name, run in key.items():
        (places.run(run) / "predictions").mkdir(parents=True)
        for one in ("refcoco-val", "refcoco-testA"):
            picture = tmp_path / f"{one}.png"
            Image.new("RGB", (20, 10)).save(picture)
            asked = Record(
                "1", "rec", str(picture), 20, 10, f"in {one}?", f"{name} on {one}", None, "", ((0, 0, 5, 5),)
            )
            with (places.run(run) / "predictions" / f"rec.{one}.jsonl").open("wb") as file:
                append_records(file, [asked])
    results = Results(
        {"rows": {name: {"runs": {"0": run}} for name, run in key.items()}}, {k: {"key": k} for k in "kl"}
    )
    found = gallery(places, results, load_scale("micro"))
    shown = {picture.question: picture for picture in found.by_lot}
    assert set(shown) == {"in refcoco-val?", "in refcoco-testA?"}
    for one in ("refcoco-val", "refcoco-testA"):
        assert shown[f"in {one}?"].answer == f"COMM on {one}"
        assert shown[f"in {one}?"].others == (("clip last", f"clip last on {one}"),)
