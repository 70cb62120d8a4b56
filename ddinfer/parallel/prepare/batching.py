"""Infers which arguments have a batch dim, and checks that the model keeps their rows independent.

The model runs on fake tensors; nothing is computed.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ddinfer.errors import UsageError
from ddinfer.parallel.blocks import faked
from ddinfer.parallel.prepare.row_flow import Recorder, RowFlow
from ddinfer.parallel.prepare.rows import Inputs, Outputs

#: Ways to tell batches from tensors that have as many rows by chance.
MAX_TRIES = 64

_SAY_BATCHED = "If it does, name the arguments that are cut along their first dim: batched=[...]"


class _CannotRun(Exception):
    """The model does not take such arguments, or reads their contents. The message says why."""


def infer_batch_dims(
    model: nn.Module, inputs: Inputs, device: torch.device
) -> tuple[Inputs, Outputs]:
    """Which of the tensors with as many rows as the batch have a batch dim, and how outputs do.

    A tensor may have as many rows by chance (a table, position ids of as many tokens). All are
    cut where rows are then independent; else those are replicated to every microbatch that may
    have another number of rows than the batch, or that the model takes only as they are.

    Raises:
        UsageError: an output has no batch dim, one row may depend on others, or the model cannot
            be run on fake tensors.
    """
    runs = _FakeRuns(model, device, _unused_sizes(model, inputs))
    errors: list[Exception] = []
    with runs:
        for whole, is_free in itertools.islice(_choices(inputs), MAX_TRIES):
            attempt = replace(inputs, batched=inputs.batched - whole)
            others = dict.fromkeys(whole, runs.sizes[2] if is_free else inputs.example_rows)
            try:
                return attempt, runs.check(attempt, others)
            except (_CannotRun, UsageError) as error:
                errors.append(error)
    for refusal in errors:
        if isinstance(refusal, UsageError):
            raise refusal
    raise UsageError(
        f"{runs.name} cannot be run on fake tensors ({errors[0]}), so it cannot be shown that it "
        f"keeps the rows of the batch independent. {_SAY_BATCHED}"
    ) from errors[0]


def _choices(inputs: Inputs) -> Iterator[tuple[frozenset[int], bool]]:
    """Which tensors are replicated, and whether they may have any number of rows."""
    doubtful = sorted(inputs.batched - {min(inputs.batched)})
    yield frozenset(), True
    groups = [frozenset((k,)) for k in doubtful]
    groups += [frozenset(pair) for pair in itertools.combinations(doubtful, 2)]
    groups += [frozenset(doubtful)] if len(doubtful) > 2 else []
    yield from itertools.product(groups, (True, False))


class _FakeRuns:
    """Runs a model with fake weights and arguments, inside a ``with`` statement.

    Attributes:
        sizes: three numbers that are no size of anything else.
    """

    def __init__(self, model: nn.Module, device: torch.device, sizes: list[int]):
        from torch._subclasses.fake_tensor import FakeTensorMode

        self.model, self.device, self.sizes = model, device, sizes
        self.name = type(model).__name__
        self.mode: Any = FakeTensorMode(allow_non_fake_inputs=True)
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> None:
        self._stack.enter_context(faked(self.model, self.mode, self.device))
        self._stack.enter_context(_quiet())

    def __exit__(self, *details: Any) -> None:
        self._stack.close()

    def check(self, inputs: Inputs, others: Mapping[int, int]) -> Outputs:
        """The outputs, where exactly ``inputs.batched`` have a batch dim.

        Args:
            others: leaf number → rows, for tensors that are replicated.

        Raises:
            _CannotRun, UsageError: others have.
        """
        few, more, _ = self.sizes
        first = Recorder()
        fewer = self._run(inputs, few, others, first)
        flow = RowFlow(first, (few, more))
        greater = self._run(inputs, more, others, flow)
        outputs = Outputs.of(fewer, greater, (few, more), self.name)
        operation = flow.offending_op(greater)
        for rows in {inputs.rows, inputs.example_rows} if operation is None else ():
            again = Recorder()  # a branch may ask for the batch size
            self._run(inputs, rows, others, again)
            if again.names != first.names:
                operation = f"the operations for {rows} rows are not those for {few}"
        if operation is not None:
            raise UsageError(
                f"{self.name} may mix rows of the batch ({operation}), so that its output could be "
                "another one in microbatches; expected operations that are known to keep rows "
                f"independent. {_SAY_BATCHED}"
            )
        return outputs

    def _run(
        self, inputs: Inputs, rows: int, others: Mapping[int, int], watching: Recorder | RowFlow
    ) -> Any:
        with self.mode:
            tensors = inputs.zeros(rows, self.device, others)
        args, kwargs = inputs.tree.unflatten(tensors)
        if isinstance(watching, RowFlow):
            for k in inputs.batched:
                watching.mark(tensors[k])
        try:
            with self.mode, watching, torch.no_grad():
                return self.model(*args, **kwargs)
        except Exception as error:  # whatever a foreign model raises for such arguments
            first_line = next(iter(str(error).splitlines()), "")
            raise _CannotRun(f"{type(error).__name__}: {first_line}") from error


def _unused_sizes(model: nn.Module, inputs: Inputs) -> list[int]:
    """The three smallest numbers from 2 on that are no dim of a parameter or an argument."""
    tensors = [*model.parameters(), *model.buffers(), *inputs.tree.empty.values()]
    taken = {size for tensor in tensors for size in tensor.shape}
    return list(itertools.islice((n for n in itertools.count(2) if n not in taken), 3))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences torch's own warnings about code that the user did not write."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
