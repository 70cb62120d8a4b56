"""Records what Accelerate's planner does for ten models and budgets: accelerate_placements.json.

    python tests/data/record_accelerate.py     (in an environment that has accelerate)

The tests build the same models on meta from CASES and compare; they need no Accelerate.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

TARGET = Path(__file__).with_name("accelerate_placements.json")
CONFIGS = json.loads(Path(__file__).with_name("model_configs.json").read_text())["configs"]


class Blocks(torch.nn.Module):
    """An embedding, equal blocks, a head (perhaps the embedding's twin), buffers."""

    def __init__(self, blocks: int = 6, width: int = 32, first: int = 64, tied: bool = False):
        super().__init__()
        self.embed = torch.nn.Embedding(first, width)
        self.scale = torch.nn.Parameter(torch.zeros(width))
        self.register_buffer("table", torch.zeros(width, width), persistent=False)
        self.blocks = torch.nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = torch.nn.Linear(width, first, bias=False)
        if tied:
            self.head.weight = self.embed.weight


class Block(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)


@dataclass(frozen=True)
class Case:
    """``max_memory`` in bytes, by GPU number, "cpu" and "disk"; ``model`` and its arguments."""

    model: str
    max_memory: dict[int | str, int]
    strategy: str = "auto"
    no_split: tuple[str, ...] = ("Block",)
    arguments: dict[str, Any] = field(default_factory=dict)


FLUX = {
    "in_channels": 16, "num_layers": 2, "num_single_layers": 3, "attention_head_dim": 16,
    "num_attention_heads": 2, "joint_attention_dim": 32, "pooled_projection_dim": 32,
    "axes_dims_rope": (4, 4, 8),
}  # fmt: skip
SD3 = {
    "sample_size": 16, "patch_size": 1, "in_channels": 4, "num_layers": 3, "attention_head_dim": 8,
    "num_attention_heads": 4, "caption_projection_dim": 32, "joint_attention_dim": 32,
    "pooled_projection_dim": 64, "out_channels": 4, "pos_embed_max_size": 16,
}  # fmt: skip

#: Block(32) is 33,664 bytes; Blocks() is 222,592 with its table.
CASES: dict[str, Case] = {
    "all on one GPU": Case("Blocks", {0: 300_000, 1: 300_000, "cpu": 10**6}),
    "balanced over two GPUs": Case("Blocks", {0: 300_000, 1: 300_000, "cpu": 10**6}, "balanced"),
    "two GPUs, the rest on the host": Case("Blocks", {0: 120_000, 1: 80_000, "cpu": 10**6}),
    "one GPU, host and disk": Case("Blocks", {0: 140_000, "cpu": 40_000, "disk": 10**7}),
    "no word about the host": Case("Blocks", {0: 140_000, "cpu": 10**6, "disk": 10**7}),
    "first layer larger than the first GPU": Case(
        "Blocks", {0: 100_000, 1: 300_000, "cpu": 10**6}, arguments={"first": 1000}
    ),
    "tied head": Case("Blocks", {0: 120_000, 1: 300_000, "cpu": 10**6}, arguments={"tied": True}),
    "Flux over two GPUs": Case(
        "FluxTransformer2DModel", {0: 400_000, 1: 250_000, "cpu": 10**7}, "balanced",
        ("FluxTransformerBlock", "FluxSingleTransformerBlock"), FLUX,
    ),
    "SD3 over three GPUs": Case(
        "SD3Transformer2DModel", {0: 30_000, 1: 100_000, 2: 10**6, "cpu": 10**7}, "balanced",
        ("JointTransformerBlock",), SD3,
    ),
    "UNet on a small GPU": Case(
        "UNet2DConditionModel", {0: 60_000, "cpu": 10**7}, "auto",
        ("BasicTransformerBlock", "ResnetBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    ),
}  # fmt: skip


def build(case: Case) -> torch.nn.Module:
    """The case's model, on meta."""
    with torch.device("meta"):
        if case.model == "Blocks":
            return Blocks(**case.arguments)
        import diffusers

        return getattr(diffusers, case.model)(**(case.arguments or CONFIGS[case.model]))


def main() -> None:
    import accelerate
    from accelerate.utils import get_balanced_memory, infer_auto_device_map

    placements = {}
    for name, case in CASES.items():
        model = build(case)
        model_tie = getattr(model, "tie_weights", None)
        if model_tie is not None:
            model_tie()
        budgets: Any = dict(case.max_memory)
        if case.strategy == "balanced":
            budgets = get_balanced_memory(model, budgets, list(case.no_split))
        found = infer_auto_device_map(model, budgets, no_split_module_classes=list(case.no_split))
        placements[name] = {part: str(device) for part, device in found.items()}
        print(name, placements[name])
    data = {"source": f"accelerate {accelerate.__version__}", "placements": placements}
    TARGET.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
