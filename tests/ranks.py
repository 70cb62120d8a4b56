"""`run_ranks(fn, n)`: a function on n real gloo ranks, without paying for n new interpreters.

One pool of four worker processes has torch and diffusers imported once, by the server that they
are forked from. Each call has a store of its own, where no earlier call has left keys that a plain
``init_process_group()`` would take for its peers', and a process group that it destroys. Use fresh
processes only where launching or dying is the point.
"""

import contextlib
import faulthandler
import itertools
import multiprocessing
import multiprocessing.connection
import os
import pickle
import signal
import sys
import time
import traceback

NUM_WORKERS = 4

#: A hang guard, not a measure: several times what the slowest of these tests takes.
HANG_SECONDS = 240.0

#: How long the others may take to hear of a failed rank.
FAILURE_SECONDS = 20.0

PRELOAD = ["torch", "torch.distributed", "diffusers", "transformers", "tests.ranks"]


def run_ranks(fn, n, *args, join=True, timeout_seconds=HANG_SECONDS):
    """Run ``fn(group, *args)`` on ranks 0 … n-1 → what each returned, in rank order.

    ``group`` is a `ddinfer.distributed.process_group.Group` on the CPU (``group.world`` is the
    `World`); ``torch.distributed`` is initialised with gloo for n > 1. Each rank has one thread.

    Args:
        fn: a function at the top level of a test module; it travels by its name.
        n: ranks, at most four.
        args: pickled to every rank.
        join: ``False`` makes no group and calls ``fn(world, *args)``; the variables that torchrun
            sets are set, so that ``process_group(world)`` or ``init_process_group()`` work.
        timeout_seconds: a hang guard; the pool is killed and made anew after it.

    Raises:
        the exception of the rank that failed first, as it was, caused by a `RankFailed` that
        names the rank and has its traceback.
    """
    assert 1 <= n <= NUM_WORKERS, f"the pool has {NUM_WORKERS} workers"
    return _the_pool().run(fn, n, args, join, timeout_seconds)


class RankFailed(Exception):
    """Where an exception came from: its rank and that rank's traceback."""


class _Pool:
    def __init__(self):
        self.calls = itertools.count()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOAD)
        with _environment(OMP_NUM_THREADS="1", OMP_WAIT_POLICY="PASSIVE", HF_HUB_OFFLINE="1"):
            multiprocessing.forkserver.ensure_running()
        self.workers = []
        for k in range(NUM_WORKERS):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs,), name=f"rank-{k}", daemon=True)
            process.start()
            theirs.close()
            self.workers.append((process, ours))

    def run(self, fn, n, args, join, timeout_seconds):
        from ddinfer.distributed.process_group import loopback_store

        run_id, store = f"call-{next(self.calls)}", loopback_store()
        for rank, (_, pipe) in enumerate(self.workers[:n]):
            environment = rank_environment(rank, n, store.port, run_id)
            pipe.send_bytes(pickle.dumps((environment, join, fn, args)))
        try:
            values = self._answers(n, timeout_seconds)
        except BaseException:  # a hang, a dead worker, Ctrl-C: nothing here can be trusted
            self.close()
            raise
        failures = [(k, value) for k, (kind, value) in enumerate(values) if kind == "error"]
        if failures:
            _raise_first(failures)
        return [value for _, value in values]

    def _answers(self, n, timeout_seconds):
        values = [None] * n
        waiting = {pipe: rank for rank, (_, pipe) in enumerate(self.workers[:n])}
        deadline = time.monotonic() + timeout_seconds
        while waiting:
            ready = multiprocessing.connection.wait(waiting, deadline - time.monotonic())
            if not ready:
                self._dump_stacks(waiting.values())
                failed = [v for v in enumerate(values) if v[1] and v[1][0] == "error"]
                if failed:
                    _raise_first([(k, v[1]) for k, v in failed])
                raise TimeoutError(
                    f"{_ranks(waiting.values())} did not answer within {timeout_seconds:g} s; "
                    "their stacks are on stderr"
                )
            for pipe in ready:
                rank = waiting.pop(pipe)
                try:
                    values[rank] = pickle.loads(pipe.recv_bytes())
                except EOFError:
                    process = self.workers[rank][0]
                    process.join()
                    raise RankFailed(
                        f"the worker of rank {rank} died, exit code {process.exitcode}"
                    ) from None
                if values[rank][0] == "error":
                    deadline = min(deadline, time.monotonic() + FAILURE_SECONDS)
        return values

    def _dump_stacks(self, ranks):
        for rank in ranks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.workers[rank][0].pid, signal.SIGUSR1)
        time.sleep(1)

    def close(self):
        global _pool
        _pool = None
        for process, _ in self.workers:
            process.kill()
        for process, _ in self.workers:
            process.join()


_pool = None


def _the_pool():
    global _pool
    if _pool is None:
        _pool = _Pool()
    return _pool


def rank_environment(rank, n, port, run_id):
    """What torchrun would set for this rank of n on one machine."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(n),
        "GROUP_RANK": "0",
        "GROUP_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": run_id,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _work(pipe):
    """A worker's life: one call after the other, until the tests are over."""
    import torch

    faulthandler.register(signal.SIGUSR1, file=sys.__stderr__, all_threads=True)
    torch.set_num_threads(1)
    while True:
        try:
            environment, *call = pickle.loads(pipe.recv_bytes())
        except EOFError:
            os._exit(0)
        with _environment(**environment):
            answer = _one_call(*call)
        pipe.send_bytes(answer)


def _one_call(join, fn, args):
    import torch.distributed as dist

    from ddinfer.distributed.process_group import process_group
    from ddinfer.distributed.world import World

    try:
        world = World.detect("cpu")
        if join:
            with process_group(world, join_timeout_seconds=HANG_SECONDS) as group:
                value = fn(group, *args)
        else:
            value = fn(world, *args)
        return pickle.dumps(("value", value))
    except BaseException as error:  # noqa: BLE001 - raised again in the test
        text = traceback.format_exc()
        try:
            return pickle.dumps(("error", (time.time(), pickle.dumps(error), text)))
        except Exception:  # noqa: BLE001 - whatever pickle meets in it
            stand_in = RuntimeError(f"{type(error).__name__}: {error} (cannot be pickled)")
            return pickle.dumps(("error", (time.time(), pickle.dumps(stand_in), text)))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _raise_first(failures):
    """The first failure; one that only tells of another rank's comes after that one."""
    from ddinfer.errors import RankError

    told = []
    for rank, (when, data, text) in failures:
        error = pickle.loads(data)
        told.append((isinstance(error, RankError), when, rank, error, text))
    _, _, rank, error, text = min(told, key=lambda t: t[:3])
    raise error from RankFailed(f"raised on rank {rank}:\n{text}")


@contextlib.contextmanager
def _environment(**changes):
    before = dict(os.environ)
    os.environ.update(changes)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _ranks(numbers):
    return "ranks " + ", ".join(map(str, sorted(numbers)))
