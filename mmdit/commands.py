"""Command lines that look and behave alike: python -m mmdit, train and bench."""

from __future__ import annotations

import difflib
import os
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch

TRACEBACK = "RFKERNELS_TRACEBACK"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Dtype = Literal["float32", "bfloat16", "float16"]
"""As flags name them."""
Command = Callable[[list[str]], Any]
"""Takes the arguments after its name. The first line of its docstring stands in the help of its parent."""


def dispatch(prog: str, about: str, commands: Mapping[str, Command], arguments: Sequence[str] | None = None) -> None:
    """Runs a command by name, and ends the process as users expect: a line instead of a traceback for what they can
    mend, silence where nobody reads any more (`| head`), status 130 after Ctrl-C."""
    name, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    if name in ("-h", "--help"):
        print(overview(prog, about, commands))
        return
    if name not in commands:
        sys.exit(f"error: {prog} has no command {name!r}{nearest(name, commands)}\n\n{overview(prog, about, commands)}")
    try:
        commands[name](rest)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except (OSError, ValueError, ImportError) as error:
        sys.exit(f"error: {error}")
    except Exception as error:
        if os.environ.get(TRACEBACK) == "1":
            raise
        sys.exit(f"error: {type(error).__name__}: {error} ({TRACEBACK}=1 shows where)")
    except KeyboardInterrupt as interrupt:
        print(f"stopped{f': {interrupt}' if interrupt.args else ''}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def overview(prog: str, about: str, commands: Mapping[str, Command]) -> str:
    """The help of a parent: a line for each of its commands."""
    width = max(map(len, commands))
    lines = [f"  {name:{width}s}  {first_line(command)}" for name, command in commands.items()]
    usage = [f"usage: {prog} COMMAND ...", "", about, "", "commands:", *lines, ""]
    return "\n".join([*usage, f"{prog} COMMAND --help lists the flags of a command."])


def first_line(what: object) -> str:
    return (what.__doc__ or "").strip().split("\n")[0]


def nearest(word: str, known: Iterable[str]) -> str:
    """What may have been meant, to end a message with."""
    found = difflib.get_close_matches(word, list(known), 1, 0.5)
    return f"; did you mean {found[0]!r}?" if found else ""


def flags(function: Callable[..., Any], prog: str) -> Command:
    """A function as a command: its arguments are flags, its docstring is the help."""

    def command(arguments: list[str]) -> Any:
        try:
            import tyro
        except ImportError:
            sys.exit(f"error: {prog} needs tyro: pip install 'rfkernels-mmdit[cli]'")
        return tyro.cli(function, prog=prog, args=arguments)

    command.__doc__ = function.__doc__
    return command
