# SPDX-License-Identifier: Apache-2.0
"""What attention is given in SmolLM2-135M while it reads the standard library: the second input of the benchmarks.

    python -m bench.captured    # writes it again, 24 MB beside the model; a run does so by itself where it is missing

Three layers, one early, one in the middle and one late, are the rows of a batch. Queries and keys are rotated.
"""

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

NAME = "SmolLM2-135M on text"
LAYERS, TOKENS = (2, 14, 27), 4096
HEADS, KV_HEADS, HEAD_DIM = 9, 3, 64
EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FILE = "attention_inputs.pt"


@functools.cache
def _smollm2() -> Any:
    """The loader that the examples use."""
    sys.path.append(str(EXAMPLES))
    import smollm2

    return smollm2


def present() -> bool:
    """Whether the model was fetched, so that inputs are there or can be made."""
    return bool(_smollm2().present())


@functools.cache
def attention_inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Queries [3, 9, 4096, 64], keys and values [3, 3, 4096, 64] in bfloat16, one layer a row."""
    path = _smollm2().FOLDER / FILE
    if not path.is_file():
        write(path)
    kept = torch.load(path, weights_only=True)
    return kept["query"], kept["key"], kept["value"]


def write(path: Path) -> None:
    """Reads the text with the model and keeps what its layers hand over."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    loader = _smollm2()
    model, tokenizer = loader.load()
    (text,) = loader.texts(loader.encoder(tokenizer), 1, TOKENS)
    attend, seen = ALL_ATTENTION_FUNCTIONS["sdpa"], {}

    def keeping(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Any:
        if module.layer_idx in LAYERS:
            seen[module.layer_idx] = tuple(x.bfloat16() for x in (query, key, value))
        return attend(module, query, key, value, *args, **options)

    AttentionInterface.register("bench_captured", keeping)
    AttentionMaskInterface.register("bench_captured", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation("bench_captured")
    with torch.no_grad():
        model(text, logits_to_keep=1, use_cache=False)
    query, key, value = (torch.cat(rows) for rows in zip(*(seen[layer] for layer in LAYERS), strict=True))
    part = path.with_suffix(".part")  # what is there is whole
    torch.save({"query": query, "key": key, "value": value}, part)
    part.replace(path)


if __name__ == "__main__":
    write(_smollm2().FOLDER / FILE)
    print(_smollm2().FOLDER / FILE)
