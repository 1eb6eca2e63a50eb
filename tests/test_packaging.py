"""What is installed: wheels of both distributions, in an environment that has PyTorch and nothing of a checkout."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import rfkernels

ROOT = Path(__file__).parent.parent
pytest.importorskip("hatchling", reason="hatchling builds the distributions; it comes with the extra dev")


def built(folder, out):
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=folder, check=True, capture_output=True)


@pytest.fixture(scope="module")
def distributions(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    for folder in (ROOT, ROOT / "mmdit"):
        built(folder, out)
    return out


@pytest.fixture(scope="module")
def environment(distributions, tmp_path_factory):
    """An empty environment with both wheels; PyTorch and what it needs are found where they are."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    for wheel in distributions.glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(site)
    (site / "torch.pth").write_text(str(Path(torch.__file__).parents[1]) + "\n")
    return folder / "bin/python", site


def run(python, code, **more):
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "TRITON_INTERPRET")}
    return subprocess.run([str(python), "-c", code], capture_output=True, text=True, cwd="/", env=clean, **more)


def test_versions_are_one():
    model = tomllib.loads((ROOT / "mmdit/pyproject.toml").read_text())["project"]
    assert model["version"] == rfkernels.__version__ and f"rfkernels=={rfkernels.__version__}" in model["dependencies"]
    assert f"version: {rfkernels.__version__}" in (ROOT / "CITATION.cff").read_text()


def test_each_wheel_holds_its_package_alone(distributions):
    names = {w.name.split("-")[0]: set(zipfile.ZipFile(w).namelist()) for w in distributions.glob("*.whl")}
    assert names.keys() == {"rfkernels", "rfkernels_mmdit"}
    for name, package in (("rfkernels", "rfkernels"), ("rfkernels_mmdit", "mmdit")):
        assert {n.split("/")[0] for n in names[name] if ".dist-info" not in n} == {package}
        assert f"{package}/py.typed" in names[name]
    assert {"rfkernels/csrc/ops/autograd.cpp", "rfkernels/csrc/cuda/kernels.cu"} <= names["rfkernels"]
    assert "rfkernels/inspect/tables/cuda-13.0.json" in names["rfkernels"]
    assert len(list(distributions.glob("*.tar.gz"))) == 2


def test_the_ops_need_torch_numpy_and_safetensors_only(distributions):
    (wheel,) = distributions.glob("rfkernels-*.whl")
    archive = zipfile.ZipFile(wheel)
    (metadata,) = (archive.read(n).decode() for n in archive.namelist() if n.endswith("METADATA"))
    needed = [line.split()[1] for line in metadata.splitlines() if re.match(r"Requires-Dist:(?!.*extra ==)", line)]
    assert {re.split(r"[<>=]", n)[0] for n in needed} == {"torch", "numpy", "safetensors"}


def test_installed_ops_and_model_run(environment):
    python, site = environment
    code = (
        "import torch, rfkernels, mmdit; x = torch.randn(1, 4, 64); print(rfkernels.__file__, mmdit.__file__);"
        "rfkernels.adaln(x, x[:, 0], x[:, 1]); mmdit.MMDiT(mmdit.presets.tiny())"
    )
    done = run(python, code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(site / f"{name}/__init__.py") for name in ("rfkernels", "mmdit")]


def test_a_command_names_the_extra_that_it_needs(environment):
    python, _ = environment
    for module, extra in (("mmdit", "rfkernels-mmdit[cli]"), ("rfkernels.inspect", "rfkernels[cli]")):
        code = f"import sys, runpy; sys.modules['tyro'] = None; runpy.run_module('{module}', run_name='__main__')"
        done = run(python, code)
        assert done.returncode == 1 and f"pip install '{extra}'" in done.stderr, done.stderr


def test_the_other_mmdit_is_an_error_that_says_what_to_do(environment):
    python, site = environment
    other = site / "mmdit-0.3.0.dist-info"
    other.mkdir()
    try:
        done = run(python, "import mmdit")
    finally:
        other.rmdir()
    assert "mmdit-0.3.0 is installed beside rfkernels-mmdit" in done.stderr and "pip uninstall mmdit" in done.stderr
