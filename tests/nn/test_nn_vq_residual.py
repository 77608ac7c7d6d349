# SPDX-License-Identifier: Apache-2.0
"""ResidualVQ, GroupedResidualVQ and MaskedChannelRVQ."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from pycore import ops
from pycore.nn import GroupedResidualVQ, MaskedChannelRVQ, ResidualVQ


def make(
    cls: type[ResidualVQ] = ResidualVQ, *, dim: int = 16, sizes: tuple[int, ...] = (40, 40, 40), **keywords
) -> ResidualVQ:  # noqa: ANN003
    rvq = cls(dim=dim, codebook_size=sizes, **keywords)
    with torch.no_grad():
        for q, layer in enumerate(rvq.layers):
            embed = layer._codebook.embed
            embed.copy_(
                F.normalize(torch.randn_like(embed), dim=-1)
                if layer.use_cosine_sim
                else torch.randn_like(embed) * 0.6**q
            )
            layer._codebook.embed_avg.copy_(embed)
    return rvq


@pytest.mark.parametrize("sizes", [(40, 40, 40), (5, 128, 17)], ids=str)
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_stages_by_hand(sizes: tuple[int, ...], training: bool) -> None:
    rvq, x = make(sizes=sizes), torch.randn(2, 30, 16)
    books = [layer.codebook.clone() for layer in rvq.layers]
    quantized, codes, losses, vectors = rvq.train(training)(x, freeze_codebook=True, return_all_codes=True)
    residual, total = x, torch.zeros_like(x)
    for q, book in enumerate(books):
        nearest = torch.cdist(residual.double(), book.double()).argmin(-1)
        assert torch.equal(codes[..., q], nearest)
        torch.testing.assert_close(losses[q], F.mse_loss(book[nearest], residual) if training else torch.zeros(()))
        assert torch.equal(vectors[q], book[nearest])
        residual, total = residual - book[nearest], total + book[nearest]
    assert torch.equal(quantized, total)
    assert torch.equal(rvq.get_output_from_indices(codes), quantized)
    assert torch.equal(rvq.get_codes_from_indices(codes), vectors)
    assert torch.equal(rvq.encode(x), codes) and torch.equal(rvq.decode(codes), quantized)
    assert torch.equal(rvq.encode(x, num_quantizers=2), codes[..., :2])
    torch.testing.assert_close(
        rvq.get_output_from_indices(codes[..., :2]), books[0][codes[..., 0]] + books[1][codes[..., 1]]
    )


@pytest.mark.parametrize("keywords", [{}, {"use_cosine_sim": True}, {"threshold_ema_dead_code": 2}], ids=str)
def test_learns_as_its_stages_would_alone(keywords: dict) -> None:
    rvq, x = make(**keywords), torch.randn(2, 50, 16)
    stages = copy.deepcopy(list(rvq.layers))
    torch.manual_seed(3)
    _, codes, losses = rvq(x)
    torch.manual_seed(3)
    residual = x
    for q, stage in enumerate(stages):
        quantized, of_stage, loss = stage(residual)
        residual = residual - quantized
        assert torch.equal(codes[..., q], of_stage) and torch.equal(losses[q], loss)
        for a, b in zip(stage.state_dict().values(), rvq.layers[q].state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_every_stage_has_a_commitment_gradient() -> None:
    for stage in range(3):
        rvq, x = make(), torch.randn(1, 20, 16, requires_grad=True)
        losses = rvq(x)[2]
        losses[stage].backward()
        assert x.grad.norm() > 1e-3


def test_gradient_of_the_sum() -> None:
    """Once straight through, whatever the stages; with the rotation trick the sum of the stages' own."""
    x, upstream = torch.randn(1, 20, 16), torch.randn(1, 20, 16)
    for stages in ((40,), (40,) * 4):
        rvq, y = make(sizes=stages, rotation_trick=False), x.clone().requires_grad_()
        quantized = rvq(y, freeze_codebook=True)[0]
        quantized.backward(upstream)
        assert torch.equal(y.grad, upstream)
        assert torch.equal(quantized, rvq.eval()(x)[0])
    rvq, y = make(), x.clone().requires_grad_()
    rvq(y, freeze_codebook=True)[0].backward(upstream)
    expected, residual = torch.zeros_like(x), x
    for layer in rvq.layers:
        z = residual.clone().requires_grad_()
        code = layer(z, freeze_codebook=True)[0]
        code.backward(upstream)
        expected += z.grad
        residual = residual - code.detach()
    torch.testing.assert_close(y.grad, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_output_is_that_of_its_codes(dtype: torch.dtype) -> None:
    """A residual in bfloat16 chooses other codes after a few stages, and its sum is not what they decode to."""
    rvq, x = make(sizes=(64,) * 8).eval(), torch.randn(1, 200, 16).to(dtype)
    quantized, codes, _ = rvq(x)
    assert quantized.dtype == dtype
    assert torch.equal(codes, rvq(x.float())[1])
    assert torch.equal(quantized, rvq.get_output_from_indices(codes).to(dtype))
    trained, train_codes, _ = rvq.train()(x.clone().requires_grad_(), freeze_codebook=True)
    assert torch.equal(train_codes, codes) and torch.equal(trained, quantized)


@pytest.mark.parametrize(
    "keywords",
    [{}, {"codebook_dim": 5}, {"use_cosine_sim": True}, {"shared_codebook": True}, {"threshold_ema_dead_code": 2},
     {"beam_size": 3}, {"shared_codebook": True, "threshold_ema_dead_code": 2}],
    ids=str,
)  # fmt: skip
def test_masked_positions_change_nothing(keywords: dict) -> None:
    one = make(**keywords)
    other, x = copy.deepcopy(one), torch.randn(1, 70, 16)
    padded = torch.cat([x, torch.full((1, 9, 16), float("inf"))], 1)
    mask = torch.arange(79)[None] < 70
    torch.manual_seed(1)
    quantized, codes, losses = one(x)
    torch.manual_seed(1)
    masked, masked_codes, masked_losses = other(padded, mask=mask)
    assert torch.equal(masked[:, :70], quantized) and not masked[:, 70:].any()
    assert torch.equal(masked_codes[:, :70], codes) and (masked_codes[:, 70:] == -1).all()
    torch.testing.assert_close(masked_losses, losses)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_lengths() -> None:
    for module in (make(), GroupedResidualVQ(dim=16, groups=2, num_quantizers=3, codebook_size=20)):
        x, lens = torch.randn(3, 9, 16), torch.tensor([9, 0, 4])
        other = copy.deepcopy(module)
        for mine, theirs in zip(module(x, lens=lens), other(x, mask=torch.arange(9) < lens[:, None]), strict=True):
            assert torch.equal(mine, theirs)
    with pytest.raises(ValueError, match=r"^ResidualVQ: lens has shape \[2\] and must have \[3\]$"):
        make()(x, lens=lens[1:])
    with pytest.raises(ValueError, match="^ResidualVQ: lens is given beside mask, and must be None then$"):
        make()(x, lens=lens, mask=torch.ones(3, 9, dtype=torch.bool))


def test_quantizer_dropout() -> None:
    rvq, x = make(sizes=(30,) * 6, quantize_dropout=True, quantize_dropout_cutoff_index=1), torch.randn(1, 9, 16)
    seen = set()
    for seed in range(40):
        quantized, codes, losses = rvq(x, freeze_codebook=True, rand_quantize_dropout_fixed_seed=seed)
        kept = int((codes[0, 0] >= 0).sum())
        assert (codes[..., :kept] >= 0).all() and (codes[..., kept:] == -1).all()
        assert not losses[kept:].any() and (losses[:kept] > 0).all()
        assert torch.equal(rvq.get_output_from_indices(codes), quantized)
        assert torch.equal(codes[..., :kept], rvq.encode(x, num_quantizers=kept))
        seen.add(kept)
    assert seen == {2, 3, 4, 5, 6}
    rvq.quantize_dropout_multiple_of = 4
    kept = {int((rvq(x, freeze_codebook=True)[1][0, 0] >= 0).sum()) for _ in range(40)}
    assert kept == {4, 6}
    assert (rvq.eval()(x)[1] >= 0).all()


def test_shared_codebook() -> None:
    rvq, x = make(shared_codebook=True, decay=0.5), torch.randn(1, 60, 16)
    assert len({id(layer._codebook) for layer in rvq.layers}) == 1
    book = rvq.layers[0].codebook.clone()
    size, average, residual = torch.ones(40), book.clone(), x
    _, codes, _ = rvq(x)
    for q in range(3):
        counts, sums = ops.vq_statistics(residual, codes[..., q], 40)
        size, average = size.lerp(counts, 0.5), average.lerp(sums, 0.5)
        residual = residual - book[codes[..., q]]
    torch.testing.assert_close(
        rvq.layers[0].codebook, average / ((size + 1e-5) / (size.sum() + 40e-5) * size.sum())[:, None]
    )


def test_beam() -> None:
    rvq, x = make(sizes=(40,) * 4, beam_size=4, eval_beam_size=8), torch.randn(2, 80, 16)
    books = rvq.codebooks.clone()
    _, codes, losses = rvq(x, freeze_codebook=True)
    assert torch.equal(codes, ops.rvq_encode(x, books, beam_size=4))
    assert losses.shape == (4,) and (losses > 0).all()
    quantized, wide, _ = rvq.eval()(x)
    assert torch.equal(wide, ops.rvq_encode(x, books, beam_size=8)) and torch.equal(wide, rvq.encode(x))
    greedy = rvq(x, beam_size=1)[0]
    assert (quantized - x).square().mean() < (greedy - x).square().mean()


def test_kmeans_goes_stage_by_stage() -> None:
    rvq = ResidualVQ(dim=8, num_quantizers=4, codebook_size=16, kmeans_init=True)
    x = torch.randn(4, 100, 8)
    losses = rvq(x)[2]
    assert all(bool(layer._codebook.initted) for layer in rvq.layers)
    assert (losses[1:] < losses[:-1]).all() and losses[-1] > 0
    assert (rvq.eval()(x)[0] - x).square().mean() < 0.25 * x.square().mean()


def test_images_and_projections() -> None:
    rvq, x = make(accept_image_fmap=True, codebook_dim=6), torch.randn(2, 16, 3, 5)
    quantized, codes, losses = rvq.eval()(x)
    assert quantized.shape == x.shape and codes.shape == (2, 3, 5, 3) and losses.shape == (3,)
    flat = copy.deepcopy(rvq)
    flat.accept_image_fmap = False
    expected, flat_codes, _ = flat(x.flatten(2).mT)
    assert torch.equal(codes.flatten(1, 2), flat_codes) and torch.equal(quantized.flatten(2).mT, expected)
    assert torch.equal(rvq.encode(x), codes)
    torch.testing.assert_close(rvq.get_output_from_indices(codes), quantized.movedim(1, -1))


def test_diveq() -> None:
    rvq = ResidualVQ(dim=16, num_quantizers=3, codebook_size=20, diveq=True)
    x = torch.randn(1, 30, 16, requires_grad=True)
    rvq(x)[0].square().sum().backward()
    assert all(layer._codebook.embed.grad.abs().sum() > 0 for layer in rvq.layers) and x.grad.isfinite().all()


def test_groups() -> None:
    rvq = GroupedResidualVQ(dim=16, groups=2, num_quantizers=3, codebook_size=20)
    x = torch.randn(2, 9, 16)
    quantized, codes, losses, vectors = rvq(x, return_all_codes=True)
    assert quantized.shape == x.shape and codes.shape == (2, 2, 9, 3) and losses.shape == (2, 3)
    assert vectors.shape == (2, 3, 2, 9, 8) and rvq.codebooks.shape == (2, 3, 20, 8)
    quantized, codes, _ = rvq.eval()(x)
    assert torch.equal(rvq.get_output_from_indices(codes), quantized)
    assert torch.equal(codes[1], rvq.rvqs[1](x[..., 8:])[1])
    assert {name.split(".")[0] for name in rvq.state_dict()} == {"rvqs"}
    with pytest.raises(ValueError, match="^GroupedResidualVQ: groups is 3 and must divide dim, 16$"):
        GroupedResidualVQ(dim=16, groups=3, num_quantizers=3, codebook_size=20)
    with pytest.raises(ValueError, match="^GroupedResidualVQ: indices has 1 groups and must have 2$"):
        rvq.get_output_from_indices(codes[:1])


def test_state_dict() -> None:
    """Names are vector-quantize-pytorch's."""
    names = set(ResidualVQ(dim=16, codebook_dim=4, num_quantizers=2, codebook_size=20).state_dict())
    buffers = {
        f"layers.{q}._codebook.{name}" for q in (0, 1) for name in ("initted", "cluster_size", "embed_avg", "embed")
    }
    assert names == buffers | {f"project_{way}.{name}" for way in ("in", "out") for name in ("weight", "bias")}


# ---- MaskedChannelRVQ ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("keywords", [{}, {"beam_size": 3}, {"kmeans_init": True}, {"use_cosine_sim": True}], ids=str)
def test_masked_channels(keywords: dict) -> None:
    x = torch.randn(2, 100, 16)
    rvq = make(MaskedChannelRVQ, sizes=(30,) * 5, **keywords)
    if "kmeans_init" in keywords:
        rvq(x)
    bands = [slice(0, 5), slice(5, 10), slice(10, 16)]  # Language-Codec's thirds: D // 3 and 2 D // 3
    for training in (True, False):
        quantized, codes, losses = rvq.train(training)(x, freeze_codebook=True)
        assert torch.equal(codes, rvq.encode(x)), "encode is forward"
        total = torch.zeros_like(x)
        for q, band in enumerate(bands):
            seen = torch.zeros_like(x)
            seen[..., band] = x[..., band]
            stage = copy.deepcopy(rvq.layers[q]).train(training)
            code, alone, loss = stage(seen, freeze_codebook=True)
            assert torch.equal(codes[..., q], alone) and torch.equal(losses[q], loss)
            total = total + code
        rest = ops.rvq_encode(
            x - total, rvq.codebooks[3:], metric="cosine" if "use_cosine_sim" in keywords else "euclidean",
            beam_size=keywords.get("beam_size", 1),
        )  # fmt: skip
        torch.testing.assert_close(codes[..., 3:], rest)
        torch.testing.assert_close(quantized, total + ops.rvq_decode(rest, rvq.codebooks[3:]))
        assert torch.equal(rvq.decode(codes), quantized)


def test_masked_channels_after_kmeans_stay_in_their_band() -> None:
    rvq = MaskedChannelRVQ(dim=12, num_quantizers=4, codebook_size=8, kmeans_init=True)
    rvq(torch.randn(1, 200, 12))
    for q in range(3):
        outside = torch.ones(12, dtype=torch.bool)
        outside[4 * q : 4 * q + 4] = False
        assert not rvq.layers[q].codebook[:, outside].any()


def test_masked_channels_dropout_keeps_the_masked() -> None:
    rvq = make(MaskedChannelRVQ, sizes=(20,) * 6, quantize_dropout=True)
    kept = {int((rvq(torch.randn(1, 3, 16), freeze_codebook=True)[1][0, 0] >= 0).sum()) for _ in range(60)}
    assert kept == {3, 4, 5, 6}
    own = MaskedChannelRVQ(dim=16, num_quantizers=4, codebook_size=20, channel_masks=torch.ones(1, 16))
    x = torch.randn(1, 9, 16)
    assert torch.equal(own.encode(x), ops.rvq_encode(x, own.codebooks))


# ---- errors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"heads": 2}, "heads is 2, which is not available, and must be 1"),
        (
            {"implicit_neural_codebook": True},
            "implicit_neural_codebook is True, which is not available, and must be False",
        ),
        ({"num_quantizers": None}, "num_quantizers is None and must be given with one codebook_size for all"),
        ({"codebook_size": (3, 4, 5)}, "codebook_size has 3 entries and must have num_quantizers', 2"),
        ({"codebook_size": (3, 4), "shared_codebook": True}, r"codebook_size is \(3, 4\) and must be the same for all"),
        ({"quant_grad_frac": 2.0}, "quant_grad_frac is 2.0 and must be 0.0 to 1.0"),
        ({"quantize_dropout_cutoff_index": 2}, "quantize_dropout_cutoff_index is 2 and must be 0 to 1"),
        ({"eval_beam_size": 2}, "eval_beam_size is 2 and must be None without beam_size"),
        ({"beam_size": 17}, "beam_size is 17 and must be 1 to 16"),
    ],
    ids=str,
)
def test_constructor_errors(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^ResidualVQ: {message}"):
        ResidualVQ(**{"dim": 8, "num_quantizers": 2, "codebook_size": 5, **keywords})


def test_errors() -> None:
    rvq, x = make(), torch.randn(2, 5, 16)
    with pytest.raises(ValueError, match="^ResidualVQ: x has 15 channels and must have 16$"):
        rvq(x[..., 1:])
    with pytest.raises(
        ValueError, match=r"^ResidualVQ: x has shape \[5, 16\] of torch.float32 and must have 3 dimensions"
    ):
        rvq(x[0])
    with pytest.raises(ValueError, match=r"^ResidualVQ: mask has shape \[2, 4\] of torch.bool and must have \[2, 5\]"):
        rvq(x, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="^ResidualVQ: num_quantizers is 4 and must be 1 to 3$"):
        rvq.encode(x, num_quantizers=4)
    with pytest.raises(ValueError, match="^ResidualVQ: indices has 4 stages and must have at most 3$"):
        rvq.get_codes_from_indices(torch.zeros(2, 5, 4, dtype=torch.int64))
    with pytest.raises(IndexError, match="^rvq_decode: codes has 40 at stage 0 and must have -1 to 39$"):
        rvq.get_output_from_indices(torch.full((2, 5, 3), 40))
    with pytest.raises(TypeError, match="^VectorQuantize: colour is no argument of it, and must be one$"):
        ResidualVQ(dim=8, num_quantizers=2, codebook_size=5, colour=3)
    with pytest.raises(ValueError, match="^MaskedChannelRVQ: masked_quantizers is 9 and must be 1 to 8"):
        MaskedChannelRVQ(dim=16, masked_quantizers=9)
    with pytest.raises(
        ValueError, match=r"^MaskedChannelRVQ: channel_masks has shape \[1, 3\] and must have \[at most 8, 16\]$"
    ):
        MaskedChannelRVQ(dim=16, channel_masks=torch.ones(1, 3))


# ---- compiled --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "make_one",
    [
        lambda: make(), lambda: make(rotation_trick=False), lambda: make(use_cosine_sim=True),
        lambda: make(codebook_dim=5), lambda: make(MaskedChannelRVQ, sizes=(20,) * 4),
    ],
    ids=["default", "straight_through", "cosine", "projected", "masked"],
)  # fmt: skip
def test_compiled_training(make_one) -> None:  # noqa: ANN001
    """One graph, whatever the length, with the results, gradients and averages of the module itself."""
    torch._dynamo.reset()
    one = make_one()
    other = copy.deepcopy(one)
    compiled = torch.compile(one, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (9, 12, 30):
        x = torch.randn(2, length, 16)
        grads = []
        for module in (compiled, other):
            leaf = x.clone().requires_grad_()
            quantized, codes, losses = module(leaf)
            (quantized.square().sum() + losses.sum()).backward()
            grads.append((leaf.grad, quantized.detach(), losses.detach(), codes))
        for mine, theirs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)
    for mine, theirs in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(mine, theirs)
