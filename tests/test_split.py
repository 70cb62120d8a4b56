"""`split`, `gather` and who goes first: every count on every number of ranks, every type."""

import copy
import re

import numpy as np
import pytest
import torch

import ddinfer
from ddinfer.embed.splitting import _kept_rows
from ddinfer.errors import RankError, UsageError
from tests.ranks import rank_environment, run_ranks


@pytest.fixture
def on_rank(monkeypatch):
    """→ a function that makes this process rank r of n, as torchrun would."""

    def become(rank, num_ranks):
        for name, value in rank_environment(rank, num_ranks, 1, "test").items():
            monkeypatch.setenv(name, value)

    return become


def parts_of(on_rank, items, num_ranks, pad=False):
    parts = []
    for rank in range(num_ranks):
        on_rank(rank, num_ranks)
        parts.append(ddinfer.split(items, pad=pad))
    return parts


# split


def test_every_item_is_in_one_share_and_shares_in_order_are_the_list(on_rank):
    for num_items in range(18):
        items = list(range(num_items))
        for num_ranks in range(1, 9):
            parts = parts_of(on_rank, items, num_ranks)
            assert [item for part in parts for item in part] == items
            assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_padding_makes_shares_equal_with_the_last_item_and_gather_s_rule_drops_it(on_rank):
    for num_items in range(18):
        items = np.arange(num_items)
        for num_ranks in range(1, 9):
            parts = parts_of(on_rank, items, num_ranks, pad=True)
            assert len(set(map(len, parts))) == 1
            joined = np.concatenate(parts)
            assert set(joined) == set(items)
            kept = joined[_kept_rows(list(map(len, parts)), num_items)]
            assert kept.tolist() == items.tolist()


def test_five_items_on_four_ranks_and_none_on_three(on_rank):
    assert parts_of(on_rank, list("abcde"), 4) == [["a", "b"], ["c"], ["d"], ["e"]]
    assert parts_of(on_rank, list("abcde"), 4, pad=True) == [
        ["a", "b"],
        ["c", "e"],
        ["d", "e"],
        ["e", "e"],
    ]
    assert parts_of(on_rank, [], 3, pad=True) == [[], [], []]


def test_the_type_stays_and_the_input_too(on_rank):
    tensor, array = torch.arange(10).reshape(5, 2), np.arange(5.0)
    parts = parts_of(on_rank, tensor, 2, pad=True)
    assert [p.tolist() for p in parts] == [
        [[0, 1], [2, 3], [4, 5]],
        [[6, 7], [8, 9], [8, 9]],
    ]
    assert [p.tolist() for p in parts_of(on_rank, array, 2)] == [[0, 1, 2], [3, 4]]
    assert parts_of(on_rank, (1, 2, 3), 2, pad=True) == [(1, 2), (3, 3)]
    assert parts_of(on_rank, range(1, 9, 2), 3) == [range(1, 5, 2), range(5, 7, 2), range(7, 9, 2)]
    assert parts_of(on_rank, range(3), 2, pad=True) == [[0, 1], [2, 2]]
    items = {"prompt": ["a", "b", "c"], "more": {"seed": (1, 2, 3), "latents": torch.ones(3, 1)}}
    before = copy.deepcopy(items)
    first, second = parts_of(on_rank, items, 2, pad=True)
    assert first["prompt"] == ["a", "b"]
    assert first["more"]["seed"] == (1, 2)
    assert second["prompt"] == ["c", "c"]
    assert second["more"]["latents"].shape == (2, 1)
    assert (items["prompt"], items["more"]["seed"]) == (["a", "b", "c"], (1, 2, 3))
    assert items.keys() == before.keys()
    assert items["more"]["latents"].shape == (3, 1)
    assert parts_of(on_rank, {}, 2) == [{}, {}]


def test_a_dataset_is_split_by_select(on_rank):
    datasets = pytest.importorskip("datasets")
    dataset = datasets.Dataset.from_dict({"prompt": list("abc")})
    parts = parts_of(on_rank, dataset, 2, pad=True)
    assert [type(p) for p in parts] == [datasets.Dataset] * 2
    assert [p["prompt"][:] for p in parts] == [["a", "b"], ["c", "c"]]


