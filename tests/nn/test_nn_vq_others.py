# SPDX-License-Identifier: Apache-2.0
"""CodebookFeatures, DiscreteKeyValueBottleneck and GumbelVectorQuantizer; what all quantizers refuse and take."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pycore.nn import (
    CodebookFeatures,
    DiscreteKeyValueBottleneck,
    GroupedResidualVQ,
    GumbelVectorQuantizer,
    MaskedChannelRVQ,
    ResidualVQ,
    VectorQuantize,
)

# ---- CodebookFeatures ------------------------------------------------------------------------------------------------


def chosen(features: CodebookFeatures, x: Tensor) -> Tensor:
    """By the paper's formula: the inner product of the normalized activation with codes of length one."""
    parts = features.norm(x).unflatten(-1, (features.heads, -1))
    logits = torch.einsum("bnhd,hkd->bnhk", parts, F.normalize(features.codebook, dim=-1))
    return logits.topk(features.k, dim=-1).indices


@pytest.mark.parametrize("k, heads", [(1, 1), (4, 1), (3, 4)])
def test_codebook_features(k: int, heads: int) -> None:
    features, x = CodebookFeatures(16, 50, k=k, num_codebooks=heads), torch.randn(2, 9, 16)
    output, codes, loss = features(x)
    assert torch.equal(codes, chosen(features, x)) and codes.shape == (2, 9, heads, k)
    each = [features.codebook[h][codes[:, :, h]].sum(2) / k for h in range(heads)]
    torch.testing.assert_close(output, torch.cat(each, -1))
    torch.testing.assert_close(loss, (output - x).square().sum(-1).mean())
    again, same, _ = features(x, codes=codes)
    assert torch.equal(again, output) and same is codes


@pytest.mark.parametrize("loss", ["base", "aeloss", "fullaeloss", "vqvae"])
def test_codebook_features_gradients(loss: str) -> None:
    features = CodebookFeatures(16, 50, k=2, loss=f"{loss}-0.5" if loss == "vqvae" else loss, beta=0.5)
    x, upstream = torch.randn(1, 9, 16, requires_grad=True), torch.randn(1, 9, 16)
    output, codes, penalty = features(x)
    ((output * upstream).sum() + penalty).backward()
    difference = (output - x).detach()
    of_x, of_output = upstream.clone(), torch.zeros_like(upstream) if loss == "vqvae" else upstream.clone()
    if loss != "base":
        of_output += 2 * difference / 9
    if loss in ("fullaeloss", "vqvae"):
        of_x -= 0.5 * 2 * difference / 9
    torch.testing.assert_close(x.grad, of_x)
    expected = torch.zeros(50, 16)
    for j in range(2):
        expected.index_add_(0, codes[0, :, 0, j], of_output[0] / 2)
    torch.testing.assert_close(features.codebook.grad[0], expected, rtol=1e-5, atol=1e-6)


def test_switching_codes() -> None:
    features, x = (
        CodebookFeatures(16, 50, k=2, num_codebooks=2, metric="euclidean", layer_norm=False),
        torch.randn(1, 30, 16),
    )
    before = features.encode(x)
    off = before[0, 0, 1, 0].item()
    features.switch_off(off, head=1)
    without = features.encode(x)
    assert torch.equal(without[:, :, 0], before[:, :, 0]) and off not in without[:, :, 1]
    touched = (before[:, :, 1] == off).any(-1)
    assert touched.any() and torch.equal(without[:, :, 1][~touched], before[:, :, 1][~touched])
    features.switch_on([off], head=1)
    assert torch.equal(features.encode(x), before)
    features.force(7)
    forced = features.encode(x)
    assert (forced[:, :, 0, 1] == 7).all() and torch.equal(forced[:, :, 0, 0], before[:, :, 0, 0])
    assert torch.equal(forced[:, :, 1], before[:, :, 1])
    features.reset()
    features.switch_off([code for code in range(50) if code != 3])
    few, codes, _ = features(x)
    assert (codes[:, :, 0, 0] == 3).all() and (codes[:, :, 0, 1] == -1).all()
    torch.testing.assert_close(few[0, 0, :8], features.codebook[0, 3].detach() / 2)
    features.switch_off(3)
    assert (features.encode(x)[:, :, 0] == -1).all()
    assert set(features.state_dict()) == {"codebook"}


