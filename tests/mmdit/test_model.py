import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import mmdit.cost.counting  # noqa: F401 - lets older versions of torch count attention on a CPU
from mmdit import MMDiT, MMDiTConfig, presets
from mmdit.blocks import settled
from mmdit.cost.flops import training_flops
from mmdit.embeddings import timestep_features


def randomised(config):
    model = MMDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def inputs(config, batch=2, tokens=7, side=16):
    return (
        torch.randn(batch, config.in_channels, side, side),
        torch.rand(batch),
        torch.randn(batch, tokens, config.context_dim),
        torch.randn(batch, config.pooled_dim),
    )


@pytest.mark.parametrize(
    "preset, count",
    [("sd3_medium", 2_028_328_000), ("sd35_medium", 2_243_171_520), ("sd35_large", 8_056_627_520)],
)
def test_parameter_counts_of_the_released_models(preset, count):
    with torch.device("meta"):
        model = MMDiT(getattr(presets, preset)())
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize("depth, tera", [(15, 0.434), (18, 0.742), (24, 1.736), (30, 3.366), (38, 6.798)])
def test_training_flops_of_the_papers_series(depth, tera):
    assert training_flops(presets.by_depth(depth), 256).total / 1e12 == pytest.approx(tera, abs=6e-4)


def test_attention_share_at_high_resolution():
    flops = training_flops(presets.by_depth(24), 4096)
    assert flops.attention / flops.total == pytest.approx(0.316, abs=5e-4)


@pytest.mark.parametrize("backbone", ("cross", "uvit"))
def test_flops_of_other_backbones_against_a_counter(backbone):
    config = presets.tiny(depth=3, backbone=backbone)
    with FlopCounterMode(display=False) as counter:
        randomised(config).requires_grad_(False)(*inputs(config, batch=1))
    assert training_flops(config, 64, 7).total / 3 == counter.get_total_flops()


@pytest.mark.parametrize("sets, dual", [(1, ()), (2, ()), (2, (0, 1)), (3, ())])
def test_flops_against_a_counter(sets, dual):
    """Forward FLOPs as torch counts them, plus the last block's text queries, which the model skips and we count."""
    config = presets.tiny(depth=3, weight_sets=sets, dual_attention=dual, context_split=3)
    model = randomised(config).requires_grad_(False)
    with FlopCounterMode(display=False) as counter:
        model(*inputs(config, batch=1))
    image, text, width = 64, 7, config.width
    skipped = 4 * width * text * (image + text) + 2 * width * width * text
    if sets == 1:       # counted by us: the last block's text half entire, as a DiT on concatenated tokens has it
        skipped += 2 * (1 + 2 * config.mlp_ratio) * width * width * text
    assert training_flops(config, image, text).total / 3 == counter.get_total_flops() + skipped


KINDS = [{"weight_sets": 1}, {"weight_sets": 2}, {"weight_sets": 3}, {"backbone": "cross"}, {"backbone": "uvit"}]


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: "-".join(str(value) for value in kind.values()))
def test_padding_of_the_text_changes_nothing(kind):
    config = presets.tiny(context_split=3, **kind)
    model = randomised(config).double()
    latent, t, context, pooled = (v.double() for v in inputs(config))
    short = model(latent, t, context, pooled)
    padded = torch.cat([context, torch.randn(2, 4, config.context_dim).double()], 1)
    torch.testing.assert_close(model(latent, t, padded, pooled, torch.tensor([7, 7])), short)


@pytest.mark.parametrize(
    "sets, names", [(1, {"shared"}), (2, {"context", "image"}), (3, {"context", "context2", "image"})]
)
def test_weight_sets_and_the_pre_only_last_block(sets, names):
    model = MMDiT(presets.tiny(weight_sets=sets))
    last = dict(model.blocks[-1].named_children())
    assert set(last) == names
    for name, half in last.items():
        assert (half.mlp is None) == (half.attn.proj is None) == name.startswith("context")
        assert half.vectors == (2 if name.startswith("context") else 6)


def test_every_parameter_gets_a_gradient():
    for sets in (1, 2, 3):
        config = presets.tiny(weight_sets=sets, context_split=3, dual_attention=(0,))
        model = randomised(config)
        model(*inputs(config)).square().sum().backward()
        without = [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()]
        # the query third of the last text projection and its norm exist in released weights but are never read
        assert all(n.startswith("blocks.1.context") and n.endswith("q_norm.weight") for n in without)


def test_starts_as_zero_and_every_block_as_the_identity():
    config = presets.tiny()
    model = MMDiT(config)
    assert not model(*inputs(config)).any()
    xs = [torch.randn(2, 5, config.width), torch.randn(2, 9, config.width)]
    out = model.blocks[0](xs, model.modulation(torch.randn(2, config.width))[:2], [None, None])
    torch.testing.assert_close([settled(x) for x in out], xs)
    assert model.time_embed.fc1.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert (model.blocks[0].image.attn.q_norm.weight == 1).all()


def test_modulations_of_all_steps_may_be_asked_for_at_once():
    config = presets.tiny(dual_attention=(0,))
    model = randomised(config).eval()
    latent, _, context, pooled = inputs(config)
    steps = torch.tensor([1.0, 0.7, 0.2])
    together = model.condition(steps.repeat_interleave(2), pooled.repeat(3, 1))
    for t, modulation in zip(steps, together.chunk(3), strict=True):
        want = model(latent, t.expand(2), context, pooled)
        torch.testing.assert_close(model(latent, None, context, None, modulation=modulation), want)
    with pytest.raises(TypeError, match="timestep or pooled is None"):
        model(latent, None, context, pooled)


def test_timestep_features_are_fp32_cosines_first():
    t = torch.tensor([0.7315])
    features = timestep_features(t)
    assert features.dtype == torch.float32 and features.shape == (1, 256)
    i = torch.arange(128, dtype=torch.float64)
    angles = 1000 * t.double() * torch.exp(-torch.log(torch.tensor(1e4, dtype=torch.float64)) * i / 128)
    torch.testing.assert_close(features[0].double(), torch.cat([angles.cos(), angles.sin()]), atol=1e-4, rtol=0)
    with pytest.raises(TypeError, match=r"timestep has dtype torch.bfloat16"):
        MMDiT(presets.tiny())(torch.randn(1, 4, 4, 4), t.bfloat16(), torch.randn(1, 3, 32), torch.randn(1, 16))


def test_position_table_is_a_centred_crop_and_persistent():
    config = presets.tiny()
    model = MMDiT(config)
    assert "patch_embed.pos_embed" in model.state_dict()
    table = model.patch_embed.pos_embed.view(16, 16, -1)
    torch.testing.assert_close(model.patch_embed.crop(4, 6).view(4, 6, -1), table[6:10, 5:11])
    with pytest.raises(ValueError, match="latent has 17 x 4 patches; the position table holds 16 x 16"):
        model.patch_embed.crop(17, 4)


def test_bad_configurations_name_the_field():
    with pytest.raises(ValueError, match="weight_sets is 4"):
        presets.tiny(weight_sets=4)
    with pytest.raises(ValueError, match=r"dual_attention names blocks \[5\]"):
        presets.tiny(dual_attention=(0, 5))
    with pytest.raises(ValueError, match=r"unknown keys \['widht'\]"):
        MMDiTConfig.from_dict({"depth": 1, "heads": 1, "widht": 3})
    config = presets.tiny(dual_attention=(1,))
    assert MMDiTConfig.from_dict(config.to_dict()) == config
