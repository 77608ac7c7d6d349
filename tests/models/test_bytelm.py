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

from pycore import Staircase
from pycore.models.bytelm import BOS, VOCABULARY, Bytelm, BytelmConfig, tokens_from_bytes
from pycore.schedules import Causal, Full, Lambda, Tree

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
        loss = model.loss(tokens[:, :-1], tokens[:, 1:])
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


def test_loss_is_the_cross_entropy_of_the_logits() -> None:
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(heads=4, kv_heads=2))
    tokens = random_tokens(2, 67)
    targets = tokens[:, 1:].clone()
    targets[0, :9] = -100
    for options in ({}, {"schedule": Lambda(2, 16)}, {"distance_limit": 8}, {"starts": torch.tensor([9, 0])}):
        losses = [
            model.loss(tokens[:, :-1], targets, **options),
            functional.cross_entropy(model(tokens[:, :-1], **options).flatten(0, 1), targets.flatten()),
        ]
        torch.testing.assert_close(*losses)
        mine, theirs = (torch.autograd.grad(loss, list(model.parameters())) for loss in losses)
        for grad, expected in zip(mine, theirs, strict=True):
            torch.testing.assert_close(grad, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match="linear_cross_entropy: target has shape"):
        model.loss(tokens, targets)


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


POSITIONS = ("rope", "alibi", "t5", "harmonic", "none")
CACHED = [(Causal(), None), (Lambda(4, 32), None), (Lambda(4, 32), 90), (Lambda(70, 100), None)]


@pytest.fixture(scope="module", params=POSITIONS)
def positioned(request: pytest.FixtureRequest) -> Bytelm:
    torch.manual_seed(1)
    config = BytelmConfig(dim=64, heads=4, kv_heads=2, mlp_ratio=2, position=request.param, max_distance=512)
    model = Bytelm(config).eval()
    with torch.no_grad():
        model.embedding.mul_(20)
    return model


@pytest.mark.parametrize("schedule, limit", CACHED, ids=str)
@pytest.mark.parametrize("chunks", [[], [339], [200, 1, 1, 7, 100], [64, 64, 3]], ids=str)
def test_same_bits_on_a_cache(positioned: Bytelm, schedule: Any, limit: int | None, chunks: list[int]) -> None:
    """In chunks and token by token, the logits of one pass over everything."""
    tokens = random_tokens(2, 345)
    with torch.no_grad():
        whole = positioned(tokens, schedule=schedule, distance_limit=limit)
        caches = positioned.caches(schedule)
        at = 0
        for size in [*chunks, *[1] * (345 - sum(chunks))]:
            part = positioned(tokens[:, at : at + size], distance_limit=limit, caches=caches)
            assert torch.equal(part, whole[:, at : at + size]), at
            at += size


@pytest.mark.usefixtures("isa", "threads")
def test_same_bits_on_a_cache_alone_on_one_thread(positioned: Bytelm) -> None:
    tokens = random_tokens(3, 113)
    schedule = Lambda(4, 32)
    torch.set_num_threads(2)
    with torch.no_grad():
        whole = positioned(tokens, schedule=schedule)
        torch.set_num_threads(1)
        caches = positioned.caches(schedule)
        for i in range(113):
            assert torch.equal(positioned(tokens[1:2, i : i + 1], caches=caches)[0, 0], whole[1, i])


def test_same_bits_of_padded_rows(positioned: Bytelm) -> None:
    """A left-padded batch, first in one pass and then on, is its rows by themselves."""
    texts = [random_tokens(1, length) for length in (113, 40, 97)]
    starts = torch.tensor([0, 73, 16])
    padded = torch.cat([functional.pad(text, (int(start), 0)) for text, start in zip(texts, starts, strict=True)])
    more = random_tokens(3, 5)
    schedule = Lambda(4, 32)
    with torch.no_grad():
        caches = positioned.caches(schedule)
        together = torch.cat(
            [positioned(padded, caches=caches, starts=starts)]
            + [positioned(more[:, i : i + 1], caches=caches) for i in range(5)],
            dim=1,
        )
        in_one_pass = positioned(padded, schedule=schedule, starts=starts)
        for b, text in enumerate(texts):
            alone = positioned(torch.cat([text, more[b : b + 1]], dim=1), schedule=schedule)[0]
            assert torch.equal(together[b, int(starts[b]) :], alone)
            assert torch.equal(in_one_pass[b, int(starts[b]) :], alone[: text.shape[1]])


