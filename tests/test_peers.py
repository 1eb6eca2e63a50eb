"""The plugin under which diffusers' own tests run: what a test constructs is patched."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.peers.__main__ import outcomes

TESTS = """
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from rfkernels.patch.swap import Fused

SMALL = dict(num_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=24,
             pooled_projection_dim=12, in_channels=4)

def fused(model):
    return any(isinstance(module, Fused) for module in model.modules())

def test_flux():
    assert fused(FluxTransformer2DModel(num_single_layers=1, axes_dims_rope=(4, 4, 8), **SMALL))

def test_of_a_class_below(tmp_path):
    class Own(SD3Transformer2DModel):
        pass

    model = Own(sample_size=8, caption_projection_dim=32, **SMALL)
    assert fused(model)
    model.save_pretrained(tmp_path)
    assert fused(Own.from_pretrained(tmp_path))
"""


def test_models_are_patched_as_they_are_constructed(tmp_path):
    pytest.importorskip("diffusers", reason="diffusers is what is patched")
    (tmp_path / "test_it.py").write_text(TESTS)
    found = outcomes(tmp_path, ["test_it.py"], patched=True, processes=1)
    assert found == {"test_it::test_flux": "passed", "test_it::test_of_a_class_below": "passed"}


@pytest.mark.parametrize("line, said", [("import nothing.like_it", "No module named 'nothing'"), ("1 / 0", "division")])
def test_a_file_that_cannot_be_collected_ends_it(line, said, tmp_path):
    (tmp_path / "test_it.py").write_text(f"{line}\n")
    with pytest.raises(SystemExit, match=f"error: test_it cannot be collected: .*{said}"):
        outcomes(tmp_path, ["test_it.py"], patched=False, processes=1)


def test_a_folder_that_is_no_checkout_is_named(tmp_path):
    command = [sys.executable, "-m", "tests.peers", "--diffusers", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 1 and done.stderr.startswith(f"error: {tmp_path} is no checkout of diffusers")
