# SPDX-License-Identifier: Apache-2.0
"""State dicts to and from vector-quantize-pytorch: trained there and loaded here, and the other way round.

Where that package is not installed, what it has is in `tests/golden/vq_state_dicts.json`: the names and shapes of its
state dicts, and the codes it gives for values made of integers. With the package,
`python tests/nn/test_nn_vq_peer.py --update` writes the file anew.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pycore import nn as ours
from tests.ops.vq.test_vq_golden import made

GOLDEN = Path(__file__).parents[1] / "golden" / "vq_state_dicts.json"

CONFIGURATIONS: list[tuple[str, dict[str, Any]]] = [
    ("VectorQuantize", {"dim": 16, "codebook_size": 40}),
    ("VectorQuantize", {"dim": 16, "codebook_size": 40, "use_cosine_sim": True}),
    ("VectorQuantize", {"dim": 16, "codebook_size": 40, "codebook_dim": 5, "layernorm_after_project_in": True}),
    ("VectorQuantize", {"dim": 16, "codebook_size": 40, "codebook_dim": 4, "heads": 4}),
    ("VectorQuantize",
     {"dim": 16, "codebook_size": 40, "codebook_dim": 4, "heads": 4, "separate_codebook_per_head": True}),
    ("VectorQuantize", {"dim": 16, "codebook_size": 40, "kmeans_init": True, "threshold_ema_dead_code": 2}),
    ("VectorQuantize",
     {"dim": 16, "codebook_size": 40, "learnable_codebook": True, "ema_update": False, "rotation_trick": False}),
    ("ResidualVQ", {"dim": 16, "num_quantizers": 3, "codebook_size": 40}),
    ("ResidualVQ", {"dim": 16, "codebook_size": [40, 20, 10], "codebook_dim": 6, "kmeans_init": True}),
    ("ResidualVQ", {"dim": 16, "num_quantizers": 3, "codebook_size": 40, "shared_codebook": True}),
    ("ResidualVQ", {"dim": 16, "num_quantizers": 4, "codebook_size": 40, "quantize_dropout": True}),
    ("GroupedResidualVQ", {"dim": 16, "groups": 2, "num_quantizers": 3, "codebook_size": 40}),
]  # fmt: skip
IDS = [f"{name}-{'-'.join(map(str, list(keywords)[1:]))}" for name, keywords in CONFIGURATIONS]


def make(package: Any, name: str, keywords: dict[str, Any]) -> torch.nn.Module:
    sizes = keywords["codebook_size"]
    return getattr(package, name)(**{**keywords, "codebook_size": tuple(sizes) if isinstance(sizes, list) else sizes})


def theirs() -> Any:
    """The package, or a skip."""
    return pytest.importorskip("vector_quantize_pytorch", reason="vector-quantize-pytorch is not installed")


def fill(module: torch.nn.Module, unit_codes: bool) -> None:
    """Every number is one that any machine makes; codes for cosine have length one, as training leaves them."""
    state = module.state_dict()
    for at, (name, value) in enumerate(sorted(state.items())):
        if name.endswith("initted"):
            state[name] = torch.tensor(True)
        elif value.is_floating_point():
            values = made(at + 1, *value.shape) / 2
            state[name] = functional.normalize(values, dim=-1) if unit_codes and name.endswith("embed") else values
    module.load_state_dict(state)


def train(module: torch.nn.Module, steps: int = 4) -> None:
    module.train()
    for step in range(steps):
        x = made(100 + step, 2, 150, 16).requires_grad_()
        out, _, losses = module(x)
        (out.square().mean() + losses.sum()).backward()
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.grad is not None:
                    parameter -= 0.1 * parameter.grad
                    parameter.grad = None


def digest(codes: Tensor) -> str:
    return hashlib.sha256(codes.contiguous().numpy().tobytes()).hexdigest()[:16]


def recorded(package: Any, name: str, keywords: dict[str, Any]) -> dict[str, Any]:
    torch.manual_seed(0)
    module = make(package, name, keywords)
    fill(module, "use_cosine_sim" in keywords)
    codes = module.eval()(made(99, 2, 50, 16))[1]
    return {
        "shapes": {key: list(value.shape) for key, value in module.state_dict().items()},
        "codes": list(codes.shape), "digest": digest(codes),
    }  # fmt: skip


def key_of(name: str, keywords: dict[str, Any]) -> str:
    return f"{name} {json.dumps(keywords)}"


@pytest.mark.parametrize("name, keywords", CONFIGURATIONS, ids=IDS)
def test_what_was_written_down(name: str, keywords: dict[str, Any]) -> None:
    """Names, shapes and codes of vector-quantize-pytorch 1.32, without it."""
    assert recorded(ours, name, keywords) == json.loads(GOLDEN.read_text())[key_of(name, keywords)]


@pytest.mark.parametrize("name, keywords", CONFIGURATIONS, ids=IDS)
def test_the_package_itself(name: str, keywords: dict[str, Any]) -> None:
    """Trained on either side, loaded on the other: the same codes and output there, and training goes on alike."""
    package = theirs()
    for source, target in ((package, ours), (ours, package)):
        torch.manual_seed(1)
        trained, loaded = make(source, name, keywords), make(target, name, keywords)
        train(trained)
        missing, unexpected = loaded.load_state_dict(trained.state_dict(), strict=True)
        assert not missing and not unexpected
        x = made(7, 2, 90, 16)
        results = [module.eval()(x) for module in (trained, loaded)]
        assert torch.equal(results[0][1], results[1][1])
        torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
        if "quantize_dropout" in keywords or "kmeans_init" in keywords:
            continue  # drawn on each side in its own way: what is dropped, and what a dead code becomes
        for module in (trained, loaded):
            train(module, steps=1)
        for (key, mine), other in zip(trained.state_dict().items(), loaded.state_dict().values(), strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-5, msg=lambda text, key=key: f"{key}: {text}")


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"]:
        sys.exit("usage: python tests/nn/test_nn_vq_peer.py --update")
    peer = importlib.import_module("vector_quantize_pytorch")
    found = {key_of(*each): recorded(peer, *each) for each in CONFIGURATIONS}
    lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value)}" for key, value in found.items())
    GOLDEN.write_text(f"{{\n{lines}\n}}\n")
