# SPDX-License-Identifier: Apache-2.0
"""nn.LambdaAttention: the formula, the same bits in every use, gradients, compilation, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pycore.nn import LambdaAttention
from pycore.reference import attention as reference
from pycore.schedules import Lambda

DIM, HEADS, KV_HEADS = 48, 6, 2
SINKS, WINDOW = 3, 20

LAYERS: dict[str, dict[str, Any]] = {
    "rope": {},
    "rope-limit": {"distance_limit": 50, "theta": 500.0, "bias": True},
    "alibi": {"position": "alibi", "softcap": 4.0},
    "t5": {"position": "t5", "sink_logits": True},
    "harmonic": {"position": "harmonic", "distance_limit": 40},
    "none": {"position": "none", "head_dim": 7, "kv_heads": 6},
}
ENCODERS: dict[str, dict[str, Any]] = {
    "encoder": {"right": 20},
    "encoder-alibi": {"right": 30, "position": "alibi"},
    "encoder-t5": {"right": 5, "position": "t5", "distance_limit": 60},
}
every_layer = pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)


def layer(**options: Any) -> LambdaAttention:
    torch.manual_seed(0)
    given = {"kv_heads": KV_HEADS, **options}
    built = LambdaAttention(DIM, HEADS, sink_size=SINKS, window_size=WINDOW, **given)
    with torch.no_grad():
        for name, parameter in built.named_parameters():
            if name.endswith("bias") or name == "sink_logits":
                parameter.normal_()
    return built.eval()


@pytest.mark.parametrize("options", (LAYERS | ENCODERS).values(), ids=LAYERS | ENCODERS)
def test_formula(options: dict[str, Any]) -> None:
    module, x = layer(**options), torch.randn(2, 97, DIM)
    exact = module.double()
    query, key, value = (
        (x.double() @ projection.weight.T + (0 if projection.bias is None else projection.bias))
        .unflatten(-1, (-1, module.head_dim))
        .transpose(1, 2)
        for projection in (exact.query, exact.key, exact.value)
    )
    right = options.get("right", 0)
    mixed, _ = reference.attention(
        query, key, value, schedule=Lambda(SINKS, WINDOW, right), symmetric_bias=right > 0,
        distance_limit=options.get("distance_limit", max(WINDOW, right)),
        sink_logits=module.sink_logits, softcap=options.get("softcap", 0.0), **exact.positions(),
    )  # fmt: skip
    expected = mixed.transpose(1, 2).flatten(2) @ exact.out.weight.T
    torch.testing.assert_close(layer(**options)(x), expected.float(), rtol=2e-5, atol=2e-6)


@every_layer
def test_same_bits(options: dict[str, Any], isa: str) -> None:
    """One pass, alone, in chunks, and token by token on a cache."""
    module, x = layer(**options), torch.randn(3, 131, DIM)
    with torch.no_grad():
        whole = module(x)
        assert torch.equal(module(x[1:2]), whole[1:2])
        assert torch.equal(module(x[:, :77]), whole[:, :77])
        cache = module.cache()
        at = 0
        for size in (50, 3, *[1] * 20, 40, *[1] * 18):
            assert torch.equal(module(x[:, at : at + size], cache=cache), whole[:, at : at + size])
            at += size
    assert at == 131


@every_layer
def test_padding(options: dict[str, Any]) -> None:
    module, x = layer(**options), torch.randn(2, 60, DIM)
    starts = torch.tensor([0, 23])
    cache = module.cache()
    with torch.no_grad():
        for out in (module(x, starts=starts), module(x, cache=cache, starts=starts)):
            assert torch.equal(out[0], module(x[:1])[0])
            assert torch.equal(out[1, 23:], module(x[1:, 23:])[0])


@every_layer
def test_gradients_reach_every_parameter(options: dict[str, Any]) -> None:
    module, x = layer(**options), torch.randn(2, 60, DIM, requires_grad=True)
    module(x).square().sum().backward()
    for name, tensor in [("x", x), *module.named_parameters()]:
        assert tensor.grad is not None and tensor.grad.isfinite().all() and tensor.grad.abs().max() > 0, name


def test_dropout_only_in_training() -> None:
    module, x = layer(dropout_p=0.5), torch.randn(1, 60, DIM)
    assert torch.equal(module(x), module(x))
    module.train()
    assert not torch.equal(module(x), module(x))


def test_compiles() -> None:
    module, x = layer(), torch.randn(2, 60, DIM)
    compiled = torch.compile(module, fullgraph=True)
    with torch.no_grad():
        for length in (60, 33, 7):
            assert torch.equal(compiled(x[:, :length]), module(x[:, :length]))


def test_state_is_the_parameters() -> None:
    assert set(layer().state_dict()) == {f"{name}.weight" for name in ("query", "key", "value", "out")}
    assert "positions.weight" in layer(position="t5").state_dict()


def build(**options: Any) -> Tensor:
    given = {"dim": DIM, "heads": HEADS, "sink_size": SINKS, "window_size": WINDOW, **options}
    return LambdaAttention(given.pop("dim"), given.pop("heads"), **given)(torch.zeros(1, 2, DIM))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"heads": 0}, "LambdaAttention: heads is 0 and must be at least 1"),
        ({"heads": 5}, "LambdaAttention: heads is 5 and must divide dim, 48, where no head_dim is given"),
        ({"kv_heads": 4}, "LambdaAttention: kv_heads is 4 and must divide heads, 6"),
        ({"head_dim": 0}, "LambdaAttention: head_dim is 0 and must be at least 1"),
        ({"head_dim": 5}, "rope_tables: dim is 5 and must be a positive even number"),
        ({"sink_size": -1}, "sink_size is -1 and must be at least 0"),
        ({"window_size": 0}, "window_size is 0 and must be at least 1"),
        ({"distance_limit": 19}, "LambdaAttention: distance_limit is 19 and must be at least window_size, 20"),
        ({"right": -1}, "LambdaAttention: right is -1 and must be at least 0"),
        (
            {"right": 30, "distance_limit": 29},
            "LambdaAttention: distance_limit is 29 and must be at least right, 30",
        ),
        ({"dropout_p": 1.0}, "LambdaAttention: dropout_p is 1.0 and must be at least 0 and less than 1"),
        ({"position": "sine"}, "PositionScheme: name is 'sine' and must be one of rope, alibi, t5, harmonic, none"),
    ],
)
def test_errors(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_an_encoder_has_no_cache() -> None:
    encoder = layer(right=4)
    for make in (encoder.cache, lambda: encoder(torch.zeros(1, 2, DIM), cache=layer().cache())):
        with pytest.raises(ValueError, match="^LambdaAttention: right is 4 and must be 0 where there is a cache$"):
            make()


def test_foreign_cache() -> None:
    other = LambdaAttention(DIM, HEADS, sink_size=SINKS, window_size=WINDOW + 1).cache()
    with pytest.raises(ValueError, match="cache has sink_size 3 and window_size 21 and must have 3 and 20"):
        layer()(torch.zeros(1, 2, DIM), cache=other)
