"""Receipts: what made a score, why two differ, and one file under every rule."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from commvlm.cli import main
from commvlm.data.example import Example, Turn
from commvlm.evaluate.differences import differences
from commvlm.evaluate.predictions import read_predictions
from commvlm.evaluate.receipts import fingerprint, read_receipt, receipt, versions, write_json
from commvlm.evaluate.rescore import rescore, rescored_table
from commvlm.evaluate.run import predict, score


def asked(number: int = 12, *, words: str = "Is there a cup") -> list[Example]:
    return [
        Example(str(k), "pope", None, (Turn(f"{words} {k}?", ("yes", "no")[k % 2]),), (("yes", "no")[k % 2],))
        for k in range(number)
    ]


def made(folder: Path, name: str, texts: list[str], *, words: str = "Is there a cup", **changed: Any) -> dict[str, Any]:
    """The receipt of answers to `asked`."""
    folder.mkdir(exist_ok=True)
    examples = asked(len(texts), words=words)
    path = predict(lambda batch: [texts[int(e.id)] for e in batch], examples, folder / f"{name}.jsonl", progress=None)
    (folder / "questions.json").write_text(words)
    found = score(path, rules={"pope": changed.pop("rule", "official")})["pope"]
    given: dict[str, Any] = {
        "split": "random", "files": {"questions": folder / "questions.json"},
        "made": {"model": {"sha256": "a"}, "decoding": {"batch": 16}},
    }  # fmt: skip
    return receipt(found, read_predictions(path), predictions=path, seconds=1.5, **{**given, **changed})


def test_a_receipt_holds_what_made_the_score(tmp_path):
    found = made(tmp_path, "a", ["yes", "no"] * 5 + ["The answer is yes.", "perhaps"])
    assert (found["task"], found["rule"], found["n"], found["unparsable"], found["unwrapped"]) == (
        "pope", "official", 12, 1, 1,
    )  # fmt: skip
    assert found["value"] == pytest.approx(100 * 11 / 12)
    assert found["interval"][0] < found["value"] <= found["interval"][1]
    content = (tmp_path / "questions.json").read_bytes()
    assert found["files"]["questions"]["sha256"] == hashlib.sha256(content).hexdigest()
    assert found["predictions"]["bytes"] == (tmp_path / "a.jsonl").stat().st_size
    assert found["prompt"]["first"] == "Is there a cup 0? Answer yes or no."
    assert {"python", "torch", "transformers", "commvlm"} <= set(found["versions"]) == set(versions())
    assert read_receipt(write_json(found, tmp_path / "receipt.json")) == found


def test_a_folder_has_a_fingerprint(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name / "deep").mkdir(parents=True)
        (tmp_path / name / "one.txt").write_text("1")
        (tmp_path / name / "deep" / "two.txt").write_text("22")
    assert fingerprint(tmp_path / "a") == fingerprint(tmp_path / "b") | {"file": "a"}
    assert fingerprint(tmp_path / "a")["bytes"] == 3
    (tmp_path / "b" / "deep" / "two.txt").rename(tmp_path / "b" / "two.txt")
    assert fingerprint(tmp_path / "a")["sha256"] != fingerprint(tmp_path / "b")["sha256"]


GOOD, BAD = ["yes", "no"] * 6, ["yes"] * 12


def test_equal_receipts_say_so(tmp_path):
    a = made(tmp_path, "a", GOOD)
    said = differences(a, a)
    assert said[0] == "The receipts agree in everything that makes a score."
    assert len(said) == 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"rule": "strict"}, ["scored by the rule official, B by strict", "The answers are the same, byte for byte"]),
        ({"split": "popular"}, ["A is on the split random, B on popular"]),
        ({"made": {"model": {"sha256": "b"}, "decoding": {"batch": 16}}}, ["answered with model.sha256 a, B with b"]),
        ({"made": {"model": {"sha256": "a"}, "decoding": {"batch": 1}}}, ["answered with decoding.batch 16, B with 1"]),
        ({"made": None}, ["at least one receipt does not say who made them"]),
        (
            {"words": "Do you see a cup"},
            ["were asked in other words: A began with 'Is there a cup 0?", "different files (q"],
        ),
    ],
)
def test_each_cause_is_told(tmp_path, change, words):
    a = made(tmp_path / "a", "a", [*GOOD[:11], "No way"])
    same = "rule" in change
    b = made(tmp_path / "b", "a", [*GOOD[:11], "No way"] if same else BAD, **change)
    said = differences(a, b)
    for text in words:
        assert any(text in sentence for sentence in said), said
    assert not any("agree in everything" in sentence for sentence in said)


def test_the_gap_is_weighed(tmp_path):
    a, b = made(tmp_path, "a", GOOD * 10), made(tmp_path, "b", BAD * 10)
    assert "B is 50.00 below A" in differences(a, b)[-1]
    assert "more than chance" in differences(a, b)[-1]
    almost = made(tmp_path, "c", [*(GOOD * 10)[:-1], "yes"])
    assert "within what other images would change" in differences(made(tmp_path, "d", [*GOOD[:-1], "yes"]), almost)[-1]
    fewer = differences(a, made(tmp_path, "e", GOOD))
    assert any("A is the mean of 120 items, B of 12" in sentence for sentence in fewer)


def test_unwrapped_and_unparsable_answers_are_told(tmp_path):
    said = differences(made(tmp_path, "a", GOOD), made(tmp_path, "b", ["The answer is yes.", "hm"] * 6))
    assert "0 of A's answers and 6 of B's could not be read." in said
    assert any("was taken off 0 of A's answers, 6 of B's" in sentence for sentence in said)


def test_a_receipt_of_the_least_fields_is_compared(tmp_path, capsys):
    least = {"task": "pope", "rule": "official", "value": 40.0, "n": 12, "files": {"questions": {}}, "versions": {}}
    bare, full = (
        write_json(value, tmp_path / f"{n}.json") for n, value in enumerate((least, made(tmp_path, "a", GOOD)))
    )
    assert main(["receipts", "diff", str(bare), str(full)]) == 0
    said = capsys.readouterr().out
    assert "B is 60.00 above A (40.00 and 100.00); without standard errors" in said
    assert "could not be read" not in said
    assert "wrapper" not in said
    assert main(["receipts", "diff", str(bare), str(bare)]) == 0


def test_what_is_no_receipt(tmp_path, capsys):
    good = write_json(made(tmp_path, "a", GOOD), tmp_path / "good.json")
    for content, text in (
        ("{", "is no JSON"),
        ("[]", "is no receipt: it has no task"),
        ('{"task": "pope"}', "no rule"),
    ):
        (tmp_path / "bad.json").write_text(content)
        assert main(["receipts", "diff", str(good), str(tmp_path / "bad.json")]) == 2
        assert text in capsys.readouterr().err
    assert main(["receipts", "diff", str(good), str(tmp_path / "gone.json")]) == 2
    assert "gone.json" in capsys.readouterr().err
    assert main(["receipts", "diff", str(good), str(good), "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)) == 2


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"value": "high"}, "value is 'high', which is no float"),
        ({"value": True}, "value is 'True'"),
        ({"files": ["a"]}, "files is"),
        ({"files": {"references": "a.json"}}, "files.references is no fingerprint"),
        ({"predictions": "abc"}, "predictions is 'abc', which is no dict"),
        ({"standard_error": "x"}, "standard_error is 'x'"),
        ({"interval": [1]}, "interval is [1], it must be two numbers"),
        ({"interval": [1, None]}, "must be two numbers"),
        ({"made": 3}, "made is '3'"),
    ],
)
def test_entries_of_other_kinds_are_named(tmp_path, capsys, changed, text):
    good = made(tmp_path, "a", GOOD)
    path = write_json(good, tmp_path / "good.json")
    bad = write_json(good | changed, tmp_path / "bad.json")
    assert main(["receipts", "diff", str(path), str(bad)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"commvlm: error: {bad}: ")
    assert text in error
    assert error.count("\n") == 1


def test_an_offline_score_has_a_receipt(tmp_path, capsys):
    rows = [
        {"question_id": k, "image": f"{k // 2}.jpg", "text": "Is it?", "label": ("yes", "no")[k % 2]} for k in range(4)
    ]
    (tmp_path / "refs.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "said.jsonl").write_text(
        "".join(json.dumps({"question_id": k, "answer": "yes"}) + "\n" for k in range(4))
    )
    argv = ["score", "pope", "--references", str(tmp_path / "refs.json"), "--predictions", str(tmp_path / "said.jsonl")]
    assert main([*argv, "--receipt", str(tmp_path / "r.json"), "--marks", str(tmp_path / "m.json")]) == 0
    assert "accuracy         0.500000" in capsys.readouterr().out
    found = read_receipt(tmp_path / "r.json")
    assert (found["value"], found["n"], found["split"], found["made"]) == (50, 4, "refs", None)
    assert set(found["files"]) == {"references"}
    assert json.loads((tmp_path / "m.json").read_text()) == {"0": 1, "1": 0, "2": 1, "3": 0}


# --- one file under every rule ---


def test_where_the_points_go(tmp_path, capsys):
    texts = [
        "yes",
        "no",
        "The answer is yes.",
        "The answer is no.",
        "Yes, there is",
        "No",
        "YES!",
        "NO",
        "",
        "nope",
        "yes",
        "no",
    ]
    path = predict(lambda batch: [texts[int(e.id)] for e in batch], asked(12), tmp_path / "p.jsonl", progress=None)
    found = {entry.rule: entry for entry in rescore(path)}
    assert next(iter(found)) == "official"
    assert set(found) == {"official", "strict", "shikra", "lmms-eval", "vlmevalkit", "official, wrappers kept"}
    # Truths go yes, no, yes, no, ...; officially "NO" and "nope" are a yes, and so is silence.
    assert found["official"].score.value == pytest.approx(100 * 10 / 12)
    assert [id for id, *_ in found["strict"].lost] == ["4", "6", "8"]
    assert [id for id, *_ in found["strict"].gained] == ["7"]
    assert found["shikra"].score.value == pytest.approx(100 * 2 / 12)
    assert [id for id, *_ in found["lmms-eval"].gained] == ["7"]
    assert found["vlmevalkit"].score.value == pytest.approx(100 * 10 / 12)
    kept = found["official, wrappers kept"]
    assert (kept.gained, kept.lost) == ((), ())
    table = rescored_table(list(found.values()))
    assert "less: 4: 'Yes, there is' (true: 'yes')" in table
    assert main(["rescore", str(path), "--all-rules"]) == 0
    assert capsys.readouterr().out.strip() == table.strip()
    assert main(["rescore", str(path), "--rule", "strict", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pope"]["rule"] == "strict"
    for rule in ("lenient", "evalai"):  # a rule of none, and one of VQA
        assert main(["rescore", str(path), "--rule", rule]) == 2
        said = f"p.jsonl has a rule '{rule}': choose one of official, strict, shikra, lmms-eval, vlmevalkit\n"
        assert capsys.readouterr().err.endswith(said)
    assert main(["rescore", str(tmp_path / "gone.jsonl"), "--all-rules"]) == 2


def test_a_rule_that_cannot_run_says_why(tmp_path, monkeypatch):
    from commvlm.evaluate.metrics import tokenizers

    monkeypatch.setattr(tokenizers, "find_spec", lambda name: None)
    examples = [Example(str(k), "caption", None, (Turn("", "a cat"),), ("a cat", f"cat {k}")) for k in range(3)]
    path = predict(lambda batch: ["a cat"] * len(batch), examples, tmp_path / "p.jsonl", progress=None)
    found = {entry.rule: entry for entry in rescore(path)}
    assert found["ptb"].score is None
    assert "commvlm[caption]" in rescored_table(list(found.values()))
    assert found["vlmevalkit"].score is not None
