"""What CUDA would refuse, found without a GPU: pipelines on devices that only look like one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.pretended_gpu import COMPILER, build
from tests.pretended_gpu.jobs import PROMPTS
from tests.tiny_pipelines import FROM_TEXT

pytestmark = pytest.mark.skipif(COMPILER is None, reason="needs Linux and a C++ compiler")

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return build(tmp_path_factory.mktemp("pretended-gpu"))


@pytest.mark.parametrize("kind", FROM_TEXT)
def test_a_pipeline_draws_on_gpus_what_it_draws_on_the_cpu(kind, library, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.pretended_gpu", library, tmp_path, kind],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    refused, *cases = (json.loads(line) for line in done.stdout.splitlines())
    assert refused == {"refused": ["add", "matmul", "cat", "embedding", "conv"]}
    if kind == "flux":
        bucket = cases.pop()
        assert bucket == {"way": "bucket", "num_blocks": 5, "is_same": True, "is_all": True}
    assert [case["kind"] for case in cases] == [kind] * 4
    assert {case["way"]: case["error"] for case in cases if case["error"]} == {}
    # The same kernels, but attention and linear layers are put together otherwise.
    assert max(case["apart"] for case in cases) < 1e-5


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "sd" else pytest.param(kind, marks=pytest.mark.nightly) for kind in FROM_TEXT],
)
def test_jobs_on_gpus_make_the_images_of_a_job_on_the_cpu(kind, library, tmp_path):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.pretended_gpu.jobs", library, tmp_path, kind],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    cpu, *jobs = (json.loads(line) for line in done.stdout.splitlines())
    assert (cpu["job"], cpu["device"], cpu["pictures"]) == ("on the CPU", "cpu", len(PROMPTS))
    assert [job["job"] for job in jobs] == [
        "two ranks", "in stages", "spread over two, host and disk", "cut over two ranks"
    ]  # fmt: skip
    for job in jobs:
        assert job["device"] == "privateuseone"
        assert job["pictures"] == len(PROMPTS)
        assert job["apart"] <= 1, job  # a value between two steps may be rounded to either
