"""The import rule of docs/architecture.md, held against the source and running processes."""

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ddinfer"
FILES = sorted(PACKAGE.rglob("*.py"))

#: Module or package → what it may import of ours. A package may always import itself.
VALUES = {"errors", "_version"}
MAY_IMPORT = {
    "errors": set(),
    "_version": set(),
    "patched": set(),
    "request": {"errors"},
    "config": {"errors", "request"},
    "inputs": {"errors", "request"},
    "prompts": {"errors", "request", "inputs"},
    "storage": VALUES | {"request", "config"},
    "distributed": VALUES | {"request", "config"},
    "models": VALUES | {"request", "config", "tiny"},
    "tiny": VALUES | {"request"},
    "parallel": VALUES | {"patched", "request", "distributed", "models"},
    "engines": VALUES
    | {"patched", "request", "inputs", "config", "distributed", "models", "parallel"},
    "report": VALUES | {"request", "inputs", "storage", "distributed"},
    "job": None,
    "embed": None,
    "cli": None,
    "main": {"cli"},
    "__main__": {"main"},
    "__init__": None,
}
#: What None (anything below) must still not reach up to.
NEVER = {
    "job": {"cli", "main", "embed", "report"},
    "embed": {"cli", "main", "job", "storage", "report"},
}
DIFFUSION = {"models", "parallel", "engines", "tiny"}


def imports(path):
    """(module, line, is inside a function) for every import statement."""
    tree = ast.parse(path.read_text(encoding="utf-8"))

    def visit(node, inside):
        for child in ast.iter_child_nodes(node):
            deeper = inside or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef))
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.dump(child.test):
                continue
            if isinstance(child, ast.Import):
                for alias in child.names:
                    yield alias.name, child.lineno, deeper
            elif isinstance(child, ast.ImportFrom):
                package = path.relative_to(ROOT).parts[: -child.level or None]
                module = ".".join((*package, child.module or "")) if child.level else child.module
                yield module, child.lineno, deeper
            yield from visit(child, deeper)

    yield from visit(tree, False)


def home(path):
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_imports_upward(path):
    me = home(path)
    assert me in MAY_IMPORT, f"{me} has no place in the import rule yet"
    allowed, never = MAY_IMPORT[me], NEVER.get(me, set())
    for module, line, _ in imports(path):
        parts = module.split(".")
        if parts[0] != "ddinfer":
            continue
        other = parts[1] if len(parts) > 1 else "__init__"
        if other == me:
            continue
        if other == "__init__":
            other = "_version"
        assert other not in never, f"{path}:{line} imports {module}"
        assert allowed is None or other in allowed, f"{path}:{line} imports {module}"


def module_name(path):
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def imported_modules(path):
    """Modules of ours that a file imports, at its top or late."""
    known = {module_name(file) for file in FILES}
    tree = ast.parse(path.read_text(encoding="utf-8"))
    below = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module
        for alias in node.names
    }
    named = {module for module, _, _ in imports(path)}
    return (named | {name for name in below if name.rpartition(".")[0] in named}) & known


def cycle_in(graph):
    """Names that import one another in a circle, or ``None``."""
    finished, active = set(), []

    def visit(name):
        if name in active:
            return [*active[active.index(name) :], name]
        if name in finished:
            return None
        active.append(name)
        found = next(filter(None, map(visit, sorted(graph.get(name, ())))), None)
        active.pop()
        finished.add(name)
        return found

    return next(filter(None, map(visit, sorted(graph))), None)


def test_a_cycle_is_found():
    assert cycle_in({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]
    assert cycle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) is None


def test_no_modules_import_one_another_not_even_inside_a_package():
    graph = {}
    for path in FILES:
        name = module_name(path)
        # A package's __init__ re-exports; importing any module of the package runs it anyway.
        if path.name != "__init__.py":
            graph[name] = imported_modules(path) - {name}
    assert cycle_in(graph) is None


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_diffusers_is_touched_late_and_by_few_and_accelerate_by_none(path):
    for module, line, inside_function in imports(path):
        library = module.split(".")[0]
        assert library != "accelerate", f"{path}:{line}"
        if library in ("diffusers", "transformers"):
            assert home(path) in DIFFUSION, f"{path}:{line} imports {module}"
            assert inside_function, f"{path}:{line} imports {module} at its top"
        if library == "torch":
            assert home(path) not in ("storage", "config", "request", "prompts", "report"), (
                f"{path}:{line}"
            )


def run_python(code):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=120,
        check=True,
    ).stdout


def test_help_imports_neither_torch_nor_diffusers():
    code = (
        "import sys\nfrom ddinfer.main import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "print([m for m in ('torch', 'diffusers', 'transformers', 'numpy') if m in sys.modules])"
    )
    assert run_python(code).endswith("[]\n")


def test_import_of_ddinfer_is_late():
    code = "import sys, ddinfer; print([m for m in ('torch', 'numpy', 'yaml') if m in sys.modules])"
    assert run_python(code) == "[]\n"


def test_every_public_name_is_there():
    import ddinfer

    for name in ddinfer.__all__:
        assert getattr(ddinfer, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'generat'"):
        ddinfer.generat  # noqa: B018


def test_accelerate_is_not_installed_here():
    assert importlib.util.find_spec("accelerate") is None
