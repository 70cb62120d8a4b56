"""`Team`: the ranks of a replica that make one image together, seen from one of them.

The leader sends a call of a denoiser to the ranks of a team; each runs the model's own ``forward``
and reports how it ended, and the team's first rank returns the output. Calls to another team than
the leader's own are under way until somebody reads their output.
"""

from __future__ import annotations

import itertools
import pickle
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from ddinfer.errors import ErrorRecord, RankError, UsageError
from ddinfer.models.adapters import active_loras, loras_set
from ddinfer.parallel.blocks import denoiser_blocks
from ddinfer.parallel.communicator import STATUS_TAG, Communicator, ConnectionLost
from ddinfer.parallel.packing import layout_of
from ddinfer.parallel.team.deferred import Deferred, fetched
from ddinfer.parallel.team.exchange import CallAborted, Exchange
from ddinfer.parallel.team.rows import check_rows, cut_rows, join_rows, num_rows
from ddinfer.parallel.team.tokens import TokenBlocks, call_signature
from ddinfer.parallel.tensor_tokens import TensorCache, TensorTokens
from ddinfer.parallel.tensor_tree import TensorTree

#: What the leader sends.
_CALL, _END = 0, 1
#: How a call ended on a rank.
_OK, _FAILED, _ABORTED, _LOST = 0, 1, 2, 3

PHASE = "running the denoiser"


