# SPDX-License-Identifier: Apache-2.0
"""The loss of a causal language model without its logits, which a training step would only reduce.

A model of transformers makes logits with its head and hands them to `self.loss_function`. With `register_loss` both
ends are ours while it trains: the head keeps its input and gives logits of no channels, and the loss is
`linear_cross_entropy` of that input and the head's weight. All between and before is the model's own forward.
"""

from __future__ import annotations

import functools
import inspect
from typing import Any, cast

from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.loss.loss_utils import LOSS_MAPPING, ForCausalLMLoss

from pycore.ops import linear_cross_entropy

__all__ = ["register_loss", "unregister_loss"]

# What a forward may do to its logits besides handing them to the loss, by the names that its code uses.
_CAP, _FACTOR, _DIVISOR = "final_logit_softcapping", "logit_scale", "logits_scaling"


class _Head(nn.Linear):
    """A head that keeps its input, if asked to, instead of making logits of it."""

    pycore_asked = False
    pycore_rows: Tensor | None = None
    pycore_empty: Tensor | None = None

    def forward(self, input: Tensor) -> Tensor:
        if not self.pycore_asked:
            return super().forward(input)
        self.pycore_rows = input
        # In float32, because models that want the loss in it ask for it, and then get this very tensor.
        self.pycore_empty = input[..., :0].float()
        return self.pycore_empty


class _WithLoss:
    """In front of a model's class."""

    training: bool
    pycore_changes: set[str]
    pycore_labels: int  # where among forward's arguments they are

    def _linear_loss(
        self, logits: Tensor, labels: Tensor | None, vocab_size: int, num_items_in_batch: Tensor | int | None = None,
        ignore_index: int = -100, shift_labels: Tensor | None = None, **kwargs: Any,
    ) -> Tensor:  # fmt: skip
        name = type(self).__name__
        head: _Head = self.get_output_embeddings()  # type: ignore[attr-defined]
        rows, bias = head.pycore_rows, cast(Tensor | None, head.bias)
        if rows is None or (logits is not head.pycore_empty and not self.pycore_changes):
            raise RuntimeError(f"register_loss: {name} changes its logits before the loss and must be unregistered")
        if vocab_size != head.out_features:
            raise ValueError(f"register_loss: {name}'s head has {head.out_features} rows and must have {vocab_size}")
        if shift_labels is None:
            assert labels is not None
            shift_labels = functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        cap, factor = _changes(self)
        if factor is not None:
            rows, bias = rows * factor, None if bias is None else bias * factor
        loss = linear_cross_entropy(
            rows, head.weight, shift_labels.to(rows.device), bias=bias, ignore_index=ignore_index, softcap=cap,
            reduction="mean" if num_items_in_batch is None else "sum",
        )  # fmt: skip
        if isinstance(num_items_in_batch, Tensor):
            num_items_in_batch = num_items_in_batch.to(loss.device)
        return loss if num_items_in_batch is None else loss / num_items_in_batch


def _changes(model: Any) -> tuple[float, float | None]:
    """The softcap of a model's logits (0: none), and what they are multiplied with."""
    config, names = model.config.get_text_config(), model.pycore_changes
    cap = (getattr(config, _CAP, None) if _CAP in names else None) or 0.0
    factor = None
    if _FACTOR in names:
        factor = getattr(model, _FACTOR)
    elif _DIVISOR in names:
        factor = 1 / getattr(config, _DIVISOR)
    return cap, factor


@functools.cache
def _with_loss(base: type) -> type:
    """The class `base`, whose training steps with labels have our loss. It has base's name, which files keep."""
    own: Any = base.forward  # type: ignore[attr-defined]

    class Model(_WithLoss, base):  # type: ignore[valid-type,misc]
        pycore_base = base
        pycore_changes = _names(base) & {_CAP, _FACTOR, _DIVISOR}
        pycore_labels = list(inspect.signature(own).parameters).index("labels") - 1

        @functools.wraps(own)
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            labels = args[self.pycore_labels] if len(args) > self.pycore_labels else kwargs.get("labels")
            if labels is None or not self.training:
                return super().forward(*args, **kwargs)
            head = self.get_output_embeddings()
            if not isinstance(head, _Head):
                raise RuntimeError(
                    f"register_loss: {type(self).__name__} has another head, a {type(head).__name__}, and must be "
                    "registered anew"
                )
            head.pycore_asked = True
            try:
                return super().forward(*args, **kwargs)
            finally:
                head.pycore_asked, head.pycore_rows, head.pycore_empty = False, None, None

        @property
        def loss_function(self) -> Any:
            asked = getattr(self.get_output_embeddings(), "pycore_asked", False)
            return self._linear_loss if asked else super().loss_function

        @loss_function.setter
        def loss_function(self, value: Any) -> None:
            raise ValueError(f"register_loss: {type(self).__name__} has pycore's loss and must be unregistered first")

        def __reduce_ex__(self, protocol: Any) -> Any:
            return _restored, (base,), self.__getstate__()

    Model.__name__, Model.__qualname__, Model.__module__ = base.__name__, base.__qualname__, base.__module__
    Model.__doc__ = base.__doc__
    return Model


