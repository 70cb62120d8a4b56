"""Which image enters the pipeline when: the first rank's queue of jobs."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from ddinfer.parallel.continuous.pipeline_threads import PipelineThreads, Task
from ddinfer.parallel.tensor_tokens import TensorTokens

#: Calls an image is taken to need before the first one has shown how many it needs.
UNKNOWN_CALLS = 20


class AdmissionQueue:
    """Jobs in order: not begun, outside the pipeline (encoding, decoding), in it, finished.

    One image more than there is room for is begun ahead, so that its prompt is encoded when its
    turn comes. Jobs are taken from the iterable no earlier than needed to see its end coming.

    Args:
        latency: ticks from a call to its image's next one, hence images that fill the pipeline.
        limit: images in the pipeline at once, while there are plenty.

    Attributes:
        active: images that have a slot in the pipeline.
        ready: those of them whose next call has not entered the first stage yet.
        in_flight: by serial, those whose call has.
    """

    def __init__(
        self,
        threads: PipelineThreads,
        jobs: Iterable[Callable[[Any], Any]],
        latency: int,
        limit: int,
    ):
        self.active: list[Task] = []
        self.ready: deque[Task] = deque()
        self.in_flight: dict[int, Task] = {}
        self._threads, self._jobs = threads, enumerate(jobs)
        self._latency, self._limit = latency, limit
        self._taken: deque[tuple[int, Callable[[Any], Any]]] = deque()
        self._outside: list[Task] = []
        self._exhausted = False
        self._slots = list(range(max(limit, 2 * latency - 1)))
        self._tokens = itertools.count(1)
        self._num_calls = UNKNOWN_CALLS  # of an image
        self._decided: tuple[Any, int] = (None, limit)

    def admit(self) -> None:
        """Takes and begins jobs, and gives slots to images that wait for the denoiser."""
        self._look_ahead()
        limit = self.current_limit()
        ahead = self._num_not_entered()
        while self._taken and ahead < max(limit - len(self.active), 0) + 1:
            task = self._threads.spawn(*self._taken.popleft())
            task.tokens = TensorTokens(self._tokens)
            self._outside.append(task)
            ahead += 1
            self._look_ahead()
            limit = self.current_limit()
        for task in list(self._outside):
            if task.call is not None and len(self.active) < limit:
                self._outside.remove(task)
                task.slot, task.has_entered = self._slots.pop(0), True
                self.active.append(task)
                self.ready.append(task)

    def resume(self, task: Task, output: Any = None, error: BaseException | None = None) -> None:
        """Gives an image its call's result; it is ready again, or it leaves the pipeline."""
        self._threads.resume(task, output, error)
        if task.call is not None:
            self.ready.append(task)
            return
        self.active.remove(task)
        assert task.slot is not None
        self._slots.append(task.slot)
        task.slot = None
        if error is None:
            self._num_calls = task.num_calls
        self._outside.append(task)

    def take_finished(self) -> Iterator[Task]:
        """Images that have ended since the last time."""
        for task in list(self._outside):
            if task.done:
                self._outside.remove(task)
                yield task

    def is_done(self) -> bool:
        return self._exhausted and not (self._taken or self._outside or self.active)

    def wait(self) -> None:
        """With nothing in flight: until an image calls the denoiser or has ended."""
        self._threads.wait(lambda: any(t.done or t.call is not None for t in self._outside))

    def current_limit(self) -> int:
        """Images in the pipeline at once, as far as the end of the jobs is in sight."""
        if not self._exhausted:
            return self._limit
        not_entered = len(self._taken) + self._num_not_entered()
        key = (len(self.active), not_entered)
        if not not_entered or len(self.active) < self._limit - not_entered:
            return len(self._slots) + len(self.active)
        if self._decided[0] != key:
            left = [max(self._num_calls - task.num_calls + 1, 1) for task in self.active]
            waiting = [self._num_calls] * not_entered
            self._decided = (key, best_limit(left, waiting, self._latency, self._limit))
        return self._decided[1]

    def _num_not_entered(self) -> int:
        return sum(not task.has_entered for task in self._outside)

    def _look_ahead(self) -> None:
        while not self._exhausted and len(self._taken) < self._latency:
            try:
                self._taken.append(next(self._jobs))
            except StopIteration:
                self._exhausted = True


def count_ticks(in_flight: Sequence[int], waiting: Sequence[int], latency: int, limit: int) -> int:
    """Ticks until every image has made all of its denoiser calls.

    In a tick every stage works on one call. A call that enters the first stage in tick t can be
    followed by its image's next one in tick t + latency. N = M ≥ S images of T calls each take
    M·T + S − 1 ticks.

    Args:
        in_flight: calls that each image in flight still has to make, in the order they are due.
        waiting: likewise for the images that are not in the pipeline yet.
        latency: the number of stages S, or twice that where transfers overlap with computing.
        limit: images in the pipeline at once; the next enters when one has made its last call.
    """
    ready = deque((0, calls) for calls in in_flight if calls)  # (first tick it can enter, calls)
    queue = deque(calls for calls in waiting if calls)
    tick = last = 0
    returning: deque[tuple[int, int]] = deque()  # (tick it is back, calls left)
    while ready or queue or returning:
        while returning and returning[0][0] <= tick:
            back, calls = returning.popleft()
            if calls:
                ready.append((back, calls))
        while queue and len(ready) + len(returning) < limit:
            ready.append((tick, queue.popleft()))
        if ready:
            _, calls = ready.popleft()
            returning.append((tick + latency, calls - 1))
            last = tick + latency
        tick += 1
    return last


def best_limit(in_flight: Sequence[int], waiting: Sequence[int], latency: int, limit: int) -> int:
    """How many images to have in the pipeline until the end: ``limit``, or up to 2·latency − 1.

    The last images would leave fewer than ``latency`` in flight; admitting them early keeps
    every stage busy. The fewest that need the fewest ticks are taken.

    Args:
        waiting: all images that are left, so this is for the end of the job.
        limit: images in the pipeline at once as long as there are plenty.
    """
    choices = range(limit, max(limit, 2 * latency - 1) + 1)
    return min(choices, key=lambda n: (count_ticks(in_flight, waiting, latency, n), n))
