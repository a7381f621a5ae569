"""Trees of sources: exact shares, every example in its turn, the same order on any number of ranks and workers."""

from collections import Counter
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate.data_loader import BatchSamplerShard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from commvlm.data.example import Example, Turn
from commvlm.data.mix import mixed_sources, parse_mix
from commvlm.data.mixture import Mixture, Source
from commvlm.data.order import permuted

COUNTS = {"a": 7, "b": 40, "c": 100, "d": 3, "e": 250}


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=40, deadline=None)
def test_an_order_is_a_permutation(size, key):
    assert sorted(permuted(place, size, key) for place in range(size)) == list(range(size))


def test_orders_look_random():
    """Every item is as often at every place, and neighbours as often beside each other, as in shuffled decks."""
    size, keys = 6, 6000
    at, beside = np.zeros((size, size)), np.zeros((size, size))
    for key in range(keys):
        order = [permuted(place, size, key) for place in range(size)]
        at[np.arange(size), order] += 1
        beside[order[:-1], order[1:]] += 1
    for counts, expected in ((at.ravel(), keys / size), (beside[~np.eye(size, dtype=bool)], keys / size)):
        chi2 = ((counts - expected) ** 2 / expected).sum()
        assert chi2 < len(counts) + 5 * (2 * len(counts)) ** 0.5
    large = np.array([permuted(place, 100_003, 5) for place in range(20_000)])
    assert abs(np.corrcoef(large[:-1], large[1:])[0, 1]) < 0.03
    assert abs(large.mean() / 100_003 - 0.5) < 0.02


def test_places_beyond_an_order():
    for place in (-1, 5):
        with pytest.raises(IndexError, match="of an order of 5"):
            permuted(place, 5, 0)


def drawn(spec, count, *, start=0, key=3, counts=COUNTS):
    node = parse_mix(spec, counts)
    return [node.at(place, key) for place in range(start, start + count)]


def test_a_source_gives_each_example_once_a_round():
    rounds = [drawn("b", 40, start=40 * n) for n in range(3)]
    assert all(sorted(items) == [("b", n) for n in range(40)] for items in rounds)
    assert rounds[0] != rounds[1] != rounds[2]
    assert drawn("b", 40, key=4) != rounds[0]


def test_concat_gives_everything_once_a_round_shuffled():
    spec = {"concat": ["a", "b", {"source": "c", "portion": "1/20", "seed": 42}, {"source": "d", "repeat": 3}]}
    size = 7 + 40 + 5 + 9
    first, second = drawn(spec, size), drawn(spec, size, start=size)
    shares = Counter(name for name, _ in first)
    assert shares == {"a": 7, "b": 40, "c": 5, "d": 9}
    assert Counter(first)[("d", 0)] == 3
    assert len({item for item in first if item[0] == "c"}) == 5
    assert Counter(first) == Counter(second)
    assert first != second
    assert len({name for name, _ in first[:12]}) > 1  # not one source after the other
    assert parse_mix(spec, COUNTS).size == size


