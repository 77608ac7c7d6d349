# SPDX-License-Identifier: Apache-2.0
"""The staircase cache: what each query reads, byte for byte whatever the chunks, and what it refuses."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch

import pycore
from pycore import Staircase, StaircaseKVCache, native, ops
from pycore.reference import staircase as reference
from tests.support.staircase_caches import SMALL, fed, made, same, small, stored, tokens

LADDERS = [
    (16, 8, 4),
    (16, 8, 4, 2),
    (16, 2),
    (16,),
    (16, 4, 4, 2),
    (16, 16, 8),
    (16, 16, 8, 8, 2),
    (8, 4),
    (8,),
    (4, 4, 2),
]


# ---- what is read ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits", LADDERS, ids=str)
def test_keys_and_values_are_the_reference(bits: tuple[int, ...], dtype: torch.dtype, isa: str) -> None:
    """Exactly, at lengths around every boundary, and the groups that a short last one of channels makes."""
    key, value = tokens(301, dtype=dtype), tokens(301, dim=33, dtype=dtype)
    cache = made(small(bits), value_dim=33, dtype=dtype)
    at = 0
    for length in (1, 2, 3, 4, 15, 16, 17, 31, 32, 33, 47, 48, 63, 64, 65, 97, 128, 129, 200, 301):
        cache.append(key[:, :, at:length], value[:, :, at:length])
        at = length
        for by_token, x, got in ((False, key, cache.keys()), (True, value, cache.values())):
            expected = reference.read(x, length - 1, by_token=by_token, bits=bits, step=32, sink_size=3, group_size=16)
            assert got.dtype == dtype and torch.equal(got, expected), (length, by_token)


@pytest.mark.parametrize(
    "group_size, step, sinks", [(64, 128, 4), (32, 64, 0), (128, 128, 130), (10, 20, 1), (1, 1, 2)]
)
def test_other_groups(group_size: int, step: int, sinks: int) -> None:
    """Also short groups of channels, groups that are all sinks, and groups of one."""
    key, value = tokens(400, dim=40), tokens(400, dim=40)
    cache = made(Staircase((16, 8, 4, 2), step=step, sink_size=sinks, group_size=group_size, rollback=5), dim=40)
    cache.append(key, value)
    for by_token, x, got in ((False, key, cache.keys()), (True, value, cache.values())):
        expected = reference.read(
            x, 399, by_token=by_token, bits=(16, 8, 4, 2), step=step, sink_size=sinks, group_size=group_size
        )
        assert torch.equal(got, expected)


def test_ladders_of_keys_and_values_differ() -> None:
    key, value = tokens(200), tokens(200)
    stairs = Staircase((16, 8), key_bits=(16, 8, 8, 4), value_bits=(16, 2), **SMALL)
    cache = fed(made(stairs), key, value, [200])
    how: dict[str, Any] = {"step": 32, "sink_size": 3, "group_size": 16}
    assert torch.equal(cache.keys(), reference.read(key, 199, by_token=False, bits=(16, 8, 8, 4), **how))
    assert torch.equal(cache.values(), reference.read(value, 199, by_token=True, bits=(16, 2), **how))


@pytest.mark.parametrize("bits", [(16, 2), (16, 4), (16, 8), (4,), (2, 2)], ids=str)
def test_minmax_is_kivi(bits: tuple[int, ...]) -> None:
    key, value = tokens(200), tokens(200)
    cache = fed(made(small(bits, grid="minmax")), key, value, [77, 123])
    how: dict[str, Any] = {"bits": bits, "step": 32, "sink_size": 3, "group_size": 16, "grid": "minmax"}
    assert torch.equal(cache.keys(), reference.read(key, 199, by_token=False, **how))
    assert torch.equal(cache.values(), reference.read(value, 199, by_token=True, **how))


def test_planes_are_as_the_format_says() -> None:
    """The bytes of docs/ops/staircase.md, against the reference's packing."""
    key, value = tokens(64, batch=1, heads=1), tokens(64, batch=1, heads=1)
    cache = made(Staircase((16, 8), step=64, sink_size=0, rollback=0), batch=1, heads=1, capacity=128)
    cache.append(key, value)
    state = cache.state_dict()
    codes = ops.staircase_quantize(key[0, 0], bits=8, group_size=64, dim=0)[0].T  # [channels, 64]
    for i, (shift, bits) in enumerate(((6, 2), (4, 2), (0, 4)), start=1):
        plane = reference.pack_plane(codes >> shift & 2**bits - 1, bits)
        assert torch.equal(state["key"][i][0, 0, 0], plane.flatten())
        assert torch.equal(reference.unpack_plane(plane, 64, bits), codes >> shift & 2**bits - 1)
    codes = ops.staircase_quantize(value[0, 0], bits=8, group_size=64, dim=1)[0]
    for i, (shift, bits) in enumerate(((6, 2), (4, 2), (0, 4)), start=1):
        plane = reference.pack_plane(codes >> shift & 2**bits - 1, bits)
        assert torch.equal(state["value"][i][0, 0, 0], plane.flatten())


