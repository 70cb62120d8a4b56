"""(b) The raw torch script of the diffusers guides, made to run over a prompt file.

https://huggingface.co/docs/diffusers/training/distributed_inference (PyTorch Distributed). As
printed there it draws one prompt on each of two GPUs. Here: gloo where there is no GPU, the address
that init_process_group needs, a slice of the file per rank instead of an if for each rank, the
pipeline loaded in the ranks alone, a name per image.
"""

import os
import socket

import torch.distributed as dist
import torch.multiprocessing as mp
from common import draw, load, parse_options, read_jobs


def run_inference(rank, world_size, options):
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    pipe = load(options)
    jobs = read_jobs(options)
    first, last = (len(jobs) * k // world_size for k in (rank, rank + 1))
    draw(pipe, jobs[first:last], options)
    dist.destroy_process_group()


def free_port():
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        return unused.getsockname()[1]


if __name__ == "__main__":
    options = parse_options()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = "127.0.0.1", str(free_port())
    mp.spawn(run_inference, args=(options.ranks, options), nprocs=options.ranks, join=True)
