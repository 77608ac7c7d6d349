# SPDX-License-Identifier: Apache-2.0
"""What the staircase cache refuses: one sentence, and the cache is as it was."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from pycore import Staircase, StaircaseKVCache
from tests.support.staircase_caches import fed, made, small, stored, tokens


def refused(cache: StaircaseKVCache, kind: type[Exception], sentence: str, call: Any) -> None:
    before = [x.clone() for x in stored(cache)]
    with pytest.raises(kind) as error:
        call()
    assert str(error.value) == sentence
    assert all(torch.equal(a, b) for a, b in zip(before, stored(cache), strict=True))


@pytest.mark.parametrize(
    "side, at, value, place",
    [
        ("key", (1, 0, 2, 5), math.nan, "group 2 of its channel, is nan"),
        ("value", (1, 1, 4, 17), math.inf, "group 1 of its token, is inf"),
        ("key", (0, 1, 20, 0), -math.inf, "group 3 of its channel, is -inf"),
    ],
)
def test_what_is_not_finite_names_its_group(side: str, at: tuple[int, ...], value: float, place: str, isa: str) -> None:
    cache = fed(made(small()), tokens(40), tokens(40), [40])
    new = {"key": tokens(30), "value": tokens(30)}
    new[side][at] = value
    sentence = f"staircase_cache_append: {side}{list(at)}, in {place} and must be finite"
    refused(cache, ValueError, sentence, lambda: cache.append(**new))


def test_a_sink_that_is_not_finite_is_refused() -> None:
    cache, key = made(small()), tokens(5)
    key[0, 0, 1, 2] = math.nan
    sentence = "staircase_cache_append: key[0, 0, 1, 2], in group 0 of its channel, is nan and must be finite"
    refused(cache, ValueError, sentence, lambda: cache.append(key, tokens(5)))


def test_a_range_that_overflows_names_its_group() -> None:
    """Also where half of the group is in the cache already."""
    key, value = tokens(40), tokens(40)
    key[1, 0, 38, 7] = 3e38
    cache = fed(made(small()), key, value, [40])
    more = tokens(20)
    more[1, 0, 3, 7] = -3e38
    sentence = (
        "staircase_cache_append: key of batch row 1, head 0, group 2 of channel 7, is between -3e+38 and 3e+38, whose "
        "difference must be finite in float32"
    )
    refused(cache, ValueError, sentence, lambda: cache.append(more, tokens(20)))
    more = tokens(2)
    more[0, 1, 1, 16], more[0, 1, 1, 17] = 3e38, -3e38
    sentence = (
        "staircase_cache_append: value of batch row 0, head 1, group 1 of token 1, is between -3e+38 and 3e+38, whose "
        "difference must be finite in float32"
    )
    refused(cache, ValueError, sentence, lambda: cache.append(tokens(2), more))


def test_append_refuses() -> None:
    cache = fed(made(small(), capacity=100), tokens(90), tokens(90), [90])
    op = "StaircaseKVCache.append"
    for kind, sentence, call in [
        (ValueError, "row 0 would have 101 tokens, 11 of them new, and capacity is 100, which they must fit",
         lambda: cache.append(tokens(11), tokens(11))),
        (ValueError, "key has shape [2, 2, 3, 21] and must be [2, 2, tokens, 20]",
         lambda: cache.append(tokens(3, dim=21), tokens(3))),
        (ValueError, "value has 2 tokens and key has 3; they must be equal",
         lambda: cache.append(tokens(3), tokens(2))),
        (ValueError, "key is torch.float16 on cpu and must be torch.float32 on cpu",
         lambda: cache.append(tokens(3).half(), tokens(3))),
        (ValueError, "starts[1] is 4 and must be between 0 and key's 3 tokens",
         lambda: cache.append(tokens(3), tokens(3), starts=torch.tensor([0, 4]))),
        (TypeError, "key is a list and must be a Tensor", lambda: cache.append([], tokens(3))),  # type: ignore[arg-type]
    ]:  # fmt: skip
        refused(cache, kind, f"{op}: {sentence}", call)
    cache.append(tokens(11), tokens(11), starts=torch.tensor([1, 3]))
    assert cache.lengths.tolist() == [100, 98]


def test_crop_and_choice_refuse() -> None:
    cache = fed(made(small()), tokens(90), tokens(90), [90])
    refused(cache, ValueError, "StaircaseKVCache.crop: tokens is 21 and must be at most rollback, 20",
            lambda: cache.crop(21))  # fmt: skip
    cache.crop(15)
    sentence = "StaircaseKVCache.crop: tokens is 6 with 15 taken back before and must be at most rollback, 20"
    refused(cache, ValueError, sentence, lambda: cache.crop(6))
    refused(cache, ValueError, "StaircaseKVCache.crop: tokens is -1 and must be at least 0", lambda: cache.crop(-1))
    refused(cache, TypeError, "StaircaseKVCache.crop: tokens is a float and must be an int",
            lambda: cache.crop(1.0))  # type: ignore[arg-type] # fmt: skip
    short = fed(made(small()), tokens(3), tokens(3), [3])
    refused(short, ValueError, "StaircaseKVCache.crop: tokens is 4 and must be at most 3, the length of row 0",
            lambda: short.crop(4))  # fmt: skip
    refused(cache, IndexError, "StaircaseKVCache.reorder: index must be between 0 and 1",
            lambda: cache.reorder(torch.tensor([0, 2])))  # fmt: skip


def test_attend_refuses() -> None:
    cache = fed(made(small()), tokens(100), tokens(100), [100])
    op = "StaircaseKVCache.attend"
    for sentence, call in [
        ("query has 3 heads and must have a multiple of the cache's 2", lambda: cache.attend(tokens(1, heads=3))),
        ("query has shape [2, 4, 1, 21] and must be [2, heads, n, 20]", lambda: cache.attend(tokens(1, 2, 4, 21))),
        ("prefill is 'half' and must be 'staircase' or 'full'", lambda: cache.attend(tokens(1), prefill="half")),
        ("query has 99 rows and must have 100, one for each token appended last, or few enough for the rings",
         lambda: cache.attend(tokens(99, heads=4))),
    ]:  # fmt: skip
        refused(cache, ValueError, f"{op}: {sentence}", call)
    with pytest.raises(ValueError, match="sink_logits"):  # in the midst of going back, which leaves no trace
        before = [x.clone() for x in stored(cache)]
        cache.attend(tokens(100, heads=4), sink_logits=torch.zeros(3))
    assert all(torch.equal(a, b) for a, b in zip(before, stored(cache), strict=True))
    cache.attend(tokens(100, heads=4))
    with pytest.raises(
        ValueError, match="the first of which reads tokens that have left the rings, and must have fewer"
    ):
        cache.attend(tokens(100, heads=4))


@pytest.mark.parametrize(
    "how, kind, sentence",
    [
        ({"bits": ()}, ValueError, "bits has 0 entries and must have between 1 and 32"),
        ({"bits": (8, 16)}, ValueError, "bits[1] is 16 and must be at most 8, the step before"),
        ({"bits": (16, 3)}, ValueError, "bits[1] is 3 and must be 16, 8, 4 or 2"),
        ({"bits": (16, 4, 8)}, ValueError, "bits[2] is 8 and must be at most 4, the step before"),
        ({"bits": 16}, TypeError, "bits is a int and must be a sequence of ints"),
        ({"key_bits": (16, 4.0)}, TypeError, "key_bits[1] is a float and must be an int"),
        ({"step": 100}, ValueError, "step is 100 and must be a multiple of group_size, 64"),
        ({"step": 1.5}, ValueError, "step is 1.5 and must be above 0 and below 1, or a whole number of tokens"),
        ({"group_size": 0}, ValueError, "group_size is 0 and must be at least 1"),
        ({"group_size": 300}, ValueError, "group_size is 300 and must be at most 256"),
        ({"sink_size": -1}, ValueError, "sink_size is -1 and must be at least 0"),
        ({"rollback": True}, TypeError, "rollback is a bool and must be an int"),
        ({"grid": "minmax"}, ValueError, "bits is (16, 8, 4) and must have one quantized width with grid='minmax'"),
        ({"key_rotation": "pca"}, ValueError, "key_rotation is 'pca' and must be 'hadamard', a Tensor or None"),
        ({"key_rotation": 2 * torch.eye(4)[None]}, ValueError,
         "key_rotation is off by 3 and must be orthogonal to within 0.001"),
        ({"value_rotation": torch.eye(4)}, ValueError,
         "value_rotation is float32 [4, 4] and must be floating point [kv_heads, head_dim, head_dim]"),
    ],
)  # fmt: skip
def test_staircase_refuses(how: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind) as error:
        Staircase(**how)
    assert str(error.value) == f"Staircase: {sentence}"


@pytest.mark.parametrize(
    "how, kind, sentence",
    [
        ({"staircase": 4}, TypeError, "staircase is a int and must be a Staircase"),
        ({"batch": -1}, ValueError, "batch is -1 and must be at least 0"),
        ({"capacity": 0}, ValueError, "capacity is 0 and must be at least 1"),
        ({"dtype": torch.float64}, ValueError, "dtype is float64 and must be float32, float16 or bfloat16"),
        ({"dtype": "float32"}, TypeError, "dtype is a str and must be a torch.dtype"),
        ({"device": "meta"}, ValueError, "device is meta and must be the CPU, which is where this cache has kernels"),
        ({"staircase": Staircase(step=0.5)}, ValueError, "step is 0.5, a fraction of capacity, which must be given"),
        ({"staircase": Staircase(key_rotation=torch.eye(8)[None])}, ValueError,
         "key_rotation has shape [1, 8, 8] and must be [2, 20, 20]"),
    ],
)  # fmt: skip
def test_cache_refuses(how: dict[str, Any], kind: type[Exception], sentence: str) -> None:
    with pytest.raises(kind) as error:
        StaircaseKVCache(**({"staircase": Staircase(), "batch": 1, "kv_heads": 2, "head_dim": 20} | how))
    assert str(error.value) == f"StaircaseKVCache: {sentence}"


def test_load_refuses() -> None:
    cache = fed(made(small(), capacity=100), tokens(90), tokens(90), [90])
    good = cache.state_dict()
    op = "StaircaseKVCache.load_state_dict"
    for change, sentence in [
        ({"step": 64}, "step is 64 and must be 32"),
        ({"key_bits": (16, 8)}, "key_bits is (16, 8) and must be (16, 8, 4, 2)"),
        ({"peak": torch.tensor([80, 90])}, "peak is [80, 90] and must be at least lengths, [90, 90]"),
        ({"peak": torch.tensor([999, 90])}, "peak is [999, 90], more than rollback, 20, past lengths"),
        ({"key": good["key"][:8]}, "key must be a list of 9 tensors"),
        ({"value": [x.double() if x.is_floating_point() else x for x in good["value"]]},
         f"value[0] is float64 {list(good['value'][0].shape)} and must be float32 {list(good['value'][0].shape)}"),
    ]:  # fmt: skip
        refused(cache, ValueError, f"{op}: {sentence}", lambda change=change: cache.load_state_dict(good | change))
    del good["lengths"]
    refused(cache, ValueError, f"{op}: lengths is missing", lambda: cache.load_state_dict(good))