def test_a_portion_is_the_same_part_whatever_the_run():
    spec = {"source": "c", "portion": "1/20", "seed": 42}
    parts = [{place for _, place in drawn(spec, 5, key=key)} for key in range(4)]
    assert parts[0] == parts[1] == parts[2] == parts[3]
    assert {place for _, place in drawn({**spec, "seed": 43}, 5)} != parts[0]
    assert len(drawn({"source": "c", "portion": 0.25}, 25)) == len(set(drawn({"source": "c", "portion": 0.25}, 25)))


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=5), st.integers(0, 10**12))
@settings(max_examples=25, deadline=None)
def test_weights_are_exact_in_every_stretch(weights, start):
    """In any two blocks' worth of draws no source is off its share by more than two draws a block, nor ever goes back."""
    names = list(COUNTS)[: len(weights)]
    node = parse_mix({"weighted": [{"source": n, "weight": w} for n, w in zip(names, weights, strict=True)]}, COUNTS)
    block = node._block
    places = range(start // block * block, start // block * block + block)
    found = Counter(node.at(place, 3)[0] for place in list(places)[:: max(1, block // 4096)])
    if block <= 4096:
        for name, weight in zip(names, weights, strict=True):
            assert abs(found[name] - block * weight / sum(weights)) <= 2


@pytest.mark.parametrize("weights", [(1, 3), (1, 2), (1, 6), (3, 4)])
def test_weighted_children_go_on_where_they_were(weights):
    """Also where a block has no whole number of a child's draws."""
    spec = {"weighted": [{"source": name, "weight": weight} for name, weight in zip("be", weights, strict=True)]}
    items = drawn(spec, 4096)
    for name, count in (("b", 40), ("e", 250)):
        own = [place for n, place in items if n == name]
        # Blocks shuffle draws within themselves, so a round's end is blurred; over blocks nothing is lost or repeated.
        assert max(Counter(own).values()) - min(Counter(own).values()) <= 1
        assert len(own) // count in Counter(own).values()
    half = drawn(spec, 1024) + drawn(spec, 3072, start=1024)
    assert half == items


def test_nested_shares():
    spec = yaml.safe_load(
        """
        weighted:
          - weight: 0.5
            concat: [a, b]
          - weight: 0.5
            weighted:
              - {source: c, weight: 2}
              - {concat: [d, {source: e, portion: 2/3}], weight: 1}
        """
    )
    node = parse_mix(spec, COUNTS)
    found = Counter(name for name, _ in (node.at(place, 9) for place in range(8192)))
    expected = {
        "a": 0.5 * 7 / 47,
        "b": 0.5 * 40 / 47,
        "c": 0.5 * 2 / 3,
        "d": 0.5 / 3 * 3 / 169,
        "e": 0.5 / 3 * 166 / 169,
    }
    assert node.shares() == pytest.approx(expected)
    for name, share in expected.items():
        assert abs(found[name] / 8192 - share) < 0.004
    assert mixed_sources(spec) == ["a", "b", "c", "d", "e"]
    # Until the first child has given all it has: c has 100 items at a share of 1/3.
    assert node.size == min(47 * 2, int(min(100 * Fraction(3, 2), 169 * 3) * 2))


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        ("x", r"mix: there is no source 'x'; sources: a, b"),
        (3, "mix: is 3, it must be a source's name or have one of source, concat, weighted"),
        ({}, "mix: is {}"),
        ({"concat": ["a"], "weighted": ["b"]}, "must be a source's name or have one of"),
        ({"concat": []}, r"mix.concat: is \[\]"),
        ({"concat": ["a", {"source": "b", "weight": 2}]}, r"mix.concat\[1\]: has a weight, but a concat draws by size"),
        ({"weighted": [{"source": "a", "weight": -1}]}, r"mix.weighted\[0\]: weight -1"),
        ({"weighted": [{"source": "a", "weight": float("nan")}]}, "weight nan"),
        ({"weighted": [{"source": "a", "weight": 0}]}, "all weights are 0"),
        ({"weighted": [{"source": "a", "wieght": 1}]}, r"mix.weighted\[0\]: a source has no 'wieght'"),
        ({"weighted": [{"concat": [{"source": "q"}]}]}, r"mix.weighted\[0\].concat\[0\]: there is no source 'q'"),
        ({"source": "a", "portion": "3/2"}, "portion '3/2' must be above 0 and at most 1"),
        ({"source": "a", "portion": "x"}, "portion 'x' must be a fraction such as 1/20"),
        ({"source": "a", "portion": "1/20"}, "source 'a' has 7 examples, 1/20 of them is none"),
        ({"source": "a", "repeat": 0}, "repeat 0 must be a whole number from 1"),
        ({"source": "a", "seed": "x"}, "seed 'x'"),
    ],
)
def test_refusals_say_where(spec, match):
    with pytest.raises(ValueError, match=match):
        parse_mix(spec, COUNTS)


def examples(name, count, images=5):
    turn = Turn("q?", "a")
    return [Example(f"{name}{n}", "vqa", Path(f"{n % images}.png"), (turn,)) for n in range(count)]


TREE = {"weighted": [{"concat": ["a", "b"], "weight": 1}, {"source": "e", "weight": 3, "portion": "1/2"}]}


def mixture(length=96, **kw):
    sources = [Source(name, examples(name, count)) for name, count in COUNTS.items()]
    return Mixture(sources, seed=5, length=length, mix=parse_mix(TREE, COUNTS), **kw)


def ids(group):
    return [example.id for example in group]


@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_the_same_order_on_any_number_of_ranks(ranks, group):
    """The library shards batches over ranks: step by step they see together what one rank sees alone."""
    data = mixture(group=group)
    batch = 8 // ranks
    shards = [
        list(BatchSamplerShard(BatchSampler(SequentialSampler(data), batch, drop_last=False), ranks, rank))
        for rank in range(ranks)
    ]
    steps = [[ids(data[i]) for shard in shards for i in shard[step]] for step in range(12)]
    alone = [[ids(data[8 * step + i]) for i in range(8)] for step in range(12)]
    assert steps == alone


@pytest.mark.parametrize("group", [1, 4])
def test_the_same_order_in_any_number_of_workers(group):
    data = mixture(length=24, group=group)
    torch.manual_seed(1)
    runs = [
        [[ids(g) for g in batch] for batch in DataLoader(data, batch_size=4, num_workers=workers, collate_fn=list)]
        for workers in (0, 2)
    ]
    assert runs[0] == runs[1]


def test_resuming_takes_no_longer_far_into_a_run():
    """Any place is computed from its number: the last of a million groups costs what the first costs."""
    data = mixture(length=10**12)
    assert ids(data[10**12 - 1]) == ids(mixture(length=10**12)[10**12 - 1])
    node, calls = data.mix, []
    assert node.at(10**15, 3)
    for place in (0, 10**15):
        count = 0

        def counted(*args, original=permuted):
            nonlocal count
            count += 1
            return original(*args)

        import commvlm.data.mix as module

        module.permuted = counted
        try:
            node.at(place, 3)
        finally:
            module.permuted = permuted
        calls.append(count)
    assert max(calls) <= 4


def test_groups_take_a_trees_shares_and_portions():
    data = mixture(length=3000, group=2)
    found = Counter(example.id[0] for index in range(3000) for example in data[index])
    shares = parse_mix(TREE, COUNTS).shares()
    assert set(found) == {"a", "b", "e"}
    assert abs(found["e"] / 6000 - shares["e"]) < 4 * (0.25 / 6000) ** 0.5 + 0.01
    kept = {example.id for index in range(3000) for example in data[index] if example.id[0] == "e"}
    assert len(kept) == 125  # the portion of e
    single = mixture(length=2000)
    alone = {ids(single[index])[0] for index in range(2000)}
    assert {i for i in alone if i[0] == "e"} == kept


def test_a_mix_for_other_sources_is_refused():
    with pytest.raises(ValueError, match="the mix is for a source a of 7 examples, which is not given"):
        Mixture([Source("a", examples("a", 8))], seed=0, length=1, mix=parse_mix("a", COUNTS))
    with pytest.raises(ValueError, match="no set of prompts 'long'; sets: short, wide"):
        Mixture([Source("a", examples("a", 8))], seed=0, length=1, prompts="long")


def test_spares_are_no_part_of_the_run():
    data = mixture(length=50)
    assert ids(data.spare(7)) == ids(data.spare(7))
    assert len({ids(data.spare(n))[0] for n in range(40)}) > 15
