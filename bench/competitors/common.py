"""What the competitors' scripts share, so that each shows only how it spreads the work.

No ddinfer in here: these run in an environment that does not have it.
"""

import argparse
import gzip
import json
import os

import torch


def parse_options():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompts", required=True)
    parser.add_argument("--output", required=True)
    parser.add_argument("--call", type=json.loads, default={}, help="arguments of every call")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--limit", type=int, default=None)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--times", default=None, help="write what the loop took here")
    parser.add_argument("--no_files", action="store_true", help="make images and save none")
    options = parser.parse_args()
    os.makedirs(options.output, exist_ok=True)
    return options


def read_jobs(options):
    """[(index, prompt, call arguments)] of a .txt or .jsonl file, gzipped or not."""
    opened = gzip.open if options.prompts.endswith(".gz") else open
    with opened(options.prompts, "rt", encoding="utf-8") as file:
        lines = file.read().split("\n")[:-1][: options.limit]
    jobs = []
    for index, line in enumerate(lines):
        row = json.loads(line) if ".jsonl" in options.prompts else {"prompt": line}
        prompt = row.pop("prompt")
        jobs.append((index, prompt, {**options.call, **row}))
    return jobs


def load(options, device="cpu"):
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(options.model, torch_dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def draw(pipe, jobs, options):
    """The loop of the guides: call, save, next; a batch where one was asked for."""
    for start in range(0, len(jobs), options.batch_size):
        batch = jobs[start : start + options.batch_size]
        generators = [torch.Generator("cpu").manual_seed(index) for index, _, _ in batch]
        prompts = [prompt for _, prompt, _ in batch]
        images = pipe(prompts, generator=generators, **batch[0][2]).images
        if options.no_files:
            continue
        for (index, _, _), image in zip(batch, images, strict=True):
            image.save(os.path.join(options.output, f"{index:08d}.png"))
