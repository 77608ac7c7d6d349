# SPDX-License-Identifier: Apache-2.0
"""ContrastiveLoss, LateInteraction and PrototypeLayer beside their formulas in plain torch."""

from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pycore import ops
from pycore.nn import ContrastiveLoss, LateInteraction, PrototypeLayer


def rows(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=dtype)


def seeded(make: type, *args: object, **kwargs: object) -> nn.Module:
    torch.manual_seed(0)
    return make(*args, **kwargs)


def plain_clip(a: Tensor, b: Tensor, log_scale: Tensor) -> Tensor:
    logits = log_scale.exp() * F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T
    target = torch.arange(a.shape[0])
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


# ---- ContrastiveLoss -------------------------------------------------------------------------------------------------


def test_contrastive_is_clips() -> None:
    a, b = rows(37, 24).requires_grad_(), rows(37, 24, seed=1).requires_grad_()
    loss = ContrastiveLoss()
    assert [name for name, _ in loss.named_parameters()] == ["log_scale"]
    assert loss.scale().item() == pytest.approx(1 / 0.07)
    actual, expected = loss(a, b), plain_clip(a, b, loss.log_scale)
    torch.testing.assert_close(actual, expected)
    leaves = (a, b, loss.log_scale)
    for mine, theirs in zip(torch.autograd.grad(actual, leaves), torch.autograd.grad(expected, leaves), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-6)


def test_contrastive_options() -> None:
    a, b = rows(9, 8), rows(12, 8, seed=1)
    positives = torch.tensor([0, 3, -1, 11, 5, 5, 2, 1, 7])
    kept = positives >= 0
    one_way = ContrastiveLoss(scale=2.0, learned=False, normalize=False, symmetric=False)
    assert not list(one_way.parameters()) and list(one_way.state_dict()) == ["log_scale"]
    expected = F.cross_entropy((2.0 * a @ b.T)[kept], positives[kept])
    torch.testing.assert_close(one_way(a, b, positives=positives), expected)
    # Alone, `gather` is the batch of this process.
    both = ContrastiveLoss(gather=True)
    torch.testing.assert_close(both(a, a[:, [1, 0, *range(2, 8)]]), ContrastiveLoss()(a, a[:, [1, 0, *range(2, 8)]]))


def test_contrastive_scale_stays_below_its_largest() -> None:
    loss = ContrastiveLoss(scale=50.0, largest=50.0)
    with torch.no_grad():
        loss.log_scale.fill_(math.log(80.0))
    assert loss.scale().item() == pytest.approx(50.0)
    loss(rows(5, 4), rows(5, 4, seed=1)).backward()
    assert loss.log_scale.grad.item() == 0


def test_contrastive_gradcheck() -> None:
    loss = ContrastiveLoss(scale=3.0).double()
    a, b = (rows(4, 3, seed=i, dtype=torch.float64).requires_grad_() for i in range(2))
    assert torch.autograd.gradcheck(lambda a, b, scale: torch.func.functional_call(loss, {"log_scale": scale}, (a, b)),
                                    (a, b, loss.log_scale))  # fmt: skip


