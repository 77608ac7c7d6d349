# SPDX-License-Identifier: Apache-2.0
"""A chat with SmolLM2-135M in a terminal, on the cache of your choice.

    python examples/smollm2.py                        # fetches the model, once
    python examples/chat.py --cache lambda            # type; Ctrl-D ends it
    echo "What is a staircase?" | python examples/chat.py --cache staircase

`full` is transformers' SDPA on its DynamicCache; `lambda` keeps 4 sinks and a window, at a constant size; `staircase`
keeps everything, older tokens in fewer bits; `staircase-lambda` looks at sinks and window of such a cache. The reply
comes token by token; on a terminal the last line shows tokens a second and the bytes of the cache as they go, elsewhere
stderr gets them after each reply. A turn adds its own tokens to the cache; nothing is read twice. Ctrl-C ends it at any
time, with status 130.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

try:
    import smollm2
    import torch
    from common import Parser, UserError, run_main

    from pycore import Staircase
    from pycore.integrations.transformers import LambdaCache, StaircaseCache, register
except KeyboardInterrupt:  # loading takes seconds
    sys.exit(130)

NAME = "chat"
CACHES = ("full", "lambda", "staircase", "staircase-lambda")
MOST = 2**20  # tokens in a window; room for it is made with the first message
CHUNK = 512  # tokens of a prompt that are read at once
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
END = "<|im_end|>"


class Status:
    """A line at the bottom of a terminal, below what scrolls; on anything else it is written after each reply alone."""

    def __init__(self, cache_name: str) -> None:
        self.cache_name = cache_name
        self.live = sys.stdout.isatty() and sys.stderr.isatty()
        self.rows = 0
        self.shown = 0.0

    def __enter__(self) -> Status:
        return self

    def __exit__(self, *error: object) -> None:
        if self.rows:  # the whole screen scrolls again
            sys.stdout.write(f"\x1b7\x1b[r\x1b[{self.rows};1H\x1b[2K\x1b8")
            sys.stdout.flush()

    def update(self, tokens: int, seconds: float, cache: Any, last: bool = False) -> None:
        """Shows how a reply goes, at most five times a second; `last` when it has ended."""
        now = time.monotonic()
        if not last and (not self.live or now - self.shown < 0.2):
            return
        self.shown = now
        rate = tokens / seconds if seconds else 0.0
        text = f"{self.cache_name}: {rate:.1f} tokens/s, {tokens} tokens, seen {cache.get_seq_length()}, "
        text += f"cache {smollm2.cache_bytes(cache) / 2**20:.2f} MiB"
        if not self.live:
            print(text, file=sys.stderr, flush=True)
            return
        columns, rows = shutil.get_terminal_size()
        if rows != self.rows:
            # Scrolls the line of the cursor out of the last one's way, then keeps that out of what scrolls.
            sys.stdout.write(f"\n\x1b[A\x1b7\x1b[1;{rows - 1}r\x1b8")
            self.rows = rows
        sys.stdout.write(f"\x1b7\x1b[{rows};1H\x1b[2K\x1b[7m{text[: columns - 1]}\x1b[0m\x1b8")
        sys.stdout.flush()


class Chat:
    """A model, and a cache with all that was said."""

    def __init__(self, options: argparse.Namespace) -> None:
        """Loads the model and chooses its attention."""
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[options.dtype]
        if options.quick:
            self.model, self.encode = smollm2.quick_model(dtype)
            self.decode, self.end = lambda ids: bytes(ids).decode("utf-8", "replace"), None
        else:
            self.model, tokenizer = smollm2.load(dtype, options.model)
            self.encode, self.decode = smollm2.encoder(tokenizer), tokenizer.decode
            self.end = tokenizer.convert_tokens_to_ids(END)
        self.cache = new_cache(self.model, options.cache, options.sinks, options.window)
        self.temperature, self.most = options.temperature, options.tokens
        self.random = torch.Generator().manual_seed(options.seed)
        self.waiting = self.encode(SYSTEM)  # tokens that the cache has not got yet

    @torch.inference_mode()
    def _next(self, ids: list[int]) -> int:
        """Reads tokens and draws the next one."""
        for at in range(0, len(ids), CHUNK):
            chunk = torch.tensor([ids[at : at + CHUNK]])
            logits = self.model(chunk, past_key_values=self.cache, logits_to_keep=1).logits[0, -1].double()
        if self.temperature == 0:
            return int(logits.argmax())
        below = (logits - logits.max()) / self.temperature  # 0 at the likeliest, whatever the temperature
        return int(torch.multinomial(torch.softmax(below, -1), 1, generator=self.random))

    def reply(self, message: str, status: Status) -> Iterator[str]:
        """The reply, piece by piece."""
        token = self._next(self.waiting + self.encode(TURN.format(message)))
        ids: list[int] = []
        shown, began = 0, time.monotonic()
        while token != self.end:
            ids.append(token)
            text = self.decode(ids)
            if not text.endswith("\ufffd"):  # a character whose bytes are not all there yet
                yield text[shown:]
                shown = len(text)
            if len(ids) == self.most:
                break
            token = self._next([token])
            status.update(len(ids), time.monotonic() - began, self.cache)
        status.update(len(ids), time.monotonic() - began, self.cache, last=True)
        self.waiting = self.encode(f"{END}\n") if self.end is not None else []
        if len(ids) == self.most:
            self.waiting = [token, *self.waiting]


def new_cache(model: Any, name: str, sinks: int, window: int) -> Any:
    """Chooses the model's attention and returns an empty cache."""
    from transformers import DynamicCache

    if name == "full":
        model.set_attn_implementation("sdpa")
        return DynamicCache(config=model.config)
    if name == "lambda":
        register("chat_lambda", sink_size=sinks, window_size=window)
    elif name == "staircase":
        register("chat_staircase", window_size=None)
    else:
        register("chat_staircase-lambda", sink_size=sinks, window_size=window, limit_distances=False)
    model.set_attn_implementation(f"chat_{name}")
    return LambdaCache(sinks, window) if name == "lambda" else StaircaseCache(model.config, Staircase((16, 8, 4)))


