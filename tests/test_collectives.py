"""Results are placed by index, and inputs compared, on real ranks."""

import random

import pytest

from ddinfer.distributed.collectives import place_by_index, require_same
from ddinfer.distributed.partition import contiguous_slice
from ddinfer.errors import DdinferError, UsageError
from tests.ranks import run_ranks


def identity(k):
    return k


def test_items_are_placed_whoever_made_them_and_in_whatever_order():
    for num_items in range(12):
        items = list(range(num_items))
        random.Random(num_items).shuffle(items)
        for num_ranks in range(1, 5):
            parts = [items[rank::num_ranks] for rank in range(num_ranks)]
            assert place_by_index(parts, num_items, identity) == list(range(num_items))


@pytest.mark.parametrize(
    ("parts", "problem"),
    [
        ([[0], [2]], "1 missing: 1"),
        ([[0, 1], [1, 2]], "1 repeated: 1"),
        ([[0, 1], [2, 3]], "1 out of range: 3"),
        ([[], []], "3 missing: 0, 1, 2"),
    ],
)
def test_what_is_missing_double_or_foreign_is_named(parts, problem):
    with pytest.raises(DdinferError, match=problem):
        place_by_index(parts, 3, identity)


def gather_my_slice(group, num_items):
    mine = contiguous_slice(num_items, group.group_size, group.group_rank)
    return place_by_index(group.all_gather_object(list(mine)), num_items, identity)


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_slices_come_back_in_order_on_every_rank(num_ranks):
    for num_items in (0, 1, num_ranks - 1, num_ranks, num_ranks + 1, 11):
        told = run_ranks(gather_my_slice, num_ranks, num_items)
        assert told == [list(range(num_items))] * num_ranks


def give_prompts(group, odd_rank):
    require_same(group, "prompts", "5 requests" if group.group_rank != odd_rank else "4 requests")


def test_equal_lists_are_accepted():
    run_ranks(give_prompts, 3, None)


def test_lists_that_differ_are_an_error_that_names_the_ranks():
    with pytest.raises(UsageError, match="ranks 0, 2: 5 requests; rank 1: 4 requests") as caught:
        run_ranks(give_prompts, 3, 1)
    assert "same prompts" in str(caught.value)
