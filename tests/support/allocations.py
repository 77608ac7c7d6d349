# SPDX-License-Identifier: Apache-2.0
"""What a call asks torch's allocator for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def allocations(call: Callable[[], Any]) -> list[int]:
    """Bytes of every request by itself; what the profiler says of an op is less what the op has given back."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    assert profile.profiler is not None
    events = profile.profiler.kineto_results.events()
    return [event.nbytes() for event in events if event.name() == "[memory]" and event.nbytes() > 0]
