"""The other merges against arithmetic by hand, and every merge as a fold: in place, in training, without some layers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from commvlm.model.memory import live_bytes
from commvlm.model.merge import Layerscale, LLNLayerscale
from commvlm.model.merge_more import ConvLayerscale, DenseChannels, LayerAttention, SparseChannels, SparseTokens
from commvlm.model.merges import MERGES

LAYERS, GRID, DIM = 4, (2, 3), 6
TOKENS = GRID[0] * GRID[1]
EVERY = [
    ("mean", {}), ("layerscale", {}), ("layerscale", {"weight": "free"}), ("lln-layerscale", {}),
    ("lln-layerscale", {"order": "ln(linear)"}), ("lln-layerscale", {"share": "shared"}),
    ("lln-layerscale", {"weight": "free"}), ("conv-layerscale", {}), ("conv-layerscale", {"kernel": 1, "share": "shared"}),
    ("layer-attention", {}), ("sti", {"stride": 2}), ("sci", {}), ("dci", {}), ("dci", {"groups": 4}),
]  # fmt: skip


def states(seed: int = 0, layers: int = LAYERS, prefix: int = 0) -> list[torch.Tensor]:
    """Of different sizes; with a prefix, views into larger tensors, as encoders give them."""
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(2, prefix + TOKENS, DIM, generator=generator) * (i + 1) for i in range(layers)]
    return [state[:, prefix:] for state in made]


def lively(kind: str, layers: int = LAYERS, grid=GRID, dim: int = DIM, **options) -> nn.Module:
    """A merge in eval mode, every parameter and statistic random."""
    merge = MERGES[kind](layers, dim, grid, **options)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor in [*merge.parameters(), *(b for b in merge.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.2)
    return merge.eval()


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum()


def value(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().numpy().astype(np.float64)


def test_layerscale_is_the_weighted_sum():
    for weight in ("softmax", "free"):
        merge = lively("layerscale", weight=weight)
        assert isinstance(merge, Layerscale)
        w = softmax(value(merge.logits)) if weight == "softmax" else value(merge.logits)
        expected = sum(w[i] * value(z) for i, z in enumerate(states()))
        np.testing.assert_allclose(value(merge(states())), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kernel", "share"), [(3, "per-layer"), (1, "per-layer"), (3, "shared")])
def test_conv_layerscale_is_batch_norm_of_a_convolution_over_the_grid(kernel, share):
    merge = lively("conv-layerscale", kernel=kernel, share=share)
    assert isinstance(merge, ConvLayerscale)
    w = softmax(value(merge.logits))
    reach, expected = kernel // 2, np.zeros((2, TOKENS, DIM))
    for layer, state in enumerate(states()):
        pair = 0 if share == "shared" else layer
        conv, norm = merge.convs[pair], merge.norms[pair]
        square = np.zeros((2, GRID[0] + 2 * reach, GRID[1] + 2 * reach, DIM))
        square[:, reach : reach + GRID[0], reach : reach + GRID[1]] = value(state).reshape(2, *GRID, DIM)
        for row in range(GRID[0]):
            for column in range(GRID[1]):
                window = square[:, row : row + kernel, column : column + kernel]
                out = np.einsum("bhwi,oihw->bo", window, value(conv.weight))
                scaled = (out - value(norm.running_mean)) / np.sqrt(value(norm.running_var) + norm.eps)
                expected[:, row * GRID[1] + column] += w[layer] * (scaled * value(norm.weight) + value(norm.bias))
    np.testing.assert_allclose(value(merge(states())), expected, rtol=1e-4)
    with torch.no_grad():
        np.testing.assert_allclose(value(merge(states())), expected, rtol=1e-4)


def test_conv_layerscale_normalises_by_the_batch_in_training():
    merge = lively("conv-layerscale", layers=1).train()
    norm = merge.norms[0]
    with torch.no_grad():
        norm.weight.fill_(1)
        norm.bias.fill_(0)
    out = merge(states(layers=1)).detach()
    torch.testing.assert_close(out.mean(dim=(0, 1)), torch.zeros(DIM), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(dim=(0, 1), correction=0), torch.ones(DIM), atol=1e-3, rtol=0)


def test_layer_attention_is_a_softmax_over_layers_for_each_token():
    merge = lively("layer-attention")
    assert isinstance(merge, LayerAttention)
    normed = np.stack([value(merge.norms[i](z)) for i, z in enumerate(states())])
    scores = np.einsum("lbnd,ld->lbn", normed, value(merge.queries)) / DIM**0.5 + value(merge.logits)[:, None, None]
    shares = np.exp(scores) / np.exp(scores).sum(axis=0)
    values = np.stack([value(merge.lln(i, z)) for i, z in enumerate(states())])
    np.testing.assert_allclose(value(merge(states())), (shares[..., None] * values).sum(axis=0), rtol=1e-4)
    assert shares.std(axis=(1, 2)).max() > 0.05  # tokens do differ in what they choose


def test_layer_attention_starts_as_lln_layerscale():
    torch.manual_seed(0)
    first = LayerAttention(LAYERS, DIM)
    second = LLNLayerscale(LAYERS, DIM)
    second.load_state_dict({k: v for k, v in first.state_dict().items() if k != "queries"})
    torch.testing.assert_close(first(states()), second(states()))


def test_the_three_of_dense_connector():
    z = [s.numpy() for s in states()]
    sci, dci = SparseChannels(LAYERS, DIM, GRID), DenseChannels(LAYERS, DIM, GRID, groups=2)
    np.testing.assert_allclose(sci(states()).numpy(), np.concatenate([z[3], z[0], z[1], z[2]], axis=-1))
    assert (sci.out.count, sci.out.dim, sci.out.grid) == (TOKENS, 4 * DIM, GRID)
    expected = np.concatenate([z[3], (z[0] + z[1]) / 2, (z[2] + z[3]) / 2], axis=-1)
    np.testing.assert_allclose(dci(states()).numpy(), expected, rtol=1e-5, atol=1e-6)
    assert dci.out.dim == 3 * DIM
    sti = SparseTokens(LAYERS, DIM, GRID, stride=4)
    pooled = [layer[:, :4].mean(axis=1, keepdims=True) for layer in z[:3]]  # the last two tokens do not fill a run
    np.testing.assert_allclose(sti(states()).numpy(), np.concatenate([z[3], *pooled], axis=1), rtol=1e-5, atol=1e-6)
    assert (sti.out.count, sti.out.grid) == (TOKENS + 3, None)


def test_dense_connectors_published_token_count():
    sti = SparseTokens(3, 1024, (24, 24))
    assert sti.out.count == 576 + 72 + 72


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        ("conv-layerscale", {"kernel": 2}, "kernel=2"),
        ("dci", {"groups": 3}, "groups=3, which does not divide its 4 layers"),
        ("sti", {"stride": 7}, "stride=7: it needs 1 to 6"),
        ("layerscale", {"weight": "sofmax"}, "did you mean 'softmax'"),
        ("lln-layerscale", {"order": "ln"}, "unknown order"),
    ],
)
def test_wrong_options_are_refused(kind, options, message):
    with pytest.raises(ValueError, match=message):
        MERGES[kind](LAYERS, DIM, GRID, **options)


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_in_place_and_in_training_are_one_merge_and_layers_are_not_written_to(kind, options, prefix):
    merge = lively(kind, **options)
    given = states(prefix=prefix)
    before = [state.clone() for state in given]
    trained = merge(given)
    with torch.no_grad():
        folded = merge(given)
        single = torch.cat([merge([state[i : i + 1] for state in given]) for i in range(2)])
    torch.testing.assert_close(folded, trained, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(single, trained, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(a, b) for a, b in zip(before, given, strict=True))


@pytest.mark.parametrize(("kind", "options"), [e for e in EVERY if e[0] not in ("mean", "sti", "sci", "dci")])
def test_every_parameter_learns(kind, options):
    merge = lively(kind, **options).train()
    (merge(states()) - torch.randn(1)).pow(2).mean().backward()
    for name, parameter in merge.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


@pytest.mark.parametrize(("kind", "options"), EVERY)
def test_a_layer_that_is_off_has_no_say_and_the_others_have_its_share(kind, options):
    merge = lively(kind, **options)
    given = states()
    other = [given[0], given[1] * -5 + 1, *given[2:]]
    for off in ((1,), (1, 2)):
        for context in (torch.no_grad(), torch.enable_grad()):
            with context:
                torch.testing.assert_close(merge(given, off), merge(other, off))
                assert (merge(given, off) - merge(given)).abs().max() > 1e-3
    if merge.weights is not None:
        assert merge.weights_without((1, 2)).sum().item() == pytest.approx(merge.weights.sum().item())
        assert merge.weights_without((1, 2))[[1, 2]].tolist() == [0, 0]


@pytest.mark.parametrize(("kind", "options"), [e for e in EVERY if e[0] not in ("sti", "sci", "dci")])
def test_equal_layers_merge_to_the_same_whichever_of_them_are_off(kind, options):
    """Weights that stay sum to what all summed to: with every layer alike, leaving some out changes nothing."""
    merge = lively(
        kind, **{**options, "share": "shared"} if "lln" in kind or "conv" in kind or "att" in kind else options
    )
    if kind == "layer-attention":
        with torch.no_grad():
            merge.queries.copy_(merge.queries[:1].expand_as(merge.queries))
    same = [states()[0]] * LAYERS
    torch.testing.assert_close(merge(same, (0, 3)), merge(same), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "options"), [e for e in EVERY if e[0] not in ("sti", "sci", "dci")])
@pytest.mark.parametrize("prefix", [0, 1])
def test_a_merge_holds_at_most_two_feature_maps_of_its_own(kind, options, prefix):
    """The sum and one layer's work, whatever the number of layers; counted from the tensors that are alive."""
    grid, dim, layers = (16, 16), 64, 6
    merge = lively(kind, layers=layers, grid=grid, dim=dim, **options)
    given = [torch.randn(1, prefix + 256, dim)[:, prefix:] for _ in range(layers)]
    one = given[0].numel() * 4
    with torch.no_grad(), live_bytes() as count:
        merge(given)
    assert count.peak <= 2.05 * one  # 5 %: weights scaled for one layer, scores of one number a token
    naive = torch.stack(given).numel() * 4
    assert naive == layers * one
