"""Low-rank layers: what they compute, what they leave alone."""

import pytest
import torch
from torch import nn

from mmdit import MMDiT, adapters, presets
from mmdit.adapters import Lora, LoraLinear
from mmdit.adapters.lora import matching

PRESETS = {
    "sd3": presets.tiny(qk_norm=False),
    "sd35-medium": presets.tiny(dual_attention=(0,)),
    "sd35-large": presets.tiny(depth=3),
}


def model_of(config, seed=0):
    torch.manual_seed(seed)
    model = MMDiT(config).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.05)
    return model


def inputs(config, batch=2):
    torch.manual_seed(1)
    return (torch.randn(batch, config.in_channels, 8, 8), torch.rand(batch), torch.randn(batch, 5, config.context_dim),
            torch.randn(batch, config.pooled_dim))  # fmt: skip


def randomised(model, seed=2):
    torch.manual_seed(seed)
    for _, layer in adapters.layers(model):
        nn.init.normal_(layer.lora_b, std=0.1)
    return model


@pytest.mark.parametrize("targets", [("attention",), ("blocks",), ("all",), (r"blocks\.1\.image\.mlp\.fc1",)], ids=str)
@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_a_new_adapter_changes_no_bit_and_off_is_the_base(config, targets):
    """Where gradients are wanted other code runs than where none are: compared are likes."""
    model, x = model_of(config).requires_grad_(False), inputs(config)
    without_gradients = model(*x)
    for tensor in (x[0], *x[2:]):
        tensor.requires_grad_()
    base = model(*x)
    adapters.attach(model, Lora(rank=3, targets=targets))
    assert torch.equal(model(*x), base)
    randomised(model)
    assert not torch.equal(model(*x), base)
    with adapters.off(model):
        assert torch.equal(model(*x), base)
        with torch.no_grad():
            assert torch.equal(model(*x), without_gradients)
    assert not torch.equal(model(*x), base)


def test_targets_are_what_their_names_say():
    model = model_of(PRESETS["sd35-medium"])
    attention, every = set(matching(model, ("attention",))), set(matching(model, ("all",)))
    assert "blocks.0.image.attn2.qkv" in attention and not any("mlp" in name for name in attention)
    assert every == {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    with pytest.raises(ValueError, match="target 'attn' matches no linear layer; expected attention, blocks, all"):
        adapters.attach(model, Lora(rank=2, targets=("attn",)))


def test_parameters_of_the_base_keep_their_names_and_two_are_added():
    model = model_of(PRESETS["sd3"])
    before = set(model.state_dict())
    adapters.attach(model, Lora(rank=2, targets=("all",)))
    layers = [name for name, _ in adapters.layers(model)]
    assert set(model.state_dict()) - before == {f"{name}.lora_{which}" for name in layers for which in "ab"}
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(model.state_dict()) - before


@pytest.mark.parametrize("parts", [(0,), (0, 1, 2), (0, 0, 1), (1, -1, 0)], ids=str)
def test_output_and_gradients_are_those_of_the_sum_of_products(parts):
    """Against fp64, every row group by its own formula."""
    torch.manual_seed(0)
    layer = LoraLinear(5, 12, rank=2, alpha=3, parts=parts)
    nn.init.normal_(layer.lora_b)
    if -1 in parts:
        with torch.no_grad():
            layer.lora_b[4:8].zero_()
    x, dy = torch.randn(2, 7, 5, requires_grad=True), torch.randn(2, 7, 12)
    out = layer(x)
    out.backward(dy)
    a, b = (t.detach().double().requires_grad_() for t in (layer.lora_a, layer.lora_b))
    wide, rows = x.detach().double().requires_grad_(), 12 // len(parts)
    expected = []
    for group, part in enumerate(parts):
        own, low = b[group * rows : (group + 1) * rows], a[part * 2 : part * 2 + 2] if part >= 0 else a[-2:]
        expected.append(1.5 * (wide @ low.T @ own.T))
    expected = torch.cat(expected, -1) + wide @ layer.weight.double().T + layer.bias.double()
    expected.backward(dy.double())
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in ((layer.lora_a, a), (layer.lora_b, b), (x, wide)):
        torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-5, atol=1e-5)
    assert layer.weight.grad is None


@pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)
def test_merged_is_the_same_model(config):
    model, x = model_of(config), inputs(config)
    adapters.attach(model, Lora(rank=3, alpha=4, targets=("all",)))
    expected = randomised(model)(*x)
    adapters.merge(model)
    assert [type(m) for m in model.modules()] == [type(m) for m in model_of(config).modules()]
    torch.testing.assert_close(model(*x), expected, rtol=1e-4, atol=1e-5)


def test_several_adapters_add_up():
    """Of other ranks, other targets, q, k and v together or apart; and on top of one that is there."""
    config = PRESETS["sd35-medium"]
    settings = (
        Lora(rank=2, targets=("all",)), Lora(rank=3, targets=("attention",), split_qkv=False),
        Lora(rank=1, alpha=2, targets=(r"blocks\.0\.image\.attn\.qkv",)),
    )  # fmt: skip
    found = []
    for i, lora in enumerate(settings):
        model = model_of(config)
        adapters.attach(model, lora)
        found.append(adapters.of_model(randomised(model, seed=i)))
    model, plain = model_of(config), model_of(config)
    adapters.load(model, found[0], found[1].times(0.5))
    adapters.load(model, found[2].times(-2))
    state = {name: value.double() for name, value in plain.state_dict().items()}
    for adapter, weight in zip(found, (1, 0.5, -2), strict=True):
        for part in adapter.parts:
            state[f"{part.layer}.weight"][part.first : part.end] += weight * part.delta()
    plain.load_state_dict(state)
    torch.testing.assert_close(model(*inputs(config)), plain(*inputs(config)), rtol=1e-4, atol=1e-5)


def test_an_adapter_for_another_model_is_refused_by_name():
    small, large = model_of(PRESETS["sd3"]), model_of(presets.tiny(heads=4))
    adapters.attach(large, Lora(rank=2))
    with pytest.raises(ValueError, match=r"blocks.0.context.attn.qkv has .* rows of 128; the model's has 192 of 64"):
        adapters.load(small, adapters.of_model(large))
    deep = model_of(presets.tiny(depth=3))
    adapters.attach(deep, Lora(rank=2))
    with pytest.raises(ValueError, match=r"the model has no linear layer blocks.1.context.attn.proj"):
        adapters.load(model_of(presets.tiny()), adapters.of_model(deep))


@pytest.mark.parametrize("kind", ("none", "full", "selective"))
def test_compiled_whole_whether_on_or_off(kind):
    from train.engine.parallel import _checkpointed

    config = PRESETS["sd3"]
    model, x = model_of(config), inputs(config)
    adapters.attach(model, Lora(rank=2, targets=("all",)))
    randomised(model)
    expected = model(*x)
    with adapters.off(model):
        base = model(*x)
    for block in model.blocks:
        block.leaves_pending = kind != "full"
        if kind != "none":
            block.forward = _checkpointed(block.forward, kind)
        block.compile(fullgraph=True, backend="aot_eager")
    for _ in range(2):
        out = model(*x)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        out.sum().backward()
        with adapters.off(model), torch.no_grad():
            torch.testing.assert_close(model(*x), base, rtol=1e-4, atol=1e-5)
    assert all(layer.lora_b.grad is not None for _, layer in adapters.layers(model))


def test_no_index_goes_to_the_device():
    """A list of indices would be copied to a GPU at each call, which waits for it and cannot be captured."""
    from torch.utils._python_dispatch import TorchDispatchMode

    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    config = PRESETS["sd35-medium"]
    model, x = model_of(config), inputs(config)
    adapters.attach(model, Lora(rank=2, targets=("all",)))
    with torch.no_grad(), Watch():
        model(*x)
    assert len(seen) > 100 and not [name for name in seen if "index" in name or "lift" in name]


def test_an_adapter_that_does_not_fit_leaves_the_model_as_it_was():
    model = model_of(PRESETS["sd3"])
    deep = model_of(presets.tiny(depth=3))
    adapters.attach(deep, Lora(rank=2))
    with pytest.raises(ValueError, match="has no linear layer"):
        adapters.load(model, adapters.of_model(deep))
    assert not list(adapters.layers(model))
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    own = model_of(PRESETS["sd3"])
    adapters.attach(own, Lora(rank=2))
    adapters.load(model, adapters.of_model(own))
    adapters.remove(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before


def test_other_backbones_are_refused():
    model = MMDiT(presets.tiny(backbone="cross"))
    with pytest.raises(ValueError, match="the backbone is cross; adapters are for joint blocks"):
        adapters.attach(model, Lora(rank=2))
