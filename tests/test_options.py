"""Options that change how a pipeline computes: each reaches it, and draws what it should."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddinfer import tiny
from ddinfer.config import JobConfig
from ddinfer.distributed.world import World
from ddinfer.engines.whole import load_whole_engine
from ddinfer.errors import UsageError
from ddinfer.request import Request

MODEL, FLUX = str(tiny.path("shapes-sd")), str(tiny.path("shapes-flux"))
MAIN = Path(__file__).parent.parent / "ddinfer" / "main.py"


def load(model=MODEL, **options):
    config = JobConfig(model=model, device="cpu", dtype="float32", **options)
    return load_whole_engine(model, config, world=World())


def draw(engine, size=64, seed=3):
    request = Request(0, "0", "a red circle", seed, None, size, size, 2, 2.0)
    (result,) = engine.run([[request]])
    assert result.error is None
    return np.asarray(result.image).astype(int)


@pytest.fixture(scope="module")
def plain():
    return load()


def test_tiling_and_slicing_reach_the_vae(plain):
    engine = load(vae_tiling=True, vae_slicing=True)
    assert engine.pipe.vae.use_tiling
    assert engine.pipe.vae.use_slicing
    assert not plain.pipe.vae.use_tiling
    assert np.array_equal(draw(engine), draw(plain)), "one tile is the whole picture"
    assert not np.array_equal(draw(engine, size=128), draw(plain, size=128))
    assert not np.array_equal(draw(engine, seed=4), draw(plain))


def test_the_attention_backend_is_set():
    engine = load(FLUX, attention_backend="native")
    backends = {
        module.processor._attention_backend
        for module in engine.pipe.transformer.modules()
        if hasattr(module, "processor")
    }
    assert {backend.value for backend in backends} == {"native"}
    assert np.array_equal(draw(engine), draw(load(FLUX)))
    assert not np.array_equal(draw(engine, seed=4), draw(engine))


def test_an_attention_backend_that_is_not_there_or_cannot_be_chosen_is_refused():
    with pytest.raises(UsageError, match="--attention_backend nonsense"):
        load(FLUX, attention_backend="nonsense")
    with pytest.raises(UsageError, match=r"UNet2DConditionModel .unet. cannot choose a backend"):
        load(attention_backend="native")


def test_compiling_takes_the_repeated_blocks_where_a_model_names_them():
    unet = load(compile=True).pipe.unet
    compiled = {type(m).__name__ for m in unet.modules() if m._compiled_call_impl is not None}
    assert compiled == set(unet._repeated_blocks)


@pytest.mark.nightly
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_a_compiled_job_draws_the_same_pictures(tmp_path):
    words = ["--prompt", "a red circle", "--prompt", "a blue star", "--num_threads=1"]
    environ = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "inductor")}
    for name, more in (("plain", []), ("compiled", ["--compile"])):
        output = ["--output", str(tmp_path / name), "--device=cpu", "--nproc_per_node=1"]
        command = [sys.executable, str(MAIN), *words, *output, *more]
        subprocess.run(command, check=True, env=environ, capture_output=True, timeout=1200)
    assert list((tmp_path / "inductor").rglob("*.so")), "something was compiled"
    pictures = {
        name: [
            np.asarray(Image.open(file)).astype(int)
            for file in sorted(tmp_path.glob(f"{name}/images/*/*"))
        ]
        for name in ("plain", "compiled")
    }
    assert len(pictures["plain"]) == len(pictures["compiled"]) == 2
    for a, b in zip(pictures["plain"], pictures["compiled"], strict=True):
        assert abs(a - b).max() <= 2, "in 8 bits"
    assert abs(pictures["plain"][0] - pictures["compiled"][1]).max() > 2
