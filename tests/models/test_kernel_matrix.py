# SPDX-License-Identifier: Apache-2.0
"""Every model's kernels in one table, every family in more than one model, and how a model shows a wrong kernel.

`lmzip` and `draft` have their rows, and the files that wrong kernels make unreadable, in test_models_kernels.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

import pycore
from pycore import BitstreamError, Staircase
from pycore.models.bytelm import Bytelm, BytelmConfig, tokens_from_bytes
from pycore.models.codec import Codec, CodecConfig
from pycore.models.codec_audio import synthetic_vowels
from pycore.models.codec_file import pack, unpack
from pycore.models.draft import NgramTable, generate
from pycore.models.language import ByteModel, shipped
from pycore.models.language_ngram import NgramByteModel
from pycore.models.language_staircase import StaircaseByteModel
from pycore.models.lmzip import compress, decompress
from pycore.models.memory import BottleneckClassifier, codebook_loss, learn_codebooks, with_codebooks
from pycore.schedules import Lambda, Probabilistic
from tests.models.test_models_kernels import (
    FORBIDDEN,
    MATRIX,
    TEXT,
    Called,
    packed_with_counts,
    sink_dropped,
    wrong_linear,
)

ROOT = Path(__file__).parents[2]
FAMILIES = ("arithmetic_coding", "attention", "linear", "ngram", "pairwise", "staircase", "vq")
LADDER: dict[str, Any] = {"ladder": (16, 8, 4), "step": 64}


def family_of() -> dict[str, str]:
    """The family of each op, by the file that registers it."""
    found = {}
    for path in sorted((ROOT / "csrc" / "torch").glob("*.cpp")):
        family = [name for name in FAMILIES if path.stem == name or path.stem.startswith(f"{name}_")]
        for op in re.findall(r'm\.def\(\s*"(\w+)\(', path.read_text()):
            found[op] = family[0] if family else "library"
    return found


FAMILY = family_of()
TOKENS = tokens_from_bytes(TEXT)[None]


@functools.cache
def codec() -> Codec:
    torch.manual_seed(0)
    made = Codec(CodecConfig(hop=24, quantizers=3, codes=30, layers=2, dim=32, heads=2, window=20, position="alibi"))
    for seed in range(3):
        made(synthetic_vowels(1.0, seed=seed)[None])
    with torch.no_grad():  # away from even distributions, so that differences show
        for head in made.code_model.heads:
            head.weight.mul_(20)
    return made.eval()


@functools.cache
def codes() -> Tensor:
    return codec().encode(synthetic_vowels(0.25, seed=9))


@functools.cache
def packed(ladder: bool) -> bytes:
    return pack(codec(), codes(), **(LADDER if ladder else {}))


@functools.cache
def bytelm() -> Bytelm:
    torch.manual_seed(0)
    return Bytelm(BytelmConfig(position="alibi"))


@functools.cache
def coded() -> Any:
    made = with_codebooks(shipped().model, 16, k=2)
    learn_codebooks(made, [TOKENS], iterations=3)
    return made


@functools.cache
def on_staircase() -> StaircaseByteModel:
    return StaircaseByteModel(shipped().model, Staircase((16, 8, 4), step=64), window_size=200)


@functools.cache
def packed_on_staircase() -> bytes:
    return compress(TEXT, on_staircase())


@functools.cache
def classifier() -> tuple[BottleneckClassifier, Tensor, Tensor]:
    """Three clouds of points, learned."""
    torch.manual_seed(0)
    classes = torch.arange(3).repeat_interleave(40)
    x = torch.randn(3, 16)[classes] * 3 + torch.randn(120, 16) * 0.3
    made = BottleneckClassifier(16, 3, books=8, keys=8, key_dim=4)
    made.learn_keys(x, epochs=3, batch_size=40)
    optimizer = torch.optim.SGD(made.parameters(), lr=10.0)
    for _ in range(20):
        optimizer.zero_grad()
        functional.cross_entropy(made(x), classes).backward()
        optimizer.step()
    return made, x, classes


def steps(caches: Any) -> None:
    """A chunk and then tokens one by one."""
    with torch.no_grad():
        bytelm()(TOKENS[:, :200], caches=caches)
        for i in range(200, 204):
            bytelm()(TOKENS[:, i : i + 1], caches=caches)


def read(**options: Any) -> Tensor:
    with torch.no_grad():
        return bytelm()(TOKENS, **options)


def learned_heads() -> None:
    learn_codebooks(with_codebooks(bytelm(), 16, k=1), [TOKENS], iterations=2)


def pass_of_coded() -> None:
    model = with_codebooks(bytelm(), 16, k=2)
    (model.loss(TOKENS[:, :-1], TOKENS[:, 1:]) + codebook_loss(model)).backward()  # type: ignore[operator]


@functools.cache
def fresh_keys() -> tuple[BottleneckClassifier, Tensor]:
    return BottleneckClassifier(16, 3, books=2, keys=8, key_dim=4), torch.randn(64, 16)


def learned_keys() -> None:
    model, x = fresh_keys()
    model.learn_keys(x, epochs=1, batch_size=32)


BODY = {"invariant_linear", "rms_norm"}
LEARNING = BODY | {"invariant_linear_backward", "rms_norm_backward", "attention", "attention_backward"}
LOSS = LEARNING | {"pairwise_logsumexp_gradients"}
CODES = BODY | {"rvq_decode", "attention"}
RING, STAIRS = {"lambda_cache_append", "attention_append"}, {"staircase_cache_append", "staircase_attention"}
CODER = {"quantize_cdf"}
MORE: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "bytelm": (read, BODY | {"attention"}),
    "bytelm, Λ": (lambda: read(schedule=Lambda(4, 64)), BODY | {"attention"}),
    "bytelm, probabilistic": (
        lambda: read(schedule=Probabilistic(torch.tensor([1.0, 0.5]), 7, block_size=16)),
        BODY | {"attention", "attention_blocks"},
    ),
    "bytelm on a cache": (lambda: steps(bytelm().caches(Lambda(4, 64))), BODY | RING | {"attention"}),
    "bytelm on a staircase": (
        lambda: steps(bytelm().staircase_caches(Staircase(step=64), Lambda(4, 64))),
        BODY | STAIRS,
    ),
    "bytelm learns": (lambda: bytelm().loss(TOKENS[:, :-1], TOKENS[:, 1:]).backward(), LOSS),
    "lmzip compress on a staircase": (lambda: compress(TEXT, on_staircase()), BODY | STAIRS | CODER),
    "lmzip decompress on a staircase": (
        lambda: decompress(packed_on_staircase(), on_staircase()),
        BODY | STAIRS | CODER,
    ),
    "codec encode": (lambda: codec().encode(synthetic_vowels(0.1)), {"invariant_linear", "rvq_encode"}),
    "codec decode": (lambda: codec().decode(codes()), {"invariant_linear", "rvq_decode"}),
    "codec to_bytes": (lambda: codec().to_bytes(codes()), CODES | {"ac_encode_logits"}),
    "codec pack": (lambda: pack(codec(), codes()), CODES | {"lambda_cache_append"} | CODER),
    "codec unpack": (lambda: unpack(codec(), packed(False)), CODES | {"attention_append"} | CODER),
    "codec pack on a staircase": (lambda: pack(codec(), codes(), **LADDER), CODES | STAIRS | CODER),
    "codec unpack on a staircase": (lambda: unpack(codec(), packed(True)), CODES | STAIRS | CODER),
    "codec learns": (
        lambda: codec().code_model.loss(codes()[None]).backward(),
        LOSS | {"rvq_decode", "vq_statistics"},
    ),
    "memory, a pass with codebooks": (pass_of_coded, LOSS | {"layer_norm", "vq_encode", "rvq_decode", "vq_statistics"}),
    "memory, codebooks learned": (
        learned_heads,
        BODY | {"attention", "pairwise_topk", "pairwise_distances_at", "vq_statistics"},
    ),
    "memory, keys learned": (learned_keys, {"vq_encode", "rvq_decode", "vq_statistics"}),
    "memory, classes": (lambda: classifier()[0].codes(classifier()[1]), {"vq_encode", "rvq_decode"}),
}
# What stands beside a kernel without taking its place: draws of kmeans++, the random projections of a bottleneck.
BESIDE = {"memory, codebooks learned": {"searchsorted"}, "memory, keys learned": {"bmm"}, "memory, classes": {"bmm"}}


@functools.cache
def called(name: str) -> set[str]:
    """The ops of a row, once everything that they are given is there."""
    run, _ = (MATRIX | MORE)[name]
    for prepare in (lambda: packed(True), lambda: packed(False), packed_on_staircase, classifier, fresh_keys, bytelm):
        prepare()
    if name not in MORE:
        run()  # which keeps a file of its own
    with Called() as mode:
        run()
    return set(mode.names)


@pytest.mark.parametrize("name", MORE)
def test_the_kernels_of_a_model(name: str) -> None:
    names = called(name)
    assert {x.removeprefix("pycore::") for x in names if x.startswith("pycore::")} == MORE[name][1]
    torchs = {x.removeprefix("aten::") for x in names if not x.startswith("pycore::")}
    instead = {x for x in torchs if any(part in x for part in FORBIDDEN)}
    assert instead == BESIDE.get(name, set()), torchs


def test_every_family_is_in_more_than_one_model() -> None:
    users: dict[str, set[str]] = {family: set() for family in FAMILIES}
    for name in MATRIX | MORE:
        for op in called(name):
            if op.startswith("pycore::"):
                users[FAMILY[op.removeprefix("pycore::")]].add(re.split(r"[ ,]", name)[0])
    assert all(len(models) >= 2 for models in users.values()), users
    assert users["staircase"] >= {"bytelm", "lmzip", "codec"} and users["vq"] >= {"codec", "memory"}
    assert users["attention"] >= {"bytelm", "lmzip", "draft", "codec"} and users["ngram"] == {"draft", "lmzip"}


def test_streams_are_the_native_coders(monkeypatch: pytest.MonkeyPatch) -> None:
    """The coder of one symbol after another is a class of `pycore.native`, which no dispatch mode sees."""
    asked: list[str] = []

    class Counted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, *args: Any, **named: Any) -> Any:
            asked.append(self.name)
            return getattr(pycore.native, self.name)(*args, **named)

    for name in ("ArithmeticEncoder", "ArithmeticDecoder"):
        monkeypatch.setattr(f"pycore.models.codec_file.{name}", Counted(name))
    assert torch.equal(unpack(codec(), pack(codec(), codes())).codes, codes())
    assert asked == ["ArithmeticEncoder", "ArithmeticDecoder"]


# ---- a kernel made wrong, and what sees it ---------------------------------------------------------------------------


class Wrong(TorchDispatchMode):
    """An op whose result is changed on the way out."""

    def __init__(self, op: str, change: Callable[..., Any]) -> None:
        super().__init__()
        self.op, self.change, self.times = op, change, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.name().partition(".")[0] != f"pycore::{self.op}":
            return result
        self.times += 1
        return self.change(result, *args)


def next_code(codes: Tensor, x: Tensor, books: Tensor, *_: Any) -> Tensor:
    """Off by one."""
    return torch.where(codes < 0, codes, (codes + 1) % books.shape[-2])


def next_row(result: tuple[Tensor, Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return result[0], result[1].roll(1, -2)


def one_row_bent(result: tuple[Tensor, ...], query: Tensor, *_: Any) -> tuple[Tensor, ...]:
    """A kernel of its own for one query, with another order of sums."""
    return (result[0] * (1 + 2.0**-8), *result[1:]) if query.shape[2] == 1 else result


def shifted(cdf: Tensor, *_: Any) -> Tensor:
    """One entry moves by one, where it is asked for a code after the other."""
    if cdf.shape[0] == 1:
        cdf[..., 10:12] += 1
    return cdf


def wrong_successor(result: tuple[Tensor, Tensor], *_: Any) -> tuple[Tensor, Tensor]:
    return torch.where(result[0] < 0, result[0], (result[0] + 1) % 256), result[1]


def sound_is_heard() -> None:
    sound = synthetic_vowels(0.25, seed=9)
    decoded = codec().decode(codec().encode(sound), length=len(sound))
    assert (decoded - sound).square().sum() < 0.8 * sound.square().sum()


def classes_are_told_apart() -> None:
    model, x, classes = classifier()
    assert (model(x).argmax(1) == classes).float().mean() > 0.95


def heads_mean_what_they_say() -> None:
    """Codes learned on a text are nearer to what its heads say than codes that are drawn."""
    drawn, learned = with_codebooks(shipped().model, 16, k=1), with_codebooks(shipped().model, 16, k=1)
    learn_codebooks(learned, [TOKENS], iterations=5)
    with torch.no_grad():
        distances = []
        for model in (drawn, learned):
            model(TOKENS)
            distances.append(float(codebook_loss(model)))
    assert distances[1] < 0.4 * distances[0]


def codes_come_back(ladder: bool) -> None:
    assert torch.equal(unpack(codec(), packed(ladder)).codes, codes())


def text_comes_back() -> None:
    assert decompress(packed_on_staircase(), on_staircase()) == TEXT


def counts_come_back() -> None:
    """The text's own counts, by which it was packed one chunk at a time, give it back a byte at a time."""
    model = NgramByteModel(shipped())
    assert decompress(packed_with_counts(), model) == TEXT