def test_codebook_features_errors() -> None:
    features = CodebookFeatures(16, 50, k=2, num_codebooks=2)
    for keywords, message in (
        ({"num_codebooks": 3}, "num_codebooks is 3 and must divide dim, 16"),
        ({"loss": "mse"}, "loss is 'mse' and must be one of base"),
        ({"loss": "vqvae-x"}, "loss is 'vqvae-x' and must be one of base"),
        ({"k": 51}, "k is 51 and must be 1 to 50"),
        ({"metric": "dot"}, "metric is 'dot' and must be cosine or euclidean"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=f"^CodebookFeatures: {message}"):
            CodebookFeatures(16, 50, **keywords)
    with pytest.raises(IndexError, match="^CodebookFeatures: codes has 50 and must have 0 to 49$"):
        features.switch_off(50)
    with pytest.raises(ValueError, match="^CodebookFeatures: head is 2 and must be 0 to 1$"):
        features.switch_on(5, head=2)
    with pytest.raises(ValueError, match="^CodebookFeatures: codes has 3 entries and must have at most k, 2$"):
        features.force([1, 2, 3])
    with pytest.raises(ValueError, match=r"^CodebookFeatures: x has shape \[3, 15\] and must have 16 channels$"):
        features(torch.zeros(3, 15))


# ---- DiscreteKeyValueBottleneck --------------------------------------------------------------------------------------


def test_bottleneck_by_hand() -> None:
    bottleneck = DiscreteKeyValueBottleneck(6, num_memories=20, dim_embed=16, num_memory_codebooks=5, dim_memory=3)
    bottleneck.values.data.normal_()
    bottleneck.vq._codebook.embed.normal_()
    bottleneck.eval()
    x = torch.randn(2, 9, 16)
    expected = torch.zeros(2, 9, 3)
    for c in range(5):
        keys = x @ bottleneck.rand_proj[c]
        codes = torch.cdist(keys, bottleneck.vq.codebook[c].expand(2, -1, -1)).argmin(-1)
        expected += bottleneck.values[c].detach()[codes] / 5
    torch.testing.assert_close(bottleneck(x), expected)
    every, (_, codes, _) = bottleneck(x, return_intermediates=True, average_pool_memories=False)
    torch.testing.assert_close(every.mean(2), expected)
    assert every.shape == (2, 9, 5, 3) and codes.shape == (2, 9, 5)


def test_bottleneck_learns_only_what_it_hits() -> None:
    bottleneck = DiscreteKeyValueBottleneck(
        4, num_memories=12, num_memory_codebooks=3, dim_memory=2, encoder=torch.nn.Identity()
    )
    assert not bottleneck.values.any(), "values start at zero"
    bottleneck.freeze_keys()
    keys = bottleneck.vq.codebook.clone()
    x = torch.randn(1, 5, 4, requires_grad=True)
    out, (_, codes, _) = bottleneck(x, return_intermediates=True)
    out.sum().backward()
    counts = torch.stack([torch.bincount(codes[0, :, c], minlength=12) for c in range(3)])
    torch.testing.assert_close(bottleneck.values.grad, (counts / 3).unsqueeze(-1).expand(3, 12, 2))
    assert torch.equal(bottleneck.vq.codebook, keys) and x.grad is None
    bottleneck.freeze_keys(False)
    bottleneck(x)
    assert not torch.equal(bottleneck.vq.codebook, keys)
    with pytest.raises(ValueError, match=r"^DiscreteKeyValueBottleneck: x has shape \[5, 4\] and must have"):
        bottleneck(x[0])


# ---- GumbelVectorQuantizer -------------------------------------------------------------------------------------------


def test_gumbel_in_eval_is_the_largest_logit() -> None:
    quantizer = GumbelVectorQuantizer(8, 10, (2.0, 0.5, 0.9), 2, False, 12).eval()
    x = torch.randn(3, 7, 8)
    result = quantizer(x, produce_targets=True)
    logits = quantizer.weight_proj(x).view(3, 7, 2, 10)
    codes = logits.argmax(-1)
    assert torch.equal(result["targets"], codes)
    books = quantizer.vars.view(2, 10, 6)
    torch.testing.assert_close(result["x"], torch.cat([books[g][codes[..., g]] for g in range(2)], -1))
    share = F.one_hot(codes, 10).float().mean((0, 1))
    torch.testing.assert_close(
        result["code_perplexity"], torch.exp(-torch.xlogy(share, share).sum(-1)).sum(), rtol=1e-4, atol=0
    )
    mean = logits.softmax(-1).mean((0, 1))
    torch.testing.assert_close(
        result["prob_perplexity"], torch.exp(-torch.xlogy(mean, mean).sum(-1)).sum(), rtol=1e-4, atol=0
    )
    assert result["num_vars"] == 20 and {name: tuple(t.shape) for name, t in quantizer.state_dict().items()} == {
        "vars": (1, 20, 6), "weight_proj.weight": (20, 8), "weight_proj.bias": (20,),
    }  # fmt: skip
    out, targets = quantizer.forward_idx(x)
    assert torch.equal(out, result["x"]) and torch.equal(targets, codes)


def test_gumbel_trains() -> None:
    quantizer = GumbelVectorQuantizer(8, 10, (2.0, 0.5, 0.9), 2, True, 12, time_first=False, weight_proj_depth=2)
    x = torch.randn(3, 8, 7, requires_grad=True)
    result = quantizer(x, produce_targets=True)
    assert result["x"].shape == (3, 12, 7) and quantizer.vars.shape == (1, 10, 6)
    codes = result["targets"]
    expected = torch.cat([quantizer.vars[0][codes[..., g]] for g in range(2)], -1).mT
    torch.testing.assert_close(result["x"], expected)
    (result["x"].sum() + result["prob_perplexity"]).backward()
    assert x.grad.abs().sum() > 0 and quantizer.vars.grad.abs().sum() > 0
    assert quantizer.curr_temp == 2.0
    quantizer.set_num_updates(3)
    assert quantizer.curr_temp == pytest.approx(2 * 0.9**3)
    quantizer.set_num_updates(1000)
    assert quantizer.curr_temp == 0.5


def test_gumbel_errors() -> None:
    with pytest.raises(ValueError, match="^GumbelVectorQuantizer: groups is 5 and must divide vq_dim, 12$"):
        GumbelVectorQuantizer(8, 10, (2.0, 0.5, 0.9), 5, False, 12)
    with pytest.raises(ValueError, match="^GumbelVectorQuantizer: temp is"):
        GumbelVectorQuantizer(8, 10, (0.5, 2.0, 0.9), 2, False, 12)
    with pytest.raises(ValueError, match="^GumbelVectorQuantizer: x has 7 channels and must have 8$"):
        GumbelVectorQuantizer(8, 10, (2.0, 0.5, 0.9), 2, False, 12)(torch.zeros(1, 2, 7))


# ---- every quantizer -------------------------------------------------------------------------------------------------

QUANTIZERS = {
    "VectorQuantize": lambda: VectorQuantize(16, 40),
    "ResidualVQ": lambda: ResidualVQ(dim=16, num_quantizers=3, codebook_size=20),
    "GroupedResidualVQ": lambda: GroupedResidualVQ(dim=16, groups=2, num_quantizers=2, codebook_size=20),
    "MaskedChannelRVQ": lambda: MaskedChannelRVQ(dim=16, num_quantizers=4, codebook_size=20),
    "CodebookFeatures": lambda: CodebookFeatures(16, 40, num_codebooks=2),
    "DiscreteKeyValueBottleneck": lambda: DiscreteKeyValueBottleneck(16, num_memories=20, num_memory_codebooks=4),
    "GumbelVectorQuantizer": lambda: GumbelVectorQuantizer(16, 8, (2, 0.5, 0.9), 2, False, 16),
}


@pytest.mark.parametrize("name", QUANTIZERS)
def test_every_quantizer_names_itself_and_what_is_wrong(name: str) -> None:
    for training in (True, False):
        module = QUANTIZERS[name]().train(training)
        with pytest.raises(TypeError, match=f"^{name}: x is a list and must be a Tensor$"):
            module([1.0])
        with pytest.raises(ValueError, match=f"^{name}: x has .*int64.* and must .*floating point$"):
            module(torch.ones(2, 9, 16, dtype=torch.int64))
        with pytest.raises(ValueError, match=f"^{name}: x has .*7.* and must have .*16"):
            module(torch.ones(2, 9, 7))
        with pytest.raises(ValueError, match=f"^{name}: x has .*1.* and must have"):
            module(torch.ones(2, 9, 16, 1, 1))


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_every_quantizer_takes_what_its_weights_are_not(name: str, dtype: torch.dtype) -> None:
    module, x = QUANTIZERS[name]().eval(), torch.randn(2, 9, 16).to(dtype)

    def output(x: torch.Tensor) -> torch.Tensor:
        result = module(x)
        return result["x"] if isinstance(result, dict) else result[0] if isinstance(result, tuple) else result

    wide = output(x.float())
    torch.testing.assert_close(output(x).float(), wide, rtol=2**-7, atol=1e-2)
    assert output(x).dtype == (torch.float32 if name == "DiscreteKeyValueBottleneck" else dtype)


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", [(2, 0, 16), (0, 9, 16)], ids=str)
def test_every_quantizer_takes_nothing(name: str, shape: tuple[int, ...]) -> None:
    for training in (True, False):
        result = QUANTIZERS[name]().train(training)(torch.randn(shape))
        if isinstance(result, dict):
            result = (result["x"], result["code_perplexity"], result["prob_perplexity"])
        tensors = result if isinstance(result, tuple) else (result,)
        assert tensors[0].shape == shape and all(bool(x.isfinite().all()) for x in tensors)
