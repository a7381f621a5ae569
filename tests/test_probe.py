"""Probes: truth on patches, heads, scores and intervals, each against arithmetic of its own."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from commvlm.app import probing
from commvlm.app.probe_report import write_into
from commvlm.cli import main
from commvlm.data.boxes import box_iou
from commvlm.data.geometry import PadSquare
from commvlm.microworld.readout import micro_problem
from commvlm.model.merges import MERGES
from commvlm.model.spec import EncoderSpec
from commvlm.probe import fitting, tasks
from commvlm.probe.advise import advise, costs
from commvlm.probe.curves import Probe
from commvlm.probe.findings import findings
from commvlm.probe.heads import new_head
from commvlm.probe.problem import Picture, Problem, Thing, patch_centers, truth_of
from commvlm.probe.run import Settings, run_probe
from commvlm.probe.tasks import Effort, Material
from commvlm.probe.trained import read_trained
from commvlm.train.assemble import located

WORDS = ("star", "cup", "red")


def picture(name: str, *things: Thing, size: tuple[int, int] = (64, 64)) -> Picture:
    return Picture(name, size, partial(Image.new, "RGB", size), things)


def thing(box: Sequence[float], *words: str) -> Thing:
    return Thing(tuple(map(float, box)), words, (words,))  # type: ignore[arg-type]


class TestTruth:
    def test_a_patch_is_owned_by_what_covers_most_of_it(self):
        found = truth_of(WORDS, [picture("a", thing((0, 0, 24, 16), "star"), thing((20, 0, 32, 16), "cup"))], (4, 4))
        # Patches are 16 wide. The star covers all of the first and half of the second, the cup three quarters of the second.
        assert found.owner[0].tolist() == [0, 1, *[-1] * 14]
        assert found.boxes[0].tolist() == [0, 0, 24 / 64, 16 / 64]
        assert found.words.tolist() == [[1, 0, 0], [0, 1, 0]]
        assert found.present.tolist() == [[1, 1, 0]]

    def test_a_quarter_is_not_enough_but_a_small_thing_has_its_centre(self):
        found = truth_of(WORDS, [picture("a", thing((4, 4, 12, 12), "star"), thing((30, 30, 31, 31), "cup"))], (4, 4))
        assert found.owner[0, 0] == 0  # 64 of 256 pixels, not more than a quarter: by its centre
        assert found.owner[0, 1 * 4 + 1] == 1

    def test_a_padded_image_is_asked_about_where_it_is_shown(self):
        """64 x 32 pixels: the padding puts 16 rows above, so a box at the top lies in the second quarter."""
        found = truth_of(WORDS, [picture("a", thing((0, 0, 16, 16), "star"), size=(64, 32))], (4, 4))
        assert found.owner[0].tolist().index(0) == 4
        assert found.boxes[0].tolist() == [0, 0.25, 0.25, 0.5]
        assert found.pixels[0] == (0, 0, 16, 16)

    def test_centers_are_row_major(self):
        assert patch_centers((8, 8))[1].tolist() == pytest.approx([0.1875, 0.0625, 0.1875, 0.0625])

    def test_an_image_in_both_splits_is_refused(self):
        one, two = picture("a", thing((0, 0, 9, 9), "star")), picture("b", thing((0, 0, 9, 9), "cup"))
        with pytest.raises(ValueError, match="a is in both train and test"):
            Problem("x", WORDS, 2, (one, two), (one, picture("c")))
        with pytest.raises(ValueError, match="has 1 train images"):
            Problem("x", WORDS, 2, (one,), (two, picture("c")))


def planted(count: int, *, seed: int, noise: float = 0.05) -> tuple[list[Picture], torch.Tensor]:
    """One object an image on a 4 x 4 grid of 16 pixels, and features that say what and where: (count, 16, 12)."""
    rng = np.random.default_rng(seed)
    pictures = []
    for k in range(count):
        x, y = (int(v) for v in rng.integers(0, 33, 2))
        box = (x, y, x + int(rng.integers(20, 31)), y + int(rng.integers(20, 31)))
        pictures.append(
            picture(f"{seed}-{k}", thing(box, WORDS[int(rng.integers(2))], *["red"] * int(rng.integers(2))))
        )
    truth = truth_of(WORDS, pictures, (4, 4))
    owned = truth.owner >= 0
    features = torch.zeros(count, 16, 12)
    features[..., :3][owned] = truth.words[truth.owner[owned]]
    features[..., 3:7][owned] = (truth.boxes[truth.owner] - patch_centers((4, 4)))[owned]
    features += noise * torch.from_numpy(rng.standard_normal(features.shape)).float()
    return pictures, features


def material(noise: float = 0.05, *, blind: bool = False) -> Material:
    (fitted, x), (asked, y) = planted(200, seed=1, noise=noise), planted(100, seed=2, noise=noise)
    if blind:
        x, y = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)), torch.randn(y.shape)
    return Material((4, 4), 2, x, y, truth_of(WORDS, fitted, (4, 4)), truth_of(WORDS, asked, (4, 4)))


class TestTasks:
    @pytest.mark.parametrize("head", ["linear", "mlp"])
    def test_what_is_in_the_features_is_found(self, head):
        found = tasks.read_out(material(), tasks.TASKS, head=head, seed=0, effort=Effort(steps=300, patches=256))
        assert set(found) == {"rec", "pointing", "auc", "pope", "category", "region"}
        # An owned patch may have its centre beside the box, and these features point to any owned one.
        assert {m: t.value for m, t in found.items() if t.value < (0.7 if m == "pointing" else 0.9)} == {}

    def test_what_is_not_is_not(self):
        found = tasks.read_out(material(blind=True), tasks.TASKS, head="mlp", seed=0, effort=Effort(steps=100))
        assert found["rec"].value < 0.4
        assert abs(found["auc"].value - 0.5) < 0.15
        assert abs(found["pope"].value - 0.5) < 0.12

    def test_only_what_is_asked_is_answered(self):
        assert set(tasks.read_out(material(), ("presence",), head="linear", seed=0, effort=Effort(steps=2))) == {
            "auc",
            "pope",
        }

    def test_a_box_is_scored_in_pixels_of_the_original_image(self):
        """An image of 64 x 32 pixels, padded; the answered box is 3 pixels short of the true one, by hand."""
        asked = [picture("a", thing((0, 0, 16, 16), "star"), size=(64, 32))]
        truth = truth_of(WORDS, asked, (4, 4))
        logits = torch.full((1, 16, 3), -5.0)
        logits[0, 4, 0] = 5.0
        view = PadSquare(64, 32)
        for said, right in (((0, 0, 16, 9), 1), ((0, 0, 16, 7), 0), ((0, -9, 16, 16), 1)):
            boxes = torch.zeros(1, 16, 4)
            boxes[0, 4] = torch.tensor([(v - view.window[k % 2]) / 64 for k, v in enumerate(said)])
            found = tasks._found(logits, boxes, Material((4, 4), 2, logits, logits, truth, truth))
            assert (
                found["rec"].value
                == right
                == (box_iou([(0, max(0, said[1]), 16, said[3])], [(0, 0, 16, 16)])[0] >= 0.5)
            )
            assert found["pointing"].value == 1

    def test_auc_is_the_share_of_pairs_in_order_and_its_influences_are_derivatives(self):
        rng = np.random.default_rng(0)
        scores, labels = rng.integers(0, 12, 60).astype(float), (rng.random(60) < 0.4).astype(float)
        weight = np.ones(60)

        def area() -> float:
            ups, downs = np.flatnonzero(labels), np.flatnonzero(labels == 0)
            order = [(i, j, (scores[i] > scores[j]) + 0.5 * (scores[i] == scores[j])) for i in ups for j in downs]
            pairs = [(weight[i] * weight[j], value) for i, j, value in order]
            return sum(w * v for w, v in pairs) / sum(w for w, _ in pairs)

        found, influence = tasks.auc_of(scores, labels)
        assert found == pytest.approx(area())
        assert influence.mean() == pytest.approx(0, abs=1e-12)
        for row in (0, 7, 30):
            weight[row] = 1 + 1e-6
            assert influence[row] / 60 == pytest.approx((area() - found) / 1e-6, abs=1e-4)
            weight[row] = 1

    def test_pope_asks_about_as_many_present_as_absent(self):
        labels = np.array([[1, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], dtype=float)
        always = tasks._pope(np.ones((3, 4)), labels)
        assert always.counts.tolist() == [2, 2, 0]
        assert always.value == 0.5
        assert tasks._pope(labels - 0.5, labels).value == 1

    def test_region_words_are_counted_among_as_many_of_the_likeliest(self, monkeypatch):
        """Two objects: the first's two words are ranked 1 and 3, the second's one word first: (1/2 + 1) / 2."""
        asked = [picture("a", thing((0, 0, 16, 16), "star", "red"), thing((32, 32, 48, 48), "cup"))]
        truth = truth_of(WORDS, asked, (4, 4))
        x = torch.zeros(1, 16, 3)
        x[0, 0], x[0, 10] = torch.tensor([3.0, 2.0, 1.0]), torch.tensor([0.0, 1.0, 0.0])
        monkeypatch.setattr(tasks, "new_head", lambda *args, **kwargs: torch.nn.Identity())
        monkeypatch.setattr(tasks, "_fit_words", lambda *args, **kwargs: None)
        found = tasks.region(Material((4, 4), 2, x, x, truth, truth), head="linear", seed=0, effort=Effort())
        assert found["region"].value == pytest.approx(0.75)
        nameless = replace(asked[0], things=(*asked[0].things, thing((16, 0, 32, 16))))
        truth = truth_of(WORDS, [nameless], (4, 4))
        found = tasks.region(Material((4, 4), 2, x, x, truth, truth), head="linear", seed=0, effort=Effort())
        assert (found["region"].value, found["region"].counts.tolist()) == (pytest.approx(0.75), [2])

    def test_padding_is_in_no_box(self):
        """64 x 32 pixels on a square: what points at the padding above a box at the upper edge does not point at it."""
        truth = truth_of(WORDS, [picture("a", thing((0, 0, 16, 16), "star"), size=(64, 32))], (4, 4))
        x = torch.zeros(1, 16, 3)
        for patch, hit in ((0, 0.0), (4, 1.0)):
            logits = torch.full((1, 16, 3), -9.0)
            logits[0, patch, 0] = 9.0
            found = tasks._found(logits, torch.zeros(1, 16, 4), Material((4, 4), 0, x, x, truth, truth))
            assert found["pointing"].value == hit

    def test_a_learned_merge_is_the_models_own(self):
        states = torch.randn(5, 3, 8)
        module = new_head("linear", states, 4, seed=1)
        merge = MERGES["lln-layerscale"](3, 8, (1, 1))
        merge.load_state_dict(module.merge.state_dict())  # type: ignore[union-attr]
        expected = module.head(merge([states[:, k : k + 1] for k in range(3)])[:, 0])  # type: ignore[operator]
        torch.testing.assert_close(module(states), expected)

    def test_means_of_patches_are_merged_as_patches_are(self):
        """Presence and region: the mean of what the model's own merge makes of every patch."""
        states = 3 * torch.randn(5, 16, 3, 8)
        module = new_head("linear", states[:, 0], 4, seed=1, pooled=True)
        for norm in module.merge.norms:  # type: ignore[union-attr]
            torch.nn.init.normal_(norm.weight)
            torch.nn.init.normal_(norm.bias)
        torch.nn.init.normal_(module.merge.logits)  # type: ignore[union-attr,arg-type]
        merged = module.merge([states[:, :, k] for k in range(3)])  # type: ignore[operator]
        expected = module.head(merged.mean(1))  # type: ignore[operator]
        torch.testing.assert_close(module(tasks._means(states)), expected, atol=1e-5, rtol=1e-4)
        things = [picture(str(n), thing((0, 0, 32, 16), "star")) for n in range(5)]
        found = module(tasks._regions(states, truth_of(WORDS, things, (4, 4))))
        torch.testing.assert_close(found, module.head(merged[:, :2].mean(1)), atol=1e-5, rtol=1e-4)  # type: ignore[operator]


