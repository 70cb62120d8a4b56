"""The clock of the pipeline, simulated: how many ticks a set of images takes. Pure arithmetic."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence


def count_ticks(in_flight: Sequence[int], waiting: Sequence[int], latency: int, limit: int) -> int:
    """Ticks until every image has made all of its denoiser calls.

    In a tick every stage works on one call. A call that enters the first stage in tick t can be
    followed by its image's next one in tick t + latency. N = M ≥ S images of T calls each take
    M·T + S − 1 ticks.

    Args:
        in_flight: calls that each image in flight still has to make, in the order they are due.
        waiting: likewise for the images that are not in the pipeline yet.
        latency: the number of stages S, or twice that where transfers run beside computing.
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


def ideal_utilisation(calls: Sequence[int], latency: int, limit: int) -> float:
    """Useful stage time / (ticks × stages) for images with this many calls each."""
    ticks = min(
        count_ticks([], calls, latency, n) for n in range(limit, max(limit, 2 * latency - 1) + 1)
    )
    return sum(calls) / ticks
