"""The traps of SD3's weights, text, schedule and training, one test each, which fails if the trap is fallen into."""

import math

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn

import rfkernels
from mmdit import MMDiT, Pipeline, autoencoder, checkpoint, flow, presets
from mmdit.checkpoint.layouts import pieces
from mmdit.embeddings import timestep_features
from mmdit.encoders import Clip, Sd3Text
from mmdit.flow import LogitNormal
from tests.mmdit.pipelines import CLIP_L, DEPTH, transformer

WIDTH = 64


def tiny(**changes):
    torch.manual_seed(1)
    model = MMDiT(presets.tiny(**changes))
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


def inputs(config, tokens=7):
    return torch.randn(2, 4, 8, 8), torch.rand(2), torch.randn(2, tokens, config.context_dim), torch.randn(2, 16)


def test_trap_01_diffusers_keeps_scale_before_shift_in_two_places_only():
    theirs = transformer((0,))
    source = theirs.state_dict()
    ours = checkpoint.load(source, heads=2, head_dim=32)
    rows = {}
    for piece in pieces(ours.config)[0]:
        if piece.native == "modulation.linear.weight":
            rows[piece.diffusers[0]] = ours.modulation.linear.weight[piece.first : piece.first + piece.shape[0]]
    last = f"transformer_blocks.{DEPTH - 1}.norm1_context.linear.weight"
    for name, got in rows.items():
        first, second = source[name].chunk(2)
        swapped = name in ("norm_out.linear.weight", last)
        assert torch.equal(got, torch.cat([second, first]) if swapped else source[name]), name
    assert len(rows) == 2 * DEPTH + 1


def test_trap_02_padding_belongs_to_the_text_which_comes_first():
    """Lengths count text tokens: masked text moves nothing, and every pixel of the image is seen."""
    model = tiny(qk_norm=True)
    latent, t, context, pooled = inputs(model.config)
    latent, context = latent.requires_grad_(), context.requires_grad_()
    out = model(latent, t, context, pooled, torch.tensor([3, 5]))
    by_latent, by_text = torch.autograd.grad(out.square().sum(), (latent, context))
    assert by_latent.ne(0).all()
    assert not by_text[0, 3:].any() and not by_text[1, 5:].any() and by_text[0, :3].ne(0).all()


def test_trap_03_the_last_text_half_is_pre_only_but_has_its_norms_and_asks_nothing(monkeypatch):
    names = {p.sd3 for p in pieces(presets.by_depth(4, max_height=64, max_width=64, resolution=64))[0]}
    last = {n.removeprefix("joint_blocks.3.context_block.") for n in names if n.startswith("joint_blocks.3.context")}
    assert last == {"attn.qkv.weight", "attn.qkv.bias", "attn.ln_q.weight", "attn.ln_k.weight",
                    "adaLN_modulation.1.weight", "adaLN_modulation.1.bias"}  # fmt: skip
    from mmdit import blocks

    asked, original = [], blocks.joint_attention
    monkeypatch.setattr(blocks, "joint_attention", lambda s: asked.append([i.queries for i in s]) or original(s))
    model = tiny()
    model(*inputs(model.config))
    assert asked == [[True, True], [False, True]]


def test_trap_04_positions_are_data_cropped_at_the_centre_and_fp32():
    theirs = transformer()
    source = theirs.state_dict()
    source["pos_embed.pos_embed"] = torch.randn_like(source["pos_embed.pos_embed"])
    theirs.load_state_dict(source)
    ours = checkpoint.load(source, heads=2, head_dim=32, dtype=torch.bfloat16)
    assert torch.equal(ours.patch_embed.pos_embed, source["pos_embed.pos_embed"])          # not a formula, not bf16
    table = source["pos_embed.pos_embed"].view(8, 8, -1)
    assert torch.equal(ours.patch_embed.crop(3, 5).view(3, 5, -1), table[2:5, 1:6])        # (8 - 3) // 2, (8 - 5) // 2
    # the formula puts the column in the first half of the channels
    grid = rfkernels.position_grid(64, 64, 8, resolution=64, max_height=64, max_width=64, base=64).view(4, 4, 8)
    assert torch.equal(grid[0, :, :4], grid[3, :, :4]) and not torch.equal(grid[0, :, 4:], grid[3, :, 4:])


def test_trap_05_patches_enter_channel_first_and_leave_channel_last():
    latent, p, c = torch.arange(2 * 4 * 4.0).view(1, 2, 4, 4), 2, 2
    eye = torch.eye(p * p * c)
    tokens = rfkernels.patch_embed(latent, eye.view(8, c, p, p), None, torch.zeros(4, 8))
    assert tokens[0, 0].tolist() == [latent[0, k, r, s].item() for k in range(c) for r in range(p) for s in range(p)]
    out = rfkernels.patch_unembed(tokens, eye, None, height=4, width=4)
    assert [out[0, k, r, s].item() for r in range(p) for s in range(p) for k in range(c)] == tokens[0, 0].tolist()