# ---- the same bytes --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", LADDERS, ids=str)
def test_chunks_do_not_matter(bits: tuple[int, ...]) -> None:
    key, value = tokens(250), tokens(250)
    whole = fed(made(small(bits), capacity=256), key, value, [250])
    for chunks in ([1] * 250, [16] * 15 + [10], [17] * 14 + [12], [100, 0, 150], [249, 1], [3, 247]):
        assert same(fed(made(small(bits), capacity=256), key, value, chunks), whole)


def test_instruction_sets_and_threads_agree(threads: None) -> None:
    key, value = tokens(250, dtype=torch.bfloat16), tokens(250, dtype=torch.bfloat16)
    caches = []
    before = native.cpu_isa()
    for name in native.available_isas():
        for count in (1, 3):
            native.set_cpu_isa(name)
            torch.set_num_threads(count)
            caches.append(fed(made(small(), capacity=256, dtype=torch.bfloat16), key, value, [130, 120]))
    native.set_cpu_isa(before)
    assert all(same(cache, caches[0]) for cache in caches)


def test_a_row_alone_is_the_row_in_a_batch() -> None:
    """Left-padded rows are stored without their padding, whatever the padding holds."""
    key, value = tokens(150, batch=3), tokens(150, batch=3)
    starts = torch.tensor([0, 41, 150])
    key[1, :, :41] = math.nan
    batch = made(small(), batch=3, capacity=256)
    batch.append(key, value, starts=starts)
    more_key, more_value = tokens(37, batch=3), tokens(37, batch=3)
    batch.append(more_key, more_value, starts=torch.tensor([2, 0, 0]))
    query = tokens(10, batch=3, heads=4)
    out = batch.attend(query)
    for b, start in enumerate(starts.tolist()):
        alone = made(small(), batch=1, capacity=256)
        alone.append(key[b : b + 1, :, start:], value[b : b + 1, :, start:])
        skip = 2 if b == 0 else 0
        alone.append(more_key[b : b + 1, :, skip:], more_value[b : b + 1, :, skip:])
        batch_row = [x[b : b + 1] if x.numel() else x for x in stored(batch)]
        assert all(torch.equal(x, y) for x, y in zip(batch_row, stored(alone), strict=True))
        assert torch.equal(alone.attend(query[b : b + 1]), out[b : b + 1])  # type: ignore[index]


@pytest.mark.parametrize("bits", [(16, 8, 4, 2), (8, 4, 2)], ids=str)
@pytest.mark.parametrize("length", [30, 32, 47, 64, 100, 129])
def test_cropped_is_never_generated(length: int, bits: tuple[int, ...]) -> None:
    key, value = tokens(250), tokens(250)
    for count in (1, 7, 20):
        cache = fed(made(small(bits), capacity=256), key[:, :, :length], value[:, :, :length], [length])
        cache.append(tokens(count), tokens(count))
        cache.crop(count)
        assert cache.lengths.tolist() == [length] * 2
        never = fed(made(small(bits), capacity=256), key[:, :, :length], value[:, :, :length], [length])
        assert torch.equal(cache.keys(), never.keys()) and torch.equal(cache.values(), never.values())
        query = tokens(1, heads=4)
        assert torch.equal(cache.attend(query), never.attend(query))  # type: ignore[arg-type]
        for each in (cache, never):
            fed(each, key[:, :, length:], value[:, :, length:], [250 - length])
        assert same(cache, never)


def test_cropping_many_times() -> None:
    """A random walk of appending and cropping ends as a cache that got the tokens that stayed."""
    generator = torch.Generator().manual_seed(3)
    key, value = tokens(400), tokens(400)
    cache, length, peak = made(small(), capacity=400), 0, 0
    for _ in range(60):
        n = min(int(torch.randint(0, 30, (), generator=generator)), 380 - length)
        cache.append(key[:, :, length : length + n], value[:, :, length : length + n])
        length += n
        peak = max(peak, length)
        back = int(torch.randint(0, max(1, min(length, 20 - (peak - length)) + 1), (), generator=generator))
        cache.crop(back)
        length -= back
        if length:
            for by_token, x, got in ((False, key, cache.keys()), (True, value, cache.values())):
                expected = reference.read(
                    x, length - 1, by_token=by_token, bits=(16, 8, 4, 2), step=32, sink_size=3, group_size=16
                )
                assert torch.equal(got, expected)
    fed(cache, key[:, :, length:], value[:, :, length:], [400 - length])
    assert same(cache, fed(made(small(), capacity=400), key, value, [400]))


