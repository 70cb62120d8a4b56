"""`prepare_pipeline` never returns rows that differ from the model's: models composed at random."""

import random

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ddinfer.errors import UsageError
from ddinfer.parallel.prepare import prepare_pipeline

TOKENS, WIDTH = 5, 8

# --- operations on x, shape (batch, tokens, width); t has as many rows, m is a parameter ----------

ROW_WISE = {
    "linear": lambda x, t, m: x @ m,
    "gelu": lambda x, t, m: F.gelu(x) + 0.1,
    "layer_norm": lambda x, t, m: F.layer_norm(x, (WIDTH,)),
    "softmax over tokens": lambda x, t, m: torch.softmax(x, 1),
    "mean of tokens": lambda x, t, m: x - x.mean(1, keepdim=True),
    "attention": lambda x, t, m: (
        F.scaled_dot_product_attention(*(x.view(len(x), TOKENS, 2, 4).transpose(1, 2),) * 3)
        .transpose(1, 2)
        .reshape(len(x), TOKENS, WIDTH)
    ),
    "bmm": lambda x, t, m: torch.bmm(x, torch.softmax(x.transpose(1, 2) @ x, -1)),
    "flat linear": lambda x, t, m: (x.reshape(-1, WIDTH) @ m).view(x.shape),
    "flip tokens": lambda x, t, m: x.flip(1),
    "roll tokens": lambda x, t, m: x.roll(2, 1),
    "sort tokens": lambda x, t, m: x.sort(1).values,
    "cumsum": lambda x, t, m: x.cumsum(-1),
    "pick a token": lambda x, t, m: x + x[:, 1:2],
    "last token of each": lambda x, t, m: x + x[torch.arange(len(x)), -1][:, None],
    "positions": lambda x, t, m: x + m[:TOKENS][None].expand(len(x), -1, -1),
    "ones": lambda x, t, m: x + torch.ones(len(x), TOKENS, 1),
    "cat": lambda x, t, m: torch.cat([x[:, 1:], x[:, :1]], 1),
    "stack": lambda x, t, m: torch.stack([x, x * 2]).sum(0),
    "convolution": lambda x, t, m: F.conv1d(x.transpose(1, 2), m[..., None]).transpose(1, 2),
    "batch norm of before": lambda x, t, m: F.batch_norm(x, m[0, :TOKENS], m[1, :TOKENS].abs()),
    "pad": lambda x, t, m: F.pad(x, (0, 0, 1, 0))[:, 1:],
    "triangle of tokens": lambda x, t, m: x.tril(),
    "repeated tokens": lambda x, t, m: x.repeat(1, 2, 1)[:, :TOKENS],
    "table for each": lambda x, t, m: x + m[:1, None].repeat(len(x), 1, 1),
    "group norm": lambda x, t, m: F.group_norm(x.transpose(1, 2), 2).transpose(1, 2),
    "transposed": lambda x, t, m: (x.permute(1, 2, 0) * 2).permute(2, 0, 1),
    "mask": lambda x, t, m: x.masked_fill(x > 0.5, 0.0),
    "write a token": lambda x, t, m: written_token(x),
    "all rows": lambda x, t, m: x[: len(x)] * 2,
    "by the other": lambda x, t, m: x * t[:, None],
}

