"""GPUs where there are none: real tensors that refuse what CUDA would refuse (device.cpp).

`build` compiles it, `register` makes ``privateuseone:0`` and ``:1`` devices of this process, for
its whole life. So tests that use them run in processes of their own.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import torch

FIRST, SECOND = "privateuseone:0", "privateuseone:1"
COMPILER = shutil.which(os.environ.get("CXX", "g++")) if sys.platform == "linux" else None
SOURCE = Path(__file__).with_name("device.cpp")


def build(folder: Path) -> Path:
    """Compile the devices for this torch, in ten seconds → a shared library."""
    assert COMPILER is not None
    torch_folder = Path(torch.__file__).parent
    library = folder / "pretended_gpu.so"
    include = torch_folder / "include"
    command = [
        COMPILER, "-O1", "-shared", "-fPIC", "-std=c++20", "-o", library, SOURCE,
        f"-I{include}", f"-I{include}/torch/csrc/api/include",
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-L{torch_folder}/lib", "-ltorch", "-ltorch_cpu", "-lc10",
    ]  # fmt: skip
    subprocess.run(command, check=True)
    return library


def register(library: Path | str) -> None:
    torch.ops.load_library(library)
    module = types.ModuleType("privateuseone")
    vars(module).update(
        is_available=lambda: True,
        device_count=lambda: 2,
        current_device=lambda: 0,
        manual_seed_all=lambda seed: None,
        empty_cache=lambda: None,
        _is_in_bad_fork=lambda: False,
    )
    torch._register_device_module("privateuseone", module)
