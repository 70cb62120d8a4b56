"""`prepare_pipeline`: any module cut over ranks, one stage a rank, exact."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import ErrorRecord, RankError, UsageError
from ddinfer.parallel.blocks import check_names
from ddinfer.parallel.communicator import Communicator, ConnectionLost, Sending
from ddinfer.parallel.packing import Layout, layout_of
from ddinfer.parallel.prepare.partition import Cut, cut_model
from ddinfer.parallel.prepare.rows import Inputs
from ddinfer.parallel.prepare.samples import settle_inputs


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
) -> PipelinedModel:
    """Cut ``model`` over the ranks of a group, one stage a rank, to run batches as a pipeline.

    Every rank of the group calls this with the same arguments. Afterwards each holds the weights
    of its own stage only; in ``model`` itself the others are on the meta device. Nothing is
    computed before the first call.

    Args:
        model: in eval mode. With ``checkpoint`` its parameters may be on the meta device.
        example_args, example_kwargs: a whole batch as calls will give it; they fix every dim but
            the batch, which is the first dim of the first tensor, and every argument that is no
            tensor. Tensors with another first dim go whole to every microbatch, and those that
            have as many rows by chance.
        split_points: names of the modules that begin the stages after the first; ``"auto"`` cuts
            between blocks so that stages are balanced by bytes.
        num_chunks: microbatches that the example batch is cut into (default: number of ranks).
            A microbatch has ceil(example batch / num_chunks) rows, and a call takes as many as
            its rows need; the last is filled by repeating its last row, which is cut off again.
        gather_output: return the output on every rank, not on the last one alone.
        group: process group (default: all ranks; one rank where there is no process group).
        checkpoint: folder or file of safetensors from which each rank reads its own weights.
        device: where this rank computes (default: the current CUDA device with NCCL, else CPU).
        batched: names of the arguments whose tensors are cut along their first dim, for a model
            that keeps rows apart by operations that are not known to. Nothing is checked then.

    Returns:
        A callable with the model's signature. The first rank's arguments count, the others' are
        not looked at.

    Raises:
        UsageError: something that cannot be right; on every rank, before anything runs.
        RankError: on the other ranks, when one of them failed.
    """
    link = Communicator.of(group, device)
    error: BaseException | None = None
    prepared: PipelinedModel | None = None
    try:
        if not isinstance(model, nn.Module):
            raise UsageError(f"model is a {type(model).__name__}; expected a torch.nn.Module")
        kwargs = _without_cache(model, dict(example_kwargs or {}))
        inputs = _checked_inputs(
            model, example_args, kwargs, num_chunks or link.size, num_chunks, checkpoint
        )
        points = _checked_points(model, split_points, link.size)
        example = pytree.tree_leaves(_bound(inputs, example_args, kwargs))
        if batched is not None:
            inputs = inputs.cut_only(batched)
        inputs, outputs = settle_inputs(model, inputs, link.device, is_given=batched is not None)
        cut = cut_model(model, inputs, outputs, example, points, checkpoint, link)
        prepared = PipelinedModel(model, cut, link, gather_output)
    except Exception as failure:  # noqa: BLE001 - raised again, on every rank
        error = failure
    link.agree(error, "preparing a pipeline")
    assert prepared is not None
    return prepared


class PipelinedModel:
    """A model cut over ranks. Call it on every rank, with the arguments on the first.

    Attributes:
        stage: this rank's part of the model.
        stage_index: which one that is; stages are in rank order.
        num_stages: number of ranks.
        cuts: names of the modules that begin the stages after the first.
        how: ``"trace"``, ``"blocks"`` or ``"whole"``: how the model was cut.
        rows: per microbatch.
        config: the model's, where it has one.
    """

    def __init__(self, model: nn.Module, cut: Cut, link: Communicator, gather_output: bool):
        self.inputs, self.gather_output = cut.inputs, gather_output
        self.config = getattr(model, "config", None)
        self.__signature__ = cut.inputs.signature
        self.rows, self.how, self.cuts = cut.inputs.rows, cut.how, cut.cuts
        self.stage, self.stage_index, self.num_stages = cut.module, link.group_rank, link.size
        self._cut, self._link, self._name = cut, link, type(model).__name__

    def __repr__(self) -> str:
        return (
            f"PipelinedModel({self._name}, stage {self.stage_index} of {self.num_stages}, cut by "
            f"{self.how} at {', '.join(self.cuts) or 'nothing'}, {self.rows} rows a microbatch)"
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
        link, run = self._link, _Run()
        run.guard(lambda: self._open(run, args, kwargs))
        opened = torch.tensor([run.rows])
        run.guard(lambda: link.broadcast(opened, 0, control=True))
        run.rows = int(opened)
        if run.rows:  # 0: the first rank refused the arguments, or is gone
            self._announce(run)
            self._stream(run)
        link.agree(run.error, "running a pipeline")
        self._cut.confirm()
        if not self.gather_output:
            return self._cut.outputs.build(run.joined) if link.is_last else None
        return self._shared(run)

    def _open(self, run: _Run, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self._link.is_first:
            run.leaves, run.rows = self.inputs.flatten(args, kwargs)
            run.leaves = [
                leaf.to(self._link.device) if isinstance(leaf, torch.Tensor) else leaf
                for leaf in run.leaves
            ]

    def _announce(self, run: _Run) -> None:
        """Every rank learns which plan each microbatch follows, where that is not fixed."""
        chunks = range(self.inputs.num_chunks(run.rows))
        if self._link.is_first:
            run.guard(
                lambda: run.chunks.extend(
                    self.inputs.chunk(run.leaves, n, run.rows) for n in chunks
                )
            )
        run.guard(lambda: self._cut.plan(run.chunks))
        run.guard(lambda: self._cut.exchange_plans(self._link))
        run.kinds = self._cut.kinds(len(chunks))
        if len(run.kinds) != len(chunks):  # the first rank has failed
            run.kinds, run.upstream_failed = [], True

    def _stream(self, run: _Run) -> None:
        """All microbatches through this rank's stage.

        A rank that fails keeps the order of messages and sends flags without payload, so that
        nobody waits for what will not come.
        """
        link, cut = self._link, self._cut
        made: list[dict[int, torch.Tensor]] = []
        for number, kind in enumerate(run.kinds):
            values: dict[Any, Any] = {}
            if link.is_first:
                values = cut.inputs_of(run.chunks[number]) if run.error is None else {}
            else:
                values = self._receive(run, cut.edge(kind, link.group_rank - 1))
            found: dict[Any, Any] = {}
            if run.error is None and not run.upstream_failed:
                found = run.guard(lambda v=values, k=kind: cut.run(k, v)) or {}
            if link.is_last:
                made.append(cut.output_leaves(found) if found else {})
            else:
                self._send(run, cut.edge(kind, link.group_rank), found)
        for sending in run.sending:
            run.guard(sending.wait)
        if link.is_last and run.error is None and not run.upstream_failed:
            run.joined = run.guard(lambda: cut.outputs.join(made, run.rows)) or {}

    def _receive(self, run: _Run, layout: Layout) -> dict[Any, Any]:
        link, source = self._link, self._link.group_rank - 1
        if run.lost is not None and run.lost.group_rank == source:
            return {}
        try:
            flag = torch.zeros(1, dtype=torch.int64)
            link.receive(flag, source, control=True)
            if int(flag):
                run.upstream_failed = True
                return {}
            buffer = layout.empty(link.wire_device)
            link.receive(buffer, source)
            return layout.unpack(buffer.to(link.device))
        except ConnectionLost as lost:
            run.lose(lost)
            return {}

    def _send(self, run: _Run, layout: Layout, values: dict[Any, Any]) -> None:
        link, to = self._link, self._link.group_rank + 1
        buffer = None
        if values and run.error is None:
            buffer = run.guard(lambda: layout.pack(values, link.wire_device))
        if run.lost is not None and run.lost.group_rank == to:
            return
        try:
            flag = torch.tensor([0 if buffer is not None else 1])
            run.sending.append(link.send(flag, to, control=True))
            if buffer is not None:
                run.sending.append(link.send(buffer, to))
            while len(run.sending) > 4:  # two microbatches under way are enough
                run.sending.pop(0).wait()
        except ConnectionLost as lost:
            run.lose(lost)

    def _shared(self, run: _Run) -> Any:
        link, outputs = self._link, self._cut.outputs
        layout = layout_of(outputs.shaped(run.rows))
        tensors = run.joined
        try:
            if link.is_last:
                buffer = layout.pack(tensors, link.wire_device)
            else:
                buffer = layout.empty(link.wire_device)
            link.broadcast(buffer, link.size - 1)
            if not link.is_last:
                tensors = layout.unpack(buffer.to(link.device))
        except ConnectionLost as lost:
            record = ErrorRecord("ConnectionLost", str(lost))
            gone = link.ranks[lost.group_rank]
            raise RankError(gone, "gathering a pipeline's output", record) from lost
        return outputs.build(tensors)


@dataclass
class _Run:
    """One call under way on one rank."""

    rows: int = 0
    leaves: list[Any] = field(default_factory=list)
    chunks: list[list[Any]] = field(default_factory=list)
    kinds: list[int] = field(default_factory=list)
    joined: dict[int, torch.Tensor] = field(default_factory=dict)
    sending: list[Sending] = field(default_factory=list)
    error: BaseException | None = None
    upstream_failed: bool = False

    @property
    def lost(self) -> ConnectionLost | None:
        return self.error if isinstance(self.error, ConnectionLost) else None

    def lose(self, lost: ConnectionLost) -> None:
        self.error = self.error or lost
        self.upstream_failed = True

    def guard(self, step: Any) -> Any:
        """What ``step()`` returns; a failure is kept, the first one counts."""
        try:
            return step()
        except Exception as error:  # noqa: BLE001 - raised when all ranks have met
            self.error = self.error or error
            return None


def _without_cache(model: nn.Module, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A language model's cache would stay on the ranks that made it; it is turned off."""
    import inspect

    parameters = inspect.signature(model.forward).parameters
    if "use_cache" in parameters and getattr(getattr(model, "config", None), "use_cache", False):
        kwargs.setdefault("use_cache", False)
        if kwargs["use_cache"]:
            raise UsageError(
                "use_cache=True leaves each layer's cache on its own rank; expected "
                "use_cache=False in example_kwargs"
            )
    return kwargs


def _checked_inputs(
    model: nn.Module,
    args: Sequence[Any],
    kwargs: dict[str, Any],
    chunks: int,
    num_chunks: int | None,
    checkpoint: Any,
) -> Inputs:
    if model.training:
        raise UsageError(
            f"{type(model).__name__} is in training mode; a pipeline is for inference: call "
            "model.eval() first"
        )
    if num_chunks is not None and num_chunks < 1:
        raise UsageError(f"num_chunks must be at least 1, found {num_chunks}")
    if isinstance(args, torch.Tensor):
        raise UsageError("example_args is a tensor; expected a tuple of arguments: (tensor,)")
    on_meta = [name for name, p in model.named_parameters() if p.is_meta]
    if on_meta and checkpoint is None:
        raise UsageError(
            f"{len(on_meta)} parameters are on the meta device ({on_meta[0]}, …); say with "
            "checkpoint= where their weights are"
        )
    return Inputs.of(model.forward, args, kwargs, chunks)


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


def _bound(inputs: Inputs, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    bound = inputs.signature.bind(*args, **kwargs)
    return bound.args, bound.kwargs
