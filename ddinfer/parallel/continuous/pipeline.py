"""The continuous pipeline: denoisers cut over ranks, with several images in flight.

All ranks move in lockstep *ticks*. In a tick each rank runs its stage on one call, then sends the
result to the next rank and receives from the previous one. The last rank sends the denoiser's
output to the first, whose image goes on to its next call. The pipeline is never flushed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import ErrorRecord, RankError, UsageError
from ddinfer.models.component_roles import DENOISER_NAMES
from ddinfer.parallel.blocks import denoiser_blocks, drop_weights
from ddinfer.parallel.communicator import Communicator
from ddinfer.parallel.continuous.admission import AdmissionQueue
from ddinfer.parallel.continuous.exchange import END, ERROR, WORK, Exchange, Message
from ddinfer.parallel.continuous.image_state import check_pipeline_class
from ddinfer.parallel.continuous.pipeline_threads import PipelineThreads
from ddinfer.parallel.cut import block_stages
from ddinfer.parallel.flow import PlanError, StagedModel
from ddinfer.parallel.plans import PlanCache

#: A job makes one image (or batch of images) with the pipeline it is given.
Job = Callable[[Any], Any]


class Outcome(NamedTuple):
    """What became of one job: a value, or why there is none. ``number`` counts jobs from 0."""

    number: int
    value: Any = None
    error: BaseException | None = None


class ContinuousPipeline:
    """Runs jobs over the ranks of a group, each of which holds one stage of the denoisers.

    Every rank of the group makes one with the same denoisers, then calls `run`. Blocks of other
    ranks' stages go to the meta device.

    Args:
        pipe: the pipeline on the first rank; ``None`` or a pipeline elsewhere.
        denoisers: by component name, on ranks that have no ``pipe``.
        stages: which blocks each stage of a denoiser has (default: balanced by bytes).
        group: process group in stage order (default: all ranks).
        num_in_flight: images in the pipeline at once, at least the number of stages S (default: S;
            2·S on a GPU). From 2·S on, a tick's transfers overlap with the next tick's computing.
        device: where this rank computes.

    Raises:
        UsageError: a denoiser that cannot be cut; on every rank.
        RankError: on the other ranks, when one failed.
    """

    def __init__(
        self,
        pipe: Any = None,
        *,
        denoisers: Mapping[str, nn.Module] | None = None,
        stages: Mapping[str, Sequence[range]] | None = None,
        group: Any = None,
        num_in_flight: int | None = None,
        device: str | torch.device | None = None,
    ):
        self.comm, self.pipe = Communicator.of(group, device), pipe
        size = self.comm.size
        default = size * (2 if self.comm.device.type == "cuda" else 1)
        self.num_in_flight = num_in_flight or default
        #: A message takes two ticks instead of one, so twice as many images keep stages busy.
        self.overlap = size > 1 and self.num_in_flight >= 2 * size
        self._has_ended = False
        self._listener: Any = None
        self._staged: list[StagedModel] = []
        error: Exception | None = None
        try:
            if self.num_in_flight < size:
                raise UsageError(
                    f"{num_in_flight} images in flight leave stages idle: {size} stages "
                    f"need at least {size}"
                )
            models = dict(denoisers or find_denoisers(pipe))
            if self.comm.is_first:
                if pipe is None:
                    raise UsageError(
                        "the first rank of a continuous pipeline needs the whole pipeline"
                    )
                check_pipeline_class(type(pipe))
                self._threads = PipelineThreads(pipe, models, self.comm.device)
            self._staged = [
                self._stage(name, model, (stages or {}).get(name)) for name, model in models.items()
            ]
        except Exception as failure:  # noqa: BLE001 - raised again, on every rank
            error = failure
        self.comm.agree(error, "cutting the denoiser")
        self._plans = PlanCache()
        self._exchange = Exchange(self.comm, self._plans)

    def _stage(self, name: str, model: nn.Module, stages: Sequence[range] | None) -> StagedModel:
        _check_supported(name, model)
        blocks = denoiser_blocks(model)
        try:
            stages = stages or block_stages(model, blocks, self.comm.size)
        except PlanError as error:
            raise UsageError(f"the {name} cannot be cut: {error}") from error
        own = stages[self.comm.group_rank]
        for number, block in enumerate(blocks):
            if number not in own:
                drop_weights(model.get_submodule(block))
        if self.comm.is_first and next(model.parameters()).is_meta:
            raise UsageError(
                f"the {name}'s first parameter is in a later stage, but pipelines ask it for the "
                "device; use fewer stages"
            )
        return StagedModel(model, blocks, stages, self.comm.group_rank, self.comm.device)

    @property
    def latency(self) -> int:
        """Ticks from a call's entering the first stage until its image can make the next."""
        return self.comm.size * (2 if self.overlap else 1)

    def set_progress_listener(self, listener: Any) -> None:
        """Reports to ``listener``, a `ProgressListener`, that this rank's stage works or waits."""
        self._listener = listener
        if self.comm.is_first:
            listener.listen_to(self.pipe)
        else:
            listener.waits()

    def close(self) -> None:
        """Gives the denoisers' blocks their own ``forward`` back, and ends groups made for this.

        Weights stay where they are.
        """
        for staged in self._staged:
            staged.detach()
        self.comm.close()

    def run(self, jobs: Iterable[Job]) -> Iterator[Outcome]:
        """Runs ``job(pipe)`` for each of ``jobs`` and yields what became of them as they end.

        Every rank calls this and exhausts the iterator. The first takes jobs when there is room,
        and yields; the others serve it until it is done, and yield nothing.

        Raises:
            RankError: another rank failed for good or is gone.
        """
        self._has_ended = False
        if not self.comm.is_first:
            self._serve()
            return
        with self._threads.patched():
            yield from self._drive(
                AdmissionQueue(self._threads, jobs, self.latency, self.num_in_flight)
            )

    # --- the first rank -----------------------------------------------------------------------

    def _drive(self, queue: AdmissionQueue) -> Iterator[Outcome]:
        try:
            yield from self._run_ticks(queue)
        except (KeyboardInterrupt, SystemExit):
            raise  # the launcher signals the other ranks too
        except BaseException as error:  # GeneratorExit: the caller has enough
            if not (self._has_ended or self._exchange.is_broken):
                is_stop = isinstance(error, GeneratorExit)
                end = self._end_of_run(None if is_stop else error)
                self._end(end, self._exchange.finish_if_pending())
            raise
        self._end(self._end_of_run(), Message())

    def _run_ticks(self, queue: AdmissionQueue) -> Iterator[Outcome]:
        message = Message()
        while True:
            queue.admit()
            for task in queue.take_finished():
                yield Outcome(task.index, task.value, task.error)
            if queue.ready or queue.in_flight:
                if self.overlap:  # what was made in the last tick travels while the next is made
                    with self._awaiting_peers():
                        self._exchange.begin(message)
                message = self._run_first_stage(queue) if queue.ready else Message()
                with self._awaiting_peers():
                    if not self.overlap:
                        self._exchange.begin(message)
                    received = self._exchange.finish()
                self._on_result(queue, received)
            elif queue.is_done():
                return
            else:
                queue.wait()

    def _run_first_stage(self, queue: AdmissionQueue) -> Message:
        """The next image's call through the first stage."""
        task = queue.ready.popleft()
        call = task.call
        assert call is not None
        assert task.slot is not None
        try:
            in_flight = {other.plan for other in queue.in_flight.values()}
            number = task.plan = self._plans.number_of(
                self._staged[call.model], call.args, call.kwargs, in_flight, call.model
            )
            leaves = pytree.tree_leaves((call.args, call.kwargs))
            inputs = {("input", k): leaves[k] for k in self._plans[number].arguments.empty}
            message = Message(
                WORK, task.slot, task.serial, call.model, number, self._plans.metadata(number),
                task.tokens.of(inputs), values=inputs,
            )  # fmt: skip
            message.values = self._run_stage(message)
        except torch.AcceleratorError:
            raise  # sticky: no later call on this device can succeed
        except Exception as error:  # noqa: BLE001 - this image's; the others go on
            queue.resume(task, error=error)
            return Message()
        queue.in_flight[task.serial] = task
        return message

    def _on_result(self, queue: AdmissionQueue, message: Message) -> None:
        """What came back from the last stage goes to its image."""
        if message.kind == END:
            self._end(None, message)
        if message.kind not in (WORK, ERROR):
            return
        task = queue.in_flight.pop(message.serial)
        self._plans.mark_arrived(message.plan)
        if message.error is not None:
            rank, record = message.error
            queue.resume(task, error=RankError(rank, "running its stage", record))
            return
        output = self._plans[message.plan].output
        queue.resume(task, output.unflatten({k: message.values["output", k] for k in output.empty}))

    @contextlib.contextmanager
    def _awaiting_peers(self) -> Iterator[None]:
        with self._listener.awaiting() if self._listener else contextlib.nullcontext():
            yield

    # --- the other ranks ----------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._serve_ticks()
        except torch.AcceleratorError as error:
            self._end(self._end_of_run(error), self._exchange.finish_if_pending())
            raise

    def _serve_ticks(self) -> None:
        message, received = Message(), Message()
        while received.kind != END:
            if self.overlap:
                self._exchange.begin(message)
                message = self._serve_call(received)
                received = self._exchange.finish()
            else:
                received = self._exchange(message)
                message = self._serve_call(received)
        self._end(None, received)

    def _serve_call(self, message: Message) -> Message:
        """A received call through this rank's stage; anything else as it is."""
        if message.kind != WORK:
            return message if message.kind == ERROR else Message()
        try:
            message.values = self._run_stage(message)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - it travels to the image whose call this is
            return message.failed(self.comm.rank, error)
        finally:
            if self._listener:
                self._listener.waits()
        return message

    # --- both ---------------------------------------------------------------------------------

    def _run_stage(self, message: Message) -> dict[Any, Any]:
        if self._listener:
            self._listener.steps()
        plan = self._plans[message.plan]
        return self._staged[message.model].run(plan, message.plan, message.values)

    def _end_of_run(self, error: BaseException | None = None) -> Message:
        failure = None if error is None else (self.comm.rank, ErrorRecord.of(error))
        return Message(END, origin=self.comm.group_rank, error=failure)

    def _end(self, own: Message | None, received: Message) -> None:
        """Takes part in exchanges until every rank knows of the end.

        An end takes as many exchanges as there are ranks to go around. Where two meet, both go on,
        and all ranks stop together when the first has gone around.

        Args:
            own: the end that begins here.
            received: one that another rank has begun, or a message that is dropped.

        Raises:
            RankError: another rank has failed, and this one has no error of its own.
        """
        size, message = self.comm.size, own or received
        left, failure = size, None
        while True:
            if received.kind == END and received.origin != self.comm.group_rank:
                message = received
                left = min(left, size - (self.comm.group_rank - received.origin) % size)
                failure = failure or received.error
            if left == 0 or size == 1:
                break
            received = self._exchange(message, takes_calls=False)
            message, left = Message(), left - 1
        self._has_ended = True
        if failure is not None and not (own and own.error):
            raise RankError(failure[0], "running the pipeline", failure[1])


