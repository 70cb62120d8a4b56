"""``--setup FILE.py:FUNCTION``: a function of the user's that changes the loaded pipeline.

The file runs only where the command line names it; no file of a job or a model can.
"""

from __future__ import annotations

import ast
import hashlib
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddinfer.errors import UsageError

if TYPE_CHECKING:
    import torch

_MODULE = "ddinfer_setup"


def setup_identity(option: str | None) -> dict[str, str] | None:
    """The function and the SHA-256 of its file, which is read and does not run.

    Raises:
        UsageError: no such file, or no such function in it.
    """
    if option is None:
        return None
    path, name, source = _read(option)
    try:
        tree = ast.parse(source, path)
    except (SyntaxError, ValueError) as error:
        raise UsageError(f"--setup {option}: not Python: {error}") from None
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    if name not in functions:
        raise UsageError(
            f"--setup {option}: {path} has no function {name}; it has "
            f"{', '.join(functions) or 'none'}"
        )
    return {"function": name, "sha256": hashlib.sha256(source).hexdigest()}


def setup_function(option: str | None) -> Callable[[Any], None] | None:
    """What to call with the pipeline; running it runs the file.

    Raises:
        UsageError: the file or the function fails; says how.
    """
    if option is None:
        return None
    path, name, source = _read(option)

    def set_up(pipe: Any) -> None:
        module = types.ModuleType(_MODULE)
        module.__file__ = path
        sys.modules[_MODULE] = module
        try:
            exec(compile(source, path, "exec"), vars(module))
            vars(module)[name](pipe)
        except Exception as error:
            raise UsageError(f"--setup {option}: {type(error).__name__}: {error}") from error

    return set_up


def set_up_leader(pipe: Any, denoisers: Mapping[str, torch.nn.Module], option: str | None) -> None:
    """Set up a pipeline whose denoisers other ranks hold, too.

    Raises:
        UsageError: the function changed a denoiser, which those ranks would not see.
    """
    set_up = setup_function(option)
    if set_up is None:
        return
    before = {name: dict(_parts(model)) for name, model in denoisers.items()}
    set_up(pipe)
    for name in denoisers:
        after = dict(_parts(pipe.components.get(name)))
        changed = [
            key for key in {**before[name], **after} if before[name].get(key) != after.get(key)
        ]
        if changed:
            raise UsageError(
                f"--setup {option} changed the {name} ({changed[0]}), which several ranks run; "
                "leave --pipeline_parallel, --cfg_parallel and --sequence_parallel out"
            )


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    """What a model is made of, by name; equal as long as nothing was changed."""
    for path, module in model.named_modules() if model is not None else ():
        others = {k: id(v) for k, v in vars(module).items() if not k.startswith("_")}
        hooks = (len(module._forward_hooks), len(module._forward_pre_hooks))
        yield path or type(module).__name__, (id(module), type(module), others, hooks)
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield f"{path}.{name}", (id(tensor), tensor._version)


def _read(option: str) -> tuple[str, str, bytes]:
    """→ (path, function, the file's bytes)."""
    path, _, name = option.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise UsageError(f"--setup {option}: expected FILE.py:FUNCTION")
    try:
        return path, name, Path(path).read_bytes()
    except OSError as error:
        raise UsageError(f"--setup {option}: {error.strerror}") from None
