"""A model larger than the memory it may use, in the ways that Accelerate and diffusers have.

On a GPU the budget is the GPU's; without one it is the host's, and what exceeds it is on disk.
Prints a line of JSON: the seconds of each image, and the highest memory of the device.
"""

import argparse
import json
import os
import time

import torch


def resident(options):
    """All weights on the device: no offloading, for comparison."""
    return load(options).to(options.device)


def device_map(options):
    """Accelerate's ``device_map="auto"`` with ``max_memory``: whole modules wait elsewhere."""
    from diffusers import FluxTransformer2DModel

    memory = {"cpu": options.budget} if options.device == "cpu" else {0: options.budget}
    transformer = FluxTransformer2DModel.from_pretrained(
        options.model,
        subfolder="transformer",
        dtype=options.dtype,
        device_map="auto",
        max_memory=memory,
        offload_folder=options.offload_folder,
    )
    pipe = load(options, transformer=transformer)
    for name in ("text_encoder", "text_encoder_2", "vae"):
        getattr(pipe, name).to(options.device)
    return pipe


def sequential_offload(options):
    """Accelerate's ``cpu_offload``, or ``disk_offload`` without a GPU: one module at a time."""
    from accelerate import cpu_offload, disk_offload

    pipe = load(options)
    if options.device == "cpu":
        disk_offload(pipe.transformer, options.offload_folder, torch.device("cpu"))
    else:
        cpu_offload(pipe.transformer, torch.device(options.device))
    for name in ("text_encoder", "text_encoder_2", "vae"):
        getattr(pipe, name).to(options.device)
    return pipe


def group_offload(options):
    """diffusers' group offloading by blocks, with a stream on a GPU, from disk without one."""
    pipe = load(options)
    on_gpu = options.device != "cpu"
    pipe.transformer.enable_group_offload(
        onload_device=torch.device(options.device),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        use_stream=on_gpu,
        offload_to_disk_path=None if on_gpu else options.offload_folder,
    )
    for name in ("text_encoder", "text_encoder_2", "vae"):
        getattr(pipe, name).to(options.device)
    return pipe


def model_offload(options):
    """diffusers' model offloading: a whole component at a time. Needs a GPU."""
    pipe = load(options)
    pipe.enable_model_cpu_offload()
    return pipe


FUNCTIONS = (resident, device_map, sequential_offload, group_offload, model_offload)
WAYS = {function.__name__: function for function in FUNCTIONS}


def load(options, **components):
    from diffusers import DiffusionPipeline

    return DiffusionPipeline.from_pretrained(options.model, dtype=options.dtype, **components)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("way", choices=WAYS)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--call", type=json.loads, required=True)
    parser.add_argument("--device", required=True)
    parser.add_argument("--dtype", type=lambda name: getattr(torch, name), required=True)
    parser.add_argument("--budget", type=int, required=True, help="bytes")
    parser.add_argument("--offload_folder", required=True)
    options = parser.parse_args()
    os.makedirs(options.output, exist_ok=True)
    pipe = WAYS[options.way](options)
    pipe.set_progress_bar_config(disable=True)
    with open(options.prompts, encoding="utf-8") as file:
        prompts = file.read().splitlines()
    seconds = []
    for index, prompt in enumerate(prompts):
        started = time.perf_counter()
        generator = torch.Generator("cpu").manual_seed(index)
        image = pipe(prompt, generator=generator, **options.call).images[0]
        seconds.append(time.perf_counter() - started)
        image.save(os.path.join(options.output, f"{index:08d}.png"))
    print(json.dumps({"seconds": seconds}))
