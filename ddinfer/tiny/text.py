"""Text encoders, trained first to name the scene that a caption describes, then frozen.

The denoisers start from embeddings in which colour, shape, size, place and background can be
read off linearly, so that none of their steps are spent on learning to read.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .optim import Plan, fit
from .tokens import CLIP_END, CLIP_START, clip_tokenizer, t5_tokenizer, token_ids
from .world import COLOURS, SHAPES, SIZES, Scene, caption, random_scene

WIDTH = 64
BATCH_SIZE = 128
_COLOURS = tuple(sorted(COLOURS))
NUM_ANSWERS = (3, 10, 8, 3, 11, 9, 10)
"""Answers to each question about a scene, see `answers`."""


def build_clip(tokenizer: Any) -> Any:
    """A small `CLIPTextModel` with fresh weights for the tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    start, end = tokenizer.convert_tokens_to_ids([CLIP_START, CLIP_END])
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        bos_token_id=start,
        eos_token_id=end,
        pad_token_id=end,
    )
    return CLIPTextModel(config)


def build_t5(tokenizer: Any) -> Any:
    """A small `T5EncoderModel` with fresh weights for the tokenizer."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=WIDTH,
        d_kv=WIDTH // 4,
        d_ff=2 * WIDTH,
        num_layers=3,
        num_heads=4,
        relative_attention_num_buckets=16,
        relative_attention_max_distance=32,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        is_encoder_decoder=False,
        use_cache=False,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return T5EncoderModel(config)


def answers(scene: Scene) -> list[int]:
    """A complete scene as class numbers: axis, first colour, shape and size, second, background."""
    colour, shape, size = scene.figures[0].decided()
    colour_2, shape_2, _ = scene.figures[-1].decided()
    alone = scene.axis is None
    assert scene.background is not None
    return [
        (None, "row", "column").index(scene.axis),
        _COLOURS.index(colour),
        SHAPES.index(shape),
        SIZES.index(size),
        len(_COLOURS) if alone else _COLOURS.index(colour_2),
        len(SHAPES) if alone else SHAPES.index(shape_2),
        _COLOURS.index(scene.background),
    ]


def with_strange_word(prompt: str, rng: random.Random) -> str:
    """The prompt with a word of random letters somewhere in it, to be overlooked."""
    parts = prompt.split(" ")
    strange = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(3, 7)))
    parts.insert(rng.randrange(len(parts)), strange)
    return " ".join(parts)


class Reader(nn.Module):
    """A text encoder and linear heads that answer the questions of `answers` from its output."""

    def __init__(self, encoder: Any, first_position: int | None):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.Linear(WIDTH, sum(NUM_ANSWERS))
        self.end_token = first_position

    def forward(self, ids: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
        """The loss, and which of the answers `(batch, questions)` are right on average.

        A causal encoder is asked wherever it has read everything, the other one everywhere.
        """
        hidden = self.encoder(input_ids=ids)[0]
        asked = torch.ones_like(ids, dtype=torch.bool)
        if self.end_token is not None:
            asked = (ids == self.end_token).cumsum(dim=1) > 0
        rows = asked.nonzero()[:, 0]
        logits = self.heads(hidden[asked]).split(NUM_ANSWERS, dim=-1)
        losses = [
            functional.cross_entropy(guess, wanted[rows, question], label_smoothing=0.02)
            for question, guess in enumerate(logits)
        ]
        right = torch.stack([guess.argmax(-1) for guess in logits], dim=1) == wanted[rows]
        return torch.stack(losses).sum(), right.float()


def train(
    kind: str, folder: Path, plan: Plan, *, seed: int, device: str, stop_at: int | None = None
) -> tuple[Any, Any]:
    """Train the text encoder `kind`, "clip" or "t5"; return its tokenizer and the encoder."""
    torch.manual_seed(seed)
    tokenizer = clip_tokenizer() if kind == "clip" else t5_tokenizer()
    encoder = build_clip(tokenizer) if kind == "clip" else build_t5(tokenizer)
    end = tokenizer.eos_token_id if kind == "clip" else None
    reader = Reader(encoder, end).to(device)

    def loss_of_step(step: int) -> Tensor:
        prompts, wanted = captions(random.Random(f"text {seed} {step}"), BATCH_SIZE)
        ids = token_ids(tokenizer, prompts)
        return reader(ids.to(device), torch.tensor(wanted, device=device))[0]

    reader.load_state_dict(fit(reader, loss_of_step, plan, folder, name=kind, stop_at=stop_at))
    return tokenizer, reader.encoder.eval()


def captions(rng: random.Random, count: int) -> tuple[list[str], list[list[int]]]:
    """Captions of random scenes, a few with a strange word, and the right answers to them."""
    prompts, wanted = [], []
    for _ in range(count):
        scene = random_scene(rng)
        prompt = caption(scene, rng)
        prompts.append(with_strange_word(prompt, rng) if rng.random() < 0.1 else prompt)
        wanted.append(answers(scene))
    return prompts, wanted
