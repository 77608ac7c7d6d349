# SPDX-License-Identifier: Apache-2.0
"""Names under which transformers finds pycore's attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pycore._checks import check_bool, check_int, check_str
from pycore.integrations.transformers._attention import Options, attention_function
from pycore.integrations.transformers._mask import spans_function
from pycore.integrations.transformers._rounds import round_of
from pycore.integrations.transformers._staircase import READERS
from pycore.schedules import DistanceFamily, Probabilistic
from pycore.schedules.attention_blocks import draw_blocks

__all__ = ["register", "register_probabilistic", "set_round"]

_REGISTERED: dict[str, Callable[..., Any]] = {}


def register(
    name: str = "pycore_lambda",
    *,
    sink_size: int = 0,
    window_size: int | None,
    distance_limit: int | None = None,
    limit_distances: bool = True,
    interleaved: bool | None = None,
    middle_topk: int = 0,
) -> None:
    """Registers Λ attention with transformers, for `attn_implementation=name` and `model.set_attn_implementation`.

    A full-attention layer then keeps the first `sink_size` tokens and the newest `window_size` and rotates a pair by
    min(distance, distance_limit), which lets a model read far beyond its training length. A sliding layer keeps the
    window it was trained with. Registering a name anew replaces its sizes.

    Args:
        name: a name of your own; "flash", "sdpa", "flex_attention", "paged" and "/" mean something to transformers.
        sink_size: tokens kept from the start of each text, at least 0.
        window_size: newest tokens kept, the query's own among them, at least 1. None keeps every token: the model's own
            attention, as a `StaircaseCache` wants it; then there are no sinks and no limit.
        distance_limit: `window_size` by default, as in LM-Infinite; at least that.
        limit_distances: False takes query and key as the model rotated them: the Λ mask alone, for any rotary or other
            position encoding.
        interleaved: says that every full-attention layer of a model this module does not know rotates its query and
            key in channel pairs (2i, 2i + 1) (True) or (i, i + R/2) (False). None for the models it knows.
        middle_topk: LM-Infinite's middle tokens: how many keys between the sinks and the window a decoding step of a
            full-attention layer reads too, those that score highest (see `pycore.ops.lambda_attention`). It needs a
            cache that keeps every token, as transformers' own do, and distance_limit to be window_size.

    Raises:
        ValueError: a size out of range, or a name that is taken or means something else.
        TypeError: an argument of another type.
    """
    _check_name("register", name)
    check_int("register", "sink_size", sink_size, 0)
    if window_size is not None:
        check_int("register", "window_size", window_size, 1)
        if distance_limit is not None:
            check_int("register", "distance_limit", distance_limit, window_size)
    elif sink_size != 0:
        raise ValueError(f"register: sink_size is {sink_size} and must be 0 with window_size=None")
    elif distance_limit is not None:
        raise ValueError(f"register: distance_limit is {distance_limit!r} and must be None with window_size=None")
    check_bool("register", "limit_distances", limit_distances)
    if interleaved is not None:
        check_bool("register", "interleaved", interleaved)
    if distance_limit is not None and not limit_distances:
        raise ValueError(f"register: distance_limit is {distance_limit} and must be None with limit_distances=False")
    limit = (window_size if distance_limit is None else distance_limit) if limit_distances else None
    check_int("register", "middle_topk", middle_topk, 0)
    if middle_topk and (limit is None or limit != window_size):
        raise ValueError(
            f"register: middle_topk is {middle_topk} and must be 0 unless distances are limited to window_size, where "
            "middle tokens are put"
        )
    _register(Options(name, sink_size, window_size, limit, interleaved, middle_topk=middle_topk))


def register_probabilistic(
    name: str = "pycore_probabilistic",
    *,
    distance_probs: DistanceFamily | Tensor,
    seed: int = 0,
    block_size: int = 64,
    sink_size: int = 1,
    window_blocks: int = 1,
    pattern: str = "independent",
    correction: str = "none",
    blocks_per_row: int | None = None,
) -> None:
    """Registers probabilistic attention with transformers, as `register` does Λ attention.

    A full-attention layer then reads the blocks that a round draws, of query and key as the model rotated them; its
    index is folded into the seed. Every such layer counts its rounds: in training (`model.train()`) each forward pass
    is a new one, in evaluation the round stays, and with it the blocks (`set_round` chooses it). The count is a buffer
    that is not saved with the model. A sliding layer keeps the window it was trained with.

    Args:
        name: as in `register`.
        distance_probs: `Geometric`, `PowerLaw`, `Harmonic`, `Gaussian` or `Constant` of `pycore.schedules`, or a tensor
            [n] or [heads, n] of probabilities by block distance.
        seed, block_size, sink_size, window_blocks, pattern, correction, blocks_per_row: as in
            `pycore.ops.pr_flash_attention`; without a sink the method fails on trained models.

    Raises:
        ValueError, TypeError: what `pr_flash_attention` refuses, and names as in `register`.
    """
    op = "register_probabilistic"
    _check_name(op, name)
    check_int(op, "seed", seed)
    draw = Probabilistic(
        distance_probs, seed, 0, block_size, sink_size, window_blocks, pattern, correction, blocks_per_row
    )
    two = isinstance(distance_probs, Tensor) and distance_probs.dim() == 2
    heads = distance_probs.shape[0] if isinstance(distance_probs, Tensor) and two else 1
    draw_blocks(op, draw, (1, heads, 0, 0), (None,) * 4, torch.device("cpu"))  # refuses what no round could be drawn of
    _register(Options(name, sink_size, draw=draw))


def set_round(model: nn.Module, round: int) -> None:
    """Sets the round of every layer of a model that has counted one, which is every layer once the model has run.

    Raises:
        ValueError: no layer of the model has a round, or it is not in 0 .. 2**32 - 1.
    """
    check_int("set_round", "round", round)
    if not 0 <= round < 2**32:
        raise ValueError(f"set_round: round is {round} and must be in 0 .. 2**32 - 1")
    rounds = [found for module in model.modules() if (found := round_of(module)) is not None]
    if not rounds:
        raise ValueError("set_round: model has no round and must have run with an attention of register_probabilistic")
    for each in rounds:
        each.fill_(round)


def registered(name: str | None) -> Callable[..., Any] | None:
    """The attention function that was registered under a name, None for one of another's."""
    return None if name is None else _REGISTERED.get(name)


def _check_name(op: str, name: Any) -> None:
    """A new name, or one of ours."""
    check_str(op, "name", name)
    taken = name in AttentionInterface() and name not in _REGISTERED
    if taken or not name or any(part in name for part in ("flash", "sdpa", "flex_attention", "paged", "/", "|")):
        raise ValueError(
            f"{op}: name is {name!r} and must be a new name without flash, sdpa, flex_attention, paged, / and |, "
            "which mean something to transformers"
        )


def _register(options: Options) -> None:
    function = attention_function(options)
    AttentionInterface.register(options.name, function)
    AttentionMaskInterface.register(options.name, spans_function(options.name))
    _REGISTERED[options.name] = function
    # A packed cache keeps keys as the model rotated them; to other attention it gives them unpacked.
    (READERS.add if options.draw is None and options.distance_limit is None else READERS.discard)(options.name)
