"""What people change inside a patched model, before and after `apply`: it is called, or its op steps back."""

import threading
from types import MethodType

import pytest
import torch
from torch import nn

from rfkernels import patch
from rfkernels.patch import processors

from .test_patch import made, outputs, run

pytest.importorskip("diffusers", reason="diffusers is the reference here")
FUSED = ("sd35-medium", "flux", "qwen")


def feed_forward(model, name):
    return model.transformer_blocks[0].img_mlp if name == "qwen" else model.transformer_blocks[0].ff


def norm_with_weight(model, name):
    new = nn.LayerNorm(32, eps=1e-6)
    torch.manual_seed(5)
    nn.init.normal_(new.weight)
    setattr(model.transformer_blocks[0], "img_norm2" if name == "qwen" else "norm2", new)


def rms_norm(model, name):
    new = nn.RMSNorm(32, eps=1e-6, elementwise_affine=False)
    setattr(model.transformer_blocks[0], "img_norm2" if name == "qwen" else "norm2", new)


def exact_gelu(model, name):
    feed_forward(model, name).net[0].approximate = "none"


def tanh_at_the_end(model, name):
    feed_forward(model, name).net.append(nn.Tanh())


def tanh_for_dropout(model, name):
    feed_forward(model, name).net[1] = nn.Tanh()


def identity_for_dropout(model, name):
    feed_forward(model, name).net[1] = nn.Identity()
    model.train()


def hook_on_a_norms_gradient(model, name):
    model.transformer_blocks[0].attn.norm_q.register_full_backward_hook(lambda _, gi, go: tuple(g * 0.5 for g in gi))


def hook_that_changes_in_place(model, name):
    feed_forward(model, name).register_forward_hook(lambda _, args, out: out.mul_(0.5))


CHANGES = (norm_with_weight, rms_norm, exact_gelu, tanh_at_the_end, tanh_for_dropout, identity_for_dropout,
           hook_on_a_norms_gradient, hook_that_changes_in_place)  # fmt: skip


@pytest.mark.parametrize("order", ("before", "after"))
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", FUSED)
def test_a_change_has_the_effect_that_it_has_unpatched(name, change, order):
    want, got = made(name), made(name)
    change(want, name)
    if order == "before":
        change(got, name)
    patch.apply(got)
    if order == "after":
        change(got, name)
    exact = outputs(want, name, torch.float32)
    for key, value in outputs(got, name, torch.float32).items():
        torch.testing.assert_close(value, exact[key], rtol=1e-3, atol=2e-4 * float(exact[key].abs().max()), msg=key)


@pytest.mark.parametrize("name", FUSED)
def test_dropout_that_acts_in_a_model_that_does_not_train_acts(name):
    model = made(name).eval()
    patch.apply(model)
    dropout = feed_forward(model, name).net[1]
    dropout.p = 0.5
    plain = run(model, name)
    dropout.train()
    assert (run(model, name) - plain).abs().max() > 0.01 * plain.abs().max()


@pytest.mark.parametrize("name", FUSED)
def test_a_hook_that_was_taken_away_leaves_nothing(name, taken):
    """accelerate and diffusers leave a forward in the instance."""
    model = made(name)
    before = run(model, name)
    blocks = model.transformer_blocks[0], feed_forward(model, name)
    patch.apply(model)
    for module in blocks:
        module.forward = MethodType(type(module).forward, module)
    patch.revert(model)
    taken.clear()
    assert torch.equal(run(model, name), before) and not taken
    assert not any("forward" in module.__dict__ for module in blocks)
    for module in blocks:
        module.forward = MethodType(type(module).forward, module)
    patch.apply(model)
    run(model, name)
    assert taken["gelu_mlp"] and taken["gated_adaln"]