MIXING = {
    "mean": lambda x, t, m: x - x.mean(0),
    "softmax": lambda x, t, m: torch.softmax(x, 0),
    "flip": lambda x, t, m: x + x.flip(0),
    "roll": lambda x, t, m: x.roll(1, 0),
    "roll all": lambda x, t, m: x.roll(1),
    "topk": lambda x, t, m: x.topk(len(x), 0).values,
    "sort": lambda x, t, m: x.sort(0).values,
    "cumsum over rows": lambda x, t, m: x.cumsum(0),
    "first row": lambda x, t, m: x + x[0],
    "next row": lambda x, t, m: torch.cat([x[1:], x[:1]]),
    "number of rows": lambda x, t, m: x / len(x),
    "number as a tensor": lambda x, t, m: x + torch.tensor(float(len(x))),
    "row numbers": lambda x, t, m: x + torch.arange(len(x))[:, None, None],
    "table by row number": lambda x, t, m: x + torch.arange(100.0)[: len(x)][:, None, None],
    "identity": lambda x, t, m: torch.einsum("ab,btc->atc", torch.ones(len(x), len(x)), x),
    "wrong order": lambda x, t, m: x.reshape(-1, WIDTH)
    .view(TOKENS, len(x), WIDTH).softmax(0).reshape(len(x), TOKENS, WIDTH),
    "order": lambda x, t, m: x.transpose(0, 1).reshape(len(x), TOKENS, WIDTH),
    "written": lambda x, t, m: written(x),
    "written row": lambda x, t, m: written_row(x),
    "branch": lambda x, t, m: x * 2 if len(x) > 4 else x,
    "sorted by": lambda x, t, m: x[t[:, 0].argsort()],
    "gather": lambda x, t, m: x.gather(0, (x > 0).long()),
    "norm": lambda x, t, m: x / x.norm(),
    "diff": lambda x, t, m: x.diff(dim=0, prepend=x[:1]),
    "cross": lambda x, t, m: (x.flatten(1) @ x.flatten(1).T @ x.flatten(1)).view(x.shape),
    "batch norm": lambda x, t, m: F.batch_norm(x, None, None, training=True),
    "cdist": lambda x, t, m: x + torch.cdist(x.flatten(1), x.flatten(1)).sum(1)[:, None, None],
    "index add": lambda x, t, m: x.index_add(0, torch.tensor([0]), x[:1]),
    "repeated": lambda x, t, m: x.repeat(2, 1, 1)[::2],
    "noise": lambda x, t, m: x + torch.rand_like(x),
    "noise for all": lambda x, t, m: x + torch.rand(WIDTH),
    "triangle": lambda x, t, m: x.permute(1, 0, 2).tril().permute(1, 0, 2),
    "maximum": lambda x, t, m: x - x.max(0).values,
    "variance": lambda x, t, m: x * x.var(0),
    "unfold": lambda x, t, m: x + x.unfold(0, 2, 1).sum() * 0.1,
}  # fmt: skip


def written_token(x):
    made = x.clone()
    made[:, 0] = x[:, 1] * 2
    return made


def written(x):
    made = torch.zeros_like(x)
    made[1:] = x[:-1]
    return made


def written_row(x):
    made = x.clone()
    made[0] = 0
    return made


class Composed(nn.Module):
    def __init__(self, names, seed=0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.m = nn.Parameter(torch.randn(WIDTH, WIDTH, generator=generator) / 3)
        self.operations = [(ROW_WISE | MIXING)[name] for name in names]

    def forward(self, x, t):
        for operation in self.operations:
            x = operation(x, t, self.m)
        return x


def outcome(names, batch=6, chunks=3, **options):
    """``"refused"``, or whether the rows are the model's."""
    generator = torch.Generator().manual_seed(len(names))
    x = torch.randn(batch, TOKENS, WIDTH, generator=generator)
    t = torch.randn(batch, WIDTH, generator=generator)
    with torch.no_grad():
        expected = Composed(names).eval()(x, t)
    try:
        pipe = prepare_pipeline(Composed(names).eval(), (x, t), num_chunks=chunks, **options)
    except UsageError:
        return "refused"
    return torch.allclose(pipe(x, t), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ROW_WISE)
def test_operations_on_single_rows_are_taken(name):
    assert outcome([name]) is True


@pytest.mark.parametrize("name", MIXING)
def test_operations_over_rows_are_refused(name):
    assert outcome([name]) == "refused"


def test_the_comparison_notices_rows_that_were_mixed():
    assert outcome(["mean"], batched=["x", "t"]) is False


@pytest.mark.parametrize("seed", range(10))
def test_models_composed_at_random_are_exact_or_refused(seed):
    draw = random.Random(seed)
    found = []
    for _ in range(40):
        pool = list(ROW_WISE) + (list(MIXING) if draw.random() < 0.5 else [])
        names = draw.choices(pool, k=draw.randint(2, 6))
        got = outcome(names, batch=draw.choice([4, 6, 7]), chunks=draw.choice([2, 3]))
        assert got == "refused" or got is True, names
        if not set(names) & set(MIXING):
            assert got is True, names
        found.append(got)
    assert {True, "refused"} <= set(found)
