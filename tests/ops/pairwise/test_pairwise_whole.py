# SPDX-License-Identifier: Apache-2.0
"""The family as a whole: blocks of many rows, inputs at their edges, compile with every number changing, export and
autocast of every function.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from torch import Tensor

from pycore import ops


def rows(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


# ---- blocks of many rows ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 7, 400])
@pytest.mark.parametrize(("n", "m", "d"), [(300, 1000, 20), (577, 3001, 8), (290, 500, 600)])
def test_topk_of_more_rows_than_a_block_has(isa: str, n: int, m: int, d: int, k: int) -> None:
    """Blocks of up to 288 rows, or columns cut for the threads: a row's result is that of the row alone."""
    x, y = rows(n, d), rows(m, d, seed=1)
    together = ops.pairwise_topk(x, y, k)
    for row in (0, 95, 287, 288, n - 1):
        alone = ops.pairwise_topk(x[row : row + 1], y, k)
        assert all(torch.equal(mine[0], whole[row]) for mine, whole in zip(alone, together, strict=True))
    exact, _ = (x.double() @ y.double().T).topk(k)
    assert (together[0] - exact).abs().max() <= 2e-6 * exact.abs().max()


def test_topk_lengths_in_blocks(isa: str) -> None:
    x, y = rows(2, 300, 12), rows(2, 700, 12, seed=1)
    scores, indices = ops.pairwise_topk(x, y, 3, x_lengths=torch.tensor([0, 299]), y_lengths=torch.tensor([700, 65]))
    assert (indices[0] == -1).all() and (indices[1, 299] == -1).all()
    alone = ops.pairwise_topk(x[1, :299], y[1, :65], 3)
    assert torch.equal(scores[1, :299], alone[0]) and torch.equal(indices[1, :299], alone[1])


@pytest.mark.parametrize("tokens", [1, 17, 63, 64, 65, 180])
def test_maxsim_of_many_query_tokens(isa: str, tokens: int) -> None:
    """What fills a vector up is no token: all products are negative here."""
    query, document = rows(9, 33, 24).abs(), -rows(5, tokens, 24, seed=1).abs()
    exact = torch.einsum("qld,pmd->qplm", query.double(), document.double()).amax(-1).sum(-1)
    torch.testing.assert_close(ops.maxsim(query, document).double(), exact, rtol=1e-5, atol=1e-5)
    assert torch.equal(ops.maxsim(query[4], document[2]), ops.maxsim(query, document)[4, 2])


def test_gradients_of_more_rows_than_are_kept(isa: str) -> None:
    """192 logits a row at a time where y is long: the weights' sums go by blocks of 96 rows, whatever is kept."""
    x, weight = rows(400, 6), rows(23_000, 6, seed=1)
    target = torch.arange(400) * 50
    grads = []
    for dtype in (torch.float32, torch.float64):
        leaves = [part.to(dtype).requires_grad_() for part in (x, weight)]
        loss = ops.linear_cross_entropy(*leaves, target, z_loss=0.01)
        grads.append((loss.detach(), *torch.autograd.grad(loss, leaves)))
    for mine, exact in zip(*grads, strict=True):
        assert (mine - exact).abs().max() <= 2e-6 * exact.abs().max()