def messages() -> Iterator[str]:
    """What the user says: lines of a terminal, or all of stdin as one message."""
    if sys.stdin is None:  # closed by whoever started this
        return
    if not sys.stdin.isatty():
        if text := _text(sys.stdin.read()):
            yield text
        return
    while True:
        try:
            line = _text(input("> "))
        except EOFError:
            print()
            return
        if line:
            yield line


def _text(said: str) -> str:
    """Without what is no text: bytes that are not UTF-8."""
    return said.encode("utf-8", "replace").decode().strip()


def arguments(argv: list[str] | None) -> argparse.Namespace:
    """The command line, checked."""
    parser = Parser(prog=NAME, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", choices=CACHES, default="lambda", help="(default: %(default)s)")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that are kept (default: %(default)s)")
    parser.add_argument("--window", type=int, default=1024, help="newest tokens that are kept (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--tokens", type=int, default=512, help="longest reply (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.7, help="0 takes the likeliest (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", type=Path, default=smollm2.FOLDER, help="folder of the model (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="a random model and short replies")
    options = parser.parse_args(argv)
    options.tokens = min(options.tokens, 24) if options.quick else options.tokens
    for name, least in (("sinks", 0), ("window", 1), ("tokens", 1), ("temperature", 0), ("seed", 0)):
        if not getattr(options, name) >= least:
            parser.error(f"--{name} is {getattr(options, name)} and must be at least {least}")
    for name, most in (("sinks", MOST), ("window", MOST), ("seed", 2**63 - 1)):
        if getattr(options, name) > most:
            parser.error(f"--{name} is {getattr(options, name)} and must be at most {most}")
    return options


def run(options: argparse.Namespace) -> int:
    """Talks until the user has nothing to say."""
    if not options.quick and not smollm2.present(options.model):
        raise UserError(smollm2.missing(options.model))
    chat = Chat(options)
    with Status(options.cache) as status:
        for message in messages():
            for piece in chat.reply(message, status):
                print(piece, end="", flush=True)
            print(flush=True)
    return 0


def main(argv: list[str] | None = None) -> int:
    """Entry point."""
    try:
        return run_main(NAME, lambda: run(arguments(argv)))
    except KeyboardInterrupt:
        print()
        return 130
    except BrokenPipeError:  # nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started this may have had it ignored
    sys.exit(main())
