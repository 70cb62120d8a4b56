"""the continuous pipeline: a pipeline's denoisers cut over ranks, with several images in flight.

All ranks move in lockstep *ticks*. In a tick each rank runs its stage on the call in its hands,
then hands the result to the next rank and takes the previous one's. The last rank hands the
denoiser's output to the first, whose image goes on to its next call. Nothing is ever flushed.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import ErrorRecord, RankError, UsageError
from ddinfer.models.component_roles import DENOISER_NAMES
from ddinfer.parallel.blocks import denoiser_blocks, drop_weights
from ddinfer.parallel.communicator import Communicator
from ddinfer.parallel.continuous.admission import Queue
from ddinfer.parallel.continuous.image_state import check_pipeline_class
from ddinfer.parallel.continuous.messages import END, ERROR, WORK, Exchange, Message
from ddinfer.parallel.continuous.threads import Call, PipelineThreads
from ddinfer.parallel.cut import block_stages
from ddinfer.parallel.flow import PlanError, StagedModel, call_key
from ddinfer.parallel.packing import Layout
from ddinfer.parallel.plans import PlanCache

#: A job makes one image (or batch of images) with the pipeline it is given.
Job = Callable[[Any], Any]


class Outcome(NamedTuple):
    """What became of one job: a value, or why there is none. ``number`` counts jobs from 0."""

    number: int
    value: Any = None
    error: BaseException | None = None


class Span(NamedTuple):
    """When a rank worked on a call, in `time.monotonic` seconds (one clock per machine)."""

    start_seconds: float
    end_seconds: float
    serial: int


class ContinuousPipeline:
    """Runs jobs over the ranks of a group, each of which holds one stage of the denoisers.

    Every rank of the group makes one with the same denoisers, then calls `run`. Blocks of other
    ranks' stages go to the meta device.

    Args:
        pipe: the pipeline on the first rank; ``None`` or a pipeline elsewhere.
        denoisers: by component name, on ranks that have no ``pipe``.
        group: process group in stage order (default: all ranks).
        num_in_flight: images in the pipeline at once, at least the number of stages S (default: S;
            2·S on a GPU). From 2·S on, a tick's transfers run beside the next tick's computing.
        head_bytes: what the first rank does besides its blocks (encoding, decoding, the
            scheduler), as bytes of blocks that take as long; its stage is that much smaller.
        device: where this rank computes.
        record: keep a `Span` of each call in ``spans``.

    Raises:
        UsageError: a denoiser that cannot be cut; on every rank.
        RankError: on the other ranks, when one failed.
    """

    def __init__(
        self,
        pipe: Any = None,
        *,
        denoisers: Mapping[str, nn.Module] | None = None,
        group: Any = None,
        num_in_flight: int | None = None,
        head_bytes: int = 0,
        device: str | torch.device | None = None,
        record: bool = False,
    ):
        self.comm = Communicator.of(group, device)
        default = self.comm.size * (2 if self.comm.device.type == "cuda" else 1)
        self.num_in_flight = num_in_flight or default
        #: A hop takes two ticks instead of one, so twice as many images keep all stages busy.
        self.overlap = self.comm.size > 1 and self.num_in_flight >= 2 * self.comm.size
        self.spans: list[Span] = []
        self.pipe = pipe
        self._record, self._has_ended = record, False
        self._before: Callable[[], object] = lambda: None
        self._after: Callable[[], object] = lambda: None
        self._awaiting: Callable[[], AbstractContextManager[Any]] = nullcontext
        self._staged: list[StagedModel] = []
        error: Exception | None = None
        try:
            if num_in_flight is not None and num_in_flight < self.comm.size:
                raise UsageError(
                    f"{num_in_flight} images in flight leave stages idle: {self.comm.size} stages "
                    f"need at least {self.comm.size}"
                )
            models = dict(denoisers or find_denoisers(pipe))
            if self.comm.is_first and pipe is None:
                raise UsageError("the first rank of a continuous pipeline needs the whole pipeline")
            if self.comm.is_first:
                check_pipeline_class(type(pipe))
                self._threads = PipelineThreads(pipe, models, self.comm.device)
            for name, model in models.items():
                self._staged.append(self._stage(name, model, head_bytes))
        except Exception as failure:  # noqa: BLE001 - raised again, on every rank
            error = failure
        self.comm.agree(error, "cutting the denoiser")
        self._plans = PlanCache()
        self._inspected: list[frozenset[int]] = [frozenset() for _ in self._staged]
        self._exchange = Exchange(self.comm, self._layout, self._learn)

    def _stage(self, name: str, model: nn.Module, head_bytes: int) -> StagedModel:
        _refuse(name, model)
        blocks = denoiser_blocks(model)
        try:
            stages = block_stages(model, blocks, self.comm.size, first=head_bytes)
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

    def listen(
        self,
        before: Callable[[], object],
        after: Callable[[], object] = lambda: None,
        awaiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """From now on call these around every turn of this rank's stage.

        Args:
            awaiting: what the first rank waits in for the others.
        """
        self._before, self._after, self._awaiting = before, after, awaiting

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
        with self._threads.open():
            yield from self._drive(Queue(self._threads, jobs, self.latency, self.num_in_flight))

    # --- the first rank -----------------------------------------------------------------------

    def _drive(self, queue: Queue) -> Iterator[Outcome]:
        try:
            yield from self._turn(queue)
        except (KeyboardInterrupt, SystemExit):
            raise  # these come to the other ranks by themselves
        except BaseException as error:  # GeneratorExit: the caller has enough
            if not (self._has_ended or self._exchange.is_broken):
                told = None if isinstance(error, GeneratorExit) else error
                self._end(Message(END, header=_told(told)), self._exchange.settle())
            raise
        self._end(Message(END), Message())

    def _turn(self, queue: Queue) -> Iterator[Outcome]:
        message = Message()
        while True:
            queue.admit()
            for image in queue.take_finished():
                yield Outcome(image.index, image.value, image.error)
            if queue.ready or queue.in_pipeline:
                if self.overlap:  # what was made in the last tick travels while the next is made
                    with self._awaiting():
                        self._exchange.begin(message)
                message = self._enter(queue) if queue.ready else Message()
                with self._awaiting():
                    if not self.overlap:
                        self._exchange.begin(message)
                    received = self._exchange.finish()
                self._arrive(queue, received)
            elif queue.is_over():
                return
            else:
                queue.wait()

    def _enter(self, queue: Queue) -> Message:
        """The next image's call through the first stage."""
        image = queue.ready.popleft()
        call = image.call
        assert call is not None
        assert image.slot is not None
        try:
            number = image.plan = self._plan(call, queue)
            leaves = pytree.tree_leaves((call.args, call.kwargs))
            inputs = {("input", k): leaves[k] for k in self._plans[number].arguments.empty}
            tokens = {label: image.repeated.token(label, t) for label, t in inputs.items()}
            message = Message(
                WORK, image.slot, image.serial, call.model, number, 0, tokens, inputs,
                self._plans.metadata(number),
            )  # fmt: skip
            values = self._timed(message)
        except torch.AcceleratorError:
            raise  # sticky: no later call on this device can succeed
        except Exception as error:  # noqa: BLE001 - this image's; the others go on
            queue.answer(image, error=error)
            return Message()
        message.values = values
        queue.in_pipeline[image.serial] = image
        return message

    def _plan(self, call: Call, queue: Queue) -> int:
        """The number of the plan that a call follows."""
        staged = self._staged[call.model]
        key = call_key(call.args, call.kwargs, self._inspected[call.model])
        number = self._plans.find((call.model, key))
        if number is not None:
            return number
        plan, inspected = staged.plan(call.args, call.kwargs)
        self._inspected[call.model] |= inspected
        key = call_key(call.args, call.kwargs, self._inspected[call.model])
        in_flight = {image.plan for image in queue.in_pipeline.values()}
        return self._plans.add((call.model, key), plan, in_flight)

    def _arrive(self, queue: Queue, message: Message) -> None:
        """What came back from the last stage goes to its image."""
        if message.kind == END:
            self._end(None, message)
        if message.kind not in (WORK, ERROR):
            return
        image = queue.in_pipeline.pop(message.serial)
        self._plans.mark_arrived(message.plan)
        if message.kind == ERROR:
            rank, record, _ = message.loaded()
            queue.answer(image, error=RankError(rank, "running its stage", record))
            return
        plan = self._plans[message.plan]
        queue.answer(
            image,
            plan.output.unflatten({k: message.values["output", k] for k in plan.output.empty}),
        )

    # --- the other ranks ----------------------------------------------------------------------

    def _serve(self) -> None:
        try:
            self._serve_until_the_end()
        except torch.AcceleratorError as error:
            own = Message(END, origin=self.comm.group_rank, header=_told(error))
            self._end(own, self._exchange.settle())
            raise

    def _serve_until_the_end(self) -> None:
        message, received = Message(), Message()
        while True:
            if self.overlap:
                self._exchange.begin(message)
                message = self._pass(received)
                received = self._exchange.finish()
            else:
                received = self._exchange(message)
                message = self._pass(received) if received.kind != END else received
            if received.kind == END:
                self._end(None, received)
                return

    def _pass(self, message: Message) -> Message:
        """A received call through this rank's stage; anything else as it is."""
        if message.kind != WORK:
            return message if message.kind == ERROR else Message()
        try:
            message.values = self._timed(message)
        except torch.AcceleratorError:
            raise
        except Exception as error:  # noqa: BLE001 - it travels to the image whose call this is
            return message.failed(self.comm.rank, error)
        return message

    # --- both ---------------------------------------------------------------------------------

    def _timed(self, message: Message) -> dict[Any, Any]:
        started = time.monotonic()
        self._before()
        plan = self._plans[message.plan]
        values = self._staged[message.model].run(plan, message.plan, message.values)
        self._after()
        if self._record:
            if self.comm.device.type == "cuda":
                torch.cuda.synchronize(self.comm.device)
            self.spans.append(Span(started, time.monotonic(), message.serial))
        return values

    def _learn(self, message: Message) -> None:
        """Keeps a plan that came with a message. A last rank's plan is of no use to the first."""
        if self.comm.is_first or message.kind not in (WORK, ERROR) or not message.header:
            return
        header = message.header if message.kind == WORK else message.loaded()[2]
        if header:
            self._plans.update(message.plan, header)

    def _layout(self, message: Message, stage: int) -> Layout:
        plan = self._plans[message.plan]
        return plan.edges[stage] if stage < self.comm.size - 1 else plan.back

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
        left, failed = size, None
        while True:
            if received.kind == END and received.origin != self.comm.group_rank:
                message = received
                left = min(left, size - (self.comm.group_rank - received.origin) % size)
                failed = received if failed is None and received.header else failed
            if left == 0 or size == 1:
                break
            received = self._exchange(message, takes_calls=False)
            message, left = Message(), left - 1
        self._has_ended = True
        if failed is not None and not (own and own.header):
            record = failed.loaded()
            raise RankError(self.comm.ranks[failed.origin], "running the pipeline", record)


def _told(error: BaseException | None) -> bytes:
    return b"" if error is None else pickle.dumps(ErrorRecord.of(error))


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


def _refuse(name: str, model: nn.Module) -> None:
    """What keeps state on the model from one call to the next cannot have images interleaved."""
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