SMALL = Settings(heads=("mlp",), seeds=2, effort=Effort(steps=4, patches=64), tasks=("rec", "presence"))


@pytest.fixture(scope="module")
def problem() -> Problem:
    return micro_problem(train=24, test=12)


@pytest.fixture(scope="module")
def finished(problem: Problem, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("probe") / "out"
    probing.probe(probing.encoder_specs(["clip"]), problem, out, settings=SMALL, jobs=1, batch=8)
    return out


class TestRun:
    def test_it_reads_layers_merges_twin_and_positions(self, finished):
        probe = Probe(finished)
        assert set(probe.sources) == {"clip", "clip-twin", "position-8x8"}
        assert list(probe.curve("clip", "mlp", "rec")) == list(range(1, 9))
        assert set(probe.merged("clip", "mlp", "rec")) == set(fitting.MERGES)
        assert len(probe.curve("clip-twin", "mlp", "auc")) == 8
        assert probe.control("clip", "mlp", "auc").interval.value == pytest.approx(0.5, abs=1e-6)  # type: ignore[union-attr]
        assert [p.name for p in (finished / "features").iterdir()] == ["clip"]  # the twin's are not needed again

    def test_a_call_that_cannot_be_leaves_no_folder_behind(self, problem, tmp_path, capsys):
        wrong = replace(SMALL, layers="12")
        with pytest.raises(ValueError, match="layer 12 is beyond the last one"):
            run_probe(problem, probing.encoder_specs(["clip"]), tmp_path / "out", settings=wrong, jobs=1)
        assert not (tmp_path / "out" / "probe.json").exists()

    def test_every_head_has_its_own_seed(self, finished):
        seeds = [p.seeds for p in Probe(finished).points.values() if len(p.seeds) > 1]
        assert seeds
        assert any(np.ptp(found) > 0 for found in seeds)

    def test_a_mean_over_layers_is_that_of_the_stored_ones(self, finished):
        source = fitting.Source(**{**Probe(finished).sources["clip"], "folder": finished / "features" / "clip"})
        keys = list(json.loads((finished / "keys.json").read_text()).values())[:3]
        layers = [fitting.place_features(source, str(k), keys) for k in range(1, 9)]
        torch.testing.assert_close(fitting.place_features(source, "mean(all)", keys), torch.stack(layers).mean(0))
        torch.testing.assert_close(fitting.place_features(source, "mean(half)", keys), torch.stack(layers[4:]).mean(0))
        several = fitting.place_features(source, "lln-layerscale(all)", keys)
        torch.testing.assert_close(several[:, :, 6].float(), layers[6], rtol=1e-2, atol=1e-2)

    def test_what_is_done_is_not_done_again_and_encoders_can_be_added(self, finished, problem, tmp_path, monkeypatch):
        out = shutil.copytree(finished, tmp_path / "copy")
        fitted: list[str] = []
        fit = fitting.Fitting.fit
        monkeypatch.setattr(
            fitting.Fitting, "fit", lambda self, unit: (fitted.append(unit.source.name), fit(self, unit))
        )
        spec = probing.encoder_specs(["clip"])
        run_probe(problem, spec, out, settings=SMALL, jobs=1)
        assert fitted == []
        (out / "units" / "clip.3.npz").unlink()
        (out / "units" / "clip.4.npz").write_bytes(b"PK damaged")
        run_probe(problem, spec, out, settings=SMALL, jobs=1)
        assert fitted == ["clip", "clip"]
        more = probing.encoder_specs(["other=micro:dinov2"], weights="random")
        run_probe(problem, more, out, settings=SMALL, jobs=1)
        assert set(fitted[2:]) == {"other"}
        assert Probe(out).encoders() == ["clip", "other"]

    @pytest.mark.parametrize("jobs", [1, pytest.param(2, marks=pytest.mark.slow)])
    def test_a_seed_gives_the_same_scores_again(self, finished, problem, tmp_path, jobs):
        run_probe(problem, probing.encoder_specs(["clip"]), tmp_path / "again", settings=SMALL, jobs=jobs)
        for key, found in Probe(tmp_path / "again").points.items():
            np.testing.assert_allclose(found.seeds, Probe(finished).points[key].seeds, atol=0.05)

    def test_other_questions_and_other_weights_are_refused(self, finished, problem, tmp_path):
        for settings, said in ((Settings(seeds=5), "seeds 2, now it is 5"), (Settings(seeds=2), "tasks")):
            with pytest.raises(ValueError, match="was made with") as error:
                run_probe(problem, [], finished, settings=settings)
            assert "choose another --out" in str(error.value)
            assert said.split()[0] in str(error.value) or "tasks" in str(error.value)
        with pytest.raises(ValueError, match="features of another encoder"):
            run_probe(problem, probing.encoder_specs(["clip=micro:dinov2"]), finished, settings=SMALL)
        (tmp_path / "mine.txt").write_text("x")
        with pytest.raises(ValueError, match="is not empty"):
            run_probe(problem, [], tmp_path, settings=SMALL)
        with pytest.raises(ValueError, match="two encoders are called 'clip'"):
            run_probe(problem, probing.encoder_specs(["clip", "clip"]), tmp_path / "two", settings=SMALL)

    def test_the_page_and_the_findings(self, finished, tmp_path):
        page = (finished / "report.html").read_text()
        assert page.count("<svg") == 4
        assert "data:image/png;base64" in page
        assert "http" not in re.sub('base64,[^"]*', "", page)
        rows = findings(Probe(finished))
        assert {row.finding for row in rows} == {"control", "F1", "F2", "F3", "F4"}
        assert all(row.verdict == "not read" for row in rows if row.finding in ("F2", "F4"))
        told = (finished / "findings.md").read_text()
        assert "| F1 |" in told
        page = tmp_path / "page.md"
        page.write_text("# Mine\n<!-- probe: begin -->\nold\n<!-- probe: end -->\nafter\n")
        write_into(page, finished)
        write_into(page, finished)
        assert page.read_text() == f"# Mine\n<!-- probe: begin -->\n{told}<!-- probe: end -->\nafter\n"
        page.write_text("no marks")
        with pytest.raises(ValueError, match="needs the lines"):
            write_into(page, finished)

    def test_advice_is_the_cheapest_that_is_not_told_from_the_best_and_can_be_inspected(
        self, finished, tmp_path, capsys
    ):
        probe = Probe(finished)
        found = advise(probe, "presence")
        points = {
            place: p for (name, place, _, metric), p in probe.points.items() if name == "clip" and metric == "auc"
        }
        top = max(points, key=lambda place: points[place].seeds.mean())
        level = [p for p, q in points.items() if np.quantile(points[top].draws - q.draws, 0.025) <= 0]
        price = costs(probe)
        assert price["clip", "1"] < price["clip", "8"] < price["clip", "lln-layerscale(all)"]
        assert found.chosen.place == min(level, key=lambda p: (price["clip", p], -points[p].seeds.mean()))
        assert probe.sources["clip"]["image_size"] is None
        smaller = {**probe.sources["clip"], "image_size": 48, "weights": "random"}
        other = SimpleNamespace(points=probe.points, encoders=lambda: ["clip"], sources={"clip": smaller})
        assert costs(other)["clip", "3"] < 0.7 * costs(probe)["clip", "3"]  # type: ignore[arg-type]
        said = found.chosen.setting("micro:clip", smaller)
        assert (said["image_size"], said["weights"]) == (48, "random")
        assert "image_size" not in found.chosen.setting("micro:clip", probe.sources["clip"])
        recipe = tmp_path / "advised.yaml"
        assert main(["probe", "advise", str(finished), "--recipe", str(recipe)]) == 0
        assert "checkpoint: micro:clip" in recipe.read_text()
        capsys.readouterr()
        assert main(["inspect", str(recipe), "--json"]) == 0
        rows = json.loads(capsys.readouterr().out)
        assert rows[0]["encoder"] == "clip"
        assert main(["probe", "advise", str(finished), "--tasks", "region"]) == 2

    def test_trained_models_are_held_against_it(self, finished, tmp_path, capsys):
        rows = [{"task": "rec", "encoder": "clip", "place": str(k), "scores": [0.1 * k]} for k in range(1, 9)]
        (tmp_path / "runs.json").write_text(json.dumps(rows))
        assert main(["probe", "advise", str(finished), "--trained", str(tmp_path / "runs.json")]) == 0
        assert "over 8 configurations" in capsys.readouterr().out
        assert "over 8 trained configurations" in (finished / "report.html").read_text()
        for broken, said in (
            ([{"task": "rec"}], "entry 1 needs"),
            ([{**rows[0], "scores": [40]}], "shares from 0 to 1"),
        ):
            (tmp_path / "runs.json").write_text(json.dumps(broken))
            assert main(["probe", "advise", str(finished), "--trained", str(tmp_path / "runs.json")]) == 2
            assert said in capsys.readouterr().err


def test_a_studys_results_are_read_by_the_probes_names(tmp_path):
    rows = {
        "clip 5": {"seeds": 3, "rec": [28.1, 26.14, 30.06], "pope": [55.0, 54.0, 56.0], "vqa": [1.0, 0.0, 2.0]},
        "clip last": {"seeds": 3, "rec": [26.3, 26.3, 26.3]},
        "clip 8": {"seeds": 3, "rec": [26.3, 26.3, 26.3]},
        "clip lln-layerscale all": {"seeds": 3, "reg": [120.0, 110.0, 130.0]},
        "clip+dinov2 comm": {"seeds": 3, "rec": [30.0, 29.0, 31.0]},
        "comm": {"seeds": 3, "rec": [30.0, 29.0, 31.0]},
        "siglip 3": {"seeds": 3, "rec": [1.0, 0.0, 2.0]},
    }
    (tmp_path / "results.json").write_text(json.dumps({"rows": rows, "scale": "quick"}))
    found = read_trained(tmp_path / "results.json", {"clip": 8, "dinov2": 8})
    assert [(t.encoder, t.place, t.scores) for t in found["rec"]] == [("clip", "5", (0.281,)), ("clip", "8", (0.263,))]
    assert found["rec"][0].error == pytest.approx(0.01)
    assert [t.place for t in found["presence"]] == ["5"]
    assert [t.place for t in found["region"]] == ["lln-layerscale(all)"]
    assert set(found) == {"rec", "presence", "region"}


def test_the_tiny_encoders_are_found_by_their_folders():
    names = probing.tiny_encoders()
    assert names[:2] == ["clip", "dinov2"]
    assert "lm" not in names
    assert [spec.name for spec in probing.encoder_specs(["micro"])] == names
    assert probing.encoder_specs(["a=micro:clip"])[0] == EncoderSpec("a", located("micro:clip"))
