# SPDX-License-Identifier: Apache-2.0
"""VectorQuantize: values, layouts, masks, what it learns, its gradient, state dicts, errors."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pycore import ops
from pycore.nn import VectorQuantize


def make(dim: int = 16, size: int = 40, **keywords) -> VectorQuantize:  # noqa: ANN003
    vq = VectorQuantize(dim, size, **keywords)
    with torch.no_grad():
        vq._codebook.embed.normal_()
        if vq.use_cosine_sim:
            vq._codebook.embed.copy_(F.normalize(vq._codebook.embed, dim=-1))
        vq._codebook.embed_avg.copy_(vq._codebook.embed)
    return vq


def test_results_by_hand() -> None:
    vq, x = make(), torch.randn(2, 30, 16)
    book = vq.codebook.clone()
    codes = torch.cdist(x.double().flatten(0, 1), book.double()).argmin(-1).view(2, 30)
    for training in (True, False):
        quantized, found, loss = vq.train(training)(x, freeze_codebook=True)
        assert torch.equal(found, codes) and found.dtype == torch.int64
        assert torch.equal(quantized, book[codes])
        assert loss.shape == ()
        torch.testing.assert_close(loss, F.mse_loss(book[codes], x) if training else torch.zeros(()))
        assert torch.equal(vq.get_output_from_indices(found), quantized)
    assert torch.equal(vq.codebook, book)


def test_moving_averages_by_hand() -> None:
    vq, x = make(decay=0.7, eps=1e-3), torch.randn(3, 50, 16)
    book = vq.codebook.double()
    _, codes, _ = vq(x)
    one_hot = F.one_hot(codes.flatten(), 40).double()
    size = 0.7 * torch.ones(40).double() + 0.3 * one_hot.sum(0)
    average = 0.7 * book + 0.3 * one_hot.T @ x.flatten(0, 1).double()
    torch.testing.assert_close(vq._codebook.cluster_size[0].double(), size, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(vq._codebook.embed_avg[0].double(), average, rtol=1e-5, atol=1e-6)
    smoothed = (size + 1e-3) / (size.sum() + 40 * 1e-3) * size.sum()
    torch.testing.assert_close(vq.codebook.double(), average / smoothed[:, None], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "keywords, shape, codes",
    [
        ({}, (2, 9, 16), (2, 9)),
        ({}, (5, 16), (5,)),
        ({"channel_last": False}, (2, 16, 9), (2, 9)),
        ({"accept_image_fmap": True}, (2, 16, 3, 4), (2, 3, 4)),
        ({"accept_3d_fmap": True}, (2, 16, 3, 4, 2), (2, 3, 4, 2)),
        ({"codebook_dim": 5}, (2, 9, 16), (2, 9)),
        ({"codebook_dim": 5, "layernorm_after_project_in": True}, (2, 9, 16), (2, 9)),
        ({"codebook_dim": 4, "heads": 4}, (2, 9, 16), (2, 9, 4)),
        ({"codebook_dim": 6, "heads": 3, "separate_codebook_per_head": True}, (2, 9, 16), (2, 9, 3)),
        ({"codebook_dim": 6, "heads": 3, "channel_last": False}, (2, 16, 9), (2, 9, 3)),
        ({"codebook_dim": 6, "heads": 2, "accept_image_fmap": True}, (2, 16, 3, 4), (2, 3, 4, 2)),
        ({"use_cosine_sim": True}, (2, 9, 16), (2, 9)),
        ({}, (0, 9, 16), (0, 9)),
    ],
    ids=str,
)
def test_layouts(keywords: dict, shape: tuple[int, ...], codes: tuple[int, ...]) -> None:
    vq, x = make(**keywords), torch.randn(shape, requires_grad=True)
    quantized, found, loss = vq(x)
    assert quantized.shape == shape and found.shape == codes and loss.shape == () and loss.isfinite()
    (quantized.sum() + loss).backward()
    assert x.grad is not None and x.grad.isfinite().all()
    quantized, found, loss = vq.eval()(x)
    assert torch.equal(vq.get_output_from_indices(found), quantized)
    if x.numel() and vq.heads == 1 and not vq.has_projections and not vq.use_cosine_sim:
        channels = x if vq.channel_last and x.dim() < 4 else x.movedim(1, -1)
        assert torch.equal(found, ops.vq_encode(channels.detach(), vq.codebook)[..., 0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes_are_float32_inside(dtype: torch.dtype) -> None:
    vq, x = make(), torch.randn(2, 30, 16).to(dtype)
    wide = copy.deepcopy(vq)
    quantized, codes, _ = vq(x)
    expected, wide_codes, _ = wide(x.float())
    assert quantized.dtype == dtype and torch.equal(codes, wide_codes)
    assert torch.equal(quantized, expected.to(dtype))
    assert all(torch.equal(a, b) for a, b in zip(vq.state_dict().values(), wide.state_dict().values(), strict=True))


def test_a_model_in_bfloat16_keeps_its_codebook() -> None:
    vq = make(codebook_dim=8)
    book = vq.codebook.clone()
    vq = vq.to(torch.bfloat16)
    assert vq.project_in.weight.dtype == torch.bfloat16 and torch.equal(vq.codebook, book)
    quantized, _, loss = vq(torch.randn(2, 9, 16, dtype=torch.bfloat16))
    assert quantized.dtype == torch.bfloat16 and loss.dtype == torch.float32 and vq.codebook.dtype == torch.float32


# ---- masks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keywords",
    [
        {}, {"codebook_dim": 5}, {"use_cosine_sim": True}, {"codebook_dim": 4, "heads": 4}, {"channel_last": False},
        {"codebook_dim": 6, "heads": 3, "separate_codebook_per_head": True}, {"kmeans_init": True},
        {"threshold_ema_dead_code": 2}, {"rotation_trick": False},
    ],
    ids=str,
)  # fmt: skip
def test_masked_positions_change_nothing(keywords: dict) -> None:
    """Result, loss, gradient and what is learned are those of the valid positions alone; garbage is unread."""
    one = make(**keywords) if not keywords.get("kmeans_init") else VectorQuantize(16, 40, **keywords)
    other, first = copy.deepcopy(one), keywords.get("channel_last") is False
    x = torch.randn(1, 70, 16)
    padded = torch.cat([x, torch.full((1, 30, 16), float("nan"))], 1)
    x, padded = (t.mT if first else t for t in (x, padded))
    x, padded = x.clone().requires_grad_(), padded.clone().requires_grad_()
    torch.manual_seed(1)
    quantized, codes, loss = one(x)
    (quantized.sum() + loss).backward()
    torch.manual_seed(1)
    masked, masked_codes, masked_loss = other(padded, lens=torch.tensor([70]))
    (masked.sum() + masked_loss).backward()
    masked, grad = (t.mT if first else t for t in (masked, padded.grad))
    quantized, expected = (t.mT if first else t for t in (quantized, x.grad))
    assert torch.equal(masked[:, :70], quantized) and torch.equal(masked_codes[:, :70], codes)
    assert not masked[:, 70:].any() and (masked_codes[:, 70:] == -1).all()
    torch.testing.assert_close(masked_loss, loss)
    torch.testing.assert_close(grad[:, :70], expected)
    assert not grad[:, 70:].any()
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_no_valid_position() -> None:
    vq = make(threshold_ema_dead_code=2)
    before = vq.codebook.clone()
    x = torch.randn(2, 5, 16, requires_grad=True)
    quantized, codes, loss = vq(x, mask=torch.zeros(2, 5, dtype=torch.bool))
    assert not quantized.any() and (codes == -1).all() and loss == 0
    assert vq.codebook.isfinite().all() and before.shape == vq.codebook.shape
    keep = make(return_zeros_for_masked_padding=False)
    assert torch.equal(keep(x, mask=torch.zeros(2, 5, dtype=torch.bool))[0], x)


def test_code_minus_one_decodes_to_zeros() -> None:
    assert not make().get_codes_from_indices(torch.full((2, 3), -1)).any()


# ---- learning --------------------------------------------------------------------------------------------------------


def test_revived_codes_survive_the_step() -> None:
    """Also the next one: their averages are revived with them."""
    vq, x = make(threshold_ema_dead_code=2.0, decay=0.99), torch.randn(1, 200, 16) + 5
    _, codes, _ = vq(x)
    dead = vq._codebook.cluster_size[0] == 2.0
    assert dead.any()
    rows = {tuple(row) for row in x[0].tolist()}
    assert all(tuple(row) in rows for row in vq.codebook[dead].tolist())
    revived = vq.codebook[dead].clone()
    vq._codebook.threshold_ema_dead_code = 0
    vq(x)
    assert (vq.codebook[dead] - revived).norm(dim=-1).max() < 0.5 * (x - x.mean(1)).norm(dim=-1).mean()


def test_as_many_codes_are_revived_as_there_are_rows() -> None:
    vq, x = make(threshold_ema_dead_code=2.0), torch.randn(1, 7, 16)
    vq(x)
    assert (vq._codebook.cluster_size[0] == 2.0).sum() == 7


def test_kmeans() -> None:
    centres = torch.randn(3, 16) * 10
    x = (centres[torch.arange(400) % 3] + 0.1 * torch.randn(400, 16)).view(4, 100, 16)
    best = min(float((VectorQuantize(16, 3, kmeans_init=True, decay=1.0)(x)[0] - x).square().mean()) for _ in range(20))
    assert best < 0.011, "one of twenty beginnings finds the three clusters"
    vq = VectorQuantize(16, 8, kmeans_init=True)
    assert not vq._codebook.initted
    vq.eval()(x)
    assert vq._codebook.initted and vq.codebook.isfinite().all()
    book = vq.codebook.clone()
    vq(x + 1)
    assert torch.equal(vq.codebook, book)
    with_few = VectorQuantize(16, 40, kmeans_init=True)
    quantized, _, _ = with_few(x[:1, :5])
    torch.testing.assert_close(quantized, x[:1, :5], atol=1e-4, rtol=1e-4)


def test_frozen_manual_and_accumulated() -> None:
    x, y = torch.randn(1, 60, 16), torch.randn(1, 30, 16)
    vq = make()
    book = vq.codebook.clone()
    copy.deepcopy(vq)(x, freeze_codebook=True)
    assert torch.equal(vq.codebook, book)
    frozen = copy.deepcopy(vq)
    frozen.freeze_codebook = True
    frozen(x)
    assert torch.equal(frozen.codebook, book) and (frozen._codebook.cluster_size == 1).all()
    manual = copy.deepcopy(vq)
    manual._codebook.manual_ema_update = True
    manual(x)
    assert torch.equal(manual.codebook, book)
    manual.update_ema()
    once = copy.deepcopy(vq)
    once(x)
    assert torch.equal(manual.codebook, once.codebook) and not torch.equal(once.codebook, book)
    accumulated, together = copy.deepcopy(vq), copy.deepcopy(vq)
    accumulated(x, accum_ema_update=True)
    assert torch.equal(accumulated.codebook, book)
    accumulated(y)
    together(torch.cat([x, y], 1))
    torch.testing.assert_close(accumulated.codebook, together.codebook)
    weight = (torch.arange(40) % 2).float()
    for given in (weight, lambda sums, counts: weight):
        weighted = copy.deepcopy(vq)
        weighted(x, ema_update_weight=given)
        sizes = weighted._codebook.cluster_size[0]
        assert (sizes[::2] == 1).all() and torch.equal(sizes[1::2], once._codebook.cluster_size[0, 1::2])


def test_update_indices_is_a_step() -> None:
    x, one = torch.randn(2, 40, 16), make(codebook_dim=4, heads=4)
    other = copy.deepcopy(one)
    mask = torch.rand(2, 40) > 0.3
    _, codes, _ = one(x, mask=mask)
    other.update_indices(x, codes.clamp(min=0), mask=mask)
    for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_topk() -> None:
    vq, x = make(), torch.randn(2, 30, 16)
    book = vq.codebook.clone()
    quantized, codes, loss = vq(x, topk=3)
    assert quantized.shape == (2, 30, 3, 16) and codes.shape == loss.shape == (2, 30, 3)
    assert torch.equal(codes, ops.vq_encode(x, book, topk=3)) and torch.equal(quantized, book[codes])
    torch.testing.assert_close(loss, (book[codes] - x.unsqueeze(2)).square().mean(-1))
    assert torch.equal(vq.codebook, book), "nothing is learned"
    mask = torch.rand(2, 30) > 0.5
    quantized, codes, loss = vq(x, topk=50, mask=mask)
    assert (
        codes.shape == (2, 30, 40)
        and (codes[~mask] == -1).all()
        and not loss[~mask].any()
        and not quantized[~mask].any()
    )
    image = make(accept_image_fmap=True)
    quantized, codes, loss = image(torch.randn(2, 16, 3, 4), topk=2)
    assert quantized.shape == (2, 16, 3, 4, 2) and codes.shape == loss.shape == (2, 3, 4, 2)


# ---- gradients -------------------------------------------------------------------------------------------------------


def rotation(u: Tensor, q: Tensor) -> Tensor:
    """The matrix of arXiv 2410.06424, 4.2, for one pair of vectors, with the ratio of their lengths."""
    ratio, u, q = q.norm() / u.norm(), F.normalize(u, dim=0), F.normalize(q, dim=0)
    w = F.normalize(u + q, dim=0)
    return ratio * (torch.eye(len(u), dtype=u.dtype) - 2 * torch.outer(w, w) + 2 * torch.outer(q, u))


def test_rotation_is_the_default_gradient() -> None:
    vq, x = make(commitment_weight=0.0), torch.randn(1, 20, 16, requires_grad=True)
    book = vq.codebook.clone()
    quantized, codes, _ = vq(x)
    upstream = torch.randn(1, 20, 16)
    quantized.backward(upstream)
    for row in range(20):
        matrix = rotation(x[0, row].detach().double(), book[codes[0, row]].double())
        torch.testing.assert_close(matrix @ x[0, row].detach().double(), book[codes[0, row]].double())
        expected = matrix.T @ upstream[0, row].double()
        torch.testing.assert_close(x.grad[0, row].double(), expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(quantized, book[codes]), "the value is the code's, to the bit"


def test_straight_through() -> None:
    x = torch.randn(1, 20, 16, requires_grad=True)
    quantized, _, loss = make(rotation_trick=False)(x, freeze_codebook=True)
    upstream = torch.randn(1, 20, 16)
    quantized.backward(upstream)
    assert torch.equal(x.grad, upstream)
    x.grad = None
    loss.backward()
    torch.testing.assert_close(x.grad, 2 * (x - quantized).detach() / x.numel())
    blocked = make(route_gradients_to_input=False)(x)[0]
    assert not blocked.requires_grad


def test_learned_codebooks() -> None:
    vq = make(learnable_codebook=True, ema_update=False, rotation_trick=False)
    x = torch.randn(1, 50, 16)
    _, codes, loss = vq(x)
    loss.backward()
    expected = torch.zeros(40, 16).index_add_(0, codes[0], 2 * (vq.codebook.detach()[codes[0]] - x[0]) / x.numel())
    torch.testing.assert_close(vq._codebook.embed.grad[0], expected, rtol=1e-5, atol=1e-8)
    assert "_codebook.embed" in dict(vq.named_parameters())
    directional = make(directional_reparam=True, threshold_ema_dead_code=1)
    quantized, _, loss = directional(x.clone().requires_grad_())
    quantized.sum().backward()
    assert loss == 0 and directional._codebook.embed.grad.abs().sum() > 0
    orthogonal = make(orthogonal_reg_weight=2.0, ema_update=False)
    *_, loss, parts = orthogonal(x, return_loss_breakdown=True)
    unit = F.normalize(orthogonal.codebook, dim=-1)
    torch.testing.assert_close(parts.orthogonal_reg, (unit @ unit.T).square().sum() / 40**2 - 1 / 40)
    torch.testing.assert_close(loss, parts.commitment + 2 * parts.orthogonal_reg)


# ---- around it -------------------------------------------------------------------------------------------------------


def test_state_dict() -> None:
    """Names and shapes are vector-quantize-pytorch's."""
    vq = make(codebook_dim=4, heads=4, separate_codebook_per_head=True)
    expected = {
        "_codebook.initted": (), "_codebook.cluster_size": (4, 40), "_codebook.embed_avg": (4, 40, 4),
        "_codebook.embed": (4, 40, 4),
    }  # fmt: skip
    assert {name: tuple(t.shape) for name, t in vq.state_dict().items()} == expected
    projected = VectorQuantize(16, 40, codebook_dim=3, layernorm_after_project_in=True).state_dict()
    names = {
        "project_in.0.weight",
        "project_in.0.bias",
        "project_in.1.weight",
        "project_out.weight",
        "project_out.bias",
    }
    assert names <= set(projected)
    trained, fresh = VectorQuantize(16, 40), VectorQuantize(16, 40, kmeans_init=True)
    fresh.load_state_dict(trained.state_dict())
    x = torch.randn(1, 9, 16)
    assert torch.equal(fresh.eval()(x)[1], trained.eval()(x)[1]), "loaded codes are not replaced by k-means"


