# SPDX-License-Identifier: Apache-2.0
"""What several public signatures say of the same options: one name, one default, one order."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import pycore
from pycore import nn, ops, schedules
from pycore.cache import LambdaKVCache
from pycore.ops.attention_call import AttentionOptions
from pycore.schedules import Probabilistic

DEFAULTS = AttentionOptions()._asdict()


def parameters(function: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return {name: each for name, each in inspect.signature(function).parameters.items() if name != "self"}


# Of each function, the shared options it lacks, and those whose default is another.
FUNCTIONS: dict[Callable[..., Any], tuple[set[str], dict[str, Any]]] = {
    ops.attention: (set(), {}),
    ops.lambda_attention: (set(), {}),
    ops.pr_flash_attention: ({"symmetric_bias"}, {}),  # it is causal
    LambdaKVCache.attend: (DEFAULTS.keys() - AttentionOptions().for_cache().keys(), {}),
    nn.LambdaAttention: (
        DEFAULTS.keys() - {"distance_limit", "sink_logits", "softcap", "dropout_p"},
        {"sink_logits": False},  # whether there are any
    ),
    nn.ProbabilisticAttention: (DEFAULTS.keys() - {"softcap", "dropout_p"}, {}),
}


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.__qualname__)
def test_attention_options(function: Callable[..., Any]) -> None:
    lacks, others = FUNCTIONS[function]
    shared = {name: each.default for name, each in parameters(function).items() if name in DEFAULTS}
    assert list(shared) == [name for name in DEFAULTS if name not in lacks]
    assert shared == {name: x for name, x in (DEFAULTS | others).items() if name not in lacks}
    assert all(parameters(function)[name].kind is inspect.Parameter.KEYWORD_ONLY for name in shared)


@pytest.mark.parametrize(
    "function", [ops.lambda_attention, ops.pr_flash_attention, LambdaKVCache.attend, AttentionOptions]
)
def test_attention_option_types(function: Callable[..., Any]) -> None:
    types, given = (
        {name: getattr(each.annotation, "__forward_arg__", each.annotation) for name, each in parameters(f).items()}
        for f in (ops.attention, function)
    )
    assert {name: x for name, x in given.items() if name in DEFAULTS}.items() <= types.items()


def test_sizes_of_lambda() -> None:
    sizes = {field.name: field for field in dataclasses.fields(schedules.Lambda)}
    given = parameters(ops.lambda_attention)
    assert [name for name in given if name in sizes] == list(sizes)
    assert given["right"].default == sizes["right"].default
    for function in (nn.LambdaAttention, LambdaKVCache):
        names = [name for name in parameters(function) if name in sizes]
        assert names == list(sizes)[: len(names)]


# The modules begin at a seed, and with the sink that trained models need.
ROUNDS: dict[str, dict[str, Any]] = {"pr_flash_attention": {}, "module": {"seed": 0, "sink_size": 1}}


@pytest.mark.parametrize("where", [*ROUNDS, "transformers"])
def test_options_of_a_round(where: str) -> None:
    if where == "transformers":
        function: Any = pytest.importorskip("pycore.integrations.transformers").register_probabilistic
    else:
        function = ops.pr_flash_attention if where == "pr_flash_attention" else nn.ProbabilisticAttention
    wanted = {field.name: field.default for field in dataclasses.fields(Probabilistic)}
    wanted = {name: inspect.Parameter.empty if x is dataclasses.MISSING else x for name, x in wanted.items()}
    wanted |= ROUNDS["pr_flash_attention" if where == "pr_flash_attention" else "module"]
    if where != "pr_flash_attention":
        del wanted["round"]  # they count
    given = {name: each.default for name, each in parameters(function).items() if name in wanted}
    assert given == wanted and list(given) == list(wanted)


def native_defaults(name: str) -> dict[str, Any]:
    """The keywords of a kernel, by the stub of pycore.native."""
    tree = ast.parse((Path(pycore.__file__).parent / "native.pyi").read_text())
    (found,) = (node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == name)
    values = zip(found.args.kwonlyargs, found.args.kw_defaults, strict=True)
    return {argument.arg: inspect.Parameter.empty if x is None else ast.literal_eval(x) for argument, x in values}


@pytest.mark.parametrize("name", ["attention", "attention_backward"])
def test_native_attention_options(name: str) -> None:
    given = native_defaults(name)
    shared = {option: x for option, x in DEFAULTS.items() if option not in ("rope", "return_lse")}
    assert shared.items() <= given.items()
    assert {"rope_cos", "rope_sin"} <= given.keys()


def test_native_options_of_a_round() -> None:
    given = native_defaults("attention_blocks")
    fields = [field for field in dataclasses.fields(Probabilistic) if field.name not in ("distance_probs", "round")]
    for field in fields:
        default = inspect.Parameter.empty if field.default is dataclasses.MISSING else field.default
        assert given[field.name] == default, field.name


PUBLIC = {
    "pycore": ["Bitstreams", "EqualInfoTable", "EqualInfoWindows"],
    "pycore.cache": ["LambdaKVCache"],
    "pycore.schedules": [name for name in schedules.__all__ if name[0].isupper()],
}


@pytest.mark.parametrize("home, name", [(home, name) for home, names in PUBLIC.items() for name in names])
def test_classes_are_called_by_their_public_path(home: str, name: str) -> None:
    """So that a pickle finds them when a file moves."""
    kind = getattr(pycore if home == "pycore" else getattr(pycore, home.removeprefix("pycore.")), name)
    assert kind.__module__ == home
    assert pickle.loads(pickle.dumps(kind)) is kind


def test_pickled_values() -> None:
    for value in (schedules.Lambda(4, 32), schedules.Geometric(0.5), schedules.Causal()):
        assert pickle.loads(pickle.dumps(value)) == value
    tree = pickle.loads(pickle.dumps(schedules.Tree(torch.tensor([-1, 0]))))
    assert tree.parents.tolist() == [-1, 0]
