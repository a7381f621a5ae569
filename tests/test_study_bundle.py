"""Results as one file: what comes out of it is what went in, and nothing that is no result comes in."""

import json
import lzma

import pytest

from commvlm.study.bundle import pack, unpack
from commvlm.study.runs import Places

KEYS = ["0123456789abcdef", "fedcba9876543210"]


def result(key: str, **changes: object) -> dict[str, object]:
    tally = {"images": ["a.png", "b.png"], "groups": [""], "sums": [[1.0], [0.5]], "counts": [[1], [2]]}
    score = {"metric": "acc", "rule": "iou", "value": 50.0, "n": 3, "unparsable": 0}
    said = {"name": "tiny: clip 8", "key": key, "seconds": {"train": 2.0, "evaluate": 1.0}, "scores": {"rec": score}}
    said |= {"tallies": {"rec": tally}, "layer_weights": {}, "losses": [["align", 10, 1.5]], "alignments": {}}
    return {**said, "versions": {"torch": "2"}, **changes}


def places_with(folder, *results) -> Places:
    places = Places(folder)
    (folder / "results").mkdir(parents=True)
    for one in results:
        places.result(one["key"]).write_text(json.dumps(one))
    return places


def test_what_was_packed_is_what_is_unpacked(tmp_path):
    here = places_with(tmp_path / "here", *(result(key) for key in KEYS))
    there = places_with(tmp_path / "there")
    assert pack(here, KEYS, tmp_path / "a.xz") == 2
    assert pack(here, [*KEYS[::-1], "0" * 16], tmp_path / "b.xz") == 2
    assert (tmp_path / "a.xz").read_bytes() == (tmp_path / "b.xz").read_bytes()
    assert unpack(tmp_path / "a.xz", KEYS, there) == 2
    assert [json.loads(there.result(key).read_text()) for key in KEYS] == [result(key) for key in KEYS]


def test_only_what_is_asked_for_and_lacks_is_taken(tmp_path):
    pack(places_with(tmp_path / "here", *(result(key) for key in KEYS)), KEYS, tmp_path / "a.xz")
    there = places_with(tmp_path / "there", result(KEYS[0], name="mine"))
    assert unpack(tmp_path / "a.xz", ["0" * 16], there) == 0
    assert unpack(tmp_path / "a.xz", KEYS[:1], there) == 0
    assert not there.result(KEYS[1]).exists()
    assert unpack(tmp_path / "a.xz", KEYS, there) == 1
    assert json.loads(there.result(KEYS[0]).read_text())["name"] == "mine"


def test_where_nothing_is_done_nothing_is_packed(tmp_path):
    with pytest.raises(ValueError, match="no run is done"):
        pack(places_with(tmp_path / "here"), KEYS, tmp_path / "a.xz")
    assert not (tmp_path / "a.xz").exists()


BAD_TALLY = {"rec": {"images": ["a"], "groups": [""], "sums": [[1.0], [2.0]], "counts": [[1]]}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: no JSON"),
        (json.dumps(result(KEYS[1])).replace("1.5", "NaN"), "line 2: no JSON of finite numbers"),
        ("[" * 100_000, "line 2: no JSON"),
        ("7", "line 2: a result is an object"),
        (json.dumps(result("../../../../etc/passwd")), "line 2: key '../../../../etc/passwd' is none of a run"),
        (json.dumps(result(KEYS[1], losses="none")), "line 2: losses must be of type list"),
        (json.dumps(result(KEYS[1], losses=[["align", "ten", 1.0]])), r"line 2: losses are \[stage, step, loss\] each"),
        (json.dumps(result(KEYS[1], seconds={"train": "long"})), "line 2: seconds.train must be a number"),
        (json.dumps(result(KEYS[1], scores={"rec": {"value": 1}})), "line 2: scores.rec must say metric, rule"),
        (json.dumps(result(KEYS[1], tallies=BAD_TALLY)), "line 2: tallies.rec has no sums and counts"),
        (json.dumps(result(KEYS[1], tallies={"rec": {"images": ["a"]}})), "line 2: tallies.rec has no sums and counts"),
    ],
)
def test_a_file_with_a_bad_line_is_refused_as_a_whole(tmp_path, line, message):
    (tmp_path / "bad.xz").write_bytes(lzma.compress(f"{json.dumps(result(KEYS[0]))}\n{line}\n".encode()))
    there = places_with(tmp_path / "there")
    with pytest.raises(ValueError, match=message):
        unpack(tmp_path / "bad.xz", KEYS, there)
    assert not list((tmp_path / "there" / "results").iterdir())


def test_a_file_of_another_kind_is_refused(tmp_path):
    there, good = places_with(tmp_path / "there"), lzma.compress(json.dumps(result(KEYS[0])).encode() + b"\n")
    for name, content, message in (
        ("text", b"hello", "is no file that `commvlm study --export` wrote"),
        ("short", good[:-20], "it ends too early"),
        ("cut", lzma.compress(b"{}"), "its last line is cut off"),
        ("bomb", lzma.compress(b"x" * (9 << 20)), "a line is longer than"),
        ("bytes", lzma.compress(b"\xff\xfe\n"), "is no file"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=message):
            unpack(tmp_path / name, KEYS, there)
    with pytest.raises(ValueError, match="No such file"):
        unpack(tmp_path / "absent", KEYS, there)