def test_setting_the_codebook() -> None:
    vq, book = make(), torch.randn(40, 16)
    vq.codebook = book
    assert torch.equal(vq.codebook, book) and vq.codebook.shape == (40, 16)
    assert make(codebook_dim=4, heads=4, separate_codebook_per_head=True).codebook.shape == (4, 40, 4)


def test_compiled() -> None:
    torch._dynamo.reset()
    vq = make().eval()
    compiled = torch.compile(vq, fullgraph=True, dynamic=True, backend="aot_eager")
    for length in (3, 8, 21):
        x = torch.randn(2, length, 16)
        for mine, theirs in zip(compiled(x), vq(x), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize(
    "keywords, message",
    [
        ({"affine_param": True}, "affine_param is True, which is not available, and must be False"),
        ({"stochastic_sample_codes": True}, "stochastic_sample_codes is True, which is not available, and must be"),
        ({"vq_bridge": torch.nn.Identity()}, r"vq_bridge is Identity\(\), which is not available, and must be None"),
        ({"codebook_size": 0}, "codebook_size is 0 and must be at least 1"),
        ({"decay": 1.5}, "decay is 1.5 and must be 0.0 to 1.0"),
        ({"use_cosine_sim": True, "learnable_codebook": True}, "use_cosine_sim is on beside learnable_codebook"),
        ({"directional_reparam": True}, "threshold_ema_dead_code is 0 and must be positive with directional_reparam"),
        ({"sync_update_v": 0.5}, "sync_update_v is 0.5 and must be 0 without learnable_codebook"),
    ],
    ids=str,
)  # fmt: skip
def test_constructor_errors(keywords: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"^VectorQuantize: {message}"):
        VectorQuantize(**{"dim": 16, "codebook_size": 40, **keywords})


def test_errors() -> None:
    vq, x, mask = make(), torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool)
    with pytest.raises(TypeError, match="^VectorQuantize: colour is no argument of it, and must be one$"):
        VectorQuantize(16, 40, colour=1)
    with pytest.raises(ValueError, match="^VectorQuantize: indices is 3, which is not available, and must be None$"):
        vq(x, indices=3)
    with pytest.raises(ValueError, match="^VectorQuantize: x has 15 channels and must have 16$"):
        vq(x[..., 1:])
    with pytest.raises(
        ValueError, match=r"^VectorQuantize: x has shape \[2, 5, 1, 16\] and must have 3 dimensions or 2$"
    ):
        vq(x.unsqueeze(2))
    with pytest.raises(
        ValueError, match=r"^VectorQuantize: mask has shape \[2, 4\] of torch.bool and must have \[2, 5\]"
    ):
        vq(x, mask=mask[:, 1:])
    with pytest.raises(ValueError, match="^VectorQuantize: lens is given beside mask, and must be None then$"):
        vq(x, mask=mask, lens=torch.tensor([1, 2]))
    with pytest.raises(ValueError, match=r"^VectorQuantize: lens has shape \[3\] and must have \[2\]$"):
        vq(x, lens=torch.tensor([1, 2, 3]))
    with pytest.raises(ValueError, match="^VectorQuantize: topk is 0 and must be at least 1$"):
        vq(x, topk=0)
    with pytest.raises(
        ValueError, match=r"^VectorQuantize: ema_update_weight has shape \[3\] and must have \[1, 40\] or"
    ):
        vq(x, ema_update_weight=torch.ones(3))
    with pytest.raises(ValueError, match="^vq_encode: x has NaN or an infinity in row 0 and must be finite$"):
        vq(x * float("nan"))
    with pytest.raises(TypeError, match="^VectorQuantize: x is a int and must be a Tensor$"):
        vq(3)
    with pytest.raises(ValueError, match="^VectorQuantize: x has dtype torch.int64 and must be floating point$"):
        vq(torch.ones(2, 5, 16, dtype=torch.int64))
