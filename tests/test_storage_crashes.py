"""Crash, fail or write short at every single file operation of a job; resume; verify.

The job is storage's own code with an engine that makes tiny pictures. After every fault the same
code runs again on what is left, and then every image must be there once, with the bytes of an
undisturbed run, and every failure listed.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from PIL import Image

from ddinfer.errors import ErrorRecord, StorageError
from ddinfer.request import Request, Result
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path
from ddinfer.storage.job_folder import JobDescription, JobFolder
from ddinfer.storage.job_record import read_job
from ddinfer.storage.journal import JournalHeader, JournalState, JournalWriter, read_journals
from ddinfer.storage.lease import Lease
from ddinfer.storage.saving import save_as_made
from ddinfer.storage.verify import verify
from ddinfer.storage.writer import Writer, _image_line
from tests.fake_disk import Crashed, FakeDisk, Fault, Platter

ROOT = Path(__file__).parent.parent
OUT = "/jobs/out"
FAILING = 3
NUM_REQUESTS = 5
BATCH_SIZE = 2
INFO = {"model": "tiny", "version": "1"}


def make_requests(count: int = NUM_REQUESTS) -> list[Request]:
    return [Request(k, f"{k:08d}", f"a prompt, {k}", 100 + k) for k in range(count)]


def engine(batches: Iterable[Sequence[Request]]) -> Iterator[Result]:
    for batch in batches:
        indices = tuple(request.index for request in batch)
        for request in batch:
            if request.index == FAILING:
                yield Result(request, error=ErrorRecord("ValueError", "cannot be drawn"))
            else:
                colour = (request.seed, 7 * request.index, 0)
                yield Result(request, Image.new("RGB", (4, 4), colour), batch=indices)


@dataclass
class Ledger:
    """What a run was told to be durable, to be held against what a crash leaves."""

    acknowledged: set[int] = field(default_factory=set)


def run_job(
    disk: FakeDisk,
    ledger: Ledger | None = None,
    *,
    writer_class: type[Writer] = Writer,
    files_class: type[Files] = Files,
    in_step: bool = True,
    count: int = NUM_REQUESTS,
    **options,
) -> None:
    """The whole job on one rank, as run.py strings it together.

    Args:
        in_step: the writer ends a batch before the next begins, so that operations always come
            in the same order, and each can be hit.
    """
    files = files_class(disk)
    requests = make_requests(count)
    job = JobDescription(requests, {"model": "tiny", "batch_size": BATCH_SIZE}, {"torch": "2"})
    with JobFolder.open(files, OUT, job, **options) as folder:
        state = folder.read_state()
        batches = cut(folder.record.segments)
        pending = folder.pending_batches(batches, state)
        header = JournalHeader(folder.fingerprint, 0, folder.attempt)
        writer = writer_class(
            files, OUT, JournalWriter(files, OUT, header), INFO, wanted=state.is_pending
        )

        def feed() -> Iterator[list[Request]]:
            for batch in pending:
                if in_step:
                    writer.flush()
                yield [requests[k] for k in batch]

        with writer:
            for result in save_as_made(engine, feed(), writer):
                if in_step and ledger is not None:
                    writer.flush()
                    ledger.acknowledged.add(result.index)
        assert folder.finish().is_complete


def cut(segments: Sequence[int]) -> list[range]:
    starts = [0, *segments[:-1]]
    return [
        range(at, min(at + BATCH_SIZE, end))
        for start, end in zip(starts, segments, strict=True)
        for at in range(start, end, BATCH_SIZE)
    ]


def undisturbed(**options) -> tuple[dict[str, bytes], list[str]]:
    platter = Platter()
    disk = FakeDisk(platter)
    run_job(disk, **options)
    return visible(platter), [re.sub(r"-[0-9a-f]{8}\.tmp", ".tmp", line) for line in disk.log]


def visible(platter: Platter) -> dict[str, bytes]:
    """What the user gets: all files but lock, journals and the record of the job."""
    kept = ("images/", "metadata.jsonl", "failures.jsonl", "requests.jsonl.gz")
    return {
        path: data
        for path, data in platter.files().items()
        if path.removeprefix(OUT + "/").startswith(kept)
    }


def state_of(platter: Platter) -> JournalState | None:
    files = Files(FakeDisk(platter))
    record = read_job(files, OUT)
    return record and read_journals(files, OUT, record.fingerprints, NUM_REQUESTS)


def strike(
    platter: Platter,
    fault: Fault,
    power: str | None = None,
    seed: int = 0,
    expected: dict[str, bytes] | None = None,
    **options,
) -> bool:
    """Run with a fault, let the power fail, check what is left. → whether the fault was met."""
    disk, ledger = FakeDisk(platter, fault), Ledger()
    end: BaseException | None = None
    try:
        run_job(disk, ledger, **options)
    except (Crashed, StorageError) as error:
        end = error
    assert disk.is_dead == isinstance(end, Crashed)
    if isinstance(end, StorageError):
        assert disk.has_struck, end
        assert end.exit_code == 74
        assert re.search(r" /(jobs)?.*: ", str(end)), "no path in the message"
        platter.process_dies(disk)
    if power is not None:
        platter.power_fails(random.Random(seed) if power == "partly" else None)
    check_between(platter, ledger, REFERENCE if expected is None else expected)
    return disk.has_struck


def check_between(platter: Platter, ledger: Ledger, expected: dict[str, bytes]) -> None:
    """At every moment: no torn image, no journal line too early, nothing acknowledged lost."""
    found = visible(platter)
    for path, data in found.items():
        if path.endswith(".png"):
            assert data == expected[path], f"{path} is torn"
    state = state_of(platter)
    if state is None:
        assert not ledger.acknowledged
        return
    for index in filter(state.is_done, range(NUM_REQUESTS)):
        path = f"{OUT}/{image_path(index)}"
        assert path in found, f"{path} is journaled and not there"
        assert hashlib.sha256(found[path]).hexdigest() == state.sha256(index)
    lost = [k for k in ledger.acknowledged if state.is_pending(k)]
    assert not lost, f"{lost} were acknowledged and are forgotten"


def check_end(platter: Platter, expected: dict[str, bytes] | None = None) -> None:
    """Everything is there, and would still be if the power failed now."""
    check_whole(platter, expected)
    platter.power_fails()
    check_whole(platter, expected)


def check_whole(platter: Platter, expected: dict[str, bytes] | None = None) -> None:
    report = verify(Files(FakeDisk(platter)), OUT)
    assert report.is_good, report
    assert report.num_good == NUM_REQUESTS - 1
    assert report.num_failed == 1
    assert visible(platter) == (REFERENCE if expected is None else expected)


REFERENCE, OPERATIONS = undisturbed()

#: Kind of fault, how the power fails after it, and whether an error stays.
FAULTS = [
    ("crash", None, False),
    ("crash", "wholly", False),
    ("crash", "partly", False),
    ("half", None, False),
    ("half", "partly", False),
    ("short", None, False),
    ("short-full", None, False),
    ("ENOSPC", None, False),
    ("ENOSPC", None, True),
    ("ENOSPC", "wholly", True),
    ("EIO", None, False),
    ("EIO", "wholly", False),
    ("EIO", "partly", False),
    ("EIO", "partly", True),
    ("EDQUOT", "partly", True),
    ("EMFILE", None, False),
    ("EMFILE", "wholly", True),
    ("EROFS", None, False),
]

#: At how many operations of the job each of `FAULTS` is met: a write alone can be short, say.
MET = dict(
    zip(
        FAULTS,
        (123, 123, 123, 123, 123, 17, 17, 86, 119, 119, 123, 123, 123, 123, 119, 46, 113, 86),
        strict=True,
    )
)


def test_the_page_states_how_many_faults_are_met():
    met: dict[str, int] = {}
    for (kind, _, _), count in MET.items():
        met[kind] = met.get(kind, 0) + count
    page = (ROOT / "docs/durability.md").read_text()
    stated = re.findall(r"^\| `([\w-]+)` \|.*\| ([\d,]+) \|$", page, re.MULTILINE)
    assert {kind: int(count.replace(",", "")) for kind, count in stated} == met
    assert f"{sum(met.values()):,} points" in page


def test_the_undisturbed_job_makes_every_image_and_lists_the_failure():
    images = [path for path in REFERENCE if path.endswith(".png")]
    expected = [f"{OUT}/{image_path(k)}" for k in range(NUM_REQUESTS) if k != FAILING]
    assert sorted(images) == expected
    assert b"cannot be drawn" in REFERENCE[f"{OUT}/failures.jsonl"]
    assert len(OPERATIONS) > 100


def test_operations_come_in_the_same_order_each_time():
    assert undisturbed()[1] == OPERATIONS


@pytest.mark.parametrize(("kind", "power", "lasting"), FAULTS)
def test_a_fault_at_every_operation_then_resume(kind: str, power: str | None, lasting: bool):
    met = 0
    for at in range(len(OPERATIONS)):
        platter = Platter()
        met += strike(platter, Fault(at, kind, lasting), power, seed=at)
        run_job(FakeDisk(platter))
        check_end(platter)
    assert met == MET[kind, power, lasting]


@pytest.mark.parametrize("seed", range(4))
def test_chains_of_faults_on_one_job(seed: int):
    rng = random.Random(seed)
    for _ in range(60):
        platter = Platter()
        for _ in range(rng.randint(2, 5)):
            kind, power, lasting = rng.choice(FAULTS)
            at = rng.randrange(len(OPERATIONS))
            strike(platter, Fault(at, kind, lasting), power, rng.random())
        run_job(FakeDisk(platter))
        check_end(platter)


def test_faults_while_the_writer_and_the_engine_run_side_by_side():
    rng = random.Random(5)
    for _ in range(200):
        platter = Platter()
        kind, power, lasting = rng.choice(FAULTS)
        at = rng.randrange(len(OPERATIONS))
        strike(platter, Fault(at, kind, lasting), power, rng.random(), in_step=False)
        run_job(FakeDisk(platter), in_step=False)
        check_end(platter)


@pytest.mark.parametrize("power", [None, "wholly", "partly"])
def test_a_crash_at_every_operation_of_extending(power: str | None):
    def small() -> Platter:
        platter = Platter()
        run_job(FakeDisk(platter), count=3)
        return platter

    platter = small()
    disk = FakeDisk(platter)
    run_job(disk, extend=True)
    expected = visible(platter)
    assert set(expected) == set(REFERENCE)
    for at in range(disk.count):
        platter = small()
        assert strike(platter, Fault(at, "crash"), power, at, expected, extend=True)
        run_job(FakeDisk(platter), extend=True)
        check_end(platter, expected)


@pytest.mark.parametrize("power", [None, "wholly", "partly"])
def test_a_crash_at_every_operation_of_starting_again(power: str | None):
    platter = Platter()
    run_job(FakeDisk(platter))
    disk = FakeDisk(platter)
    run_job(disk, overwrite=True)
    check_end(platter)
    for at in range(disk.count):
        platter = Platter()
        run_job(FakeDisk(platter))
        assert strike(platter, Fault(at, "crash"), power, at, overwrite=True)
        run_job(FakeDisk(platter), overwrite=True)
        check_end(platter)


@pytest.mark.parametrize("power", [None, "wholly", "partly"])
def test_a_crash_while_starting_again_and_then_the_job_without_it(power: str | None):
    platter = Platter()
    run_job(FakeDisk(platter))
    disk = FakeDisk(platter)
    run_job(disk, overwrite=True)
    for at in range(disk.count):
        platter = Platter()
        run_job(FakeDisk(platter))
        strike(platter, Fault(at, "crash"), power, at, overwrite=True)
        run_job(FakeDisk(platter))
        check_end(platter)


def run_two_ranks(first: FakeDisk, second: FakeDisk) -> bool:
    """Two ranks share the pending batches; the second may die. → whether all was made."""
    requests = make_requests()
    job = JobDescription(requests, {"model": "tiny", "batch_size": BATCH_SIZE}, {"torch": "2"})
    with JobFolder.open(Files(first), OUT, job) as folder:
        state = folder.read_state()
        pending = folder.pending_batches(cut(folder.record.segments), state)
        for rank, disk in ((1, second), (0, first)):
            header = JournalHeader(folder.fingerprint, rank, folder.attempt)
            try:
                with (
                    Lease.join(Files(disk), OUT),
                    Writer(
                        Files(disk),
                        OUT,
                        JournalWriter(Files(disk), OUT, header),
                        INFO,
                        wanted=state.is_pending,
                    ) as writer,
                ):
                    mine = ([requests[k] for k in batch] for batch in pending[rank::2])
                    list(save_as_made(engine, mine, writer))
            except Crashed:
                assert disk is second
        return folder.finish().is_complete


@pytest.mark.parametrize("power", [None, "wholly", "partly"])
def test_one_of_two_ranks_dies_anywhere_and_any_number_of_ranks_goes_on(power: str | None):
    platter = Platter()
    second = FakeDisk(platter)
    assert run_two_ranks(FakeDisk(platter), second)
    check_end(platter)
    for at in range(second.count):
        platter = Platter()
        dying = FakeDisk(platter, Fault(at, "crash"))
        run_two_ranks(FakeDisk(platter), dying)
        assert dying.is_dead
        if power is not None:
            platter.power_fails(random.Random(at) if power == "partly" else None)
        if at % 2:
            run_job(FakeDisk(platter))
        else:
            assert run_two_ranks(FakeDisk(platter), FakeDisk(platter))
        check_end(platter)


# --- the check can fail: each of these breaks one rule and must be caught ----------------------


class SkipsFsyncOfImages(Files):
    def sync(self, fd: int) -> None:
        if ".png" not in self._paths[fd]:
            super().sync(fd)


class SkipsFsyncOfImageFolders(Files):
    def sync_folder(self, path: str, **options) -> None:
        if "/images/" not in path:
            super().sync_folder(path, **options)


class SkipsFsyncOfJournals(Files):
    def sync(self, fd: int) -> None:
        if "/journal/" not in self._paths[fd]:
            super().sync(fd)


class SkipsFsyncOfMetadata(Files):
    def sync(self, fd: int) -> None:
        if "metadata" not in self._paths[fd]:
            super().sync(fd)


class WritesInPlace(Files):
    def temporary_name(self, path: str) -> str:
        return path if path.endswith(".png") else super().temporary_name(path)

    def create(self, path: str) -> int:
        if path.endswith(".png"):
            self.remove(path)
        return super().create(path)

    def replace(self, source: str, target: str) -> None:
        if source != target:
            super().replace(source, target)


class WritesHalfAndIsContent(Files):
    def write(self, fd: int, data: bytes) -> None:
        self.disk.write(fd, data)


class JournalsFirst(Writer):
    def commit(self, results: Sequence[Result]) -> None:
        wanted = [result for result in results if self.wanted(result.index)]
        made = [result for result in wanted if result.error is None]
        self.journal_lines([_image_line(result, self._encode(result), "png") for result in made])
        self.store_images(wanted)


class SwallowsErrors(Writer):
    def _raise_error(self) -> None:
        pass


SABOTAGE = [
    {"files_class": SkipsFsyncOfImages},
    {"files_class": SkipsFsyncOfImageFolders},
    {"files_class": SkipsFsyncOfJournals},
    {"files_class": SkipsFsyncOfMetadata},
    {"files_class": WritesInPlace},
    {"files_class": WritesHalfAndIsContent},
    {"writer_class": JournalsFirst},
    {"writer_class": SwallowsErrors},
]


@pytest.mark.parametrize("sabotage", SABOTAGE, ids=lambda s: next(iter(s.values())).__name__)
def test_sabotage_is_caught(sabotage: dict):
    with pytest.raises((AssertionError, StorageError)):
        strike_everywhere(sabotage)


def strike_everywhere(options: dict) -> None:
    for kind, power, lasting in FAULTS:
        for at in range(len(OPERATIONS)):
            platter = Platter()
            strike(platter, Fault(at, kind, lasting), power, at, **options)
            run_job(FakeDisk(platter), **options)
            check_end(platter)
