# SPDX-License-Identifier: Apache-2.0
"""One rule for numbers, everywhere: a bool is no int and no number, and nothing reaches torch that is no number."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pycore
from pycore import ops, positions
from pycore.compat import torch as compat
from pycore.models.bytelm import Bytelm, BytelmConfig
from pycore.nn import LambdaAttention, ProbabilisticAttention
from pycore.schedules import (
    Causal,
    Constant,
    Gaussian,
    Geometric,
    Harmonic,
    KeySubset,
    Lambda,
    PowerLaw,
    Probabilistic,
    Segments,
    expected_density,
    to_flex_block_mask,
)  # fmt: skip

X = torch.zeros(1, 2, 3, 8)
ROWS = torch.zeros(2, 4)
CDF = torch.tensor([0, 1, 2], dtype=torch.int32)
HALF = Constant(0.5)


def attention(**options: Any) -> Any:
    return ops.attention(X, X, X, **options)


def lambda_attention(**options: Any) -> Any:
    return ops.lambda_attention(X[:, :, :1], X, X, **{"sink_size": 1, "window_size": 2, **options})


def drawn(**options: Any) -> Any:
    return ops.pr_flash_attention(X, X, X, **{"distance_probs": HALF, "seed": 1, **options})


def block_mask(**options: Any) -> Any:
    sizes = {"batch": 1, "heads": 1, "query_blocks": 2, "key_blocks": 2}
    return ops.pr_block_mask(**{**sizes, "distance_probs": HALF, "seed": 1, **options})


def flex(**options: Any) -> Any:
    schedule = options.pop("schedule", Causal())
    return to_flex_block_mask(schedule, **{"batch": 1, "heads": 1, "query_length": 3, "key_length": 3, **options})


def cached(method: str) -> Callable[..., Any]:
    def call(**options: Any) -> Any:
        cache = pycore.LambdaKVCache(1, 4, 2)
        cache.append(X, X)
        return getattr(cache, method)(*([X] if method == "attend" else []), **options)

    return call


def layer(**options: Any) -> Any:
    return LambdaAttention(**{"dim": 8, "heads": 2, "sink_size": 1, "window_size": 4, **options})


def random_layer(**options: Any) -> Any:
    return ProbabilisticAttention(**{"dim": 8, "heads": 2, "distance_probs": HALF, **options})


def decoder(**options: Any) -> Any:
    model = Bytelm(BytelmConfig(dim=8, heads=2, kv_heads=1, layers=1))
    if "rollback" in options:
        return model.caches(Lambda(1, 4), **options)
    return model(torch.zeros(1, 3, dtype=torch.int64), **options)


def density(**options: Any) -> Any:
    return expected_density(HALF, **{"blocks": 4, **options})


Call = tuple[Callable[..., Any], str, str]
INTS: list[Call] = [
    *((attention, "attention", name) for name in ("distance_limit",)),
    *((lambda_attention, "lambda_attention", name) for name in ("sink_size", "window_size", "distance_limit")),
    (lambda_attention, "lambda_attention", "middle_topk"),
    *((drawn, "pr_flash_attention", name) for name in ("seed", "round", "block_size", "sink_size", "window_blocks")),
    (drawn, "pr_flash_attention", "blocks_per_row"),
    *((block_mask, "pr_block_mask", name) for name in ("batch", "heads", "query_blocks", "key_blocks", "seed")),
    *((block_mask, "pr_block_mask", name) for name in ("round", "window_blocks", "blocks_per_row")),
    *((flex, "to_flex_block_mask", name) for name in ("batch", "heads", "query_length", "key_length", "block_size")),
    *((density, "expected_density", name) for name in ("blocks", "window_blocks", "blocks_per_row")),
    (Probabilistic(HALF, 1).for_layer, "Probabilistic.for_layer", "layer"),
    (lambda seed: Probabilistic(HALF, seed).for_layer(1), "Probabilistic.for_layer", "seed"),
    (lambda precision: ops.quantize_cdf(ROWS + 1, precision=precision), "quantize_cdf", "precision"),
    (lambda lanes: ops.ac_encode(ROWS.long(), CDF, lanes=lanes), "ac_encode", "lanes"),
    (lambda model_id: ops.ac_encode(ROWS.long(), CDF, model_id=model_id), "ac_encode", "model_id"),
    (lambda model_id: ops.ac_decode(streams(), CDF, model_id=model_id), "ac_decode", "model_id"),
    (lambda precision: ops.ac_encode_logits(ROWS.long(), ROWS, precision=precision), "ac_encode_logits", "precision"),
    (lambda precision: ops.ac_decode_logits(streams(), ROWS, precision=precision), "ac_decode_logits", "precision"),
    (lambda order: ops.ac_encode_bytes(ROWS.byte(), order=order), "ac_encode_bytes", "order"),
    *((sizes_of, "LambdaKVCache", name) for sizes_of in (lambda **o: pycore.LambdaKVCache(**{"sink_size": 1,
      "window_size": 2, **o}),) for name in ("sink_size", "window_size", "rollback")),
    (cached("crop"), "LambdaKVCache.crop", "tokens"),
    (cached("repeat_interleave"), "LambdaKVCache.repeat_interleave", "repeats"),
    (cached("attend"), "LambdaKVCache.attend", "distance_limit"),
    (cached("attend"), "LambdaKVCache.attend", "middle_topk"),
    *((layer, "LambdaAttention", name) for name in ("dim", "heads", "kv_heads", "head_dim", "distance_limit")),
    *((random_layer, "ProbabilisticAttention", name) for name in ("dim", "heads", "kv_heads", "head_dim", "seed")),
    (random_layer, "ProbabilisticAttention", "layer"),
    (random_layer, "PositionScheme", "max_distance"),
    *((BytelmConfig, "BytelmConfig", name) for name in ("layers", "dim", "heads", "kv_heads", "mlp_ratio")),
    (BytelmConfig, "BytelmConfig", "max_distance"),
    (decoder, "LambdaKVCache", "rollback"),
    (decoder, "Bytelm", "distance_limit"),
    *((lambda **o: positions.rope_tables(**{"n": 3, "dim": 4, **o}), "rope_tables", name) for name in ("n", "dim")),
    (positions.alibi_slopes, "alibi_slopes", "heads"),
    (lambda **o: positions.t5_bias(ROWS, **{"n": 3, **o}), "t5_bias", "n"),
    (lambda **o: positions.t5_bias(ROWS, **{"n": 3, **o}), "t5_bias", "max_distance"),
    (lambda **o: positions.clipped_bias(ROWS, **o), "clipped_bias", "n"),
    (lambda **o: positions.rope_alibi_harmonic(**{"n": 3, "dim": 4, "heads": 2, **o}), "rope_alibi_harmonic", "n"),
    (lambda **o: pycore.EqualInfoWindows(**o), "EqualInfoWindows", "bits"),
    (lambda **o: pycore.EqualInfoWindows(**o), "EqualInfoWindows", "max_batch"),
]  # fmt: skip
NUMBERS: list[Call] = [
    *((attention, "attention", name) for name in ("scale", "softcap", "dropout_p")),
    *((lambda_attention, "lambda_attention", name) for name in ("scale", "softcap", "dropout_p")),
    *((drawn, "pr_flash_attention", name) for name in ("scale", "softcap", "dropout_p")),
    *((cached("attend"), "LambdaKVCache.attend", name) for name in ("scale", "softcap")),
    *((lambda **o: compat.scaled_dot_product_attention(X, X, X, **o), "scaled_dot_product_attention|attention", name)
      for name in ("scale", "dropout_p")),
    (lambda eps: ops.rms_norm(ROWS, eps=eps), "rms_norm", "eps"),
    (lambda eps: ops.layer_norm(ROWS, eps=eps), "layer_norm", "eps"),
    (lambda rho: Geometric(rho), "Geometric", "rho"),
    (lambda alpha: PowerLaw(alpha), "PowerLaw", "alpha"),
    (lambda c: Harmonic(c), "Harmonic", "c"),
    (lambda sigma: Gaussian(sigma), "Gaussian", "sigma"),
    (lambda p: Constant(p), "Constant", "p"),
    *((layer, "LambdaAttention", name) for name in ("softcap", "dropout_p")),
    *((random_layer, "ProbabilisticAttention", name) for name in ("softcap", "dropout_p")),
    (lambda theta: positions.rope_tables(3, 4, theta=theta), "rope_tables", "theta"),
]  # fmt: skip
BOOLS: list[Call] = [
    *((attention, "attention", name) for name in ("interleaved", "return_lse")),
    *((lambda_attention, "lambda_attention", name) for name in ("interleaved", "return_lse")),
    (lambda causal: attention(schedule=Segments(torch.tensor([0, 3]), causal)), "attention", "causal"),
    (lambda causal: attention(schedule=KeySubset(torch.tensor([0, 2]), causal)), "attention", "causal"),
    (lambda causal: flex(schedule=Segments(torch.tensor([0, 3]), causal)), "to_flex_block_mask", "causal"),
    *((layer, "LambdaAttention", name) for name in ("sink_logits", "bias")),
    (random_layer, "ProbabilisticAttention", "bias"),
    *((lambda **o: compat.scaled_dot_product_attention(X, X, X, **o), "scaled_dot_product_attention", name)
      for name in ("is_causal", "enable_gqa")),
]  # fmt: skip


def streams() -> Any:
    return ops.ac_encode(ROWS.long(), CDF)


def ids(calls: list[Call]) -> list[str]:
    return [f"{op}-{name}" for _, op, name in calls]


def refused(call: Call, given: Any, wanted: str) -> None:
    function, op, name = call
    message = f"{name} is a {type(given).__name__} and must be {wanted}"
    with pytest.raises(TypeError, match=f"^({re.escape(op).replace(re.escape('|'), '|')}): {re.escape(message)}$"):
        function(**{name: given})


@pytest.mark.parametrize("call", INTS, ids=ids(INTS))
def test_a_bool_is_no_int(call: Call) -> None:
    for given in (True, np.True_, 1.0, "1"):
        refused(call, given, "an int")


@pytest.mark.parametrize("call", INTS, ids=ids(INTS))
def test_an_int_fits_int64(call: Call) -> None:
    """Far out on either side is one sentence of the op's, and neither torch's nor an OverflowError."""
    function, op, name = call
    for given in (-(2**70), 2**70):
        with pytest.raises(ValueError, match=rf"^{re.escape(op)}: {name} is {given} and must be "):
            function(**{name: given})


@pytest.mark.parametrize("call", NUMBERS, ids=ids(NUMBERS))
def test_a_bool_is_no_number(call: Call) -> None:
    for given in (True, np.False_, "0.5", (0.5,), 1j):
        refused(call, given, "a number")


@pytest.mark.parametrize("call", BOOLS, ids=ids(BOOLS))
def test_what_is_no_bool(call: Call) -> None:
    for given in ("yes", 1, None):
        refused(call, given, "a bool")


def test_numbers_in_any_guise() -> None:
    """NumPy's numbers, fractions of ints and tensors of no dimensions are numbers."""
    wanted = ops.attention(X + 1, X + 1, X, scale=0.5, softcap=2.0)
    for scale, softcap in ((np.float32(0.5), 2), (np.float64(0.5), np.int64(2)), (torch.tensor(0.5), np.float16(2))):
        assert torch.equal(ops.attention(X + 1, X + 1, X, scale=scale, softcap=softcap), wanted)
    assert torch.equal(lambda_attention(sink_size=np.int64(1)), lambda_attention(sink_size=1))