def drafts_are_accepted() -> None:
    drafted = generate(shipped(), list(TEXT), 20, NgramTable.build([list(TEXT)]), nodes=8)
    assert drafted.forwards <= 14


def loss_is_that_of_the_logits(model: Any, inputs: tuple[Tensor, ...], targets: Tensor) -> None:
    with torch.no_grad():
        expected = functional.cross_entropy(model(*inputs).flatten(0, -2), targets.flatten())
        torch.testing.assert_close(model.loss(*inputs, *([targets] if model is bytelm() else [])), expected)


CHECKS: dict[str, Callable[[], None]] = {
    "codec": sound_is_heard,
    "codec files": lambda: codes_come_back(False),
    "codec files on a staircase": lambda: codes_come_back(True),
    "memory, classes": classes_are_told_apart,
    "memory, heads": heads_mean_what_they_say,
    "lmzip on a staircase": text_comes_back,
    "lmzip with counts": counts_come_back,
    "draft": drafts_are_accepted,
    "bytelm's loss": lambda: loss_is_that_of_the_logits(bytelm(), (TOKENS[:, :-1],), TOKENS[:, 1:]),
    "codec's loss": lambda: loss_is_that_of_the_logits(codec().code_model, (codes()[None],), codes()),
}
MUTATIONS: list[tuple[str, str, Callable[..., Any]]] = [
    ("codec", "rvq_encode", next_code),
    ("codec", "rvq_decode", lambda out, *_: out.roll(1, -1)),
    ("codec", "invariant_linear", lambda out, *_: out.roll(1, -1)),
    ("codec files", "rvq_decode", lambda out, *_: out * (1 + 2.0**-20) if out.shape[-2] == 1 else out),
    ("codec files", "attention_append", one_row_bent),
    ("codec files", "rms_norm", lambda out, *_: out * (1 + 2.0**-20) if out.shape[-2] == 1 else out),
    ("codec files", "quantize_cdf", shifted),
    ("codec files on a staircase", "staircase_attention", one_row_bent),
    ("memory, classes", "vq_encode", next_code),
    ("memory, heads", "vq_encode", next_code),
    ("memory, heads", "pairwise_topk", next_row),
    ("lmzip on a staircase", "staircase_attention", one_row_bent),
    ("lmzip with counts", "ngram_lookup", wrong_successor),
    ("draft", "ngram_draft", wrong_successor),
    ("bytelm's loss", "pairwise_logsumexp", lambda out, *_: (out[0] + 0.01, *out[1:])),
    ("codec's loss", "pairwise_logsumexp", lambda out, *_: (out[0] + 0.01, *out[1:])),
]


