"""Blocks → stages, balanced by their sizes."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from torch import nn

from ddinfer.errors import UsageError
from ddinfer.parallel.blocks import module_bytes
from ddinfer.parallel.flow import PlanError


def balance(sizes: Sequence[float], num_stages: int) -> list[range]:
    """Cut blocks into contiguous stages so that the largest stage is as small as possible.

    Every stage gets at least one block. Among cuts with an equally large largest stage the
    evener one is taken.

    Args:
        sizes: of the blocks, in the order they run (bytes, seconds: any one unit).

    Returns:
        One range of block numbers per stage.

    Raises:
        UsageError: fewer blocks than stages.
    """
    num_blocks = len(sizes)
    if num_stages < 1:
        raise UsageError(f"the number of stages must be at least 1, found {num_stages}")
    if num_blocks < num_stages:
        raise UsageError(
            f"{num_blocks} blocks cannot be cut into {num_stages} stages: every stage needs one"
        )
    total = [0.0]  # total[i] = size of the first i blocks
    for size in sizes:
        total.append(total[-1] + size)

    # best[i]: (largest stage, sum of squares, where the stages begin) of the first i blocks
    best: list[tuple[float, float, tuple[int, ...]] | None] = [(0.0, 0.0, ())]
    best += [None] * num_blocks
    for stage in range(num_stages):
        after: list[tuple[float, float, tuple[int, ...]] | None] = [None] * (num_blocks + 1)
        for end in range(stage + 1, num_blocks - (num_stages - stage - 1) + 1):
            choices = []
            for begin in range(stage, end):
                before = best[begin]
                if before is not None:
                    here = total[end] - total[begin]
                    largest, squares, begins = before
                    choices.append((max(largest, here), squares + here * here, (*begins, begin)))
            after[end] = min(choices) if choices else None
        best = after
    found = best[num_blocks]
    assert found is not None  # num_blocks >= num_stages
    begins = (*found[2], num_blocks)
    return [range(a, b) for a, b in itertools.pairwise(begins)]


def block_stages(
    model: nn.Module,
    blocks: Sequence[str],
    num_stages: int,
    sizes: Sequence[float] | None = None,
) -> list[range]:
    """Which blocks each stage has.

    Args:
        sizes: what to balance, per block (default: bytes).

    Raises:
        PlanError: too few blocks.
    """
    if len(blocks) < num_stages:
        raise PlanError(
            f"{type(model).__name__} has {len(blocks)} blocks, too few for {num_stages} ranks"
        )
    if sizes is None:
        sizes = [module_bytes(model.get_submodule(block)) for block in blocks]
    return balance(sizes, num_stages)
