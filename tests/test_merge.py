"""Merges, alignments and fuses against arithmetic written out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from commvlm.model.align import ALIGNS, MLP, MLPProjection
from commvlm.model.fuse import FUSES, ChannelConcat
from commvlm.model.merge import LLNLayerscale, Mean
from commvlm.model.merges import MERGES
from commvlm.model.names import settle
from commvlm.model.tokens import Tokens

LAYERS, TOKENS, DIM = 3, 5, 6


def states(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, TOKENS, DIM, generator=generator) * (index + 1) for index in range(LAYERS)]


def random_merge(**options) -> LLNLayerscale:
    merge = LLNLayerscale(LAYERS, DIM, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in merge.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return merge


def naive(merge: LLNLayerscale, layers: list[torch.Tensor]) -> np.ndarray:
    """sum_i w_i LLN_i(z_i), token by token, in NumPy and float64."""
    value = {name: tensor.detach().numpy().astype(np.float64) for name, tensor in merge.named_parameters()}
    logits = value["logits"]
    weights = np.exp(logits) / np.exp(logits).sum() if merge.weight == "softmax" else logits

    def norm(z: np.ndarray, pair: int) -> np.ndarray:
        scaled = (z - z.mean()) / np.sqrt(((z - z.mean()) ** 2).mean() + 1e-5)
        return scaled * value[f"norms.{pair}.weight"] + value[f"norms.{pair}.bias"]

    def linear(z: np.ndarray, pair: int) -> np.ndarray:
        return value[f"linears.{pair}.weight"] @ z + value[f"linears.{pair}.bias"]

    result = np.zeros((2, TOKENS, DIM))
    for index, state in enumerate(layers):
        pair = 0 if merge.share == "shared" else index
        for image in range(2):
            for token in range(TOKENS):
                z = state[image, token].numpy().astype(np.float64)
                lln = linear(norm(z, pair), pair) if merge.order == "linear(ln)" else norm(linear(z, pair), pair)
                result[image, token] += weights[index] * lln
    return result


@pytest.mark.parametrize("order", ["linear(ln)", "ln(linear)"])
@pytest.mark.parametrize("share", ["per-layer", "shared"])
@pytest.mark.parametrize("weight", ["softmax", "free"])
def test_lln_layerscale_is_the_papers_sum(order, share, weight):
    merge = random_merge(order=order, share=share, weight=weight)
    np.testing.assert_allclose(merge(states()).detach().numpy(), naive(merge, states()), rtol=1e-4, atol=1e-5)


def test_every_open_point_of_the_paper_changes_the_result():
    results = [random_merge()(states())]
    for option in ({"order": "ln(linear)"}, {"share": "shared"}, {"weight": "free"}):
        results.append(random_merge(**option)(states()))
    for index, first in enumerate(results):
        for second in results[index + 1 :]:
            assert (first - second).abs().max() > 1e-2


def test_mean_is_the_mean_and_one_layer_is_itself():
    expected = np.stack([s.numpy() for s in states()]).mean(axis=0)
    np.testing.assert_allclose(Mean(LAYERS, DIM)(states()).numpy(), expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(Mean(1, DIM)(states()[:1]), states()[0])
    assert Mean(LAYERS, DIM).weights.tolist() == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("weight", ["softmax", "free"])
def test_weights_start_equal_and_sum_to_one(weight):
    merge = LLNLayerscale(LAYERS, DIM, weight=weight)
    assert merge.weights.tolist() == pytest.approx([1 / 3] * 3)


def test_softmax_weights_still_sum_to_one_after_training_and_every_parameter_learns():
    torch.manual_seed(0)
    merge = LLNLayerscale(LAYERS, DIM)
    before = {name: parameter.detach().clone() for name, parameter in merge.named_parameters()}
    optimizer = torch.optim.SGD(merge.parameters(), lr=0.1)
    target = torch.randn(2, TOKENS, DIM)
    for _ in range(3):
        optimizer.zero_grad()
        (merge(states()) - target).square().mean().backward()
        assert all(parameter.grad is not None and parameter.grad.abs().max() > 0 for parameter in merge.parameters())
        optimizer.step()
    assert all(not torch.equal(before[name], parameter) for name, parameter in merge.named_parameters())
    assert merge.weights.sum().item() == pytest.approx(1)
    assert merge.weights.detach().std() > 0


def test_per_layer_and_shared_differ_in_parameters():
    pair = 2 * DIM + DIM * DIM + DIM
    for share, pairs in (("per-layer", LAYERS), ("shared", 1)):
        assert sum(p.numel() for p in LLNLayerscale(LAYERS, DIM, share=share).parameters()) == pairs * pair + LAYERS


@pytest.mark.parametrize(
    ("hidden", "ratio", "widths"),
    [(1, 4, [(6, 24), (24, 6)]), (2, 4, [(6, 24), (24, 24), (24, 6)]), (1, 0.5, [(6, 3), (3, 6)])],
)
def test_mlp_has_the_asked_widths_and_gelu_between(hidden, ratio, widths):
    mlp = MLP(DIM, hidden=hidden, ratio=ratio)
    assert [(m.in_features, m.out_features) for m in mlp if isinstance(m, nn.Linear)] == widths
    assert [type(m) for m in mlp][1::2] == [nn.GELU] * hidden
    x = torch.randn(4, DIM)
    expected = x
    for module in [m for m in mlp if isinstance(m, nn.Linear)][:-1]:
        z = expected @ module.weight.T + module.bias
        expected = z * 0.5 * (1 + torch.erf(z / 2**0.5))
    expected = expected @ mlp[-1].weight.T + mlp[-1].bias
    torch.testing.assert_close(mlp(x), expected)


def test_llava_projection_has_the_output_width_inside():
    assert [tuple(p.shape) for p in MLPProjection(6, 10).parameters()] == [(10, 6), (10,), (10, 10), (10,)]


def test_channel_concat_keeps_tokens_and_adds_widths():
    first, second = torch.randn(2, TOKENS, 6), torch.randn(2, TOKENS, 4)
    fuse = ChannelConcat([Tokens(TOKENS, 6), Tokens(TOKENS, 4)])
    fused = fuse([first, second])
    assert fused.shape == (2, TOKENS, fuse.out.dim) == (2, TOKENS, 10)
    assert torch.equal(fused[..., :6], first)
    assert torch.equal(fused[..., 6:], second)


@pytest.mark.parametrize(
    ("table", "spec", "message"),
    [
        (MERGES, "lln-layerscal", "did you mean 'lln-layerscale'"),
        (ALIGNS, {"kind": "mlp", "ration": 4}, "has no option 'ration'; did you mean 'ratio'"),
        (FUSES, "chanel-concat", "did you mean 'channel-concat'"),
        (MERGES, {"order": "linear(ln)"}, "has no 'kind'"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_name(table, spec, message):
    with pytest.raises(ValueError, match=message):
        settle(spec, table, what="thing")


def test_wrong_option_values_are_refused():
    with pytest.raises(ValueError, match="did you mean 'shared'"):
        LLNLayerscale(LAYERS, DIM, share="share")
    with pytest.raises(ValueError, match="hidden >= 1"):
        MLP(DIM, hidden=0)


def test_settled_choices_name_every_option():
    assert settle("lln-layerscale", MERGES, what="merge") == {
        "kind": "lln-layerscale",
        "order": "linear(ln)",
        "share": "per-layer",
        "weight": "softmax",
    }
    settled = settle({"kind": "mlp", "ratio": 8}, ALIGNS, what="align")
    assert settled == {"kind": "mlp", "hidden": 2, "ratio": 8, "out": None}