class Team:
    """Runs the calls of a pipeline's denoisers over the ranks of a replica.

    Every rank of the group makes one with the same denoisers. The leader then calls its pipeline
    inside `leading`; the others `serve` until it leaves. `detach` gives the models their own
    ``forward`` back.

    Args:
        models: the denoisers by component name.
        comm: of the replica's C × P ranks, or of this rank alone.
        cfg_parallel: C, the calls that a call of several rows is split into, and the teams over
            which calls are distributed. One rank alone makes the C calls one after another, so
            that an image does not depend on the number of ranks.
        sequence_parallel: P, the ranks of a team, over which the tokens of a call are split.

    Raises:
        UsageError: another number of ranks, or a model that cannot be split.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        comm: Communicator,
        *,
        cfg_parallel: int = 1,
        sequence_parallel: int = 1,
    ):
        self.comm = comm
        self.cfg_parallel, self.sequence_parallel = cfg_parallel, sequence_parallel
        expected = cfg_parallel * sequence_parallel
        if self.comm.size != expected and (self.comm.size > 1 or sequence_parallel > 1):
            raise UsageError(
                f"cfg_parallel={cfg_parallel}, sequence_parallel={sequence_parallel}: expected "
                f"{expected} ranks, found {self.comm.size}"
            )
        check_models(models, sequence_parallel)
        self.num_teams = self.comm.size // sequence_parallel
        self.number = self.comm.group_rank // sequence_parallel
        self.exchange = Exchange(self.comm, self._ranks_of(self.number))
        #: Ends the replica's work: a rank that is gone, or a call that cannot be split.
        self.fatal: Exception | None = None
        self._names = list(models)
        self._models = list(models.values())
        self._before = [model.__dict__.get("forward") for model in self._models]
        self._forwards = [model.forward for model in self._models]
        self._blocks: list[TokenBlocks] = []
        if sequence_parallel > 1:
            for name, model in models.items():
                self._blocks.append(TokenBlocks(name, model, denoiser_blocks(model), self.exchange))
        if self.is_leader:
            for k, model in enumerate(self._models):
                model.forward = _ModelForward(self, k)
        self._leads = False
        self._kinds: dict[Any, int] = {}
        self._outputs: dict[int, TensorTree] = {}
        self._compared: set[int] = set()
        self._in_flight: dict[int, _Pending] = {}
        count = itertools.count(1)
        self._tokens = [TensorTokens(count) for _ in range(self.num_teams)]
        self._caches = [TensorCache() for _ in range(self.num_teams)]  # a member has its own only
        self._before_call: Callable[[], object] = lambda: None
        self._after_call: Callable[[], object] = lambda: None
        self._awaiting: Callable[[], AbstractContextManager[Any]] = nullcontext

    @property
    def is_leader(self) -> bool:
        return self.comm.is_first

    def listen(
        self,
        before: Callable[[], object],
        after: Callable[[], object] = lambda: None,
        awaiting: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> None:
        """From now on call these around every call that this rank serves.

        Args:
            awaiting: what a rank waits in for the others.
        """
        self._before_call, self._after_call = before, after
        self._awaiting = self.exchange.awaiting = awaiting

    def detach(self) -> None:
        """Gives the models and their blocks their own ``forward`` back."""
        for blocks in self._blocks:
            blocks.detach()
        if self.is_leader:
            for model, before in zip(self._models, self._before, strict=True):
                model.__dict__.pop("forward", None)
                if before is not None:
                    model.__dict__["forward"] = before

    # --- the leader ---------------------------------------------------------------------------

    @contextmanager
    def leading(self) -> Iterator[None]:
        """Inside, the models' calls are run by the teams; the other ranks `serve` meanwhile."""
        self._leads = True
        try:
            yield
        except (KeyboardInterrupt, SystemExit):
            raise  # these come to the other ranks by themselves
        except BaseException as error:  # GeneratorExit: the caller has enough
            self._end(None if isinstance(error, GeneratorExit) else error)
            raise
        else:
            self._end(self.fatal)
        finally:
            self._leads = False

    def drain(self) -> None:
        """Waits for calls whose output nobody read; the image they were for has failed."""
        for pending in list(self._in_flight.values()):
            pending.wait()

    def _call(self, number: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of model ``number`` that the pipeline makes."""
        if not self._leads:
            return self._forwards[number](*args, **kwargs)
        try:
            args, kwargs = fetched((args, kwargs))
            rows = num_rows(args, kwargs) if self.cfg_parallel > 1 else 1
            with torch.no_grad():
                if rows > 1:
                    return self._by_rows(number, args, kwargs, rows)
                return self._started_early(number, args, kwargs)
        except UsageError as error:
            self.fatal = error
            raise

    def _by_rows(self, number: int, args: Any, kwargs: Any, rows: int) -> Any:
        parts = cut_rows(args, kwargs, rows, self.cfg_parallel)
        away = range(1, min(self.num_teams, len(parts)))
        pending = {k: self._start(k, number, *parts[k]) for k in away}
        here = {
            k: self._run_here(number, *part) for k, part in enumerate(parts) if k not in pending
        }
        made = join_rows([here[k] if k in here else pending[k].output() for k in range(len(parts))])
        kind = self._kind(number, args, kwargs)
        if kind not in self._compared:
            check_rows(self._names[number], made, self._run_here(number, args, kwargs))
            self._compared.add(kind)
        return made

    def _started_early(self, number: int, args: Any, kwargs: Any) -> Any:
        """The output of a call on a team that is free; of the first of its kind, and where all
        other teams have one, of a call on this team.
        """
        kind = self._kind(number, args, kwargs)
        free = [k for k in range(1, self.num_teams) if k not in self._in_flight]
        if not free or kind not in self._outputs:
            made = self._run_here(number, args, kwargs)
            if kind not in self._outputs:
                self._outputs[kind] = TensorTree.of(made, self.comm.device)
            return made
        pending, shapes = self._start(free[0], number, args, kwargs), self._outputs[kind]

        def fetch(k: int) -> Callable[[], torch.Tensor]:
            return lambda: pytree.tree_leaves(pending.output())[k]

        return shapes.unflatten(
            {k: Deferred(t, self.comm.device, fetch(k)) for k, t in shapes.empty.items()}
        )

    def _run_here(self, number: int, args: Any, kwargs: Any) -> Any:
        """A call on the leader's own team."""
        kind = self._kind(number, args, kwargs)
        pending = self._start(0, number, args, kwargs)
        error: Exception | None = None
        made = None
        try:
            with self.exchange.call(kind):
                made = self._run(number, args, kwargs)
        except Exception as failure:  # noqa: BLE001 - raised when the team has reported
            error = failure
        if self.sequence_parallel > 1:
            pending.wait()
            if pending.error is not None and isinstance(
                error, (type(None), CallAborted, ConnectionLost)
            ):
                raise pending.error from error
        if error is not None:
            raise error
        return made

    def _start(self, team: int, number: int, args: Any, kwargs: Any) -> _Pending:
        """Sends a call to the other ranks of a team."""
        if self.fatal is not None:
            raise self.fatal
        if team in self._in_flight:
            self._in_flight[team].wait()
        ranks = [rank for rank in self._ranks_of(team) if rank != 0]
        if not ranks:
            return _Pending(self, team)
        tensors = TensorTree.of((args, kwargs), self.comm.device)
        leaves = pytree.tree_leaves((args, kwargs))
        inputs = {(number, k): leaves[k] for k in tensors.empty}
        tokens = self._tokens[team].of(inputs)
        known = self._caches[team].find(0, 0, tokens)
        layout = layout_of({n: tensors.empty[n[1]] for n in inputs if n not in known})
        payload = layout.pack(inputs, self._wire)
        kind = self._kind(number, args, kwargs)
        header = pickle.dumps((number, kind, tensors, layout, tokens, active_loras()))
        with self._finding_lost():
            for work in [w for rank in ranks for w in self._send(rank, _CALL, header, payload)]:
                work.wait()
        self._caches[team].put(0, 0, tokens, {})
        self._in_flight[team] = pending = _Pending(self, team)
        return pending

    def _collect(self, team: int) -> tuple[Any, Exception | None]:
        """``(output, error)`` of the call that a team has; the output of another than this one."""
        output, error = None, None
        for rank in self._ranks_of(team):
            if rank == 0:
                continue
            with self._finding_lost():
                code, header, payload = self._receive(rank, STATUS_TAG)
            received: Any = pickle.loads(header) if header else None
            if code == _LOST:
                self._lose(received)
            elif code == _FAILED:
                error = error or RankError(self.comm.ranks[rank], PHASE, received)
            elif code == _OK and received is not None:
                tensors, layout = received
                buffer = payload.to(self.comm.device)
                output = tensors.unflatten(layout.unpack(buffer))
        return output, error

    def _kind(self, number: int, args: Any, kwargs: Any) -> int:
        """A number for calls of the same structure, shapes and integers."""
        key = (number, call_signature(args, kwargs))
        return self._kinds.setdefault(key, len(self._kinds))

    @contextmanager
    def _finding_lost(self) -> Iterator[None]:
        try:
            yield
        except ConnectionLost as lost:
            self._lose(lost.group_rank, lost)

    def _lose(self, group_rank: int, cause: BaseException | None = None) -> None:
        rank = self.comm.ranks[group_rank]
        record = ErrorRecord("ConnectionLost", str(cause or f"rank {rank} is gone"))
        self.fatal = RankError(rank, PHASE, record)
        raise self.fatal from cause

    def _end(self, error: BaseException | None) -> None:
        """Ends `serve` on the other ranks, with the error that they then raise."""
        reason = None
        if isinstance(error, RankError):
            reason = (error.rank, error.record)
        elif error is not None:
            reason = (self.comm.rank, ErrorRecord.of(error))
        if self.fatal is None:
            self.drain()
        for rank in range(1, self.comm.size):
            try:
                for work in self._send(rank, _END, pickle.dumps(reason)):
                    work.wait()
            except ConnectionLost:
                pass  # that rank is gone, and the error says so

    # --- the other ranks ----------------------------------------------------------------------

    def serve(self) -> None:
        """Runs this rank's part of the leader's calls until it leaves `leading`.

        Raises:
            RankError: another rank failed or is gone.
        """
        while True:
            try:
                code, header, payload = self._receive(0)
            except ConnectionLost as lost:
                record = ErrorRecord("ConnectionLost", str(lost))
                raise RankError(self.comm.ranks[0], PHASE, record) from lost
            received = pickle.loads(header)
            if code == _END:
                if received is not None:
                    raise RankError(received[0], PHASE, received[1])
                return
            self._before_call()
            self._report(*self._serve_one(received, payload))
            self._after_call()

    def _serve_one(self, header: Any, payload: torch.Tensor) -> tuple[int, Any]:
        number, kind, tensors, layout, tokens, loras = header
        cache = self._caches[0]
        try:
            loras_here = loras_set(None if loras is None else dict(loras))
            with self.exchange.call(kind), torch.no_grad(), loras_here:
                values = layout.unpack(payload.to(self.comm.device))
                known = cache.find(0, 0, tokens)
                cache.put(0, 0, tokens, values)
                values |= known
                filled = {
                    k: values[number, k].cpu() if k in tensors.on_host else values[number, k]
                    for k in tensors.empty
                }
                args, kwargs = tensors.unflatten(filled)
                return _OK, self._run(number, args, kwargs)
        except torch.AcceleratorError:
            raise  # sticky: no later call on this device can succeed
        except CallAborted:
            return _ABORTED, None
        except ConnectionLost as lost:
            return _LOST, lost.group_rank
        except Exception as error:  # noqa: BLE001 - the leader raises it in its image's call
            return _FAILED, ErrorRecord.of(error)

    def _report(self, code: int, value: Any) -> None:
        """Tells the leader how the call ended; the first rank of a team returns the output."""
        payload = None
        if code == _OK:
            if self.exchange.rank == 0:
                tensors = TensorTree.of(value, self.comm.device)
                leaves = pytree.tree_leaves(value)
                layout = layout_of(tensors.empty)
                payload = layout.pack({k: leaves[k] for k in tensors.empty}, self._wire)
                value = (tensors, layout)
            else:
                value = None
        header = b"" if value is None else pickle.dumps(value)
        try:
            for work in self._send(0, code, header, payload, STATUS_TAG):
                work.wait()
        except ConnectionLost as lost:
            record = ErrorRecord("ConnectionLost", str(lost))
            raise RankError(self.comm.ranks[0], PHASE, record) from lost

    # --- both ---------------------------------------------------------------------------------

    def _run(self, number: int, args: Any, kwargs: Any) -> Any:
        """This rank's part of a call of its team."""
        if not self._blocks:
            return self._forwards[number](*args, **kwargs)
        blocks = self._blocks[number]
        blocks.active = True
        try:
            return fetched(self._forwards[number](*args, **kwargs))
        finally:
            blocks.active = False

    def _ranks_of(self, team: int) -> range:
        size = self.sequence_parallel
        return range(team * size, (team + 1) * size)

    @property
    def _wire(self) -> torch.device:
        return self.comm.wire_device

    def _send(
        self, rank: int, code: int, header: bytes, payload: torch.Tensor | None = None, tag: int = 0
    ) -> list[Any]:
        """Starts sending a message; wait for what is returned."""
        num_bytes = 0 if payload is None else payload.numel()
        sizes = torch.tensor([code, len(header), num_bytes])
        sending = [self.comm.send(sizes, rank, control=True, tag=tag)]
        if header:
            body = torch.frombuffer(bytearray(header), dtype=torch.uint8)
            sending.append(self.comm.send(body, rank, control=True, tag=tag))
        if payload is not None and num_bytes:
            sending.append(self.comm.send(payload, rank))
        return sending

    def _receive(self, rank: int, tag: int = 0) -> tuple[int, bytes, torch.Tensor]:
        sizes = torch.zeros(3, dtype=torch.int64)
        with self._awaiting():
            self.comm.receive(sizes, rank, control=True, tag=tag)
        code, header_bytes, payload_bytes = sizes.tolist()
        header = torch.empty(header_bytes, dtype=torch.uint8)
        if header_bytes:
            self.comm.receive(header, rank, control=True, tag=tag)
        payload = torch.empty(payload_bytes, dtype=torch.uint8, device=self._wire)
        if payload_bytes:
            self.comm.receive(payload, rank)
        return code, header.numpy().tobytes(), payload


class _Pending:
    """A call that a team has been given."""

    def __init__(self, owner: Team, team: int):
        self.owner, self.team = owner, team
        self.is_done = False
        self.error: Exception | None = None
        self._output: Any = None

    def wait(self) -> None:
        """Until the team has reported; its error is kept.

        Raises:
            RankError: a rank is gone.
        """
        if not self.is_done:
            self.is_done = True
            self.owner._in_flight.pop(self.team, None)
            self._output, self.error = self.owner._collect(self.team)
            if self.error is not None:  # a rank may have failed before it kept what was sent
                self.owner._caches[self.team] = TensorCache()

    def output(self) -> Any:
        """
        Raises:
            RankError: it failed on a rank of the team.
        """
        self.wait()
        if self.error is not None:
            raise self.error
        return self._output


class _ModelForward:
    """A denoiser's ``forward`` on the leader."""

    def __init__(self, owner: Team, number: int):
        self.owner, self.number = owner, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.owner._call(self.number, args, kwargs)


def check_models(models: Mapping[str, nn.Module], sequence_parallel: int = 1) -> None:
    """Checks what can be known without a call. Meta tensors will do.

    Raises:
        UsageError: a model keeps state between calls, or its tokens cannot be split.
    """
    for name, model in models.items():
        kind = type(model).__name__
        if getattr(model, "is_cache_enabled", False):
            raise UsageError(
                f"{name} ({kind}) has a step cache, which remembers the calls of one rank; "
                "disable it (disable_cache), or do not split the image over ranks"
            )
        if sequence_parallel == 1:
            continue
        if hasattr(model, "down_blocks"):
            raise UsageError(
                f"--sequence_parallel {sequence_parallel} splits the tokens of a transformer; "
                f"{name} is a {kind}, a UNet. Use --cfg_parallel for it"
            )
        if not denoiser_blocks(model):
            raise UsageError(
                f"--sequence_parallel {sequence_parallel} splits tokens inside of blocks; {name} "
                f"({kind}) has no list of blocks. Use --cfg_parallel for it"
            )
