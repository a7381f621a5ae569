"""Results as one file: what comes out of it is what went in, and nothing that is no result comes in."""

import json
import lzma
from pathlib import Path

import pytest

from commvlm.study.bundle import keep, pack, read_bundle
from commvlm.study.checks import checked
from commvlm.study.runs import Places
from commvlm.study.study import asked, take

SHIPPED = Path(__file__).parents[1] / "docs" / "results" / "micro.runs.jsonl.xz"
KEYS = ["0123456789abcdef", "fedcba9876543210"]
TALLY = {"images": ["a.png", "b.png"], "groups": [""], "sums": [[1.0], [0.5]], "counts": [[1], [2]]}
FACTS = {"gradient_norm": 0.1, "spread": 1.0, "rank": 3.0}


def result(key: str, **changes: object) -> dict[str, object]:
    score = {"metric": "acc", "rule": "iou", "value": 50.0, "n": 3, "unparsable": 0}
    said = {"name": "tiny: clip 8", "key": key, "seconds": {"train": 2.0, "evaluate": 1.0}, "scores": {"rec": score}}
    said |= {"tallies": {"rec": TALLY}, "layer_weights": {"clip": {"1": 0.5}}, "losses": [["align", 10, 1.5]]}
    said |= {"alignments": {"mae": {"start": [FACTS], "end": [FACTS]}}, "versions": {"torch": "2"}}
    return {**said, **changes}


def places_with(folder, *results) -> Places:
    places = Places(folder)
    (folder / "results").mkdir(parents=True)
    for one in results:
        places.result(one["key"]).write_text(json.dumps(one))
    runs = {str(seed): key for seed, key in enumerate(KEYS)}
    (folder / "grid.json").write_text(json.dumps({"rows": {"clip 8": {"runs": runs}}}))
    return places


def packed(path, *results):
    path.write_bytes(lzma.compress("".join(f"{json.dumps(one)}\n" for one in results).encode()))
    return path


def taken(source, keys, places) -> int:
    found = read_bundle(source, keys, places, tasks=["rec"])
    keep(found, source, places)
    return len(found)


def test_what_was_packed_is_what_is_taken_and_says_whence(tmp_path):
    here, there = places_with(tmp_path / "here", *map(result, KEYS)), places_with(tmp_path / "there")
    assert [pack(here, tmp_path / name) for name in ("a.xz", "b.xz")] == [2, 2]
    assert (tmp_path / "a.xz").read_bytes() == (tmp_path / "b.xz").read_bytes()
    assert taken(tmp_path / "a.xz", KEYS, there) == 2
    got = [json.loads(there.result(key).read_text()) for key in KEYS]
    assert got == [{**result(key), "from": "a.xz"} for key in KEYS]
    pack(there, tmp_path / "c.xz")
    last = places_with(tmp_path / "last")
    taken(tmp_path / "c.xz", KEYS, last)
    assert json.loads(last.result(KEYS[0]).read_text())["from"] == "a.xz"


def test_only_what_is_asked_for_and_lacks_is_taken(tmp_path):
    both = packed(tmp_path / "a.xz", *map(result, KEYS))
    there = places_with(tmp_path / "there", result(KEYS[0], name="mine"))
    assert taken(both, ["0" * 16], there) == 0
    assert taken(both, KEYS[:1], there) == 0
    assert not there.result(KEYS[1]).exists()
    assert taken(both, KEYS, there) == 1
    assert json.loads(there.result(KEYS[0]).read_text())["name"] == "mine"


def test_two_files_one_after_the_other_are_one(tmp_path):
    one, other = (packed(tmp_path / key, result(key)) for key in KEYS)
    (tmp_path / "both.xz").write_bytes(one.read_bytes() + other.read_bytes())
    assert taken(tmp_path / "both.xz", KEYS, places_with(tmp_path / "there")) == 2


