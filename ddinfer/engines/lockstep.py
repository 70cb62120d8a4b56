"""The `LockstepEngine`: a denoiser sharded over ranks, of which every forward is an exchange.

With FSDP or tensor parallelism no rank can run a forward alone. So all ranks make equally many
batches and meet before each forward. A rank that fails, or wants another number of forwards, is
noticed there, and is an error on all of them instead of a wait without end.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch

from ddinfer.distributed.process_group import Group
from ddinfer.engines.base import Batch
from ddinfer.engines.outputs import Output
from ddinfer.engines.pipeline_call import CallFailure, call_pipeline, results_of
from ddinfer.errors import PromptsFailed, UsageError
from ddinfer.request import Request, Result


class LockstepEngine:
    """Runs batches at the same pace as the other ranks. Every rank runs equally many.

    A prompt that fails ends the run, since the others cannot go on without this rank.

    Args:
        ranks: those that the models are sharded over, or more.
        call: arguments of the pipeline's ``__call__`` that hold for every Request, of any type.
    """

    def __init__(self, pipe: Any, ranks: Group, *, call: Mapping[str, Any] | None = None):
        self.pipe, self.ranks, self.call = pipe, ranks, dict(call or {})
        self.models = sharded_models(pipe)
        self._num_steps: dict[str, int] = {}
        self._stopped: BaseException | None = None

    def run(self, batches: Iterable[Batch]) -> Iterator[Result]:
        for batch in batches:
            with self._meeting_before_forwards():
                started = time.perf_counter()
                made = self._call(batch)
                seconds = (time.perf_counter() - started) / len(batch)
                self._meet("the end of a batch")
            rank = self.ranks.world.rank
            yield from results_of(batch, made, rank=rank, seconds=seconds, is_exact=True)

    def _call(self, batch: Batch) -> list[Output]:
        made = call_pipeline(self.pipe, batch, self.call)
        if self._stopped is not None:  # it ended a forward; the pipeline's call wrapped it
            raise self._stopped
        if isinstance(made, CallFailure):
            names = ", ".join(f"{r.index} ({r.prompt[:60]!r})" for r in batch)
            raise PromptsFailed(
                f"prompt {names}: {made.record}\n{made.record.traceback}\nThe denoiser is sharded "
                "over ranks, which cannot go on without one another"
            )
        return made

    @contextlib.contextmanager
    def _meeting_before_forwards(self) -> Iterator[None]:
        def meeting(name: str) -> Callable[..., None]:
            return lambda *_: self._meet(f"a forward of {name}")

        # In front of FSDP's own hook, which is where the exchange begins.
        hooks = [
            model.register_forward_pre_hook(meeting(name), prepend=True)
            for name, model in self.models.items()
        ]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for model in self.models.values():
                _reshard(model)

    def _meet(self, where: str) -> None:
        """Wait for the other ranks, and check that they are at the same place."""
        self._num_steps[where] = number = self._num_steps.get(where, 0) + 1
        key = f"lockstep/{where}"
        try:
            self.ranks.add(key)
            self.ranks.wait_for_peers()
            # The others are at the same place, or already at the next; else they never come.
            if self.ranks.add(key, 0) < number * self.ranks.group_size:
                raise UsageError(
                    f"ranks that share a sharded model want different numbers of forwards: this "
                    f"one is at {where} number {number}, another is elsewhere"
                )
        except BaseException as error:
            self._stopped = error
            raise


def sharded_models(pipe: Any) -> dict[str, torch.nn.Module]:
    """Models of a pipeline whose forward is an exchange between ranks, by name."""
    return {
        name: value
        for name, value in vars(pipe).items()
        if isinstance(value, torch.nn.Module) and _is_sharded(value)
    }


def needs_equal_inputs(models: Mapping[str, torch.nn.Module]) -> bool:
    """Whether a model adds up what ranks made of one input, as tensor parallel layers do.

    FSDP gathers weights, so that each rank may compute another prompt. Tensor parallel layers
    gather activations: with another prompt on each rank, every picture would be a mixture.
    """
    return any(_is_tensor_parallel(model) for model in models.values())


def _is_tensor_parallel(model: torch.nn.Module) -> bool:
    from torch.distributed.fsdp import FSDPModule
    from torch.distributed.tensor import DTensor

    of_fsdp = {
        id(parameter)
        for module in model.modules()
        if isinstance(module, FSDPModule)
        for parameter in module.parameters()
    }
    for parameter in model.parameters():
        if isinstance(parameter, DTensor):
            *others, last = parameter.placements
            # FSDP shards over the mesh's last dim and replicates over the others. Anything else
            # that is cut, or not FSDP's, is another way of being parallel.
            is_fsdp = last.is_shard() and all(p.is_replicate() for p in others)
            if id(parameter) not in of_fsdp or not is_fsdp:
                return True
    return False


def check_lockstep(pipe: Any, ranks: Sequence[int], requests: Sequence[Request]) -> None:
    """Check that these ranks can draw these Requests at one pace.

    Raises:
        UsageError: a model is sharded over ranks that are not here, or prompts differ in more
            than text, seed and size, so that they may need different numbers of forwards.
    """
    models = sharded_models(pipe)
    for name, model in models.items():
        missing = sorted(_ranks_of(model) - set(ranks))
        if missing:
            raise UsageError(
                f"{name} is sharded over ranks {sorted(_ranks_of(model))}, but only ranks "
                f"{list(ranks)} are in the group; all of them must draw"
            )
    if models and len({_pace(request) for request in requests}) > 1:
        first = requests[0]
        other = next(r for r in requests if _pace(r) != _pace(first))
        raise UsageError(
            f"{next(iter(models))} is sharded over ranks, which must run equally many forwards, so "
            f"all prompts need the same arguments (but width and height); prompts {first.index} "
            f"and {other.index} have {_pace(first)} and {_pace(other)}"
        )


def _pace(request: Request) -> str:
    """What may decide how many forwards a prompt needs."""
    parameters = {k: v for k, v in request.parameters().items() if k not in ("width", "height")}
    parameters |= request.settings()
    parameters.update(dict.fromkeys((*request.texts(), *request.input_hashes), "given"))
    if request.negative_prompt is not None:
        parameters["negative_prompt"] = "given"
    return repr(dict(sorted(parameters.items())))


def _is_sharded(model: torch.nn.Module) -> bool:
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FullyShardedDataParallel
    from torch.distributed.tensor import DTensor

    return any(isinstance(m, FullyShardedDataParallel) for m in model.modules()) or any(
        isinstance(p, DTensor) for p in model.parameters()
    )


def _ranks_of(model: torch.nn.Module) -> set[int]:
    """Global ranks over which parameters are sharded, as far as they say so."""
    from torch.distributed.tensor import DTensor

    meshes = {p.device_mesh for p in model.parameters() if isinstance(p, DTensor)}
    return {rank for mesh in meshes for rank in mesh.mesh.flatten().tolist()}


def _reshard(model: torch.nn.Module) -> None:
    """FSDP keeps the root's parameters whole after a forward; an optimizer needs the shards."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