@pytest.mark.skipif(not torch.distributed.is_available(), reason="this torch has no distributed package")
def test_contrastive_of_two_ranks(tmp_path: Path) -> None:
    """Losses and gradients, averaged over ranks, are those of one process with the whole batch."""
    program = Path(__file__).with_name("contrastive_ranks.py")
    environment = {**os.environ, "PYTHONPATH": str(program.parents[2])}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(program), str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        outputs = [rank.communicate(timeout=180)[0].decode() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(outputs)


# ---- LateInteraction -------------------------------------------------------------------------------------------------


def test_late_interaction_is_colberts() -> None:
    layer = seeded(LateInteraction, 16, 12)
    query, document = rows(3, 5, 16), rows(4, 7, 16)
    q, d = (F.normalize(x @ layer.projection.weight.T, dim=-1) for x in (query, document))
    products = torch.einsum("qld,pmd->qplm", q, d)
    torch.testing.assert_close(layer(query, document), products.amax(-1).sum(-1))
    query_lengths, lengths = torch.tensor([5, 2, 0]), torch.tensor([7, 1, 3, 4])
    for p, length in enumerate(lengths):
        products[:, p, :, length:] = -torch.inf
    best = products.amax(-1)
    for i, length in enumerate(query_lengths):
        best[i, :, length:] = 0
    actual = layer(query, document, query_lengths=query_lengths, document_lengths=lengths)
    torch.testing.assert_close(actual, best.sum(-1))
    assert layer(query[0], document).shape == (4,) and layer(query[0], document[0]).shape == ()
    assert layer(query, document.expand(3, 4, 7, 16)).shape == (3, 4)


def test_late_interaction_encodes_ahead() -> None:
    layer = seeded(LateInteraction, 16, 12)
    query, document = rows(3, 5, 16), rows(4, 7, 16)
    index = layer.encode(document)
    assert torch.equal(index[2:3, 1:2], layer.encode(document[2:3, 1:2]))
    assert torch.equal(ops.maxsim(layer.encode(query), index), layer(query, document))
    as_they_are = LateInteraction(16, None, normalize=False)
    assert not list(as_they_are.parameters())
    assert torch.equal(as_they_are(query, document), ops.maxsim(query, document))


def test_late_interaction_gradcheck() -> None:
    layer = seeded(LateInteraction, 4, 3).double()
    query, document = (rows(2, 3, 4, seed=i, dtype=torch.float64).requires_grad_() for i in range(2))
    weight = layer.projection.weight

    def score(query: Tensor, document: Tensor, weight: Tensor) -> Tensor:
        return torch.func.functional_call(layer, {"projection.weight": weight}, (query, document))

    assert torch.autograd.gradcheck(score, (query, document, weight))


# ---- PrototypeLayer --------------------------------------------------------------------------------------------------


def test_prototypes() -> None:
    layer = seeded(PrototypeLayer, 6, 5, 3)
    x = rows(8, 6)
    distances = (x.unsqueeze(1) - layer.prototypes).square().sum(-1)
    torch.testing.assert_close(layer.distances(x), distances)
    torch.testing.assert_close(layer(x), distances @ layer.classes.weight.T)
    r1, r2 = layer.losses(x)
    torch.testing.assert_close(r1, distances.amin(0).mean())
    torch.testing.assert_close(r2, distances.amin(1).mean())
    assert layer(x.reshape(2, 4, 6)).shape == (2, 4, 3)
    torch.testing.assert_close(layer.losses(x.reshape(2, 4, 6))[0], r1)
    torch.testing.assert_close(layer(x[3]), layer(x)[3])
    torch.testing.assert_close(layer.losses(x[3])[1], distances[3].min())


def test_prototypes_gradcheck() -> None:
    layer = seeded(PrototypeLayer, 3, 4, 2).double()
    names = [name for name, _ in layer.named_parameters()]

    def outputs(x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        values = dict(zip(names, parameters, strict=True))
        with torch.nn.utils.stateless._reparametrize_module(layer, values):
            return (layer(x), *layer.losses(x))

    x = rows(5, 3, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(outputs, (x, *layer.parameters()))


def test_an_encoding_on_a_prototype_has_a_gradient() -> None:
    layer = seeded(PrototypeLayer, 3, 4, 2)
    x = layer.prototypes.detach()[:2].clone().requires_grad_()
    (layer(x).sum() + sum(layer.losses(x))).backward()
    assert x.grad.isfinite().all() and layer.prototypes.grad.isfinite().all()


# ---- all -------------------------------------------------------------------------------------------------------------

MODULES = {
    "ContrastiveLoss": (lambda: ContrastiveLoss(), lambda: (rows(10, 8), rows(10, 8, seed=1))),
    "LateInteraction": (lambda: LateInteraction(8, 6), lambda: (rows(2, 5, 8), rows(3, 4, 8))),
    "PrototypeLayer": (lambda: PrototypeLayer(8, 5, 3), lambda: (rows(7, 8),)),
}


@pytest.mark.parametrize("name", MODULES)
def test_compiled_and_state(name: str) -> None:
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    module, other = make(), make()
    other.load_state_dict(module.state_dict())
    tensors = inputs()
    expected = module(*tensors)
    assert torch.equal(other(*tensors), expected)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*tensors), expected)
    compiled(*tensors).sum().backward()
    grads = [parameter.grad.clone() for parameter in module.parameters()]
    other(*tensors).sum().backward()
    for mine, theirs in zip(grads, other.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs.grad)


@pytest.mark.parametrize("name", MODULES)
def test_half_precision_module(name: str) -> None:
    """Weights and inputs in bfloat16 are widened: the values of the same numbers in float32."""
    make, inputs = MODULES[name]
    torch.manual_seed(0)
    module = make().bfloat16()
    half = tuple(x.bfloat16() for x in inputs())
    actual = module(*half)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual, module.float()(*(x.float() for x in half)))


ERRORS = [
    (lambda: ContrastiveLoss(scale=0.0), "ContrastiveLoss: scale is 0.0 and must be finite and more than 0"),
    (lambda: ContrastiveLoss(scale=200.0), "ContrastiveLoss: largest is 100.0 and must be at least scale's 200.0"),
    (lambda: LateInteraction(0), "LateInteraction: dim is 0 and must be at least 1"),
    (
        lambda: LateInteraction(8)(rows(2, 3, 8), rows(2, 3, 7)),
        "LateInteraction: tokens have 7 channels and must have 8",
    ),
    (lambda: PrototypeLayer(8, 0, 2), "PrototypeLayer: prototypes is 0 and must be at least 1"),
    (lambda: PrototypeLayer(8, 4, 2)(rows(2, 7)), "PrototypeLayer: prototypes has 8 channels and must have x's 7"),
    (lambda: PrototypeLayer(8, 4, 2).losses(rows(0, 8)), "pairwise_min: x has shape [0, 8] and must have a row"),
]


@pytest.mark.parametrize("call, message", ERRORS, ids=[message for _, message in ERRORS])
def test_errors(call: object, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_wrong_types() -> None:
    with pytest.raises(TypeError, match="ContrastiveLoss: learned is a int and must be a bool"):
        ContrastiveLoss(learned=1)
    with pytest.raises(TypeError, match="LateInteraction: tokens is a list and must be a Tensor"):
        LateInteraction(8)([], rows(2, 3, 8))
    with pytest.raises(TypeError, match="PrototypeLayer: x is a list and must be a Tensor"):
        PrototypeLayer(8, 4, 2)([])
