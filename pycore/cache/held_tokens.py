# SPDX-License-Identifier: Apache-2.0
"""The tokens that a key-value cache holds: how rows are chosen, taken back, gathered, saved and loaded.

Keys lie by channel within tiles of 64 tokens, [batch, kv_heads, tiles, head_dim, 64], which is how decoding reads them
at the speed of memory; on CUDA, whose kernels read rows, as values do: [batch, kv_heads, rows, channels].
"""

from __future__ import annotations

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._limits import KEY_TILE
from pycore.cache.checks import check_index, check_path
from pycore.ops.attention_append import Again
from pycore.ops.key_tiles import rows_of_tiles, tiles_of_rows

__all__ = ["HeldTokens", "by_tiles", "to_layout"]


def by_tiles(device: torch.device) -> bool:
    """Whether keys lie by channel there."""
    return device.type == "cpu"


def to_layout(key: Tensor) -> Tensor:
    """Keys in whole tiles of rows, or by channel, as they lie on their device."""
    if by_tiles(key.device):
        return tiles_of_rows(key) if key.dim() == 4 else key
    return rows_of_tiles(key, key.shape[2] * KEY_TILE) if key.dim() == 5 else key


class HeldTokens:
    """Keys, values and a length for each row of a batch; where a token's row is follows from its position alone."""

    _name: str  # of the class, for messages
    rollback: int | None

    def reset(self) -> None:
        """Forgets everything; the next tokens may have another shape, dtype or device."""
        self._key: Tensor | None = None
        self._value: Tensor | None = None
        self._lengths: Tensor | None = None
        self._again: Again | None = None  # the newest call of `append_and_attend`
        self._cropped = 0  # tokens taken back and not appended anew, the most of any row
        self._behind: Tensor | None = None  # int64 [batch], the same of each row, where they may differ

    # ---- what it holds ----------------------------------------------------------------------------------------------

    @property
    def lengths(self) -> Tensor:
        """int64 [batch]: tokens seen by each row, padding and cropped tokens not counted."""
        return self._held("lengths")[2]

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        tensors = [] if self._key is None or self._value is None else [self._key, self._value]
        return sum(x.numel() * x.element_size() for x in tensors)

    def keys(self) -> Tensor:
        """The keys that the newest token's query reads, by position: [batch, kv_heads, tokens, head_dim].

        Rows with fewer tokens than the longest are filled up with zeros.
        """
        return self._newest("keys", self._held("keys")[0])

    def values(self) -> Tensor:
        """The values beside `keys`: [batch, kv_heads, tokens, value_dim]."""
        return self._newest("values", self._held("values")[1])

    # ---- tokens taken back, rows chosen or repeated -----------------------------------------------------------------

    def crop(self, tokens: int) -> None:
        """Takes the newest `tokens` of every row back, as if they had never been appended.

        Raises:
            ValueError: more than `rollback` since the longest the cache has been, or more than a row has.
        """
        self._check_crop(f"{self._name}.crop", tokens)
        lengths = self._held("crop")[2]
        with torch.inference_mode(False):
            self._lengths = lengths - tokens
            if self._behind is not None:
                self._behind = self._behind + tokens
        self._cropped += tokens
        self._taken_back(tokens)

    def append(self, key: Tensor, value: Tensor, *, starts: Tensor | None = None) -> None:
        """Takes new tokens at the end of every row."""
        raise NotImplementedError

    def accept(self, path: Tensor, tokens: int) -> None:
        """Of the newest `tokens` of every row keeps those at `path`, one after another, and takes the others back.

        So a branch of a tree that `attend` has verified stays, as if it alone had been appended. It needs `rollback`:
        the tokens are taken back, as by `crop`, and those of the branch appended anew.

        Args:
            path: int64 [n], or [batch, n], the tokens that stay, ascending, 0 being the first of the newest `tokens`;
                rows that keep fewer end with -1.
            tokens: the nodes of the tree.

        Raises:
            IndexError: a place that the newest `tokens` do not have.
            ValueError: as for `crop`, or path is of another shape or does not ascend.
        """
        op = f"{self._name}.accept"
        held_key, held_value, lengths = self._held("accept")
        self._check_crop(op, tokens)
        path = check_path(op, path, len(lengths), tokens).to(lengths.device)
        key, value, starts = self._branch(held_key, held_value, lengths, path, tokens)
        self.crop(tokens)
        self.append(key, value, starts=starts)
        self._accepted()

    def reorder(self, index: Tensor) -> None:
        """Row b becomes what row index[b] was, as in beam search; int64 [batch]."""
        batch = self._held("reorder")[0].shape[0]
        self._choose("reorder", index, batch)

    def select(self, index: Tensor) -> None:
        """Keeps rows index, in that order; int64, of any length."""
        self._choose("select", index)

    def repeat_interleave(self, repeats: int) -> None:
        """Every row `repeats` times, copies side by side, as for parallel samples of one prompt."""
        check_int(f"{self._name}.repeat_interleave", "repeats", repeats, 1)
        lengths = self._held("repeat_interleave")[2]
        self._choose("repeat_interleave", torch.arange(len(lengths), device=lengths.device).repeat_interleave(repeats))

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _taken_back(self, tokens: int) -> None:
        """What else changes when tokens are taken back."""

    def _chosen(self) -> None:
        """What else changes when rows are chosen."""

    def _accepted(self) -> None:
        """What else changes when a branch was accepted."""

    def _rows(self, position: Tensor) -> Tensor:
        """Where the tokens at these positions lie."""
        return position

    def _newest(self, method: str, held: Tensor) -> Tensor:
        raise NotImplementedError

    def _held(self, method: str) -> tuple[Tensor, Tensor, Tensor]:
        if self._key is None or self._value is None or self._lengths is None:
            raise ValueError(f"{self._name}.{method}: the cache is empty; append tokens first")
        return self._key, self._value, self._lengths

    def _like_held(self) -> tuple[Tensor, Tensor] | None:
        """Key and value as new tokens must be, in shape of rows, dtype and device; None of an empty cache."""
        if self._key is None or self._value is None:
            return None
        return self._key[:, :, 0].transpose(2, 3) if self._key.dim() == 5 else self._key, self._value

    @property
    def _layout(self) -> str:
        return "tiles" if self._key is not None and self._key.dim() == 5 else "rows"

    def _allocate_rows(self, key: Tensor, value: Tensor, rows: int, what: str) -> tuple[Tensor, Tensor]:
        """Room for `rows` tokens like those given, whole tiles where keys lie by tiles.

        Args:
            what: the arguments that ask for so many, and their values, for the message.
        """
        batch, heads, _, dim = key.shape
        tiles = by_tiles(key.device)
        shape = (batch, heads, rows // KEY_TILE, dim, KEY_TILE) if tiles else (batch, heads, rows, dim)
        try:
            with torch.inference_mode(False):  # else nothing outside could take tokens back
                return key.new_zeros(shape), value.new_zeros(batch, heads, rows, value.shape[3])
        except (RuntimeError, TypeError, OverflowError) as error:
            if key.device.type != "cpu":
                raise
            size = batch * heads * rows * (key.shape[3] + value.shape[3]) * key.element_size()
            raise MemoryError(
                f"{self._name}.append: {what} and must fit the memory: {size} bytes cannot be allocated"
            ) from error

    def _gather(self, held: Tensor, position: Tensor) -> Tensor:
        """What lies at int64 positions [batch, n]: [batch, kv_heads, n, channels]."""
        rows = self._rows(position)
        if held.dim() == 4:
            return held.gather(2, rows[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3]))
        batch = torch.arange(held.shape[0], device=held.device)[:, None]
        columns = held.transpose(3, 4)  # [batch, kv_heads, tiles, 64, head_dim]
        return columns[batch, :, rows // KEY_TILE, rows % KEY_TILE].transpose(1, 2)

    def _branch(
        self, held_key: Tensor, held_value: Tensor, lengths: Tensor, path: Tensor, tokens: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Of the newest `tokens` those at `path` [batch, n], padded on the left by so many."""
        count = (path >= 0).sum(1)
        starts = path.shape[1] - count
        place = torch.arange(path.shape[1], device=path.device) - starts[:, None]
        position = (lengths[:, None] - tokens + path.gather(1, place.clamp(min=0))).clamp(min=0)
        return self._gather(held_key, position), self._gather(held_value, position), starts

    def _catch_up(self, tokens: int, starts: Tensor | None) -> None:
        """Counts tokens that were appended anew."""
        if self._cropped == 0:
            return
        if starts is None and self._behind is None:
            self._cropped = max(0, self._cropped - tokens)
            return
        assert self._lengths is not None
        with torch.inference_mode(False):
            behind = torch.full_like(self._lengths, self._cropped) if self._behind is None else self._behind
            self._behind = (behind - (tokens if starts is None else tokens - starts)).clamp(min=0)
        self._settle()

    def _settle(self) -> None:
        """The most of any row, again. Compiled code, which cannot look, keeps what is more."""
        if self._behind is None or torch.compiler.is_compiling():
            return
        self._cropped = int(self._behind.max()) if self._behind.numel() else 0
        if self._cropped == 0:
            self._behind = None

    def _check_crop(self, op: str, tokens: int) -> None:
        check_int(op, "tokens", tokens)
        if tokens < 0:
            raise ValueError(f"{op}: tokens is {tokens} and must be at least 0")
        lengths = self._held(op.split(".")[1])[2]
        if self.rollback is not None and self._cropped + tokens > self.rollback:
            already = f" with {self._cropped} taken back before" if self._cropped else ""
            raise ValueError(f"{op}: tokens is {tokens}{already} and must be at most rollback, {self.rollback}")
        shortest = int(lengths.min()) if lengths.numel() else tokens
        if tokens > shortest:
            raise ValueError(f"{op}: tokens is {tokens} and must be at most {shortest}, a row's length")

    def _choose(self, method: str, index: Tensor, count: int | None = None) -> None:
        held_key, held_value, lengths = self._held(method)
        index = check_index(f"{self._name}.{method}", index, len(lengths), count).to(lengths.device)
        with torch.inference_mode(False):
            key, value, lengths = (x.index_select(0, index) for x in (held_key, held_value, lengths))
            behind = None if self._behind is None else self._behind.index_select(0, index)
        self._key, self._value, self._lengths, self._behind = key, value, lengths, behind
        self._again = None
        self._chosen()
        self._settle()
