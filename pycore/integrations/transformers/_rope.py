# SPDX-License-Identifier: Apache-2.0
"""Taking back the rotation that a transformers model has put on its queries and keys.

The distance limit needs them un-rotated, and transformers hands them over rotated. With the very frequencies, positions
and rounding of the model's own tables the rotation is a 2 x 2 matrix a pair of channels, whose inverse is exact; what
remains is the rounding of the rotated tensors themselves.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from pycore.ops import rotary_tables, rotate

# Models whose full-attention layers rotate query and key after everything else, and how they pair channels: False for
# (i, i + R/2), True for (2i, 2i + 1). tests/integrations/test_transformers.py runs each of them.
INTERLEAVED = {
    "arcee": False, "cohere": True, "gemma": False, "gemma2": False, "gemma3_text": False, "glm": True, "glm4": True,
    "gpt_oss": False, "granite": False, "helium": True, "llama": False, "ministral": False, "mistral": False,
    "mixtral": False, "olmo": False, "olmo2": False, "olmo3": False, "phi": False, "phi3": False, "qwen2": False,
    "qwen2_moe": False, "qwen3": False, "qwen3_moe": False, "smollm3": False, "stablelm": False, "starcoder2": False,
}  # fmt: skip
_ATTRIBUTE = "_pycore_rope"
_SHARED = "_pycore_tables"
_RESULT = "_pycore_turned_by"
FREQUENCIES = "_pycore_frequencies"  # of a rotary embedding that `same_bits` made its own: layer type -> float64 [R/2]
_TILE = 65  # rows the op wants beyond the limit


def attribute(owner: Any, name: str, default: Any = None) -> Any:
    """A plain attribute of a module or config; `getattr` takes its time over both, most over a missing one."""
    own = getattr(owner, "__dict__", ())
    return own[name] if name in own else getattr(owner, name) if hasattr(type(owner), name) else default  # type: ignore


class _Shared:
    """What the layers of one rotary embedding read alike; in one place, so that a step finds it in the caches."""

    def __init__(self, of: tuple[Any, ...], frequencies: Tensor, tables: tuple[Tensor, Tensor], rounded: bool) -> None:
        self.of, self.frequencies, self.tables, self.rounded = of, frequencies, tables, rounded

    def fits(self, of: tuple[Any, ...]) -> bool:
        """Whether it was made from the same frequencies, for the same limit, dtype and device."""
        return self.of[0] is of[0] and self.of[1] is of[1] and self.of[2:] == of[2:]

    def __deepcopy__(self, memo: Any) -> None:
        """Nothing, as of a Rope."""

    def __reduce__(self) -> Any:
        return (type(None), ())


class Rope:
    """The rotary embedding of one attention module, and the tables that the op takes.

    Attributes:
        frequencies: float32 [R/2].
        scaling: the factor of the model's tables (YaRN); it stays in query and key.
        rounded: whether the model rounds its tables to its own dtype.
        interleaved: how the model pairs channels, None where that is not known.
        tables: cos and sin [limit + 65, R/2], unscaled.
        shared: what these are from; another object when they are.
    """

    def __init__(self, rotary: nn.Module, layer_type: str | None, interleaved: bool | None = None) -> None:
        """`rotary` is read at each call: a cast of the model casts its frequencies too."""
        self.rotary = rotary
        self.interleaved = interleaved
        self.nested = layer_type is not None and hasattr(rotary, f"{layer_type}_inv_freq")
        self.layer_type = layer_type
        self.prefix = f"{layer_type}_" if self.nested else ""
        self.source_name = f"{self.prefix}inv_freq"
        self.scaling = float(getattr(rotary, f"{self.prefix}attention_scaling", 1.0))
        self.limit = -1
        self.version = -1
        self.source: Tensor | None = None
        self.dtype: torch.dtype | None = None
        self.frequencies: Tensor
        self.tables: tuple[Tensor, Tensor]
        self.rounded: bool
        self.own: Tensor | None = None
        self.shared: _Shared | None = None

    def __deepcopy__(self, memo: Any) -> None:
        """Nothing: the copy of a model finds its own rotary embedding."""

    def __reduce__(self) -> Any:
        return (type(None), ())  # None too, so that a pickled model does not need this library

    def fits(self, like: Tensor, limit: int) -> bool:
        """Whether the tables are those for `limit` and tensors like `like`."""
        return self.limit == limit and self.dtype == like.dtype and self.tables[0].device == like.device

    def refresh(self, like: Tensor, limit: int) -> None:
        """Makes the tables anew where the model's frequencies, the limit, dtype or device have changed."""
        name = self.source_name
        found = self.rotary._buffers.get(name)
        source: Tensor = getattr(self.rotary, name) if found is None else found
        version = _version(source)
        own = self.rotary.__dict__.get(FREQUENCIES)
        own = None if own is None else own.get(self.layer_type if self.nested else None)
        if source is self.source and version == self.version and own is self.own and self.fits(like, limit):
            return
        of = (source, own, version, limit, like.dtype, like.device)
        shared = self.rotary.__dict__.get(_SHARED + self.prefix)
        if shared is None or not shared.fits(of):
            shared = _Shared(of, *self._made(like, source, own, limit))
            setattr(self.rotary, _SHARED + self.prefix, shared)
        self.shared = shared
        self.frequencies, self.tables, self.rounded = shared.frequencies, shared.tables, shared.rounded
        self.source, self.version, self.limit, self.dtype, self.own = source, version, limit, like.dtype, own

    def _made(
        self, like: Tensor, source: Tensor, own: Tensor | None, limit: int
    ) -> tuple[Tensor, tuple[Tensor, Tensor], bool]:
        """Frequencies, tables, and whether the model rounds its own."""
        wide = torch.float64 if like.dtype == torch.float64 else torch.float32
        with torch.no_grad():
            frequencies = source.detach().to(like.device, torch.float32)
            distance = torch.arange(limit + _TILE, device=like.device)
            if own is not None:
                tables = rotary_tables(distance, own, wide == torch.float64)
            else:
                angle = distance[:, None].to(torch.float64) * frequencies.to(torch.float64)
                tables = angle.cos().to(wide), angle.sin().to(wide)
            here = torch.zeros(1, 1, dtype=torch.int64, device=source.device)
            extra = (self.layer_type,) if self.nested else ()
            table = self.rotary(torch.zeros(1, 1, 1, dtype=like.dtype, device=source.device), here, *extra)[0]
        return frequencies, tables, table.dtype == like.dtype

    def turned_by(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """(cos, sin), [B or 1, L, R/2]: a turn back by them takes the model's rotation to `position` [B or 1, L] back.

        Its scaling, and what rounding its tables added, go with it. All layers of a pass are given the same tensor of
        position ids, so the first one leaves it its result.
        """
        if torch.compiler.is_compiling() or position.is_inference():
            return self._turned_by(position, dtype)
        source, own, state, result = getattr(position, _RESULT, (None, None, None, None))
        new = (self.version, self.scaling, dtype, position._version)
        if source is not self.source or own is not self.own or state != new or result is None:
            result = self._turned_by(position, dtype)
            setattr(position, _RESULT, (self.source, self.own, new, result))
        return result

    def _turned_by(self, position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        if self.own is not None:  # rotated by these very tables
            cos, sin = rotary_tables(position, self.own, dtype == torch.float64)
            return (cos, sin) if self.scaling == 1 else (cos * (1 / self.scaling), sin * (1 / self.scaling))
        angle = position[:, :, None].to(torch.float32) * self.frequencies
        cos, sin = angle.cos() * self.scaling, angle.sin() * self.scaling
        if self.rounded:
            cos, sin = cos.to(dtype), sin.to(dtype)
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        cos, sin = cos.to(wide), sin.to(wide)
        inverse = self.scaling / (cos * cos + sin * sin)
        return cos * inverse, sin * inverse


def _version(x: Tensor) -> int:
    """Counts changes in place; tensors of inference mode do not."""
    return 0 if x.is_inference() else x._version


def by_op(x: Tensor, interleaved: bool) -> bool:
    """Whether `pycore.ops.rotate` turns x back."""
    return not interleaved and x.device.type == "cpu"


def unrotate(x: Tensor, turned_by: tuple[Tensor, Tensor], interleaved: bool) -> Tensor:
    """`x` [B, heads, L, D] as it was before the model rotated it; in x's dtype."""
    if by_op(x, interleaved):
        return rotate(x, *turned_by, inverse=True)
    cos, sin = (table[:, None] for table in turned_by)
    rotated = 2 * cos.shape[-1]
    pairs = (x if rotated == x.shape[-1] else x[..., :rotated]).to(cos.dtype)
    a, b = (pairs[..., 0::2], pairs[..., 1::2]) if interleaved else pairs.chunk(2, -1)
    a, b = a * cos + b * sin, b * cos - a * sin
    pairs = (torch.stack([a, b], -1).flatten(-2) if interleaved else torch.cat([a, b], -1)).to(x.dtype)
    return pairs if rotated == x.shape[-1] else torch.cat([pairs, x[..., rotated:]], -1)


def rope_of(name: str, module: nn.Module, like: Tensor, limit: int) -> Rope | None:
    """The rotary embedding of an attention module, with tables for `limit`; None for a layer without rotation.

    Raises:
        ValueError: it has none that can be found, or its frequencies change with the length.
    """
    if not attribute(module, "use_rope", True):  # SmolLM3
        return None
    rope: Rope | None = module.__dict__.get(_ATTRIBUTE)
    if rope is not None:
        if not torch.compiler.is_compiling():
            rope.refresh(like, limit)
            return rope
        if rope.fits(like, limit):
            return rope
    return _prepare(name, module, like, limit)


@torch.compiler.disable  # reads frames and modules; after one call in eager mode compiled code does not come here
def _prepare(name: str, module: nn.Module, like: Tensor, limit: int) -> Rope:
    rope: Rope | None = getattr(module, _ATTRIBUTE, None)
    if rope is None:
        rope = _find(name, module)
        setattr(module, _ATTRIBUTE, rope)
    rope.refresh(like, limit)
    return rope


def _find(name: str, module: nn.Module) -> Rope:
    config: Any = getattr(module, "config", None)
    rotary = _rotary_in_use() or _rotary_of_class(module, config)
    kind = type(module).__name__
    if rotary is None:
        raise ValueError(
            f"{name}: {kind} has no rotary embedding and must have one for a distance limit; register with "
            "limit_distances=False"
        )
    types = getattr(config, "layer_types", None)
    layer: Any = getattr(module, "layer_idx", None)
    layer_type = types[layer] if types is not None and layer is not None else None
    rope = Rope(rotary, layer_type, INTERLEAVED.get(getattr(config, "model_type", "")))
    if not hasattr(rotary, f"{rope.prefix}inv_freq"):
        raise ValueError(
            f"{name}: {type(rotary).__name__} of {kind} has no inv_freq and must have one for a distance limit; "
            "register with limit_distances=False"
        )
    rope_type: Any = getattr(rotary, "rope_type", "default")
    if isinstance(rope_type, dict):
        rope_type = rope_type[rope.layer_type]
    if "dynamic" in rope_type or rope_type == "longrope":
        raise ValueError(
            f"{name}: rope_type is {rope_type}, whose frequencies change with the length, and must have fixed "
            "frequencies for a distance limit; register with limit_distances=False"
        )
    return rope


def _rotary_in_use() -> nn.Module | None:
    """The `rotary_emb` of the model whose forward pass is running.

    transformers gives it neither to the attention module nor to the attention function, and only this very one knows
    the frequencies in use: `model.half()` has rounded them, and a config does not know. Looked for once a module.
    """
    frame = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and isinstance(rotary := getattr(owner, "rotary_emb", None), nn.Module):
            return rotary
        frame = frame.f_back  # type: ignore[assignment]
    return None


def _rotary_of_class(module: nn.Module, config: Any) -> nn.Module | None:
    """A new one of the class that the model's file defines, where no forward pass can be seen (compiled code)."""
    file = sys.modules[type(module).__module__]
    for suffix in ("Attention", "SdpaAttention", "FlashAttention2"):
        rotary = getattr(file, type(module).__name__.removesuffix(suffix) + "RotaryEmbedding", None)
        if rotary is not None:
            return rotary(config)
    return None