def test_a_number_beyond_floats() -> None:
    with pytest.raises(ValueError, match="^attention: scale is an int of more than 1024 bits and must be finite"):
        attention(scale=10**400)


@pytest.mark.parametrize("name, least", [("blocks", 1), ("window_blocks", 0), ("blocks_per_row", 1)])
def test_expected_density_of_counts_too_small(name: str, least: int) -> None:
    message = f"expected_density: {name} is {least - 1} and must be at least {least}"
    with pytest.raises(ValueError, match=f"^{message}$"):
        density(**{name: least - 1})


def test_expected_density_of_rows_smaller_than_windows() -> None:
    with pytest.raises(ValueError, match="^expected_density: blocks_per_row is 2 and must be at least 3$"):
        density(window_blocks=3, blocks_per_row=2)
    with pytest.raises(TypeError, match="^expected_density: distance_probs is a list and must be a Tensor or a family"):
        expected_density([0.5], blocks=3)  # type: ignore[arg-type]


# ---- numbers that float32 does not hold ----------------------------------------------------------------------------

LIMITS = {
    "scale": ({"scale": 1e300}, "scale is 1e+300 and must be at most 2.35e+38 in size, as logits are float32"),
    "negative-scale": ({"scale": -3e38}, "scale is -3e+38 and must be at most 2.35e+38 in size, as logits are float32"),
    "softcap": ({"softcap": 1e39}, "softcap is 1e+39 and must be at most 2.35e+38, as logits are float32"),
    "softcap-log2e": ({"softcap": 3e38}, "softcap is 3e+38 and must be at most 2.35e+38, as logits are float32"),
    "small-softcap": ({"softcap": 1e-40}, "softcap is 1e-40 and must be 0 or at least 2.94e-39, as logits are float32"),
    "softcap-0": ({"softcap": 1e-60}, "softcap is 1e-60 and must be 0 or at least 2.94e-39, as logits are float32"),
    "both": (
        {"softcap": 1e-20, "scale": 1e30},
        "softcap is 1e-20 and scale is 1e+30; scale / softcap must be finite in float32",
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LIMITS)
def test_factors_are_finite_in_float32(name: str, dtype: torch.dtype) -> None:
    options, message = LIMITS[name]
    x = X.to(dtype)
    with pytest.raises(ValueError, match=f"^attention: {re.escape(message)}$"):
        ops.attention(x, x, x, **options)
    wide = torch.randn(1, 2, 3, 8, dtype=torch.float64)
    assert ops.attention(wide, wide * 1e-300, wide, **options).isfinite().all()


@pytest.mark.parametrize("options", [{"scale": 2.3e38}, {"softcap": 2.3e38}, {"softcap": 3e-39}], ids=str)
def test_the_last_factors_that_are(options: dict[str, float]) -> None:
    """Logits of 0 from any factor that is taken, so rows are means."""
    value = torch.randn(1, 2, 3, 8)
    out = ops.attention(X, X, value, **options)
    assert isinstance(out, Tensor)
    torch.testing.assert_close(out[:, :, 2], value.mean(2))


def test_eps_is_finite_in_float32() -> None:
    with pytest.raises(ValueError, match=r"^rms_norm: eps is 1e\+39 and must be finite in float32, as x is$"):
        ops.rms_norm(ROWS, eps=1e39)
    assert ops.rms_norm(ROWS.double() + 1, eps=1e39).min() > 0
