"""What prompts have in common with what was read before."""

from __future__ import annotations

from collections.abc import Sequence


def common(a: Sequence[int], b: Sequence[int]) -> int:
    """The number of ids that both begin with."""
    least, most = 0, min(len(a), len(b))
    while least < most:
        half = (least + most + 1) // 2
        if a[least:half] == b[least:half]:
            least = half
        else:
            most = half - 1
    return least
