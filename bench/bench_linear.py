# SPDX-License-Identifier: Apache-2.0
"""Row-invariant linear layers, norms and gated activations beside torch's, whose rows may depend on their batch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import inputs
from bench.case import Case, Options, Outputs, Prepare, largest_error

FORWARD_TOLERANCE, BACKWARD_TOLERANCE = 1e-5, 5e-5
FEW = 6  # rows that read the weight where it lies
# in and out of the linear layers that a walk of few rows goes through, as a decoding step does: SmolLM2-135M's thirty
# layers, or the same matrix again and again. Far more than a processor's caches hold, in any dtype.
SMOLLM2 = [(576, 576), (576, 192), (576, 192), (576, 576), (576, 1536), (576, 1536), (1536, 576)] * 30
TOGETHER = (3, 1, 2, 1)  # of SmolLM2's layers, those that stand before one x: query, key and value; gate and up
WALKS = {"SmolLM2's 30 layers": SMOLLM2, "24 layers of 2048 to 2048": [(2048, 2048)] * 24}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Layer = Callable[..., Tensor]


@dataclass(frozen=True)
class Work:
    """A layer for rows of x [rows, ins]; outs = 0 is a norm over ins channels, otherwise a linear layer.

    gated is a function of two tensors [rows, ins] instead, by name.
    """

    rows: int
    ins: int
    outs: int = 0
    backward: bool = False
    dtype: torch.dtype = torch.float32
    gated: str = ""

    @property
    def flops(self) -> float:
        """2 per multiply-add of the product, and twice as many again backward; a norm's are not worth counting."""
        return 2.0 * self.rows * self.ins * self.outs * (3 if self.backward else 1)

    def inputs(self) -> tuple[Tensor, ...]:
        """x, weight, bias (none for a norm), and the gradient of the output."""
        generator = torch.Generator().manual_seed(inputs.SEED)
        shapes = [(self.rows, self.ins)]
        if self.gated:
            shapes *= 2
        else:
            shapes += [(self.outs, self.ins), (self.outs,)] if self.outs else [(self.ins,)]

        def draw(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(self.dtype)

        tensors = [draw(*shape).requires_grad_(self.backward) for shape in shapes]
        return (*tensors, draw(self.rows, self.outs or self.ins))


def _run(work: Work, layer: Layer, tensors: tuple[Tensor, ...]) -> Outputs:
    *arguments, grad = tensors
    if not work.backward:
        with torch.no_grad():
            return (layer(*arguments),)
    output = layer(*arguments)
    return (output.detach(), *torch.autograd.grad(output, arguments, grad))


@dataclass(frozen=True)
class Walk:
    """Few rows through linear layers one after another, each with weights of its own; x is the same for equal ins."""

    rows: int
    shapes: Sequence[tuple[int, int]]
    dtype: torch.dtype

    @property
    def bytes(self) -> float:
        """Of all weights, each of which is read once."""
        return float(self.dtype.itemsize * sum(ins * outs for ins, outs in self.shapes))

    def inputs(self) -> list[tuple[Tensor, Tensor]]:
        """The x and the weight of every layer."""
        generator = torch.Generator().manual_seed(inputs.SEED)
        rows = {
            ins: torch.randn(self.rows, ins, generator=generator).to(self.dtype)
            for ins in sorted({ins for ins, _ in self.shapes})
        }
        return [(rows[ins], torch.randn(outs, ins, generator=generator).to(self.dtype)) for ins, outs in self.shapes]


def _walk_case(name: str, group: str, walk: Walk) -> Case:
    """One timed call is the whole walk: alone, a call would be timed with its threads asleep."""
    from pycore import ops

    def contender(layer: Layer) -> Prepare:
        def prepare(layers: list[tuple[Tensor, Tensor]]) -> Callable[[], Outputs]:
            def run() -> Outputs:
                with torch.no_grad():
                    return [layer(x, weight) for x, weight in layers]

            return run

        return prepare

    def side_by_side(layers: list[tuple[Tensor, Tensor]]) -> Callable[[], Outputs]:
        groups, at = [], 0
        while at < len(layers):
            size = TOGETHER[len(groups) % len(TOGETHER)]
            groups.append((layers[at][0], [weight for _, weight in layers[at : at + size]]))
            at += size

        def run() -> Outputs:
            with torch.no_grad():
                return [ops.invariant_linears(x, weights) for x, weights in groups]

        return run

    def check(layers: list[tuple[Tensor, Tensor]]) -> Callable[[Outputs], float]:
        expected = torch.cat([F.linear(x.double(), weight.double()) for x, weight in layers], -1)
        return lambda outputs: largest_error([torch.cat(list(outputs), -1)], [expected])  # one by one or side by side

    contenders: dict[str, Prepare] = {"pycore": contender(ops.invariant_linear), "torch": contender(F.linear)}
    if walk.shapes is SMOLLM2:
        contenders["pycore, invariant_linears"] = side_by_side
    return Case(
        name=name,
        group=group,
        inputs=walk.inputs,
        contenders=contenders,
        check=check,
        tolerance=FORWARD_TOLERANCE if walk.dtype == torch.float32 else 8 * torch.finfo(walk.dtype).eps,
        bytes=walk.bytes,
    )


def _case(name: str, group: str, work: Work) -> Case:
    from pycore import ops

    def torch_norm(x: Tensor, weight: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], weight, 1e-6)

    others: dict[str, tuple[Layer, Layer]] = {
        "silu_mul": (ops.silu_mul, lambda gate, up: F.silu(gate) * up),
        "gelu_mul": (ops.gelu_mul, lambda gate, up: F.gelu(gate) * up),
        "layer_norm": (ops.layer_norm, lambda x, weight: F.layer_norm(x, x.shape[-1:], weight)),
    }
    linear = (ops.invariant_linear, F.linear) if work.outs else (ops.rms_norm, torch_norm)
    subject, peer = others.get(name.split()[0], linear)
    # One rounding of a result, which may be as large as the largest of some thousands.
    rounding = 8 * torch.finfo(work.dtype).eps if work.dtype != torch.float32 else 0.0

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
        tolerance=rounding or (BACKWARD_TOLERANCE if work.backward else FORWARD_TOLERANCE),
        flops=work.flops,
    )


