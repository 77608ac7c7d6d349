# SPDX-License-Identifier: Apache-2.0
"""bytelm learns, computes on pycore's ops alone, and its logits are the same bits whatever they are computed with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from pycore.models.bytelm import BOS, VOCABULARY, Bytelm, BytelmConfig, tokens_from_bytes
from pycore.schedules import Causal, Lambda

TEXT = b"def attend(query, key, value):\n    return softmax(query @ key.T) @ value\n" * 3
# Schedule and distance limit, the readings of the length experiment.
READINGS = [(Causal(), None), (Causal(), 40), (Lambda(4, 32), 32), (Lambda(4, 32), 4096), (Lambda(0, 32), 4096)]

Logits = Callable[[Tensor], Tensor]


@pytest.fixture(scope="module")
def model() -> Bytelm:
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(heads=4, kv_heads=2)).eval()
    with torch.no_grad():  # away from the small initial logits, so that differences would show
        model.embedding.mul_(20)
    return model


@pytest.fixture(params=READINGS, ids=str)
def logits(model: Bytelm, request: pytest.FixtureRequest) -> Logits:
    schedule, limit = request.param

    @torch.no_grad()
    def compute(tokens: Tensor) -> Tensor:
        return model(tokens, schedule=schedule, distance_limit=limit)

    return compute


def random_tokens(batch: int, length: int) -> Tensor:
    tokens = torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(length))
    tokens[:, 0] = BOS
    return tokens


def test_default_shape() -> None:
    model = Bytelm()
    assert model.parameter_count == 426_752
    assert model(tokens_from_bytes(b"abc")[None]).shape == (1, 4, VOCABULARY)


def test_tokens_from_bytes() -> None:
    assert tokens_from_bytes(b"\x00\xff").tolist() == [BOS, 0, 255]
    assert tokens_from_bytes(b"", bos=False).shape == (0,)


def test_learns_a_string() -> None:
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(layers=1, dim=32, heads=2, kv_heads=1))
    tokens = tokens_from_bytes(TEXT[:48])[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(120):
        loss = functional.cross_entropy(model(tokens[:, :-1])[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05
    assert torch.equal(model(tokens[:, :-1])[0].argmax(-1), tokens[0, 1:])


def test_backward_reaches_every_parameter() -> None:
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(heads=4, kv_heads=2))
    tokens = random_tokens(2, 67)
    functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().max() > 0, name


def test_rotation_is_relative_and_limited() -> None:
    """Without a sink, moving a text changes nothing; and beyond the limit, distances no longer tell keys apart."""
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(layers=1))
    tokens = random_tokens(1, 200)
    schedule = Lambda(0, 32)
    with torch.no_grad():
        whole = model(tokens, schedule=schedule)
        tail = model(tokens[:, 100:], schedule=schedule)
        torch.testing.assert_close(whole[:, 140:], tail[:, 40:], rtol=0, atol=1e-5)
        swapped = tokens.clone()
        swapped[0, 3], swapped[0, 77] = tokens[0, 77], tokens[0, 3]
        limited = [model(row, distance_limit=20)[0, -1] for row in (tokens, swapped)]
        free = [model(row)[0, -1] for row in (tokens, swapped)]
    torch.testing.assert_close(limited[0], limited[1], rtol=0, atol=1e-5)
    assert (free[0] - free[1]).abs().max() > 1e-4


@pytest.mark.parametrize("batch", [2, 7, 16])
def test_same_bits_in_a_batch(logits: Logits, batch: int) -> None:
    tokens = random_tokens(batch, 113)
    together = logits(tokens)
    for row in range(batch):
        assert torch.equal(together[row], logits(tokens[row : row + 1])[0])


@pytest.mark.usefixtures("isa")
def test_same_bits_for_a_prefix(logits: Logits) -> None:
    tokens = random_tokens(2, 339)
    whole = logits(tokens)
    for length in (1, 2, 17, 63, 64, 65, 128, 201, 338):
        assert torch.equal(whole[:, :length], logits(tokens[:, :length])), length


@pytest.mark.usefixtures("threads")
def test_same_bits_for_any_thread_count(logits: Logits) -> None:
    tokens = random_tokens(3, 339)
    torch.set_num_threads(1)
    alone = logits(tokens)
    for count in (2, 3):
        torch.set_num_threads(count)
        assert torch.equal(alone, logits(tokens)), count


@pytest.mark.parametrize("schedule, limit", [(Causal(), None), (Lambda(4, 32), 32)], ids=str)
def test_compiles_to_the_same_bits(model: Bytelm, schedule: Any, limit: int | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        for length in (97, 128, 40):
            tokens = random_tokens(2, length)
            expected = model(tokens, schedule=schedule, distance_limit=limit)
            assert torch.equal(compiled(tokens, schedule=schedule, distance_limit=limit), expected), length


class CalledOps(TorchDispatchMode):
    """Collects the names of the operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.name().partition(".")[0])
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("schedule", [Causal(), Lambda(4, 32)], ids=str)
def test_runs_on_pycores_ops_alone(model: Bytelm, schedule: Any) -> None:
    tokens = random_tokens(2, 70)
    with CalledOps() as called:
        model(tokens, schedule=schedule).sum().backward()
    model.zero_grad()
    count = {name: called.names.count(f"pycore::{name}") for name in ("attention", "invariant_linear", "rms_norm")}
    layers = model.config.layers
    assert count == {"attention": layers, "invariant_linear": 6 * layers + 1, "rms_norm": 2 * layers + 1}
    torchs = {name.removeprefix("aten::") for name in called.names if not name.startswith("pycore::")}
    forbidden = ("attention", "softmax", "mm", "matmul", "linear", "einsum", "cdist", "argmin", "norm", "rsqrt")
    assert not [name for name in torchs if any(part in name for part in forbidden)], torchs


@pytest.mark.parametrize(
    "tokens, error, message",
    [
        (torch.zeros(1, 4), TypeError, "Bytelm: tokens has dtype torch.float32 and must have torch.int64"),
        (torch.zeros(4, dtype=torch.int64), ValueError, "Bytelm: tokens has 1 dimensions and must have 2"),
        (torch.zeros(1, 4098, dtype=torch.int64), ValueError, "Bytelm: tokens has length 4098, whose distances exceed"),
        (torch.full((1, 4), VOCABULARY), IndexError, "out of range"),
    ],
)
def test_bad_tokens(model: Bytelm, tokens: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        model(tokens)


def test_a_limit_admits_any_length() -> None:
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(layers=1, dim=16, heads=1, kv_heads=1, max_distance=64))
    with torch.no_grad():
        tokens = random_tokens(1, 1000)
        limited = model(tokens, schedule=Lambda(4, 64), distance_limit=64)
        assert limited.isfinite().all()
        assert torch.equal(limited, model(tokens, schedule=Lambda(4, 64)))  # the window is the default
        assert model(random_tokens(1, 65)).isfinite().all()
        with pytest.raises(ValueError, match="raise it or pass a distance_limit"):
            model(random_tokens(1, 66))


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layers": 0}, "layers is 0 and must be at least 1"),
        ({"heads": 3}, "heads is 3 and must cut dim 128 into even parts"),
        ({"dim": 12, "heads": 4}, "heads is 4 and must cut dim 12 into even parts"),
        ({"kv_heads": 3}, "kv_heads is 3 and must divide heads 4"),
    ],
)
def test_bad_configurations(fields: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"BytelmConfig: {message}"):
        BytelmConfig(**fields)
