# SPDX-License-Identifier: Apache-2.0
"""Drawing the blocks of a round of probabilistic attention, with `torch.ops.pycore.attention_blocks`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_int, check_str
from pycore._schema import Schema
from pycore._tangents import refuse_tangents
from pycore._tensors import as_index, check_devices, check_tensor, graph_numbers, short_name
from pycore.schedules.distances import DistanceFamily, no_distances
from pycore.schedules.probabilistic import Probabilistic

__all__ = ["LENGTHS", "Lengths", "draw_blocks", "unpacked"]

LENGTHS = ("key_starts", "key_lengths", "key_offset", "query_lengths")
Lengths = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def _number(op: str, name: str, value: int | Tensor, device: torch.device) -> Tensor:
    """An int or a tensor, as an int64 tensor on `device`."""
    if isinstance(value, Tensor):
        check_tensor(op, name, value)
        return as_index(_moved(op, name, value, device))
    check_int(op, name, value, 0 if name == "seed" else None)  # the op knows both bounds of a round
    return torch.full((1,), value, dtype=torch.int64, device=device)


def _moved(op: str, name: str, x: Tensor, device: torch.device) -> Tensor:
    """On `device`. What has no data cannot go where there is some."""
    if x.is_meta and device.type != "meta":
        raise ValueError(f"{op}: {name} is on meta, which has no data, and must be where query is")
    return x.to(device)


def draw_blocks(
    op: str,
    schedule: Probabilistic,
    shape: tuple[int, int, int, int],
    lengths: Lengths,
    device: torch.device,
    wide: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """The bitmap of a round, and what correction adds by block distance: what the kernels take as schedule "blocks".

    Args:
        op: opens every message.
        shape: batch, heads, and the lengths of query and key.
        lengths: key_starts, key_lengths, key_offset, query_lengths.
        device: where both go. A CUDA device draws by itself, the same bits as the CPU; every other is sent the CPU's.
        wide: correction in float64.
    """
    batch, heads, query_length, key_length = shape
    check_int(op, "block_size", schedule.block_size)
    for name in ("sink_size", "window_blocks"):
        check_int(op, name, getattr(schedule, name), 0)
    for name in ("pattern", "correction"):
        check_str(op, name, getattr(schedule, name))
    per_row = -1
    if schedule.blocks_per_row is not None:
        check_int(op, "blocks_per_row", schedule.blocks_per_row, 1)
        per_row = schedule.blocks_per_row
    drawn = device if device.type == "meta" or (device.type == "cuda" and not wide) else torch.device("cpu")
    probs = schedule.distance_probs
    table, family, parameter, graph = None, "table", 0.0, None
    if isinstance(probs, DistanceFamily):
        family, parameter = probs.family, float(probs.parameter)
        if torch.compiler.is_compiling():
            graph, parameter = graph_numbers(parameter), 0.0
    elif isinstance(probs, Tensor):
        check_tensor(op, "distance_probs", probs)
        refuse_tangents(op, distance_probs=probs)
        if not probs.is_floating_point():
            raise ValueError(f"{op}: distance_probs is {short_name(probs.dtype)} and must be floating-point")
        table = _moved(op, "distance_probs", probs.detach(), drawn).double()
    else:
        raise no_distances(op, probs)
    rows = (x if x is None else _moved(op, name, as_index(x), drawn) for name, x in zip(LENGTHS, lengths, strict=True))
    blocks, correction = torch.ops.pycore.attention_blocks(
        _number(op, "seed", schedule.seed, drawn), _number(op, "round", schedule.round, drawn), table, *rows, op,
        family, parameter, schedule.pattern, schedule.correction, batch, heads, query_length, key_length,
        schedule.block_size, schedule.sink_size, schedule.window_blocks, per_row, wide, graph,
    )  # fmt: skip
    added = None if schedule.correction == "none" else correction.to(device)
    return blocks.to(device), added


def unpacked(words: Tensor) -> Tensor:
    """The bits of int64 words [..., n] as bool [..., 64 n], the lowest of each word first."""
    return (words[..., None] >> torch.arange(64, device=words.device) & 1).flatten(-2).bool()


# ---- what torch asks of the op ---------------------------------------------------------------------------------------

# Here and not in pycore/ops, which imports this package: `to_flex_block_mask` traces, and maps over seeds, by itself.
_SCHEMA = Schema("attention_blocks")


@torch.library.register_fake("pycore::attention_blocks")
def _fake(
    seed: Tensor, round: Tensor, distance_probs: Tensor | None, key_starts: Tensor | None, key_lengths: Tensor | None,
    key_offset: Tensor | None, query_lengths: Tensor | None, op: str, family: str, parameter: float, pattern: str,
    correction: str, batch: int, heads: int, query_length: int, key_length: int, block_size: int, sink_size: int,
    window_blocks: int, blocks_per_row: int, wide: bool, numbers: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    check_devices(
        op, seed=seed, round=round, distance_probs=distance_probs, key_starts=key_starts, key_lengths=key_lengths,
        key_offset=key_offset, query_lengths=query_lengths,
    )  # fmt: skip
    rows, columns = ((length + block_size - 2) // block_size + 1 for length in (query_length, key_length))
    blocks = seed.new_empty(batch, heads, rows, (columns + 63) // 64)
    entries: Any = torch.sym_max(columns, 1) if distance_probs is None else distance_probs.shape[-1]
    tables = 0 if correction == "none" else heads if distance_probs is not None and distance_probs.dim() == 2 else 1
    return blocks, seed.new_empty(tables, entries, dtype=torch.float64 if wide else torch.float32)


@torch.library.register_vmap("pycore::attention_blocks")
def _vmap(info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
    """Over seed and the lengths: vmap's dimension joins the batch."""
    call, dims = _SCHEMA.named(args), dict(zip(_SCHEMA.names, in_dims, strict=False))
    batch = call["batch"]
    folded = call | {"batch": batch * info.batch_size}
    for name, arg in call.items():
        if not isinstance(arg, Tensor):
            continue
        dim = dims.get(name)
        if name not in ("seed", *LENGTHS):
            if dim is not None:
                raise NotImplementedError("pr_flash_attention: vmap may run over seeds and lengths, not over tables")
            continue
        if name == "seed" and dim is None and arg.numel() == 1:
            continue
        arg = arg.unsqueeze(0).expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)
        if name == "seed":
            arg = arg.reshape(info.batch_size, arg[0:1].numel() if len(arg) else 1)
            arg = arg.expand(info.batch_size, batch)
        folded[name] = arg.flatten(0, 1)
    blocks, correction = _SCHEMA.call(folded)
    return (blocks.unflatten(0, (info.batch_size, batch)), correction), (0, None)
