import json
import threading
from dataclasses import replace

import pytest
from PIL import Image

from ddinfer.errors import DdinferError, StorageError
from ddinfer.request import Result
from ddinfer.storage.files import Files
from ddinfer.storage.images import image_path
from ddinfer.storage.journal import JournalHeader, JournalWriter, read_journals
from ddinfer.storage.media import Formats
from ddinfer.storage.saving import save_as_made
from ddinfer.storage.writer import Writer
from tests.fake_disk import FakeDisk, Fault, Platter
from tests.storage_jobs import INFO, engine, failure, make_requests, picture


@pytest.fixture
def out(tmp_path):
    (tmp_path / "journal").mkdir()
    return str(tmp_path)


def open_writer(out, **options):
    files = Files()
    return Writer(files, out, JournalWriter(files, out, JournalHeader("f")), INFO, **options)


def state(out, count=8):
    return read_journals(Files(), out, ["f"], count)


def results(requests):
    return [Result(request, picture(request), batch=(request.index,)) for request in requests]


def test_images_and_failures_are_journaled(out):
    requests = make_requests(4)
    with open_writer(out) as writer:
        writer.put(results(requests[:2]))
        writer.put([*results(requests[2:3]), failure(requests[3])])
        writer.flush()
        assert (writer.num_written, writer.num_failed) == (3, 1)
    found = state(out)
    assert (found.num_done, found.num_failed) == (3, 1)
    assert found.failures[3]["error"]["message"] == "cannot be drawn"
    assert found.attempts[0].end == "done"
    for index in range(3):
        assert Image.open(f"{out}/{image_path(index)}").getpixel((0, 0))[1] == index


def test_what_is_not_wanted_is_not_written(out):
    with open_writer(out, wanted=lambda index: index == 1) as writer:
        writer.started([0, 1])
        writer.put(results(make_requests(2)))
    assert [state(out).is_done(k) for k in range(2)] == [False, True]
    assert state(out).attempts[0].in_flight == []


def test_an_image_in_another_batch_than_planned_says_so(out):
    [request] = make_requests(1)
    with open_writer(out) as writer:
        writer.put([replace(results([request])[0], exact=False, batch=(0, 3), flags=("black",))])
    assert state(out).notes == {0: {"exact": False, "batch": [0, 3], "flags": ["black"]}}
    with Image.open(f"{out}/{image_path(0)}") as image:
        metadata = json.loads(image.text["ddinfer"])
    assert (metadata["exact"], metadata["batch"]) == (False, [0, 3])


def test_a_picture_that_cannot_be_saved_fails_its_prompt_alone(out):
    first, second = make_requests(2)
    with open_writer(out) as writer:
        writer.put([Result(first, Image.new("F", (2, 2))), *results([second])])
    assert "mode 'F'" in state(out).failures[0]["error"]["message"]
    assert state(out).is_done(1)


def test_frames_become_one_animated_file(out):
    [request] = make_requests(1)
    frames = [Image.new("RGB", (4, 4), (k, 0, 0)) for k in range(3)]
    with open_writer(out, formats=Formats(video="apng", fps=5)) as writer:
        writer.put([Result(request, frames=frames)])
    with Image.open(f"{out}/{image_path(0)}") as image:
        assert (image.n_frames, image.info["duration"]) == (3, 200)


def test_a_disk_error_surfaces_in_the_next_call_and_nothing_more_is_written():
    platter = Platter()
    setup = Files(FakeDisk(platter))
    setup.make_folder("/out")
    setup.make_folder("/out/journal")
    disk = FakeDisk(platter)
    files = Files(disk)
    writer = Writer(files, "/out", JournalWriter(files, "/out", JournalHeader("f")), INFO)
    disk.fault = Fault(disk.count + 4, "EIO")
    requests = make_requests(4)
    writer.put(results(requests[:2]))
    with pytest.raises(StorageError, match="EIO"):
        writer.flush()
    with pytest.raises(StorageError, match="EIO"):
        writer.put(results(requests[2:]))
    with pytest.raises(StorageError, match="EIO"):
        writer.close()
    assert read_journals(setup, "/out", ["f"], 4).num_done == 0


def test_what_was_handed_over_is_kept_when_the_caller_fails(out):
    def caller_fails():
        with open_writer(out) as writer:
            writer.put(results(make_requests(2)))
            raise KeyError

    with pytest.raises(KeyError):
        caller_fails()
    assert state(out).num_done == 2
    assert state(out).attempts[0].end == "KeyError"


def test_the_next_batch_is_made_while_one_is_written(out):
    writing, go_on = threading.Event(), threading.Event()

    class Slow(Files):
        def replace(self, source, target):
            writing.set()
            assert go_on.wait(60)
            super().replace(source, target)

    requests = make_requests(2)
    files = Slow()
    writer = Writer(files, out, JournalWriter(files, out, JournalHeader("f")), INFO)
    writer.put(results(requests[:1]))
    assert writing.wait(60)
    writer.put(results(requests[1:]))  # returns: the queue holds one batch
    go_on.set()
    writer.close()
    assert state(out).num_done == 2


def test_each_batch_is_handed_over_whole_in_whatever_order_its_results_come(out):
    requests = make_requests(4)
    put = []

    def shuffled(batches):
        made = [result for batch in batches for result in engine()([batch])]
        yield from (made[k] for k in (3, 0, 1, 2))

    class Spy(Writer):
        def put(self, results):
            put.append([result.index for result in results])
            super().put(results)

    files = Files()
    with Spy(files, out, JournalWriter(files, out, JournalHeader("f")), INFO) as writer:
        told = list(save_as_made(shuffled, [requests[:2], requests[2:]], writer))
    assert put == [[0, 1], [3, 2]]
    assert [result.index for result in told] == [0, 1, 3, 2]
    assert all(result.image is None for result in told)


@pytest.mark.parametrize(
    ("answers", "why"),
    [
        ([0], "no result for 1 requests, the first is 1"),
        ([0, 0, 1], "unexpected result for request 0"),
        ([7], "unexpected result for request 7"),
    ],
)
def test_an_engine_that_answers_wrongly_is_found_out(out, answers, why):
    requests = make_requests(8)

    def wrong(batches):
        for _ in batches:
            for index in answers:
                yield Result(requests[index], picture(requests[index]))

    with open_writer(out) as writer, pytest.raises(DdinferError, match=why):
        list(save_as_made(wrong, [requests[:2]], writer))
