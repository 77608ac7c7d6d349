# SPDX-License-Identifier: Apache-2.0
"""Files of a model's weights and configuration, whole or not there."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

Model = TypeVar("Model", bound=nn.Module)


def save(state: dict[str, Any], config: Any, path: str | os.PathLike[str], facts: dict[str, Any] | None) -> None:
    """Writes them under another name first, so that what is at `path` is whole."""
    part = Path(path).with_name(Path(path).name + ".part")
    torch.save({"config": asdict(config), "facts": facts or {}, "state": state}, part)
    os.replace(part, path)


def load(op: str, path: str | os.PathLike[str], make: Callable[[dict[str, Any]], Model], wanted: str) -> Model:
    """The model that `make` builds of the configuration, with its weights; `op` and `wanted` are for the sentence.

    Raises:
        ValueError: the file is none of these.
        OSError: it cannot be read.
    """
    with open(path, "rb") as file:
        try:
            kept = torch.load(file, weights_only=True)
            with torch.random.fork_rng(devices=[]):  # initial weights, which are written over
                model = make(kept["config"])
            model.load_state_dict(kept["state"])
        except Exception as error:
            raise ValueError(f"{op}: path is {os.fspath(path)!r} and must be {wanted}") from error
    return model
