# SPDX-License-Identifier: Apache-2.0
"""Losses over rows of scores that are never stored: linear cross entropy, contrastive loss, late interaction."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from pycore._checks import check_bool, check_int, check_number, check_str
from pycore._tensors import as_index, check_tensor
from pycore.ops._pairwise import batched, lead_of, per_row, scaled, widened

__all__ = ["contrastive_loss", "linear_cross_entropy", "maxsim"]

_OP = "linear_cross_entropy"


def _row_weights(kept: Tensor, rows: Tensor, classes: int, smoothing: float, z_loss: float) -> Tensor:
    """What pairwise_logsumexp_gradients weighs each row's gradient with, for d loss = rows."""
    rows = torch.where(kept, rows, 0.0)
    return torch.stack(
        [rows, 2 * z_loss * rows, (smoothing - 1) * rows, -smoothing / max(classes, 1) * rows], -1
    ).unsqueeze(0)


def _plain() -> bool:
    """Whether tensors are what they seem: nothing is traced or transformed."""
    return not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


class _Once(torch.autograd.Function):
    """grad times what was made of `inputs` before: to differentiate it again is refused, and does not give zeros."""

    generate_vmap_rule = True

    @staticmethod
    def forward(made: Tensor, grad: Tensor, *inputs: Tensor | None) -> Tensor:
        return made * grad

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        raise NotImplementedError(f"{_OP}: second derivatives are not available")


