# SPDX-License-Identifier: Apache-2.0
"""What bad input gets: one sentence with the op, the argument, what it was and what it must be."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from pycore.ops import attention, lambda_attention
from pycore.schedules import Causal, Full, Lambda, Prefix, Schedule, Segments
from tests.support.attention_inputs import lengths, qkv, tables

B, H, HKV, LQ, LK, D, DV = 2, 4, 2, 5, 9, 8, 6
LENGTHS = ("key_starts", "key_lengths", "key_offset", "query_lengths")


def zeros(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(*shape, dtype=dtype)


def good() -> dict[str, Any]:
    """Arguments of `attention` with nothing wrong."""
    query, key, value = qkv(B, H, HKV, LQ, LK, D, DV)
    return {"query": query, "key": key, "value": value, "schedule": Lambda(2, 3), "rope": tables(LK, D)}


def refused(error: type[Exception], message: str, function: Any = attention, **changes: Any) -> None:
    """Asserts that `function` with good() changed so raises exactly this sentence."""
    arguments = good() | changes
    if function is lambda_attention:
        arguments.pop("schedule")
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        function(**arguments)


def test_good_arguments_are_good() -> None:
    assert attention(**good()).shape == (B, H, LQ, DV)


# Argument by argument: changed arguments, and the sentence after "attention: ".
VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "query-dims": (
        {"query": zeros(H, LQ, D)},
        "query has 3 dimensions and must have 4: [batch, heads, length, head_dim]",
    ),
    "key-dims": (
        {"key": zeros(1, B, HKV, LK, D)},
        "key has 5 dimensions and must have 4: [batch, heads, length, head_dim]",
    ),
    "value-dims": ({"value": zeros(LK)}, "value has 1 dimensions and must have 4: [batch, heads, length, head_dim]"),
    "too-many-dims": ({"query": zeros(*[1] * 9)}, "query has 9 dimensions and may have 8"),
    "query-int64": (
        {"query": zeros(B, H, LQ, D, dtype=torch.int64)},
        "query is int64 and must be float32, float16, bfloat16 or float64",
    ),
    "query-complex": (
        {"query": zeros(B, H, LQ, D, dtype=torch.complex64)},
        "query has dtype ComplexFloat, which no kernel takes",
    ),
    "key-dtype": ({"key": zeros(B, HKV, LK, D).double()}, "key is float64 and must be float32 like query"),
    "value-dtype": ({"value": zeros(B, HKV, LK, DV).bfloat16()}, "value is bfloat16 and must be float32 like query"),
    "head-dim-0": (
        {"query": zeros(B, H, LQ, 0), "key": zeros(B, HKV, LK, 0)},
        "query has head_dim 0 and must have at least 1",
    ),
    "key-batch": (
        {"key": zeros(3, HKV, LK, D), "value": zeros(3, HKV, LK, DV)},
        "key has batch 3 and query has 2; they must be equal",
    ),
    "key-head-dim": ({"key": zeros(B, HKV, LK, 7)}, "key has head_dim 7 and query has 8; they must be equal"),
    "key-heads": (
        {"key": zeros(B, 3, LK, D), "value": zeros(B, 3, LK, DV)},
        "key has 3 heads, which does not divide query's 4",
    ),
    "key-no-heads": (
        {"key": zeros(B, 0, LK, D), "value": zeros(B, 0, LK, DV)},
        "key has 0 heads, which does not divide query's 4",
    ),
    "value-batch": (
        {"value": zeros(1, HKV, LK, DV)},
        "value has shape [1, 2, 9, 6] and key has [2, 2, 9, 8]; their first three dimensions must be equal",
    ),
    "value-heads": (
        {"value": zeros(B, 1, LK, DV)},
        "value has shape [2, 1, 9, 6] and key has [2, 2, 9, 8]; their first three dimensions must be equal",
    ),
    "value-length": (
        {"value": zeros(B, HKV, 8, DV)},
        "value has shape [2, 2, 8, 6] and key has [2, 2, 9, 8]; their first three dimensions must be equal",
    ),
    "sink-size": ({"schedule": Lambda(-1, 3)}, "sink_size is -1 and must be at least 0"),
    "window-size": ({"schedule": Lambda(2, 0)}, "window_size is 0 and must be at least 1"),
    "window-size-min": ({"schedule": Lambda(2, -(2**63))}, f"window_size is {-(2**63)} and must be at least 1"),
    "distance-limit": ({"distance_limit": -1}, "distance_limit is -1 and must be at least 0"),
    "distance-limit-min": ({"distance_limit": -(2**63)}, f"distance_limit is {-(2**63)} and must be at least 0"),
    "distance-limit-window": ({"distance_limit": 2}, "distance_limit is 2 and must be at least window_size, 3"),
    "scale-nan": ({"scale": float("nan")}, "scale is nan and must be finite"),
    "scale-inf": ({"scale": float("inf")}, "scale is inf and must be finite"),
    "rope-dims": ({"rope": (zeros(9), zeros(9))}, "rope's cos has 1 dimensions and must have 2: [n, R / 2]"),
    "rope-sin-dims": (
        {"rope": (zeros(9, 4), zeros(1, 9, 4))},
        "rope's sin has 3 dimensions and must have 2: [n, R / 2]",
    ),
    "rope-dtype": ({"rope": tables(9, 8, torch.float64)}, "rope's cos is float64 and must be float32"),
    "rope-sin-dtype": ({"rope": (zeros(9, 4), zeros(9, 4).half())}, "rope's sin is float16 and must be float32"),
    "rope-shapes": (
        {"rope": (zeros(9, 4), zeros(9, 3))},
        "rope's cos has shape [9, 4] and sin [9, 3]; both must have the same shape and strides",
    ),
    "prefix-lengths-dtype": (
        {"schedule": Prefix(zeros(B))},
        "prefix_lengths must be an int64 tensor of one dimension",
    ),
    "prefix-lengths-dims": (
        {"schedule": Prefix(torch.tensor(3))},
        "prefix_lengths must be an int64 tensor of one dimension",
    ),
    "prefix-lengths-count": (
        {"schedule": Prefix(lengths(1, 2, 3))},
        "prefix_lengths has 3 entries and must have one for each of 2 batch rows",
    ),
    "prefix-lengths-negative": (
        {"schedule": Prefix(lengths(1, -2))},
        "prefix_lengths[1] is -2 and must be at least 0",
    ),
    "boundaries-dtype": (
        {"schedule": Segments(torch.zeros(3))},
        "boundaries must be an int64 tensor of one or two dimensions, [S + 1] or [batch, S + 1]",
    ),
    "boundaries-dims": (
        {"schedule": Segments(lengths(0, 9)[None, None])},
        "boundaries must be an int64 tensor of one or two dimensions, [S + 1] or [batch, S + 1]",
    ),
    "boundaries-empty": ({"schedule": Segments(lengths())}, "boundaries is empty and must have at least one entry"),
    "boundaries-order": (
        {"schedule": Segments(lengths(0, 5, 4, 9))},
        "boundaries[2] is 4 and must not be less than the one before it, 5",
    ),
    "bias-dtype": ({"distance_bias": zeros(H, 3).half()}, "distance_bias is float16 and must be float32"),
    "bias-dtype-64": ({"distance_bias": zeros(H, 3).double()}, "distance_bias is float64 and must be float32"),
    "bias-dims": (
        {"distance_bias": zeros(H)},
        "distance_bias has shape [4] and must be [heads, n], with 4 heads",
    ),
    "bias-heads": (
        {"distance_bias": zeros(HKV, 3)},
        "distance_bias has shape [2, 3] and must be [heads, n], with 4 heads",
    ),
    "bias-empty": (
        {"distance_bias": zeros(H, 0)},
        "distance_bias has no entries and must have at least one a head",
    ),
    "sinks-dtype": ({"sink_logits": zeros(H).bfloat16()}, "sink_logits is bfloat16 and must be float32"),
    "sinks-dims": ({"sink_logits": zeros(H, 1)}, "sink_logits has shape [4, 1] and must be [heads], with 4 heads"),
    "sinks-heads": ({"sink_logits": zeros(H + 1)}, "sink_logits has shape [5] and must be [heads], with 4 heads"),
    "softcap-negative": ({"softcap": -1.0}, "softcap is -1 and must be finite and at least 0"),
    "softcap-inf": ({"softcap": float("inf")}, "softcap is inf and must be finite and at least 0"),
    "softcap-nan": ({"softcap": float("nan")}, "softcap is nan and must be finite and at least 0"),
    "dropout-1": ({"dropout_p": 1.0}, "dropout_p is 1 and must be at least 0 and less than 1"),
    "dropout-negative": ({"dropout_p": -0.5}, "dropout_p is -0.5 and must be at least 0 and less than 1"),
    "dropout-nan": ({"dropout_p": float("nan")}, "dropout_p is nan and must be at least 0 and less than 1"),
    "rope-channels": ({"rope": tables(9, 10)}, "rope rotates 10 channels and must rotate at most head_dim, 8"),
}


@pytest.mark.parametrize("name", VALUES)
def test_bad_value(name: str) -> None:
    changes, message = VALUES[name]
    refused(ValueError, f"attention: {message}", **changes)


# And of `lambda_attention`, which has alibi_slopes.
ALIBI: dict[str, tuple[dict[str, Any], str]] = {
    "dtype": ({"alibi_slopes": zeros(H).double()}, "alibi_slopes is float64 and must be float32"),
    "dims": (
        {"alibi_slopes": zeros(1, 1, H)},
        "alibi_slopes has shape [1, 1, 4] and must be [heads] or [batch, heads], with 4 heads",
    ),
    "heads": (
        {"alibi_slopes": zeros(3)},
        "alibi_slopes has shape [3] and must be [heads] or [batch, heads], with 4 heads",
    ),
    "rows": (
        {"alibi_slopes": zeros(3, H)},
        "alibi_slopes has 3 rows and must have one, or one for each of 2 batch rows",
    ),
    "and-bias": (
        {"alibi_slopes": zeros(H), "distance_bias": zeros(H, 3)},
        "distance_bias and alibi_slopes are both given; only one may be",
    ),
}


@pytest.mark.parametrize("name", ALIBI)
def test_bad_alibi_slopes(name: str) -> None:
    changes, message = ALIBI[name]
    refused(ValueError, f"lambda_attention: {message}", lambda_attention, sink_size=1, window_size=2, **changes)


def test_tables_of_float64_queries() -> None:
    """Tables follow the accumulation: float64 for float64, float32 for every other dtype."""
    wide = {name: good()[name].double() for name in ("query", "key", "value")} | {"rope": tables(LK, D, torch.float64)}
    half = {name: good()[name].half() for name in ("query", "key", "value")}
    for name, shape in (("distance_bias", (H, 3)), ("sink_logits", (H,))):
        refused(ValueError, f"attention: {name} is float32 and must be float64", **wide, **{name: zeros(*shape)})
        refused(
            ValueError, f"attention: {name} is float64 and must be float32", **half, **{name: zeros(*shape).double()}
        )
        attention(**good() | half, **{name: zeros(*shape)})


def test_the_op_that_was_called_is_named() -> None:
    key, value = zeros(B, 3, LK, D), zeros(B, 3, LK, DV)
    message = "lambda_attention: key has 3 heads, which does not divide query's 4"
    refused(ValueError, message, lambda_attention, key=key, value=value, sink_size=1, window_size=2)


# ---- tables that are too short -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "schedule, limit, queries, keys, offset, needed",
    [
        (Causal(), None, 5, 100, 0, 100), (Causal(), None, 5, 100, 50, 150), (Causal(), 10, 5, 100, 0, 74),
        (Causal(), 0, 5, 100, 0, 64), (Causal(), 90, 5, 100, 0, 100), (Lambda(2, 10), 10, 5, 100, 0, 74),
        (Lambda(2, 10), 10, 5, 100, 1 << 40, 74), (Full(), None, 5, 100, 0, 100), (Full(), None, 100, 5, 0, 100),
        (Prefix(lengths(0)), None, 100, 5, 0, 100), (Prefix(lengths(9)), 10, 5, 100, 0, 100),
        (Segments(lengths(0, 100), causal=False), 10, 100, 100, 0, 100), (Segments(lengths(0, 100)), 10, 5, 100, 0, 74),
        (Segments(lengths(0, 100), False, right=9), 10, 100, 100, 0, 74), (Lambda(2, 9, right=8), 10, 9, 5, 0, 9),
        (Lambda(2, 9, right=8), 10, 90, 100, 1 << 40, 74), (Lambda(2, 9, right=None), 10, 100, 5, 0, 100),
    ],
    ids=str,
)  # fmt: skip
def test_rope_must_reach(
    schedule: Schedule, limit: int | None, queries: int, keys: int, offset: int, needed: int
) -> None:
    """The largest distance, or the limit and a tile: one row less is refused, that many are enough."""
    q, k, v = qkv(1, 1, 1, queries, keys, 8)
    options = {"schedule": schedule, "distance_limit": limit, "key_offset": lengths(offset)}
    assert attention(q, k, v, rope=tables(needed, 8), **options).isfinite().all()
    why = f": distance_limit, {limit}, and a tile of 64"
    if limit is None or needed != limit + 64:
        why = f", one for every distance up to {needed - 1}"
    message = f"attention: rope has {needed - 1} rows and must have {needed}{why}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        attention(q, k, v, rope=tables(needed - 1, 8), **options)


# ---- lengths -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_are_int64(name: str) -> None:
    refused(ValueError, f"attention: {name} is bool and must be int64", **{name: zeros(B, dtype=torch.bool)})
    refused(ValueError, f"attention: {name} is uint64 and must be int64", **{name: zeros(B, dtype=torch.uint64)})
    refused(ValueError, f"attention: {name} is float32 and must be int64", **{name: zeros(B)})


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_are_one_per_batch_row(name: str) -> None:
    message = f"attention: {name} has shape {{}} and must be [batch], here [2]"
    refused(ValueError, message.format("[3]"), **{name: zeros(3, dtype=torch.int64)})
    refused(ValueError, message.format("[]"), **{name: torch.tensor(3)})
    refused(ValueError, message.format("[2, 1]"), **{name: zeros(2, 1, dtype=torch.int64)})


@pytest.mark.parametrize("number", [-1, LK + 1, 2**62, -(2**63)])
def test_key_lengths_range(number: int) -> None:
    message = f"attention: key_lengths[1] is {number} and must be between 0 and key's length, 9"
    refused(ValueError, message, key_lengths=lengths(3, number))


@pytest.mark.parametrize("number", [-1, LK + 1, 2**62, -(2**63)])
def test_key_starts_range(number: int) -> None:
    message = f"attention: key_starts[1] is {number} and must be between 0 and key_lengths[1], 9"
    refused(ValueError, message, key_starts=lengths(3, number))


def test_key_starts_beyond_key_lengths() -> None:
    message = "attention: key_starts[0] is 5 and must be between 0 and key_lengths[0], 4"
    refused(ValueError, message, key_starts=lengths(5, 0), key_lengths=lengths(4, 9))


@pytest.mark.parametrize("number", [-1, LQ + 1, 2**62])
def test_query_lengths_range(number: int) -> None:
    message = f"attention: query_lengths[0] is {number} and must be between 0 and query's length, 5"
    refused(ValueError, message, query_lengths=lengths(number, 0))


@pytest.mark.parametrize("number", [-1, -(2**63), 2**61, 2**62])
def test_key_offset_range(number: int) -> None:
    message = f"attention: key_offset[1] is {number} and must be between 0 and {2**61 - 2}"
    refused(ValueError, message, key_offset=lengths(0, number))


# ---- types ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", [attention, lambda_attention], ids=["attention", "lambda_attention"])
@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_inputs_are_tensors(name: str, function: Any) -> None:
    sizes = {"sink_size": 1, "window_size": 2} if function is lambda_attention else {}
    message = f"{function.__name__}: {name} is a {{}} and must be a Tensor"
    refused(TypeError, message.format("list"), function, **{name: [1.0]}, **sizes)
    refused(TypeError, message.format("NoneType"), function, **{name: None}, **sizes)


@pytest.mark.parametrize("schedule, name", [(None, "NoneType"), ("causal", "str"), (Causal, "type")], ids=str)
def test_schedule_is_a_schedule(schedule: Any, name: str) -> None:
    refused(TypeError, f"attention: schedule is a {name} and must be one of pycore.schedules", schedule=schedule)


@pytest.mark.parametrize(
    "rope", [zeros(9, 4), (zeros(9, 4),), (zeros(9, 4), None), (1, 2), "cos"], ids=lambda r: type(r).__name__
)
def test_rope_is_a_pair_of_tensors(rope: Any) -> None:
    refused(TypeError, "attention: rope must be a pair of Tensors, (cos, sin)", rope=rope)


@pytest.mark.parametrize("name", LENGTHS)
def test_lengths_are_tensors(name: str) -> None:
    refused(TypeError, f"attention: {name} is a list and must be a Tensor", **{name: [1, 2]})
    refused(TypeError, f"attention: {name} is a int and must be a Tensor", **{name: 3})


@pytest.mark.parametrize("name", ["sink_size", "window_size", "distance_limit"])
@pytest.mark.parametrize("number", [2.0, "2", (2,)], ids=str)
def test_sizes_are_ints(name: str, number: Any) -> None:
    arguments = {"sink_size": 1, "window_size": 2, "distance_limit": 4} | {name: number}
    message = f"lambda_attention: {name} is a {type(number).__name__} and must be an int"
    refused(TypeError, message, lambda_attention, **arguments)
    arguments = {
        "schedule": Lambda(arguments["sink_size"], arguments["window_size"]),
        "distance_limit": arguments["distance_limit"],
    }
    refused(TypeError, message.replace("lambda_attention", "attention"), **arguments)


@pytest.mark.parametrize("name", ["sink_size", "window_size", "distance_limit"])
def test_sizes_fit_int64(name: str) -> None:
    arguments = {"sink_size": 1, "window_size": 2, "distance_limit": 2**63 - 1} | {name: 2**63}
    refused(
        ValueError, f"lambda_attention: {name} is {2**63} and must be less than 2**63", lambda_attention, **arguments
    )


@pytest.mark.parametrize("name", ["scale", "softcap", "dropout_p"])
@pytest.mark.parametrize("number", ["1", (1.0,)], ids=str)
def test_factors_are_numbers(name: str, number: Any) -> None:
    refused(TypeError, f"attention: {name} is a {type(number).__name__} and must be a number", **{name: number})


@pytest.mark.parametrize("name", ["distance_bias", "sink_logits"])
def test_options_are_tensors(name: str) -> None:
    refused(TypeError, f"attention: {name} is a list and must be a Tensor", **{name: [1.0] * H})
    refused(TypeError, f"attention: {name} is a float and must be a Tensor", **{name: 0.5})


def test_alibi_slopes_are_a_tensor() -> None:
    message = "lambda_attention: alibi_slopes is a list and must be a Tensor"
    refused(TypeError, message, lambda_attention, sink_size=1, window_size=2, alibi_slopes=[1.0] * H)


def test_schedules_hold_tensors() -> None:
    refused(TypeError, "attention: prefix_lengths is a list and must be a Tensor", schedule=Prefix([1, 2]))
    refused(TypeError, "attention: boundaries is a tuple and must be a Tensor", schedule=Segments((0, 9)))


# ---- the ops themselves, whose other callers have no wrapper --------------------------------------------------------


# What stands between value and op: the tables, the lengths, a schedule's tensor and a seed.
TABLES = ("rope_cos", "rope_sin", "distance_bias", "alibi_slopes", "sink_logits")
NO_TENSORS = dict.fromkeys((*TABLES, *LENGTHS, "schedule_tensor", "dropout_seed", "block_bias"))


def op_arguments(
    schedule: str = "causal", numbers: tuple[int, ...] = (), limit: int = -1, softcap: float = 0.0,
    dropout_p: float = 0.0, **tensors: Tensor,
) -> tuple[Any, ...]:  # fmt: skip
    """Those of torch.ops.pycore.attention after value."""
    given = NO_TENSORS | tensors
    assert len(given) == len(NO_TENSORS)
    return (*given.values(), "attention", schedule, list(numbers), False, limit, 1.0, softcap, dropout_p)


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            op_arguments("wavy"),
            'schedule is "wavy" and must be "full", "causal", "lambda", "prefix", "segments", "blocks", "key_subset" '
            'or "tree"',
        ),
        (op_arguments("causal", (1,)), 'schedule "causal" has 1 numbers and takes 0'),
        (op_arguments("full", (1, 2)), 'schedule "full" has 2 numbers and takes 0'),
        (op_arguments("lambda", (1,)), 'schedule "lambda" has 1 numbers and takes 2 or 3'),
        (op_arguments("segments", schedule_tensor=lengths(0, 9)), 'schedule "segments" has 0 numbers and takes 1 or 4'),
        (op_arguments("causal", schedule_tensor=lengths(0, 9)), 'schedule "causal" takes no tensor'),
        (op_arguments("prefix"), 'schedule "prefix" takes one tensor'),
        (op_arguments("segments", (1,)), 'schedule "segments" takes one tensor'),
        (op_arguments("blocks", (64, 0)), 'schedule "blocks" has 2 numbers and takes 3'),
        (op_arguments("blocks", (64, 0, 1)), 'schedule "blocks" takes one tensor'),
        (
            op_arguments("blocks", (64, 0, 1), schedule_tensor=lengths(0, 1)),
            "schedule's tensor is int64 [2] and must be int64 [2, 4, 2, 1], as attention_blocks draws it",
        ),
        (
            op_arguments("blocks", (64, 0, 1), schedule_tensor=zeros(2, 4, 2, 1)),
            "schedule's tensor is float32 [2, 4, 2, 1] and must be int64 [2, 4, 2, 1], as attention_blocks draws it",
        ),
        (op_arguments(block_bias=zeros(1, 3)), 'block_bias comes with schedule "blocks"'),
        (op_arguments(block_bias=zeros(3, 3)), "block_bias has shape [3, 3] and must be [heads, n], with 4 heads"),
        (op_arguments(limit=-2), "distance_limit is -2 and must be at least 0"),
        (op_arguments(dropout_p=0.5), "dropout_seed must be one int64 number"),
        (op_arguments(dropout_p=0.5, dropout_seed=zeros(1)), "dropout_seed must be one int64 number"),
        (op_arguments(dropout_p=0.5, dropout_seed=lengths(1, 2)), "dropout_seed must be one int64 number"),
    ],
    ids=["schedule", "causal-numbers", "full-numbers", "lambda-numbers", "segments-numbers", "causal-tensor",
         "prefix-tensor", "segments-tensor", "blocks-numbers", "blocks-tensor", "blocks-shape", "blocks-dtype",
         "block-bias-schedule", "block-bias-shape", "distance-limit", "no-seed", "seed-dtype",
         "two-seeds"],
)  # fmt: skip
def test_op_arguments(arguments: tuple[Any, ...], message: str) -> None:
    inputs = qkv(B, H, HKV, LQ, LK, D, DV)
    with pytest.raises(ValueError, match=f"^{re.escape(f'attention: {message}')}$"):
        torch.ops.pycore.attention(*inputs, *arguments)


def test_op_wants_both_tables() -> None:
    cos, sin = tables(LK, D)
    for rope in ({"rope_cos": cos}, {"rope_sin": sin}):
        with pytest.raises(ValueError, match=r"^attention: rope must hold both tables, cos and sin$"):
            torch.ops.pycore.attention(*qkv(B, H, HKV, LQ, LK, D, DV), *op_arguments(**rope))


@pytest.mark.parametrize(
    "name, make, message",
    [
        ("grad_out", lambda x: x[0], "grad_out has 3 dimensions and must have 4: [batch, heads, length, head_dim]"),
        ("grad_out", lambda x: x.double(), "grad_out is float64 and must be float32 like query"),
        ("grad_out", lambda x: x[..., 1:], "grad_out has shape [2, 4, 5, 5] and must have the output's"),
        ("out", lambda x: x[..., 1:], "out has shape [2, 4, 5, 5] and must have the output's"),
        ("out", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "out must be contiguous"),
        ("lse", lambda x: x[0], "lse has shape [4, 5] and must be [batch, heads, query length]"),
        ("lse", lambda x: x[:, :, 1:], "lse has shape [2, 4, 4] and must be [batch, heads, query length]"),
        ("lse", lambda x: x.double(), "lse is float64 and must be float32"),
        ("lse", lambda x: x.transpose(1, 2).contiguous().transpose(1, 2), "lse must be contiguous"),
        ("grad_lse", lambda x: x[:, :, 1:], "grad_lse has shape [2, 4, 4] and must be [batch, heads, query length]"),
        ("grad_lse", lambda x: x.double(), "grad_lse is float64 and must be float32"),
        ("bias_gradient", lambda x: True, "distance_bias has no gradient where there is none"),
        ("sink_gradient", lambda x: True, "sink_logits has no gradient where there is none"),
    ],
    ids=["grad_out-dims", "grad_out-dtype", "grad_out-shape", "out-shape", "out-strides", "lse-dims", "lse-shape",
         "lse-dtype", "lse-strides", "grad_lse-shape", "grad_lse-dtype", "bias-gradient", "sink-gradient"],
)  # fmt: skip
def test_backward_op_arguments(name: str, make: Any, message: str) -> None:
    inputs = qkv(B, H, HKV, LQ, LK, D, DV)
    out, lse = torch.ops.pycore.attention(*inputs, *op_arguments())
    first = {
        "grad_out": torch.ones_like(out), "grad_lse": torch.ones_like(lse), "out": out, "lse": lse,
        "bias_gradient": False, "sink_gradient": False,
    }  # fmt: skip
    torch.ops.pycore.attention_backward(*first.values(), *inputs, *op_arguments())
    first[name] = make(first[name])
    with pytest.raises(ValueError, match=f"^{re.escape(f'attention: {message}')}$"):
        torch.ops.pycore.attention_backward(*first.values(), *inputs, *op_arguments())


@pytest.mark.cuda
def test_other_devices() -> None:
    for name in ("key", "value"):
        refused(ValueError, f"attention: {name} is on another device than query", **{name: good()[name].cuda()})
    for name in LENGTHS:
        message = f"attention: {name} is on another device than query"
        refused(ValueError, message, **{name: zeros(B, dtype=torch.int64).cuda()})
    for name, x in (("distance_bias", zeros(H, 3)), ("sink_logits", zeros(H))):
        refused(ValueError, f"attention: {name} is on another device than query", **{name: x.cuda()})
    for name, schedule in (("prefix_lengths", Prefix), ("boundaries", Segments)):
        message = f"attention: {name} is on another device than query"
        refused(ValueError, message, schedule=schedule(lengths(0, 9).cuda()))
    cos, sin = tables(LK, D)
    refused(ValueError, "attention: rope's sin is on another device than query", rope=(cos, sin.cuda()))
