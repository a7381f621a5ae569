"""Intervals of probes, what is found by them, and what is advised."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from commvlm.evaluate.metrics.bootstrap import bootstrap
from commvlm.probe.advise import agreement
from commvlm.probe.curves import Point, _point, best, highest, layer_shift, spearman
from commvlm.probe.findings import findings
from commvlm.probe.trained import Trained


def point(value: float, *, spread: float = 0.01, seed: int = 0) -> Point:
    return Point(np.array([value]), value + spread * np.random.default_rng(seed).standard_normal(1000))


class TestFindings:
    @pytest.mark.parametrize("asked", [{"rec"}, {"auc"}, set()])
    def test_what_was_not_asked_is_said_and_ends_nothing(self, asked):
        """clip and dinov2, one task alone: each claim is told or is not read."""
        points = {metric: {k: point(0.1 * k, seed=k) for k in (1, 2, 3, 4)} for metric in asked}
        probe = SimpleNamespace(
            encoders=lambda: ["clip", "dinov2"], heads=lambda: ["linear", "mlp"], metrics=lambda: list(points),
            curve=lambda encoder, head, metric: points.get(metric, {}), merged=lambda *_: {}, twin=lambda _: None,
            sources={name: {"depth": 4} for name in ("clip", "dinov2")},
        )  # fmt: skip
        told = {row.claim: row.verdict for row in findings(probe) if row.finding == "F2"}  # type: ignore[arg-type]
        read = [claim for claim, verdict in told.items() if verdict != "not read"]
        assert len(told) == 3
        assert len(read) == {"rec": 2, "auc": 1}.get("".join(asked), 0)

    def test_the_last_layer_is_the_encoders_own_and_roles_go_by_architecture(self):
        """Four of eight layers: nothing is said of the last. An encoder of another name is read by what it is."""
        points = {metric: {k: point(0.1 * k, seed=k) for k in (1, 2, 3, 4)} for metric in ("rec", "auc")}
        families = {"clip_large": "clip_vision_model", "other": "vit_mae", "dino_large": "dinov2_with_registers"}
        merges = {"mean(half)": point(0.5, seed=8), "mean(all)": point(0.4, seed=9)}

        def told(depth: int) -> dict[str, str]:
            probe = SimpleNamespace(
                encoders=lambda: list(families), heads=lambda: ["linear", "mlp"], metrics=lambda: list(points),
                curve=lambda encoder, head, metric: points.get(metric, {}), merged=lambda *_: merges, twin=lambda _: None,
                sources={name: {"depth": depth, "family": kind} for name, kind in families.items()},
            )  # fmt: skip
            return {row.claim: row.verdict for row in findings(probe)}  # type: ignore[arg-type]

        whole, part = told(4), told(8)
        assert whole["clip_large: presence keeps improving to the last layer"] == "holds"
        assert part["clip_large: presence keeps improving to the last layer"] == "not read"
        assert whole["DINOv2's deep layers, read by an MLP, are above CLIP's best on REC"] != "not read"
        shallow = {claim: verdict for claim, verdict in whole.items() if "a plain mean (REC" in claim}
        assert shallow == {
            "clip_large: shallow layers help a plain mean (REC acc@0.5)": "does not hold",
            "dino_large: shallow layers hurt a plain mean (REC acc@0.5)": "holds",
        }
        assert whole["MAE's presence is weak: below CLIP's"] == "cannot tell"
        assert whole["DeiT is weakest on REC: below CLIP's"] == "not read"

    @pytest.mark.parametrize("weak", [False, True])
    def test_each_claim_has_its_direction_and_a_twin_as_good_takes_it_back(self, weak):
        """CLIP falls after layer 2 on REC and rises on presence; DINOv2 needs the MLP and is deep; MAE knows little."""
        rec = {"clip": (0.5, 0.7, 0.6, 0.4), "dinov2": (0.5, 0.6, 0.8, 0.9), "mae": (0.5,) * 4, "deit": (0.3,) * 4}
        auc = {"clip": (0.6, 0.7, 0.8, 0.9), "dinov2": (0.7, 0.6, 0.6, 0.6), "mae": (0.6,) * 4, "deit": (0.7,) * 4}
        plain = {"clip": 0.0, "dinov2": 0.3}

        def curve(encoder: str, head: str, metric: str) -> dict[int, Point]:
            name, twin = encoder.removesuffix("-twin"), encoder.endswith("-twin")
            values = {"rec": rec, "auc": auc}.get(metric, {}).get(name, ())
            less = (0.0 if weak else 0.25) if twin else plain.get(name, 0.0) if head == "linear" else 0.0
            return {k: point(v - less, spread=0.001, seed=k) for k, v in enumerate(values, start=1)}

        probe = SimpleNamespace(
            encoders=lambda: list(rec), heads=lambda: ["linear", "mlp"], metrics=lambda: ["rec", "auc"], curve=curve,
            merged=lambda *_: {}, twin=lambda name: f"{name}-twin", sources={name: {"depth": 4} for name in rec},
        )  # fmt: skip
        told = {row.claim: row.verdict for row in findings(probe) if row.finding != "control"}  # type: ignore[arg-type]
        expected = {
            "clip: the best layer for REC is shallower than that for presence": "holds",
            "clip: REC falls towards the last layer": "holds",
            "clip: presence keeps improving to the last layer": "holds",
            "dinov2: the best layer for REC is shallower than that for presence": "does not hold",
            "dinov2: REC falls towards the last layer": "does not hold",
            "dinov2: presence keeps improving to the last layer": "does not hold",
            "DINOv2's deep layers, read by an MLP, are above CLIP's best on REC": "holds",
            "DINOv2 gains more than CLIP from a non-linear head (REC)": "holds",
            "DINOv2's best single layer is below CLIP's on presence": "holds",
            "MAE's presence is weak: below CLIP's": "holds",
            "DeiT is weakest on REC: below CLIP's": "holds",
            "DeiT's presence is weak: below CLIP's": "holds",
        }
        for claim, verdict in expected.items():
            assert told[claim] == ("cannot tell" if weak else verdict), claim
        assert told["MAE's REC is fair: above its random twin's"] == ("cannot tell" if weak else "holds")


class TestIntervals:
    def test_one_seeds_interval_is_that_of_the_bootstrap_by_image(self):
        rng = np.random.default_rng(3)
        images = rng.integers(0, 80, 400)
        values = (rng.random(400) < 0.3 + 0.4 * (images % 2)).astype(float)
        sums, counts = np.bincount(images, values, 80), np.bincount(images, minlength=80).astype(float)
        times = np.random.default_rng(0).multinomial(80, np.full(80, 1 / 80), size=2000).astype(float)
        found = _point(sums[None], counts, times, seed=0).interval
        other = bootstrap(values, images.tolist(), draws=2000)
        assert found.value == pytest.approx(values.mean())
        assert other is not None
        assert found.low == pytest.approx(other.low, abs=0.01)
        assert found.high == pytest.approx(other.high, abs=0.01)

    def test_seeds_that_differ_widen_it(self):
        sums, counts = np.ones((3, 50)) * np.array([[0.2], [0.5], [0.8]]), np.ones(50)
        times = np.ones((1000, 50))
        assert _point(sums[1:2], counts, times, seed=0).interval == pytest.approx((0.5, 0.5, 0.5))
        low, high = _point(sums, counts, times, seed=0).interval[1:]
        assert low < 0.35
        assert high > 0.65

    def test_differences_are_paired(self):
        a, b = point(0.5, spread=0.1), point(0.48, spread=0.1)
        assert a.minus(b).sure == 1
        assert a.minus(point(0.48, spread=0.1, seed=9)).sure == 0
        assert b.minus(a).sure == -1

    def test_the_best_layer_and_its_rivals(self):
        curve = {1: point(0.2, seed=1), 2: point(0.5, seed=2), 3: point(0.501, seed=3), 4: point(0.3, seed=4)}
        assert best(curve) == (3, [2, 3])
        deep = {k: point(0.1 * k, seed=10 + k) for k in range(1, 5)}
        shift = layer_shift({1: point(0.9), 4: point(0.1)}, deep)
        assert (shift.value, shift.sure) == (3, 1)

    def test_the_best_of_equal_layers_is_not_above_them(self):
        """Twelve layers that are all right half of the time: the last is seldom surely below the best of those before it."""
        rng, told = np.random.default_rng(0), 0
        counts = np.ones(300)
        for k in range(100):
            times = rng.multinomial(300, np.full(300, 1 / 300), size=200).astype(float)
            hits = rng.integers(0, 2, (12, 1, 300)).astype(float)
            curve = {layer: _point(hits[layer], counts, times, seed=k) for layer in range(12)}
            told += curve[11].minus(highest({layer: curve[layer] for layer in range(11)})).sure == -1
        assert (
            told <= 8
        )  # 2.5 % and three standard errors; the maximum of all on the same images gives more than a third

    def test_a_clearly_best_layer_is_its_own_score(self):
        rng = np.random.default_rng(1)
        counts, times = np.ones(300), rng.multinomial(300, np.full(300, 1 / 300), size=200).astype(float)
        points = {
            share: _point((rng.random((2, 300)) < share).astype(float), counts, times, seed=0) for share in (0.3, 0.9)
        }
        found = highest(points)
        assert found.seeds.mean() == pytest.approx(points[0.9].seeds.mean())
        np.testing.assert_allclose(found.draws, points[0.9].draws)

    def test_spearman_by_hand(self):
        assert spearman([1, 2, 3, 4], [10, 20, 40, 30]) == pytest.approx(0.8)
        assert spearman([1, 2, 2, 3], [1, 2, 2, 3]) == pytest.approx(1)
        assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
        assert np.isnan(spearman([1, 1, 1], [1, 2, 3]))

    def test_agreement_with_trained_models(self):
        points = {("clip", str(k)): point(v, seed=k) for k, v in enumerate((0.3, 0.5, 0.7, 0.6, 0.4), 1)}
        same = [Trained("clip", str(k), (v - 0.1, v - 0.11)) for k, v in enumerate((0.3, 0.5, 0.7, 0.6, 0.4), 1)]
        found = agreement(points, same)
        assert (found.pairs, found.interval.value) == (5, pytest.approx(1))
        assert found.interval.low > 0.8
        turned = [Trained("clip", str(k), (1 - v,)) for k, v in enumerate((0.3, 0.5, 0.7, 0.6, 0.4), 1)]
        assert agreement(points, turned).interval.high < -0.8
        noisy = agreement(points, [Trained(t.encoder, t.place, t.scores, error=0.5) for t in same]).interval
        assert noisy.low < 0 < noisy.high
        with pytest.raises(ValueError, match="share 2 configurations"):
            agreement(points, same[:2])