def _restored(base: type) -> Any:
    """An empty model of such a class, for pickle and copy."""
    model: Any = _with_loss(base)
    return model.__new__(model)


def _names(base: type) -> set[str]:
    """What the code of a class's forward names."""
    return set(inspect.unwrap(base.forward).__code__.co_names)  # type: ignore[attr-defined]


def register_loss(model: Any) -> Any:
    """Gives a causal language model a loss without logits: same loss, same gradients, no [tokens, vocabulary] matrix.

    It is used where a training model (`model.train()`) is called with labels, by `Trainer` or by hand:
    `pycore.ops.linear_cross_entropy` of the head's input and weight, in float32. The output's `logits` then have no
    channels. In evaluation and without labels nothing changes. Labels are shifted, -100 ignored, and a sum divided by
    `num_items_in_batch`, as transformers does; tied weights, biases, scaled logits (Cohere, Granite), softcaps
    (Gemma 2) and losses that are added (experts' balance) stay.

    Args:
        model: of transformers, ...ForCausalLM. What it is made of stays the same, its class becomes one of ours in
            front of its own.

    Returns:
        The model. `unregister_loss` undoes it.

    Raises:
        ValueError: a model whose loss is not that of a causal language model, whose head is no linear layer, or which
            needs its logits for more.
        TypeError: not a model of transformers.
    """
    op = "register_loss"
    if not isinstance(model, PreTrainedModel):
        raise TypeError(f"{op}: model is a {type(model).__name__} and must be a model of transformers")
    base, name = type(model), type(model).__name__
    registered = isinstance(model, _WithLoss)
    if registered:
        base = type(model).pycore_base  # type: ignore[attr-defined]
    names, signature = _names(base), inspect.signature(base.forward)
    own = LOSS_MAPPING.get(getattr(model, "loss_type", None) or "ForCausalLM")
    if own is not ForCausalLMLoss or "loss_function" not in names:
        raise ValueError(f"{op}: model is a {name}, which has a loss of its own, and must have ForCausalLM's")
    if hasattr(model, "_loss_function"):
        raise ValueError(f"{op}: model has a loss_function that was set and must have transformers' own")
    head = model.get_output_embeddings()
    if type(head) not in (nn.Linear, _Head):
        changed = " changed by same_bits, which must be undone first," if isinstance(head, nn.Linear) else ""
        raise ValueError(f"{op}: model has a {type(head).__name__}{changed} as its head and must have torch's Linear")
    if "labels" not in signature.parameters:
        raise ValueError(f"{op}: model is a {name}, whose forward has no labels, and must have them")
    if "z_loss_coefficient" in names and model.config.z_loss_coefficient > 0:
        raise ValueError(f"{op}: model has a z_loss_coefficient, which needs logits, and must have 0")
    if len(names & {_CAP, _FACTOR, _DIVISOR}) > 1:
        raise ValueError(f"{op}: model is a {name}, which scales and caps its logits, and must do one of them")
    head.__class__ = _Head
    if not registered:
        model.__class__ = _with_loss(base)  # type: ignore[arg-type]
    return model


def unregister_loss(model: Any) -> Any:
    """Gives a model of `register_loss` its own loss back, and returns it.

    Raises:
        ValueError: a model that has its own.
    """
    if not isinstance(model, _WithLoss):
        raise ValueError(f"unregister_loss: model is a {type(model).__name__} and must be one of register_loss")
    head = model.get_output_embeddings()  # type: ignore[attr-defined]
    if isinstance(head, _Head):
        head.__class__ = nn.Linear  # type: ignore[assignment]
    model.__class__ = type(model).pycore_base  # type: ignore[attr-defined]
    return model
