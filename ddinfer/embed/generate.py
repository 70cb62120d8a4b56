"""`generate` and `stream`: inference inside a caller's program, over its process group.

The group stays the caller's, and between two batches the pipeline is as the caller left it. They
write no files, install no signal handlers, configure no logging, set no environment variables and
draw no random numbers except from the images' own generators.
"""

from __future__ import annotations

import hashlib
import inspect
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from ddinfer.config import RESERVED_CALL_ARGUMENTS
from ddinfer.distributed.collectives import place_by_index, require_same
from ddinfer.distributed.partition import contiguous_slice, cut_batches
from ddinfer.distributed.process_group import Group
from ddinfer.embed.inference_state import inference_state
from ddinfer.embed.team import check_team, run_team
from ddinfer.engines.base import Batch
from ddinfer.engines.lockstep import (
    LockstepEngine,
    check_lockstep,
    needs_equal_inputs,
    sharded_models,
)
from ddinfer.engines.pipeline_call import check_call, check_settings, split_settings, takes_prompt
from ddinfer.engines.whole import WholeEngine
from ddinfer.errors import PromptsFailed, UsageError
from ddinfer.models.adapters import loras_of
from ddinfer.prompts.files import prompt_from_fields
from ddinfer.request import (
    GIVEN_BY_DDINFER,
    Prompt,
    Request,
    Result,
    canonical_json,
    resolve_requests,
)

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
    cfg_parallel: int = 1,
    sequence_parallel: int = 1,
    **call: Any,
) -> list[Result]:
    """Generate an image for every prompt, each rank its contiguous slice.

    Every rank of the group calls this with the same full list; without a group one process
    generates everything. The images are those of plain diffusers called prompt by prompt (with
    ``batch_size=1``) with ``torch.Generator("cpu").manual_seed(seed + k)`` for prompt k.

    Args:
        pipe: a diffusers pipeline on this rank's device.
        prompts: strings, dicts (``prompt``, ``id``, ``seed``, ``num_images``, … as in a jsonl
            prompt file) or `Request`s. An image input is a path, a PIL image, a tensor or a list
            of them; paths and PIL images mean what `diffusers.utils.load_image` makes of them.
        seed: of the first image, for prompts that set none of their own.
        batch_size: the most consecutive prompts with equal parameters that share a pipeline call.
        group: a ``torch.distributed`` process group; default: the whole world.
        gather: "all": every rank gets every Result with its image; "first": rank 0 of the group
            does, others get ``[]``; "none": each rank keeps its own slice.
        errors: "raise" raises after everything has run; "return" leaves errors in the Results.
        cfg_parallel: C, over which the guidance calls of a step are distributed.
        sequence_parallel: P, ranks over which the tokens of a transformer's call are split. C × P
            neighbouring ranks make each image; the first of them has its Result.
        call: arguments of the pipeline's ``__call__`` for all prompts, passed as they are.

    Returns:
        Results in the order of the prompts.

    Raises:
        UsageError: bad arguments, or lists that differ between ranks; on every rank.
        PromptsFailed: on every rank, when any prompt failed and ``errors="raise"``.
        RankError: on every rank, when one rank failed as a whole.
    """

    def check() -> _Plan:
        if gather not in ("all", "first", "none"):
            raise UsageError(f"gather={gather!r} must be 'all', 'first' or 'none'")
        if errors not in ("raise", "return"):
            raise UsageError(f"errors={errors!r} must be 'raise' or 'return'")
        options = f"gather={gather}, errors={errors}"
        if is_team:
            check_team(pipe, ranks, cfg_parallel, sequence_parallel)
            options += f", cfg_parallel={cfg_parallel}, sequence_parallel={sequence_parallel}"
        return _plan(ranks, pipe, prompts, seed, batch_size, call, options)

    ranks, is_team = Group.borrow(group), (cfg_parallel, sequence_parallel) != (1, 1)
    plan = _plan_on_all_ranks(ranks, check)
    if is_team:
        made = _run_in_teams(ranks, pipe, plan, call, cfg_parallel, sequence_parallel, group)
    else:
        made = list(_run_slice(ranks, pipe, plan, call))
    mine = [_without_inputs(result) for result in made]
    ranks.enter("gathering")
    pictures = gather == "all"
    gathered = ranks.all_gather_object(mine if pictures else [r.without_pictures() for r in mine])
    everyone = place_by_index(gathered, len(plan.requests), lambda r: r.index)
    if gather == "first":
        shares = ranks.gather_object(mine)
        everyone = [result for share in shares for result in share]
    failed = [r for share in gathered for r in share if r.error is not None]
    if failed and errors == "raise":
        raise PromptsFailed(_failure_message(failed, len(plan.requests)))
    results = mine if gather == "none" else everyone
    return [replace(result, request=plan.requests[result.index]) for result in results]


