# SPDX-License-Identifier: Apache-2.0
"""Row-invariant linear layers and RMS norm beside torch's, whose rows may depend on the batch they are in."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import inputs
from bench.case import Case, Options, Outputs, Prepare, largest_error

FORWARD_TOLERANCE, BACKWARD_TOLERANCE = 1e-5, 5e-5
Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Work:
    """A layer for rows of x [rows, ins]; outs = 0 is a norm over ins channels, otherwise a linear layer."""

    rows: int
    ins: int
    outs: int = 0
    backward: bool = False

    @property
    def flops(self) -> float:
        """2 per multiply-add of the product, and twice as many again backward; a norm's are not worth counting."""
        return 2.0 * self.rows * self.ins * self.outs * (3 if self.backward else 1)

    def inputs(self) -> tuple[Tensor, ...]:
        """x, weight, bias (none for a norm), and the gradient of the output."""
        generator = torch.Generator().manual_seed(inputs.SEED)
        shapes = [(self.rows, self.ins)]
        shapes += [(self.outs, self.ins), (self.outs,)] if self.outs else [(self.ins,)]
        tensors = [torch.randn(shape, generator=generator).requires_grad_(self.backward) for shape in shapes]
        return (*tensors, torch.randn(self.rows, self.outs or self.ins, generator=generator))


def _run(work: Work, layer: Layer, tensors: tuple[Tensor, ...]) -> Outputs:
    *arguments, grad = tensors
    if not work.backward:
        with torch.no_grad():
            return (layer(*arguments),)
    output = layer(*arguments)
    return (output.detach(), *torch.autograd.grad(output, arguments, grad))


def _case(name: str, group: str, work: Work) -> Case:
    from pycore import ops

    def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    subject, peer = (ops.invariant_linear, F.linear) if work.outs else (ops.rms_norm, torch_norm)

    def contender(layer: Layer) -> Prepare:
        return lambda tensors: lambda: _run(work, layer, tensors)

    def check(tensors: tuple[Tensor, ...]) -> Callable[[Outputs], float]:
        doubles = tuple(tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in tensors)
        expected = _run(work, peer, doubles)
        return lambda outputs: largest_error(outputs, expected)

    return Case(
        name=name,
        group=group,
        inputs=work.inputs,
        contenders={"pycore": contender(subject), "torch": contender(peer)},
        check=check,
        tolerance=BACKWARD_TOLERANCE if work.backward else FORWARD_TOLERANCE,
        flops=work.flops if work.rows > 1 else 0.0,
        bytes=4.0 * work.ins * work.outs if work.rows == 1 else 0.0,  # a single row is bound by reading the weights
    )


def cases(options: Options) -> Iterable[Case]:
    """Training shapes, one row (decoding), and the norm. CPU only."""
    if options.device != "cpu":
        return
    group = "invariant_linear and rms_norm"
    shapes = [(512, 512)] if options.quick else [(128, 128), (128, 512), (256, 256), (512, 512), (512, 1024)]
    for ins, outs in shapes:
        shape = f"2048 rows, {ins} to {outs}"
        yield _case(f"linear forward, {shape}", group, Work(2048, ins, outs))
        yield _case(f"linear forward and backward, {shape}", group, Work(2048, ins, outs, backward=True))
    for size in [2048] if options.quick else [512, 2048, 4096]:
        yield _case(f"linear forward, 1 row, {size} to {size}", group, Work(1, size, size))
    if not options.quick:
        yield _case("rms_norm forward, 2048 rows of 512", group, Work(2048, 512))
    yield _case("rms_norm forward and backward, 2048 rows of 512", group, Work(2048, 512, backward=True))


def bench_linear(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
