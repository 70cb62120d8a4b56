"""`generate` with a denoiser that is tensor parallel: all ranks must draw the same pictures."""

import numpy as np
import pytest
import torch
import torch.distributed as dist

import ddinfer
from ddinfer.engines.lockstep import needs_equal_inputs, sharded_models
from ddinfer.models.loading import load_pipeline
from tests.ranks import run_ranks
from tests.tiny_pipelines import call_arguments, tiny_pipeline


@pytest.fixture(scope="module")
def tiny_flux(tmp_path_factory):
    return str(tiny_pipeline("flux", tmp_path_factory.mktemp("model")))


def parallelize(model):
    """Every feed-forward is split over all ranks: columns first, then rows."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        RowwiseParallel,
        parallelize_module,
    )

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    plan = {"ff.net.0.proj": ColwiseParallel(), "ff.net.2": RowwiseParallel()}
    for block in model.transformer_blocks:
        parallelize_module(block, mesh, plan)


def floats(results):
    return np.stack([np.asarray(r.image, np.float32) for r in results])


def draw(group, folder):
    pipe = load_pipeline(folder, device="cpu")
    prompts = [f"a cat {k}" for k in range(3)]  # two for the first rank, one for the second
    options = call_arguments("flux")
    whole = floats(ddinfer.generate(pipe, prompts, **options))
    other = floats(ddinfer.generate(pipe, prompts, seed=1, **options))
    parallelize(pipe.transformer)
    results = ddinfer.generate(pipe, prompts, **options)
    told = {
        "apart": float(abs(floats(results) - whole).max()),
        "other seed apart": float(abs(other - whole).reshape(3, -1).max(axis=1).min()),
        "ranks": [r.rank for r in results],
        "streamed": [r.index for r in ddinfer.stream(pipe, prompts, **options)],
        "is split": any(p.to_local().shape != p.shape for p in dtensors(pipe.transformer)),
    }
    return told


def dtensors(model):
    from torch.distributed.tensor import DTensor

    return [p for p in model.parameters() if isinstance(p, DTensor)]


def test_a_tensor_parallel_denoiser_draws_what_the_whole_one_draws(tiny_flux):
    first, second = run_ranks(draw, 2, tiny_flux)
    for told in (first, second):
        assert told["is split"]
        assert told["apart"] <= 1  # of 255: sums are made in another order
        assert told["other seed apart"] > 10
        assert told["ranks"] == [0, 0, 1]
    assert (first["streamed"], second["streamed"]) == ([0, 1], [2])


def kinds(group):
    """Which models need equal inputs on all ranks."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    def model():
        return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))

    def split(whole, mesh):
        from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel
        from torch.distributed.tensor.parallel import parallelize_module as apply

        return apply(whole, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})

    line = init_device_mesh("cpu", (2,))
    grid = init_device_mesh("cpu", (2, 1), mesh_dim_names=("first", "second"))
    models = {
        "whole": model(),
        "fsdp": fully_shard(model(), mesh=line),
        "hsdp": fully_shard(model(), mesh=grid),
        "tensor": split(model(), line),
        "both": fully_shard(split(model(), grid["second"]), mesh=grid["first"]),
    }

    class Pipe:
        def __init__(self, denoiser):
            self.denoiser = denoiser

    return {name: needs_equal_inputs(sharded_models(Pipe(m))) for name, m in models.items()}


def test_tensor_parallel_is_told_apart_from_fsdp():
    expected = {"whole": False, "fsdp": False, "hsdp": False, "tensor": True, "both": True}
    assert run_ranks(kinds, 2) == [expected] * 2
