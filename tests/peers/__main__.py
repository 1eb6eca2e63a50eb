"""diffusers' own tests, with and without the patch at every model's construction:

    python -m tests.peers --diffusers PATH                  # a checkout of its repository; about an hour on two cores
    python -m tests.peers --diffusers PATH --only models    # models, lora or pipelines

They need what diffusers' tests import: pip install parameterized requests-mock.

Tests have to come out the same both ways; which do not is said, and the exit status is 1. Its code is that of the
checkout. Not part of CI: it needs a repository that is not ours.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as xml
from collections import Counter
from pathlib import Path

FILES = {
    "models": [f"tests/models/transformers/test_models_transformer_{name}.py" for name in ("sd3", "flux", "qwenimage")],
    "lora": [f"tests/lora/test_lora_layers_{name}.py" for name in ("sd3", "flux", "qwenimage")],
    "pipelines": ["tests/pipelines/stable_diffusion_3", "tests/pipelines/flux", "tests/pipelines/qwenimage"],
}


def outcomes(checkout: Path, files: list[str], patched: bool, processes: int) -> dict[str, str]:
    """passed, failed or skipped, by test. Ends the program if a file of tests cannot be collected, for want of a
    package, say: it would fail both ways, and so come out the same."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        shutil.copy(Path(__file__).with_name("plugin.py"), Path(folder) / "rfkernels_peers.py")
        environment["PYTHONPATH"] = os.pathsep.join(map(str, (checkout / "src", folder, Path(__file__).parents[2])))
        environment["PYTHONPATH"] += os.pathsep + os.environ.get("PYTHONPATH", "")
        plugin = ["-p", "rfkernels_peers"] if patched else []                 # `tests` is the checkout's own there
        subprocess.run(
            [sys.executable, "-W", "ignore", "-m", "pytest", "-q", "-n", str(processes), "-p", "no:benchmark",
             "--rootdir", str(checkout), "--junit-xml", str(report), *plugin, *files],
            cwd=checkout, env=environment, check=False,
        )  # fmt: skip
        if not report.is_file():
            sys.exit(f"error: pytest wrote no report in {checkout}; what it said is above")
        found = {}
        for case in xml.parse(report).iter("testcase"):
            for child in case:
                if child.get("message") == "collection failure":
                    why = (child.text or "").strip().splitlines()[-1].removeprefix("E").strip()
                    sys.exit(f"error: {case.get('name')} cannot be collected: {why}")
            kinds = {child.tag for child in case}
            how = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
            found[f"{case.get('classname')}::{case.get('name')}"] = how
    return found


def told(found: dict[str, str]) -> str:
    return ", ".join(f"{count} {how}" for how, count in sorted(Counter(found.values()).items()))


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.peers", description=__doc__.splitlines()[0])
    parser.add_argument("--diffusers", type=Path, required=True, help="a checkout of its repository")
    parser.add_argument("--only", choices=FILES, action="append", help="models, lora or pipelines (all)")
    parser.add_argument("--processes", type=int, default=2)
    given = parser.parse_args()
    if not (given.diffusers / "src" / "diffusers").is_dir():
        sys.exit(f"error: {given.diffusers} is no checkout of diffusers: it has no src/diffusers")
    different = 0
    for part in given.only or FILES:
        plain, patched = (outcomes(given.diffusers, FILES[part], way, given.processes) for way in (False, True))
        print(f"{part}: {told(plain)} without the patch; {told(patched)} with it")
        if not any(how == "passed" for how in plain.values()):
            sys.exit(f"error: no test of {part} passes without the patch: does the checkout have what its tests need?")
        for test in sorted(plain.keys() | patched.keys()):
            if plain.get(test) != patched.get(test):
                different += 1
                print(f"  {test}: {plain.get(test)} without, {patched.get(test)} with it")
    return int(different > 0)


if __name__ == "__main__":
    sys.exit(main())
