"""The study's statistics against arithmetic by hand and a slow loop."""

import numpy as np
import pytest

from commvlm.evaluate.tasks import Record, task_named
from commvlm.study import charts
from commvlm.study.claims import Claim, claims_of, judged, p_of, word
from commvlm.study.controls import BLIND
from commvlm.study.results import Results
from commvlm.study.settings import load_scale
from commvlm.study.statistics import (
    PRIOR,
    Estimate,
    difference,
    estimates,
    holm,
    seed_errors,
    unit_of,
    usual_variance,
)
from commvlm.study.tables import by_seed, loss_cell
from commvlm.study.tallies import Tally, joined, tallies_of, tally


def made(sums, counts=None):
    sums = np.atleast_2d(np.asarray(sums, dtype=float).T).T
    counts = np.ones_like(sums) if counts is None else np.asarray(counts, dtype=float)
    names = tuple(f"{k}.png" for k in range(len(sums)))
    return Tally(names, tuple(str(k) for k in range(sums.shape[1])), sums, counts)


def record(number, answer, text, *, image, name="random"):
    return Record(
        id=str(number), task="pope", image=image, width=10, height=10, question="?", text=text, parsed=text,
        answer=answer, facts={"set": name},
    )  # fmt: skip


def test_a_tally_is_the_score_by_image_and_set():
    records = [
        record(1, "yes", "yes", image="a/1.png"),
        record(2, "no", "yes", image="a/1.png"),
        record(3, "no", "no", image="a/2.png"),
        record(4, "yes", "yes", image="a/2.png", name="popular"),
    ]
    score = task_named("pope").score(records)
    (found,) = tallies_of(score, records).values()
    assert found.images == ("1.png", "2.png")
    assert found.groups == ("popular", "random")
    assert found.sums.tolist() == [[0, 1], [1, 1]]
    assert found.counts.tolist() == [[0, 2], [1, 1]]
    assert found.value() == pytest.approx(score.value) == pytest.approx(100 * (1 / 1 + 2 / 3) / 2)
    assert Tally.from_json(found.as_json()).value() == pytest.approx(found.value())


def box_record(number, box, text):
    return Record(
        id=str(number), task="rec", image=f"{number}.png", width=100, height=100, question="?", text=text, parsed=box,
        answer="<boxes>", boxes=((0.0, 0.0, 50.0, 100.0),),
    )  # fmt: skip


def test_boxes_are_tallied_by_their_overlap_too():
    """IoU 1, 0.5 + a little by the codec's three decimals, and nothing readable."""
    texts = ["[0.000,0.000,0.500,1.000]", "[0.000,0.000,1.000,1.000]", "nowhere"]
    records = [box_record(k, None, text) for k, text in enumerate(texts)]
    found = tallies_of(task_named("rec").score(records), records)
    assert set(found) == {"rec", "rec mean_iou"}
    assert found["rec mean_iou"].sums[:, 0] == pytest.approx([1, 0.5, 0], abs=0.01)
    assert found["rec"].counts.tolist() == found["rec mean_iou"].counts.tolist()


def test_a_rule_that_marks_sentences_is_tallied_by_their_images():
    records = [
        Record(
            id=str(k), task="reg", image=f"{k}.png", width=9, height=9, question="?", text=text, parsed=text, answer=text,
            asked_boxes=((0.0, 0.0, 9.0, 9.0),), references=(text, "a cup of tea"),
        )
        for k, text in enumerate(["a red star", "the blue heart over there"])
    ]  # fmt: skip
    score = task_named("reg").score(records, rule="sentence-approximate")
    found = tallies_of(score, records)["reg"]
    assert found.counts.tolist() == [[2], [2]]
    assert found.value() == pytest.approx(score.value)


def test_a_figure_that_is_no_mean_of_its_marks_is_refused():
    with pytest.raises(ValueError, match=r"pope is 70, its marks' mean is 50"):
        tally(
            {"1": 1.0, "2": 0.0},
            [record(1, "yes", "yes", image="a"), record(2, "no", "yes", image="b")],
            of=70,
            name="pope",
        )