def test_what_cannot_be_packed_is_told_and_leaves_nothing(tmp_path):
    target = tmp_path / "out" / "a.xz"
    with pytest.raises(ValueError, match="no run is done"):
        pack(places_with(tmp_path / "empty"), target)
    broken = places_with(tmp_path / "broken", result(KEYS[0]), result(KEYS[1], losses="none"))
    with pytest.raises(ValueError, match=f"{KEYS[1]}.json: losses must be of type list"):
        pack(broken, target)
    with pytest.raises(ValueError, match="is a folder: name the file"):
        pack(places_with(tmp_path / "here", result(KEYS[0])), tmp_path)
    assert not target.parent.exists()


def tally(**changes: object) -> str:
    return json.dumps(result(KEYS[1], tallies={"rec": {**TALLY, **changes}}))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "no JSON"),
        (json.dumps(result(KEYS[1])).replace("1.5", "NaN"), "no JSON of finite numbers"),
        (json.dumps(result(KEYS[1])).replace("1.5", "1e999"), "no JSON of finite numbers"),
        (json.dumps(result(KEYS[1], name="\ud800")), "no JSON of finite numbers and whole characters"),
        ("[" * 100_000, "no JSON"),
        ("7", "a result is an object"),
        (json.dumps(result("../../../../etc/passwd")), "key '../../../../etc/passwd' is none of a run"),
        (json.dumps(result(KEYS[0])), f"key {KEYS[0]} is there twice"),
        (json.dumps(result(KEYS[1], losses="none")), "losses must be of type list"),
        (json.dumps(result(KEYS[1], losses=[["align", 10**400, 1.0]])), r"losses are \[stage, step, loss\] each"),
        (json.dumps(result(KEYS[1], seconds={"train": 1})), "seconds must be numbers"),
        (json.dumps(result(KEYS[1], seconds={"train": 1, "evaluate": 1, "x": 1})), "seconds must be numbers"),
        (json.dumps(result(KEYS[1], scores={"\x1b[2J": {"value": 1}})), r"'\\x1b\[2J' is no task"),
        (json.dumps(result(KEYS[1], scores={"rec": {"value": 1}})), r"scores\.rec must say metric, rule"),
        (json.dumps(result(KEYS[1], tallies={"rec": TALLY, "": TALLY})), "'' is no task, set of one or reading of it"),
        (
            json.dumps(result(KEYS[1], tallies={"rec": TALLY, r"rec $\x$": TALLY})),
            ".* is no task, set of one or reading",
        ),
        (tally(sums=[[1.0]]), "tallies.rec must have sums and counts"),
        (tally(sums=[[10**400], [1]]), "tallies.rec must have sums and counts"),
        (tally(sums=[["nan"], [1]]), "tallies.rec must have sums and counts"),
        (tally(sums=[[None], [1]]), "tallies.rec must have sums and counts"),
        (tally(counts=[[0], [0]]), "tallies.rec must have sums and counts"),
        (tally(images=[], sums=[], counts=[]), "tallies.rec must have sums and counts"),
        (tally(sums=[[9.0], [18.0]]), "tallies.rec must have whole counts, and sums of marks from 0 to 1"),
        (tally(sums=[[-0.5], [2.0]]), "tallies.rec must have whole counts, and sums of marks from 0 to 1"),
        (tally(counts=[[1], [2.5]]), "tallies.rec must have whole counts, and sums of marks from 0 to 1"),
        (tally(sums=[[1.0], [0.6]]), r"tallies.rec is 53.33 and must be scores.rec.value, 50.00"),
        (tally(images=["a.png", "c.png"]), "tallies.rec is about other images or questions"),
        (json.dumps(result(KEYS[1], tallies={}, scores={})), "its tasks are , not rec"),
        (json.dumps(result(KEYS[1], tallies={})), "its tallies are , not rec"),
        (json.dumps(result(KEYS[1], tallies={"rec": TALLY, "rec mean_iou": TALLY})), "its tallies are rec"),
        (json.dumps(result(KEYS[1], layer_weights={"clip": 5})), "layer_weights.clip must be numbers by layer"),
        (
            json.dumps(result(KEYS[1], layer_weights={"clip": {"$\\x$": 1}})),
            "layer_weights.clip must be numbers by layer",
        ),
        (json.dumps(result(KEYS[1], alignments={"mae": {}})), "alignments.mae must say gradient_norm, rank"),
        (json.dumps(result(KEYS[1], versions={"torch": 2})), "from and versions must be texts"),
    ],
)
def test_a_file_with_a_bad_line_is_refused_as_a_whole(tmp_path, line, message):
    (tmp_path / "bad.xz").write_bytes(lzma.compress(f"{json.dumps(result(KEYS[0]))}\n{line}\n".encode()))
    there = places_with(tmp_path / "there")
    with pytest.raises(ValueError, match=f"bad.xz, line 2: {message}"):
        taken(tmp_path / "bad.xz", KEYS, there)
    assert not list((tmp_path / "there" / "results").iterdir())


