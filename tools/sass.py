# SPDX-License-Identifier: Apache-2.0
"""Reads what `cuobjdump -sass` prints: instructions, the loops they form, and the names of kernels.

A loop is a cycle of the flow graph and not what lies between a branch and an earlier address: ptxas moves unlikely code
to a kernel's end, whence it jumps back. What only a diverged warp runs (the targets of BRA.DIV) is in no loop.
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import NamedTuple

_LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)([^;]*);|\s+Function : (\S+)|identifier = (.*)")
_ATOMIC = re.compile(r"(SU|UBLK|UTMA)?(ATOM|RED)(G|S|AS)?")
_TYPES = dict(b="bool", c="char", h="unsigned char", s="short", t="unsigned short", i="int", j="unsigned int", l="long",
              m="unsigned long", x="long long", y="unsigned long long", f="float", d="double")  # fmt: skip


class Instruction(NamedTuple):
    """One line of a disassembly."""

    address: int
    guard: str
    opcode: str
    operands: str

    @property
    def kind(self) -> str:
        """What the opcode begins with; LDS has its width (32 for less), EX2 is apart, ATOM is every atomic."""
        base, *modifiers = self.opcode.split(".")
        if base == "LDS":
            return f"LDS.{next((width for width in ('64', '128') if width in modifiers), '32')}"
        if base == "MUFU" and "EX2" in modifiers:
            return "MUFU.EX2"
        return "ATOM" if _ATOMIC.fullmatch(base) else base


def functions(lines: Iterable[str]) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Source, mangled name and instructions, NOPs left out, of each function; one at a time, for there are many."""
    source = name = ""
    code: list[Instruction] = []
    for line in lines:
        match = _LINE.match(line)
        if match is None:
            continue
        address, guard, opcode, operands, function, identifier = match.groups()
        if opcode:
            if opcode != "NOP":
                code.append(Instruction(int(address, 16), guard or "", opcode, operands.strip()))
            continue
        if name:
            yield source, name, code
        source, name, code = identifier or source, function or "", []
    if name:
        yield source, name, code


def flow(code: Sequence[Instruction]) -> tuple[list[Sequence[Instruction]], list[set[int]]]:
    """The basic blocks and, for each, the blocks that may follow it."""
    index = {instruction.address: i for i, instruction in enumerate(code)}
    leaders, diverged, transfers = {0}, set(), {}
    for i, (_, guard, opcode, operands) in enumerate(code):
        base = opcode.partition(".")[0]
        if base not in ("BRA", "CALL", "BRX", "EXIT", "RET"):
            continue
        address = re.search(r"0x([0-9a-f]+)$", operands) if base in ("BRA", "CALL") else None
        target = {index[int(address[1], 16)]} if address and int(address[1], 16) in index else set()
        leaders |= target | {i + 1}
        if opcode.startswith("BRA.DIV"):
            diverged |= target
            continue
        # BRA.CONV is taken by a warp that has not diverged. On sm_80 a CALL with a guard may be how a loop is left;
        # what really is a subroutine ends in RET, so that the edge to it adds to no loop.
        falls = base in ("CALL", "BRX") or bool(guard) or (base == "BRA" and "," in operands and ".CONV" not in opcode)
        transfers[i] = (target, falls)
    starts = sorted(leaders - {len(code)})
    block_at = {start: block for block, start in enumerate(starts)}
    blocks = [code[start:end] for start, end in zip(starts, [*starts[1:], len(code)], strict=True)]
    edges = []
    for block, start in enumerate(starts):
        target, falls = transfers.get(start + len(blocks[block]) - 1, (set(), True))
        edges.append({block_at[i] for i in target} | ({block + 1} if falls and block + 1 < len(blocks) else set()))
    # A jump table is not printed: its targets are the next block and those behind it that nothing else leads to.
    orphans = set(range(1, len(blocks))).difference(*edges, (block_at[i] for i in diverged))
    for block, body in enumerate(blocks):
        if body and body[-1].opcode == "BRX":
            edges[block] |= {orphan for orphan in orphans if orphan > block}
    return blocks, edges


def postorder(roots: Iterable[int], nodes: Collection[int], edges: Sequence[set[int]]) -> list[int]:
    """The blocks among `nodes` that the roots lead to, each after those it leads to itself, cycles aside."""
    order, left = [], set(nodes)
    for root in roots:
        path = [root] if root in left else []
        while path:
            left.discard(path[-1])
            step = next(iter(edges[path[-1]] & left), None)
            if step is None:
                order.append(path.pop())
            else:
                path.append(step)
    return order


