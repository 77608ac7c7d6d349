# SPDX-License-Identifier: Apache-2.0
"""The transformer of all shapes, and the training loop."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from pycore.models.bytelm import Bytelm, BytelmConfig
from pycore.models.training import fit
from pycore.models.transformer import Transformer, mean_pool, nearest_accuracy
from pycore.schedules import Causal, Full, Prefix

SHAPE = BytelmConfig(layers=2, dim=32, heads=4, kv_heads=2, max_distance=64)


def tokens(*shape: int, high: int = 50) -> Tensor:
    return torch.randint(high, shape, generator=torch.Generator().manual_seed(1))


def test_a_decoder_is_bytelm() -> None:
    torch.manual_seed(0)
    model, peer = Transformer(SHAPE, vocabulary=257), Bytelm(SHAPE)
    peer.load_state_dict(model.state_dict())
    text = tokens(3, 17)
    assert torch.equal(model.logits(model(text)), peer(text))


@pytest.mark.parametrize("position", ["rope", "alibi", "t5", "none"])
def test_schedules_meet(position: str) -> None:
    torch.manual_seed(0)
    config = BytelmConfig(layers=2, dim=32, heads=4, kv_heads=4, position=position, max_distance=64)
    model, text = Transformer(config, vocabulary=50), tokens(2, 12)
    causal, full = model(text, schedule=Causal()), model(text, schedule=Full())
    assert torch.equal(model(text, schedule=Prefix(torch.tensor([0, 0]))), causal)
    torch.testing.assert_close(model(text, schedule=Prefix(torch.tensor([12, 12]))), full)
    assert not torch.allclose(causal[:, 0], full[:, 0])
    # A decoder's row depends on what is before it, an encoder's on everything.
    other = text.clone()
    other[:, -1] = (other[:, -1] + 1) % 50
    assert torch.equal(model(other, schedule=Causal())[:, :-1], causal[:, :-1])
    assert not torch.allclose(model(other, schedule=Full())[:, 0], full[:, 0])


def test_padding_is_not_read() -> None:
    torch.manual_seed(0)
    model, lengths = Transformer(SHAPE, vocabulary=50, absolute=16), torch.tensor([16, 5, 1])
    text = tokens(3, 16)
    other = torch.where(torch.arange(16) < lengths[:, None], text, 7)
    rows = [model(x, schedule=Full(), lengths=lengths) for x in (text, other)]
    for a, b, n in zip(*rows, lengths.tolist(), strict=True):
        assert torch.equal(a[:n], b[:n])
    alone = model(text[1:2, :5], schedule=Full())[0]
    assert torch.equal(rows[0][1, :5], alone)
    pooled = mean_pool(rows[0], lengths)
    torch.testing.assert_close(pooled[1], functional.normalize(alone.mean(0), dim=-1))
    assert torch.equal(pooled, mean_pool(rows[1], lengths))


def test_memory_is_looked_at() -> None:
    torch.manual_seed(0)
    model = Transformer(BytelmConfig(layers=1, dim=32, heads=4, kv_heads=4), vocabulary=50, cross=True)
    text, memory, lengths = tokens(2, 6), torch.randn(2, 9, 32), torch.tensor([9, 4])
    states = model(text, memory=memory, memory_lengths=lengths)
    changed = memory.clone()
    changed[1, 4:] = 100.0
    assert torch.equal(model(text, memory=changed, memory_lengths=lengths), states)
    changed[1, 3] += 1.0
    assert not torch.allclose(model(text, memory=changed, memory_lengths=lengths)[1], states[1])
    # Against torch's attention on the same projections.
    block = model.blocks[0]
    x = model.embed(text)
    x = x + block.attention(block.attention_norm(x), block_options(model))
    query, key, value = (
        functional.linear(rows, projection.weight).unflatten(-1, (4, 8)).transpose(1, 2)
        for rows, projection in (
            (block.cross_norm(x)[:1], block.cross.query),
            (memory[:1], block.cross.key),
            (memory[:1], block.cross.value),
        )
    )  # fmt: skip
    mixed = functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    wanted = x[:1] + functional.linear(mixed, block.cross.out.weight)
    wanted = model.norm(wanted + block.feed_forward(block.feed_forward_norm(wanted)))
    torch.testing.assert_close(states[:1], wanted, rtol=1e-4, atol=1e-5)


def block_options(model: Transformer):  # type: ignore[no-untyped-def]
    from pycore.ops.attention_call import AttentionOptions

    return AttentionOptions(**model.positions())


def test_loss_layers_positions_and_vectors() -> None:
    torch.manual_seed(0)
    model, text = Transformer(SHAPE, vocabulary=50, absolute=20), tokens(2, 7)
    states = model(text)
    target = text.masked_fill(torch.arange(7) < 2, -100)
    wanted = functional.cross_entropy(model.logits(states).flatten(0, 1), target.flatten())
    torch.testing.assert_close(model.loss(states, target), wanted)
    place = torch.arange(7).expand(2, -1)
    assert torch.equal(model(text, positions=place), states)
    assert not torch.allclose(model(text, positions=place + 3), states)
    assert torch.equal(model(model.embed(text), embedded=True), states)
    first = model.norm(model.blocks[0](model.embed(text), block_options(model)))
    assert torch.equal(model(text, layers=1), first)
    assert Transformer(SHAPE, inputs=5)(torch.randn(2, 7, 5)).shape == (2, 7, 32)


def test_errors() -> None:
    with pytest.raises(ValueError, match="vocabulary is None and inputs is None and one of them must be given"):
        Transformer(SHAPE)
    with pytest.raises(ValueError, match="absolute"):
        Transformer(SHAPE, inputs=3, absolute=-1)
    with pytest.raises(ValueError, match="x has length 7 and must have at most 6, absolute's"):
        Transformer(SHAPE, vocabulary=50, absolute=6)(tokens(2, 7))


def test_nearest_accuracy() -> None:
    rows = torch.eye(4)
    assert nearest_accuracy(rows, rows) == 1.0
    assert nearest_accuracy(rows, rows.roll(1, 0)) == 0.0
    assert nearest_accuracy(rows, rows[[0, 1, 3, 2]]) == 0.5
    assert nearest_accuracy(rows, rows.roll(1, 0), k=9) == 1.0


def test_fit() -> None:
    line, told = nn.Parameter(torch.zeros(2)), []
    x = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))
    wanted = torch.tensor([0.5, -0.25])

    def loss(step: int) -> Tensor:
        return (x @ (line - wanted)).square().mean()

    last = fit([line], loss, steps=200, learning_rate=0.05, weight_decay=0.0, report=lambda *what: told.append(what))
    assert last < 1e-6 and len(told) == 200 and told[-1][0] == 200 and told[0][1].startswith("loss 0.")
    torch.testing.assert_close(line.detach(), wanted, atol=1e-3, rtol=0)
    before = line.detach().clone()
    with pytest.raises(ArithmeticError, match="the loss of step 0 was nan and must be finite"):
        fit([line], lambda step: loss(step) * math.nan, steps=3)
    assert torch.equal(line.detach(), before)
    with pytest.raises(ValueError, match="steps is 0 and must be at least 1"):
        fit([line], loss, steps=0)
