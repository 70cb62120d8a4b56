"""Train with DDP and draw validation images every few steps, on all ranks.

    torchrun --nproc_per_node=2 docs/examples/validation_images.py --model MODEL

The losses are the same, to the last bit, with and without the images (--validate_every 0).
"""

import argparse
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.nn  # before there is a group: see main()
from torch.nn.parallel import DistributedDataParallel

import ddinfer

VALIDATION_PROMPTS = ["a red cat", "a blue bird", "two stones"]


def batch(pipe, device):
    """Stands for yours: noisy latents, timesteps, text, and the noise to be found."""
    config = pipe.unet.module.config
    latents = torch.randn(2, config.in_channels, config.sample_size, config.sample_size)
    text = torch.randn(2, 16, config.cross_attention_dim)
    noise = torch.randn_like(latents)
    timesteps = torch.randint(0, 1000, (2,))
    noisy = pipe.scheduler.add_noise(latents, noise, timesteps)
    return [tensor.to(device) for tensor in (noisy, timesteps, text, noise)]


def train(options):
    world = ddinfer.World.detect()
    torch.manual_seed(world.rank)
    pipe = ddinfer.load_pipeline(options.model, dtype="float32", device=world.device)
    pipe.unet = DistributedDataParallel(pipe.unet)
    pipe.unet.train()
    optimizer = torch.optim.AdamW(pipe.unet.parameters(), lr=1e-4)

    for step in range(1, options.train_steps + 1):
        noisy, timesteps, text, noise = batch(pipe, world.device)
        loss = torch.nn.functional.mse_loss(pipe.unet(noisy, timesteps, text).sample, noise)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses = ddinfer.gather(loss)  # of all ranks
        if ddinfer.is_first_rank():
            print(f"step {step} losses {losses.tolist()}")

        if options.validate_every and step % options.validate_every == 0:
            results = ddinfer.generate(
                pipe,
                VALIDATION_PROMPTS,
                seed=0,  # the same noise at every step, so that the pictures can be compared
                gather="first",
                errors="return",  # a bad picture is no reason to end the training
                num_inference_steps=options.inference_steps,
                height=options.size,
                width=options.size,
            )
            for result in results:  # none but on rank 0
                options.output.mkdir(parents=True, exist_ok=True)
                if result.error is None:
                    result.image.save(options.output / f"step-{step}-prompt-{result.index}.png")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="stable-diffusion-v1-5/stable-diffusion-v1-5")
    parser.add_argument("--output", type=Path, default=Path("validation"))
    parser.add_argument("--train_steps", type=int, default=100)
    parser.add_argument("--validate_every", type=int, default=50)
    parser.add_argument("--inference_steps", type=int, default=30)
    parser.add_argument("--size", type=int, default=None, help="of the images, in pixels")
    options = parser.parse_args()

    # With gloo, torch aborts now and then at exit ("terminate called without an active exception")
    # where anything still holds the group, whose threads then meet an interpreter that is ending.
    # So all that holds it is local to train(), and torch.distributed.nn, whose default arguments
    # keep the group that they find, was imported before there was one.
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    train(options)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
