"""Every code block of the README runs, in order, as a newcomer would paste it."""

import pathlib
import re

import functorch_inverse

README = pathlib.Path(__file__).parents[1] / "README.md"


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", README.read_text(), re.MULTILINE | re.DOTALL)


def test_every_block_runs():
    space = {}
    assert len(blocks("python")) >= 9
    for number, code in enumerate(blocks("python")):
        exec(compile(code, f"README block {number}", "exec"), space)


def test_every_block_checks_itself():
    assert [code for code in blocks("python") if "assert" not in code] == []


def test_two_commands_do_all_the_set_up():
    commands = "".join(blocks("sh")).splitlines()
    assert len(commands) == 2
    assert all(command.startswith("python3 -m venv") for command in commands)


def test_names_exist():
    names = set(re.findall(r"\bfi\.(\w+)", README.read_text()))
    assert names
    assert [name for name in names if not hasattr(functorch_inverse, name)] == []
