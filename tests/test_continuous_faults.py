"""The continuous pipeline under random faults: ranks are threads, their connections are queues.

Whatever happens, every rank ends, every job has one outcome, and the ranks' tables agree.
"""

import contextlib
import itertools
import queue
import random
import threading
from dataclasses import dataclass, field, replace

import pytest
import torch
from torch import nn

from ddinfer.errors import RankError
from ddinfer.parallel import plans
from ddinfer.parallel.communicator import Communicator
from ddinfer.parallel.continuous import pipeline
from ddinfer.parallel.packing import Layout

#: A rank that waits as long for a message waits for one that does not come.
HANG_SECONDS = 30


@dataclass(frozen=True)
class QueueLink(Communicator):
    """A `Communicator` to ranks that are threads of this process."""

    queues: dict = field(default_factory=dict)

    def send(self, tensor, to, *, control=False, tag=0):
        self.queues[self.group_rank, to, control, tag].put(tensor.clone())
        return Done()

    def receive(self, tensor, source, *, control=False, tag=0):
        sent = self.queues[source, self.group_rank, control, tag].get(timeout=HANG_SECONDS)
        assert (sent.shape, sent.dtype) == (tensor.shape, tensor.dtype), "ranks are out of step"
        tensor.copy_(sent)

    def start_exchange(self, outgoing, to, incoming, source):
        if outgoing is not None:
            self.send(outgoing, to)
        return [] if incoming is None else [Receiving(self, incoming, source)]


class Done:
    def wait(self):
        pass


@dataclass
class Receiving:
    comm: QueueLink
    tensor: torch.Tensor
    source: int

    def wait(self):
        self.comm.receive(self.tensor, self.source)


def make_comms(size):
    keys = itertools.product(range(size), range(size), (False, True), (0, 1))
    queues = {key: queue.Queue() for key in keys}
    ranks = tuple(range(size))
    return [QueueLink(ranks, k, torch.device("cpu"), queues=queues) for k in ranks]


# --- the model, its pipeline and its jobs ---------------------------------------------------------


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x, text):
        return self.linear(x) + text


class Denoiser(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(4))

    def forward(self, x, text):
        for block in self.blocks:
            x = block(x, text)
        return x


class Pipe:
    def __init__(self, model):
        self.components = {"transformer": model}
        self.transformer, self.scheduler = model, None


def make_pipes(count):
    torch.manual_seed(0)
    model = Denoiser().eval()
    pipes = [Pipe(Denoiser().eval()) for _ in range(count)]
    for pipe in pipes:
        pipe.transformer.load_state_dict(model.state_dict())
    return pipes


def denoise(pipe, number, rows, steps):
    generator = torch.Generator().manual_seed(number)
    x, text = (torch.randn(rows, 4, generator=generator) for _ in range(2))
    for _ in range(steps):
        x = pipe.transformer(x, text)
    return x


def job_of(number, rows, steps, fails):
    """Halves its batch where memory is short, as `WholeEngine` does."""

    def job(pipe):
        left = rows
        while True:
            try:
                made = denoise(pipe, number, left, steps)
            except (torch.OutOfMemoryError, RankError):
                if left == 1:
                    raise
                left //= 2
            else:
                break
        if fails:
            raise ValueError("this prompt cannot be decoded")
        return left, made

    return job


# --- faults ---------------------------------------------------------------------------------------


class Faults:
    """Raises at a hook with a probability that each rank draws for itself."""

    def __init__(self, seed, out_of_memory, device_lost):
        self.out_of_memory, self.device_lost = out_of_memory, device_lost
        self.lost = set()
        self._mine = threading.local()
        self._seed = seed

    def begin(self, rank):
        self._mine.rank, self._mine.random = rank, random.Random(self._seed * 10 + rank)

    def barrier(self):
        if not hasattr(self._mine, "random"):
            return  # an image's thread
        drawn = self._mine.random.random()
        if drawn < self.device_lost or self._mine.rank in self.lost:
            self.lost.add(self._mine.rank)
            raise torch.AcceleratorError("device-side assert")
        if drawn < self.device_lost + self.out_of_memory:
            raise torch.OutOfMemoryError("no room")

    def none(self):
        self.out_of_memory = self.device_lost = 0


@contextlib.contextmanager
def hooks(faults, ranks):
    """Faults at planning, at running a stage, and at each buffer of a message."""
    kept = {name: getattr(Layout, name) for name in ("empty", "empty_values")}

    def faulty(function):
        def call(*args, **kwargs):
            faults.barrier()
            return function(*args, **kwargs)

        return call

    for one in ranks:
        for staged in one._staged:
            staged.run, staged.plan = faulty(staged.run), faulty(staged.plan)
    for name, function in kept.items():
        setattr(Layout, name, faulty(function))
    try:
        yield
    finally:
        for name, function in kept.items():
            setattr(Layout, name, function)


