"""Two prompts on two GPUs, the script of the diffusers guides. Without GPUs it uses two CPU ranks.

torchrun --nproc_per_node=2 docs/examples/two_prompts.py --model MODEL
"""

import argparse

import ddinfer

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
parser.add_argument("--steps", type=int, default=30)
options = parser.parse_args()

world = ddinfer.World.detect()
pipe = ddinfer.load_pipeline(options.model, device=world.device)

with ddinfer.split_between_processes(["a dog", "a cat"]) as prompts:
    for prompt in prompts:
        image = pipe(prompt, num_inference_steps=options.steps).images[0]
        image.save(f"result_{world.rank}.png")
