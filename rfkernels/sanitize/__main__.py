"""Runs a script or a module with every Triton kernel in the sanitizer:

    python -m rfkernels.sanitize SCRIPT.py [ARGUMENTS]
    python -m rfkernels.sanitize -m MODULE [ARGUMENTS]          # -m pytest: each test with a finding fails

Prints what was looked at and found; exits with 1 if an error was. Kernels run on the CPU: slow, so give small sizes.
"""

from __future__ import annotations

import os
import runpy
import sys


def main(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    if os.environ.get("TRITON_INTERPRET") != "1":                     # must be set before Triton is imported
        os.environ["TRITON_INTERPRET"] = "1"
        os.execv(sys.executable, [sys.executable, "-m", "rfkernels.sanitize", *arguments])
    if arguments[:2] == ["-m", "pytest"]:
        import pytest

        return int(pytest.main(["-p", "rfkernels.sanitize.plugin", *arguments[2:]]))
    from rfkernels.sanitize import install, watch

    install()
    code = 0
    try:
        if arguments[0] == "-m":
            if len(arguments) < 2:
                print("error: -m needs the name of a module", file=sys.stderr)
                return 2
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = arguments, os.path.dirname(os.path.abspath(arguments[0]))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        print(watch.table())
    return code or int(bool(watch.errors))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
