"""Predict and score: nothing lost by a kill, nothing asked twice, the same file gives the same bytes."""

from __future__ import annotations

import errno
import json
import os
import signal
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from commvlm.data.example import BOXES, IMAGE, Example, Turn
from commvlm.evaluate import predictions, shards
from commvlm.evaluate.answerers import chance, majority, mute, oracle
from commvlm.evaluate.predictions import partial_path, read_predictions
from commvlm.evaluate.run import predict, score
from commvlm.evaluate.scores import read_scores, scores_table, write_scores
from commvlm.evaluate.shards import Shard, shard_path, shard_paths

COLOURS = ("red", "green", "blue")
THINGS = ("a small star", "the large ring by the wall", "one tall cup near a box", "two blue doors", "an old lamp")


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> list[Example]:
    """Twelve images, wide and tall; each asked for every task, ids repeating across tasks."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    out: list[Example] = []
    for k in range(12):
        width, height = ((97, 64), (64, 130))[k % 2]
        path = folder / f"{k}.png"
        Image.new("RGB", (width, height)).save(path)
        x, y = rng.uniform(0, 30, size=2)
        box = (float(x), float(y), float(x + rng.uniform(12, 34)), float(y + rng.uniform(12, 34)))
        thing, colour = THINGS[k % len(THINGS)], COLOURS[k % 3]
        captions = (f"{thing} in front of {THINGS[(k + 1) % 5]}", f"there is {thing} that is {colour}")
        out += [
            Example(str(k), "rec", path, (Turn(f"{thing} {k}", BOXES, answer_boxes=((box,),)),)),
            Example(str(k), "reg", path, (Turn(BOXES, thing, ((box,),)),), (thing, f"{thing} {k}")),
            Example(f"{k}y", "pope", path, (Turn("Is there a star?", "yes"),), ("yes",), {"set": "random"}),
            Example(f"{k}n", "pope", path, (Turn("Is there a cat?", "no"),), ("no",), {"set": "random"}),
            Example(
                str(k), "vqa", path, (Turn("What colour?", colour),), (colour,) * 10, {"question_type": "what colour"}
            ),
            Example(str(k), "caption", path, (Turn("", captions[0]),), captions),
        ]
    return out


class Counting:
    """The oracle, which remembers whom it was asked, and does something before batch number `at`."""

    def __init__(self, examples: Sequence[Example], at: int = -1, act: Callable[[], None] = lambda: None) -> None:
        self.answer, self.at, self.act = oracle(examples), at, act
        self.asked: list[Example] = []
        self.batches = 0

    def __call__(self, batch: Sequence[Example]) -> list[str]:
        if self.batches == self.at:
            self.act()
        self.batches += 1
        self.asked += batch
        return self.answer(batch)


def lines(path: Path) -> list[bytes]:
    return path.read_bytes().splitlines(keepends=True)


# --- ceilings and floors ---


def test_the_oracle_is_the_ceiling(examples, tmp_path):
    scores = score(predict(oracle(examples), examples, tmp_path / "p.jsonl", progress=None))
    assert {name: scores[name].value for name in ("rec", "pope", "vqa")} == {"rec": 100, "pope": 100, "vqa": 100}
    assert {name: s.n for name, s in scores.items()} == {"caption": 12, "pope": 24, "rec": 12, "reg": 12, "vqa": 12}
    assert not any(s.unparsable for s in scores.values())
    assert scores["reg"].extra["exact"] == scores["caption"].extra["exact"] == 100
    for task in ("caption", "reg"):
        asked = [e for e in examples if e.task == task]
        for k in (0, 1):
            fixed = predict(
                lambda batch, k=k: [e.references[k] for e in batch], asked, tmp_path / f"{task}{k}", progress=None
            )
            assert score(fixed)[task].value <= scores[task].value + 1e-9


def test_the_mute_one_is_the_floor(examples, tmp_path):
    scores = score(predict(mute, examples, tmp_path / "p.jsonl", progress=None))
    assert {name: s.value for name, s in scores.items()} == {"caption": 0, "pope": 50, "rec": 0, "reg": 0, "vqa": 0}
    assert all(s.unparsable == s.n for s in scores.values())


def test_chance_and_majority_lie_between(examples, tmp_path):
    dealt = score(predict(chance(examples, seed=3), examples, tmp_path / "chance.jsonl", progress=None))
    assert dealt["vqa"].value < 100
    assert dealt["rec"].value < 100
    assert dealt["rec"].unparsable == dealt["pope"].unparsable == 0
    truths = sorted(e.turns[-1].answer for e in examples if e.task == "vqa")
    texts = sorted(r.text for r in read_predictions(tmp_path / "chance.jsonl") if r.task == "vqa")
    assert texts == truths, "chance deals out the truths themselves"
    common = score(predict(majority(examples), examples, tmp_path / "majority.jsonl", progress=None))
    assert common["vqa"].value == pytest.approx(100 / 3)
    assert common["pope"].value == 50
    boxes = {r.text for r in read_predictions(tmp_path / "majority.jsonl") if r.task == "rec"}
    assert len(boxes) == 1
    assert common["rec"].unparsable == 0


def test_the_oracle_does_not_guess(examples):
    stranger = Example("stranger", "vqa", None, (Turn("?", "red"),), ("red",) * 10)
    with pytest.raises(ValueError, match="vqa stranger"):
        oracle(examples)([stranger])


# --- the file ---


def test_a_line_holds_what_scoring_needs(examples, tmp_path):
    path = predict(oracle(examples), examples, tmp_path / "deep" / "p.jsonl", batch_size=5, progress=None)
    written = [json.loads(line) for line in lines(path)]
    assert [(line["task"], line["id"]) for line in written] == [(e.task, e.id) for e in examples]
    first = written[0]
    assert (first["width"], first["height"]) == (97, 64)
    assert first["question"] == f"{IMAGE}\nWhere is a small star 0? Answer with its box."
    (true,) = examples[0].turns[0].answer_boxes[0]
    assert first["boxes"] == [list(true)]
    assert first["parsed"] == pytest.approx(list(true), abs=0.05)
    assert written[1]["asked_boxes"] == [list(true)]
    records = read_predictions(path)
    assert records[3].facts == {"set": "random"}
    assert records[4].references == ("red",) * 10


def test_examples_are_asked_instructed_and_in_batches(examples, tmp_path):
    answer = Counting(examples)
    predict(answer, examples, tmp_path / "p.jsonl", batch_size=7, progress=None)
    assert answer.batches == -(-len(examples) // 7)
    assert all(e.turns[0].question.startswith(f"{IMAGE}\n") for e in answer.asked)


def test_the_bar_counts_answers(examples, tmp_path, capsys):
    predict(mute, examples, tmp_path / "p.jsonl", progress="asking")
    shown = capsys.readouterr().err
    assert "asking" in shown
    assert f"{len(examples)}/{len(examples)}" in shown


# --- kill and resume ---


def test_a_killed_run_goes_on(examples, tmp_path):
    """A real SIGKILL in the third batch, and half a line as a crash in the middle of writing leaves it."""
    whole = predict(oracle(examples), examples, tmp_path / "whole.jsonl", batch_size=4, progress=None)
    path = tmp_path / "p.jsonl"
    child = os.fork()
    if child == 0:
        die = Counting(examples, at=2, act=lambda: os.kill(os.getpid(), signal.SIGKILL))
        predict(die, examples, path, batch_size=4, progress=None)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not path.exists()
    assert len(lines(partial_path(path))) == 8
    with pytest.raises(FileNotFoundError, match="not complete yet"):
        score(path)
    with partial_path(path).open("ab") as file:
        file.write(lines(whole)[8][:40])
    rest = Counting(examples)
    predict(rest, examples, path, batch_size=4, progress=None)
    assert [(e.task, e.id) for e in rest.asked] == [(e.task, e.id) for e in examples[8:]]
    assert path.read_bytes() == whole.read_bytes()
    assert not partial_path(path).exists()


def test_a_finished_run_asks_nothing_and_a_longer_one_asks_the_rest(examples, tmp_path):
    path = predict(oracle(examples), examples[:10], tmp_path / "p.jsonl", progress=None)
    before = path.read_bytes()
    again = Counting(examples)
    predict(again, examples[:10], path, progress=None)
    assert (again.batches, path.read_bytes()) == (0, before)
    predict(again, examples, path, progress=None)
    assert len(again.asked) == len(examples) - 10
    assert path.read_bytes().startswith(before)
    assert len(read_predictions(path)) == len(examples)


def test_a_full_disk_loses_only_the_batch(examples, tmp_path, monkeypatch):
    path = tmp_path / "p.jsonl"
    real, calls = os.fsync, []

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    monkeypatch.setattr(predictions.os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        predict(oracle(examples), examples, path, batch_size=4, progress=None)
    assert not path.exists()
    rest = Counting(examples)
    predict(rest, examples, path, batch_size=4, progress=None)
    assert len(read_predictions(path)) == len(examples)
    assert 0 < len(rest.asked) <= len(examples) - 8  # two batches are there, and maybe what was written of the third


def test_predictions_of_other_examples_are_not_mixed_in(examples, tmp_path):
    path = predict(mute, examples[:6], tmp_path / "p.jsonl", progress=None)
    with pytest.raises(ValueError, match="holds rec 0, which is not asked here"):
        predict(mute, examples[6:], path, progress=None)
    other = Example("0", "rec", examples[0].image, (Turn("a hat", BOXES, answer_boxes=(((0.0, 0.0, 9.0, 9.0),),)),))
    with pytest.raises(ValueError, match="asked rec 0 in other words"):
        predict(mute, [other, *examples[1:6]], path, progress=None)
    partial_path(path).write_bytes(b"")
    with pytest.raises(ValueError, match=r"both .* exist"):
        predict(mute, examples[:7], path, progress=None)


def test_a_kill_after_the_shards_were_put_together_is_tidied_up(examples, tmp_path):
    path = predict(mute, examples[:6], tmp_path / "p.jsonl", progress=None)
    before = path.read_bytes()
    left = partial_path(path).with_name(f"{partial_path(path).name}-0-of-2")
    left.write_bytes(b"".join(before.splitlines(keepends=True)[:3]))
    assert predict(mute, examples[:6], path, progress=None).read_bytes() == before
    assert not left.exists()


# --- refusals ---


@pytest.mark.parametrize(
    ("answers", "message"),
    [
        (lambda batch: ["yes"], "1 answers to 12 examples"),
        (lambda batch: [None] * len(batch), "is no text but NoneType"),
    ],
)
def test_answerers_must_answer(examples, tmp_path, answers, message):
    with pytest.raises(ValueError, match=message):
        predict(answers, examples[:12], tmp_path / "p.jsonl", progress=None)


def test_examples_that_cannot_be_asked(examples, tmp_path):
    path = tmp_path / "p.jsonl"
    with pytest.raises(ValueError, match="two examples of task rec have the id 0"):
        predict(mute, [examples[0], examples[0]], path, progress=None)
    with pytest.raises(ValueError, match="nothing to predict"):
        predict(mute, [], path, progress=None)
    with pytest.raises(ValueError, match="no task 'dialogue'"):
        predict(mute, [Example("0", "dialogue", None, (Turn("hi", "hi"),))], path, progress=None)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        predict(mute, examples, path, batch_size=0, progress=None)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no image")
    asked = Example("0", "vqa", broken, (Turn("?", "red"),), ("red",) * 10)
    with pytest.raises(ValueError, match=r"broken\.png cannot be read as an image"):
        predict(mute, [asked], path, progress=None)
    with pytest.raises(FileNotFoundError):
        predict(mute, [Example("0", "vqa", tmp_path / "gone.png", asked.turns)], path, progress=None)


def without(values: dict, name: str) -> dict:
    return {key: value for key, value in values.items() if key != name}


def changed(**fields: object) -> Callable[[bytes], bytes]:
    return lambda line: json.dumps(json.loads(line) | fields).encode() + b"\n"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda line: b"{oops\n", "line 3: not a line of JSON"),
        (lambda line: line[:30] + b"\n", "line 3: not a line of JSON"),
        (lambda line: b"[1]\n", "line 3: a prediction is a JSON object, this is a list"),
        (lambda line: b"[" * 100_000 + b"\n", "line 3: not a line of JSON"),
        (
            lambda line: json.dumps(without(json.loads(line), "text")).encode() + b"\n",
            "line 3: a prediction lacks text",
        ),
        (changed(mood=1), "line 3: .*unknown mood"),
        (changed(text=1), "line 3: text must be a text"),
        (changed(width=-1), "line 3: width and height"),
        (changed(boxes=[[1, 2]]), "line 3: boxes must be"),
        (changed(width=10**400), "line 3: width and height must be .* below 1,000,000,000"),
        (changed(boxes=[[0, 0, 1, 10**400]]), "line 3: boxes must be .* below 1,000,000,000"),
        (changed(asked_boxes=[[0, 0, 1, float("inf")]]), "line 3: asked_boxes must be"),
        (changed(task="rec", facts={"geometry": "round"}), "line 3: there is no geometry 'round'; geometries: pad-sq"),
        (changed(task="rec", facts={"box_codec": "words"}), "line 3: there is no box text 'words'; codecs: shikra3"),
        (lambda line: line.replace(b'"pope"', b'"poem"'), "line 3: there is no task 'poem'"),
        (lambda line: line + line, "line 4: a second prediction for pope 0y, line 3 holds one"),
    ],
)
def test_a_broken_line_is_named(examples, tmp_path, damage, message):
    path = predict(oracle(examples), examples[:6], tmp_path / "p.jsonl", progress=None)
    content = lines(path)
    path.write_bytes(b"".join([*content[:2], damage(content[2]), *content[3:]]))
    with pytest.raises(ValueError, match=message):
        score(path)


def test_nothing_to_score(tmp_path):
    path = tmp_path / "p.jsonl"
    with pytest.raises(FileNotFoundError, match="predict first"):
        score(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match="holds no predictions"):
        score(path)


# --- scores ---


def test_scoring_repeats_itself_to_the_byte(examples, tmp_path):
    path = predict(chance(examples), examples, tmp_path / "p.jsonl", progress=None)
    first = write_scores(score(path), tmp_path / "a.json").read_bytes()
    shuffled = [lines(path)[int(k)] for k in np.random.default_rng(0).permutation(len(examples))]
    path.write_bytes(b"".join(shuffled))
    assert write_scores(score(path), tmp_path / "b.json").read_bytes() == first


def test_answers_are_read_anew(examples, tmp_path):
    """What an older program read in the answers does not stay in the score."""
    path = predict(oracle(examples), examples, tmp_path / "p.jsonl", progress=None)
    stale = [json.dumps(json.loads(line) | {"parsed": "stale"}) + "\n" for line in lines(path)]
    path.write_text("".join(stale))
    assert score(path)["rec"].value == 100
    assert all(record.parsed != "stale" for record in read_predictions(path))


def test_rules_are_chosen_by_task(examples, tmp_path):
    path = predict(lambda batch: ["Red"] * len(batch), examples, tmp_path / "p.jsonl", progress=None)
    assert score(path)["vqa"].value == 0
    old = score(path, rules={"vqa": "pre2021"})["vqa"]
    assert (old.value, old.rule) == (pytest.approx(100 / 3), "pre2021")
    with pytest.raises(ValueError, match="no task 'vga'"):
        score(path, rules={"vga": "pre2021"})
    with pytest.raises(ValueError, match="vqa has no rule 'old'"):
        score(path, rules={"vqa": "old"})


def test_scores_survive_their_file(examples, tmp_path):
    scores = score(predict(chance(examples), examples, tmp_path / "p.jsonl", progress=None))
    assert read_scores(write_scores(scores, tmp_path / "deep" / "scores.json")) == scores
    (tmp_path / "odd.json").write_text('{"rec": {"value": 1}}')
    with pytest.raises(ValueError, match=r"odd\.json is no file of scores"):
        read_scores(tmp_path / "odd.json")


def test_the_table_shows_figures_with_their_errors(examples, tmp_path):
    ceiling = score(predict(oracle(examples), examples, tmp_path / "o.jsonl", progress=None))
    floor = score(predict(mute, [e for e in examples if e.task == "rec"], tmp_path / "m.jsonl", progress=None))
    table = scores_table({"oracle": ceiling, "mute": floor}).splitlines()
    cells = {row.split("|")[1].strip(): [cell.strip() for cell in row.split("|")[2:-1]] for row in table}
    assert cells["task"] == ["metric", "n", "oracle", "mute"]
    assert cells["rec"] == ["acc@0.5 (standard)", "12", "100.0 ± 0.0", "0.0 ± 0.0 (12 unparsable)"]
    assert cells["vqa"][-1] == "–"
    assert len({len(row) for row in table}) == 1


# --- ranks ---


def ask_as(rank: int, ranks: int, examples: Sequence[Example], path: Path, *, die_at: int = -1) -> int:
    """A process that asks as one rank of several; returns its id."""
    child = os.fork()
    if child == 0:
        try:
            answer = Counting(examples, at=die_at, act=lambda: os.kill(os.getpid(), signal.SIGKILL))
            predict(answer, examples, path, batch_size=4, progress=None, shard=Shard(rank, ranks))
            (path.parent / f"asked-{rank}.json").write_text(
                json.dumps([[e.task, e.id, str(e.image)] for e in answer.asked])
            )
        except BaseException:
            os._exit(1)
        os._exit(0)
    return child


def ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_ranks_share_the_images_and_write_one_file(examples, tmp_path):
    whole = predict(oracle(examples), examples, tmp_path / "whole.jsonl", progress=None)
    path = tmp_path / "p.jsonl"
    assert [ended(child) for child in [ask_as(rank, 3, examples, path) for rank in range(3)]] == [0, 0, 0]
    assert path.read_bytes() == whole.read_bytes()
    assert shard_paths(path) == []
    asked = [json.loads((tmp_path / f"asked-{rank}.json").read_text()) for rank in range(3)]
    assert sum(map(len, asked)) == len(examples)
    images = [{image for *_, image in each} for each in asked]
    assert all(len(each) == 4 for each in images)
    assert len(set.union(*images)) == 12


def test_a_killed_rank_goes_on_with_another_number_of_ranks(examples, tmp_path, monkeypatch):
    whole = predict(oracle(examples), examples, tmp_path / "whole.jsonl", progress=None)
    path = tmp_path / "p.jsonl"
    assert ended(ask_as(0, 2, examples, path, die_at=2)) == -signal.SIGKILL
    with shard_path(path, Shard(0, 2)).open("ab") as file:
        file.write(b'{"id": "half')
    monkeypatch.setattr(shards, "POLL", 0.01)
    with pytest.raises(ValueError, match=r"p\.jsonl: the answer to rec \d+ does not come, another rank has stopped"):
        shards.gather(path, [(e.task, e.id) for e in examples], Shard(1, 2), patience=0.05)
    alone = Counting(examples)
    predict(alone, examples, path, batch_size=4, progress=None)
    assert len(alone.asked) == len(examples) - 8
    assert path.read_bytes() == whole.read_bytes()
    assert shard_paths(path) == []


def test_more_questions_with_more_ranks(examples, tmp_path):
    path = predict(oracle(examples), examples[:12], tmp_path / "p.jsonl", progress=None)
    assert [ended(child) for child in [ask_as(rank, 2, examples, path) for rank in range(2)]] == [0, 0]
    assert [(r.task, r.id) for r in read_predictions(path)] == [(e.task, e.id) for e in examples]


def test_ranks_that_cannot_be():
    with pytest.raises(ValueError, match="rank 2 of 2 cannot be"):
        Shard(2, 2)


def test_questions_about_one_image_are_asked_together(examples, tmp_path):
    """Whatever the order of the file: an image is seen in one stretch."""
    mixed = [examples[int(k)] for k in np.random.default_rng(3).permutation(len(examples))]
    answer = Counting(examples)
    predict(answer, mixed, tmp_path / "p.jsonl", batch_size=7, progress=None)
    seen = [e.image for e in answer.asked]
    assert sum(a != b for a, b in pairwise(seen)) == 11
    assert [image for k, image in enumerate(seen) if image not in seen[:k]] == list(
        dict.fromkeys(e.image for e in mixed)
    )
