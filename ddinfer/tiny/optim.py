"""One training loop for every model here: Muon, a trapezoid of learning rates, EMA, checkpoints.

A step is a function of (seed, step number, weights) alone and a checkpoint holds everything
else, so an interrupted run that is started again ends with the same weights.
"""

from __future__ import annotations

import json
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Plan:
    """How long and how fast a model learns. Counts are optimiser steps."""

    num_steps: int
    learning_rate: float
    num_warmup_steps: int = 100
    decay: float = 0.4
    """The share of the steps, at the end, over which the learning rate falls to zero."""
    ema_decay: float = 0.998
    checkpoint_seconds: float = 120.0

    def rate(self, step: int) -> float:
        """The learning rate of a step: a ramp up, a plateau, a ramp down to zero."""
        up = (step + 1) / max(1, self.num_warmup_steps)
        down = (self.num_steps - step) / max(1.0, self.decay * self.num_steps)
        return self.learning_rate * min(1.0, up, down)


def orthogonalised(matrices: Tensor, iterations: int = 5) -> Tensor:
    """The nearest orthogonal matrices, roughly, of a stack `(n, rows, columns)`.

    Newton-Schulz iteration of Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    tall = matrices.shape[-2] > matrices.shape[-1]
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon for matrices and convolutions, Adam for everything else, at one learning rate.

    The orthogonal update is scaled to Adam's usual size (Liu et al. 2025, arXiv 2502.16982).
    """

    def __init__(
        self, matrices: Iterable[Tensor], others: Iterable[Tensor], weight_decay: float = 0.0
    ):
        groups = [
            {"params": list(matrices), "matrices": True},
            {"params": list(others), "matrices": False},
        ]
        super().__init__(groups, {"lr": 0.0, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            update = self._muon if group["matrices"] else self._adam
            update([(p, p.grad) for p in group["params"] if p.grad is not None], group)

    def _muon(self, parameters: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        same_shape = defaultdict(list)
        for parameter, gradient in parameters:
            shape = (parameter.shape[0], parameter[0].numel())
            same_shape[shape].append((parameter, gradient))
        for (rows, columns), stack in same_shape.items():
            updates = []
            for parameter, gradient in stack:
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                state["momentum"].lerp_(gradient, 0.05)
                nesterov = gradient.lerp(state["momentum"], 0.95)
                updates.append(nesterov.reshape(rows, columns))
            size = 0.2 * max(rows, columns) ** 0.5
            orthogonal = orthogonalised(torch.stack(updates))
            for (parameter, _), update in zip(stack, orthogonal, strict=True):
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update.view_as(parameter), alpha=-group["lr"] * size)

    def _adam(self, parameters: list[tuple[Tensor, Tensor]], group: dict[str, Any]) -> None:
        fast, slow = 0.9, 0.98
        for parameter, gradient in parameters:
            state = self.state[parameter]
            if not state:
                state["first"] = torch.zeros_like(parameter)
                state["second"] = torch.zeros_like(parameter)
                state["count"] = 0
            state["count"] += 1
            state["first"].lerp_(gradient, 1 - fast)
            state["second"].lerp_(gradient.square(), 1 - slow)
            first = state["first"] / (1 - fast ** state["count"])
            second = state["second"] / (1 - slow ** state["count"])
            parameter.add_(first / (second.sqrt() + 1e-8), alpha=-group["lr"])


def muon_for(model: nn.Module, weight_decay: float = 0.0) -> Muon:
    """Muon for the matrices of a model's inner layers; Adam for the small and the outermost."""
    outer = {id(p) for m in model.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
    chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
    for parameter in model.parameters():
        if parameter.requires_grad:
            inner = parameter.ndim >= 2 and min(parameter.shape[0], parameter[0].numel()) >= 16
            chosen[0 if inner and id(parameter) not in outer else 1].append(parameter)
    return Muon(*chosen, weight_decay=weight_decay)


def fit(
    model: nn.Module,
    loss_of_step: Callable[[int], Tensor],
    plan: Plan,
    folder: Path,
    *,
    name: str,
    stop_at: int | None = None,
) -> dict[str, Tensor]:
    """Train a model, going on from its checkpoint if there is one; return its averaged weights.

    `loss_of_step(step)` computes the loss of one step with the model as it is. The checkpoint is
    `folder/name.pt`, the curve `folder/name.jsonl`. `stop_at` ends the run early, as a kill would.
    """
    folder.mkdir(parents=True, exist_ok=True)
    optimiser = muon_for(model)
    average = {key: value.detach().clone() for key, value in model.state_dict().items()}
    step, losses = 0, []
    checkpoint = folder / f"{name}.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, map_location=next(model.parameters()).device)
        model.load_state_dict(saved["model"])
        optimiser.load_state_dict(saved["optimiser"])
        average, step = saved["average"], saved["step"]

    def save() -> None:
        state = {
            "model": model.state_dict(),
            "optimiser": optimiser.state_dict(),
            "average": average,
            "step": step,
        }
        torch.save(state, checkpoint.with_suffix(".tmp"))
        os.replace(checkpoint.with_suffix(".tmp"), checkpoint)

    started = saved_at = time.monotonic()
    first_step = step
    end = plan.num_steps if stop_at is None else min(stop_at, plan.num_steps)
    while step < end:
        for group in optimiser.param_groups:
            group["lr"] = plan.rate(step)
        loss = loss_of_step(step)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(plan.ema_decay, (1 + step) / (10 + step))
        with torch.no_grad():
            for key, value in model.state_dict().items():
                if value.is_floating_point():
                    average[key].lerp_(value, 1 - decay)
        losses.append(loss.detach())
        if step % 50 == 0 or step == end:
            seconds = (time.monotonic() - started) / (step - first_step)
            point = {
                "step": step,
                "loss": round(torch.stack(losses).mean().item(), 5),
                "rate": round(plan.rate(step - 1), 6),
                "seconds_per_step": round(seconds, 3),
            }
            losses.clear()
            with open(folder / f"{name}.jsonl", "a") as curve:
                curve.write(json.dumps(point) + "\n")
        if time.monotonic() - saved_at > plan.checkpoint_seconds:
            save()
            saved_at = time.monotonic()
    if step > first_step:
        save()
    return average
