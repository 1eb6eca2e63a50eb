"""The ops as a kernel of Hugging Face's package `kernels`."""

import json
import os
import subprocess
import sys

import pytest

from rfkernels import hub

pytest.importorskip("kernels", reason="the package kernels is not installed")

LOADED = """
import sys
from pathlib import Path
import kernels, torch

folder = Path(sys.argv[1])
ops = kernels.get_local_kernel(folder)
assert "rfkernels" not in sys.modules and ops.__name__.startswith("_rfkernels_")

def run(package, how):
    torch.manual_seed(0)
    x = torch.randn(2, 5, 64, requires_grad=True)
    scale, shift, gate = (torch.randn(2, 64, requires_grad=True) for _ in range(3))
    q, k = (torch.randn(2, 5, 2, 32, requires_grad=True) for _ in "qk")
    weights = [torch.rand(32).requires_grad_() for _ in "qk"]
    with package.backend(how):
        y = package.adaln(x, shift, scale)
        h = package.gated_residual(x, y, gate)
        q2, k2 = package.qk_norm(q, k, *weights)
        out = package.joint_attention([package.Stream(q2, k2, q)])[0]
        (h.square().sum() + out.square().sum()).backward()
    return [t.detach() for t in (y, h, out)] + [t.grad for t in (x, scale, shift, gate, q, k, *weights)]

def defined(x, scale, shift):
    wide = x.double()
    normed = (wide - wide.mean(-1, keepdim=True)) / (wide.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return normed * (1 + scale.double()[:, None]) + shift.double()[:, None]

torch.manual_seed(0)
x, scale, shift = torch.randn(2, 5, 64), torch.randn(2, 64), torch.randn(2, 64)
for how in ("triton", "reference"):
    with ops.backend(how):
        torch.testing.assert_close(ops.adaln(x, shift, scale).double(), defined(x, scale, shift), rtol=1e-5, atol=1e-5)
import rfkernels                                                            # beside the package itself, in one process
for ours, theirs in zip(run(ops, "triton"), run(rfkernels, "reference"), strict=True):
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
compiled = torch.compile(lambda x: ops.adaln(x, shift, scale).sum(), backend="eager", fullgraph=True)
torch.testing.assert_close(compiled(x), ops.adaln(x, shift, scale).sum())
assert "of a copy under another name" in ops.explain("adaln", x, shift, scale)
print("right")
"""


def test_it_is_loaded_and_runs_forward_and_backward(tmp_path):
    """In Triton's interpreter, beside the package itself."""
    subprocess.run([sys.executable, "-m", "rfkernels.hub", str(tmp_path / "hub")], check=True, capture_output=True)
    done = subprocess.run(
        [sys.executable, "-c", LOADED, str(tmp_path / "hub")], capture_output=True, text=True,
        env={**os.environ, "TRITON_INTERPRET": "1", "RFKERNELS_NATIVE": "0"},
    )  # fmt: skip
    assert done.stdout.strip().endswith("right"), done.stderr


def test_the_layout(tmp_path):
    folders = hub.written(tmp_path)
    assert [folder.relative_to(tmp_path).as_posix() for folder in folders] == ["build/torch-cuda", "build/torch-cpu"]
    about = [json.loads((folder / "metadata.json").read_text()) for folder in folders]
    assert {one["name"] for one in about} == {"rfkernels"} and len({one["id"] for one in about}) == 2
    assert [one["backend"]["type"] for one in about] == ["cuda", "cpu"]
    code = "".join(path.read_text() for path in folders[0].rglob("*.py"))
    assert "\nfrom rfkernels" not in code and not (folders[0] / "inspect").exists()
    again = hub.written(tmp_path)
    assert again == folders and json.loads((again[0] / "metadata.json").read_text()) == about[0]
    assert 'get_kernel("OWNER/rfkernels", version=0, ' in (tmp_path / "README.md").read_text()


def test_imports_become_relative():
    source = '"""from rfkernels import x"""\nimport rfkernels\nfrom rfkernels import a, b\n'
    source += "def f():\n    from rfkernels.c.d import (\n        e,\n    )\n    import rfkernelsx\n"
    found = '\nrfkernels = __import__("importlib").import_module("..", __package__)\n'
    want = source.replace("\nimport rfkernels\n", found)
    want = want.replace("\nfrom rfkernels import a", "\nfrom .. import a").replace("from rfkernels.c.d", "from ..c.d")
    assert hub.relative(source, 1) == want


def test_the_command_says_how_it_is_called(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["hub"])
    assert hub.main() == 2 and "usage: python -m rfkernels.hub FOLDER" in capsys.readouterr().out
    (tmp_path / "README.md").write_text("# Mine\n")
    monkeypatch.setattr(sys, "argv", ["hub", str(tmp_path)])
    assert hub.main() == 1 and "README.md is there and no card of a kernel" in capsys.readouterr().err
    assert (tmp_path / "README.md").read_text() == "# Mine\n" and not (tmp_path / "build").exists()
