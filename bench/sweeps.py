# SPDX-License-Identifier: Apache-2.0
"""Sweeps of a run: cases of one group that carry an axis, and what their growth along it says."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from typing import Any


def sweeps(run: Mapping[str, Any]) -> Iterable[tuple[str, str, list[tuple[float, Mapping[str, Any]]]]]:
    """(group, axis, its points in order) of every group with more than one point."""
    groups: dict[tuple[str, str], list[tuple[float, Mapping[str, Any]]]] = {}
    for case in run["cases"]:
        if case.get("axis"):
            axis, x = case["axis"]
            groups.setdefault((case["group"], axis), []).append((x, case))
    for (group, axis), points in groups.items():
        if len(points) > 1:
            yield group, axis, sorted(points, key=lambda point: point[0])


def by_length(run: Mapping[str, Any]) -> list[str]:
    """A sentence a sweep over length: how the time of one token grows."""
    notes = []
    for group, axis, points in sweeps(run):
        subject, times = _times(points)
        chosen = [(x, t) for x, t in times if x >= 4096]
        if axis == "length" and len(chosen) > 1:
            (x0, t0), (x1, t1) = chosen[0], chosen[-1]
            growth = t1 / x1 / (t0 / x0)
            notes.append(f"{group}: {subject} takes {growth:.2f}× the time per token at {x1:.0f} as at {x0:.0f}")
    return notes


def by_density(run: Mapping[str, Any]) -> list[str]:
    """A sentence a sweep over density: the time over its share of causal attention's, of which 1 is the ideal."""
    notes = []
    for group, axis, points in sweeps(run):
        dense = [case["results"]["pycore, causal"] for _, case in points if "pycore, causal" in case["results"]]
        if axis == "density" and dense:
            subject, times = _times(points)
            whole = statistics.median(dense[0]["ms"])
            shares = ", ".join(f"{t / (x * whole):.2f} at {x:.2f}" for x, t in times)
            notes.append(f"{group}: {subject}'s time over density × that of causal attention: {shares}")
    return notes


def _times(points: list[tuple[float, Mapping[str, Any]]]) -> tuple[str, list[tuple[float, float]]]:
    """The subject and its median milliseconds."""
    subject = points[0][1]["subject"]
    return subject, [(x, statistics.median(case["results"][subject]["ms"])) for x, case in points]
