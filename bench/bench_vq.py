# SPDX-License-Identifier: Apache-2.0
"""Nearest codes and residual quantization beside matrix products and the libraries that do the same."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bench import captured, inputs
from bench.case import Case, Options, Outputs, Prepare, largest_error

GROUP = "rvq_encode and ResidualVQ"
CHECKED_ROWS = 256
TOLERANCE = 1e-4  # of the reconstruction error: a code that is not the nearest makes it larger
Inputs = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Work:
    """Rows of `dim` channels through `stages` codebooks of `codes` codes."""

    stages: int
    dim: int
    codes: int
    rows: int
    source: str = inputs.RANDOM

    @property
    def name(self) -> str:
        shape = f"Q{self.stages} D{self.dim} K{self.codes} N{self.rows}"
        return shape if self.source == inputs.RANDOM else f"{shape}, keys of {self.source}"

    @property
    def flops(self) -> float:
        return 2.0 * self.stages * self.dim * self.codes * self.rows

    def inputs(self) -> Inputs:
        """X and codebooks whose stages get smaller, as residuals do.

        Of a real model: keys of its layers and heads, and codebooks that k-means found in them stage by stage.
        """
        if self.source == captured.NAME:
            return self._keys()
        generator = torch.Generator().manual_seed(inputs.SEED)
        x = torch.randn(self.rows, self.dim, generator=generator)
        scale = 0.7 ** torch.arange(self.stages, dtype=torch.float32)
        return x, torch.randn(self.stages, self.codes, self.dim, generator=generator) * scale[:, None, None]

    def _keys(self) -> Inputs:
        from pycore import ops

        keys = captured.attention_inputs()[1].float().reshape(-1, captured.HEAD_DIM)
        rows = keys[torch.randperm(len(keys), generator=torch.Generator().manual_seed(inputs.SEED))[: self.rows]]
        residual, books = rows, []
        for _ in range(self.stages):
            books.append(ops.kmeans(residual, self.codes, iterations=3)[0])
            residual = residual - books[-1][ops.vq_encode(residual, books[-1])[..., 0]]
        return rows, torch.stack(books)


def _reconstruction_error(x: Tensor, books: Tensor, codes: Tensor) -> Tensor:
    total = torch.zeros_like(x, dtype=torch.float64)
    for book, of_stage in zip(books, codes.unbind(-1), strict=True):
        total += book[of_stage]
    return (x - total).square().mean()


def _check(beam: int) -> Callable[[Inputs], Callable[[Outputs], float]]:
    """The mean reconstruction error of some rows, against that of the same search in float64."""

    def prepare(tensors: Inputs) -> Callable[[Outputs], float]:
        from pycore.reference import vq as reference

        rows = CHECKED_ROWS if beam == 1 else 32
        x, books = tensors[0][:rows].double(), tensors[1].double()
        if beam == 1:
            residual, stages = x, []
            for book in books:
                stages.append(torch.cdist(residual, book, compute_mode="donot_use_mm_for_euclid_dist").argmin(-1))
                residual = residual - book[stages[-1]]
            codes = torch.stack(stages, -1)
        else:
            codes = reference.rvq_encode(x, list(books), beam_size=beam)
        expected = (_reconstruction_error(x, books, codes),)
        return lambda outputs: largest_error((_reconstruction_error(x, books, outputs[0][:rows]),), expected)

    return prepare


def _pycore(beam: int) -> Prepare:
    from pycore import ops

    return lambda tensors: lambda: (ops.rvq_encode(*tensors, beam_size=beam),)


def _stagewise(nearest: Callable[[Tensor, Tensor], Tensor]) -> Prepare:
    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        x, books = tensors

        def run() -> Outputs:
            residual, codes = x, []
            for book in books:
                codes.append(nearest(residual, book))
                residual = residual - book[codes[-1]]
            return (torch.stack(codes, -1),)

        return run

    return prepare


def _addmm(x: Tensor, book: Tensor) -> Tensor:
    return torch.addmm(book.square().sum(1), x, book.T, alpha=-2).argmin(1)


def _cdist(x: Tensor, book: Tensor) -> Tensor:
    return torch.cdist(x, book).argmin(1)


def _vq_pytorch(tensors: Inputs) -> Callable[[], Outputs]:
    from vector_quantize_pytorch import ResidualVQ

    x, books = tensors
    module = ResidualVQ(dim=x.shape[1], num_quantizers=len(books), codebook_size=books.shape[1]).eval()
    for layer, book in zip(module.layers, books, strict=True):
        layer.codebook = book
    return lambda: (module(x.unsqueeze(0))[1][0],)


def _faiss(beam: int) -> Prepare:
    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        import faiss

        x, books = tensors
        bits = books.shape[1].bit_length() - 1
        quantizer = faiss.ResidualQuantizer(x.shape[1], len(books), bits)
        faiss.copy_array_to_vector(books.numpy().ravel(), quantizer.codebooks)
        quantizer.is_trained = True
        quantizer.max_beam_size = beam
        quantizer.compute_codebook_tables()
        rows = x.numpy()

        def run() -> Outputs:
            packed = quantizer.compute_codes(rows)
            return (torch.from_numpy(faiss.unpack_bitstrings(packed, len(books), bits).astype("int64")),)

        return run

    return prepare


def _training(make: Callable[[int, int, int], torch.nn.Module]) -> Prepare:
    """Forward in training mode, moving averages included, and backward."""

    def prepare(tensors: Inputs) -> Callable[[], Outputs]:
        x, books = tensors
        module = make(x.shape[1], *books.shape[:2])
        start = {name: value.clone() for name, value in module.state_dict().items()}
        for q, book in enumerate(books):
            start[f"layers.{q}._codebook.embed"] = book.unsqueeze(0).clone()
            start[f"layers.{q}._codebook.embed_avg"] = book.unsqueeze(0).clone()
        module.load_state_dict(start)
        rows = x.unsqueeze(0)
        first: list[Tensor] = []

        def run() -> Outputs:
            leaf = rows.clone().requires_grad_()
            quantized, codes, losses = module(leaf)
            (quantized.square().mean() + losses.sum()).backward()
            if not first:
                first.append(codes[0])
            return (first[0],)  # later steps have learned codebooks

        return run

    return prepare


def _ours(dim: int, stages: int, codes: int) -> torch.nn.Module:
    from pycore.nn import ResidualVQ

    return ResidualVQ(dim=dim, num_quantizers=stages, codebook_size=codes)


def _theirs(dim: int, stages: int, codes: int) -> torch.nn.Module:
    from vector_quantize_pytorch import ResidualVQ

    return ResidualVQ(dim=dim, num_quantizers=stages, codebook_size=codes)


def _there(names: Sequence[str]) -> bool:
    return all(importlib.util.find_spec(name) is not None for name in names)


def _encode_case(work: Work, memory: bool = False) -> Case:
    contenders = {"pycore": _pycore(1), "addmm + argmin": _stagewise(_addmm), "cdist + argmin": _stagewise(_cdist)}
    if _there(["vector_quantize_pytorch"]):
        contenders["vector-quantize-pytorch"] = _vq_pytorch
    if _there(["faiss"]) and work.rows <= 4096 and work.stages > 1:
        contenders["faiss ResidualQuantizer"] = _faiss(1)
    return Case(
        name=f"rvq_encode, {work.name}",
        group=GROUP,
        inputs=work.inputs,
        contenders=contenders,
        check=_check(1),
        tolerance=TOLERANCE,
        flops=work.flops,
        memory=("pycore", "addmm + argmin") if memory else (),
    )


def cases(options: Options) -> Iterable[Case]:
    """EnCodec's shape, small channels, one row, one large codebook, a beam, and training. CPU only."""
    if options.device != "cpu":
        return
    codec = Work(8, 128, 1024, 1200)
    yield _encode_case(codec)
    yield _encode_case(Work(4, 8, 1024, 16384 if options.quick else 65536))
    if captured.present():
        yield _encode_case(Work(4, captured.HEAD_DIM, 1024, 16384, captured.NAME))
    yield _encode_case(Work(8, 128, 1024, 1))
    yield _encode_case(Work(1, 64, 4096 if options.quick else 16384, 16384), memory=True)
    if _there(["faiss"]):
        yield Case(
            name=f"rvq_encode, beam 5, {codec.name}",
            group=GROUP,
            inputs=codec.inputs,
            contenders={"pycore": _pycore(5), "faiss ResidualQuantizer": _faiss(5)},
            check=_check(5),
            tolerance=TOLERANCE,
            flops=codec.flops * (1 + 5 * 7) / 8,  # the first stage has one beam
        )
    training = {"pycore": _training(_ours)}
    if _there(["vector_quantize_pytorch"]):
        training["vector-quantize-pytorch"] = _training(_theirs)
    yield Case(
        name=f"ResidualVQ, training step, {codec.name}",
        group=GROUP,
        inputs=codec.inputs,
        contenders=training,
        check=_check(1),
        tolerance=TOLERANCE,
        flops=codec.flops,
    )


def bench_vq(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
