"""Any diffusers pipeline over many prompts on many GPUs, with raw torch.distributed."""
