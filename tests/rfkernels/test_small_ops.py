"""qk_norm, position_grid, patch_embed, gelu_mlp, rectified_flow, weighted_mse, dispatch."""

import math

import pytest
import torch
import torch.nn.functional as F

import rfkernels
from rfkernels import dispatch, native

pytest.importorskip("diffusers", reason="diffusers is the reference here")
from diffusers.models.embeddings import get_2d_sincos_pos_embed


def test_qk_norm_is_two_rms_norms():
    qkv = torch.randn(2, 5, 3, 4, 8, dtype=torch.float64)
    q, k, _ = qkv.unbind(2)
    wq, wk = torch.rand(2, 8, dtype=torch.float64)
    got = rfkernels.qk_norm(q, k, wq, wk)
    torch.testing.assert_close(got, (F.rms_norm(q, (8,), wq, 1e-6), F.rms_norm(k, (8,), wk, 1e-6)))


def test_qk_norm_accumulates_in_fp32():
    q = torch.full((1, 1, 1, 64), 300.0, dtype=torch.float16)           # 300^2 overflows fp16
    w = torch.ones(64, dtype=torch.float16)
    assert (rfkernels.qk_norm(q, q, w, w)[0] == 1).all()


def test_position_grid_closed_form():
    """S = 512, buckets up to 768 x 1024, an image of 256 x 640: entry by entry from the paper's formula."""
    got = rfkernels.position_grid(256, 640, 16, resolution=512, max_height=768, max_width=1024)
    s, h_max, w_max, h, w = 512 / 16, 768 // 16, 1024 // 16, 256 // 16, 640 // 16
    for row, column in ((0, 0), (3, 7), (h - 1, w - 1)):
        y = (row + (h_max - h) // 2 - (h_max - s) / 2) * 256 / 512
        x = (column + (w_max - w) // 2 - (w_max - s) / 2) * 256 / 512
        want = [f(p * 10000 ** (-i / 4)) for p in (x, y) for f in (math.sin, math.cos) for i in range(4)]
        torch.testing.assert_close(got[row * w + column], torch.tensor(want), atol=1e-6, rtol=0)


def test_position_grid_is_the_plain_one_at_the_pretraining_resolution():
    got = rfkernels.position_grid(256, 256, 32, resolution=256, max_height=256, max_width=256)
    want = get_2d_sincos_pos_embed(32, 16, base_size=16, output_type="pt")
    torch.testing.assert_close(got, want.float(), atol=1e-6, rtol=0)


def test_position_grid_crop_keeps_the_centre():
    def grid(h, w):
        return rfkernels.position_grid(h, w, 8, resolution=64, max_height=128, max_width=128).view(h // 16, w // 16, 8)

    torch.testing.assert_close(grid(64, 32), grid(128, 128)[2:6, 3:5])


def test_patch_embed_is_a_strided_convolution():
    latent, weight = torch.randn(2, 3, 8, 6), torch.randn(16, 3, 2, 2)
    bias, positions = torch.randn(16), torch.randn(12, 16)
    want = F.conv2d(latent, weight, bias, stride=2).flatten(2).transpose(1, 2) + positions
    torch.testing.assert_close(rfkernels.patch_embed(latent, weight, bias, positions), want)


def test_gelu_mlp():
    mlp = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.GELU("tanh"), torch.nn.Linear(32, 8))
    x = torch.randn(2, 3, 8)
    torch.testing.assert_close(
        rfkernels.gelu_mlp(x, mlp[0].weight, mlp[0].bias, mlp[2].weight, mlp[2].bias), mlp(x)
    )


def test_rectified_flow_goes_from_data_to_noise():
    x0, noise = torch.randn(2, 3, 4, 4, 4).unbind(0)
    z, target = rfkernels.rectified_flow(x0, noise, torch.tensor([0.0, 0.25, 1.0]))
    torch.testing.assert_close(z[0], x0[0])
    torch.testing.assert_close(z[1], 0.75 * x0[1] + 0.25 * noise[1])
    torch.testing.assert_close(z[2], noise[2])
    torch.testing.assert_close(target, noise - x0)


def test_weighted_mse_sums_in_fp32():
    prediction = torch.ones(2, 3, 4096, dtype=torch.bfloat16)
    weight = torch.tensor([1.0, 3.0])
    loss = rfkernels.weighted_mse(prediction, torch.zeros_like(prediction), weight)
    assert loss.dtype == torch.float32 and loss.item() == 2.0


def test_explain_says_what_runs_and_why_not_the_others():
    x, v = torch.randn(1, 2, 4), torch.randn(1, 4)
    told = rfkernels.explain(rfkernels.adaln, x, v, v)
    first = "library" if native.missing() else "native"
    assert told.startswith(f"adaln: {first}") and "not reference" in told
    with rfkernels.backend("reference"):
        assert rfkernels.explain("adaln", x, v, scale=v).startswith("adaln: reference (forced to 'reference')")
    with pytest.raises(ValueError, match="adaln: scale has shape"):
        rfkernels.explain(rfkernels.adaln, x, v, torch.randn(3))
    with pytest.raises(ValueError, match="unknown op 'nothing'"):
        rfkernels.explain("nothing")


def test_a_forced_backend_never_falls_back():
    x = torch.randn(1, 2, 4)
    with rfkernels.backend("library"), pytest.raises(RuntimeError, match=r"gelu_mlp: backend 'library' was forced"):
        rfkernels.gelu_mlp(x, torch.randn(4, 4), None, torch.randn(4, 4), None)
    with pytest.raises(ValueError, match="backend: name is 'fast'"), rfkernels.backend("fast"):
        pass


def test_every_public_op_is_registered_and_has_a_definition():
    others = ("backend", "explain", "chunk_modulation", "attention_statistics", "observe_attention", "patch")
    public = [n for n in rfkernels.__all__ if n.islower() and n not in others]
    assert sorted(dispatch.ops()) == sorted(public)
    for op in dispatch.ops():
        assert dispatch.implementations(op)[-1].backend == "reference"
