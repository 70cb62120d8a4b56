"""Another scheduler for a pipeline's call: ``CLASS`` or ``CLASS:{json}``, from the pipeline's own.

Each call has a new one, so that no image sees what another left behind.
"""

from __future__ import annotations

import ast
import difflib
import inspect
import json
import textwrap
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from ddinfer.errors import UsageError


@contextmanager
def scheduler_set(pipe: Any, text: str | None) -> Iterator[None]:
    """Inside, ``pipe.scheduler`` is a new one of the class and settings in ``text``."""
    if text is None:
        yield
        return
    # Not by setattr: a pipeline's setattr writes into its config, which copies share.
    own = vars(pipe)["scheduler"]
    vars(pipe)["scheduler"] = _scheduler(own, text)
    try:
        yield
    finally:
        vars(pipe)["scheduler"] = own


def check_scheduler(kind: type, own: Any, text: str, arguments: Collection[str]) -> None:
    """Check that a pipeline can run with another scheduler.

    Args:
        kind: the pipeline's class, whose source says what it asks of its scheduler.
        own: the scheduler that the pipeline was saved with.
        arguments: names of the call arguments that prompts set.

    Raises:
        UsageError: no such class or setting, or it lacks what the pipeline uses.
    """
    if own is None:
        raise UsageError(f"scheduler {text}: {kind.__name__} has no component called scheduler")
    name, settings = _parse(text)
    takes = inspect.signature(_class(name).__init__).parameters
    unknown = sorted(set(settings) - set(takes))
    if unknown:
        settings_there = ", ".join(n for n in takes if n not in ("self", "kwargs"))
        raise UsageError(
            f"scheduler {text}: {name} has no setting {unknown[0]}; it has {settings_there}"
        )
    try:
        new = _scheduler(own, text)
    except (ValueError, TypeError, NotImplementedError, ImportError) as error:
        raise UsageError(f"scheduler {text}: {' '.join(str(error).split())}") from None
    attributes, given = _use_of_scheduler(kind)
    missing = sorted(a for a in attributes if hasattr(own, a) and not hasattr(new, a))
    if missing:
        raise UsageError(
            f"scheduler {text}: {kind.__name__} uses its scheduler's {', '.join(missing)}, which "
            f"{name} does not have; use one like its own {type(own).__name__}"
        )
    accepted = inspect.signature(new.set_timesteps).parameters
    accepts_all = any(p.kind is p.VAR_KEYWORD for p in accepted.values())
    needed = given | ({"sigmas", "timesteps"} & set(arguments))
    refused = sorted(needed - set(accepted)) if not accepts_all else []
    if refused:
        raise UsageError(
            f"scheduler {text}: {kind.__name__} calls set_timesteps with {', '.join(refused)}, "
            f"which {name} does not take; use one like its own {type(own).__name__}"
        )
    steps = inspect.signature(new.step).parameters
    wanted = sorted(
        n
        for n, p in steps.items()
        if p.default is p.empty and n not in inspect.signature(own.step).parameters
    )
    if wanted:
        raise UsageError(
            f"scheduler {text}: a step of {name} needs {', '.join(wanted)}, which {kind.__name__} "
            f"does not give; use one like its own {type(own).__name__}"
        )
    if _is_flow(own) != _is_flow(new):
        trained = "with" if _is_flow(own) else "without"
        hint = ' (or {"use_flow_sigmas": true})' if "use_flow_sigmas" in takes else ""
        raise UsageError(
            f"scheduler {text}: the model was trained {trained} flow matching, which {name} is "
            f"not for{hint}; use one like its own {type(own).__name__}"
        )


def _parse(text: str) -> tuple[str, dict[str, Any]]:
    settings: Any = {}
    _, colon, rest = text.partition(":")
    if colon:
        try:
            settings = json.loads(rest)
        except json.JSONDecodeError as error:
            raise UsageError(f"scheduler {text}: not JSON after the colon: {error}") from None
    if not isinstance(settings, dict):
        raise UsageError(f'scheduler {text}: expected an object such as CLASS:{{"shift": 3.0}}')
    return text.partition(":")[0].strip(), settings


def _class(name: str) -> Any:
    """
    Raises:
        UsageError: diffusers has no such scheduler here; suggests one.
    """
    import diffusers

    found = getattr(diffusers, name, None)
    if isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin):
        return found
    if missing := getattr(found, "_backends", None):
        raise UsageError(f"scheduler {name} needs a package that is not here: {', '.join(missing)}")
    known = [n for n in dir(diffusers) if n.endswith("Scheduler") and not n.startswith("Flax")]
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    hint = f"; did you mean {close[0]}?" if close else ""
    raise UsageError(
        f"scheduler {name} is not a scheduler of diffusers {diffusers.__version__}{hint}"
    )


def _scheduler(own: Any, text: str) -> Any:
    name, settings = _parse(text)
    return _class(name).from_config(own.config, **settings)


def _is_flow(scheduler: Any) -> bool:
    config = scheduler.config
    return (
        "FlowMatch" in type(scheduler).__name__
        or bool(config.get("use_flow_sigmas"))
        or config.get("prediction_type") in ("flow_prediction", "trigflow")
    )


def _use_of_scheduler(kind: type) -> tuple[set[str], set[str]]:
    """What a pipeline's code asks of ``self.scheduler``.

    Returns:
        The attributes that it uses without asking whether they are there, and the arguments
        that every call gives `set_timesteps`.
    """
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError):
        return set(), set()
    used, asked, given = set(), set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and _is_own_scheduler(node.value):
            used.add(node.attr)
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        if called in ("hasattr", "getattr") and _is_own_scheduler(node.args[0]):
            asked.add(ast.unparse(node.args[1]).strip("'"))
        if called in ("retrieve_timesteps", "self.scheduler.set_timesteps"):
            given |= {word.arg for word in node.keywords if word.arg and not _is_none(word.value)}
    assigned = {
        target.id
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    optional = {name for name in ("sigmas", "timesteps") if name not in assigned}
    given -= optional | {"scheduler", "num_inference_steps", "device", "timesteps"}
    return used - asked, given


def _is_own_scheduler(node: ast.expr) -> bool:
    return ast.unparse(node) == "self.scheduler"


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None
