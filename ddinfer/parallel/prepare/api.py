"""`prepare_pipeline`: any module split across ranks, one stage per rank, exact."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn

from ddinfer.errors import ErrorRecord, RankError, UsageError
from ddinfer.parallel.blocks import check_names
from ddinfer.parallel.communicator import Communicator, ConnectionLost, Sending
from ddinfer.parallel.flow import PlanError, StagedModel
from ddinfer.parallel.packing import Layout, layout_of
from ddinfer.parallel.plans import PlanCache
from ddinfer.parallel.prepare.batching import infer_batch_dims
from ddinfer.parallel.prepare.rows import Inputs, Outputs, Tensors
from ddinfer.parallel.prepare.stages import plan_stages
from ddinfer.parallel.prepare.weights import Weights


def prepare_pipeline(
    model: nn.Module,
    example_args: Sequence[Any] = (),
    example_kwargs: Mapping[str, Any] | None = None,
    split_points: Literal["auto"] | Sequence[str] = "auto",
    num_chunks: int | None = None,
    gather_output: bool = False,
    group: Any = None,
    checkpoint: str | os.PathLike[str] | None = None,
    device: str | torch.device | None = None,
    batched: Sequence[str] | None = None,
    balance: Literal["bytes", "time"] = "bytes",
) -> PipelinedModel:
    """Split ``model`` across the ranks of a group, one stage per rank, as a pipeline for batches.

    Every rank of the group calls this with the same arguments. Afterwards each holds the weights of
    its own stage only; in ``model`` itself the others are on the meta device.

    Args:
        model: in eval mode. With ``checkpoint`` its parameters may be on the meta device.
        example_args, example_kwargs: a whole batch as calls will give it; they fix every dim but
            the batch, which is the first dim of the first tensor, and every argument that is no
            tensor. Tensors without a batch dim are replicated to every microbatch.
        split_points: names of the modules that begin the stages after the first; ``"auto"``
            balances the stages.
        num_chunks: microbatches that the example batch is split into (default: number of ranks).
            A microbatch has ceil(example batch / num_chunks) rows, and a call takes as many as
            its rows need; the last is padded by repeating its last row, which is cut off again.
        gather_output: return the output on every rank, not on the last one alone.
        group: process group (default: all ranks; one rank where there is no process group).
        checkpoint: file or directory of safetensors from which each rank reads its own weights.
        device: where this rank computes (default: the current CUDA device with NCCL, else CPU).
        batched: names of the arguments whose tensors have a batch dim, for a model that keeps rows
            independent by operations that are not known to. Nothing is checked then.
        balance: what stages are balanced by: the ``"bytes"`` of their weights, or the ``"time"``
            that the first rank measures for the example, each module by itself, with weights of
            zeros. The outputs are the same.

    Returns:
        A callable with the model's signature. The first rank's arguments count, the others' are
        not looked at.

    Raises:
        UsageError: the model cannot be split so, or an argument is wrong; on some rank.
        RankError: on the other ranks, when one of them failed.
    """
    comm = Communicator.of(group, device)
    with _agreed(comm):
        if not isinstance(model, nn.Module):
            raise UsageError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        kwargs = _without_cache(model, dict(example_kwargs or {}))
        _check_options(model, example_args, num_chunks, checkpoint, balance)
        points = _checked_points(model, split_points, comm.size)
        inputs = Inputs.of(model.forward, example_args, kwargs, num_chunks or comm.size)
        example, _ = inputs.flatten(example_args, kwargs)
        example = {k: tensor.to(comm.device) for k, tensor in example.items()}
        outputs = None
        if batched is None:
            inputs, outputs = infer_batch_dims(model, inputs, comm.device)
        else:
            inputs = inputs.cut_only(batched)
        weights = Weights(model, checkpoint)
        args, kwargs = inputs.tree.unflatten(example)
        stages = None
        if comm.is_first:
            stages = plan_stages(
                model, weights, args, kwargs, points, comm.size, balance, comm.device
            )
    with _agreed(comm):
        stages = comm.broadcast_object(stages)
        own = weights.read(stages.tensor_ids(model, comm.group_rank), comm.device)
        weights.keep_only(own, comm.device)
        staged = StagedModel(model, stages.units, stages.ranges, comm.group_rank, comm.device)
        outputs = outputs or _planned_outputs(staged, inputs, example)
        prepared = PipelinedModel(staged, inputs, outputs, comm, stages.cuts, gather_output)
        if comm.is_first:  # or refuse it now
            prepared._plan(_CallState(), args, kwargs)
    return prepared


@contextlib.contextmanager
def _agreed(comm: Communicator) -> Iterator[None]:
    """Raises on every rank what one of them raises inside."""
    error: Exception | None = None
    try:
        yield
    except PlanError as failure:
        error = UsageError(f"the model cannot be split across ranks: {failure}")
    except Exception as failure:  # noqa: BLE001 - raised again, on every rank
        error = failure
    comm.agree(error, "preparing a pipeline")


class PipelinedModel:
    """A model split across ranks. Call it on every rank, with the arguments on the first.

    Attributes:
        stage: the model, with the weights of this rank's stage.
        stage_index: which one that is; stages are in rank order.
        num_stages: number of ranks.
        cuts: names of the modules that begin the stages after the first.
        rows: per microbatch.
        config: the model's, where it has one.
    """

    def __init__(
        self,
        staged: StagedModel,
        inputs: Inputs,
        outputs: Outputs,
        comm: Communicator,
        cuts: tuple[str, ...],
        gather_output: bool,
    ):
        self.inputs, self.rows, self.cuts = inputs, inputs.rows, cuts
        self.gather_output, self.__signature__ = gather_output, inputs.signature
        self.stage, self.stage_index, self.num_stages = staged.model, comm.group_rank, comm.size
        self.config = getattr(staged.model, "config", None)
        self._staged, self._outputs, self._comm = staged, outputs, comm
        self._plans = PlanCache()

    def __repr__(self) -> str:
        return (
            f"PipelinedModel({type(self.stage).__name__}, stage {self.stage_index} of "
            f"{self.num_stages}, cut at {', '.join(self.cuts) or 'nothing'}, "
            f"{self.rows} rows per microbatch)"
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The model's output on the last rank (``None`` elsewhere), or everywhere.

        Raises:
            UsageError: on the first rank, for arguments unlike the example's.
            RankError: on every rank but the failed one, naming it.
        """
        with torch.no_grad():
            return self._call(args, kwargs)

    forward = __call__

    def _call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        comm, call = self._comm, _CallState()
        header = None
        if comm.is_first:
            header = call.run_or_record_error(lambda: self._plan(call, args, kwargs))
        received = call.run_or_record_error(lambda: comm.broadcast_object(header))
        header = header if comm.is_first else received
        if header is not None:  # None: the first rank refused the arguments, or is gone
            call.rows, call.plans, metadata = header
            if not comm.is_first:
                for number, data in metadata.items():
                    self._plans.update(number, data)
            self._stream(call)
        comm.agree(call.error, "running a pipeline")
        for number in call.plans:
            self._plans.mark_arrived(number)
        if not self.gather_output:
            return self._outputs.tree.unflatten(call.joined) if comm.is_last else None
        return self._gathered(call)

    def _plan(
        self, call: _CallState, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[int, list[int], dict[int, bytes]]:
        """On the first rank: rows, the plan of each microbatch, and what others must know of it."""
        tensors, rows = self.inputs.flatten(args, kwargs)
        tensors = {k: tensor.to(self._comm.device) for k, tensor in tensors.items()}
        plans: list[int] = []
        for number in range(self.inputs.num_chunks(rows)):
            call.chunks.append(self.inputs.chunk(tensors, number, rows))
            args, kwargs = self.inputs.tree.unflatten(call.chunks[-1])
            plans.append(self._plans.number_of(self._staged, args, kwargs, plans))
        return rows, plans, {number: self._plans.metadata(number) for number in plans}

    def _stream(self, call: _CallState) -> None:
        """All microbatches through this rank's stage.

        A rank that fails keeps the order of messages and sends flags without payload, so that
        nobody waits for what will not come.
        """
        comm, stage = self._comm, self._comm.group_rank
        made: list[Tensors] = []
        for number, chosen in enumerate(call.plans):
            plan = self._plans[chosen]
            values: dict[Any, Any] = {}
            if not comm.is_first:
                values = self._receive(call, plan.edges[stage - 1])
            elif call.error is None:
                values = {("input", k): t for k, t in call.chunks[number].items()}
            found: dict[Any, Any] = {}
            if call.error is None and not call.upstream_failed:
                run = functools.partial(self._staged.run, plan, chosen, values)
                found = call.run_or_record_error(run) or {}
            if not comm.is_last:
                self._send(call, plan.edges[stage], found)
            elif found:
                made.append({k: found["output", k] for k in self._outputs.dims})
        for sending in call.sending:
            call.run_or_record_error(sending.wait)
        if comm.is_last and call.error is None and not call.upstream_failed:
            join = functools.partial(self._outputs.join, made, call.rows)
            call.joined = call.run_or_record_error(join) or {}

    def _receive(self, call: _CallState, layout: Layout) -> dict[Any, Any]:
        comm, source = self._comm, self._comm.group_rank - 1
        if call.lost is not None and call.lost.group_rank == source:
            return {}
        try:
            flag = torch.zeros(1, dtype=torch.int64)
            comm.receive(flag, source, control=True)
            if int(flag):
                call.upstream_failed = True
                return {}
            buffer = layout.empty(comm.wire_device)
            comm.receive(buffer, source)
            return layout.unpack(buffer.to(comm.device))
        except ConnectionLost as lost:
            call.record_lost_peer(lost)
            return {}

    def _send(self, call: _CallState, layout: Layout, values: dict[Any, Any]) -> None:
        comm, to = self._comm, self._comm.group_rank + 1
        buffer = None
        if values and call.error is None:
            buffer = call.run_or_record_error(lambda: layout.pack(values, comm.wire_device))
        if call.lost is not None and call.lost.group_rank == to:
            return
        try:
            flag = torch.tensor([0 if buffer is not None else 1])
            call.sending.append(comm.send(flag, to, control=True))
            if buffer is not None:
                call.sending.append(comm.send(buffer, to))
            while len(call.sending) > 4:  # two microbatches under way are enough
                call.sending.pop(0).wait()
        except ConnectionLost as lost:
            call.record_lost_peer(lost)

    def _gathered(self, call: _CallState) -> Any:
        comm, outputs = self._comm, self._outputs
        layout = layout_of(outputs.joined_shapes(call.rows))
        tensors = call.joined
        try:
            if comm.is_last:
                buffer = layout.pack(tensors, comm.wire_device)
            else:
                buffer = layout.empty(comm.wire_device)
            comm.broadcast(buffer, comm.size - 1)
            if not comm.is_last:
                tensors = layout.unpack(buffer.to(comm.device))
        except ConnectionLost as lost:
            record = ErrorRecord("ConnectionLost", str(lost))
            gone = comm.ranks[lost.group_rank]
            raise RankError(gone, "gathering a pipeline's output", record) from lost
        return outputs.tree.unflatten(tensors)


@dataclass
class _CallState:
    """One rank's state of one call."""

    rows: int = 0
    chunks: list[Tensors] = field(default_factory=list)
    plans: list[int] = field(default_factory=list)
    joined: Tensors = field(default_factory=dict)
    sending: list[Sending] = field(default_factory=list)
    error: BaseException | None = None
    upstream_failed: bool = False

    @property
    def lost(self) -> ConnectionLost | None:
        return self.error if isinstance(self.error, ConnectionLost) else None

    def record_lost_peer(self, lost: ConnectionLost) -> None:
        self.error = self.error or lost
        self.upstream_failed = True

    def run_or_record_error(self, step: Callable[[], Any]) -> Any:
        """What ``step()`` returns; a failure is kept, the first one counts."""
        try:
            return step()
        except Exception as error:  # noqa: BLE001 - raised when all ranks have met
            self.error = self.error or error
            return None


def _planned_outputs(staged: StagedModel, inputs: Inputs, example: Tensors) -> Outputs:
    """How outputs are put together, found by planning calls of the example.

    Raises:
        UsageError: it does not run with another number of rows, or an output has no batch dim.
    """
    made = []
    for rows in (inputs.rows, inputs.rows + 1):
        try:
            plan, _ = staged.plan(*inputs.tree.unflatten(inputs.with_rows(example, rows)))
        except PlanError:
            raise
        except Exception as error:  # whatever a foreign model raises for such arguments
            raise UsageError(
                f"the model cannot be split across ranks: it fails for {rows} rows of the example "
                f"({type(error).__name__}: {error})"
            ) from error
        made.append(plan.output.unflatten(plan.output.empty))
    return Outputs.of(made[0], made[1], (inputs.rows, inputs.rows + 1), type(staged.model).__name__)


def _without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A language model's cache would stay on the ranks that made it; it is turned off."""
    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters and getattr(getattr(model, "config", None), "use_cache", False):
        kwargs.setdefault("use_cache", False)
        if kwargs["use_cache"]:
            raise UsageError(
                "use_cache=True leaves each layer's cache on its own rank; expected "
                "use_cache=False in example_kwargs"
            )
    return kwargs


def _check_options(
    model: nn.Module,
    example_args: Sequence[Any],
    num_chunks: int | None,
    checkpoint: Any,
    balance: str,
) -> None:
    if balance not in ("bytes", "time"):
        raise UsageError(f'balance is {balance!r}; expected "bytes" or "time"')
    if model.training:
        raise UsageError(
            f"{type(model).__name__} is in training mode; a pipeline is for inference: call "
            "model.eval() first"
        )
    if num_chunks is not None and num_chunks < 1:
        raise UsageError(f"num_chunks must be at least 1, found {num_chunks}")
    if isinstance(example_args, torch.Tensor):
        raise UsageError("example_args is a tensor; expected a tuple of arguments: (tensor,)")
    on_meta = [name for name, p in model.named_parameters() if p.is_meta]
    if on_meta and checkpoint is None:
        raise UsageError(
            f"{len(on_meta)} parameters are on the meta device ({on_meta[0]}, …); say with "
            "checkpoint= where their weights are"
        )


def _checked_points(
    model: nn.Module, split_points: str | Sequence[str], num_stages: int
) -> list[str] | None:
    if isinstance(split_points, str):
        if split_points != "auto":
            raise UsageError(
                f'split_points is {split_points!r}; expected "auto" or a list of module names'
            )
        return None
    points = list(split_points)
    check_names(model, points)
    if len(points) != num_stages - 1:
        raise UsageError(
            f"{len(points)} split_points make {len(points) + 1} stages for {num_stages} ranks; "
            f"expected {num_stages - 1} names, or a group of {len(points) + 1} ranks"
        )
    return points