# ---- edges -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["dot", "cosine", "euclidean"])
def test_one_channel_one_row_none(isa: str, score: str) -> None:
    x, y = rows(5, 1), rows(7, 1, seed=1)
    a, b = (torch.nn.functional.normalize(t.double(), dim=-1) if score == "cosine" else t.double() for t in (x, y))
    exact = (a - b.T).square() if score == "euclidean" else a @ b.T
    torch.testing.assert_close(ops.pairwise_logsumexp(x, y, score=score).double(), exact.logsumexp(-1))
    of_x, of_y = ops.pairwise_min(x, y, score=score)
    torch.testing.assert_close(of_x.double(), exact.amin(1), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(of_y.double(), exact.amin(0), atol=1e-6, rtol=1e-6)
    assert ops.pairwise_topk(x[:1], y[:1], 1, score=score)[1].tolist() == [[0]]
    assert ops.pairwise_topk(x[:0], y, 2, score=score)[0].shape == (0, 2)
    assert ops.pairwise_logsumexp(x[:0], y, score=score).shape == (0,)
    assert ops.pairwise_logsumexp(x, y[:0], score=score).tolist() == [-math.inf] * 5
    assert ops.pairwise_topk(x[:, :0], y[:, :0], 2, score=score)[1].tolist() == [[0, 1]] * 5  # no channels: all equal


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_that_is_not_finite_spoils_its_own_result_alone(isa: str, value: float) -> None:
    x, y = rows(100, 5), rows(40, 5, seed=1)
    clean = ops.pairwise_logsumexp(x, y)
    x[57, 3] = value
    spoilt = ops.pairwise_logsumexp(x, y)
    assert not spoilt[57].isfinite()
    spoilt[57] = clean[57]
    assert torch.equal(spoilt, clean)


def test_documents_of_no_tokens() -> None:
    query, document = rows(2, 3, 4), torch.full((3, 5, 4), math.nan)
    document[1, :2] = rows(2, 4)
    scores = ops.maxsim(query, document, query_lengths=torch.tensor([0, 2]), document_lengths=torch.tensor([0, 2, 0]))
    assert scores[0].tolist() == [0, 0, 0]
    assert scores[1, [0, 2]].tolist() == [-math.inf] * 2
    assert torch.equal(scores[1, 1], ops.maxsim(query[1, :2], document[1, :2]))
    with pytest.raises(ValueError, match=r"maxsim: document has shape \[2, 3, 5, 4\]"):
        ops.maxsim(query[0], document.expand(2, 3, 5, 4))


# ---- under torch -----------------------------------------------------------------------------------------------------

FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "logsumexp": lambda x, y: ops.pairwise_logsumexp(x, y, scale=-0.5, score="euclidean"),
    "topk": lambda x, y: ops.pairwise_topk(x, y, 2, score="cosine"),
    "min": ops.pairwise_min,
    "linear_cross_entropy": lambda x, y: ops.linear_cross_entropy(x, y, torch.arange(x.shape[0]) % 2),
    "contrastive_loss": lambda x, y: ops.contrastive_loss(x, y, scale=0.5, positives=torch.arange(x.shape[0]) % 2),
    "maxsim": ops.maxsim,
    "sinkhorn": lambda x, y: ops.sinkhorn(x, y, epsilon=1.0, iterations=3),
    "hamming_topk": lambda x, y: ops.hamming_topk(ops.pack_bits(x), ops.pack_bits(y), 2),
}


def results(made: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_export(name: str) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
            return results(FUNCTIONS[name](x, y))

    shapes = ({0: torch.export.Dim("rows", min=3)}, {0: torch.export.Dim("columns", min=3)})
    program = torch.export.export(Module(), (rows(6, 16), rows(8, 16)), dynamic_shapes=shapes)
    x, y = rows(11, 16), rows(9, 16)
    for mine, wanted in zip(program.module()(x, y), Module()(x, y), strict=True):
        assert torch.equal(mine, wanted)


@pytest.mark.parametrize("name", [*FUNCTIONS, "kmeans"])
def test_autocast_changes_nothing(name: str) -> None:
    function = FUNCTIONS.get(name, lambda x, y: ops.kmeans(x, 2, iterations=2))
    x, y = rows(6, 16), rows(8, 16)
    plain = results(function(x, y))
    with torch.autocast("cpu", torch.bfloat16):
        cast = results(function(x, y))
    for mine, wanted in zip(cast, plain, strict=True):
        assert mine.dtype == wanted.dtype and torch.equal(mine, wanted)


def test_compile_with_every_number_changing() -> None:
    def function(x: Tensor, y: Tensor, scale: Tensor, k: int) -> tuple[Tensor, ...]:
        scores, indices = ops.pairwise_topk(x, y, k)
        return ops.pairwise_logsumexp(x, y, scale=scale), scores, indices, ops.maxsim(x, y), *ops.pairwise_min(x, y)

    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    for n, m, d, k in ((5, 9, 6, 3), (7, 12, 10, 4), (31, 40, 3, 5), (64, 70, 33, 11), (300, 130, 17, 2)):
        x, y, scale = rows(n, d), rows(m, d, seed=1), torch.tensor(1 / d)
        for mine, wanted in zip(compiled(x, y, scale, k), function(x, y, scale, k), strict=True):
            assert torch.equal(mine, wanted)
    assert counter.frame_count <= 2