# ---- attention -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [(16, 8, 4), (16, 8, 4, 2), (16, 2), (16,), (8, 4), (4,)], ids=str)
def test_attend_is_the_reference(bits: tuple[int, ...]) -> None:
    key, value, query = tokens(150), tokens(150, dim=24), tokens(150, heads=4)
    cache = made(small(bits), value_dim=24)
    cache.append(key, value)
    out = cache.attend(query)
    for b in range(2):
        expected = reference.attention(
            query[b], key[b], value[b], key_bits=bits, value_bits=bits, step=32, sink_size=3, group_size=16
        )
        assert (out[b].double() - expected).abs().max() < 2e-5  # type: ignore[index]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("bits, rotation", [((16, 8, 4, 2), None), ((16, 8, 4, 2), "hadamard"), ((8, 4, 2), None)])
def test_a_chunk_is_one_query_at_a_time(dtype: torch.dtype, bits: tuple[int, ...], rotation: str | None) -> None:
    key, value, query = (tokens(130, heads=h, dtype=dtype) for h in (2, 2, 4))
    stairs = small(bits, key_rotation=rotation, value_rotation=rotation)
    single = made(stairs, dtype=dtype, capacity=200)
    steps = []
    for i in range(130):
        single.append(key[:, :, i : i + 1], value[:, :, i : i + 1])
        steps.append(single.attend(query[:, :, i : i + 1]))
    expected = torch.cat(steps, 2)  # type: ignore[arg-type]
    for chunks in ([130], [1, 129], [64, 66], [20, 20, 20, 70], [100, 30]):
        cache, at = made(stairs, dtype=dtype, capacity=200), 0
        for n in chunks:
            part = slice(at, at + n)
            cache.append(key[:, :, part], value[:, :, part])
            assert torch.equal(cache.attend(query[:, :, part]), expected[:, :, part])  # type: ignore[arg-type]
            at += n
        assert same(cache, single)


def test_a_long_padded_chunk_after_others() -> None:
    key, value, query = tokens(150), tokens(150), tokens(150, heads=4)
    starts = torch.tensor([0, 33])
    cache = made(small())
    cache.append(tokens(40), tokens(40), starts=torch.tensor([7, 0]))
    other = StaircaseKVCache(small(), batch=2, kv_heads=2, head_dim=20)
    other.load_state_dict(cache.state_dict())
    cache.append(key, value, starts=starts)
    out = cache.attend(query)
    parts = []
    for i in range(150):
        other.append(key[:, :, i : i + 1], value[:, :, i : i + 1], starts=(i < starts).long())
        parts.append(other.attend(query[:, :, i : i + 1]))
    expected = torch.cat(parts, 2)  # type: ignore[arg-type]
    assert torch.equal(out[0], expected[0]) and torch.equal(out[1, :, 33:], expected[1, :, 33:])  # type: ignore[index]


def test_full_prefill() -> None:
    """The prompt attends to itself in full, and so does a later chunk to its own tokens."""
    key, value, query = tokens(150), tokens(150), tokens(150, heads=4)
    starts = torch.tensor([0, 33])
    cache = made(small())
    cache.append(key, value, starts=starts)
    plain = ops.attention(query, key, value, key_starts=starts)
    assert torch.equal(cache.attend(query, prefill="full")[0], plain[0])  # type: ignore[index]
    more_key, more_value, more_query = tokens(90), tokens(90), tokens(90, heads=4)
    before = [cache.lengths, cache.keys(), cache.values()]
    cache.append(more_key, more_value)
    out = cache.attend(more_query, prefill="full")
    for b, length in enumerate(before[0].tolist()):
        old_key, old_value = (x[b : b + 1, :, :length] for x in before[1:])
        if length % 32 == 0:  # else the first new query reads what the newest old one did
            continue
        expected = ops.attention(
            more_query[b : b + 1],
            torch.cat([old_key, more_key[b : b + 1]], 2),
            torch.cat([old_value, more_value[b : b + 1]], 2),
        )
        assert torch.equal(out[b : b + 1], expected)  # type: ignore[index]
    short = tokens(5, heads=4)
    cache.append(tokens(5), tokens(5))
    assert cache.attend(short, prefill="full").shape == short.shape  # type: ignore[union-attr]


