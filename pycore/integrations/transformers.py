# SPDX-License-Identifier: Apache-2.0
"""Λ attention for Hugging Face transformers (4.57 and newer): one call registers it, one argument chooses it.

    register(sink_size=16, window_size=1024)
    model = AutoModelForCausalLM.from_pretrained(..., attn_implementation="pycore_lambda")
    model.generate(**inputs, past_key_values=LambdaCache(sink_size=16, window_size=1024))

docs/integrations/transformers.md says which models, what padding and caches do, and what is refused.
"""

from __future__ import annotations

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from pycore.integrations._transformers_attention import Options, attention_function
from pycore.integrations._transformers_cache import LambdaCache
from pycore.integrations._transformers_mask import spans_function

__all__ = ["LambdaCache", "register"]

_REGISTERED: set[str] = set()


def register(
    name: str = "pycore_lambda",
    *,
    sink_size: int,
    window_size: int,
    distance_limit: int | None = None,
    limit_distances: bool = True,
    interleaved: bool | None = None,
) -> None:
    """Registers Λ attention with transformers, for `attn_implementation=name` and `model.set_attn_implementation`.

    A full-attention layer then keeps the first `sink_size` tokens and the newest `window_size` and rotates a pair by
    min(distance, distance_limit), which lets a model read far beyond its training length. A sliding layer keeps the
    window it was trained with. Registering a name anew replaces its sizes.

    Args:
        name: a name of your own; "flash", "sdpa", "flex_attention", "paged" and "/" mean something to transformers.
        sink_size: tokens kept from the start of each text, at least 0.
        window_size: newest tokens kept, the query's own among them, at least 1.
        distance_limit: `window_size` by default, as in LM-Infinite; at least that.
        limit_distances: False takes query and key as the model rotated them: the Λ mask alone, for any rotary or other
            position encoding.
        interleaved: says that every full-attention layer of a model this module does not know rotates its query and
            key in channel pairs (2i, 2i + 1) (True) or (i, i + R/2) (False). None for the models it knows.

    Raises:
        ValueError: a size out of range, or a name that is taken or means something else.
        TypeError: an argument of another type.
    """
    if not isinstance(name, str):
        raise TypeError(f"register: name is a {type(name).__name__} and must be a str")
    taken = name in AttentionInterface() and name not in _REGISTERED
    if taken or not name or any(part in name for part in ("flash", "sdpa", "flex_attention", "paged", "/", "|")):
        raise ValueError(
            f"register: name is {name!r} and must be a new name without flash, sdpa, flex_attention, paged, / and |, "
            "which mean something to transformers"
        )
    sizes = [("sink_size", sink_size, 0), ("window_size", window_size, 1)]
    if distance_limit is not None:
        sizes.append(("distance_limit", distance_limit, window_size))
    for argument, size, least in sizes:
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"register: {argument} is a {type(size).__name__} and must be an int")
        if size < least:
            raise ValueError(f"register: {argument} is {size} and must be at least {least}")
    if distance_limit is not None and not limit_distances:
        raise ValueError(f"register: distance_limit is {distance_limit} and must be None with limit_distances=False")
    limit = (window_size if distance_limit is None else distance_limit) if limit_distances else None
    AttentionInterface.register(name, attention_function(Options(name, sink_size, window_size, limit, interleaved)))
    AttentionMaskInterface.register(name, spans_function(name))
    _REGISTERED.add(name)