@pytest.mark.parametrize("check, op, change", MUTATIONS, ids=lambda x: x if isinstance(x, str) else x.__name__)
def test_a_wrong_kernel_is_seen_by_its_models(check: str, op: str, change: Callable[..., Any]) -> None:
    CHECKS[check]()
    with Wrong(op, change) as wrong, pytest.raises((AssertionError, BitstreamError)):
        CHECKS[check]()
    assert wrong.times > 0
    CHECKS[check]()


@pytest.mark.parametrize("mutation", [sink_dropped, wrong_linear])
def test_a_wrong_kernel_is_a_codec_file_that_is_refused(
    mutation: Callable[[pytest.MonkeyPatch], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    codes_come_back(False)
    mutation(monkeypatch)
    with pytest.raises(BitstreamError):
        codes_come_back(False)
    monkeypatch.undo()
    codes_come_back(False)


def test_coded_heads_write_readable_files() -> None:
    """The codes of a step are those of a chunk: a text goes through vq, Λ and the coder, and comes back."""
    model = ByteModel(coded(), window_size=64)
    data = compress(TEXT, model, chunk=77)
    assert decompress(data, model) == TEXT and data[5] == 1, "coded, not stored"
    with Wrong("vq_encode", lambda out, x, books, *_: (out + (x.shape[1] == 1)) % books.shape[-2]):
        with pytest.raises(BitstreamError):
            decompress(data, model)
