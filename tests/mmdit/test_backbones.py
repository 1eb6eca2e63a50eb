"""The paper's other backbones, against what they are by definition."""

import pytest
import torch
import torch.nn.functional as F

from mmdit import MMDiT, checkpoint, presets
from mmdit.backbones import ConvBlock, ConvStages, CrossBlock
from mmdit.blocks import settled

from .test_model import inputs, randomised


def rms(x, weight):
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def attention(q, k, v, seen):
    """Softmax by hand: q [B, S, H, D], k and v [B, L, H, D], seen [B, L]."""
    scores = torch.einsum("bshd,blhd->bhsl", q, k) * q.shape[-1] ** -0.5
    scores = scores.masked_fill(~seen[:, None, None], -torch.inf)
    return torch.einsum("bhsl,blhd->bshd", scores.softmax(-1), v).flatten(2)


def layer_norm(x):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + 1e-6).sqrt()


def test_cross_block_by_definition():
    """Attention among the image's tokens, then to the text, then an MLP; gates and norms where they belong."""
    config = presets.tiny(backbone="cross")
    block = CrossBlock(config, 0).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    text, x = torch.randn(2, 5, 64).double(), torch.randn(2, 9, 64).double()
    m = tuple(torch.randn(2, 64).double() for _ in range(7))
    lengths = torch.tensor([5, 2])
    same, out = map(settled, block([text, x], [m], [lengths, None]))
    assert same is text

    a, c = block.attn, block.cross
    shift, scale, gate, gate_cross, shift_mlp, scale_mlp, gate_mlp = (v[:, None] for v in m)
    q, k, v = a.qkv(layer_norm(x) * (1 + scale) + shift).view(2, 9, 3, 2, 32).unbind(2)
    everything = torch.ones(2, 9, dtype=torch.bool)
    h = x + gate * a.proj(attention(rms(q, a.q_norm.weight), rms(k, a.k_norm.weight), v, everything))
    k, v = c.kv(text).view(2, 5, 2, 2, 32).unbind(2)
    q = rms(c.q(h).view(2, 9, 2, 32), c.q_norm.weight)
    seen = torch.arange(5) < lengths[:, None]
    h = h + gate_cross * c.proj(attention(q, rms(k, c.k_norm.weight), v, seen))
    hidden = F.gelu(block.mlp.fc1(layer_norm(h) * (1 + scale_mlp) + shift_mlp), approximate="tanh")
    torch.testing.assert_close(out, h + gate_mlp * block.mlp.fc2(hidden))


def test_conv_block_by_definition():
    block = ConvBlock(12, 8).double()
    x, vector = torch.randn(2, 12, 6, 5).double(), torch.randn(2, 16).double()
    first, second = torch.nn.GroupNorm(3, 12).double(), torch.nn.GroupNorm(2, 8).double()
    h = second(block.conv1(F.silu(first(x)))) * (1 + vector[:, 8:, None, None]) + vector[:, :8, None, None]
    torch.testing.assert_close(block(x, vector), block.skip(x) + block.conv2(F.silu(h)))


def test_uvit_takes_back_last_what_it_kept_first():
    """Each block after the tokens reads the features of its counterpart before them."""
    stages = ConvStages(presets.tiny(backbone="uvit", conv_blocks=3))
    seen = []
    for stage in (*stages.before, *stages.after):
        stage.register_forward_hook(lambda module, args, out: seen.append((args[0], out)))
    vectors = iter([(torch.randn(1, 64),) for _ in range(6)])
    features, kept = stages.down(torch.randn(1, 4, 8, 8), vectors)
    assert stages.up(torch.randn_like(features), kept, vectors).shape == (1, 4, 8, 8)
    for i in range(3):
        assert torch.equal(seen[3 + i][0][:, 32:], seen[2 - i][1])


@pytest.mark.parametrize("backbone", ("cross", "uvit"))
def test_starts_as_zero_and_every_parameter_learns(backbone):
    config = presets.tiny(backbone=backbone)
    assert not MMDiT(config)(*inputs(config)).any()
    model = randomised(config)
    model(*inputs(config)).square().sum().backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert without == []


@pytest.mark.parametrize("backbone", ("cross", "uvit"))
def test_kept_in_our_layout_alone(backbone, tmp_path):
    model = randomised(presets.tiny(backbone=backbone))
    checkpoint.save(model, tmp_path / "model.safetensors")
    again = checkpoint.load(tmp_path / "model.safetensors")
    assert again.config == model.config
    arguments = inputs(model.config)
    assert torch.equal(again(*arguments), model(*arguments))
    for layout in ("sd3", "diffusers"):
        with pytest.raises(ValueError, match=f"is for joint blocks .* the model has {backbone}"):
            checkpoint.save(model, tmp_path / "other", layout=layout)


def test_backbone_errors_name_what_came():
    with pytest.raises(ValueError, match="backbone is 'unet'; expected one of joint, cross, uvit"):
        presets.tiny(backbone="unet")
    with pytest.raises(ValueError, match=r"weight_sets is 3.* the backbone cross has neither"):
        presets.tiny(backbone="cross", weight_sets=3)
    with pytest.raises(ValueError, match="conv_blocks is 0; expected an integer of at least 1"):
        presets.tiny(backbone="uvit", conv_blocks=0)
