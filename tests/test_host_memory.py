"""A launch whose weights do not fit into host memory is refused before one is read."""

import pytest
import torch

from ddinfer.distributed.world import World
from ddinfer.errors import UsageError
from ddinfer.job.run import run_job
from ddinfer.models import host_memory
from ddinfer.models.checkpoint import read_checkpoint
from ddinfer.models.host_memory import check_host_memory, host_bytes
from ddinfer.models.pipeline_folder import PipelineSource
from tests.test_run import job

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def stored_bytes(folder):
    tables = [read_checkpoint(file.parent) for file in folder.glob("*/*.safetensors")]
    return sum(t.num_bytes for table in tables for t in table.values())


def test_what_is_converted_counts_once_a_rank_and_what_is_mapped_once(tiny):
    source, total = PipelineSource(tiny("sd")), stored_bytes(tiny("sd"))
    as_stored = host_bytes(source, "float32", CPU)
    assert (as_stored.mapped, as_stored.converted) == (total, 0)
    assert as_stored.total(8) == total
    halved = host_bytes(source, "bfloat16", CPU)
    assert (halved.mapped, halved.converted) == (0, total // 2)
    assert halved.total(8) == 4 * total


def test_a_gpu_needs_one_converted_encoder_of_transformers_on_the_host(tiny):
    source = PipelineSource(tiny("flux"))
    encoders = [read_checkpoint(tiny("flux") / f"text_encoder{n}") for n in ("", "_2")]
    largest = max(sum(t.num_bytes for t in table.values()) for table in encoders)
    assert host_bytes(source, "float32", CUDA).total(8) == 0
    assert host_bytes(source, "bfloat16", CUDA).total(8) == 8 * largest // 2


def test_the_refusal_has_the_numbers(tiny, monkeypatch):
    total = stored_bytes(tiny("sd"))
    source = PipelineSource(tiny("sd"))
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: 2 * total)
    check_host_memory(source, "bfloat16", "cpu", 4)
    with pytest.raises(UsageError, match=r"need .* of host memory.*: 0 B .* 5 ranks × .*kB conv"):
        check_host_memory(source, "bfloat16", "cpu", 5)


def test_a_job_is_refused_before_its_directory_is_made(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(host_memory, "free_host_bytes", lambda: 1000)
    config = job(tiny("sd"), tmp_path / "out", ["a cat"], dtype="bfloat16")
    with pytest.raises(UsageError, match="host memory, 1 kB are free"):
        run_job(config, World())
    assert not (tmp_path / "out").exists()