def test_heads_that_were_pruned():
    want, got = made("sd35-medium"), made("sd35-medium")
    patch.apply(got)
    for model in (want, got):
        attn = model.transformer_blocks[0].attn
        attn.heads = 1
        for layer in (attn.to_q, attn.to_k, attn.to_v, attn.add_q_proj, attn.add_k_proj, attn.add_v_proj):
            layer.weight, layer.bias = nn.Parameter(layer.weight[:16]), nn.Parameter(layer.bias[:16])
        for layer in (attn.to_out[0], attn.to_add_out):
            layer.weight = nn.Parameter(layer.weight[:, :16])
    torch.testing.assert_close(run(got, "sd35-medium"), run(want, "sd35-medium"), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_who_watches_the_last_text_sees_it():
    model, seen = made("sd35-medium"), []
    patch.apply(model)
    attn = model.transformer_blocks[-1].attn
    attn.register_forward_hook(lambda _, args, out: seen.append(tuple(t * 0.5 for t in out)))
    attn.add_q_proj.register_forward_hook(lambda *_: seen.append("asked"))
    run(model, "sd35-medium")
    assert seen[0] == "asked" and len(seen[1]) == 2


def test_text_is_projected_before_the_picture():
    """As diffusers does it: dropout of an adapter draws in that order."""
    model, order = made("sd35-medium"), []
    attn = model.transformer_blocks[0].attn
    attn.to_out[0].register_forward_hook(lambda *_: order.append("picture"))
    attn.to_add_out.register_forward_hook(lambda *_: order.append("text"))
    run(model, "sd35-medium")
    patch.apply(model)
    run(model, "sd35-medium")
    assert order[:2] == order[2:]


def test_rotary_tables_are_those_that_were_given():
    tables = processors._Tables()
    cos, sin = torch.randn(6, 8), torch.randn(6, 8)
    kept = tables(cos, sin)
    assert tables(cos, sin)[0] is kept[0]
    with torch.inference_mode():
        tables(cos, sin)
    assert not tables(cos, sin)[0].is_inference()
    cos.mul_(2)
    assert torch.equal(tables(cos, sin)[0], cos[:, ::2])
    other = torch.randn(6, 8)
    assert torch.equal(tables(cos, other)[1], other[:, ::2])


def test_rotary_tables_of_two_threads_are_not_mixed():
    tables, first, second = processors._Tables(), torch.randn(6, 8), torch.randn(6, 8)
    wrong = []

    def ask(table):
        for _ in range(3000):
            if not torch.equal(tables(table, table)[0], table[:, ::2]):
                wrong.append(table)

    threads = [threading.Thread(target=ask, args=(table,)) for table in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_class_whose_forward_was_replaced_is_left(monkeypatch):
    from diffusers.models.attention import FeedForward

    own = FeedForward.forward
    monkeypatch.setattr(FeedForward, "forward", lambda self, hidden_states, *args, **kwargs: own(self, hidden_states))
    assert "FeedForward: left, its forward was replaced or wrapped by somebody" in str(patch.apply(made("flux")))
    monkeypatch.setattr(FeedForward, "forward", torch.compiler.disable(own))
    assert "FeedForward: left, its forward was replaced or wrapped by somebody" in str(patch.apply(made("flux")))


def test_a_report_says_what_runs_now():
    model = made("flux")
    feed_forward(model, "flux").net[2].register_forward_hook(lambda *_: None)
    model.transformer_blocks[0].norm1.norm.register_forward_hook(lambda *_: None)
    model.set_attention_backend("native")
    for found in (patch.apply(model), patch.report(model)):
        assert "1 FeedForward: left, its layers are adapted, hooked or no plain weights" in str(found)
        assert "1 AdaLayerNormZero: left, its norm has hooks" in str(found)
        assert "3 FluxAttnProcessor: left, another attention was asked for" in str(found)
    model.reset_attention_backend()
    assert "3 FluxAttnProcessor: fused" in str(patch.report(model))


@pytest.mark.parametrize(
    "change, said",
    [
        (rms_norm, "FluxTransformerBlock: left, its norm is a RMSNorm"),
        (norm_with_weight, "FluxTransformerBlock: left, its norm has a weight"),
        (exact_gelu, "FeedForward: left, its activation is GELU"),
        (tanh_at_the_end, "FeedForward: left, it has 4 parts"),
        (tanh_for_dropout, "FeedForward: left, where dropout stands it has a Tanh"),
    ],
)
def test_a_report_says_what_a_change_did(change, said):
    model = made("flux")
    patch.apply(model)
    change(model, "flux")
    assert said in str(patch.report(model))


def test_a_class_made_from_one_that_is_known_is_named():
    model = made("flux")
    block = model.transformer_blocks[0]
    block.__class__ = type("Mine", (type(block),), {})
    assert "1 Mine: left, it is made from FluxTransformerBlock" in str(patch.apply(model))
