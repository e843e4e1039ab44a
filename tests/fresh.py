"""Tests in a process of their own: a trace that fails leaves torch.func in disorder for everything after it."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

CODE = "import sys; sys.path.insert(0, {path!r}); import {module}; {module}.{name}(*{arguments!r})"


def run_fresh(function: Callable[..., None], *arguments: object) -> None:
    """Call a function of a test module in a new process; its arguments are literals."""
    path, module, name = str(Path(__file__).parent), function.__module__, function.__name__
    code = CODE.format(path=path, module=module, name=name, arguments=arguments)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
