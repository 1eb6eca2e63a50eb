"""Processes for tests, forked from one per worker that has imported torch and the project: a start costs milliseconds
in place of seconds. What is read at import (RFKERNELS_BACKEND, TRITON_INTERPRET) is as in the tests themselves."""

import multiprocessing
import multiprocessing.connection
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# torch._dynamo is imported by the first optimizer; the others by a run that draws and logs.
IMPORTED = ["torch", "torch._dynamo", "train.__main__", "train.engine.loop", "train.data.precompute",
            "mmdit.__main__", "bench.__main__", "matplotlib.pyplot", "torch.utils.tensorboard",
            "torch.distributed.checkpoint"]  # fmt: skip
_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(IMPORTED)


class Started:
    """Processes that belong together, one or the ranks of a run: if one fails, the others are ended, as by torchrun."""

    def __init__(self, target, *arguments, environments=({},), folder=None):
        self.output = Path(tempfile.mkstemp(suffix=".txt")[1])
        outputs = str(self.output), str(self.output.with_suffix(".err"))
        where = folder or os.getcwd()
        self.processes = [
            _forks.Process(target=_begin, args=(target, arguments, {**os.environ, **more}, where, outputs))
            for more in environments
        ]
        for process in self.processes:
            process.start()

    @property
    def pids(self):
        return [process.pid for process in self.processes]

    @property
    def returncode(self):
        """None while one runs; else the first that is not 0."""
        codes = [process.exitcode for process in self.processes]
        return next((code for code in codes if code), None if None in codes else 0)

    def poll(self):
        return self.returncode

    def wait(self, timeout=240):
        """The exit code. Raises: TimeoutExpired, with all of them ended."""
        until = time.monotonic() + timeout
        while any(process.is_alive() for process in self.processes):
            late = time.monotonic() > until
            if late or self.returncode:
                time.sleep(0 if late else 1)                         # the others may have an error of their own to tell
                for process in self.processes:
                    process.kill()
            multiprocessing.connection.wait([p.sentinel for p in self.processes if p.is_alive()], timeout=0.05)
            if late:
                raise subprocess.TimeoutExpired("processes of a test", timeout, self.printed())
        return self.returncode

    def printed(self):
        """(standard output, standard error) so far."""
        paths = self.output, self.output.with_suffix(".err")
        return tuple(path.read_text(errors="replace") if path.exists() else "" for path in paths)


def _begin(target, arguments, environment, folder, outputs):
    os.setsid()
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    for number, path in zip((1, 2), outputs, strict=True):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
    target(*arguments)


def module(words):
    """`python -m words`."""
    sys.argv = list(words)
    sys.modules.pop(f"{words[0]}.__main__", None)                        # runpy warns of what was imported before
    runpy.run_module(words[0], run_name="__main__", alter_sys=True)


def _script(text, words):
    sys.argv = ["script.py", *words]
    exec(compile(text, "script.py", "exec"), {"__name__": "__main__"})


def start(*words, folder=None, **environment):
    """`python -m words`, begun."""
    return Started(module, [str(word) for word in words], environments=[environment], folder=folder)


def called(*words, folder=None, timeout=240, **environment):
    """`python -m words`, ended. Returns: as subprocess.run."""
    process = start(*words, folder=folder, **environment)
    code = process.wait(timeout)
    return subprocess.CompletedProcess(words, code, *process.printed())


def ranks(target, arguments, processes):
    """A script with these words, or a function with these arguments, on the ranks of a distributed run, begun."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    same = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(processes), "OMP_NUM_THREADS": "1"}
    each = [{**same, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]
    if isinstance(target, str):
        target, arguments = _script, (target, [str(word) for word in arguments])
    return Started(target, *arguments, environments=each)
