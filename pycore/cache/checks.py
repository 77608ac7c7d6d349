# SPDX-License-Identifier: Apache-2.0
"""What a key-value cache refuses before it changes anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int
from pycore._limits import FAR, KEY_TILE
from pycore._tensors import as_index, check_devices, check_tensor, short_name

__all__ = ["STATE_VERSION", "check_index", "check_path", "check_starts", "check_state", "check_tokens"]

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _index(op: str, name: str, x: Any) -> Tensor:
    check_tensor(op, name, x)
    return as_index(x)


def check_tokens(op: str, key: Any, value: Any, held: tuple[Tensor, Tensor] | None) -> None:
    """New tokens: [batch, kv_heads, tokens, channels] each, beside each other, and like those that are held."""
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(op, name, tensor)
        if tensor.dim() != 4:
            raise ValueError(
                f"{op}: {name} has {tensor.dim()} dimensions and must have 4: [batch, kv_heads, tokens, head_dim]"
            )
    for name, given, like in zip(("key", "value"), (key, value), held or (), strict=False):
        if (given.shape[0], given.shape[1], given.shape[3]) != (like.shape[0], like.shape[1], like.shape[3]):
            raise ValueError(
                f"{op}: {name} has shape {list(given.shape)} and must be [{like.shape[0]}, {like.shape[1]}, tokens, "
                f"{like.shape[3]}]"
            )
        if given.dtype != like.dtype or given.device != like.device:
            raise ValueError(
                f"{op}: {name} is {given.dtype} on {given.device} and must be {like.dtype} on {like.device}"
            )
    check_devices(op, key=key, value=value)
    if key.shape[2] != value.shape[2]:
        raise ValueError(f"{op}: value has {value.shape[2]} tokens and key has {key.shape[2]}; they must be equal")


def check_starts(op: str, starts: Any, key: Tensor, values: bool) -> Tensor | None:
    """int64 [batch], on the device of key; with `values` each at most key's tokens, else the kernel's face looks."""
    if starts is None:
        return None
    starts = _index(op, "starts", starts)
    batch, tokens = key.shape[0], key.shape[2]
    if starts.dtype != torch.int64 or starts.dim() != 1 or len(starts) != batch:
        raise ValueError(f"{op}: starts is {short_name(starts.dtype)} {list(starts.shape)} and must be int64 [{batch}]")
    if starts.device != key.device:
        raise ValueError(f"{op}: starts is on {starts.device} and must be on {key.device} like key")
    if values:
        for b, start in enumerate(starts.tolist()):
            if not 0 <= start <= tokens:
                raise ValueError(f"{op}: starts[{b}] is {start} and must be between 0 and key's {tokens} tokens")
    return starts.contiguous()


def check_index(op: str, index: Any, batch: int, count: int | None = None) -> Tensor:
    """int64 [n] (n = count, if given) of rows below `batch`, whose values are looked at on the CPU."""
    index = _index(op, "index", index)
    if count is not None and index.dim() == 1 and len(index) != count:
        raise ValueError(f"{op}: index has {len(index)} entries and must have {count}")
    if index.dim() != 1 or index.dtype != torch.int64:
        raise ValueError(f"{op}: index is {index.dtype} {list(index.shape)} and must be int64 of one dimension")
    if index.device.type == "cpu" and not ((index >= 0) & (index < batch)).all():
        raise IndexError(f"{op}: index must be between 0 and {batch - 1}")
    return index


def check_path(op: str, path: Any, batch: int, tokens: int) -> Tensor:
    """int64 [batch, n]: places below `tokens`, ascending, then -1."""
    path = _index(op, "path", path)
    if path.dtype != torch.int64 or path.dim() not in (1, 2) or (path.dim() == 2 and path.shape[0] != batch):
        raise ValueError(
            f"{op}: path is {short_name(path.dtype)} {list(path.shape)} and must be int64 [n] or [{batch}, n]"
        )
    path = path.expand(batch, -1)
    if bool(((path < -1) | (path >= tokens)).any()):
        raise IndexError(f"{op}: path must be between 0 and {tokens - 1}, or -1 for no token")
    before, after = path[:, :-1], path[:, 1:]
    if bool(((after >= 0) & ((after <= before) | (before < 0))).any()):
        raise ValueError(f"{op}: path does not ascend and must, with any -1 at its end")
    return path


STATE_VERSION = 2  # 1, which did not say so: keys in rows


def check_state(
    op: str, state: Any, sizes: Mapping[str, int | None], rows: int | None, old_rows: int | None = None
) -> tuple[Any, ...] | None:
    """Key, value, lengths and cropped of a `state_dict`, None of an empty cache's.

    Args:
        sizes: what the state must say of the cache; rollback among it, None where all may be taken back.
        rows: of key and value, whole tiles; None: any number of them.
        old_rows: of those of version 1.
    """
    if not isinstance(state, Mapping):
        raise TypeError(f"{op}: state is a {type(state).__name__} and must be a dict")
    for name, size in sizes.items():
        if name not in state:
            raise ValueError(f"{op}: {name} is missing")
        if size is None or state[name] is not None:
            check_int(op, name, 0 if state[name] is None else state[name])
        if state[name] != size:
            raise ValueError(f"{op}: {name} is {state[name]} and must be {size}")
    version = state.get("version", 1)
    check_int(op, "version", version, 1, STATE_VERSION)
    most_cropped = FAR if sizes["rollback"] is None else sizes["rollback"]
    names = ("key", "value", "lengths", "cropped")
    missing = sorted(set(names) - state.keys())
    if len(missing) == len(names):
        return None
    if missing:
        raise ValueError(f"{op}: {missing[0]} is missing")
    key, value, lengths, cropped = (state[name] for name in names)
    _check_rows(op, key, value, old_rows if version == 1 else rows, version > 1)
    batch = key.shape[0]
    if not isinstance(cropped, Tensor):
        check_int(op, "cropped", cropped)
        if not 0 <= cropped <= most_cropped:
            raise ValueError(f"{op}: cropped is {cropped} and must be between 0 and rollback, {most_cropped}")
    for name, numbers, most in (("lengths", lengths, FAR), ("cropped", cropped, most_cropped)):
        if name == "cropped" and not isinstance(numbers, Tensor):
            continue
        check_tensor(op, name, numbers)
        if numbers.dtype != torch.int64 or numbers.dim() != 1 or len(numbers) != batch:
            raise ValueError(
                f"{op}: {name} is {short_name(numbers.dtype)} {list(numbers.shape)} and must be int64 [{batch}]"
            )
        if numbers.device != key.device:
            raise ValueError(f"{op}: {name} is on {numbers.device} and must be on {key.device} like key")
        for b, number in enumerate(numbers.tolist()):
            if not 0 <= number <= most:
                raise ValueError(f"{op}: {name}[{b}] is {number} and must be between 0 and {most}")
    return key, value, lengths, cropped


def _check_rows(op: str, key: Any, value: Any, rows: int | None, either: bool) -> None:
    for name, tensor in (("key", key), ("value", value)):
        check_tensor(op, name, tensor)
        if tensor.dtype not in _DTYPES:
            raise ValueError(
                f"{op}: {name} is {short_name(tensor.dtype)} and must be float32, float16, bfloat16 or float64"
            )
    tiles, needed = either and key.dim() == 5, rows
    if needed is None:
        needed = -(-value.shape[2] // KEY_TILE) * KEY_TILE if value.dim() == 4 else KEY_TILE
    for name, tensor in (("key", key), ("value", value)):
        if tiles and name == "key":
            form, fits = f"[batch, kv_heads, {needed // KEY_TILE}, head_dim, {KEY_TILE}]", key.shape[4] == KEY_TILE
            fits = fits and key.shape[2] * KEY_TILE == needed
        else:
            form, fits = f"[batch, kv_heads, {needed}, channels]", tensor.dim() == 4 and tensor.shape[2] == needed
        if not fits:
            raise ValueError(f"{op}: {name} has shape {list(tensor.shape)} and must be {form}")
    if value.shape[:2] != key.shape[:2]:
        raise ValueError(
            f"{op}: value has shape {list(value.shape)} and must have {key.shape[0]} batch rows and {key.shape[1]} "
            "heads like key"
        )
    if value.dtype != key.dtype or value.device != key.device:
        raise ValueError(f"{op}: value is {value.dtype} on {value.device} and must be {key.dtype} on {key.device}")