def test_full_ladder_is_plain_attention_and_lambda_composes() -> None:
    key, value, query = tokens(150), tokens(150), tokens(150, heads=4)
    cache = fed(made(small((16,))), key, value, [50, 100])
    assert torch.equal(cache.attend(query), ops.attention(query, key, value))  # type: ignore[arg-type]
    schedule = pycore.schedules.Lambda(4, 40)
    expected = ops.lambda_attention(
        query, key, value, sink_size=4, window_size=40, distance_limit=None, softcap=3.0, return_lse=True
    )
    got = cache.attend(query, schedule=schedule, softcap=3.0, return_lse=True)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_a_query_learns_and_inference_mode_is_no_trap() -> None:
    key, value = tokens(100), tokens(100)
    query = tokens(100, heads=4).requires_grad_()
    with torch.inference_mode():
        cache = fed(made(small((16,))), key, value, [60, 40])
        cache.crop(0)
    (got,) = torch.autograd.grad(cache.attend(query).sum(), query)  # type: ignore[union-attr]
    (expected,) = torch.autograd.grad(ops.attention(query, key, value).sum(), query)  # type: ignore[union-attr]
    assert torch.equal(got, expected)
    cache.append(tokens(1), tokens(1))
    assert cache.lengths.tolist() == [101, 101]


def test_rows_shorter_than_the_queries_give_zeros() -> None:
    cache = made(small())
    cache.append(tokens(5), tokens(5), starts=torch.tensor([0, 2]))
    out, lse = cache.attend(tokens(5, heads=4), return_lse=True)
    assert not out[1, :, :2].any() and out[1, :, 2:].all() and out[0].all()
    assert (lse[1, :, :2] == -math.inf).all() and lse[1, :, 2:].isfinite().all()


def test_rotations_leave_attention_as_it_is() -> None:
    """Without quantization a rotated cache gives plain attention within rounding, and tokens come back as they were."""
    key, value, query = tokens(100), tokens(100), tokens(100, heads=4)
    learned = ops.staircase_rotation(key)
    for rotations in ({"key_rotation": "hadamard"}, {"value_rotation": "hadamard"}, {"key_rotation": learned},
                      {"key_rotation": learned, "value_rotation": ops.staircase_rotation(value)}):  # fmt: skip
        cache = fed(made(small((16,), **rotations)), key, value, [100])
        assert (cache.attend(query) - ops.attention(query, key, value)).abs().max() < 1e-5  # type: ignore[operator]
        assert (cache.keys() - key).abs().max() < 1e-5 and (cache.values() - value).abs().max() < 1e-5


def test_a_rotation_helps_values_with_an_outlier_channel() -> None:
    """One channel rules lo and hi of every token's group, until it is spread over all, with one sign at best."""
    value = torch.randn(1, 2, 512, 16)
    value[..., 3] *= 30
    errors = []
    for rotation in (None, "hadamard", ops.staircase_rotation(value, method="pca_hadamard")):
        cache = made(small((16, 2), value_rotation=rotation), batch=1, dim=16)
        cache.append(value, value)
        errors.append(float((cache.values() - value).square().mean()))
    assert errors[1] < 0.7 * errors[0] and errors[2] < 0.1 * errors[0]


# ---- rows, growth, state ---------------------------------------------------------------------------------------------


def test_rows_are_chosen() -> None:
    key, value = tokens(150, batch=3), tokens(150, batch=3)
    cache = made(small(), batch=3)
    cache.append(key, value, starts=torch.tensor([0, 30, 60]))
    keys, lengths = cache.keys(), cache.lengths
    cache.reorder(torch.tensor([2, 0, 0]))
    assert torch.equal(cache.keys(), keys[[2, 0, 0]]) and torch.equal(cache.lengths, lengths[[2, 0, 0]])
    cache.select(torch.tensor([0]))
    cache.repeat_interleave(2)
    assert cache.lengths.tolist() == [90, 90]
    cache.append(tokens(5), tokens(5))
    assert cache.lengths.tolist() == [95, 95]
    cache.select(torch.zeros(0, dtype=torch.int64))
    cache.append(tokens(5, batch=0), tokens(5, batch=0))
    assert cache.keys().shape == (0, 2, 0, 20)


