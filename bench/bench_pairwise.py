# SPDX-License-Identifier: Apache-2.0
"""Reductions of pairwise scores beside what a torch user would write, whole and in chunks."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from bench import inputs
from bench.case import Case, Options, Outputs, Prepare, largest_error

GROUP = "pairwise reductions"
TOLERANCE = 2e-5
CHUNK = 512  # rows of torch's chunks


def _rows(*shapes: tuple[int, ...]) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(inputs.SEED)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)


def _plain(function: Callable[..., Tensor]) -> Prepare:
    def prepare(tensors: tuple[Tensor, ...]) -> Callable[[], Outputs]:
        def run() -> Outputs:
            with torch.no_grad():
                return (function(*tensors),)

        return run

    return prepare


def _check(function: Callable[..., Tensor]) -> Callable[[tuple[Tensor, ...]], Callable[[Outputs], float]]:
    def check(tensors: tuple[Tensor, ...]) -> Callable[[Outputs], float]:
        expected = (torch.cat([function(rows.double(), tensors[1].double()) for rows in tensors[0].split(64)]),)
        return lambda outputs: largest_error(outputs, expected)

    return check


def _keops(tensors: tuple[Tensor, ...]) -> Callable[[], Outputs]:
    """A formula that is compiled for the call: with the product and the reduction, without the matrix."""
    from pykeops.torch import LazyTensor

    x, y = tensors
    scale = x.shape[-1] ** -0.5
    return lambda: (((LazyTensor(x[:, None]) * scale) | LazyTensor(y[None])).logsumexp(dim=1).reshape(-1),)


def _logsumexp(n: int, d: int) -> Case:
    from pycore import ops

    def whole(x: Tensor, y: Tensor) -> Tensor:
        return (x @ y.T / d**0.5).logsumexp(-1)

    keops: dict[str, Prepare] = {}
    if importlib.util.find_spec("pykeops") is not None and n <= 4096:  # on a CPU it takes seconds even so
        keops["pykeops"] = _keops
    return Case(
        name=f"pairwise_logsumexp forward, {n} rows by {n}, {d} channels",
        group=GROUP,
        inputs=lambda: _rows((n, d), (n, d)),
        contenders={
            "pycore": _plain(lambda x, y: ops.pairwise_logsumexp(x, y, scale=d**-0.5)),
            "torch chunked": _plain(lambda x, y: torch.cat([whole(rows, y) for rows in x.split(CHUNK)])),
            **keops,
        },
        check=_check(whole),
        tolerance=TOLERANCE,
        flops=2.0 * n * n * d,
        memory=("pycore", "torch chunked"),
    )


def _cross_entropy(n: int, d: int, classes: int) -> Case:
    from pycore import ops

    def make() -> tuple[Tensor, ...]:
        x, weight = _rows((n, d), (classes, d))
        target = torch.randint(0, classes, (n,), generator=torch.Generator().manual_seed(inputs.SEED))
        return x.requires_grad_(), (weight / d**0.5).requires_grad_(), target

    def contender(loss: Callable[..., Tensor]) -> Prepare:
        def prepare(tensors: tuple[Tensor, ...]) -> Callable[[], Outputs]:
            def run() -> Outputs:
                value = loss(*tensors)
                return (value.detach(), *torch.autograd.grad(value, tensors[:2]))

            return run

        return prepare

    def torch_loss(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    def part(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target, reduction="sum")

    def chunked(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        parts = zip(x.split(CHUNK), target.split(CHUNK), strict=True)
        losses = [checkpoint(part, rows, weight, classes, use_reentrant=False) for rows, classes in parts]
        return torch.stack(losses).sum() / x.shape[0]

    def check(tensors: tuple[Tensor, ...]) -> Callable[[Outputs], float]:
        doubles = [x.detach().double().requires_grad_() for x in tensors[:2]]
        value = chunked(*doubles, tensors[2])
        expected = (value.detach(), *torch.autograd.grad(value, doubles))
        return lambda outputs: largest_error(outputs, expected)

    return Case(
        name=f"linear_cross_entropy forward and backward, {n} rows, {d} channels, {classes} classes",
        group=GROUP,
        inputs=make,
        contenders={
            "pycore": contender(ops.linear_cross_entropy),
            "torch": contender(torch_loss),
            "torch chunked, checkpointed": contender(chunked),
        },
        check=check,
        tolerance=5e-5,
        flops=6.0 * n * d * classes,
        memory=("pycore", "torch", "torch chunked, checkpointed"),
    )


def _contrastive(n: int, d: int) -> Case:
    """Both directions of a batch, and both gradients."""
    from pycore import ops

    def whole(a: Tensor, b: Tensor) -> Tensor:
        logits, own = 20 * (a @ b.T), torch.arange(len(a))
        return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2

    def directed(a: Tensor, b: Tensor) -> Tensor:
        def part(rows: Tensor, all_rows: Tensor, own: Tensor) -> Tensor:
            return F.cross_entropy(20 * (rows @ all_rows.T), own, reduction="sum")

        own = torch.arange(len(a)).split(CHUNK)
        losses = [
            checkpoint(part, rows, y, at, use_reentrant=False)
            for x, y in ((a, b), (b, a))
            for rows, at in zip(x.split(CHUNK), own, strict=True)
        ]
        return torch.stack(losses).sum() / (2 * len(a))

    def contender(loss: Callable[[Tensor, Tensor], Tensor]) -> Prepare:
        def prepare(tensors: tuple[Tensor, ...]) -> Callable[[], Outputs]:
            def run() -> Outputs:
                value = loss(*tensors)
                return (value.detach(), *torch.autograd.grad(value, tensors))

            return run

        return prepare

    def check(tensors: tuple[Tensor, ...]) -> Callable[[Outputs], float]:
        expected = contender(whole)(tuple(x.detach().double().requires_grad_() for x in tensors))()
        return lambda outputs: largest_error(outputs, expected)

    return Case(
        name=f"contrastive_loss forward and backward, {n} pairs, {d} channels",
        group=GROUP,
        inputs=lambda: tuple(F.normalize(x, dim=1).requires_grad_() for x in _rows((n, d), (n, d))),
        contenders={
            "pycore": contender(lambda a, b: ops.contrastive_loss(a, b, scale=20.0)),
            "torch": contender(whole),
            "torch chunked, checkpointed": contender(directed),
        },
        check=check,
        tolerance=5e-5,
        flops=6.0 * n * n * d,
        memory=("pycore", "torch", "torch chunked, checkpointed"),
    )


def _faiss_there() -> bool:
    return importlib.util.find_spec("faiss") is not None


def _flat_index(k: int) -> Prepare:
    def prepare(tensors: tuple[Tensor, ...]) -> Callable[[], Outputs]:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        x, y = (rows.numpy() for rows in tensors)
        index = faiss.IndexFlatIP(y.shape[1])
        index.add(y)
        return lambda: (torch.from_numpy(index.search(x, k)[0]),)

    return prepare


def _topk(n: int, m: int, d: int, k: int) -> Case:
    from pycore import ops

    contenders = {
        "pycore": _plain(lambda x, y: ops.pairwise_topk(x, y, k)[0]),
        "torch": _plain(lambda x, y: (x @ y.T).topk(k).values),
    }
    if _faiss_there():
        contenders["faiss IndexFlatIP"] = _flat_index(k)
    return Case(
        name=f"pairwise_topk {k} of {m}, {n} rows, {d} channels",
        group=GROUP,
        inputs=lambda: _rows((n, d), (m, d)),
        contenders=contenders,
        check=_check(lambda x, y: (x @ y.T).topk(k).values),
        tolerance=TOLERANCE,
        flops=2.0 * n * m * d if n > 1 else 0.0,
        bytes=4.0 * m * d if n == 1 else 0.0,
        memory=("pycore", "torch"),
    )


def _maxsim(queries: int, documents: int) -> Case:
    from pycore import ops

    def plain(query: Tensor, document: Tensor) -> Tensor:
        return torch.einsum("qld,pmd->qplm", query, document).amax(-1).sum(-1)

    return Case(
        name=f"maxsim, {queries} queries of 32 tokens, {documents} documents of 180, 128 channels",
        group=GROUP,
        inputs=lambda: _rows((queries, 32, 128), (documents, 180, 128)),
        contenders={"pycore": _plain(ops.maxsim), "torch": _plain(plain)},
        check=_check(plain),
        tolerance=TOLERANCE,
        flops=2.0 * queries * 32 * documents * 180 * 128,
        memory=("pycore", "torch"),
    )


def _clustered(n: int, d: int) -> tuple[Tensor, ...]:
    """A thousand clusters in channels of falling variance, rotated: what embeddings are like."""
    deviations = torch.arange(1, d + 1).float().rsqrt()
    centers, noise, turn = _rows((1000, d), (n, d), (d, d))
    members = torch.randint(0, 1000, (n,), generator=torch.Generator().manual_seed(inputs.SEED))
    return ((((centers[members] + 0.5 * noise) * deviations) @ torch.linalg.qr(turn)[0]).contiguous(),)


def _kmeans(n: int, d: int, k: int, clustered: bool) -> Case:
    """Ten iterations from the same kind of start; what is compared is the sum of squared distances to the last
    centroids, which all make in the same pass. Noise has nothing that a search could leave out.
    """
    from pycore import ops

    def ours(tensors: tuple[Tensor, ...]) -> Callable[[], Outputs]:
        return lambda: (ops.kmeans(tensors[0], k, iterations=10, init="random")[2],)

    def inertia(x: Tensor, centroids: Tensor) -> Tensor:
        return ops.pairwise_topk(x, centroids, 1, score="euclidean")[0].double().sum().float()

    def plain(tensors: tuple[Tensor, ...]) -> Callable[[], Outputs]:
        (x,) = tensors

        def run() -> Outputs:
            centroids = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:k]]
            for _ in range(10):
                codes = (centroids.square().sum(1) - 2 * x @ centroids.T).argmin(1)
                counts = codes.bincount(minlength=k).clamp(min=1)
                centroids = torch.zeros_like(centroids).index_add_(0, codes, x) / counts.unsqueeze(1)
            return (inertia(x, centroids),)

        return run

    def theirs(tensors: tuple[Tensor, ...]) -> Callable[[], Outputs]:
        import faiss

        faiss.omp_set_num_threads(torch.get_num_threads())
        (x,) = tensors
        rows = x.numpy()

        def run() -> Outputs:
            parameters = faiss.SuperKMeansParameters()
            parameters.niter = 10
            clusters = faiss.SuperKMeans(d, k, parameters)
            clusters.train(rows)
            return (inertia(x, torch.from_numpy(faiss.vector_to_array(clusters.centroids)).reshape(k, d)),)

        return run

    contenders: dict[str, Prepare] = {"pycore": ours, "torch": plain}
    if _faiss_there():
        import faiss

        if hasattr(faiss, "SuperKMeans"):
            contenders["faiss SuperKMeans"] = theirs
    return Case(
        name=f"kmeans of {'clusters' if clustered else 'noise'}, {n} rows, {d} channels, {k} centroids, 10 iterations",
        group=GROUP,
        inputs=lambda: _clustered(n, d) if clustered else _rows((n, d)),
        contenders=contenders,
        check=lambda tensors: (
            lambda outputs: largest_error(outputs, (ops.kmeans(tensors[0], k, iterations=10, init="random")[2],))
        ),
        tolerance=0.1 if clustered else 0.02,  # other starts and other empty clusters
        flops=2.0 * n * d * k * 11,
    )


def cases(options: Options) -> Iterable[Case]:
    """Shapes of a contrastive batch, a vocabulary, a flat index and late interaction. CPU only."""
    if options.device != "cpu":
        return
    yield _logsumexp(4096, 128)
    if not options.quick:
        yield _logsumexp(16384, 128)
    yield _cross_entropy(*((512, 576, 8192) if options.quick else (2048, 576, 49152)))
    if not options.quick:
        yield _cross_entropy(2048, 32, 151_936)  # for its memory
    yield _contrastive(1024 if options.quick else 8192, 384)
    for rows in (1, 256):
        yield _topk(rows, 20_000 if options.quick else 200_000, 384, 10)
    yield _maxsim(8, 64 if options.quick else 512)
    for clustered in (False, True):
        yield _kmeans(8192 if options.quick else 65536, 128, 256 if options.quick else 1024, clustered)


def bench_pairwise(case: Case, measure_case: Callable[[Case], None]) -> None:
    measure_case(case)
