# SPDX-License-Identifier: Apache-2.0
"""nn.ProbabilisticAttention: the op's result, rounds that advance in training alone, recomputation, compilation."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pycore import ops
from pycore.nn import ProbabilisticAttention
from pycore.schedules import Geometric

DIM, HEADS, LENGTH = 32, 4, 200


def layer(**options: Any) -> ProbabilisticAttention:
    torch.manual_seed(0)
    given = {"distance_probs": Geometric(0.5), "block_size": 16, "kv_heads": 2, "max_distance": 512, **options}
    return ProbabilisticAttention(DIM, HEADS, **given).eval()


def by_hand(module: ProbabilisticAttention, x: Tensor, **options: Any) -> Tensor:
    query, key, value = module.project(x)
    out: Any = ops.pr_flash_attention(
        query, key, value, seed=module.schedule().seed, round=int(module.round), **{**module.positions(), **options}
    )
    return module.out(out.transpose(1, 2).flatten(2))


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "harmonic", "none"])
def test_is_the_op(position: str) -> None:
    module, x = layer(position=position, seed=5, layer=2), torch.randn(2, LENGTH, DIM)
    module.round.fill_(7)
    expected = by_hand(module, x, distance_probs=Geometric(0.5), block_size=16, sink_size=1)
    assert torch.equal(module(x), expected)


def test_tables_are_buffers() -> None:
    table = torch.rand(HEADS, 5)
    module, x = layer(distance_probs=table, blocks_per_row=3), torch.randn(1, LENGTH, DIM)
    assert torch.equal(module.state_dict()["distance_table"], table)
    expected = by_hand(module, x, distance_probs=table, block_size=16, sink_size=1, blocks_per_row=3)
    assert torch.equal(module(x), expected)


def test_rounds_advance_in_training_alone() -> None:
    module, x = layer(), torch.randn(1, LENGTH, DIM)
    assert torch.equal(module(x), module(x)) and module.round == 0
    module.train()
    first, second = module(x), module(x)
    assert module.round == 2 and not torch.equal(first, second)
    module.eval()
    assert torch.equal(module(x), second) and module.round == 2
    again = layer()
    again.load_state_dict(copy.deepcopy(module.state_dict()))
    assert torch.equal(again(x), second)


def test_layers_draw_independently() -> None:
    seeds = {layer(seed=seed, layer=index).schedule().seed for seed in range(3) for index in range(50)}
    assert len(seeds) == 150 and all(0 <= seed < 2**63 for seed in seeds)
    x = torch.randn(1, LENGTH, DIM)
    assert not torch.equal(layer(layer=0)(x), layer(layer=1)(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_reads_the_same_blocks(reentrant: bool) -> None:
    x = torch.randn(1, LENGTH, DIM)
    gradients = []
    for recompute in (False, True):
        module = layer().train()
        given = x.clone().requires_grad_()
        out = checkpoint(module, given, use_reentrant=reentrant) if recompute else module(given)
        out.square().sum().backward()
        assert module.round == 1
        gradients.append([given.grad, *(p.grad for p in module.parameters())])
    for plain, recomputed in zip(*gradients, strict=True):
        assert torch.equal(plain, recomputed)


def test_compiled_rounds() -> None:
    """Twenty training rounds, each with blocks of its own, in at most two compilations."""
    module, x = layer().train(), torch.randn(2, LENGTH, DIM)
    compiled = 0

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        nonlocal compiled
        compiled += 1
        return graph.forward

    step = torch.compile(module, backend=backend, fullgraph=True)
    reference = copy.deepcopy(module)
    sums = set()
    for _ in range(20):
        out = step(x)
        assert torch.equal(out, reference(x))
        sums.add(out.sum().item())
    assert 1 <= compiled <= 2 and len(sums) == 20


def test_padding() -> None:
    module, x = layer(), torch.randn(2, LENGTH, DIM)
    out = module(x, starts=torch.tensor([0, 50]))
    assert torch.equal(out[0], module(x[:1])[0])
    assert torch.equal(out[1, 50:], module(x[1:, 50:])[0])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"seed": -1}, "ProbabilisticAttention: seed is -1 and must be at least 0"),
        ({"layer": -1}, "ProbabilisticAttention: layer is -1 and must be at least 0"),
        ({"dropout_p": 1.0}, "ProbabilisticAttention: dropout_p is 1.0 and must be at least 0 and less than 1"),
        ({"kv_heads": 3}, "ProbabilisticAttention: kv_heads is 3 and must divide heads, 4"),
        ({"block_size": 24}, "block_size is 24 and must be"),
        ({"position": "sine"}, "PositionScheme: name is 'sine' and must be one of"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layer(**options)(torch.zeros(1, 4, DIM))
