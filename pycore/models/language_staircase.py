# SPDX-License-Identifier: Apache-2.0
"""A byte model that reads its past on a staircase: `lmzip` and its files with fewer bits for older tokens."""

from __future__ import annotations

import zlib
from typing import Any

from pycore.cache.staircase_cache import Staircase
from pycore.models.bytelm import Bytelm
from pycore.models.language import ByteModel

__all__ = ["StaircaseByteModel"]


class StaircaseByteModel(ByteModel):
    """A `ByteModel` whose caches are a staircase's: Λ attention over keys and values that lose bits as they age.

    The logits are those of the quantized past, in one pass and token by token the same bits, so `compress` and
    `decompress` agree. Another ladder is another model.

    Args:
        model: a byte-level decoder whose positions are no rotations, which packed keys cannot cut off.
        staircase: how many bits at which age.
        sink_size: tokens kept from the start, BOS among them.
        window_size: newest tokens seen.
    """

    def __init__(self, model: Bytelm, staircase: Staircase, *, sink_size: int = 4, window_size: int = 512) -> None:
        if not isinstance(staircase, Staircase):
            raise TypeError(f"StaircaseByteModel: staircase is a {type(staircase).__name__} and must be a Staircase")
        self.staircase = staircase
        super().__init__(model, sink_size=sink_size, window_size=window_size)
        parts = [staircase.ladders, staircase.step, staircase.sink_size, staircase.group_size, staircase.grid]
        check = zlib.crc32(repr(parts).encode(), self.fingerprint)
        for rotation in (staircase.key_rotation, staircase.value_rotation):
            tensor = rotation is not None and not isinstance(rotation, str)
            check = zlib.crc32(rotation.numpy().tobytes() if tensor else repr(rotation).encode(), check)  # type: ignore
        self.fingerprint = check

    def state(self, rollback: int = 0) -> Any:
        """Empty caches, one for each layer. There is no tree of drafts on a staircase."""
        if rollback:
            raise ValueError(f"StaircaseByteModel: rollback is {rollback} and must be 0: a staircase takes no tree")
        return self.model.staircase_caches(self.staircase, self.schedule)
