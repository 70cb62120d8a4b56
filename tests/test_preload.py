"""Importing for ranks: what is done beside it, in a fresh interpreter each."""

import subprocess
import sys

import pytest

from tests.test_cli import ROOT


def said_by(code):
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_transformers_loads_no_library_while_torchs_are_linked():
    said = said_by("""
import importlib, sys
from importlib.machinery import ExtensionFileLoader
from ddinfer.cli.run import PRELOAD

for name in PRELOAD[: PRELOAD.index("torch") - 1]:
    importlib.import_module(name)
load, loaded = ExtensionFileLoader.create_module, []
ExtensionFileLoader.create_module = lambda self, spec: loaded.append(spec.name) or load(self, spec)
import transformers

assert "torch" not in sys.modules
print(loaded)
""")
    assert said == "[]\n"


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux links beside an import")
def test_torchs_libraries_are_there_before_torch_is_imported():
    said = said_by("""
import sys
import ddinfer.distributed.preload as preloading

def is_linked():
    return any("/libtorch_cpu.so" in line for line in open("/proc/self/maps"))

def watched(names, imported=preloading._import):
    seen[names] = is_linked(), "torch" in sys.modules
    imported(names)

seen = {}
preloading._import = watched
preloading.import_for_good(
    ("json", "fractions", "torch"), before_torch=lambda: seen.update(first=is_linked())
)
assert seen.pop("first") is False
assert seen.pop(("fractions",))[1] is False  # the thread has begun
print(seen, sys.modules["torch"].ones(2).sum())
""")
    assert said == "{('json',): (False, False), ('torch',): (True, False)} tensor(2.)\n"
