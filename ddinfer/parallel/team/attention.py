"""Scaled dot product attention when each rank of a team has its share of the tokens.

Where the number of heads divides, ranks exchange heads (DeepSpeed-Ulysses, arXiv:2309.14509): each
gets all tokens of its heads, attends, and gives the tokens back. Otherwise each gathers K and V and
attends with its own rows of Q. Both put the tokens into the order of the whole model, since a sum
over keys in another order rounds differently.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch

from ddinfer.errors import UsageError
from ddinfer.parallel.team.exchange import Exchange
from ddinfer.parallel.team.shares import Axis, Shares

Attention = Callable[..., torch.Tensor]


class AttentionAxes(NamedTuple):
    """Axes of one attention call's queries and keys; ``None``: every rank has all of them."""

    query: Axis | None
    key: Axis | None


def gather(
    exchange: Exchange, shares: Shares, local: torch.Tensor, dim: int, axis: Axis
) -> torch.Tensor:
    """The whole tensor of which each rank has its tokens along ``dim``."""
    shapes = [list(local.shape) for _ in range(exchange.size)]
    for rank, shape in enumerate(shapes):
        shape[dim] = shares.size(axis, rank)
    return shares.join(exchange.swap([local] * exchange.size, shapes), dim, axis)


def attend(
    exchange: Exchange,
    shares: Shares,
    axes: AttentionAxes,
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """What ``attention`` makes of the whole tensors, for this rank's queries.

    Args:
        query, key, value: shape ``(…, heads, tokens, head_dim)``, with this rank's tokens along
            the axes that ``axes`` names.

    Raises:
        UsageError: causal attention, or dropout.
    """
    if is_causal or dropout_p:
        raise UsageError("attention is causal or drops out, which cannot be split by tokens")
    has_heads = query.dim() == 4
    by_heads = (
        axes.query is not None
        and axes.key is not None
        and has_heads
        and query.shape[1] % exchange.size == 0
        and key.shape[1] % exchange.size == 0
    )
    if axes.key is None:
        if attn_mask is not None and axes.query is not None:
            attn_mask = _rows(attn_mask, shares, axes.query, query.shape[-2])
        return attention(query, key, value, attn_mask=attn_mask, **options)
    if attn_mask is not None and attn_mask.shape[-1] not in (1, shares.length(axes.key)):
        attn_mask = gather(exchange, shares, attn_mask, attn_mask.dim() - 1, axes.key)
    if by_heads:
        return _by_heads(exchange, shares, axes, attention, query, key, value, attn_mask, options)
    key = gather(exchange, shares, key, key.dim() - 2, axes.key)
    value = gather(exchange, shares, value, value.dim() - 2, axes.key)
    if attn_mask is not None and axes.query is not None:
        attn_mask = _rows(attn_mask, shares, axes.query, query.shape[-2])
    return attention(query, key, value, attn_mask=attn_mask, **options)


def _rows(mask: torch.Tensor, shares: Shares, axis: Axis, own: int) -> torch.Tensor:
    """A mask of pairs → its rows for this rank's queries."""
    if mask.dim() < 2 or mask.shape[-2] in (1, own):
        return mask
    return shares.cut(mask, mask.dim() - 2, axis)


def _by_heads(
    exchange: Exchange,
    shares: Shares,
    axes: AttentionAxes,
    attention: Attention,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    options: Mapping[str, Any],
) -> torch.Tensor:
    assert axes.query is not None
    assert axes.key is not None
    num_ranks, rank = exchange.size, exchange.rank
    inputs = ((query, axes.query), (key, axes.key), (value, axes.key))
    batch = query.shape[0]

    def heads_of(tensor: torch.Tensor, owner: int) -> torch.Tensor:
        size = tensor.shape[1] // num_ranks
        return tensor.narrow(1, owner * size, size)

    outgoing = [
        torch.cat([heads_of(tensor, owner).reshape(-1) for tensor, _ in inputs])
        for owner in range(num_ranks)
    ]
    shapes = [
        [
            (batch, t.shape[1] // num_ranks, shares.size(axis, source), t.shape[3])
            for t, axis in inputs
        ]
        for source in range(num_ranks)
    ]
    sizes = [[torch.Size(shape).numel() for shape in each] for each in shapes]
    received = exchange.swap(outgoing, [[sum(each)] for each in sizes])
    pieces = [
        [flat.view(shape) for flat, shape in zip(buffer.split(size), shape_of, strict=True)]
        for buffer, size, shape_of in zip(received, sizes, shapes, strict=True)
    ]
    whole = [
        shares.join([each[k] for each in pieces], 2, axis) for k, (_, axis) in enumerate(inputs)
    ]
    if mask is not None:
        if mask.dim() > 1 and mask.shape[-2] not in (1, shares.length(axes.query)):
            mask = gather(exchange, shares, mask, mask.dim() - 2, axes.query)
        if mask.dim() == 4 and mask.shape[1] == query.shape[1] and mask.shape[1] > 1:
            mask = heads_of(mask, rank)
    made = attention(*whole, attn_mask=mask, **options)

    def tokens_of(owner: int) -> torch.Tensor:
        there = Shares(shares.lengths, num_ranks, owner)
        return there.cut(made, 2, axes.query or ())

    own = shares.size(axes.query)
    shape = (batch, made.shape[1], own, made.shape[3])
    back = exchange.swap(
        [tokens_of(owner).contiguous() for owner in range(num_ranks)], [shape] * num_ranks
    )
    # Attention processors call `view` on a result that lies in memory as (batch, tokens, heads, …).
    laid_out = made.new_empty(batch, own, query.shape[1], made.shape[3]).transpose(1, 2)
    return laid_out.copy_(torch.cat(back, 1))