@pytest.mark.parametrize("num_ranks", [1, 2])
@pytest.mark.parametrize(
    ("items", "message"),
    [
        ("a dog", "items is a single str: put it into a list; split takes a list, tuple, range"),
        (b"a dog", "items is a single bytes: put it into a list"),
        (5, "items is a int"),
        (None, "items is a NoneType"),
        ({1, 2}, "items is a set"),
        ((k for k in "abc"), "a generator, which can be read only once: make a list of it"),
        (torch.tensor(3), "items is a scalar, which cannot be split"),
        (np.float32(3), "items is a float32"),
        ({"prompt": "a dog"}, "items['prompt'] is a single str: put it into a list"),
        ({"a": {"b": 3}}, "items['a']['b'] is a int"),
    ],
)
def test_what_has_no_parts_is_a_type_error_on_any_number_of_ranks(
    on_rank, items, message, num_ranks
):
    on_rank(0, num_ranks)
    with pytest.raises(TypeError, match=re.escape(message)):
        ddinfer.split(items)


def test_values_of_a_dict_must_have_one_length(on_rank):
    on_rank(0, 2)
    message = "items['a'] has 2, items['b']['c'] has 3"
    with pytest.raises(UsageError, match=re.escape(message)):
        ddinfer.split({"a": [1, 2], "b": {"c": (1, 2, 3)}})


# gather


def there_and_back(group):
    """split, then gather, of every type and count."""
    for num_items in (*range(group.group_size + 2), 17):
        items = [f"item {k}" for k in range(num_items)]
        tensor = torch.arange(2 * num_items, dtype=torch.bfloat16).reshape(num_items, 2)
        array = np.arange(num_items, dtype=np.int16)
        words = np.array(items, dtype=str)
        for pad in (False, True):
            with ddinfer.split_between_processes(items, pad=pad) as mine:
                if pad:
                    assert len(mine) == -(-num_items // group.group_size)
                assert ddinfer.gather(mine, num_items=num_items) == items
            part = ddinfer.split(tuple(items), pad=pad)
            assert ddinfer.gather(part, num_items) == tuple(items)
            whole = ddinfer.gather(ddinfer.split(tensor, pad=pad), num_items)
            assert whole.dtype == tensor.dtype
            assert torch.equal(whole, tensor)
            for each in (array, words):
                whole = ddinfer.gather(ddinfer.split(each, pad=pad), num_items)
                assert whole.dtype.kind == each.dtype.kind
                assert np.array_equal(whole, each)
    return True


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4])
def test_what_is_split_and_gathered_is_what_it_was(num_ranks):
    assert run_ranks(there_and_back, num_ranks) == [True] * num_ranks


def gather_uneven(group):
    rank = group.group_rank
    rows = torch.full((rank, 3), float(rank), requires_grad=True)
    joined = ddinfer.gather(rows)
    assert not joined.requires_grad
    nothing = torch.empty(0) if rank == 0 else torch.ones(1, 2)
    flags = ddinfer.gather(torch.tensor([rank > 0]))
    waves = ddinfer.gather(torch.tensor([complex(rank, 1)]))
    return (
        joined.tolist(),
        ddinfer.gather(torch.tensor(rank * 0.5)).tolist(),  # one number each, such as a loss
        ddinfer.gather(np.float64([rank] * rank)).tolist(),
        ddinfer.gather([{"rank": rank}]),
        ddinfer.gather(nothing).shape,
        ddinfer.gather(torch.empty(1, 0)).shape,
        flags.tolist(),
        waves.tolist(),
    )


def test_ranks_may_have_different_numbers_of_rows():
    told = run_ranks(gather_uneven, 3)
    assert told[1:] == told[:-1]
    assert told[0] == (
        [[1.0] * 3, [2.0] * 3, [2.0] * 3],
        [0.0, 0.5, 1.0],
        [1.0, 2.0, 2.0],
        [{"rank": 0}, {"rank": 1}, {"rank": 2}],
        (2, 2),
        (3, 0),
        [False, True, True],
        [1j, 1 + 1j, 2 + 1j],
    )


