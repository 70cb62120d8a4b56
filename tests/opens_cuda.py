"""Importing this leaves a process as a library does that asks CUDA for GPUs: forks lose them."""

import os

import torch

#: How torch was to count GPUs meanwhile.
COUNTED_BY_NVML = os.environ.get("PYTORCH_NVML_BASED_CUDA_CHECK")

torch.cuda._is_in_bad_fork = lambda: True  # what torch says in every process forked from here
