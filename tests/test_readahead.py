"""Files that are read into the page cache while something else computes."""

import threading

import pytest

from ddinfer.engines import readahead
from ddinfer.engines.readahead import CHUNK_BYTES, ReadAhead
from ddinfer.engines.staged import StagedEngine
from ddinfer.models.pipeline_folder import PipelineSource
from ddinfer.models.stages import StagedPipeline
from tests.test_staged import requests_for
from tests.tiny_pipelines import tiny_pipeline


@pytest.fixture
def files(tmp_path):
    found = [tmp_path / "one", tmp_path / "two"]
    found[0].write_bytes(bytes(CHUNK_BYTES + 5))
    found[1].write_bytes(b"abc")
    return found


def test_files_are_read_to_their_ends_and_every_piece_is_heard(files):
    heard = []
    reader = ReadAhead(files, lambda: heard.append(threading.current_thread().name))
    reader.wait()
    assert reader.num_read == reader.num_bytes == CHUNK_BYTES + 8
    assert heard == ["ddinfer-readahead"] * 3


def test_it_stops_after_the_piece_in_hand(files):
    begun, go = threading.Event(), threading.Event()

    def hold():
        begun.set()
        go.wait()

    reader = ReadAhead(files, hold)
    begun.wait()
    reader._stopped.set()
    go.set()
    reader.stop()
    assert reader.num_read == CHUNK_BYTES


def test_what_would_drive_itself_out_of_memory_is_not_read(files, monkeypatch):
    monkeypatch.setattr(readahead, "free_host_bytes", lambda: CHUNK_BYTES)
    reader = ReadAhead(files)
    reader.stop()
    assert reader.num_read == 0


def test_a_file_that_is_gone_is_left_to_whoever_needs_it(files):
    reader = ReadAhead(files)
    reader.wait()
    files[0].unlink()
    reader = ReadAhead.__new__(ReadAhead)
    with pytest.raises(FileNotFoundError):  # its size is asked for in the caller's thread
        reader.__init__(files)


def test_the_next_stage_is_read_while_one_computes(tmp_path, monkeypatch):
    read = []

    class Noted(ReadAhead):
        def __init__(self, files, on_progress=None):
            read.append({file.parent.name for file in files})
            super().__init__(files, on_progress)

    monkeypatch.setattr("ddinfer.engines.staged.ReadAhead", Noted)
    folder = tiny_pipeline("sd", tmp_path)
    engine = StagedEngine(StagedPipeline(PipelineSource(folder), "auto", {"cpu": 10**10}))
    assert len(list(engine.run([requests_for("sd", ["a cat"])]))) == 1
    assert read == [{"unet"}, {"vae"}]
    assert engine._ahead is None
