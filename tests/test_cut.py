"""Blocks → stages, without any process."""

import itertools

import pytest

from ddinfer.errors import UsageError
from ddinfer.parallel.cut import balance


def largest(sizes, stages):
    return max(sum(sizes[k] for k in stage) for stage in stages)


def every_cut(num_blocks, num_stages):
    for inner in itertools.combinations(range(1, num_blocks), num_stages - 1):
        starts = [0, *inner, num_blocks]
        yield [range(a, b) for a, b in itertools.pairwise(starts)]


@pytest.mark.parametrize("num_stages", range(1, 6))
@pytest.mark.parametrize(
    "sizes", [[1] * 7, [5, 1, 1, 1, 9, 2, 2], [0, 0, 3, 0, 1, 0], [100, 1, 1, 1, 1, 1, 1, 1]]
)
def test_the_largest_stage_is_as_small_as_any_cut_can_make_it(sizes, num_stages):
    found = balance(sizes, num_stages)
    assert [k for stage in found for k in stage] == list(range(len(sizes)))
    assert all(len(stage) for stage in found)
    best = min(largest(sizes, cut) for cut in every_cut(len(sizes), num_stages))
    assert largest(sizes, found) == best


def test_equal_blocks_make_equal_stages():
    assert [len(stage) for stage in balance([7] * 12, 4)] == [3, 3, 3, 3]
    assert sorted(len(stage) for stage in balance([7] * 10, 4)) == [2, 2, 3, 3]


def test_too_few_blocks_and_no_stage_are_refused_with_the_numbers():
    with pytest.raises(UsageError, match="2 blocks cannot be cut into 3 stages"):
        balance([1, 1], 3)
    with pytest.raises(UsageError, match="found 0"):
        balance([1], 0)
