"""Which image enters the pipeline when: the first rank's queue of jobs."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ddinfer.parallel.continuous.constants import Repeated
from ddinfer.parallel.continuous.threads import ImageTask, PipelineThreads
from ddinfer.parallel.continuous.ticks import best_limit

#: Calls an image is taken to need before the first one has shown how many it needs.
UNKNOWN_CALLS = 20


class Queue:
    """Jobs on their way: not begun, outside the pipeline (encoding, decoding), in it, finished.

    One image more than there is room for is begun ahead, so that its prompt is encoded when its
    turn comes. Jobs are taken from the iterable no earlier than needed to see its end coming.

    Args:
        latency: ticks from a call to its image's next one, hence images that fill the pipeline.
        limit: images in the pipeline at once, while there are plenty.

    Attributes:
        active: images that have a slot in the pipeline.
        ready: those of them whose next call has not entered the first stage yet.
        in_pipeline: by serial, those whose call is on its way.
    """

    def __init__(
        self,
        threads: PipelineThreads,
        jobs: Iterable[Callable[[Any], Any]],
        latency: int,
        limit: int,
    ):
        self.active: list[ImageTask] = []
        self.ready: deque[ImageTask] = deque()
        self.in_pipeline: dict[int, ImageTask] = {}
        self._threads, self._jobs = threads, enumerate(jobs)
        self._latency, self._limit = latency, limit
        self._taken: deque[tuple[int, Callable[[Any], Any]]] = deque()
        self._beside: list[ImageTask] = []
        self._exhausted = False
        self._slots = list(range(max(limit, 2 * latency - 1)))
        self._tokens = itertools.count(1)
        self._calls = UNKNOWN_CALLS
        self._decided: tuple[Any, int] = (None, limit)

    def admit(self) -> None:
        """Takes and begins jobs, and gives slots to images that wait for the denoiser."""
        self._look_ahead()
        limit = self._current_limit()
        ahead = sum(not image.has_entered for image in self._beside)
        while self._taken and ahead < max(limit - len(self.active), 0) + 1:
            index, job = self._taken.popleft()
            image = self._threads.start(index, job)
            image.repeated = Repeated(self._tokens)
            self._beside.append(image)
            ahead += 1
            self._look_ahead()
            limit = self._current_limit()
        for image in list(self._beside):
            if image.call is not None and len(self.active) < limit:
                self._beside.remove(image)
                image.slot, image.has_entered = self._slots.pop(0), True
                self.active.append(image)
                self.ready.append(image)

    def _look_ahead(self) -> None:
        while not self._exhausted and len(self._taken) < self._latency:
            try:
                self._taken.append(next(self._jobs))
            except StopIteration:
                self._exhausted = True

    def _current_limit(self) -> int:
        if not self._exhausted:
            return self._limit
        not_entered = len(self._taken) + sum(not image.has_entered for image in self._beside)
        key = (len(self.active), not_entered)
        if not not_entered or len(self.active) < self._limit - not_entered:
            return self._slots_in_all()
        if self._decided[0] != key:
            left = [max(self._calls - image.num_calls + 1, 1) for image in self.active]
            waiting = [self._calls] * not_entered
            self._decided = (key, best_limit(left, waiting, self._latency, self._limit))
        return self._decided[1]

    def _slots_in_all(self) -> int:
        return len(self._slots) + len(self.active)

    def answer(
        self, image: ImageTask, output: Any = None, error: BaseException | None = None
    ) -> None:
        """Answers an image's call; it is ready again, or it leaves the pipeline."""
        self._threads.answer(image, output, error)
        if image.call is not None:
            self.ready.append(image)
            return
        self.active.remove(image)
        assert image.slot is not None
        self._slots.append(image.slot)
        image.slot = None
        if error is None:
            self._calls = image.num_calls
        self._beside.append(image)

    def take_finished(self) -> Iterator[ImageTask]:
        """Images that have ended since the last time."""
        for image in list(self._beside):
            if image.done:
                self._beside.remove(image)
                yield image

    def is_over(self) -> bool:
        return self._exhausted and not (self._taken or self._beside or self.active)

    def wait(self) -> None:
        """With nothing in the pipeline: until an image asks for it, or has ended."""
        self._threads.wait(
            lambda: any(image.done or image.call is not None for image in self._beside)
        )