def test_results_of_other_questions_than_those_here_are_refused(tmp_path):
    other = {"rec": {**TALLY, "counts": [[2], [1]]}}
    source = packed(tmp_path / "a.xz", result(KEYS[0], tallies=other))
    with pytest.raises(ValueError, match=r"a\.xz, line 1: tallies\.rec is about other images or questions"):
        taken(source, KEYS, places_with(tmp_path / "there", result(KEYS[1])))


@pytest.mark.parametrize(("name", "most"), [("caption", 10), ("reg.refcocog-test", 10), ("vqa", 1)])
def test_marks_are_at_most_the_highest_of_their_task(name, most):
    """Of several sets the score is the mean, of CIDEr times 100."""
    said = {"images": ["a.png"], "groups": ["one", "other"], "counts": [[2, 1]]}
    for high, low in ((most, most / 2), (most + 0.01, 1.0)):
        whole = {"metric": "m", "rule": "r", "value": 50.0 * (high + low), "n": 3, "unparsable": 0}
        tallies = {name: {**said, "sums": [[2.0 * high, low]]}}
        line = json.dumps(result(KEYS[0], scores={name: whole}, tallies=tallies))
        if high == most:
            checked(line, "here")
            continue
        with pytest.raises(ValueError, match=f"here: tallies.{name} must have .* sums of marks from 0 to {most}$"):
            checked(line, "here")


def test_the_results_in_the_docs_are_possible():
    lines = lzma.decompress(SHIPPED.read_bytes()).decode().splitlines()
    assert len({checked(line, "here")["key"] for line in lines}) == len(lines)


@pytest.mark.slow
def test_the_results_in_the_docs_are_those_of_the_shipped_scale(tmp_path):
    wanted = asked(["all"], scale="micro", out=tmp_path, seeds=None, data=None)
    told, done = take(wanted, SHIPPED)
    assert told == done == len(lzma.decompress(SHIPPED.read_bytes()).splitlines())


def test_a_file_of_another_kind_is_refused(tmp_path):
    there, good = places_with(tmp_path / "there"), packed(tmp_path / "good", result(KEYS[0])).read_bytes()
    for name, content, message in (
        ("text", b"hello", "is no file that `commvlm study --export` wrote"),
        ("short", good[:-20], "it ends too early"),
        ("tail", good + b"hello", "is no file that"),
        ("cut", lzma.compress(b"{}"), "its last line is cut off"),
        ("bomb", lzma.compress(b"x" * (9 << 20)), "more than 8,388,608 bytes a line"),
        ("bytes", lzma.compress(b"\xff\xfe\n"), "is no file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            taken(tmp_path / name, KEYS, there)
    with pytest.raises(ValueError, match="No such file"):
        taken(tmp_path / "absent", KEYS, there)
