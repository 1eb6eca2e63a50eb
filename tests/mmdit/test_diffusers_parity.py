"""The same function as diffusers' SD3Transformer2DModel, weights carried over here by hand."""

import pytest
import torch
from diffusers import SD3Transformer2DModel

from mmdit import MMDiT, presets

DEPTH, HEADS, DIM = 3, 2, 32


def linear(to, prefix, source, name):
    for part in ("weight", "bias"):
        to[f"{prefix}.{part}"] = source[f"{name}.{part}"]


def fused(to, prefix, source, names):
    for part in ("weight", "bias"):
        to[f"{prefix}.{part}"] = torch.cat([source[f"{name}.{part}"] for name in names])


def swapped(to, prefix, source, name):
    """diffusers' continuous adaLN has (scale, shift) where the released weights have (shift, scale)."""
    for part in ("weight", "bias"):
        scale, shift = source[f"{name}.{part}"].chunk(2)
        to[f"{prefix}.{part}"] = torch.cat([shift, scale])


def carried_over(source, dual, qk_norm, most, depth=DEPTH):
    to, stack = {"patch_embed.pos_embed": source["pos_embed.pos_embed"]}, {}
    linear(to, "patch_embed.proj", source, "pos_embed.proj")
    for ours, theirs in (("time_embed", "timestep_embedder"), ("pooled_embed", "text_embedder")):
        for i in (1, 2):
            linear(to, f"{ours}.fc{i}", source, f"time_text_embed.{theirs}.linear_{i}")
    linear(to, "context_embed.0", source, "context_embedder")
    linear(to, "final_layer.unembed.linear", source, "proj_out")
    for i in range(depth):
        block, theirs, last = f"blocks.{i}", f"transformer_blocks.{i}", i == depth - 1
        fused(to, f"{block}.image.attn.qkv", source, [f"{theirs}.attn.to_{n}" for n in "qkv"])
        fused(to, f"{block}.context.attn.qkv", source, [f"{theirs}.attn.add_{n}_proj" for n in "qkv"])
        linear(to, f"{block}.image.attn.proj", source, f"{theirs}.attn.to_out.0")
        for j, name in ((1, "net.0.proj"), (2, "net.2")):
            linear(to, f"{block}.image.mlp.fc{j}", source, f"{theirs}.ff.{name}")
            if not last:
                linear(to, f"{block}.context.mlp.fc{j}", source, f"{theirs}.ff_context.{name}")
        (swapped if last else linear)(stack, f"{i}.context", source, f"{theirs}.norm1_context.linear")
        linear(stack, f"{i}.image", source, f"{theirs}.norm1.linear")
        if not last:
            linear(to, f"{block}.context.attn.proj", source, f"{theirs}.attn.to_add_out")
        if i in dual:
            fused(to, f"{block}.image.attn2.qkv", source, [f"{theirs}.attn2.to_{n}" for n in "qkv"])
            linear(to, f"{block}.image.attn2.proj", source, f"{theirs}.attn2.to_out.0")
        if qk_norm:
            for n in "qk":
                to[f"{block}.image.attn.{n}_norm.weight"] = source[f"{theirs}.attn.norm_{n}.weight"]
                to[f"{block}.context.attn.{n}_norm.weight"] = source[f"{theirs}.attn.norm_added_{n}.weight"]
                if i in dual:
                    to[f"{block}.image.attn2.{n}_norm.weight"] = source[f"{theirs}.attn2.norm_{n}.weight"]
    swapped(stack, "final", source, "norm_out.linear")
    for part in ("weight", "bias"):                                # in the order in which they were put down
        to[f"modulation.linear.{part}"] = torch.cat([rows for name, rows in stack.items() if name.endswith(part)])
    return to


@pytest.mark.parametrize("qk_norm, dual", [(False, ()), (True, ()), (True, (0, 1)), (False, (0, 2))], ids=str)
@pytest.mark.parametrize("height, width", [(16, 16), (8, 20)])
def test_equals_diffusers(qk_norm, dual, height, width):
    most = 12
    theirs = SD3Transformer2DModel(
        sample_size=16,
        num_layers=DEPTH,
        attention_head_dim=DIM,
        num_attention_heads=HEADS,
        joint_attention_dim=48,
        caption_projection_dim=HEADS * DIM,
        pooled_projection_dim=24,
        pos_embed_max_size=most,
        dual_attention_layers=dual,
        qk_norm="rms_norm" if qk_norm else None,
    ).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    config = presets.tiny(
        depth=DEPTH,
        heads=HEADS,
        head_dim=DIM,
        in_channels=16,
        context_dim=48,
        pooled_dim=24,
        qk_norm=qk_norm,
        dual_attention=dual,
        max_height=4 * most,
        max_width=4 * most,
    )
    ours = MMDiT(config).eval()
    ours.load_state_dict(carried_over(theirs.state_dict(), dual, qk_norm, most))
    latent, t = torch.randn(2, 16, height, width), torch.tensor([0.13, 0.77])
    context, pooled = torch.randn(2, 9, 48), torch.randn(2, 24)
    with torch.no_grad():
        want = theirs(latent, context, pooled, 1000 * t, return_dict=False)[0]
        got = ours(latent, t, context, pooled)
        latent, context, pooled, t = (v.double() for v in (latent, context, pooled, t))
        exact = theirs.double()(latent, context, pooled, 1000 * t, return_dict=False)[0]
    assert want.abs().mean() > 0.1
    # fp32 rounding: no further from diffusers in fp64 than a few times diffusers' own fp32 error
    error, own = (got - exact).abs().max(), (want - exact).abs().max()
    assert error <= 4 * own, f"{error:.2e} against diffusers' own {own:.2e}"