class _CrossEntropy(torch.autograd.Function):
    """Losses of rows [N], or their sum over a count.

    Where a gradient will be asked for and the rows' weights are known, it is made with the loss, of one
    pass.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, kept: Tensor, options: tuple[Any, ...],
        needs: tuple[bool, bool, bool],
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        ignore_index, smoothing, z_loss, softcap, reduction = options
        rows, classes = x.unsqueeze(0), weight.unsqueeze(0)
        arguments = (rows, classes, None if bias is None else bias.unsqueeze(0), target.unsqueeze(0))
        grads: list[Tensor | None] = [None, None, None]
        count = kept.sum().to(x.dtype) if reduction == "mean" else torch.ones((), dtype=x.dtype, device=x.device)
        if any(needs) and reduction != "none":
            weights = _row_weights(kept, (1 / count).expand(x.shape[0]), weight.shape[0], smoothing, z_loss)
            lse, logit, total, *made = torch.ops.pycore.pairwise_logsumexp_gradients(
                *arguments, weights, False, 1.0, softcap, ignore_index, *needs, _OP
            )
            grads = [grad.squeeze(0) if need else None for grad, need in zip(made, needs, strict=True)]
        else:
            lse, logit, total = torch.ops.pycore.pairwise_logsumexp(
                *arguments, False, 1.0, softcap, ignore_index, smoothing > 0, _OP
            )
        # In float64: few numbers, and nothing of the rows' precision is lost in their sum.
        lse, logit = lse.squeeze(0).double(), logit.squeeze(0).double()
        losses = lse - (1 - smoothing) * logit
        if smoothing > 0:
            losses = losses - smoothing / max(weight.shape[0], 1) * total.squeeze(0).double()
        losses = torch.where(kept, losses + z_loss * lse.square(), 0.0)
        loss = losses if reduction == "none" else losses.sum() / count.double()
        return (loss.to(x.dtype), *grads)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor | None, ...]) -> None:
        x, weight, bias, target, kept, ctx.options, ctx.needs = inputs
        made = output[1:]
        ctx.mark_non_differentiable(*(grad for grad in made if grad is not None))
        ctx.set_materialize_grads(False)
        ctx.parts = None
        if all(grad is None for grad in made):
            ctx.save_for_backward(x, weight, bias, target, kept)
        elif _plain():  # not saved: they are given away, so that there is one of each
            ctx.save_for_backward(x, weight, bias, target, kept)
            ctx.parts = made
        else:
            ctx.save_for_backward(*made, x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
        if grad is None:
            return None, None, None, None, None, None, None
        ignore_index, smoothing, z_loss, softcap, reduction = ctx.options
        if len(ctx.saved_tensors) == 6:
            parts, inputs = ctx.saved_tensors[:3], ctx.saved_tensors[3:]
            if torch.compiler.is_compiling():  # which differentiates once, and takes no function within another's
                made = [None if part is None else part * grad for part in parts]
            else:
                made = [None if part is None else _Once.apply(part, grad, *inputs) for part in parts]  # type: ignore[no-untyped-call]
        elif ctx.parts is not None and (torch.is_grad_enabled() or not _plain()):
            inputs = ctx.saved_tensors[:3]
            made = [None if part is None else _Once.apply(part, grad, *inputs) for part in ctx.parts]  # type: ignore[no-untyped-call]
        elif ctx.parts is not None:
            # In place: a second pass through a graph that was retained makes them anew.
            made, ctx.parts = [None if part is None else part.mul_(grad) for part in ctx.parts], None
        else:
            x, weight, bias, target, kept = ctx.saved_tensors
            count = kept.sum().to(x.dtype) if reduction == "mean" else torch.ones_like(grad, dtype=x.dtype)
            rows = grad if reduction == "none" else (1 / count).expand(x.shape[0])
            needs = ctx.needs_input_grad[:3]
            *_, grad_x, grad_weight, grad_bias = torch.ops.pycore.pairwise_logsumexp_gradients(
                x.unsqueeze(0), weight.unsqueeze(0), None if bias is None else bias.unsqueeze(0), target.unsqueeze(0),
                _row_weights(kept, rows, weight.shape[0], smoothing, z_loss), False, 1.0, softcap, ignore_index, *needs,
                _OP,
            )  # fmt: skip
            made = [
                (part if reduction == "none" else part * grad).squeeze(0) if need else None
                for part, need in zip((grad_x, grad_weight, grad_bias), needs, strict=True)
            ]
        return (*made, None, None, None, None)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, target: Tensor, *, bias: Tensor | None = None, ignore_index: int = -100,
    label_smoothing: float = 0.0, z_loss: float = 0.0, softcap: float = 0.0, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    """`F.cross_entropy(F.linear(x, weight, bias), target)` without the logits, nor their gradient.

    Gradients are made with the loss, from the logits of a few rows at a time, so that no product is done twice; they
    are the same whatever the threads, and a row's loss and gradient of x the same in any batch.

    Args:
        x: [..., D], float32, bfloat16 or float16 (widened to float32); float64 runs plain loops.
        weight: [V, D].
        target: [...] integers, 0 to V - 1, or ignore_index.
        bias: [V], or None.
        ignore_index: a target whose row has no loss and no gradient.
        label_smoothing: 0 to 1: so much of the target is spread over all classes.
        z_loss: this times the squared log-sum-exp joins a row's loss (PaLM).
        softcap: logits become softcap * tanh(logits / softcap) first; 0: as they are (Gemma).
        reduction: "mean" (over the rows that are not ignored; NaN if all are, as in torch), "sum" or "none".

    Returns:
        The loss, float32 (or float64): a scalar, or [...] for "none". Differentiable once in x, weight and bias.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        IndexError: a target that is no class.
        TypeError: an argument of the wrong type.

    Source: Wijmans et al., "Cut Your Losses in Large-Vocabulary Language Models"; Hsu et al., "Liger Kernel".
    """
    check_tensor(_OP, "target", target)
    check_tensor(_OP, "bias", bias, optional=True)
    check_int(_OP, "ignore_index", ignore_index)
    check_str(_OP, "reduction", reduction)
    smoothing, z, cap = (
        check_number(_OP, name, value)
        for name, value in (("label_smoothing", label_smoothing), ("z_loss", z_loss), ("softcap", softcap))
    )
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"{_OP}: reduction is '{reduction}' and must be mean, sum or none")
    if not 0 <= smoothing <= 1:
        raise ValueError(f"{_OP}: label_smoothing is {smoothing} and must be 0 to 1")
    if not abs(z) < math.inf:
        raise ValueError(f"{_OP}: z_loss is {z} and must be finite")
    check_tensor(_OP, "x", x)
    if x.dim() < 1:
        raise ValueError(f"{_OP}: x is a scalar and must have shape [..., channels]")
    half = x.dtype
    rows, classes = widened(_OP, x=x if x.dim() > 1 else x.unsqueeze(0), weight=weight)
    if classes.dim() != 2:
        raise ValueError(f"{_OP}: weight has shape {list(weight.shape)} and must be [classes, channels]")
    if target.dtype.is_floating_point or target.dtype.is_complex or target.dtype == torch.bool:
        raise ValueError(f"{_OP}: target has dtype {str(target.dtype)[6:]} and must have int64")
    if target.shape != x.shape[:-1]:
        raise ValueError(f"{_OP}: target has shape {list(target.shape)} and must have x's {list(x.shape[:-1])}")
    if bias is not None:
        if bias.shape != weight.shape[:1]:
            raise ValueError(
                f"{_OP}: bias has shape {list(bias.shape)} and must have [{weight.shape[0]}], a class each"
            )
        if (bias.dtype == torch.float64) != (half == torch.float64) or not bias.dtype.is_floating_point:
            raise ValueError(f"{_OP}: bias has dtype {str(bias.dtype)[6:]} and must have x's {str(half)[6:]}")
        bias = bias.to(classes.dtype)
    flat, targets = rows.reshape(math.prod(x.shape[:-1]), x.shape[-1]), as_index(target).reshape(-1)
    needs = tuple(torch.is_grad_enabled() and part is not None and part.requires_grad for part in (rows, classes, bias))
    options = (ignore_index, smoothing, z, cap, reduction)
    loss = _CrossEntropy.apply(flat, classes, bias, targets, targets != ignore_index, options, needs)[0]  # type: ignore[no-untyped-call]
    return loss.reshape(target.shape) if reduction == "none" else loss


def contrastive_loss(
    a: Tensor, b: Tensor, *, scale: float | Tensor, symmetric: bool = True, positives: Tensor | None = None
) -> Tensor:
    """InfoNCE over the whole batch: the cross entropy of scale times a's products with all of b, at its own.

    Args:
        a: [..., N, D]. Rows are taken as they are: normalise them first for cosines.
        b: [..., M, D], M = N unless positives are given.
        scale: a number, or a tensor of no dimensions with a gradient (CLIP's exp(logit_scale)).
        symmetric: also b's rows against all of a, and the mean of both, as CLIP does.
        positives: [..., N] integers: the row of b that belongs to each row of a, -1 for none. None: row i to row i.

    Returns:
        [...], the mean over the rows (that have a positive). float32, or float64. Differentiable once, in all.

    Raises:
        ValueError: a shape, dtype, device or number that does not fit.
        IndexError: a positive that is no row of b.
        TypeError: an argument of the wrong type.

    Source: van den Oord et al., "Representation Learning with Contrastive Predictive Coding"; Radford et al., "CLIP".
    """
    op = "contrastive_loss"
    check_bool(op, "symmetric", symmetric)
    check_tensor(op, "positives", positives, optional=True)
    if not isinstance(scale, Tensor):
        number: Any = check_number(op, "scale", scale)
        if not abs(number) < math.inf:
            raise ValueError(f"{op}: scale is {number} and must be finite")
        scale = number
    elif scale.dim() != 0:
        raise ValueError(f"{op}: scale has shape {list(scale.shape)} and must be a number")
    a, b = widened(op, a=a, b=b)
    n, m = a.shape[-2], b.shape[-2]
    if positives is None:
        if n != m:
            raise ValueError(f"{op}: b has {m} rows and must have a's {n}, unless positives are given")
        positives = torch.arange(n, device=a.device)
    elif positives.dim() < 1 or positives.shape[-1] != n:
        raise ValueError(f"{op}: positives has shape {list(positives.shape)} and must be [..., {n}], one for each of a")
    positives = as_index(positives)
    kept = positives != -1
    lead = lead_of(op, a, b)
    targets = per_row(op, "positives", positives, lead, n)
    factor = 1.0
    if isinstance(scale, Tensor):
        a = scaled(op, a, scale)
    else:
        factor = scale
    x, y = batched(a, lead, 2), batched(b, lead, 2)
    if not symmetric:
        lse, logit, _ = _named(
            op, torch.ops.pycore.pairwise_logsumexp, x, y, None, targets, False, factor, 0.0, -1, False, op
        )
        losses = lse - logit
    else:
        lse, of_b, logit = _named(op, torch.ops.pycore.pairwise_logsumexp_both, x, y, targets, factor, op)
        losses = ((lse - logit) + (of_b.gather(-1, targets.clamp(min=0)) - logit)) / 2
    losses = torch.where(kept, losses.reshape(*lead, n), 0.0)
    return (losses.double().sum(-1) / kept.sum(-1)).to(losses.dtype)


def _named(op: str, run: Any, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The op calls positives target."""
    if torch.compiler.is_compiling():
        return run(*arguments)  # type: ignore[no-any-return]
    try:
        return run(*arguments)  # type: ignore[no-any-return]
    except (IndexError, ValueError) as error:
        raise type(error)(str(error).replace(f"{op}: target", f"{op}: positives")) from None


class _BestProducts(torch.autograd.Function):
    """The best product of every row of x [L, D] with each document's tokens [P, M, D]: [P, L], and where it is.

    Its gradient adds up by row, not by row and document.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, documents: Tensor, lengths: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = x.unsqueeze(0).expand(documents.shape[0], -1, -1)
        best, where = torch.ops.pycore.pairwise_topk(rows, documents, 1, False, None, lengths, "maxsim")
        return best.squeeze(-1), where.squeeze(-1)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        x, documents, _ = inputs
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(x, documents, output[1])

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
        x, documents, where = ctx.saved_tensors
        count, tokens, channels = documents.shape
        starts = torch.arange(count, device=x.device).unsqueeze(1) * tokens
        pairs = torch.where(where < 0, where, where + starts).T
        of_x, of_documents = torch.ops.pycore.pairwise_pairs_backward(
            grad.T.unsqueeze(0),
            x.unsqueeze(0),
            documents.reshape(1, count * tokens, channels),
            pairs.unsqueeze(0),
            False,
        )
        return of_x.squeeze(0), of_documents.reshape(documents.shape), None


def maxsim(
    query: Tensor, document: Tensor, *, query_lengths: Tensor | None = None, document_lengths: Tensor | None = None
) -> Tensor:
    """Late interaction: the sum, over a query's tokens, of the best product with one of the document's tokens.

    Args:
        query: [Q, L, D], or [L, D] for one.
        document: [P, M, D]: every query with every document; [M, D] for one; or [Q, P, M, D]: every query with its own.
        query_lengths: [Q] integers: how many tokens of each query count.
        document_lengths: [P], or [Q, P] integers.

    Returns:
        [Q, P], float32 (or float64), without the dimensions that an argument does not have. A document of no tokens has
        -inf (a query of none 0). Differentiable once in query and document.

    Raises:
        ValueError: a shape, dtype, device or length that does not fit; NaN or an infinity in a token that counts.
        TypeError: an argument of the wrong type.

    Source: Khattab and Zaharia, "ColBERT".
    """
    op = "maxsim"
    query, document = widened(op, query=query, document=document)
    if query.dim() > 3:
        raise ValueError(f"{op}: query has shape {list(query.shape)} and must be [queries, tokens, channels]")
    if document.dim() > 4 or (document.dim() == 4 and document.shape[0] != (query.shape[0] if query.dim() == 3 else 1)):
        raise ValueError(
            f"{op}: document has shape {list(document.shape)} and must be [documents, tokens, channels], or "
            "[queries, documents, tokens, channels]"
        )
    pairs = document.dim() == 4
    one_query, one_document = query.dim() == 2, document.dim() == 2
    queries = query.unsqueeze(0) if one_query else query
    documents = document.unsqueeze(0) if one_document else document
    q, length, channels = queries.shape
    p, tokens = documents.shape[-3], documents.shape[-2]
    of_query = _token_lengths(op, "query_lengths", query_lengths, (q,), length)
    of_document = _token_lengths(op, "document_lengths", document_lengths, (q, p) if pairs else (p,), tokens)
    if tokens == 0 or length == 0:
        empty = -math.inf if length > 0 else 0.0
        scores = queries.new_full((q, p), empty) + 0 * (queries.sum() + documents.sum())
    else:
        best = _best_products(queries, documents, of_query, of_document, pairs)
        if of_query is not None:
            best = torch.where(_counts(of_query, length).unsqueeze(1), best, 0.0)
        scores = best.double().sum(-1).to(best.dtype)
    scores = scores.squeeze(1) if one_document else scores
    return scores.squeeze(0) if one_query else scores


def _best_products(
    queries: Tensor, documents: Tensor, of_query: Tensor | None, of_document: Tensor | None, pairs: bool
) -> Tensor:
    """[Q, P, L]: what each token of a query has best in a document; what does not count is not read."""
    (q, length, channels), (p, tokens) = queries.shape, documents.shape[-3:-1]
    of_tokens = None if of_document is None else of_document.reshape(-1)

    def run() -> Tensor:
        if pairs:
            x_lengths = None if of_query is None else of_query.unsqueeze(1).expand(q, p).reshape(-1)
            rows, all_tokens = batched(queries.unsqueeze(1), (q, p), 2), documents.reshape(q * p, tokens, channels)
            best = torch.ops.pycore.pairwise_topk(rows, all_tokens, 1, False, x_lengths, of_tokens, "maxsim")[0]
            return best.reshape(q, p, length)
        x = queries.reshape(q * length, channels)
        if of_query is not None:
            x = torch.where(_counts(of_query, length).reshape(-1, 1), x, 0.0)
        best = _BestProducts.apply(x, documents, of_tokens)[0]  # type: ignore[no-untyped-call]
        return best.reshape(p, q, length).transpose(0, 1)

    if torch.compiler.is_compiling():
        return run()
    try:
        return run()
    except ValueError as error:  # the op calls them x and y
        text = str(error).replace("maxsim: x has", "maxsim: query has").replace("maxsim: y has", "maxsim: document has")
        raise ValueError(text) from None


def _counts(lengths: Tensor, tokens: int) -> Tensor:
    return torch.arange(tokens, device=lengths.device) < lengths.unsqueeze(-1)


def _token_lengths(op: str, name: str, lengths: Tensor | None, shape: tuple[int, ...], most: int) -> Tensor | None:
    check_tensor(op, name, lengths, optional=True)
    if lengths is None:
        return None
    if lengths.dtype.is_floating_point or lengths.dtype == torch.bool:
        raise ValueError(f"{op}: {name} has dtype {str(lengths.dtype)[6:]} and must have int64")
    try:
        expanded = as_index(lengths).expand(shape)
    except RuntimeError:
        raise ValueError(f"{op}: {name} has shape {list(lengths.shape)} and must have {list(shape)}") from None
    if not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active() and lengths.numel():
        low, high = int(lengths.min()), int(lengths.max())
        if low < 0 or high > most:
            raise ValueError(f"{op}: {name} has {low if low < 0 else high} and must have 0 to {most}")
    return expanded