def find_denoisers(pipe: Any) -> dict[str, nn.Module]:
    """The networks of a pipeline that the continuous pipeline cuts, by component name.

    Raises:
        UsageError: there is none.
    """
    found = {
        name: pipe.components[name]
        for name in DENOISER_NAMES
        if isinstance(pipe.components.get(name), nn.Module)
        and denoiser_blocks(pipe.components[name])
    }
    if not found:
        raise UsageError(
            f"{type(pipe).__name__} has no denoiser made of blocks: expected a component called "
            f"{', '.join(DENOISER_NAMES[:2])}, … with a list of at least two blocks of one type"
        )
    return found


def _check_supported(name: str, model: nn.Module) -> None:
    """Refuses a model that keeps state from one call to the next: images take turns in it."""
    if model.training:
        raise UsageError(f"the {name} is in training mode; call eval() first")
    if getattr(model, "is_cache_enabled", False):
        raise UsageError(
            f"the {name} has a step cache enabled, which keeps one image's state on the model; "
            "call disable_cache() first"
        )
    if hasattr(model, "_orig_mod") or any(m._compiled_call_impl for m in model.modules()):
        raise UsageError(
            f"the {name} is compiled, which does not go with stages; do not compile it"
        )
    if getattr(model, "_hf_hook", None) is not None:
        raise UsageError(f"the {name} has an accelerate hook; load it without offloading")
