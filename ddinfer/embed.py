"""Inside somebody's program: `generate` and `stream` over the process group that is there.

The group is borrowed and the pipeline is handed back as it came: its modules' train or eval
modes, its scheduler, its progress bar. No files, no signal handlers, no logging, no environment,
and no random numbers but those of the images' own generators.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import inspect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

from ddinfer.config import RESERVED_CALL_ARGUMENTS
from ddinfer.distributed.collectives import place_by_index, require_equal
from ddinfer.distributed.partition import contiguous_slice, cut_batches
from ddinfer.distributed.process_group import Group
from ddinfer.engines.whole import WholeEngine, check_call
from ddinfer.errors import ErrorRecord, PromptsFailed, RankError, UsageError
from ddinfer.prompts import prompt_from_fields
from ddinfer.request import Prompt, Request, Result, resolve_requests

PromptLike = str | Mapping[str, Any] | Request


def generate(
    pipe: Any,
    prompts: Sequence[PromptLike],
    *,
    seed: int = 0,
    batch_size: int = 1,
    group: Any = None,
    gather: Literal["all", "first", "none"] = "all",
    errors: Literal["raise", "return"] = "raise",
    **call: Any,
) -> list[Result]:
    """Make an image for every prompt, each rank its contiguous share.

    Every rank of the group calls this with the same full list; without a group one process makes
    everything. The images are those of plain diffusers called prompt by prompt (with
    ``batch_size=1``) with ``torch.Generator("cpu").manual_seed(seed + k)`` for prompt k.

    Args:
        pipe: a diffusers pipeline on this rank's device.
        prompts: strings, dicts (``prompt``, ``id``, ``seed``, ``num_images``, … as in a jsonl
            prompt file) or `Request`s.
        seed: of the first image, where a prompt has none of its own.
        batch_size: neighbours with equal parameters that share a pipeline call, at most.
        group: a ``torch.distributed`` process group; default: the whole world.
        gather: "all": every rank gets every Result with its image; "first": rank 0 of the group
            does, others get ``[]``; "none": each rank keeps its own share.
        errors: "raise" raises after everything has run; "return" leaves errors in the Results.
        call: arguments of the pipeline's ``__call__`` for all prompts.

    Returns:
        Results in the order of the prompts.

    Raises:
        UsageError: bad arguments, or lists that differ between ranks.
        PromptsFailed: on every rank, when any prompt failed and ``errors="raise"``.
        RankError: on every rank, when one rank failed as a whole.
    """
    if gather not in ("all", "first", "none"):
        raise UsageError(f"gather={gather!r} must be 'all', 'first' or 'none'")
    if errors not in ("raise", "return"):
        raise UsageError(f"errors={errors!r} must be 'raise' or 'return'")
    ranks = Group.borrow(group)
    requests = _agreed_requests(ranks, pipe, prompts, seed, batch_size, call)
    mine: list[Result] = []
    failure: BaseException | None = None
    try:
        mine = list(_run_share(ranks, pipe, requests, batch_size, call))
    except Exception as error:  # noqa: BLE001 - told to every rank, then raised
        failure = error
    # A failed rank still joins the exchange, so that the others hear of it instead of waiting.
    payload = mine if gather != "none" else [result.without_pictures() for result in mine]
    told = ranks.all_gather_object((ErrorRecord.of(failure) if failure else None, payload))
    for rank, (record, _) in enumerate(told):
        if record is not None:
            raise RankError(ranks.global_rank(rank), "running", record) from failure
    everyone = place_by_index([part for _, part in told], len(requests), lambda r: r.index)
    failed = [result for result in everyone if result.error is not None]
    if failed and errors == "raise":
        raise PromptsFailed(_failure_message(failed, len(requests)))
    if gather == "none":
        return mine
    return everyone if gather == "all" or ranks.group_rank == 0 else []


def stream(
    pipe: Any,
    prompts: Sequence[PromptLike],
    *,
    seed: int = 0,
    batch_size: int = 1,
    group: Any = None,
    **call: Any,
) -> Iterator[Result]:
    """Like `generate`, but yields this rank's Results as they are made; nothing is gathered.

    Errors of prompts are in the Results. The check that all ranks were given the same list is
    the only exchange, at the first step of the iteration.
    """
    ranks = Group.borrow(group)
    requests = _agreed_requests(ranks, pipe, prompts, seed, batch_size, call)
    yield from _run_share(ranks, pipe, requests, batch_size, call)


def as_requests(prompts: Sequence[PromptLike], seed: int = 0) -> list[Request]:
    """Strings, dicts and Requests → Requests, numbered by their place in the list.

    Raises:
        UsageError: the list or one of its items is of another type, or its fields are wrong.
    """
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise UsageError(
            f"prompts must be a list of strings, dicts or Requests, got {type(prompts).__name__}"
            + ("; put the one prompt into a list" if isinstance(prompts, (str, Mapping)) else "")
        )
    requests: list[Request] = []
    for k, item in enumerate(prompts):
        if isinstance(item, Request):
            requests.append(replace(item, index=len(requests)))
            continue
        if isinstance(item, str):
            prompt = Prompt({"prompt": item}, f"prompts[{k}]")
        elif isinstance(item, Mapping):
            prompt = prompt_from_fields(item, f"prompts[{k}]")
        else:
            raise UsageError(
                f"prompts[{k}] is a {type(item).__name__}; expected a string, a dict or a Request"
            )
        start = len(requests)
        for request in resolve_requests([prompt], base_seed=seed + start):
            index = start + request.index
            is_named = "id" in prompt.fields
            name = request.id if is_named else f"{index:08d}"
            requests.append(replace(request, index=index, id=name))
    return requests


def _agreed_requests(
    ranks: Group,
    pipe: Any,
    prompts: Sequence[PromptLike],
    seed: int,
    batch_size: int,
    call: Mapping[str, Any],
) -> list[Request]:
    if batch_size < 1:
        raise UsageError(f"batch_size={batch_size} must be at least 1")
    for name in call:
        if name in RESERVED_CALL_ARGUMENTS:
            raise UsageError(f"{name}: {RESERVED_CALL_ARGUMENTS[name]}")
    requests = as_requests(prompts, seed)
    given = set(call).union(*(r.parameters() for r in requests))
    given |= {"negative_prompt" for r in requests if r.negative_prompt is not None}
    parameters = inspect.signature(pipe.__call__).parameters
    check_call(type(pipe).__name__, parameters, given, batch_size)
    digest = hashlib.sha256("".join(r.content_hash() for r in requests).encode()).hexdigest()
    require_equal(ranks, "prompts", f"{len(requests)} requests, {digest[:16]}")
    return requests


def _run_share(
    ranks: Group,
    pipe: Any,
    requests: Sequence[Request],
    batch_size: int,
    call: Mapping[str, Any],
) -> Iterator[Result]:
    batches = cut_batches([r.batch_key() for r in requests], batch_size)
    share = contiguous_slice(len(batches), ranks.group_size, ranks.group_rank)
    engine = WholeEngine(pipe, rank=ranks.world.rank, call=call)
    with _handed_back(pipe):
        yield from engine.run([requests[i] for i in batches[k]] for k in share)


@contextlib.contextmanager
def _handed_back(pipe: Any) -> Iterator[None]:
    """Eval mode and silence inside; afterwards everything as it was."""
    import torch

    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    training = [m for module in modules for m in module.modules() if m.training]
    bar = getattr(pipe, "_progress_bar_config", None)
    scheduler = getattr(pipe, "scheduler", None)
    for module in modules:
        module.eval()
    if scheduler is not None:
        pipe.scheduler = copy.deepcopy(scheduler)
    pipe.set_progress_bar_config(disable=True)
    try:
        yield
    finally:
        for m in training:
            m.training = True
        if scheduler is not None:
            pipe.scheduler = scheduler
        if bar is None:
            del pipe._progress_bar_config
        else:
            pipe._progress_bar_config = bar


def _failure_message(failed: Sequence[Result], num_requests: int) -> str:
    lines = [f"  {r.index} ({r.prompt[:60]!r}): {r.error}" for r in failed[:10]]
    more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
    return (
        f"{len(failed)} of {num_requests} prompts failed (errors='return' gives the rest):\n"
        + "\n".join(lines)
        + more
    )