def test_an_interval_is_that_of_a_slow_loop():
    rng = np.random.default_rng(1)
    seeds = [made(rng.integers(0, 2, 40)) for _ in range(3)]
    found = estimates({"row": dict(enumerate(seeds))}, draws=4000, seed=3)["row"]
    own = np.var([t.value() for t in seeds], ddof=1)
    usual = own / (np.pi / 4)  # of this row alone; c4(3) is the root of pi over two
    error = ((2 * usual + 2 * own) / 4 / 3) ** 0.5
    slow = []
    for _ in range(4000):
        images = rng.integers(40, size=40)
        slow.append(np.mean([100 * s.sums[images, 0].mean() for s in seeds]) + error * rng.standard_t(4))
    assert found.mean == pytest.approx(np.mean([t.value() for t in seeds]))
    shares = [2.5, 25, 75, 97.5]
    assert [100 * found.below(q) for q in np.percentile(slow, shares)] == pytest.approx(shares, abs=1.5)
    assert [found.low, found.high] == pytest.approx(np.percentile(slow, [2.5, 97.5]), abs=1.5)


def test_intervals_and_small_p_are_those_of_the_tables():
    """Images that are all alike leave the t of four degrees alone: 2.776, 4.604 and 8.610 cut off .05, .01 and .001."""
    drawn = dict.fromkeys(range(3), np.full(10, 46.04))
    found = Estimate(dict.fromkeys(drawn, 46.04), drawn, error=10.0, free=4)
    assert (found.low, found.high) == pytest.approx((46.04 - 27.76, 46.04 + 27.76), abs=0.01)
    assert found.p == pytest.approx(0.01, rel=1e-3)
    assert found.below(46.04 - 86.10) == pytest.approx(0.0005, rel=1e-3)
    assert Estimate(found.seeds, drawn, error=1e-3, free=4).p < 1e-12


def test_a_rows_spread_is_drawn_towards_that_of_all():
    """Two seeds each with deviations 0, sqrt 2 and sqrt 8, whose mean is sqrt 2; c4(2) is sqrt(2 / pi); and one seed."""
    values = {"a": [5.0, 5.0], "b": [4.0, 6.0], "c": [3.0, 7.0], "d": [1.0]}
    units = {"a": 1.0, "b": 1.0, "c": 1.0, "d": 3.0}
    found = seed_errors({name: np.asarray(own) for name, own in values.items()}, units)
    usual = 2 / (2 / np.pi)
    assert found["a"] == pytest.approx(((2 * usual + 0) / 3 / 2) ** 0.5)
    assert found["c"] == pytest.approx(((2 * usual + 8) / 3 / 2) ** 0.5)
    assert found["d"] == pytest.approx(3 * usual**0.5)
    assert seed_errors({"d": np.asarray([1.0])}, {"d": 1.0}) == {"d": 0.0}


def test_noise_is_measured_in_logits_or_in_shares():
    """A small step of the logit takes p by p (1 - p) times it."""
    step = 1e-4
    logit = np.log(0.98 / 0.02) + step
    assert unit_of(98.0, bounded=True) == pytest.approx((100 / (1 + np.exp(-logit)) - 98) / step, rel=1e-3)
    assert unit_of(100.0, bounded=True) == pytest.approx(0.4975)
    assert unit_of(250.0, bounded=False) == 250.0
    cider = estimates({"a": {0: made([3.0, 2.0])}})["a"]
    assert (cider.mean, cider.unit) == (250.0, 250.0)


def test_a_row_near_the_ceiling_is_not_doubted_for_the_noise_of_others():
    """Two rows at 98 that move by half a point, eleven in the middle that move by ten: all by half a logit."""
    rng = np.random.default_rng(0)
    levels = np.array([4.0, 4.0, *np.linspace(-0.5, 1.5, 11)])
    values = 1 / (1 + np.exp(-(levels[:, None] + 0.5 * rng.standard_normal((13, 3)))))
    found = estimates({str(k): {s: made(np.full(4, v)) for s, v in enumerate(own)} for k, own in enumerate(values)})
    gap = apart(found, "0", "1")
    assert gap.high - gap.low < 6
    assert found["0"].high < 103
    assert found["5"].high - found["5"].low > 15


def apart(rows, one, other):
    return difference(rows, {one: 1.0, other: -1.0}, usual=usual_variance(rows))


