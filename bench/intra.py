"""One image on two ranks against one rank, and against diffusers' own context parallelism.

    launch/bench --only intra
    python -m bench.intra [--repetitions N]

One forward of a Flux-shaped transformer of 53 M random weights, 1024 + 128 tokens, float32; for
guidance two forwards. Two gloo ranks of one thread run all ways in turn, so that a busy minute hits
all of them. diffusers' Ulysses does not start on a CPU by itself (it divides by the number of
accelerators), so its parts are put together here. Beside the wall time stands the CPU time of the
busier rank, which holds on a busy machine, too. Run it on an idle machine with two cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Mapping
from typing import Any

from bench.measure import Size, progress, ratios, summary
from bench.report import spread, table

ABOUT = "one image on two ranks: latency against one rank and diffusers' context parallelism"
EXPECTED_SECONDS = 60

#: Way → what it is compared with.
AGAINST = {"tokens": "one rank", "Ulysses of diffusers": "one rank", "guidance": "two calls"}


def measure(size: Size) -> dict[str, Any]:
    return compare(size.times(2, 5, 9))


def compare(repetitions: int) -> dict[str, Any]:
    """Way → seconds, CPU seconds, their ratios, the difference of its output, bytes it sent."""
    from ddinfer import launch

    samples, differences, num_bytes = launch(
        measure_on_rank, repetitions, nproc_per_node=2, device="cpu", num_threads=1
    )[0]
    found = {}
    for way, taken in samples.items():
        base = AGAINST.get(way)
        found[way] = told = {
            "seconds": summary([wall for wall, _ in taken]),
            "cpu_seconds": summary([cpu for _, cpu in taken]),
            "bytes": num_bytes.get(way, 0),
        }
        if base is not None:
            for k, name in enumerate(("seconds_ratio", "cpu_ratio")):
                told[name] = ratios([t[k] for t in taken], [t[k] for t in samples[base]])
            told["difference"] = differences[way]
    return found


def measure_on_rank(world: Any, repetitions: int) -> Any:
    """→ way → [(seconds, CPU seconds of the busier rank)], way → difference, way → bytes sent."""
    import torch
    import torch.distributed as dist

    from ddinfer.distributed.process_group import process_group

    torch.set_num_threads(1)
    samples: dict[str, list[tuple[float, float]]] = {}
    outputs: dict[str, Any] = {}
    with process_group(world), torch.no_grad():
        ways, num_bytes = make_ways(world.rank)
        for k in range(repetitions + 2):  # in the first two, calls are compared and learned
            for way, run in ways.items():
                if world.rank == 0:
                    progress(f"{way}, {k - 1} of {repetitions}")
                dist.barrier()
                wall, cpu = time.perf_counter(), time.process_time()
                made = run()
                wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
                busier: list[Any] = [None, None]
                dist.all_gather_object(busier, cpu)
                if k >= 2:
                    samples.setdefault(way, []).append((wall, max(busier)))
                outputs[way] = made
        differences = {}
        if world.rank == 0:
            for way, base in AGAINST.items():
                pairs = zip(outputs[way], outputs[base], strict=True)
                differences[way] = max(float((a - b).abs().max()) for a, b in pairs)
        return samples, differences, num_bytes()


def make_ways(rank: int) -> tuple[dict[str, Callable[[], list[Any]]], Callable[[], dict[str, int]]]:
    """Every way as a function that both ranks call, and the bytes that ways have sent a forward."""
    from ddinfer.parallel.communicator import Communicator
    from ddinfer.parallel.team.team import Team

    comm, inputs = Communicator.of(), [make_inputs(seed) for seed in (0, 1)]
    whole, ulysses = make_model(), make_model()
    split_by_diffusers(ulysses, rank)
    teams, num_calls = {}, {"tokens": 0}

    def alone(calls: int) -> Callable[[], list[Any]]:
        return lambda: [whole(**given)[0] for given in inputs[:calls] if rank == 0]

    def in_team(way: str, calls: int, **options: int) -> Callable[[], list[Any]]:
        model = make_model()
        team = teams[way] = Team({"transformer": model}, comm, **options)

        def run() -> list[Any]:
            num_calls[way] = num_calls.get(way, 0) + 1
            if not team.is_leader:
                team.serve()
                return []
            with team.leading():
                made = [model(**given)[0] for given in inputs[:calls]]
                return [output + 0 for output in made]  # which reads them

        return run

    ways = {
        "one rank": alone(1),
        "tokens": in_team("tokens", 1, sequence_parallel=2),
        "Ulysses of diffusers": lambda: [ulysses(**inputs[0])[0]],
        "two calls": alone(2),
        "guidance": in_team("guidance", 2, cfg_parallel=2),
    }
    sent = {way: team.exchange for way, team in teams.items()}
    return ways, lambda: {"tokens": sent["tokens"].num_bytes // num_calls["tokens"]}


def make_model() -> Any:
    import torch
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model: Any = FluxTransformer2DModel(
        patch_size=1,
        in_channels=64,
        num_layers=3,
        num_single_layers=6,
        attention_head_dim=64,
        num_attention_heads=8,
        joint_attention_dim=512,
        pooled_projection_dim=512,
        axes_dims_rope=(8, 28, 28),
    )
    return model.eval()


def make_inputs(seed: int) -> dict[str, Any]:
    import torch

    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return {
        "hidden_states": torch.randn(1, 1024, 64, generator=generator),
        "encoder_hidden_states": torch.randn(1, 128, 512, generator=generator),
        "pooled_projections": torch.randn(1, 512, generator=generator),
        "timestep": torch.ones(1),
        "img_ids": torch.stack([torch.zeros(1024), y.flatten(), x.flatten()], 1),
        "txt_ids": torch.zeros(128, 3),
        "return_dict": False,
    }


def split_by_diffusers(model: Any, rank: int) -> None:
    """What ``model.enable_parallelism(config=…)`` does where there is an accelerator."""
    import torch
    from diffusers.hooks.context_parallel import apply_context_parallel
    from diffusers.models._modeling_parallel import ContextParallelConfig, ParallelConfig
    from torch.distributed.device_mesh import init_device_mesh

    context = ContextParallelConfig(ulysses_degree=2)
    config = ParallelConfig(context_parallel_config=context)
    mesh = init_device_mesh("cpu", context.mesh_shape, mesh_dim_names=context.mesh_dim_names)
    config.setup(rank, 2, torch.device("cpu"), mesh=mesh)
    for module in model.modules():
        if hasattr(getattr(module, "processor", None), "_parallel_config"):
            module.processor._parallel_config = config
    apply_context_parallel(model, context, model._cp_plan)


def tables(figures: Mapping[str, Any]) -> str:
    rows = []
    for way, told in figures.items():
        row = [way, spread(told["seconds"]), spread(told["cpu_seconds"])]
        if "seconds_ratio" in told:
            row += [spread(told["seconds_ratio"]), spread(told["cpu_ratio"])]
            row += [
                f"{told['difference']:.1g}",
                f"{told['bytes'] / 1e6:.1f}" if told["bytes"] else "",
            ]
        else:
            row += [""] * 4
        rows.append(row)
    header = ["", "seconds", "CPU seconds of the busier rank", "ratio", "CPU ratio"]
    return table([*header, "difference", "MB sent by a rank"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repetitions", type=int, default=5)
    print(tables(compare(parser.parse_args().repetitions)))


if __name__ == "__main__":
    main()