@torch.no_grad()
@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("schedule", [Causal(), Lambda(3, 70)], ids=str)
def test_staircases(positioned: Bytelm, schedule: Any) -> None:
    """One pass and tokens one by one are the same bits; a staircase that quantizes nothing is a full cache."""
    if isinstance(schedule, Lambda) and positioned.config.position in ("rope", "harmonic"):
        with pytest.raises(ValueError, match=f"^Bytelm: position is '{positioned.config.position}' and must be anoth"):
            positioned.staircase_caches(Staircase(), schedule)
        return
    tokens, ladder = random_tokens(2, 220), Staircase((16, 8, 4), step=64)
    whole = positioned(tokens, caches=positioned.staircase_caches(ladder, schedule))
    caches = positioned.staircase_caches(ladder, schedule)
    parts = [positioned(tokens[:, :100], caches=caches)]
    parts += [positioned(tokens[:, i : i + 1], caches=caches) for i in range(100, 220)]
    assert torch.equal(torch.cat(parts, 1), whole)
    exact = positioned(tokens, schedule=schedule)
    torch.testing.assert_close(whole[:, :60], exact[:, :60], rtol=1e-4, atol=1e-4)
    assert (whole - exact)[:, 64:].abs().max() > 1e-3
    full = positioned(tokens, caches=positioned.staircase_caches(Staircase((16,)), schedule))
    torch.testing.assert_close(full, exact, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_padding_on_a_staircase(positioned: Bytelm) -> None:
    ladder, tokens, starts = Staircase((16, 4), step=64), random_tokens(2, 150), torch.tensor([0, 33])
    together = positioned(tokens, caches=positioned.staircase_caches(ladder), starts=starts)
    alone = positioned(tokens[1:, 33:], caches=positioned.staircase_caches(ladder))
    assert torch.equal(together[1, 33:], alone[0])


def test_staircase_errors(positioned: Bytelm) -> None:
    with pytest.raises(ValueError, match=r"Bytelm: schedule is Full\(\) and must be Causal or Lambda for a cache"):
        positioned.staircase_caches(Staircase(), Full())
    caches = positioned.staircase_caches(Staircase())
    with pytest.raises(ValueError, match="^SelfAttention: schedule is a Tree and must be none on a staircase$"):
        positioned(random_tokens(1, 2), caches=caches, schedule=Tree(torch.tensor([-1, 0])))
    if positioned.config.position in ("rope", "harmonic"):
        with pytest.raises(ValueError, match="^StaircaseLayer: rope is given with a distance limit, which packed keys"):
            positioned(random_tokens(1, 2), caches=caches, distance_limit=5)
        model = Bytelm(BytelmConfig(layers=1, dim=16, heads=1, kv_heads=1, max_distance=64))
        with pytest.raises(ValueError, match="^StaircaseLayer: rope has 129 rows and must have 130, one for every"):
            model(random_tokens(1, 130), caches=model.staircase_caches(Staircase()))


@torch.no_grad()
@pytest.mark.parametrize("limit", [None, 20])
def test_a_tree_of_drafts_is_each_of_its_branches(positioned: Bytelm, limit: int | None) -> None:
    """Logits behind every node of a branch, from one pass over all branches and from the text that ends in it."""
    parents = [-1, 0, 1, 1, 0, 4, -1, 6, 7, 7, 2, 10]
    context, tokens = 90, random_tokens(2, 90 + len(parents))
    together = positioned(tokens, schedule=Tree(torch.tensor(parents)), distance_limit=limit)
    for leaf in set(range(len(parents))) - set(parents):
        path = [leaf]
        while parents[path[0]] >= 0:
            path.insert(0, parents[path[0]])
        rows = torch.tensor([*range(context), *(context + node for node in path)])
        torch.testing.assert_close(
            together[:, rows], positioned(tokens[:, rows], distance_limit=limit), rtol=1e-4, atol=1e-4
        )
    causal = positioned(tokens, distance_limit=limit)
    assert (together - causal)[:, -1].abs().max() > 1e-2


def test_taken_back(positioned: Bytelm) -> None:
    tokens, wrong = random_tokens(1, 200), random_tokens(1, 7)
    with torch.no_grad():
        whole = positioned(tokens, schedule=Lambda(4, 32))
        caches = positioned.caches(Lambda(4, 32), rollback=7)
        positioned(tokens[:, :150], caches=caches)
        positioned(wrong, caches=caches)
        for cache in caches:
            cache.crop(7)
        assert torch.equal(positioned(tokens[:, 150:157], caches=caches), whole[:, 150:157])


def test_positions_matter(positioned: Bytelm) -> None:
    """Two earlier bytes change places: every scheme but none tells the difference, and none sees no order at all."""
    if positioned.config.position == "none":
        positioned = Bytelm(BytelmConfig(layers=1, position="none"))  # more layers see order through the causal mask
    tokens = random_tokens(1, 60)
    swapped = tokens.clone()
    swapped[0, 3], swapped[0, 40] = tokens[0, 40], tokens[0, 3]
    with torch.no_grad():
        difference = (positioned(tokens)[0, -1] - positioned(swapped)[0, -1]).abs().max()
    assert difference < 1e-6 if positioned.config.position == "none" else difference > 1e-4


def test_every_scheme_learns(positioned: Bytelm) -> None:
    torch.manual_seed(0)
    model = Bytelm(BytelmConfig(layers=1, dim=32, heads=2, kv_heads=1, position=positioned.config.position))
    tokens = tokens_from_bytes(TEXT[:48])[None]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(60):
        loss = functional.cross_entropy(model(tokens[:, :-1], schedule=Lambda(2, 20))[0], tokens[0, 1:])
        optimizer.zero_grad()
        loss.backward()
        assert all(parameter.grad is not None for parameter in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


def test_cache_errors(positioned: Bytelm) -> None:
    with pytest.raises(ValueError, match="Bytelm: caches has 1 entries and must have 2"):
        positioned(random_tokens(1, 3), caches=positioned.caches()[:1])
    with pytest.raises(ValueError, match=r"Bytelm: schedule is Full\(\) and must be Causal or Lambda for a cache"):
        positioned.caches(Full())


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
        ({"position": "sine"}, "position is 'sine' and must be one of rope, alibi, t5, harmonic, none"),
    ],
)
def test_bad_configurations(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"BytelmConfig: {message}"):
        BytelmConfig(**fields)