def _without_inputs(result: Result) -> Result:
    """A Result to gather: every rank has the images and tensors that the prompts came with."""
    return replace(result, request=replace(result.request, kwargs={}))


def stream(
    pipe: Any,
    prompts: Sequence[PromptLike],
    *,
    seed: int = 0,
    batch_size: int = 1,
    group: Any = None,
    **call: Any,
) -> Iterator[Result]:
    """Like `generate`, but yields this rank's Results as they are generated; gathers nothing.

    Errors of prompts are in the Results. The only communication is the check that all ranks were
    given the same list, at the first step of the iteration. Between two Results the pipeline is
    in the caller's state, so that training may continue. When a rank fails as a whole, the others
    raise `RankError` at their next batch.
    """
    ranks = Group.borrow(group)
    plan = _plan_on_all_ranks(ranks, lambda: _plan(ranks, pipe, prompts, seed, batch_size, call))
    yield from _run_slice(ranks, pipe, plan, call)


def as_requests(
    prompts: Sequence[PromptLike], seed: int = 0, call_parameters: Collection[str] | None = None
) -> list[Request]:
    """Strings, dicts and Requests → Requests, numbered by their place in the list.

    Args:
        call_parameters: what a dict may set; default: anything.

    Raises:
        UsageError: the list or one of its items is of another type, or its fields are wrong.
    """
    if isinstance(prompts, (str, bytes, Mapping)) or not isinstance(prompts, Sequence):
        raise UsageError(
            f"prompts must be a list of strings, dicts or Requests, got {type(prompts).__name__}"
            + ("; put the one prompt into a list" if isinstance(prompts, (str, Mapping)) else "")
        )
    requests: list[Request] = []
    used: dict[str, int] = {}
    for k, item in enumerate(prompts):
        for request in _expanded(item, f"prompts[{k}]", len(requests), seed, call_parameters):
            if request.id in used:
                raise UsageError(
                    f"prompts[{k}]: id {request.id!r} is already used by "
                    f"prompts[{used[request.id]}]; ids must be unique"
                )
            requests.append(request)
        used.update((request.id, k) for request in requests[len(used) :])
    return requests


def _expanded(
    item: PromptLike, where: str, start: int, seed: int, call_parameters: Collection[str] | None
) -> list[Request]:
    """One item of the list → its Requests, numbered from ``start``."""
    if isinstance(item, Request):
        return [_with_hashes(replace(item, index=start), where)]
    if isinstance(item, str):
        prompt = Prompt({"prompt": item}, where)
    elif isinstance(item, Mapping):
        prompt = prompt_from_fields(item, where, call_parameters=call_parameters)
    else:
        raise UsageError(
            f"{where} is a {type(item).__name__}; expected a string, a dict or a Request"
        )
    requests = []
    for request in resolve_requests([prompt], base_seed=seed + start):
        index = start + request.index
        name = request.id if "id" in prompt.fields else f"{index:08d}"
        requests.append(replace(request, index=index, id=name))
    return requests


def _with_hashes(request: Request, where: str) -> Request:
    """A Request of a program, whose images and objects may not have been hashed."""
    if not request.kwargs:
        return request
    given = {n: v for n, v in request.kwargs.items() if n not in request.input_hashes}
    fields = prompt_from_fields({"prompt": "", **given}, where).fields
    hashes = {**request.input_hashes, **fields.get("input_hashes", {})}
    kwargs = {n: fields.get(n, value) for n, value in request.kwargs.items()}
    return replace(request, kwargs=kwargs, input_hashes=hashes)


@dataclass(frozen=True)
class _Plan:
    """What is equal on all ranks.

    Attributes:
        is_sharded: forwards are collectives (FSDP), so all ranks must run equally many.
        is_shared: forwards combine the ranks' inputs (tensor parallel), so all ranks must run the
            same batches.
        digest: short text that identifies the plan; equal on all ranks.
    """

    requests: Sequence[Request]
    batches: Sequence[range]
    is_sharded: bool
    is_shared: bool
    digest: str


