# SPDX-License-Identifier: Apache-2.0
"""A tokenizer for Hugging Face transformers on `pycore.EqualInfoTable`.

Ids 0 to 2^bits - 1 are the table's tokens; special tokens follow. A table's string is any bytes, so a token is shown
with printable ASCII as it is and every other byte b, as well as "<", as chr(256 + b): no token can be mistaken for a
special one in "<...>".
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from typing import Any

from pycore.coding.arithmetic_coding_table import EqualInfoTable

try:
    from transformers import PreTrainedTokenizer
except ImportError as error:
    raise ImportError(
        "pycore.integrations.equal_info needs transformers 4.57 or newer: run `pip install 'transformers>=4.57'`."
    ) from error

__all__ = ["EqualInfoTokenizer"]

VOCAB_FILES_NAMES = {"vocab_file": "table.pcei"}

_SHOWN = {b: chr(b) if 33 <= b <= 126 and b != ord("<") else chr(256 + b) for b in range(256)}
_HIDDEN = {character: b for b, character in _SHOWN.items()}


class EqualInfoTokenizer(PreTrainedTokenizer):  # type: ignore[misc, unused-ignore]
    """Text as UTF-8, cut into the strings of an `EqualInfoTable`.

    Args:
        vocab_file: what `EqualInfoTable.save` wrote; `save_pretrained` copies it, so `from_pretrained` works.
        parse: "longest" or "optimal", as for `EqualInfoTable.encode`.
        errors: what `decode` does with bytes that are no UTF-8, as for `bytes.decode`. A token may end inside a
            character, so single tokens are often such bytes.
        **kwargs: as for `transformers.PreTrainedTokenizer`. Decoding gives back the very text unless
            clean_up_tokenization_spaces or spaces_between_special_tokens asks for another.

    Raises:
        BitstreamError: the file is no table, or a damaged one.

    Example:
        >>> table.save("table.pcei")
        >>> tokenizer = EqualInfoTokenizer("table.pcei")
        >>> batch = tokenizer(["some text", "more"], padding=True, return_tensors="pt")
    """

    vocab_files_names = VOCAB_FILES_NAMES
    model_input_names = ["input_ids", "attention_mask"]  # noqa: RUF012 - the base class's attribute

    def __init__(
        self,
        vocab_file: str | os.PathLike[str],
        *,
        parse: str = "longest",
        errors: str = "replace",
        bos_token: str | None = "<s>",
        eos_token: str | None = "</s>",
        pad_token: str | None = "<pad>",
        **kwargs: Any,
    ) -> None:
        if parse not in ("longest", "optimal"):
            raise ValueError(f"EqualInfoTokenizer: parse is {parse!r} and must be 'longest' or 'optimal'")
        self.vocab_file = os.fspath(vocab_file)
        self.table = EqualInfoTable.load(self.vocab_file)
        self.parse, self.errors = parse, errors
        self._strings = self.table.strings
        self._shown = ["".join([_SHOWN[b] for b in string]) for string in self._strings]
        self._ids = {shown: i for i, shown in enumerate(self._shown)}
        kwargs.setdefault("clean_up_tokenization_spaces", False)
        super().__init__(
            parse=parse, errors=errors, bos_token=bos_token, eos_token=eos_token, pad_token=pad_token, **kwargs
        )

    @property
    def vocab_size(self) -> int:
        """Tokens of the table, special ones not counted."""
        return len(self.table)

    def get_vocab(self) -> dict[str, int]:
        """Every token as it is shown, special ones included, and its id."""
        return {**self._ids, **self.added_tokens_encoder}

    def _tokenize(self, text: str, **kwargs: Any) -> list[str]:
        return [self._shown[i] for i in self.table.encode(text.encode(), parse=self.parse).tolist()]

    def _convert_token_to_id(self, token: str) -> int | None:
        return self._ids.get(token)

    def _convert_id_to_token(self, index: int) -> str:
        self._check_id(index)
        return self._shown[index]

    def _check_id(self, index: int) -> None:
        if not 0 <= index < len(self._shown):
            raise IndexError(
                f"EqualInfoTokenizer: id is {index} and must be one of the table's, 0 to {len(self._shown) - 1}, or of "
                "an added token"
            )

    def convert_tokens_to_string(self, tokens: list[str]) -> str:
        """The text of tokens that `tokenize` gave, and of special and added ones, which stand for themselves."""
        parts = (
            token.encode() if token not in self._ids else bytes(_HIDDEN[character] for character in token)
            for token in ([tokens] if isinstance(tokens, str) else tokens)
        )
        return b"".join(parts).decode(errors=self.errors)

    def _decode(
        self,
        token_ids: int | Sequence[int],
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
        spaces_between_special_tokens: bool = False,
        **kwargs: Any,
    ) -> str:
        """By ids and not, as the base class does it, by tokens: an added token may look like one of the table's."""
        skipped = set(self.all_special_ids) if skip_special_tokens else set()
        parts = [b""]  # text and added tokens in turn
        for index in map(int, [token_ids] if isinstance(token_ids, int) else token_ids):
            if index in skipped:
                continue
            added = self._added_tokens_decoder.get(index)
            if added is not None:
                parts += [added.content.encode(), b""]
            else:
                self._check_id(index)
                parts[-1] += self._strings[index]
        if spaces_between_special_tokens:
            text = " ".join(part.decode(errors=self.errors) for part in parts if part)
        else:
            text = b"".join(parts).decode(errors=self.errors)
        clean = (
            self.clean_up_tokenization_spaces if clean_up_tokenization_spaces is None else clean_up_tokenization_spaces
        )
        return self.clean_up_tokenization(text) if clean else text

    def save_vocabulary(self, save_directory: str, filename_prefix: str | None = None) -> tuple[str]:
        """Copies the table's file into a folder; `save_pretrained` calls this."""
        name = f"{filename_prefix}-" if filename_prefix else ""
        path = os.path.join(save_directory, name + VOCAB_FILES_NAMES["vocab_file"])
        if os.path.abspath(path) != os.path.abspath(self.vocab_file):
            shutil.copyfile(self.vocab_file, path)
        return (path,)
