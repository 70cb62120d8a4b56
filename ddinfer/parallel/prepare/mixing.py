"""Which arguments have a batch dim, and whether the model keeps their rows apart.

Found by running the model on fake tensors, without computing anything.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ddinfer.errors import UsageError
from ddinfer.parallel.prepare.row_flow import Recorder, RowFlow
from ddinfer.parallel.prepare.rows import Inputs, Outputs

#: Ways to tell batches from tensors that have as many rows by chance.
MAX_TRIES = 64

#: ``run(inputs, rows, others, watching)``: a model on arguments like `Inputs.sample` → its output.
#: ``others``: rows of leaves that are not cut; ``watching``: a mode that sees every operation.
Run = Callable[[Inputs, int, Mapping[int, int], Any], Any]


class CannotRun(Exception):
    """The model does not take such arguments, or cannot be followed. The message says why."""


def settle_rows(inputs: Inputs, name: str, run: Run, sizes: Sequence[int]) -> Inputs:
    """Which of the tensors with as many rows as the batch are really cut with it.

    A tensor may have as many rows by chance (a table, position ids of as many tokens). All are
    cut where rows then stay apart; else those go whole to every microbatch that may have another
    number of rows than the batch, or that the model takes only as they are.

    Args:
        name: of the model, for messages.
        sizes: three numbers that are no size of anything else.

    Raises:
        CannotRun: the model does not run with any choice.
        UsageError: the output does not fall into rows, or one row may depend on others.
    """
    errors: list[Exception] = []
    for whole, is_free in itertools.islice(_choices(inputs), MAX_TRIES):
        attempt = replace(inputs, batched=inputs.batched - whole)
        others = dict.fromkeys(whole, sizes[2] if is_free else inputs.example_rows)
        try:
            _judge(attempt, name, run, sizes, others)
            return attempt
        except (CannotRun, UsageError) as failed:
            errors.append(failed)
    raise next((e for e in errors if isinstance(e, UsageError)), errors[0])


def _choices(inputs: Inputs) -> Iterator[tuple[frozenset[int], bool]]:
    """Which tensors go whole, and whether they may have any number of rows."""
    doubtful = sorted(inputs.batched - {min(inputs.batched)})
    yield frozenset(), True
    groups = [frozenset((k,)) for k in doubtful]
    groups += [frozenset(pair) for pair in itertools.combinations(doubtful, 2)]
    groups += [frozenset(doubtful)] if len(doubtful) > 2 else []
    for is_free in (True, False):
        for group in groups:
            yield group, is_free


def _judge(
    inputs: Inputs, name: str, run: Run, sizes: Sequence[int], others: Mapping[int, int]
) -> None:
    """
    Raises:
        CannotRun, UsageError: these tensors cannot be the ones that are cut.
    """
    few, more, _ = sizes
    first = Recorder()
    fewer = run(inputs, few, others, first)
    flow = RowFlow(first, (few, more))
    greater = run(inputs, more, others, flow)
    Outputs.of(fewer, greater, few, name, more)
    culprit = flow.culprit(greater)
    for rows in {inputs.rows, inputs.example_rows} if culprit is None else ():
        again = Recorder()  # a branch may ask for the batch size
        run(inputs, rows, others, again)
        if again.names != first.names:
            culprit = f"the operations for {rows} rows are not those for {few}"
    if culprit is not None:
        raise UsageError(
            f"{name} may mix rows of the batch ({culprit}), so that its output could be another "
            "one in microbatches; expected operations that are known to keep rows apart. If they "
            "do, name the arguments that are cut along their first dim: batched=[...]"
        )


def unused_sizes(model: nn.Module, inputs: Inputs, count: int = 3) -> list[int]:
    """The smallest numbers from 2 on that are no dim of a parameter or an argument."""
    tensors = [*model.parameters(), *model.buffers()]
    tensors += [leaf for leaf in inputs.leaves if isinstance(leaf, torch.Tensor)]
    taken = {size for tensor in tensors for size in tensor.shape}
    return list(itertools.islice((n for n in itertools.count(2) if n not in taken), count))