@pytest.mark.parametrize("seeds", [2, 3])
@pytest.mark.parametrize(
    ("spreads", "shared", "logits"),
    [
        ((5.0,), 0.0, False),
        ((1.0, 10.0), 0.0, True),
        *(pytest.param(*one, marks=pytest.mark.slow) for one in (((1.0, 10.0), 0.9, False), ((5.0,), 0.9, True))),
    ],
)
def test_equal_rows_are_seldom_told_apart_by_seed_noise_alone(seeds, spreads, shared, logits):
    """shared: of a row's variance, what its seed does to all rows. logits: noise in tenths of them, at levels of 43 to 98 %,
    or in points at 50 %. The first two rows are equal."""
    rng, told, level = np.random.default_rng(0), 0, 0.0
    for k in range(200):
        spread, common = rng.choice(spreads, 13), shared**0.5 * rng.standard_normal(seeds)
        rows = {}
        for name, wide in enumerate(spread):
            noise = wide * (common + (1 - shared) ** 0.5 * rng.standard_normal(seeds))
            if logits:
                level = level if name == 1 else rng.uniform(-0.3, 4)
                means = 100 / (1 + np.exp(-level - noise / 10))
            else:
                means = 50 + noise
            rows[str(name)] = {s: made(np.full(4, mean / 100)) for s, mean in enumerate(means)}
        found = estimates(rows, draws=400, seed=k)
        told += word(apart(found, "0", "1"), "more") != "undecided"
    assert told <= 0.11 * 200  # 7 %, and two and a half standard errors


def test_what_a_seed_does_to_all_rows_cancels_in_a_difference():
    """Rows 20 points apart from seed to seed, 2, 1 and 3 from each other; two more give the usual variance by hand."""
    values = {"a": (72, 51, 93), "b": (70, 50, 90), "c": (60, 42, 80), "d": (59, 40, 80)}
    rows = {name: {s: made(np.full(4, v / 100)) for s, v in enumerate(own)} for name, own in values.items()}
    found = estimates(rows)
    gap = apart(found, "a", "b")
    spreads = [np.std(np.subtract(values[x], values[y]), ddof=1) for x, y in ("ab", "ac", "ad", "bc", "bd", "cd")]
    units = {name: found[name].unit for name in values}
    pairs = [units[x] ** 2 + units[y] ** 2 for x, y in ("ab", "ac", "ad", "bc", "bd", "cd")]
    usual = (np.mean(np.divide(spreads, np.sqrt(pairs))) / (np.pi**0.5 / 2)) ** 2  # c4(3) is the root of pi over two
    assert usual_variance(found) == pytest.approx(usual)
    error = ((PRIOR * usual * pairs[0] + 2 * 1.0) / (PRIOR + 2) / 3) ** 0.5
    assert gap.mean == pytest.approx(2)
    assert (gap.error, gap.free) == (pytest.approx(error), 4)
    assert (
        gap.high < found["a"].high - found["a"].mean
    )  # a row alone is uncertain by its seeds, their difference is not


def test_two_names_of_one_run_are_one():
    tallies = {s: made(np.full(4, v / 100)) for s, v in enumerate((50, 60, 40))}
    other = {s: made(np.full(4, v / 100)) for s, v in enumerate((55, 75, 60))}
    found = estimates({"a": tallies, "also a": tallies, "b": other})
    assert (found["a"].low, found["a"].high) == (found["also a"].low, found["also a"].high)
    assert usual_variance(found) == pytest.approx(usual_variance(estimates({"a": tallies, "b": other})))
    assert found["b"].error == estimates({"a": tallies, "b": other})["b"].error


def test_two_runs_that_happen_to_be_equal_are_two():
    """Both at chance with each seed: their difference has no variance, and says so of the others."""
    chance = [{s: made(np.full(4, 0.5)) for s in range(3)} for _ in range(2)]
    other = {s: made(np.full(4, v / 100)) for s, v in enumerate((55, 75, 60))}
    found = estimates({"a": chance[0], "b": chance[1], "c": other})
    alone = usual_variance(estimates({"a": chance[0], "c": other}))
    assert usual_variance(found) == pytest.approx(alone * (2 / 3) ** 2)  # the mean of 0, and twice one deviation


