# SPDX-License-Identifier: Apache-2.0
"""What runs the benchmark's model outside of torch, on a tiny one."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import torch

from bench import model_peers

PACKAGES = {"onnxruntime GroupQueryAttention": ("onnxruntime", "onnx"), "llama.cpp": ("llama_cpp", "gguf")}


def tiny(dtype: torch.dtype) -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def test_contenders_are_those_whose_packages_are_there() -> None:
    absent = model_peers.absent()
    assert absent == [name for names in PACKAGES.values() for name in names if not importlib.util.find_spec(name)]
    for dtype in (torch.float32, torch.bfloat16):
        wanted = {name for name, packages in PACKAGES.items() if not set(packages) & set(absent)}
        if dtype == torch.bfloat16:
            wanted -= {"onnxruntime GroupQueryAttention"}
        assert set(model_peers.makers(dtype)) == wanted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", PACKAGES)
@torch.no_grad()
def test_a_peer_predicts_what_the_model_does(name: str, dtype: torch.dtype) -> None:
    makers = model_peers.makers(dtype)
    if name not in makers:
        pytest.skip(f"{name} is not there for {dtype}")
    model, ids = tiny(dtype), torch.randint(256, (1, 40))
    read = makers[name](model, 256)
    for at in (0, 0, 30):  # a prompt, the same once more, and a chunk behind it
        out = read(ids[:, at : at + 30], at)
    expected = model(ids).logits[0, -1]
    assert torch.allclose(
        out, expected.float(), rtol=0, atol=(1e-3 if dtype == torch.float32 else 3e-2) * expected.std()
    )
    stepped = read(ids[:, 39:], 39)
    assert torch.allclose(stepped, out, rtol=0, atol=(1e-3 if dtype == torch.float32 else 3e-2) * expected.std())
