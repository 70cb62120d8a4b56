"""What a stage hands to the next comes back bit for bit, as it lay, from memory and from disk."""

import pytest
import torch

from ddinfer.engines.records import (
    CannotKeep,
    Layout,
    Records,
    digest,
    put_together,
    take_apart,
    zeros_like,
)


def tensors():
    base = torch.randn(6, 8)
    return {
        "plain": base,
        "transposed": base.t(),
        "expanded": base[:, None].expand(6, 5, 8),
        "expanded twice": torch.randn(1, 1).expand(3, 4),
        "unaligned": base.view(-1)[3:40],
        "with gaps": base[:, ::2],
        "mostly gaps": torch.randn(2, 100)[:, ::50],
        "overlapping": base.view(-1).unfold(0, 4, 1),
        "scalar": torch.tensor(2.5),
        "empty": torch.empty(0, 3),
        "half": base.bfloat16(),
        "mask": base > 0,
        "counts": torch.arange(5),
        "permuted": torch.randn(2, 3, 4, 5).permute(0, 3, 1, 2),
        "not finite": torch.tensor([float("nan"), float("inf"), -0.0]),
    }


@pytest.mark.parametrize("name", sorted(tensors()))
@pytest.mark.parametrize("memory_bytes", [10**9, 0], ids=["memory", "disk"])
def test_a_tensor_comes_back_as_it_was(name, memory_bytes, tmp_path):
    given = tensors()[name]
    with Records(memory_bytes, tmp_path) as records:
        ticket = records.put(given)
        first, second = records.get(ticket), records.get(ticket)
    for found in (first, second):
        assert (found.dtype, found.shape) == (given.dtype, given.shape)
        kept = given.contiguous().view(-1).view(torch.uint8)
        assert torch.equal(found.contiguous().view(-1).view(torch.uint8), kept)
        if name not in ("overlapping", "mostly gaps"):  # those are laid out plainly
            assert found.stride() == given.stride()
            if given.numel():
                assert found.data_ptr() % 64 == given.data_ptr() % 64
    assert first.numel() == 0 or first.data_ptr() != second.data_ptr()


def test_a_changed_bit_is_noticed_by_the_comparison_above(tmp_path):
    with Records(0, tmp_path) as records:
        ticket = records.put(torch.zeros(3))
        place = ticket.place + 8 + ticket_data_offset(records, ticket)
        records._file.seek(place)
        records._file.write(b"\x01")
        assert not torch.equal(records.get(ticket), torch.zeros(3))


def ticket_data_offset(records, ticket):
    """Where the first tensor's bytes begin in a safetensors file."""
    records._file.seek(ticket.place + 8)
    return 8 + int.from_bytes(records._file.read(8), "little")


def test_nested_values_keep_their_types_and_holes():
    from diffusers.models.modeling_outputs import Transformer2DModelOutput
    from transformers.modeling_outputs import BaseModelOutput

    one, two = torch.ones(2), torch.zeros(1, 3)
    values = [
        (one, None, [two, "text", 3], {"a": one, "flag": True}),
        BaseModelOutput(last_hidden_state=one, hidden_states=(one, two)),
        Transformer2DModelOutput(sample=two),
    ]
    for value in values:
        shape, found = take_apart(value)
        again = put_together(shape, lambda hole, found=found: found[hole.number])
        assert type(again) is type(value)
        assert digest(again) == digest(value)
        empty = zeros_like(shape)
        assert [t.shape for t in take_apart(empty)[1]] == [t.shape for t in found]
        assert all(not t.any() for t in take_apart(empty)[1])
    assert put_together(*with_holes(values[0])) == ("ones", None, ["zeros", "text", 3], {
        "a": "ones", "flag": True})  # fmt: skip


def with_holes(value):
    shape, found = take_apart(value)
    return shape, lambda hole: "ones" if found[hole.number].any() else "zeros"


def test_what_is_neither_tensor_nor_plain_is_refused_by_name():
    with pytest.raises(CannotKeep, match=r"builtins.set"):
        take_apart([torch.ones(1), {1, 2}])
    assert digest(torch.Generator()) is None


def test_a_digest_tells_contents_from_layouts():
    one = torch.arange(6.0).view(2, 3)
    assert digest(one) == digest(one.clone()) == digest(one.t().contiguous().t())
    assert digest(one) != digest(one + 1)
    assert digest(one) != digest(one.view(3, 2))
    assert digest(one) != digest(one.to(torch.float64))
    assert digest("a", ["b"]) != digest(["a"], "b")
    assert digest(torch.device("cpu")) == digest(torch.device("meta"))
    assert digest({"x": None}) != digest({"y": None})


def test_memory_is_filled_first_and_counted(tmp_path):
    with Records(100, tmp_path) as records:
        first = records.put(torch.zeros(20))
        second = records.put(torch.ones(20))
        assert (first.place, second.place) == (None, 0)
        assert (records.held_bytes, records.num_bytes) == (80, 160)
        records.drop(first)
        assert (records.held_bytes, records.num_bytes) == (0, 80)
        third = records.put((torch.full((5,), 3.0), torch.full((2,), 4.0)))
        assert third.place is None
        assert torch.equal(records.get(second), torch.ones(20))
        assert list(tmp_path.iterdir()) == []
    assert records._file.closed


def test_what_was_at_home_follows_the_main_device_and_nothing_else_does():
    cpu, meta = torch.device("cpu"), torch.device("meta")
    records = Records(1000)
    stays = records.put(torch.ones(2))
    records.home = cpu
    moves = records.put((torch.ones(2), None))
    records.home = meta
    assert records.get(stays).device == cpu
    assert records.get(moves)[0].device == meta
    records.home = cpu
    assert torch.equal(records.get(moves)[0], torch.ones(2))


def test_zeros_of_a_layout_lie_as_the_original_did():
    given = torch.randn(4, 6).t()
    made = Layout.of(given).make()
    assert made.stride() == given.stride()
    assert not made.any()