def test_a_difference_is_over_the_seeds_that_both_rows_have():
    tallies = {s: made(np.full(4, v / 100)) for s, v in enumerate((50, 60, 10))}
    found = estimates({"a": tallies, "b": {0: tallies[2], 1: tallies[0]}})
    gap = difference(found, {"a": 1.0, "b": -1.0}, usual=0.0)
    assert gap.seeds == {0: pytest.approx(40.0), 1: pytest.approx(10.0)}
    claims = [Claim("F5", "apart", "pope", {"a": 1, "b": -1}), Claim("F5", "alike", "pope", {"a": -1e-4, "b": 0})]
    assert [by_seed(verdict) for verdict in judged(claims, {"pope": found})] == ["40.0, 10.0", "0.0, 0.0"]
    alone = estimates({"a": {0: tallies[0]}, "b": {1: tallies[1]}})
    with pytest.raises(ValueError, match="a and b have no seed in common"):
        difference(alone, {"a": 1.0, "b": -1.0}, usual=0.0)
    assert judged([Claim("F5", "apart", "pope", {"a": 1, "b": -1})], {"pope": alone}) == []


def test_what_is_hard_for_both_cancels_in_their_difference():
    rng = np.random.default_rng(0)
    hard = rng.integers(0, 2, 100)
    better = hard.copy()
    better[np.flatnonzero(hard == 0)[:10]] = 1
    found = estimates({"a": {0: made(hard)}, "b": {0: made(better)}})
    gap = apart(found, "b", "a")
    assert gap.mean == pytest.approx(10.0)
    alone = np.hypot(found["a"].draws.std(), found["b"].draws.std())
    assert gap.draws.std() < 0.6 * alone
    assert gap.low > 0
    assert found["b"].low < found["a"].high  # intervals of the rows overlap; that of their difference decides


def test_rows_that_were_asked_other_questions_are_refused():
    with pytest.raises(ValueError, match=r"b and a were not asked the same questions"):
        estimates({"a": {0: made([1, 0])}, "b": {0: made([1, 0], [[1], [2]])}})


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})


def about(mean, width, seeds=(0, 1, 2)):
    """The same draws of images in all seeds, which do not differ."""
    drawn = mean + width * np.random.default_rng(0).standard_normal(4000)
    return Estimate(dict.fromkeys(seeds, float(mean)), dict.fromkeys(seeds, drawn), error=0.0, free=4)


@pytest.mark.parametrize(
    ("mean", "width", "expect", "said"),
    [
        (5, 1, "more", "holds"), (-5, 1, "more", "reversed"), (1, 1, "more", "undecided"),
        (-5, 1, "less", "holds"), (5, 1, "less", "reversed"),
        (0, 0.5, "level", "holds"), (0, 3, "level", "undecided"), (6, 1, "level", "reversed"),
    ],
)  # fmt: skip
def test_the_interval_words_the_verdict(mean, width, expect, said):
    assert word(about(mean, width), expect) == said


def test_rows_that_are_all_blind_decide_nothing():
    rows = {"a": about(50, 0.1), "b": about(50, 0.1), BLIND: about(50, 0.1), "c": about(60, 0.1)}
    level = Claim("F2", "level", "pope", {"a": 1, "b": -1}, "level")
    above = Claim("F5", "c above a", "pope", {"c": 1, "a": -1})
    absent = Claim("F5", "not run", "pope", {"c": 1, "d": -1})
    first, second = judged([level, above, absent], {"pope": rows})
    assert (first.word, first.floor, first.adjusted) == ("undecided", True, None)
    assert second.adjusted == second.estimate.p  # alone among those that can be decided
    assert (second.word, second.floor) == ("holds", False)
    rows[BLIND] = about(50, 0.1, seeds=(7, 8))  # without a seed in common: held against its mean
    assert [verdict.floor for verdict in judged([level, above], {"pope": rows})] == [True, False]
    del rows[BLIND]
    assert [verdict.floor for verdict in judged([level, above], {"pope": rows})] == [False, False]


def test_one_seed_decides_nothing():
    rows = {"a": about(50, 0.1), "c": about(60, 0.1, seeds=(0,))}
    (verdict,) = judged([Claim("F5", "c above a", "pope", {"c": 1, "a": -1})], {"pope": rows})
    assert (verdict.word, verdict.seeds, verdict.why) == ("undecided", 1, "one seed")