def test_growth_keeps_everything() -> None:
    key, value = tokens(700), tokens(700)
    grown = fed(made(small()), key, value, [1] * 300 + [400])
    fixed = fed(made(small(), capacity=700), key, value, [700])
    assert torch.equal(grown.keys(), fixed.keys()) and torch.equal(grown.values(), fixed.values())


def test_nbytes_and_bits() -> None:
    """16/8/4 over 8192 tokens: four bits, lo and hi and a center in 64, and the rings' share."""
    cache = StaircaseKVCache(Staircase(), batch=1, kv_heads=1, head_dim=64, capacity=8192, dtype=torch.bfloat16)
    tensors = [x for x in stored(cache)[:-2]]
    assert cache.nbytes == sum(x.untyped_storage().nbytes() for x in tensors)
    assert math.isnan(cache.bits_per_value)
    cache.append(torch.randn(1, 1, 8192, 64).bfloat16(), torch.randn(1, 1, 8192, 64).bfloat16())
    rings = ((192 + 4) * 16 + 320 * (4 + 8 / 64)) / 8192
    assert cache.bits_per_value == pytest.approx(4 + 2 * 16 / 64 + 8 / 64 + rings, abs=1e-9)


def test_steps_as_fractions() -> None:
    cache = made(Staircase((16, 8, 4), step=0.125, sink_size=0, group_size=16), capacity=1000)
    assert cache.staircase.step == 112
    assert made(Staircase((16, 4), step=0.001, group_size=16), capacity=100).staircase.step == 16


@pytest.mark.parametrize("capacity", [None, 300])
def test_state_goes_on_elsewhere(capacity: int | None) -> None:
    key, value = tokens(250), tokens(250)
    cache = fed(made(small(key_rotation="hadamard"), capacity=capacity), key, value, [100, 50, 100])
    cache.crop(3)
    other = made(small(key_rotation="hadamard"), batch=1, capacity=capacity)
    other.load_state_dict(cache.state_dict())
    assert same(cache, other)
    more_key, more_value, query = tokens(40), tokens(40), tokens(40, heads=4)
    for each in (cache, other):
        each.append(more_key, more_value)
    assert same(cache, other)
    assert torch.equal(cache.attend(query), other.attend(query))  # type: ignore[arg-type]


def test_a_saved_cache_is_the_same_file_again() -> None:
    """Byte for byte: written, read back, and written from there."""
    cache = fed(
        made(small(value_rotation="hadamard"), dtype=torch.bfloat16),
        *tokens(400, dtype=torch.bfloat16).split(200, 2),
        [150, 50],
    )
    cache.crop(7)
    first = io.BytesIO()
    torch.save(cache.state_dict(), first)
    other = made(small(value_rotation="hadamard"), batch=1, dtype=torch.bfloat16)
    other.load_state_dict(torch.load(io.BytesIO(first.getvalue()), weights_only=True))
    assert same(cache, other)
    second = io.BytesIO()
    torch.save(other.state_dict(), second)
    assert first.getvalue() == second.getvalue()


def test_native_face_gives_the_same() -> None:
    key, value = tokens(100), tokens(100)
    stairs = small()
    cache, blank = made(stairs, capacity=128), made(stairs, capacity=128).state_dict()
    cache.append(key, value)
    sides = [[x.numpy() for x in blank[name]] for name in ("key", "value")]
    lengths = blank["lengths"].numpy()
    how: dict[str, Any] = {"sink_size": 3, "step": 32, "group_size": 16}
    native.staircase_cache_append(
        *sides, lengths, key.numpy(), value.numpy(), key_bits=stairs.bits, value_bits=stairs.bits, **how
    )
    assert all(
        torch.equal(torch.from_numpy(x), y) for x, y in zip(sides[0] + sides[1], stored(cache)[:18], strict=True)
    )
    got = native.staircase_cache_read(
        sides[1], lengths - 1, lengths, bits=stairs.bits, by_token=True, tokens=100, **how
    )
    assert torch.equal(torch.from_numpy(got), cache.values())


def test_opcheck() -> None:
    cache = made(small(), capacity=64)
    cache.append(tokens(40), tokens(40))
    state = cache.state_dict()
    bits, lengths = list(small().bits), state["lengths"]
    torch.library.opcheck(
        torch.ops.pycore.staircase_cache_append.default,
        (state["key"], state["value"], lengths, tokens(9), tokens(9), None, bits, bits, 3, 32, 16, "embedded"),
    )
    torch.library.opcheck(
        torch.ops.pycore.staircase_cache_read.default,
        (state["key"], lengths - 1, lengths, bits, False, 3, 32, 16, "embedded", 40, False),
    )
