"""One image in the making: an unchanged pipeline call on a thread of its own.

The thread stops at every denoiser call until the pipeline has answered it. Between denoiser calls
exactly one image runs, while the pipeline's driver waits: that is the scheduler's step. What comes
before the first call (encoding the prompt) and from the decoder on runs outside the pipeline.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ddinfer.errors import UsageError
from ddinfer.parallel.continuous.image_state import PipelineCopies, converts_decoder, refuse_changes


@dataclass(frozen=True)
class Call:
    """A denoiser call that waits to be answered."""

    model: int
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Cancelled(BaseException):
    """Thrown into images that nobody waits for any more. No `Exception`: pipelines catch those."""


@dataclass(eq=False)
class ImageTask:
    """One job on its thread, seen from the driver.

    Attributes:
        index: of the job.
        call: what it waits for, while it does.
        done: it has ended; ``value`` or ``error`` is set.
        num_calls: denoiser calls made so far.
        slot: its place in the pipeline while it is there.
        has_entered: it has been in the pipeline.
        serial: its number among all images of the pipeline.
        plan: number of the plan that its call follows, while the call is in the pipeline.
        repeated: tensors given to the denoiser before, see `ddinfer.parallel.continuous.constants`.
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
    repeated: Any = None
    thread: threading.Thread | None = None
    _resume: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    _reply: Any = None
    _beside: bool = True  # runs outside the pipeline, holding the threads's lock
    _watched: bool = False  # the driver waits for it to stop


class PipelineThreads:
    """Runs images on threads and stops them at the denoisers of one pipeline.

    Args:
        pipe: a diffusers pipeline; each image gets a copy with a scheduler of its own.
        models: the denoisers by component name. Their ``forward`` is ours while `open` lasts.

    Raises:
        UsageError: ``pipe`` keeps something that cannot be copied for each image.
    """

    def __init__(self, pipe: Any, models: Mapping[str, nn.Module], device: torch.device):
        self.pipe, self.models, self.device = pipe, list(models.values()), device
        self._named = dict(models)
        self._copies = PipelineCopies(pipe)
        self._alone = converts_decoder(pipe.components)  # no two images run at once
        self._changed = threading.Condition()
        self._beside = threading.Lock()  # one image at a time outside the pipeline
        self._mine = threading.local()
        self._images: list[ImageTask] = []
        self._serials = itertools.count(1)
        self._num_threads = torch.get_num_threads()
        self._stream: torch.cuda.Stream | None = None  # of whoever runs the pipeline

    @contextmanager
    def open(self) -> Iterator[None]:
        """Denoiser and decoder calls come here, for as long as it lasts."""
        if self.device.type == "cuda":
            self._stream = torch.cuda.current_stream(self.device)
        patched: list[tuple[Any, str, Any]] = []
        for number, model in enumerate(self.models):
            patched.append((model, "forward", model.__dict__.get("forward")))
            model.forward = _Denoise(self, number, model.forward)
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module) and component not in self.models:
                decode = getattr(component, "decode", None)
                if callable(decode):
                    patched.append((component, "decode", component.__dict__.get("decode")))
                    component.decode = _Decode(self, decode)  # type: ignore[assignment]
        waits = True
        guard = refuse_changes(
            self._named, type(self.pipe).__name__, lambda: self.current() is not None
        )
        try:
            with guard:
                yield
        except (Exception, GeneratorExit):
            raise
        except BaseException:  # whoever ends a program does not wait for what hangs
            waits = False
            raise
        finally:
            self._cancel(waits)
            for owner, name, before in patched:
                owner.__dict__.pop(name, None)
                if before is not None:
                    owner.__dict__[name] = before

    def start(self, index: int, job: Callable[[Any], Any]) -> ImageTask:
        """``job(pipe)`` begins outside the pipeline and goes on to its first denoiser call."""
        image = ImageTask(index, serial=next(self._serials))
        image.thread = threading.Thread(
            target=self._work, args=(image, job), name=f"image-{index}", daemon=True
        )
        self._images.append(image)
        image.thread.start()
        return image

    def answer(
        self, image: ImageTask, output: Any = None, error: BaseException | None = None
    ) -> None:
        """Answers the image's call; returns when it stops again: at a call, a decoder, its end."""
        with self._changed:
            image.call, image._watched = None, True
            image._reply = (output, error)
            image._resume.release()
            self._changed.wait_for(lambda: not image._watched)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Waits until something about the images makes ``condition()`` true."""
        with self._changed:
            self._changed.wait_for(condition)

    def _work(self, image: ImageTask, job: Callable[[Any], Any]) -> None:
        self._mine.image = image
        torch.set_num_threads(self._num_threads)  # a new thread may not know; kernels round so
        if self._stream is not None:
            torch.cuda.set_stream(self._stream)  # and device; a thread starts on the default ones
        self._beside.acquire()
        try:
            image.value = job(self._copies.make())
        except Cancelled:
            pass
        except BaseException as error:  # noqa: BLE001 - the driver decides what it means
            image.error = error
        finally:
            if image._beside:
                self._beside.release()
            with self._changed:
                image.done, image._watched = True, False
                self._images.remove(image)
                self._changed.notify_all()

    def current(self) -> ImageTask | None:
        return getattr(self._mine, "image", None)

    def denoise(self, image: ImageTask, call: Call) -> Any:
        """On the image's thread: stops until the pipeline has answered.

        Raises:
            UsageError: under autocast, which holds for this thread alone.
        """
        if torch.is_autocast_enabled(self.device.type):
            raise UsageError(
                "the denoiser was called under autocast, which does not reach the other ranks; "
                "load the pipeline in the dtype instead"
            )
        if image._beside:
            image._beside = False
            self._beside.release()
        with self._changed:
            image.call, image._watched = call, False
            image.num_calls += 1
            self._changed.notify_all()
        image._resume.acquire()
        if self._alone:
            self._beside.acquire()
            image._beside = True
        output, error = image._reply
        image._reply = None
        if error is not None:
            raise error
        return output

    def step_aside(self, image: ImageTask) -> None:
        """On the image's thread: from here on it runs outside the pipeline, which goes on."""
        if image._beside:
            return
        with self._changed:
            image._watched = False
            self._changed.notify_all()
        self._beside.acquire()
        image._beside = True

    def _cancel(self, waits: bool) -> None:
        for image in list(self._images):
            if image.call is not None:
                self.answer(image, error=Cancelled())
        for image in list(self._images):
            if image.thread is not None and waits:
                self._drain(image)

    def _drain(self, image: ImageTask) -> None:
        """Waits for an image that is encoding or decoding, then lets it go."""
        while not image.done:
            self.wait(lambda: image.done or image.call is not None)
            if image.call is not None:
                self.answer(image, error=Cancelled())


class _Denoise:
    """A denoiser's ``forward`` while images are made."""

    def __init__(self, threads: PipelineThreads, number: int, forward: Any):
        self.threads, self.number, self.forward = threads, number, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        image = self.threads.current()
        if image is None:
            return self.forward(*args, **kwargs)
        return self.threads.denoise(image, Call(self.number, args, kwargs))


class _Decode:
    """A decoder's ``decode`` while images are made."""

    def __init__(self, threads: PipelineThreads, decode: Any):
        self.threads, self.decode = threads, decode

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        image = self.threads.current()
        if image is not None:
            self.threads.step_aside(image)
        return self.decode(*args, **kwargs)
