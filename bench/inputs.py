# SPDX-License-Identifier: Apache-2.0
"""Inputs shared by benchmarks: random ones, and those of a language model reading real text."""

from __future__ import annotations

import functools
import os
import pathlib
import sysconfig
from typing import Any

import torch

from bench import captured

SEED = 20240
RANDOM = "random"
_TRAINED = pathlib.Path(__file__).resolve().parent.parent / "examples" / "out" / "bytelm.pt"


@functools.cache
def text_model() -> tuple[str, Any] | None:
    """A name for the source, and the byte-level model; None while pycore cannot be imported.

    The model is the one that examples/length_extrapolation.py trained, if it was run here (or PYCORE_BENCH_CHECKPOINT
    names its checkpoint), else one of 8 heads of 64 channels with fresh weights.
    """
    try:
        from pycore.models.bytelm import Bytelm, BytelmConfig
    except ImportError:
        return None
    checkpoint = pathlib.Path(os.environ.get("PYCORE_BENCH_CHECKPOINT", _TRAINED))
    torch.manual_seed(SEED)
    if not checkpoint.exists():
        return "bytelm (fresh weights) on text", Bytelm(BytelmConfig(dim=512, heads=8, kv_heads=8)).eval()
    kept = torch.load(checkpoint, weights_only=True)
    model = Bytelm(BytelmConfig(**kept["settings"]["model"]))
    model.load_state_dict(kept["state"])
    return "bytelm (trained) on text", model.eval()


def text(length: int) -> bytes:
    """The first `length` bytes of the standard library's modules, in the order of their names."""
    data = b""
    for path in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("*.py")):
        data += path.read_bytes()
        if len(data) >= length:
            break
    return data[:length]


def attention_inputs(
    source: str,
    heads: int,
    length: int,
    head_dim: int,
    gradient: bool = False,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
) -> tuple[torch.Tensor, ...]:
    """query, key, value and, on request, an output gradient: [1, heads, length, head_dim].

    Random ones are drawn on the device. From bytelm they are what its last layer gives to attention, un-rotated, with
    the strides that they have there; from SmolLM2 those of three layers, rotated, [3, 9, length, 64], each key and
    value three times, as peers need them.
    """
    if source == captured.NAME:
        return _of_smollm2(heads, length, head_dim, gradient, device, dtype)
    generator = torch.Generator(device).manual_seed(SEED)
    shape = (1, heads, length, head_dim)
    if source == RANDOM:
        drawn = (torch.randn(shape, generator=generator, device=device) for _ in range(4 if gradient else 3))
        return tuple(tensor.to(dtype) for tensor in drawn)
    named = text_model()
    assert named is not None and named[0] == source, f"inputs: no source is called {source}"
    model = named[1]
    from pycore.models.bytelm import tokens_from_bytes
    from pycore.schedules import Lambda

    tokens = tokens_from_bytes(text(length - 1))[None]
    with torch.no_grad():
        schedule = Lambda(4, 128)
        options = model.attention_options(length, schedule, None)
        x = torch.nn.functional.embedding(tokens, model.embedding)
        for block in model.blocks[:-1]:
            x = block(x, options, schedule)
        last = model.blocks[-1]
        tensors = last.attention.project(last.attention_norm(x))
    assert tensors[0].shape == shape, f"inputs: {source} has shape {tuple(tensors[0].shape)} and must have {shape}"
    if gradient:
        tensors = (*tensors, torch.randn(shape, generator=generator, device=device))
    return tuple(tensor.to(device, dtype) for tensor in tensors)


def _of_smollm2(
    heads: int, length: int, head_dim: int, gradient: bool, device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, ...]:
    query, key, value = captured.attention_inputs()
    tensors = [query, *(x.repeat_interleave(captured.HEADS // captured.KV_HEADS, 1) for x in (key, value))]
    tensors = [x[:, :, :length].to(device, dtype).contiguous() for x in tensors]
    shape = (len(captured.LAYERS), heads, length, head_dim)
    assert tensors[0].shape == shape, f"inputs: {captured.NAME} has shape {tuple(tensors[0].shape)}, not {shape}"
    if gradient:
        tensors.append(torch.randn(shape, generator=torch.Generator(device).manual_seed(SEED), device=device).to(dtype))
    return tuple(tensors)
