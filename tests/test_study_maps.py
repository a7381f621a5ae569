"""Figure 1 in the study: drawn from the encoders alone, once, at the object that a question asks about."""

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from commvlm.cli import main
from commvlm.microworld.writer import write_world
from commvlm.study import maps
from commvlm.study.settings import load_scale

SCALE = (
    "name: small\nrecipe: micro\nencoders: [{name: clip, checkpoint: 'micro:clip'}, {name: mae, checkpoint: 'micro:mae'}]\n"
    "pair: [clip, mae]\nlayers: [4, 8]\nseeds: 2\nworld: {train: 8, test: 4}\n"
)


def test_figure_1_needs_no_run_and_is_drawn_once(tmp_path, capsys):
    (tmp_path / "small.yaml").write_text(SCALE)
    words = ["study", "figure-1", "--scale", str(tmp_path / "small.yaml"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    pictures = sorted((tmp_path / "out" / "figures").glob("*.png"))
    assert [p.name for p in pictures] == ["figure-1-1.png", "figure-1-2.png"]
    assert all(np.asarray(Image.open(p).convert("L")).std() > 10 for p in pictures)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png") == 2
    assert "0 of 0 runs" in page
    stamps = [p.stat().st_mtime_ns for p in pictures]
    assert main([*words, "--report"]) == 0
    assert main(words) == 0
    assert [p.stat().st_mtime_ns for p in pictures] == stamps
    (tmp_path / "small.yaml").write_text(SCALE.replace("'micro:mae'", "'micro:deit'"))
    assert main(words) == 0  # another encoder is another picture
    assert [p.stat().st_mtime_ns for p in pictures] != stamps
    capsys.readouterr()


def test_the_marked_point_is_the_middle_of_the_box_that_is_asked_for(tmp_path, monkeypatch):
    world = write_world(tmp_path / "world", train=8, test=4)
    seen = []
    monkeypatch.setattr(
        maps, "draw_maps", lambda image, places, out, at, side: seen.append((image.size, at, len(places)))
    )
    scale = replace(load_scale("micro"), encoders=load_scale("micro").encoders[:2])
    maps.draw_figure_1(scale, world, tmp_path / "figures")
    from commvlm.microworld.scene import sample_scene

    assert len(seen) == 2
    for index, (size, at, encoders) in enumerate(seen):
        centers = {thing.center for thing in sample_scene("test", index).things}
        assert at in centers
        assert size == (64, 64)
        assert encoders == 2


def test_a_recipe_that_asks_for_no_box_is_told(tmp_path):
    scale = load_scale("micro")
    vqa = [source for source in scale.base.evaluate.sources if source.name == "vqa"]
    bare = replace(scale.base, evaluate=replace(scale.base.evaluate, sources=vqa))
    scale.__dict__["base"] = bare
    with pytest.raises(ValueError, match="asks for a box"):
        maps.draw_figure_1(scale, write_world(tmp_path / "world", train=8, test=4), tmp_path / "figures")