def on_threads(function, count):
    """``function(rank)`` on a thread per rank → what each returned or raised."""
    found = [None] * count

    def work(rank):
        try:
            found[rank] = function(rank)
        except BaseException as error:  # noqa: BLE001 - judged by the test
            found[rank] = error

    threads = [threading.Thread(target=work, args=(k,), daemon=True) for k in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(2 * HANG_SECONDS)
    assert not any(thread.is_alive() for thread in threads), "a rank hangs"
    return found


# --- the test -------------------------------------------------------------------------------------


def one_schedule(seed):
    """A run with faults, then one without. → what happened, to see that everything does happen."""
    draw = random.Random(seed)
    size = draw.choice((2, 2, 3, 4))
    in_flight = size * draw.choice((1, 2))
    faults = Faults(seed, draw.choice((0, 0.05, 0.3)), draw.choice((0, 0, 0.02, 0.1)))
    jobs = [
        (k, draw.randint(1, 4), draw.randint(1, 3), draw.random() < 0.1)
        for k in range(draw.randint(1, 8))
    ]
    stop_after = draw.choice((None, draw.randrange(len(jobs))))
    source_fails = draw.random() < 0.1
    comms, (uncut, *pipes) = make_comms(size), make_pipes(size + 1)
    ranks = on_threads(
        lambda rank: pipeline.ContinuousPipeline(
            pipes[rank], group=comms[rank], num_in_flight=in_flight
        ),
        size,
    )
    for one in ranks:
        if isinstance(one, BaseException):
            raise one

    def feed():
        yield from (job_of(*job) for job in jobs)
        if source_fails:
            raise ValueError("the prompts cannot be read")

    outcomes = []

    def run(rank):
        faults.begin(rank)
        with contextlib.closing(ranks[rank].run(feed() if rank == 0 else ())) as made:
            if rank == 0 and stop_after == 0:
                next(made, None)
                return
            for outcome in made:
                outcomes.append(outcome)
                if len(outcomes) == stop_after:
                    return

    with hooks(faults, ranks):
        ended = on_threads(run, size)
        check_ends(ended, faults.lost, source_fails)
        check_outcomes(outcomes, jobs, uncut)
        if not any(ended) and stop_after is None:
            assert len(outcomes) == len(jobs)
        happened = {
            "lost": bool(faults.lost),
            "failed": any(o.error is not None for o in outcomes),
            "stopped": not any(ended) and len(outcomes) < len(jobs),
            "source": isinstance(ended[0], ValueError),
        }
        if faults.lost:
            return happened
        faults.none()
        check_tables(ranks)
        jobs = [(k, rows, steps, False) for k, rows, steps, _ in jobs]
        stop_after, source_fails = None, False
        outcomes.clear()
        assert on_threads(run, size) == [None] * size
        check_outcomes(outcomes, jobs, uncut)
        assert [o.error for o in outcomes] == [None] * len(jobs)
        check_tables(ranks)
    return happened


def check_ends(ended, lost, source_fails):
    """A rank whose device is lost says so; others name it, or ended before they knew."""
    for rank, error in enumerate(ended):
        if rank in lost:
            assert isinstance(error, torch.AcceleratorError), ended
        elif error is None or (rank == 0 and source_fails and isinstance(error, ValueError)):
            continue
        else:
            assert isinstance(error, RankError), ended
            assert error.rank in lost or (source_fails and error.rank == 0), ended


def check_outcomes(outcomes, jobs, uncut):
    assert len({o.number for o in outcomes}) == len(outcomes)
    for outcome in outcomes:
        number, rows, steps, fails = jobs[outcome.number]
        if outcome.error is not None:
            expected = (torch.OutOfMemoryError, RankError, *([ValueError] if fails else []))
            assert isinstance(outcome.error, expected)
            continue
        left, made = outcome.value
        assert not fails
        assert left <= rows
        with torch.no_grad():
            assert torch.equal(made, denoise(uncut, number, left, steps))


def check_tables(ranks):
    """Plans of one number are one plan; both ends of a hop remember the same."""
    for one in ranks[1:]:
        for number in one._plans._plans.keys() & ranks[0]._plans._plans.keys():
            assert one._plans[number].edges == ranks[0]._plans[number].edges
    for one in ranks:
        following = ranks[(one.comm.group_rank + 1) % len(ranks)]
        assert remembered(one._exchange._sent) == remembered(following._exchange._received)


def remembered(memory):
    return {
        slot: (serial, {label: list(tokens) for label, tokens in labels.items() if tokens})
        for slot, (serial, labels) in memory._slots.items()
    }


@pytest.mark.parametrize(
    ("first", "count"), [(0, 60), pytest.param(1000, 3000, marks=pytest.mark.nightly)]
)
def test_every_rank_ends_and_every_job_has_one_outcome(first, count, monkeypatch):
    monkeypatch.setattr(pipeline.Communicator, "of", lambda comm, device: replace(comm))
    monkeypatch.setattr(plans, "MAX_PLANS", 3)
    happened = []
    for seed in range(first, first + count):
        try:
            happened.append(one_schedule(seed))
        except BaseException as error:
            error.add_note(f"schedule {seed}")
            raise
    for what in happened[0]:
        assert any(schedule[what] for schedule in happened), what
