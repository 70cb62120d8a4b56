"""Runs each image as an unchanged pipeline call on a thread of its own.

The thread stops at every denoiser call until the first rank's driver has the result. Between
denoiser calls exactly one image runs while the driver waits: that is the scheduler's step. What
comes before the first call (encoding the prompt) and from the decoder on runs outside the pipeline.
"""

from __future__ import annotations

import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ddinfer.errors import UsageError
from ddinfer.parallel.continuous.image_state import (
    PipelineCopies,
    converts_decoder,
    refuse_changes,
)
from ddinfer.patched import patched


class Call(NamedTuple):
    """A denoiser call that waits for its result."""

    model: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Cancelled(BaseException):
    """Raised in images whose result nobody wants. No `Exception`: pipelines catch those."""


@dataclass(eq=False)
class Task:
    """One image on its thread, seen from the driver.

    Attributes:
        index: of the job.
        call: what it waits for, while it does.
        done: it has ended; ``value`` or ``error`` is set.
        num_calls: denoiser calls made so far.
        slot: its place in the pipeline while it has one.
        has_entered: it has had a place in the pipeline.
        serial: its number among all images of the pipeline.
        plan: number of the plan that its call follows, while the call is in flight.
        tokens: of the tensors given to the denoiser, see `TensorTokens`.
    """

    index: int
    call: Call | None = None
    done: bool = False
    value: Any = None
    error: BaseException | None = None
    num_calls: int = 0
    slot: int | None = None
    has_entered: bool = False
    serial: int = 0
    plan: int = -1
    tokens: Any = None
    thread: threading.Thread | None = None
    #: It runs, and the driver waits until it stops: at a call, at a decoder or at its end.
    is_awaited: bool = False
    is_outside: bool = True  # runs outside the pipeline, holding the lock
    results: queue.SimpleQueue[Any] = field(default_factory=queue.SimpleQueue)


class PipelineThreads:
    """Runs tasks on threads and stops them at the denoisers of one pipeline.

    Args:
        pipe: a diffusers pipeline; each image gets a copy with a scheduler of its own.
        models: the denoisers by component name. Their ``forward`` is replaced inside `patched`.

    Raises:
        UsageError: ``pipe`` keeps something that cannot be copied for each image.
    """

    def __init__(self, pipe: Any, models: Mapping[str, nn.Module], device: torch.device):
        self.pipe, self.models, self.device = pipe, dict(models), device
        self._copies = PipelineCopies(pipe)
        self._runs_alone = converts_decoder(pipe.components)  # no two images run at once
        self._stops = threading.Semaphore(0)  # released whenever a task has stopped
        self._outside = threading.Lock()  # one image at a time outside the pipeline
        self._local = threading.local()
        self._tasks: list[Task] = []
        self._serials = itertools.count(1)
        self._num_threads = torch.get_num_threads()
        self._stream: torch.cuda.Stream | None = None  # the driver's

    @contextmanager
    def patched(self) -> Iterator[None]:
        """Inside, denoiser and decoder calls of tasks come here."""
        if self.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.device)
        waits = True
        with ExitStack() as patches:
            for number, model in enumerate(self.models.values()):
                patches.enter_context(patched(model, "forward", self._denoising(number, model)))
            for component in self.pipe.components.values():
                is_denoiser = any(component is model for model in self.models.values())
                decode = getattr(component, "decode", None)
                if isinstance(component, nn.Module) and not is_denoiser and callable(decode):
                    patches.enter_context(patched(component, "decode", self._decoding(decode)))
            name = type(self.pipe).__name__
            patches.enter_context(
                refuse_changes(self.models, name, lambda: self.current() is not None)
            )
            try:
                yield
            except (Exception, GeneratorExit):
                raise
            except BaseException:  # on an interrupt, do not join threads that may hang
                waits = False
                raise
            finally:
                self._cancel(waits)

    def spawn(self, index: int, job: Callable[[Any], Any]) -> Task:
        """``job(pipe)`` begins outside the pipeline and runs to its first denoiser call."""
        task = Task(index, serial=next(self._serials))
        task.thread = threading.Thread(
            target=self._work, args=(task, job), name=f"image-{index}", daemon=True
        )
        self._tasks.append(task)
        task.thread.start()
        return task

    def resume(self, task: Task, output: Any = None, error: BaseException | None = None) -> None:
        """Gives a task its call's result; returns when it stops: at a call, a decoder, its end."""
        task.call, task.is_awaited = None, True
        task.results.put((output, error))
        self.wait(lambda: not task.is_awaited)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits until some task has stopped and that makes ``condition()`` true."""
        while not condition():
            self._stops.acquire()

    def current(self) -> Task | None:
        """The task of this thread."""
        return getattr(self._local, "task", None)

    def _cancel(self, waits: bool) -> None:
        for task in list(self._tasks):
            while not task.done and (waits or task.call is not None):
                if task.call is not None:
                    self.resume(task, error=Cancelled())
                else:
                    self._stops.acquire()

    # --- on the tasks' threads ----------------------------------------------------------------

    def _work(self, task: Task, job: Callable[[Any], Any]) -> None:
        self._local.task = task
        torch.set_num_threads(self._num_threads)  # a new thread may not know; kernels round so
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)  # and device; a thread starts on the default ones
        self._outside.acquire()
        try:
            task.value = job(self._copies.make())
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - the driver decides what it means
            task.error = error
        finally:
            if task.is_outside:
                self._outside.release()
            self._tasks.remove(task)
            task.done = True
            self._stopped(task)

    def _stopped(self, task: Task) -> None:
        """After whatever the driver may look at has been set."""
        task.is_awaited = False
        self._stops.release()

    def _denoising(self, number: int, model: nn.Module) -> Callable[..., Any]:
        forward = model.forward

        @functools.wraps(forward)
        def denoise(*args: Any, **kwargs: Any) -> Any:
            task = self.current()
            if task is None:
                return forward(*args, **kwargs)
            return self._result_of(task, Call(number, args, kwargs))

        return denoise

    def _result_of(self, task: Task, call: Call) -> Any:
        if torch.is_autocast_enabled(self.device.type):
            raise UsageError(
                "the denoiser was called under autocast, which does not reach the other ranks; "
                "load the pipeline in the dtype instead"
            )
        if task.is_outside:
            task.is_outside = False
            self._outside.release()
        task.num_calls += 1
        task.call = call
        self._stopped(task)
        output, error = task.results.get()
        if self._runs_alone:
            self._outside.acquire()
            task.is_outside = True
        if error is not None:
            raise error
        return output

    def _decoding(self, decode: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(decode)
        def leave_pipeline_and_decode(*args: Any, **kwargs: Any) -> Any:
            task = self.current()
            if task is not None and not task.is_outside:
                self._stopped(task)
                self._outside.acquire()
                task.is_outside = True
            return decode(*args, **kwargs)

        return leave_pipeline_and_decode