def gather_wrongly(group, items_of, num_items):
    try:
        ddinfer.gather(items_of[group.group_rank], num_items)
    except Exception as error:  # noqa: BLE001 - compared over the ranks
        heard = type(error), str(error)
    assert ddinfer.gather([group.group_rank]) == list(range(group.group_size))
    return heard


@pytest.mark.parametrize(
    ("items_of", "num_items", "kind", "message"),
    [
        (["ab", "ab"], None, TypeError, "got str; put it into a list"),
        ([{"a": 1}] * 2, None, TypeError, "got dict; gather each of its values"),
        ([[1], "ab"], None, RankError, "rank 1 failed while gathering: TypeError: gather takes"),
        ([[1], (1,)], None, UsageError, "rank 0: list, num_items=None; rank 1: tuple"),
        (
            [torch.ones(1), torch.ones(1).half()],
            None,
            UsageError,
            "rank 0: tensor of torch.float32, num_items=None; rank 1: tensor of torch.float16",
        ),
        (
            [torch.ones(1, 2), torch.ones(1, 3)],
            None,
            UsageError,
            "the others must be equal; rank 0: (1, 2), rank 1: (1, 3)",
        ),
        (
            [[1, 2, 3], [4]],
            4,
            UsageError,
            "num_items=4 over 2 ranks gives 2, 2 items, with padding 2, 2, but",
        ),
    ],
)
def test_what_cannot_be_joined_is_the_same_error_on_every_rank(items_of, num_items, kind, message):
    first, second = run_ranks(gather_wrongly, 2, items_of, num_items)
    assert first == second
    assert first[0] is kind
    assert message in first[1]


def gather_in_parts(group):
    import torch.distributed as dist

    halves = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine = halves[group.world.rank % 2]
    if group.world.rank == 0:
        with pytest.raises(UsageError, match="rank 0 is not in the group"):
            ddinfer.split([1], group=halves[1])
    part = ddinfer.split(list("abc"), group=mine)
    whole = ddinfer.gather(part, num_items=3, group=mine)
    return part, whole, ddinfer.is_first_rank(mine), ddinfer.is_first_rank()


def test_part_of_the_world_splits_among_itself():
    assert run_ranks(gather_in_parts, 4) == [
        (["a", "b"], list("abc"), True, True),
        (["a", "b"], list("abc"), True, False),
        (["c"], list("abc"), False, False),
        (["c"], list("abc"), False, False),
    ]


def test_a_process_alone_has_everything_and_is_first():
    assert ddinfer.split([1, 2], pad=True) == [1, 2]
    assert ddinfer.gather([1, 2], num_items=2) == [1, 2]
    assert ddinfer.is_first_rank()
    with ddinfer.first_rank_first():
        pass
    with pytest.raises(UsageError, match="num_items=3 over 1 ranks gives 3 items"):
        ddinfer.gather([1, 2], num_items=3)


# Who goes first


def go_in_order(group, fails):
    """Who has been in the body when each rank is; what each rank hears."""
    seen = None
    try:
        with ddinfer.first_rank_first():
            seen = group.add("been", 0)
            if group.group_rank == fails:
                raise OSError("no network")
            if ddinfer.is_first_rank():
                group.add("been", 1)
    except Exception as error:  # noqa: BLE001 - told to the test
        return seen, type(error).__name__, str(error).partition("\n")[0]
    with ddinfer.first_rank_first():
        return seen


def test_the_first_rank_goes_first():
    assert run_ranks(go_in_order, 3, None) == [0, 1, 1]


def test_when_the_first_rank_fails_the_others_hear_of_it_instead():
    heard = (None, "RankError", "rank 0 failed while going first: OSError: no network")
    assert run_ranks(go_in_order, 3, 0) == [(0, "OSError", "no network"), heard, heard]


def fail_second(group):
    try:
        with ddinfer.first_rank_first():
            if group.group_rank == 1:
                raise OSError("mine")
    except OSError as error:
        return type(error).__name__
    return "fine"


def test_the_failure_of_another_rank_is_its_own():
    assert run_ranks(fail_second, 2) == ["fine", "OSError"]