def test_trap_06_time_is_a_thousand_t_in_fp32_cosines_first():
    t = torch.tensor([0.7315])
    i = torch.arange(128, dtype=torch.float64)
    angles = 731.5 * torch.exp(-math.log(1e4) * i / 128)
    want = torch.cat([angles.cos(), angles.sin()])
    torch.testing.assert_close(timestep_features(t)[0].double(), want, atol=2e-4, rtol=0)
    model = tiny().bfloat16()
    latent, t, context, pooled = (x.bfloat16() for x in inputs(model.config))
    with pytest.raises(TypeError, match=r"timestep has dtype torch\.bfloat16"):
        model(latent, t, context, pooled)


def test_trap_07_the_release_shifts_its_last_sigma_twice_and_the_paper_does_not():
    tail = lambda schedule: flow.times(28, 3.0, schedule)[-4:].tolist()  # noqa: E731
    assert tail("sd3_release") == pytest.approx([0.1998, 0.1109, 0.0089, 0], abs=6e-5)
    assert tail("paper") == pytest.approx([0.2647, 0.1875, 0.1, 0], abs=6e-5)


def test_trap_08_one_is_noise_and_a_positive_mean_favours_it():
    x0, noise = torch.randn(2, 1, 4, 2, 2)
    z, v = rfkernels.rectified_flow(x0, noise, torch.ones(1))
    assert torch.equal(z, noise) and torch.equal(v, noise - x0)
    back = flow.euler(lambda z, t: v, noise, flow.times(7))
    torch.testing.assert_close(back, x0)
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64)
    assert LogitNormal(1.0, 1.0).sample(u).mean() > 0.6 > 0.4 > LogitNormal(-1.0, 1.0).sample(u).mean()
    assert LogitNormal(0.0, 1.0).sample(torch.tensor([1 - 1e-12], dtype=torch.float64)).item() < 1


def test_trap_09_zeros_are_the_encoders_outputs_pooled_halves_too(folders):
    from mmdit.encoders import TextFeatures, assemble

    text = Pipeline.from_pretrained(folders()[1], device="cpu").text
    zeros, empty = text.zeros(1), text.encode([""])
    assert not zeros.context.any() and not zeros.pooled.any()
    assert empty.context[0, :77].any() and empty.pooled.any()                               # "" is not nothing
    sample = [[TextFeatures(torch.ones(3, 4), torch.ones(4)), TextFeatures(torch.ones(3, 5), torch.ones(5))]]
    dropped = assemble(sample, 12, torch.tensor([[True, False]]), (False, True))
    assert dropped.pooled[0].tolist() == [1] * 4 + [0] * 5                                   # with its sequence part
    assert dropped.context[0, 0].tolist() == [1] * 4 + [0] * 8


def test_trap_10_the_loss_is_that_of_the_velocity_at_every_time():
    """Conditional flow matching: the same weight for all t, not sigma^2 times it."""
    formulation = flow.by_name("rf/lognorm(0.00,1.00)", shift=3.0)
    output, target, t = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0.01, 0.3, 0.7, 0.99])
    torch.testing.assert_close(formulation.loss(output, target, t), F.mse_loss(output, target))