def test_a_difference_of_differences_is_taken_draw_by_draw():
    rows = {name: about(mean, 1) for name, mean in {"a": 8, "b": 3, "c": 2, "d": 1}.items()}
    found = difference(rows, {"a": 1, "b": -1, "c": -1, "d": 1}, usual=0.0)
    assert found.mean == 4
    assert found.draws == pytest.approx(np.full(4000, 4.0))  # the same draws in all four cancel


def test_a_learning_curve_counts_updates_through_the_stages():
    """Two stages of 30 and 20 updates, logged every ten; a mean of as many losses as there are, up to SMOOTHED."""
    losses = [("align", 10, 3.0), ("align", 20, 2.0), ("align", 30, 1.0), ("instruct", 10, 0.5), ("instruct", 20, 0.5)]
    steps, values, ends = charts.joined(losses)
    assert (steps, values, ends) == ([10, 20, 30, 40, 50], [3.0, 2.0, 1.0, 0.5, 0.5], [30, 50])
    drawn = charts.learning({"one row": [losses, losses], "another": [losses]})
    assert drawn.count("one row") == 1
    assert drawn.count("another") == 1


def test_the_gain_of_merging_is_held_against_one_good_layer():
    """Not against the last layer alone: a control that needs no run of its own."""
    found = [claim.terms for claim in claims_of(load_scale("micro")) if claim.finding == "C" and claim.task == "rec"]
    assert {"clip lln-layerscale all": 1.0, "clip 4": -1.0} in found


def test_sets_of_a_task_are_averaged_over_the_images_of_all():
    """Two sets that share an image: 1 of 2 right and 3 of 4; a set's mean, whatever its size."""
    one = Tally(("a", "b"), ("",), np.array([[1.0], [0.0]]), np.array([[1.0], [1.0]]))
    other = Tally(("b", "c"), ("",), np.array([[1.0], [2.0]]), np.array([[2.0], [2.0]]))
    both = joined({"rec.val": one, "rec.test": other})
    assert (both.images, both.groups) == (("a", "b", "c"), ("rec.val", "rec.test"))
    assert both.value() == pytest.approx((50 + 75) / 2)
    assert both.values(np.array([[0.0, 2.0, 1.0]]))[0] == pytest.approx((0 + 100 * 4 / 6) / 2)
    with pytest.raises(ValueError, match="pope is a mean of groups already"):
        joined({"rec": one, "pope": made([[1, 0], [0, 1]])})


@pytest.mark.parametrize(("mean", "p"), [(0.0, 0.01), (-10.0, 0.01), (2.0, 1.0)])
def test_level_is_held_against_the_side_that_is_nearer(mean, p):
    """Well within two points, well outside, on the border: with a deviation of .5."""
    found = p_of(about(mean, 0.5), "level")
    assert found == pytest.approx(p, abs=0.06) if p == 1.0 else found < p


def test_p_of_level_is_under_a_twentieth_where_its_interval_decides():
    decided = 0
    for mean in np.arange(0.0, 4.0, 0.05):
        found = Estimate({0: mean, 1: mean}, {0: np.full(5, mean), 1: np.full(5, mean)}, error=0.3, free=3)
        assert (word(found, "level") != "undecided") == (p_of(found, "level") < 0.05)
        decided += word(found, "level") != "undecided"
    assert 20 < decided < 70


def test_a_training_loss_at_the_end_is_of_the_last_stage_and_of_the_seeds_that_are_done():
    falling = [["instruct", 10 * k, 1.0 - 0.05 * k] for k in range(1, 13)]
    runs = {
        "a": {"losses": [["align", 10, 9.0], ["instruct", 10, 0.5], ["instruct", 20, 0.4]]},
        "b": {"losses": [["align", 10, 9.0], *falling]},
    }
    results = Results({"rows": {"row": {"runs": {"1": "b", "0": "a", "2": "c"}}}}, runs)
    assert results.late_losses("row") == pytest.approx([0.45, 1.0 - 0.05 * 7.5])
    assert loss_cell(results, "row") == "0.450, 0.625"
    assert (results.late_losses("none"), loss_cell(results, "none")) == ([], "–")
