"""Which arguments of a model fall into rows, and models whose rows do not stay apart."""

import pytest
import torch
from torch import nn

from ddinfer.errors import UsageError
from ddinfer.parallel.prepare import prepare_pipeline
from tests.ranks import run_ranks


class Model(nn.Module):
    """Four layers, then what a test wants of their output ``x`` and the argument ``t``."""

    def __init__(self, use, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(*(nn.Linear(width, width) for _ in range(4)))
        self.use = use

    def forward(self, x, t, u=None):
        return self.use(self.layers(x), t, u)


def sum_of_table(x, t, u):
    return x + t.sum(0)


def times_table(x, t, u):
    return torch.softmax(x @ t.T, -1) @ t


def times_two_tables(x, t, u):
    return torch.softmax(x @ t.T, -1) @ u


def row_by_row(x, t, u):
    return x * t


def row_by_row_of_two(x, t, u):
    return {"x": x * t[:, :1], "u": u * 2, "t": t + u}


def apart(x, t, u):
    return x, t * 2


# What runs with t whole, or cut, is told by what it means: the uncut model.
SOUND = [sum_of_table, times_table, times_two_tables, row_by_row, row_by_row_of_two, apart]


def sound_on_ranks(group):
    wrong = []
    for use in SOUND:
        for batch in (8, 6):  # 8: as many rows as any tensor has columns
            x, t, u = (torch.randn(batch, 8, generator=g(k)) for k in range(3))
            uncut = Model(use).eval()
            expected = uncut(x, t, u)
            pipe = prepare_pipeline(Model(use).eval(), (x, t, u), num_chunks=3, gather_output=True)
            made = pipe(x, t, u)
            same = torch.utils._pytree.tree_map(close, made, expected)
            if not all(torch.utils._pytree.tree_leaves(same)):
                wrong.append((use.__name__, batch))
    return wrong


def g(seed):
    return torch.Generator().manual_seed(seed)


def close(a, b):
    return torch.allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_a_tensor_with_as_many_rows_by_chance_is_told_from_a_batch(num_ranks):
    assert run_ranks(sound_on_ranks, num_ranks) == [[]] * num_ranks


def minus_mean(x, t, u):
    return x - x.mean(0)


def across_softmax(x, t, u):
    return torch.softmax(x, 0)


def with_each_other(x, t, u):
    return x @ x.T @ x


def first_row(x, t, u):
    return x + x[0]


def backwards(x, t, u):
    return x + torch.flip(x, [0])


def running(x, t, u):
    return torch.cumsum(x, dim=0)


def shuffled(x, t, u):
    return x[t[:, 0].argsort()]


MIXING = [minus_mean, across_softmax, with_each_other, first_row, backwards, running, shuffled]


@pytest.mark.parametrize("use", MIXING)
def test_rows_that_depend_on_one_another_are_refused(use):
    x, t = torch.randn(6, 8, generator=g(0)), torch.rand(6, 8, generator=g(1))
    with pytest.raises(UsageError, match=r"Model may mix rows of the batch \(aten\."):
        prepare_pipeline(Model(use).eval(), (x, t), num_chunks=2)


def unused_mean(x, t, u):
    x.mean(0)
    return x * t


def each_token(x, t, u):
    """What looks across tokens, never across rows."""
    y = x.reshape(-1, 2, 4)
    y = torch.softmax(y @ y.transpose(1, 2), -1) @ y - y.mean(1, keepdim=True)
    return torch.cumsum(y, 1).flatten(1)[torch.arange(len(t)), :] + t.amax(1, keepdim=True)


@pytest.mark.parametrize("use", [unused_mean, each_token])
def test_what_looks_along_other_dims_is_not_refused(use):
    x, t = torch.randn(6, 8, generator=g(0)), torch.rand(6, 8, generator=g(1))
    pipe = prepare_pipeline(Model(use).eval(), (x, t), num_chunks=4)
    assert close(pipe(x, t), Model(use).eval()(x, t))
    assert not close(pipe(x, t), Model(use).eval()(x, t.flip(0)))


def test_a_mask_that_is_looked_up_row_by_row_is_cut_with_its_rows():
    from transformers import T5Config, T5EncoderModel

    torch.manual_seed(0)
    model = T5EncoderModel(
        T5Config(d_model=32, d_ff=64, num_layers=2, num_heads=2, d_kv=16, vocab_size=64)
    ).eval()
    ids = torch.randint(3, 60, (8, 8), generator=g(0))  # as many tokens as rows
    mask = (torch.arange(8) < torch.arange(1, 9)[:, None]).long()
    with torch.no_grad():
        expected = model(ids, mask).last_hidden_state
        other = model(ids, mask.flip(0)).last_hidden_state
    pipe = prepare_pipeline(model, (ids, mask), num_chunks=4)
    assert torch.allclose(pipe(ids, mask).last_hidden_state, expected, atol=1e-5)
    assert not torch.allclose(pipe(ids, mask).last_hidden_state, other, atol=1e-5)


def by_flag(x, t, u):
    """Cannot be followed without the flags' contents, and t may be a table or not."""
    return x + t.sum(0) if u.tolist()[0] else x


def test_what_cannot_be_followed_needs_the_names_of_what_is_cut():
    x, t, flags = torch.randn(6, 8, generator=g(0)), torch.rand(6, 8), torch.ones(1)
    with pytest.raises(UsageError, match=r"name the arguments that are cut .* batched="):
        prepare_pipeline(Model(by_flag).eval(), (x, t, flags), num_chunks=3)
    pipe = prepare_pipeline(Model(by_flag).eval(), (x, t, flags), num_chunks=3, batched=["x"])
    assert close(pipe(x, t, flags), Model(by_flag).eval()(x, t, flags))
    assert not close(pipe(x, t * 2, flags), Model(by_flag).eval()(x, t, flags))


def test_batched_names_arguments_of_the_example():
    x, t = torch.randn(6, 8, generator=g(0)), torch.rand(6, 8)
    for wrong in ("x", [], ["y"], ["x", "u"]):
        with pytest.raises(UsageError, match=r"batched is .*expected names out of x, t"):
            prepare_pipeline(Model(row_by_row).eval(), (x, t), batched=wrong)
    with pytest.raises(UsageError, match="expected tensors whose first dim is the batch"):
        prepare_pipeline(Model(row_by_row).eval(), (x, t[:3]), batched=["x", "t"])
