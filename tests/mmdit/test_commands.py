"""The command lines of mmdit, train and bench: one line for each command, messages that help, no tracebacks."""

import subprocess
import sys

import pytest

from mmdit import commands

from ..processes import called

PROGRAMS = ("mmdit", "train", "bench")


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_has_a_line_for_each_command(program):
    from importlib import import_module

    known = import_module(f"{program}.__main__").COMMANDS
    done = called(program)
    assert done.returncode == 0 and done.stdout == called(program, "--help").stdout
    for name, command in known.items():
        first = commands.first_line(command)
        assert 20 < len(first) < 110 and first.endswith("."), name
        assert any(line.split() == [name, *first.split()] for line in done.stdout.splitlines()), name


@pytest.mark.parametrize(
    "words, message",
    [
        (("mmdit", "smaple"), "python -m mmdit has no command 'smaple'; did you mean 'sample'?"),
        (("train", "rnu"), "python -m train has no command 'rnu'; did you mean 'run'?"),
        (("bench", "rofline"), "python -m bench has no command 'rofline'; did you mean 'roofline'?"),
        (("train", "run", "shaeps"), "there is no recipe 'shaeps'; did you mean 'shapes'; `python -m train recipes`"),
        (("train", "study", "scalling"), "there is no study of 'scalling'; did you mean 'scaling'?"),
        (("train", "run", "shapes", "--batchs", "3"), "--batch INT"),
    ],
)
def test_a_mistyped_word_names_the_nearest(words, message):
    done = called(*words)
    assert done.returncode and message in done.stderr and "Traceback" not in done.stderr


def test_what_users_can_mend_is_a_line():
    for error in (ValueError, FileNotFoundError, ImportError):
        def command(arguments, error=error):
            raise error("this is wrong")

        with pytest.raises(SystemExit, match="error: this is wrong"):
            commands.dispatch("p", "", {"c": command}, ["c"])


def test_a_closed_pipe_is_no_traceback():
    """`python -m train recipes | head -1`: whoever read has gone."""
    read = "import sys; sys.stdin.readline(); sys.stdin.close()"
    line = f'{sys.executable} -u -m train recipes | {sys.executable} -c "{read}"; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert "Traceback" not in done.stderr and "BrokenPipe" not in done.stderr, done.stderr
    assert done.stdout.strip() in ("0", "141")


def test_recipes_are_listed_once_each():
    from train.recipes import RECIPES

    lines = called("train", "recipes").stdout.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(RECIPES)
    shapes, d24 = (next(line for line in lines if line.startswith(name)) for name in ("shapes", "d24-256"))
    assert "minutes" in shapes and "2.0B" in d24 and "500,000 steps" in d24
