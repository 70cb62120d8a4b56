"""Pure arithmetic, swept over grids of sizes without any process."""

import itertools

import pytest

from ddinfer.distributed.partition import (
    contiguous_slice,
    cut_batches,
    slice_of_batches,
)

GRID = list(itertools.product(range(0, 40), range(1, 12)))


def test_slices_cover_every_item_once_in_order():
    for num_items, num_parts in GRID:
        slices = [contiguous_slice(num_items, num_parts, p) for p in range(num_parts)]
        assert list(itertools.chain(*slices)) == list(range(num_items))


def test_slice_sizes_differ_by_at_most_one_and_larger_ones_come_first():
    for num_items, num_parts in GRID:
        sizes = [len(contiguous_slice(num_items, num_parts, p)) for p in range(num_parts)]
        assert max(sizes) - min(sizes) <= 1
        assert sizes == sorted(sizes, reverse=True)


def test_more_ranks_than_items_leaves_the_last_ones_empty():
    assert [list(contiguous_slice(2, 4, p)) for p in range(4)] == [[0], [1], [], []]


@pytest.mark.parametrize("arguments", [(-1, 2, 0), (3, 0, 0), (3, 2, 2), (3, 2, -1)])
def test_impossible_slices_are_refused(arguments):
    with pytest.raises(ValueError, match="cannot take part"):
        contiguous_slice(*arguments)


def test_batches_cover_all_items_with_equal_keys_and_bounded_size():
    for pattern in itertools.product("ab", repeat=7):
        for batch_size in (1, 2, 3, 10):
            batches = cut_batches(pattern, batch_size)
            assert list(itertools.chain(*batches)) == list(range(7))
            assert all(1 <= len(b) <= batch_size for b in batches)
            assert all(len({pattern[k] for k in b}) == 1 for b in batches)


def test_batches_are_as_large_as_they_may_be():
    for pattern in itertools.product("ab", repeat=7):
        batches = cut_batches(pattern, 3)
        for left, right in itertools.pairwise(batches):
            assert len(left) == 3 or pattern[left[-1]] != pattern[right[0]]


def test_no_items_are_no_batches():
    assert cut_batches([], 4) == []


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(ValueError, match="batch_size=0"):
        cut_batches("aa", 0)


def test_slices_of_batches_are_all_batches_for_every_world_size():
    batches = cut_batches("aabbbbcc" * 3, 2)
    for num_parts in range(1, 9):
        slices = [slice_of_batches(batches, num_parts, p) for p in range(num_parts)]
        assert list(itertools.chain(*slices)) == batches