def components(nodes: Collection[int], edges: Sequence[set[int]], back: Sequence[set[int]]) -> Iterator[set[int]]:
    """Strongly connected components among `nodes`: Kosaraju's two passes, `back` being the edges turned round."""
    left = set(nodes)
    for root in reversed(postorder(nodes, nodes, edges)):
        found: set[int] = set()
        fresh = {root} & left
        while fresh:
            found |= fresh
            left -= fresh
            fresh = left & set().union(*(back[node] for node in fresh))
        if found:
            yield found


def loops(edges: Sequence[set[int]]) -> Iterator[tuple[int, set[int]]]:
    """Header and blocks of every loop, the nested ones too: a component, and those left without its header."""
    reached = set(postorder([0], range(len(edges)), edges))
    back: list[set[int]] = [set() for _ in edges]
    for block in reached:
        for following in edges[block]:
            back[following].add(block)
    pending = [reached]
    while pending:
        for found in components(pending.pop(), edges, back):
            header = min((block for block in found if back[block] - found), default=min(found))
            if len(found) > 1 or header in edges[header]:
                yield header, found
                pending.append(found - {header})


def shortest_round(
    header: int, body: set[int], edges: Sequence[set[int]], work: Sequence[int], size: Sequence[int]
) -> list[int]:
    """The blocks of one way round a loop, of those with most `work` the one of least `size`; loops within turn once."""
    order = postorder([header], body, edges)[::-1]
    rank = {block: i for i, block in enumerate(order)}
    best: dict[int, tuple[int, int, int]] = {header: (work[header], -size[header], header)}  # and the block before
    for block in order:
        for following in edges[block] & body:
            if rank[following] > rank[block]:
                way = (best[block][0] + work[following], best[block][1] - size[following], block)
                best[following] = max(best.get(following, way), way)
    path = [max((block for block in order if header in edges[block]), key=lambda block: best[block])]
    while path[-1] != header:
        path.append(best[path[-1]][2])
    return path[::-1]


def short_names(mangled: Sequence[str]) -> list[str]:
    """`mma_forward<bfloat16, 128, 2, false>`: without namespaces, parameters and the _kernel they all end in."""
    try:
        done = subprocess.run(["c++filt"], input="\n".join(mangled), capture_output=True, text=True, check=True)
        names = [_trimmed(line) for line in done.stdout.splitlines()]
    except (OSError, subprocess.CalledProcessError):
        names = [parsed_name(name) for name in mangled]
    return [re.sub(r"\bB?Float16\b", lambda m: m[0].lower(), re.sub(r"_kernel\b", "", name)) for name in names]


def _trimmed(demangled: str) -> str:
    plain = re.sub(r"\b(\w+::)+", "", demangled.replace("(anonymous namespace)::", ""))
    plain = re.sub(r"\(\w+\)(?=-?\d)", "", plain)  # the type of an enumerator
    match = re.match(r"(?:[\w ]+ )?(\w+(?:<.*>)?)\(", plain)
    return match[1] if match else plain


def parsed_name(mangled: str) -> str:
    """A demangled name without namespaces and parameters, where template arguments are types by name and constants."""

    def parse(at: int) -> tuple[str, int]:
        if mangled[at] == "N":
            name, at = "", at + 1
            while mangled[at] != "E":
                part, at = parse(at)
                name = part or name
            return name, at + 1
        if mangled[at] == "L":
            start = parse(at + 1)[1]
            end = mangled.index("E", start)
            value = mangled[start:end].replace("n", "-")
            return (("false", "true")[int(value)] if mangled[at + 1] == "b" else value), end + 1
        if substitution := re.compile(r"St|S\w*?_").match(mangled, at):
            return "", substitution.end()
        if length := re.compile(r"\d+").match(mangled, at):
            end = length.end() + int(length[0])
            name, at = mangled[length.end() : end], end
            if mangled[at : at + 1] != "I":
                return name, at
            arguments, at = [], at + 1
            while mangled[at] != "E":
                argument, at = parse(at)
                arguments.append(argument or "?")
            return f"{name}<{', '.join(arguments)}>", at + 1
        return _TYPES[mangled[at]], at + 1

    try:
        return parse(2)[0] if mangled.startswith("_Z") else mangled
    except (LookupError, ValueError):
        return mangled
