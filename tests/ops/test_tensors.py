# SPDX-License-Identifier: Apache-2.0
"""Tensors that no kernel can read, whatever the op: beside others on another device, without strides, without room."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import pycore
from pycore import ops, positions
from pycore.compat import torch as compat
from pycore.compat import torchac
from pycore.models.bytelm import Bytelm, BytelmConfig
from pycore.schedules import Constant, KeySubset, Prefix, Probabilistic, Segments, Tree, expected_density

B, H, LQ, LK, D = 2, 4, 3, 5, 8
COUNTS = torch.tensor([1, 2])
CDF = torch.tensor([0, 1, 2], dtype=torch.int32)


def good(name: str) -> dict[str, Any]:
    """Tensors of an op, by argument."""
    tables = {"rope's cos": torch.ones(80, 4), "rope's sin": torch.zeros(80, 4), "sink_logits": torch.zeros(H)}
    lengths = {x: COUNTS for x in ("key_starts", "key_lengths", "key_offset", "query_lengths")}
    inputs = {"query": torch.randn(B, H, LQ, D), "key": torch.randn(B, H, LK, D), "value": torch.randn(B, H, LK, D)}
    rows = {"symbols": torch.zeros(2, 3, dtype=torch.int64)}
    given: dict[str, dict[str, Any]] = {
        "attention": {**inputs, **tables, **lengths, "distance_bias": torch.zeros(H, 3)},
        "lambda_attention": {**inputs, **tables, **lengths, "alibi_slopes": torch.zeros(H)},
        "pr_flash_attention": {**inputs, **lengths, "seed": COUNTS, "round": torch.tensor(1),
                               "distance_probs": torch.rand(3)},
        "pr_block_mask": {"seed": COUNTS, "distance_probs": torch.rand(3)},
        "prefix": {**inputs, "prefix_lengths": COUNTS},
        "segments": {**inputs, "boundaries": torch.tensor([0, 2, 5])},
        "key_subset": {**inputs, "keys": torch.tensor([0, 2])},
        "tree": {**inputs, "parents": torch.tensor([-1, 0])},
        "scaled_dot_product_attention": inputs,
        "invariant_linear": {"x": torch.randn(3, 4), "weight": torch.randn(2, 4), "bias": torch.zeros(2)},
        "invariant_linears": {"x": torch.randn(3, 4), "weights": torch.randn(2, 4), "biases": torch.zeros(2)},
        "rms_norm": {"x": torch.randn(3, 4), "weight": torch.ones(4)},
        "layer_norm": {"x": torch.randn(3, 4), "weight": torch.ones(4), "bias": torch.ones(4)},
        "silu_mul": {"gate": torch.randn(3, 4), "up": torch.ones(3, 4)},
        "gelu_mul": {"gate": torch.randn(3, 4), "up": torch.ones(3, 4)},
        "quantize_cdf": {"probs": torch.ones(3)},
        "ac_encode": {**rows, "cdf": CDF},
        "ac_encode_logits": {**rows, "logits": torch.zeros(2)},
        "ac_decode": {"cdf": CDF},
        "ac_decode_logits": {"logits": torch.zeros(2)},
        "ac_encode_bytes": {"data": torch.zeros(2, 3, dtype=torch.uint8)},
        "encode_float_cdf": {"cdf_float": torch.tensor([[0.0, 0.5, 1.0]]), "sym": torch.zeros(1, dtype=torch.int16)},
        "Bitstreams": {"data": torch.zeros(0, dtype=torch.uint8), "offsets": torch.zeros(1, dtype=torch.int64)},
        "expected_density": {"distance_probs": torch.rand(3)},
        "t5_bias": {"weight": torch.zeros(4, H)},
        "clipped_bias": {"weight": torch.zeros(4, H)},
        "LambdaKVCache.append": {"key": inputs["key"], "value": inputs["value"], "starts": COUNTS},
        "Bytelm": {"tokens": torch.zeros(1, 3, dtype=torch.int64)},
    }  # fmt: skip
    return given[name]


def attend(op: Callable[..., Any], given: dict[str, Any], **options: Any) -> Any:
    rest = dict(given)
    if "rope's cos" in rest:
        options["rope"] = (rest.pop("rope's cos"), rest.pop("rope's sin"))
    return op(**rest, **options)


def scheduled(schedule: Any, name: str) -> Callable[[dict[str, Any]], Any]:
    def call(given: dict[str, Any]) -> Any:
        return ops.attention(given["query"], given["key"], given["value"], schedule=schedule(given[name]))

    return call


def appended(given: dict[str, Any]) -> None:
    pycore.LambdaKVCache(1, 4).append(given["key"], given["value"], starts=given["starts"])


STREAMS = ops.ac_encode(torch.zeros(2, 3, dtype=torch.int64), CDF)
LOGIT_STREAMS = ops.ac_encode_logits(torch.zeros(2, 3, dtype=torch.int64), torch.zeros(2))
MASK = {"batch": 2, "heads": 1, "query_blocks": 2, "key_blocks": 2}
CALLS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "attention": lambda given: attend(ops.attention, given),
    "lambda_attention": lambda given: attend(ops.lambda_attention, given, sink_size=1, window_size=2),
    "pr_flash_attention": lambda given: ops.pr_flash_attention(**given),
    "pr_block_mask": lambda given: ops.pr_block_mask(**given, **MASK),
    "prefix": scheduled(Prefix, "prefix_lengths"),
    "segments": scheduled(Segments, "boundaries"),
    "key_subset": scheduled(KeySubset, "keys"),
    "tree": scheduled(Tree, "parents"),
    "scaled_dot_product_attention": lambda given: compat.scaled_dot_product_attention(**given),
    "invariant_linear": lambda given: ops.invariant_linear(**given),
    "invariant_linears": lambda given: ops.invariant_linears(given["x"], [given["weights"]], [given["biases"]]),
    "rms_norm": lambda given: ops.rms_norm(**given),
    "layer_norm": lambda given: ops.layer_norm(**given),
    "silu_mul": lambda given: ops.silu_mul(**given),
    "gelu_mul": lambda given: ops.gelu_mul(**given),
    "quantize_cdf": lambda given: ops.quantize_cdf(**given),
    "ac_encode": lambda given: ops.ac_encode(**given),
    "ac_encode_logits": lambda given: ops.ac_encode_logits(**given),
    "ac_decode": lambda given: ops.ac_decode(STREAMS, **given),
    "ac_decode_logits": lambda given: ops.ac_decode_logits(LOGIT_STREAMS, **given),
    "ac_encode_bytes": lambda given: ops.ac_encode_bytes(**given),
    "encode_float_cdf": lambda given: torchac.encode_float_cdf(**given),
    "Bitstreams": lambda given: pycore.Bitstreams(**given),
    "expected_density": lambda given: expected_density(given["distance_probs"], blocks=3),
    "t5_bias": lambda given: positions.t5_bias(given["weight"], 3),
    "clipped_bias": lambda given: positions.clipped_bias(given["weight"], 3),
    "LambdaKVCache.append": appended,
    "Bytelm": lambda given: Bytelm(BytelmConfig(dim=8, heads=2, kv_heads=1, layers=1))(given["tokens"]),
}
ALL = [(name, argument) for name in CALLS for argument in good(name)]
OPS = {"prefix": "attention", "segments": "attention", "key_subset": "attention", "tree": "attention"}
OPS["encode_float_cdf"] = "encode_(float|int16_normalized)_cdf"
OPS["scaled_dot_product_attention"] = "(scaled_dot_product_attention|attention)"


@pytest.mark.parametrize("name", CALLS)
def test_these_are_good(name: str) -> None:
    CALLS[name](good(name))


# ---- meta tensors, which have no data, beside tensors that have ----------------------------------------------------

MIXED = [(name, argument) for name, argument in ALL
         if len(good(name)) > 1 and name not in ("Bitstreams", "encode_float_cdf", "pr_block_mask")]  # fmt: skip


@pytest.mark.parametrize("name, argument", MIXED, ids=["-".join(x) for x in MIXED])
def test_one_meta_tensor_is_refused(name: str, argument: str) -> None:
    """And nothing is computed: torch would call the fake kernel, whose result is memory as it was."""
    given = good(name)
    given[argument] = given[argument].to("meta")
    op = OPS.get(name, name)
    # Where the first tensor is on meta, it is the next one that is elsewhere.
    with pytest.raises(ValueError, match=rf"^{op}(_backward)?: .* (is|and must be|like .* on) .*(on|than) .*\bmeta\b|"
                                         rf"^{op}: .* is on (meta|cpu)"):  # fmt: skip
        CALLS[name](given)


@pytest.mark.parametrize("argument", ["data", "cdf_float", "sym"])
def test_what_gives_bytes_takes_no_meta_tensor(argument: str) -> None:
    if argument == "data":
        with pytest.raises(ValueError, match="^pr_block_mask: seed is on meta, which has no data, and must be"):
            ops.pr_block_mask(**MASK, seed=COUNTS.to("meta"), distance_probs=Constant(0.5))
        return
    given = good("encode_float_cdf")
    given[argument] = given[argument].to("meta")
    with pytest.raises(ValueError, match=rf"^encode_\w+_cdf: {argument} is on meta, which has no data, and must be"):
        torchac.encode_float_cdf(**given)


@pytest.mark.parametrize("name", ["ac_decode", "ac_decode_logits"])
def test_streams_and_a_meta_model(name: str) -> None:
    given = {argument: x.to("meta") for argument, x in good(name).items()}
    with pytest.raises(ValueError, match=f"^{name}: [a-z]+ is on meta and must be on cpu, where streams is$"):
        CALLS[name](given)


ON_META = [name for name in CALLS if name in (
    "attention", "lambda_attention", "pr_flash_attention", "prefix", "segments", "key_subset", "tree", "rms_norm",
    "scaled_dot_product_attention", "invariant_linear", "invariant_linears", "quantize_cdf", "t5_bias", "clipped_bias",
    "layer_norm", "silu_mul", "gelu_mul",
)]  # fmt: skip


@pytest.mark.parametrize("name", ON_META)
def test_meta_tensors_alone_have_a_result(name: str) -> None:
    """Of the shape and dtype that real ones have."""
    real = CALLS[name](good(name))
    fake = CALLS[name]({argument: x.to("meta") for argument, x in good(name).items()})
    assert fake.is_meta and fake.shape == real.shape and fake.dtype == real.dtype


def test_backward_kernels_look_at_the_gradient() -> None:
    x, weight = torch.randn(3, 4), torch.randn(2, 4)
    for op, grad, rest in (
        (torch.ops.pycore.invariant_linear_backward, torch.zeros(3, 2), (x, weight, True, True, True)),
        (torch.ops.pycore.rms_norm_backward, torch.zeros(3, 4), (x, torch.ones(4), 1e-6, True, True)),
        (torch.ops.pycore.layer_norm_backward, torch.zeros(3, 4), (x, torch.ones(4), 1e-6, True, True, True)),
    ):
        op(grad, *rest)
        with pytest.raises(ValueError, match="_backward: grad_out is on meta and must be on cpu, where x is$"):
            op(grad.to("meta"), *rest)


# ---- tensors without strides ---------------------------------------------------------------------------------------


def without_strides(x: Tensor) -> dict[str, Tensor]:
    kinds = {"has layout sparse_coo": x.to_sparse()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if x.dim() > 0:
            kinds["is nested"] = torch.nested.nested_tensor([x, x])
            kinds["has layout jagged"] = torch.nested.nested_tensor([x, x], layout=torch.jagged)
        if x.dtype == torch.float32:
            kinds["is quantized"] = torch.quantize_per_tensor(x, 0.1, 0, torch.qint8)
    return kinds


@pytest.mark.parametrize("name, argument", ALL, ids=["-".join(x) for x in ALL])
def test_tensors_without_strides_are_refused(name: str, argument: str) -> None:
    for what, x in without_strides(good(name)[argument]).items():
        message = f"{argument} {what} and must be a dense tensor"
        with pytest.raises(ValueError, match=f"^{OPS.get(name, name)}: {re.escape(message)}"):
            CALLS[name](good(name) | {argument: x})


def test_a_sparse_seed_and_for_layer() -> None:
    schedule = Probabilistic(Constant(0.5), COUNTS.to_sparse())
    with pytest.raises(ValueError, match="^attention: seed has layout sparse_coo and must be a dense tensor$"):
        ops.attention(*(good("attention")[name] for name in ("query", "key", "value")), schedule=schedule)


# ---- more than memory holds ----------------------------------------------------------------------------------------

FAR = 2**46
HUGE: dict[str, tuple[Callable[[], Any], str]] = {
    "attention": (
        lambda: ops.attention(torch.zeros(1, 1, 1, 8).expand(1, 1, FAR, 8), *[torch.zeros(1, 1, 3, 8)] * 2),
        f"attention: out has shape [1, 1, {FAR}, 8]",
    ),
    "attention-copy": (
        lambda: ops.attention(torch.zeros(1, 1, 1, 1).expand(1, 1, FAR, 8), *[torch.zeros(1, 1, 3, 8)] * 2),
        f"attention: query has shape [1, 1, {FAR}, 8]",
    ),
    "lambda_attention": (
        lambda: ops.lambda_attention(torch.zeros(1, 1, 1, 8).expand(FAR, 1, 1, 8),
                                     *[torch.zeros(1, 1, 3, 8).expand(FAR, 1, 3, 8)] * 2, sink_size=1, window_size=2),
        f"lambda_attention: out has shape [{FAR}, 1, 1, 8]",
    ),
    "pr_block_mask": (
        lambda: ops.pr_block_mask(batch=FAR, heads=1, query_blocks=2, key_blocks=2, distance_probs=Constant(0.5),
                                  seed=1),
        f"pr_block_mask: the bitmap of blocks has shape [{FAR}, 1, 2, 1]",
    ),
    "invariant_linear": (
        lambda: ops.invariant_linear(torch.zeros(1, 4).expand(FAR, 4), torch.zeros(3, 4)),
        f"invariant_linear: out has shape [{FAR}, 3]",
    ),
    "invariant_linears": (
        lambda: ops.invariant_linears(torch.zeros(1, 4).expand(FAR, 4), [torch.zeros(3, 4), torch.zeros(2, 4)]),
        f"invariant_linears: out has shape [{FAR}, 5]",
    ),
    "rms_norm": (lambda: ops.rms_norm(torch.zeros(1, 4).expand(FAR, 4)), f"rms_norm: out has shape [{FAR}, 4]"),
    "layer_norm": (lambda: ops.layer_norm(torch.zeros(1, 4).expand(FAR, 4)), f"layer_norm: out has shape [{FAR}, 4]"),
    "silu_mul": (
        lambda: ops.silu_mul(*[torch.zeros(1, 4).expand(FAR, 4)] * 2), f"silu_mul: out has shape [{FAR}, 4]",
    ),
    "quantize_cdf": (
        lambda: ops.quantize_cdf(torch.ones(1, 4).expand(FAR, 4)),
        f"quantize_cdf: cdf has shape [{FAR}, 5]",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGE)
def test_what_does_not_fit_into_memory(name: str) -> None:
    call, message = HUGE[name]
    with pytest.raises(
        MemoryError, match=f"^{re.escape(message)} and must fit into memory, where it could not be allocated$"
    ):
        call()
