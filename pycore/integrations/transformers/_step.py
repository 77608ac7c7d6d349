# SPDX-License-Identifier: Apache-2.0
"""A step of decoding like the one before it: the same layer, cache and options, one token further.

Between two layers a model reads weights that leave little else in the processor's caches, where a line of Python costs
several times what it does in a loop. What a step was allowed to do, the next one is too, where nothing that was looked
at is different; and what the layers of a pass share, the first of them looks at.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from pycore.integrations.transformers._cache import TokensLayer
from pycore.integrations.transformers._rope import Rope

__all__ = ["Step"]

_PASS = "_pycore_pass"  # the attribute of a pass's position ids


class _Pass:
    """What the layers with a limit of distances have in common in a pass of one token a row."""

    __slots__ = ("following", "ids", "rows", "shared", "turned", "version")

    def __init__(self, position_ids: Tensor, rope: Rope, dtype: Any) -> None:
        """`rope` has been looked at."""
        self.shared = rope.shared
        self.turned = rope.turned_by(position_ids, dtype)
        self.rows: list[list[int]] = position_ids.tolist()
        self.ids = [row[0] for row in self.rows]
        self.following = [x + 1 for x in self.ids]
        # Nothing counts the changes of a tensor made in inference mode.
        self.version = -1 if position_ids.is_inference() else position_ids._version

    def __deepcopy__(self, memo: Any) -> None:
        """Nothing: a copy of the ids belongs to another pass."""

    def __reduce__(self) -> Any:
        return (type(None), ())


class Step:
    """A call of an attention function with one query, which appended to a layer's cache and attended to it.

    Whether the next one is like it, identities and a few numbers decide; shapes and dtypes the store compares, and the
    op checks what it reads, every time.
    """

    __slots__ = ("_config", "_limit", "_module", "_registered", "_rope", "_said", "_shape", "_shared")

    def __init__(
        self, registered: Any, module: nn.Module, said: tuple[Any, ...], rope: Rope | None, out: Tensor
    ) -> None:
        """`said`: what module and call say besides tensors; `out`: [batch, 1, heads, channels]."""
        self._registered, self._module, self._said, self._rope = registered, module, said, rope
        self._config: dict[str, Any] = module.__dict__["config"].__dict__
        self._shared = None if rope is None else rope.shared
        self._limit = -1 if rope is None else rope.limit
        self._shape = out.shape

    def __deepcopy__(self, memo: Any) -> None:
        """Nothing: the copy of a cache has its own first step."""

    def __reduce__(self) -> Any:
        return (type(None), ())

    def again(
        self, registered: Any, module: nn.Module, said: tuple[Any, ...], layer: TokensLayer, query: Tensor,
        key: Tensor, value: Tensor, position_ids: Tensor | None,
    ) -> Tensor | None:  # fmt: skip
        """The output for the layer's new token, as `out` was; None, and nothing done, where all has to be looked at."""
        if registered is not self._registered or module is not self._module or said != self._said:
            return None
        store = layer.store
        if store is None or self._config.get("_output_attentions", True):
            return None
        next_ids, turned = layer.next_ids, None
        if self._rope is not None:
            now: _Pass | None = getattr(position_ids, _PASS, None)
            if now is None or now.shared is not self._shared:
                now = self._look(query, position_ids)
            if now is None or now.ids != next_ids:
                return None
            assert position_ids is not None
            if position_ids.tolist() != now.rows if now.version < 0 else position_ids._version != now.version:
                return None
            next_ids, turned = now.following, now.turned
        out = store.append_and_attend_again(query, key, value, turned)
        if out is None:
            return None
        layer.count(1, layer.position_offset, next_ids)
        return out.view(self._shape)

    def _look(self, query: Tensor, position_ids: Tensor | None) -> _Pass | None:
        """What the pass's first layer finds, left to those that follow."""
        rope = self._rope
        assert rope is not None
        if position_ids is None or position_ids.device.type != "cpu" or position_ids.dim() != 2:
            return None
        rope.refresh(query, self._limit)
        if rope.shared is not self._shared or position_ids.shape[1] != 1:
            return None
        now = _Pass(position_ids, rope, query.dtype)
        setattr(position_ids, _PASS, now)
        return now