def cases(options: Options) -> Iterable[Case]:
    """Training shapes, also in 16 bits, walks of few rows (decoding), norms and activations. CPU only."""
    if options.device != "cpu":
        return
    group = "invariant_linear and rms_norm"
    shapes = [(512, 512)] if options.quick else [(128, 128), (128, 512), (256, 256), (512, 512), (512, 1024)]
    for ins, outs in shapes:
        shape = f"2048 rows, {ins} to {outs}"
        yield _case(f"linear forward, {shape}", group, Work(2048, ins, outs))
        yield _case(f"linear forward and backward, {shape}", group, Work(2048, ins, outs, backward=True))
    for layers, walked in list(WALKS.items())[: 1 if options.quick else None]:
        for dtype_name, dtype in DTYPES.items():
            for rows in [1] if options.quick else [1, FEW]:
                name = f"linear forward, {rows} row{'s' * (rows > 1)}, {layers}, {dtype_name}"
                yield _walk_case(name, group, Walk(rows, walked, dtype))
    if not options.quick:
        for dtype_name in ("bfloat16", "float16"):
            for rows in (64, 1024):
                shape = f"{rows} rows, 2048 to 2048, {dtype_name}"
                yield _case(f"linear forward, {shape}", group, Work(rows, 2048, 2048, dtype=DTYPES[dtype_name]))
        yield _case("layer_norm forward, 2048 rows of 512", group, Work(2048, 512))
        for name in ("silu_mul", "gelu_mul"):
            yield _case(f"{name} forward, 512 rows of 1536", group, Work(512, 1536, gated=name))
            yield _case(f"{name} forward and backward, 512 rows of 1536", group, Work(512, 1536, 0, True, gated=name))
            yield _case(f"{name} forward, 512 rows of 1536, bfloat16", group,
                        Work(512, 1536, dtype=torch.bfloat16, gated=name))  # fmt: skip
    yield _case("layer_norm forward and backward, 2048 rows of 512", group, Work(2048, 512, backward=True))
    if not options.quick:
        yield _case("rms_norm forward, 2048 rows of 512", group, Work(2048, 512))
    yield _case("rms_norm forward and backward, 2048 rows of 512", group, Work(2048, 512, backward=True))


def bench_linear(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