def _plan(
    ranks: Group,
    pipe: Any,
    prompts: Sequence[PromptLike],
    seed: int,
    batch_size: int,
    call: Mapping[str, Any],
    options: str = "",
) -> _Plan:
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise UsageError(f"batch_size={batch_size!r} must be an integer of at least 1")
    if isinstance(seed, bool) or not isinstance(seed, int):
        raise UsageError(f"seed={seed!r} must be an integer")
    for name in call:
        if name in RESERVED_CALL_ARGUMENTS:
            raise UsageError(f"{name}: {RESERVED_CALL_ARGUMENTS[name]}")
    parameters = inspect.signature(pipe.__call__).parameters
    takes_anything = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    allowed = [n for n in parameters if n not in GIVEN_BY_DDINFER]
    is_open = takes_anything and takes_prompt(parameters)
    requests = as_requests(prompts, seed, None if is_open else allowed)
    shared, arguments = split_settings(call)
    given = set(arguments).union(*(r.parameters() for r in requests))
    given |= {"negative_prompt" for r in requests if r.negative_prompt is not None}
    given |= {"prompt" for r in requests if r.prompt}
    check_call(type(pipe).__name__, parameters, given, batch_size)
    if shared or any(request.settings() for request in requests):
        own = vars(pipe).get("scheduler")
        check_settings(type(pipe), own, loras_of(pipe), requests, shared)
    content = hashlib.sha256("".join(map(_content_hash, requests)).encode())
    content.update(canonical_json({n: _plain(value) for n, value in call.items()}).encode())
    digest = f"{len(requests)} requests, {content.hexdigest()[:16]}, batch_size={batch_size}"
    models = sharded_models(pipe)
    is_sharded, is_shared = bool(models), needs_equal_inputs(models)
    digest += (", sharded" if is_sharded else "") + (", tensor parallel" if is_shared else "")
    check_lockstep(pipe, ranks.ranks, requests)
    batches = cut_batches([r.batch_key() for r in requests], batch_size)
    digest = f"{digest}, {options}" if options else digest
    return _Plan(requests, batches, is_sharded, is_shared, digest)


def _content_hash(request: Request) -> str:
    try:
        return request.content_hash()
    except ValueError as error:  # NaN
        raise UsageError(f"prompts[{request.index}] ({request.prompt[:60]!r}): {error}") from None


def _plain(value: Any) -> Any:
    """The value if it can be written as JSON, else its type: a tensor may be on each rank's GPU."""
    try:
        canonical_json(value)
    except (TypeError, ValueError):
        return type(value).__name__
    return value


def _plan_on_all_ranks(ranks: Group, check: Callable[[], _Plan]) -> _Plan:
    """Run ``check`` on every rank and compare the plans; a failure is raised on all ranks."""
    ranks.enter("preparing")
    plan: _Plan | None = None
    failure: Exception | None = None
    try:
        plan = check()
    except Exception as error:  # noqa: BLE001 - sent to every rank, then raised
        failure = error
    digest = None if plan is None else plan.digest
    require_same(ranks, "prompts and arguments", digest, failure)
    assert plan is not None
    return plan


def _run_in_teams(
    ranks: Group,
    pipe: Any,
    plan: _Plan,
    call: Mapping[str, Any],
    cfg_parallel: int,
    sequence_parallel: int,
    group: Any,
) -> list[Result]:
    if plan.is_sharded:
        raise UsageError(
            "a model of the pipeline is sharded over the group's ranks, whose forwards are "
            "exchanges already; leave cfg_parallel and sequence_parallel out"
        )
    batches = [[plan.requests[i] for i in batch] for batch in plan.batches]
    return run_team(ranks, pipe, batches, call, cfg_parallel, sequence_parallel, group)


def _run_slice(ranks: Group, pipe: Any, plan: _Plan, call: Mapping[str, Any]) -> Iterator[Result]:
    share = contiguous_slice(len(plan.batches), ranks.group_size, ranks.group_rank)
    engine: WholeEngine | LockstepEngine = WholeEngine(pipe, rank=ranks.world.rank, call=call)
    turns = [(k, True) for k in share]  # batch, and whether this rank keeps its Results
    if plan.is_sharded:
        engine = LockstepEngine(pipe, ranks, call=call)
        num_surplus = math.ceil(len(plan.batches) / ranks.group_size) - len(share)
        turns += [(len(plan.batches) - 1, False)] * num_surplus  # as many forwards as the others
    if plan.is_shared:
        turns = [(k, k in share) for k in range(len(plan.batches))]
    for k, is_kept in turns:
        batch = [plan.requests[i] for i in plan.batches[k]]
        ranks.check_peers()
        ranks.enter("running", f"prompt {batch[0].index} (id {batch[0].id})")
        results = _run_batch(ranks, engine, batch)
        if is_kept:
            yield from results


def _run_batch(ranks: Group, engine: WholeEngine | LockstepEngine, batch: Batch) -> list[Result]:
    """Run a whole batch, so that the pipeline is restored before a Result is yielded."""
    try:
        with inference_state(engine.pipe, ranks.device):
            return list(engine.run([batch]))
    except BaseException as error:
        first = ranks.report_failure(error)
        if isinstance(error, Exception):
            raise first from error
        raise  # Ctrl-C stays KeyboardInterrupt on this rank; the others get the RankError


def _failure_message(failed: Sequence[Result], num_requests: int) -> str:
    lines = [f"  {r.index} ({r.prompt[:60]!r}): {r.error}" for r in failed[:10]]
    more = f"\n  and {len(failed) - 10} more" if len(failed) > 10 else ""
    return (
        f"{len(failed)} of {num_requests} prompts failed (errors='return' returns the rest):\n"
        + "\n".join(lines)
        + more
    )
