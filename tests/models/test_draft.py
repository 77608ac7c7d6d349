# SPDX-License-Identifier: Apache-2.0
"""Drafts: the table, the text of plain greedy decoding, and how many tokens a pass gives."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from pycore import BitstreamError
from pycore.models.draft import NgramTable, accepted, generate
from pycore.models.language import shipped
from tests.support.greedy import greedy

SOURCE = Path(os.__file__).read_bytes()


def test_a_table_of_a_corpus() -> None:
    """Counts, shares, order and the limit of twelve, against a dictionary."""
    texts = [list(SOURCE[:6000]), list(SOURCE[9000:9002]), [], list(range(70000, 70020)) * 2]
    count: dict[tuple[int, int], Counter[int]] = defaultdict(Counter)
    for text in texts:
        for a, b, c in zip(text, text[1:], text[2:], strict=False):
            count[a, b][c] += 1
    table = NgramTable.build(texts)
    assert table.pairs == len(count) and max(map(len, count.values())) > 12
    for pair, successors in count.items():
        total = successors.total()
        expected = sorted(successors, key=lambda token: (-successors[token], token))[:12]
        tokens, probs = table.lookup(*pair)
        assert tokens == expected
        assert probs == [max(successors[t] * 65536 // total, 1) / 65536 for t in expected]
    assert NgramTable.build([]).lookup(1, 2) == ([], [])


def test_a_table_learns_and_grows() -> None:
    table = NgramTable(1)
    for n in range(200):
        table.update([n, n + 1, n + 2, n + 3], weight=0.5)
    assert table.pairs == 201
    assert table.lookup(7, 8) == ([9], [1.0]) and table.lookup(0, 1) == ([2], [0.5])
    table.update([7, 8, 4], weight=2.0)
    assert table.lookup(7, 8) == ([4, 9], [2.0, 1.0])
    assert table.draft(7, 8, nodes=3, depth=2) == ([4, 9, 10], [-1, -1, 1])
    with pytest.raises(ValueError, match="NgramTable.update: weight is 3.5 and must be 0 to 3"):
        table.update([1, 2, 3], weight=3.5)
    with pytest.raises(ValueError, match="NgramTable.build: texts has token 2097152 and must have tokens below"):
        NgramTable.build([[1, 2, 1 << 21]])


def test_a_table_on_disk(tmp_path: Path) -> None:
    table = NgramTable.build([list(SOURCE[:3000]), [5, 6, 2**20]])
    table.update(list(SOURCE[3000:3100]))
    table.save(tmp_path / "t")
    again = NgramTable.load(tmp_path / "t")
    again.save(tmp_path / "u")
    data = (tmp_path / "t").read_bytes()
    assert data == (tmp_path / "u").read_bytes() and again.pairs == table.pairs
    for a, b in zip(SOURCE[:300], SOURCE[1:301], strict=True):
        assert table.lookup(a, b) == again.lookup(a, b)
    NgramTable().save(tmp_path / "empty")
    assert NgramTable.load(tmp_path / "empty").pairs == 0
    for at in [*range(24), *range(24, len(data), 97), len(data) - 1]:
        (tmp_path / "bad").write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
        with pytest.raises(BitstreamError, match="NgramTable.load: path "):
            NgramTable.load(tmp_path / "bad")
    for damaged in (b"", data[:-1], data + b"\0", data[:20]):
        (tmp_path / "bad").write_bytes(damaged)
        with pytest.raises(BitstreamError, match="NgramTable.load: path "):
            NgramTable.load(tmp_path / "bad")


@pytest.mark.parametrize(("nodes", "depth"), [(0, 1), (4, 4), (24, 8)])
def test_the_text_of_plain_decoding(nodes: int, depth: int) -> None:
    """Token for token, past the window, whatever the drafts were; most passes give more than one."""
    model = shipped()
    table = NgramTable.build([list(SOURCE[:20000])])
    prompt = list(SOURCE[20000:20600])
    expected = greedy(model, prompt, 90)
    drafted = generate(model, prompt, 90, table, nodes=nodes, depth=depth)
    assert drafted.tokens == expected
    assert sum(drafted.lengths) >= 90 and len(drafted.lengths) == drafted.forwards
    assert (drafted.forwards == 90) if nodes == 0 else drafted.forwards < 60


def test_near_ties_are_read_anew() -> None:
    """With a margin that every choice falls below, each is plain decoding's own."""
    model, table = shipped(), NgramTable.build([list(SOURCE[:5000])])
    prompt = list(SOURCE[5000:5100])
    drafted = generate(model, prompt, 12, table, margin=1e9)
    assert drafted.tokens == greedy(model, prompt, 12) and drafted.reread == 12


def test_short_prompts() -> None:
    model, table = shipped(), NgramTable.build([list(SOURCE[:5000])])
    for prompt in ([], [105], [105, 109]):
        assert generate(model, prompt, 10, table).tokens == greedy(model, prompt, 10)
    assert generate(model, [1], 0, table).tokens == []


def test_bytes_a_pass_on_real_text() -> None:
    """On text that the table has not seen; a table that learns gives more."""
    table = NgramTable.build([list(SOURCE[:30000])])
    rest = list(SOURCE[30000:36000])
    learning = accepted(table, rest, nodes=64)
    still = accepted(NgramTable.build([list(SOURCE[:30000])]), rest, nodes=64, adapt=0.0)
    assert sum(learning) == sum(still) == len(rest) - 2
    assert len(rest) / len(learning) > len(rest) / len(still) > 1.5