def test_trap_11_noising_in_bf16_does_not_round_the_time():
    x0, noise = torch.randn(2, 64, 512).bfloat16()
    t = torch.full((64,), 0.70123)
    z, _ = rfkernels.rectified_flow(x0, noise, t)
    exact = (1 - t.double()[:, None]) * x0.double() + t.double()[:, None] * noise.double()
    assert torch.equal(z, exact.bfloat16()) or ((z.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all()
    rounded = (1 - t.bfloat16()[:, None]) * x0 + t.bfloat16()[:, None] * noise
    assert (z.double() - exact).square().mean() < 0.5 * (rounded.double() - exact).square().mean()
    with pytest.raises(TypeError, match="a rounded t is another t"):
        rfkernels.rectified_flow(x0, noise, t.bfloat16())


def test_trap_12_the_text_stack(folders):
    """Penultimate states without the last norm; other padding for each CLIP; pooled projected or not; T5 unmasked."""
    theirs, folder = folders()
    clip_l = Clip(str(folder / "text_encoder"), str(folder / "tokenizer"))
    clip_g = Clip(str(folder / "text_encoder_2"), str(folder / "tokenizer_2"), beside=True)
    ids = clip_l.ids(["ab"]), clip_g.ids(["ab"])
    end = theirs.tokenizer.eos_token_id
    assert ids[0][0, 4:].tolist() == [end] * 73 and ids[1][0, 4:].tolist() == [theirs.tokenizer_2.pad_token_id] * 73
    assert (theirs.text_encoder.config.hidden_act, theirs.text_encoder_2.config.hidden_act) == ("quick_gelu", "gelu")
    with torch.no_grad():
        out = theirs.text_encoder(ids[0], output_hidden_states=True)
        inner = theirs.text_encoder.text_model(ids[0]).pooler_output
    (found,) = clip_l.encode(["ab"])
    torch.testing.assert_close(found.tokens, out.hidden_states[-2][0])
    assert not torch.allclose(found.tokens, theirs.text_encoder.text_model.final_layer_norm(out.hidden_states[-2])[0])
    torch.testing.assert_close(found.pooled, out.text_embeds[0])
    bare = Clip(str(folder / "text_encoder"), str(folder / "tokenizer"), projected=False)
    torch.testing.assert_close(bare.encode(["ab"])[0].pooled, inner[0])
    assert not torch.allclose(inner, out.text_embeds)                    # equal only if the projection is the identity
    text = Sd3Text(clip_l, clip_g, None, context_dim=48, pooled_dim=32, t5_tokens=5).encode(["ab"])
    assert text.context.shape == (1, 82, 48) and text.lengths.tolist() == [82]              # padding is not masked
    torch.testing.assert_close(text.context[0, :77, :CLIP_L], found.tokens)
    assert not text.context[0, :77, 32:].any() and not text.context[0, 77:].any()
    t5 = Pipeline.from_pretrained(folder, device="cpu").text.encoders[2]
    padded = torch.nn.functional.pad(t5.ids(["ab"])[:, :4], (0, 252), value=0)
    with torch.no_grad():
        torch.testing.assert_close(t5.encode(["ab"])[0].tokens, theirs.text_encoder_3(padded)[0][0])


def test_trap_13_the_norm_of_q_and_k_sums_in_fp32():
    q = torch.full((1, 3, 2, 64), 300.0, dtype=torch.float16)                               # 300^2 overflows fp16
    w = torch.ones(64, dtype=torch.float16)
    v = torch.randn(1, 3, 2, 64, dtype=torch.float16)
    (out,) = rfkernels.joint_attention([rfkernels.Stream(q, q, v, w, w)])
    torch.testing.assert_close(out.float(), v.float().mean(1, keepdim=True).expand_as(v), atol=2e-3, rtol=0)


def test_trap_14_nothing_is_left_uninitialised():
    config = presets.tiny(dual_attention=(0,))
    with torch.device("meta"):
        model = MMDiT(config)
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(float("nan"))
    model.init_weights()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all(), name
        if name.endswith("norm.weight"):
            assert (tensor == 1).all(), name
        if name.startswith(("modulation", "final_layer")) or name.endswith("bias"):
            assert not tensor.any(), name


def test_trap_15_the_autoencoder_runs_in_fp32_and_says_which_posterior_it_gives(folders):
    folder = folders()[1] / "vae"
    images = autoencoder.to_float(torch.randint(0, 256, (2, 64, 64, 3), dtype=torch.uint8).numpy())
    mode, sample = (autoencoder.KL(str(folder), posterior=p) for p in ("mode", "sample"))
    assert {p.dtype for p in mode.model.parameters()} == {torch.float32}
    drawn = sample.encode(images)
    assert torch.equal(drawn, sample.encode(images)) and not torch.allclose(drawn, mode.encode(images))
    torch.testing.assert_close(sample.encode(images[1:]), drawn[1:], rtol=1e-3, atol=1e-3)   # the image's own draw
    assert [vae.spec()["posterior"] for vae in (mode, sample)] == ["mode", "sample"]
    latent = mode.model.encode(images).latent_dist.mean
    torch.testing.assert_close(mode.encode(images), (latent - 0.0609) * 1.5305)
    with pytest.raises(ValueError, match="dtype 'float16'; expected mode or sample, float32 or bfloat16"):
        autoencoder.KL(str(folder), dtype="float16")


def test_trap_16_guidance_acts_on_all_channels():
    c, u = torch.randn(2, 1, 16, 2, 2)
    field = flow.guided(lambda z, t: torch.cat([c, u]), 3.0)
    torch.testing.assert_close(field(torch.zeros(1, 16, 2, 2), 0.5), u + 3 * (c - u))


def test_trap_17_the_depth_is_the_largest_index_whatever_the_order():
    source = transformer(depth=12).state_dict()
    names = sorted(source)                                       # as text "...9." comes after "...11."
    assert checkpoint.load({n: source[n] for n in names}, heads=2, head_dim=32).config.depth == 12
    assert checkpoint.load({n: source[n] for n in names[::-1]}, heads=2, head_dim=32).config.depth == 12


def test_trap_18_a_controlnet_in_the_file_is_not_the_model(tmp_path):
    model = MMDiT(presets.by_depth(2, heads=2, head_dim=32, max_height=64, max_width=64, resolution=64))
    checkpoint.save(model, tmp_path / "a.safetensors", layout="sd3")
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "a.safetensors")
    more = {f"control_model.joint_blocks.{i}.x_block.attn.qkv.weight": torch.ones(2) for i in range(5)}
    save_file({**more, **tensors}, tmp_path / "b.safetensors")
    opened = checkpoint.open_checkpoint(tmp_path / "b.safetensors")
    assert opened.config.depth == 2 and opened.others == {"control": 5}
    save_file(more, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match="holds no MM-DiT"):
        checkpoint.load(tmp_path / "c.safetensors")
