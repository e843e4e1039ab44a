"""The shape of the package: imports go downward, private names in one place, functions fit on a screen."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import functorch_inverse

PACKAGE = Path(functorch_inverse.__file__).parent
MODULES = sorted(PACKAGE.glob("*.py"))
TREES = {path.stem: ast.parse(path.read_text()) for path in MODULES}
every_module = pytest.mark.parametrize("name", TREES)


def imported(tree):
    """The modules of this package that a module imports, inside functions too, but for type checkers."""
    skipped = {n for node in ast.walk(tree) if _is_type_checking(node) for n in ast.walk(node)}
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.partition(".")[0] == PACKAGE.name)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "imports are absolute here"
            if node.module == PACKAGE.name:
                yield from (f"{node.module}.{a.name}" for a in node.names)
            elif (node.module or "").startswith(PACKAGE.name + "."):
                yield node.module


def _is_type_checking(node):
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)


GRAPH = {name: {m.rpartition(".")[2] for m in imported(tree)} & (TREES.keys() - {"__init__"}) for name, tree in TREES.items()}


def test_the_graph_is_not_empty():
    assert "_torch" in GRAPH["linear_solvers"]
    assert "custom" in GRAPH["__init__"]


def test_no_circles():
    """Repeatedly take away the modules that import nothing of what is left."""
    left = dict(GRAPH)
    while left:
        leaves = [name for name, needs in left.items() if not needs & left.keys()]
        assert leaves, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in leaves}


ENTRY_POINTS = {
    "custom", "layers", "testing", "__main__", "finite_difference", "invert", "inverters", "inverse_module",
}  # fmt: skip


@every_module
def test_private_modules_do_not_import_public_entry_points(name):
    """Downward: what starts with an underscore stands below custom, layers, testing and __main__."""
    if name.startswith("_") and not name.startswith("__"):
        assert not GRAPH[name] & ENTRY_POINTS


@every_module
def test_only_the_root_imports_the_root(name):
    if name != "__main__":
        needed = [m for m in imported(TREES[name]) if m == PACKAGE.name]
        assert not needed, "import the module that has it, not the package"


@pytest.mark.parametrize("name", ["errors", "_torch"])
def test_the_lowest_modules_import_nothing(name):
    assert not GRAPH[name]


# --- private names of torch ------------------------------------------------------------------------


def private_torch_names(tree):
    """Attributes and imports with a leading underscore that hang below `torch` or something imported from it."""
    roots = {"torch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            roots |= {alias.asname or alias.name for alias in node.names}
            for part in (*node.module.split("."), *(alias.name for alias in node.names)):
                if part.startswith("_") and not part.startswith("__"):
                    yield f"from {node.module} import {part}"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "torch" and any(p.startswith("_") for p in parts):
                    yield f"import {alias.name}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            dotted = ast.unparse(node)
            if dotted.partition(".")[0] in roots:
                yield dotted


@every_module
def test_private_names_of_torch_stand_in_one_module(name):
    found = sorted(set(private_torch_names(TREES[name])))
    assert bool(found) == (name == "_torch"), found


# --- size ------------------------------------------------------------------------------------------


def functions(tree):
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def code_lines(function):
    """Lines without the docstring."""
    length = function.end_lineno - function.lineno + 1
    first = function.body[0]
    documented = isinstance(first, ast.Expr) and isinstance(getattr(first, "value", None), ast.Constant)
    return length - (first.end_lineno - first.lineno + 1 if documented else 0)


@every_module
def test_functions_fit_on_a_screen(name):
    long = {f.name: code_lines(f) for f in functions(TREES[name]) if code_lines(f) > 40}
    assert not long


@every_module
def test_modules_are_short(name):
    assert len((PACKAGE / f"{name}.py").read_text().splitlines()) <= 300


@every_module
def test_modules_say_what_they_are_for(name):
    assert ast.get_docstring(TREES[name])


@every_module
def test_everything_is_annotated(name):
    bare = [f.name for f in functions(TREES[name]) if f.returns is None]
    assert not bare


@every_module
def test_nothing_is_left_to_do(name):
    text = (PACKAGE / f"{name}.py").read_text()
    assert not [word for word in ("TODO", "FIXME", "XXX") if word in text]


# --- names -----------------------------------------------------------------------------------------


@every_module
def test_what_is_announced_exists(name):
    if name not in ("__main__", "__init__"):
        module = __import__(f"{PACKAGE.name}.{name}", fromlist=["_"])
        assert all(hasattr(module, public) for public in getattr(module, "__all__", ()))


def test_public_names_are_documented():
    names = [n for n in vars(functorch_inverse) if not n.startswith("_")]
    public = [getattr(functorch_inverse, n) for n in names]
    functions = [p for p in public if callable(p) and p.__module__.startswith(PACKAGE.name)]
    assert functions
    assert not [f.__name__ for f in functions if not (f.__doc__ or "").strip()]


def test_type_information_is_shipped():
    assert (PACKAGE / "py.typed").exists()


LACKING = """
import {module} as module
del module.{name}
try:
    import functorch_inverse
except ImportError as error:
    assert "supports torch >= 2.11" in str(error) and {name!r} in str(error), error
else:
    raise AssertionError("nobody noticed")
"""


@pytest.mark.parametrize(
    "module, name",
    [
        ("torch._C._functorch", "peek_interpreter_stack"),
        ("torch._C._functorch", "CGradInterpreterPtr"),
        ("torch._C._functorch", "get_single_level_autograd_function_allowed"),
        ("torch._functorch.eager_transforms", "JVP_NESTING"),
        ("torch._C", "_len_torch_dispatch_stack"),
    ],
)
def test_a_torch_that_lacks_a_private_name_is_told_of(module, name):
    """A new version breaks in one place, and says so."""
    done = subprocess.run([sys.executable, "-c", LACKING.format(module=module, name=name)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
