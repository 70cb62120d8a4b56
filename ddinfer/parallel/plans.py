"""The plans that the ranks of a continuous pipeline share, by number.

A plan is made on the first rank. It travels with every call that follows it until one of those
calls has come back from the last rank: by then every rank has it. So no rank has to remember what
another one has received, also after calls that failed or were dropped.
"""

from __future__ import annotations

import pickle
from collections import defaultdict
from collections.abc import Collection, Hashable
from typing import Any

from ddinfer.parallel.flow import Plan, StagedModel, call_key

#: Plans kept per rank, the least recently used dropped first.
MAX_PLANS = 1000


class PlanCache:
    """One rank's plans. Numbers are never used twice, so a plan that was dropped is made again."""

    def __init__(self) -> None:
        self._plans: dict[int, Plan] = {}
        self._numbers: dict[Hashable, int] = {}  # first rank: least recently used first
        self._everywhere: set[int] = set()
        self._num_made = 0
        self._inspected: defaultdict[int, frozenset[int]] = defaultdict(frozenset)

    def __getitem__(self, number: int) -> Plan:
        return self._plans[number]

    def __len__(self) -> int:
        return len(self._plans)

    def number_of(
        self,
        staged: StagedModel,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        in_flight: Collection[int],
        model: int = 0,
    ) -> int:
        """The number of the plan that a call follows, which is made if there is none yet.

        Runs on the first rank.

        Args:
            in_flight: numbers of plans that must not be dropped.
            model: which of several models is called.
        """
        number = self.find((model, call_key(args, kwargs, self._inspected[model])))
        if number is None:
            plan, inspected = staged.plan(args, kwargs)
            self._inspected[model] |= inspected
            key = (model, call_key(args, kwargs, self._inspected[model]))
            number = self.add(key, plan, in_flight)
        return number

    def find(self, key: Hashable) -> int | None:
        """The number of the plan for calls of this kind, on the first rank."""
        number = self._numbers.pop(key, None)
        if number is not None:
            self._numbers[key] = number
        return number

    def add(self, key: Hashable, plan: Plan, in_flight: Collection[int]) -> int:
        """Keeps a new plan on the first rank and returns its number.

        Args:
            in_flight: numbers of plans that calls in the pipeline follow; these are not dropped.
        """
        idle = [k for k, number in self._numbers.items() if number not in in_flight]
        for unused in idle[: max(len(self._plans) - MAX_PLANS + 1, 0)]:
            number = self._numbers.pop(unused)
            del self._plans[number]
            self._everywhere.discard(number)
        number = self._num_made
        self._num_made += 1
        self._plans[number], self._numbers[key] = plan, number
        return number

    def metadata(self, number: int) -> bytes:
        """What must travel with a call: its plan and the numbers still in use, if not known yet."""
        if number in self._everywhere:
            return b""
        return pickle.dumps((self._plans[number], frozenset(self._plans)))

    def mark_arrived(self, number: int) -> None:
        """A call that follows this plan has come back to the first rank."""
        self._everywhere.add(number)

    def update(self, number: int, metadata: bytes) -> None:
        """Keeps what came with a call, on the other ranks, and drops what is out of use."""
        if not metadata:
            return
        plan, in_use = pickle.loads(metadata)
        self._plans = {k: p for k, p in self._plans.items() if k in in_use}
        self._plans.setdefault(number, plan)
