"""What people do to a model, before and after it is patched and reverted: each order works like the unpatched model."""

import copy
import os
import pickle
import random
from contextlib import ExitStack, nullcontext
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard

import rfkernels
from rfkernels import patch
from rfkernels.patch.swap import Fused
from rfkernels.triton_support import INSTALLED
from tests.rfkernels.test_patch import inputs, made, run

pytest.importorskip("diffusers", reason="diffusers is the reference here")
from diffusers import FirstBlockCacheConfig, LayerSkipConfig
from diffusers.hooks import MagCacheConfig, apply_layer_skip
from diffusers.loaders import FluxIPAdapterMixin
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry, attention_backend
from diffusers.models.attention_processor import PAGJointAttnProcessor2_0

ORDERS = ("apply, do", "do, apply", "apply, do, revert", "do, apply, revert", "apply, revert, do", "apply, do, apply")


@pytest.fixture(autouse=True)
def a_backend_that_shows(monkeypatch):
    """The backend that is asked for gives half of what attention gives: a request that is dropped is seen."""
    usual = _AttentionBackendRegistry._backends[AttentionBackendName.NATIVE]
    half = lambda *given, **named: 0.5 * usual(*given, **named)  # noqa: E731
    monkeypatch.setitem(_AttentionBackendRegistry._backends, AttentionBackendName._NATIVE_MATH, half)
    yield
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def first_block_cache(model):
    model.enable_cache(FirstBlockCacheConfig(threshold=0.0))


def mag_cache(model):
    model.enable_cache(MagCacheConfig(num_inference_steps=4, mag_ratios=[1.0] * 4))


def skip_a_layer(model):
    apply_layer_skip(model, LayerSkipConfig(indices=[0], fqn="transformer_blocks"))


def perturb_attention(model):
    config = LayerSkipConfig(indices=[0], skip_attention=False, skip_attention_scores=True, skip_ff=False)
    apply_layer_skip(model, config)


def ask_for_a_backend(model):
    """For this model: for all of the process, as it also does, it is taken back."""
    model.set_attention_backend("_native_math")
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName.NATIVE)


def ask_and_take_back(model):
    ask_for_a_backend(model)
    model.reset_attention_backend()


def perturb_by_a_processor(model):
    model.transformer_blocks[1].attn.processor = PAGJointAttnProcessor2_0()


def make_processors_anew(model):
    model.set_attn_processor({name: type(p)() for name, p in model.attn_processors.items()})


def fuse_projections(model):
    model.fuse_qkv_projections()


def fuse_and_unfuse(model):
    model.fuse_qkv_projections()
    model.unfuse_qkv_projections()


def checkpoint_activations(model):
    model.enable_gradient_checkpointing()
    model.train()


def nothing(model):
    """What is asked for is asked for in the call."""


def pickled(model):
    return pickle.loads(pickle.dumps(model))


def copied(model):
    return copy.deepcopy(model)


def hooked(*names):
    def halve(model):
        for name in names:
            model.get_submodule(name).register_forward_hook(lambda module, given, out: out * 0.5)

    halve.__name__ = f"halve {', '.join(names)}"
    return halve


def adapter(model):
    torch.manual_seed(5)
    weights = {f"{i}.to_{x}_ip.{y}": torch.randn(32, 24) if y == "weight" else torch.randn(32)
               for i in range(3) for x in "kv" for y in ("weight", "bias")}  # fmt: skip
    image = {"proj.weight": torch.randn(96, 16), "proj.bias": torch.randn(96), "norm.weight": torch.ones(24),
             "norm.bias": torch.zeros(24)}  # fmt: skip
    model._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": weights}], low_cpu_mem_usage=False)


def lora(model):
    peft = pytest.importorskip("peft", reason="peft makes the adapters of diffusers' models")
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["to_q", "to_k", "to_out.0", "add_v_proj", "net.2"],
                                      init_lora_weights=False))  # fmt: skip


def lora_and_away(model):
    lora(model)
    model.delete_adapters("default")


def adapter_and_away(model):
    adapter(model)
    FluxIPAdapterMixin.unload_ip_adapter(SimpleNamespace(transformer=model, safety_checker=None))


HOOKS = {
    "flux": ("transformer_blocks.0.norm1.norm", "transformer_blocks.0.norm2", "single_transformer_blocks.0.norm.norm",
             "norm_out.norm", "transformer_blocks.0.ff.net.0", "transformer_blocks.0.ff.net.1",
             "transformer_blocks.0.attn.norm_q"),
    "qwen": ("transformer_blocks.0.img_norm1", "transformer_blocks.0.img_norm2", "transformer_blocks.0.txt_norm2",
             "transformer_blocks.0.img_mlp.net.0", "transformer_blocks.0.attn.norm_k"),
    "sd35-medium": ("transformer_blocks.0.norm1.norm", "transformer_blocks.0.norm2",
                    "transformer_blocks.0.norm2_context", "transformer_blocks.0.ff.net.0",
                    "transformer_blocks.0.attn2.norm_q"),
}  # fmt: skip
IP = {"joint_attention_kwargs": {"ip_adapter_image_embeds": [torch.ones(2, 1, 16)]}}
CASES = [
    *((name, do, {}) for name in ("flux", "qwen") for do in (first_block_cache, mag_cache, ask_for_a_backend)),
    ("flux", skip_a_layer, {}), ("qwen", perturb_attention, {}),
    *((name, do, {}) for name in ("flux", "sd35-medium") for do in (make_processors_anew, checkpoint_activations)),
    *((name, do, {}) for name in ("flux", "sd35-large") for do in (fuse_projections, fuse_and_unfuse)),
    *((name, do, {}) for name in ("flux", "qwen", "sd35-medium") for do in (pickled, copied)),
    *((name, hooked(where), {}) for name, places in HOOKS.items() for where in places),
    ("flux", adapter, IP), ("flux", adapter_and_away, {}),
    *((name, do, {}) for name in ("flux", "qwen", "sd35-medium") for do in (lora, lora_and_away)),
    *((name, ask_and_take_back, {}) for name in ("flux", "qwen")),
    *((name, perturb_by_a_processor, {}) for name in ("sd3", "sd35-medium")),
    ("sd35-medium", nothing, {"skip_layers": [1]}),
]  # fmt: skip
IDS = [f"{name}-{do.__name__}-{i}" for i, (name, do, _) in enumerate(CASES)]


@torch.no_grad()
def drawn(model, name, more, around=nullcontext):
    """By the kernels where there are any to interpret: what swaps PyTorch's attention is seen by it alone."""
    kernels = INSTALLED and (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1")
    with ExitStack() as stack:
        if kernels:
            stack.enter_context(rfkernels.backend("triton", "joint_attention"))
        stack.enter_context(around())
        if hasattr(model, "cache_context"):
            stack.enter_context(model.cache_context("it"))
        return run(model, name, **more)


def after(name, steps):
    """A model to which that was done: functions of this file, and names of the patch's."""
    model = made(name).eval()
    for step in steps:
        if callable(step):
            model = step(model) or model
        else:
            getattr(patch, step)(model)
    return model


def ordered(name, do, order):
    return after(name, [do if step == "do" else step for step in order.split(", ")])


@pytest.mark.parametrize("number", range(len(CASES)), ids=IDS)
@pytest.mark.parametrize("one", (True, False), ids=("one", "others"))
def test_each_order_works_like_the_unpatched_model(one, number):
    """In the fast tier one of the orders, in turns, in the slow one all others."""
    name, do, more = CASES[number]
    want = drawn(ordered(name, do, "do"), name, more)
    for order in [order for order in ORDERS if (order == ORDERS[number % len(ORDERS)]) == one]:
        model = ordered(name, do, order)
        torch.testing.assert_close(drawn(model, name, more), want, rtol=1e-4, atol=1e-4, msg=lambda m: f"{order}: {m}")  # noqa: B023
        fused = any(isinstance(module, Fused) for module in model.modules())
        assert fused == (not order.endswith("revert") and not order.endswith("revert, do")), order


def two_that_go_together(rng):
    """(model, two actions that it takes one after the other unpatched, what it draws then)"""
    while True:
        name = rng.choice(("flux", "qwen", "sd35-medium"))
        actions = rng.sample([do for of, do, more in CASES if of == name and not more], 2)
        try:
            return name, actions, drawn(after(name, actions), name, {})
        except (AttributeError, ValueError, pickle.PicklingError):           # hooks are not pickled, caches not doubled
            continue


@pytest.mark.parametrize("number", range(96), ids=lambda i: f"{'first' if i < 16 else 'more'}-{i}")
def test_two_changes_and_a_patch_in_any_order(number):
    """It is put on, and in some taken off and put on again, before, between and after them."""
    rng = random.Random(number)
    name, steps, want = two_that_go_together(rng)
    patching = ("apply", "revert", "apply")[: rng.randint(1, 3)]
    places = sorted(rng.randint(0, 2) for _ in patching)
    for moved, (place, step) in enumerate(zip(places, patching, strict=True)):
        steps.insert(place + moved, step)
    model = after(name, steps)
    said = ", ".join(step if isinstance(step, str) else step.__name__ for step in steps)
    torch.testing.assert_close(drawn(model, name, {}), want, rtol=1e-4, atol=1e-4, msg=lambda m: f"{said}: {m}")
    assert any(isinstance(module, Fused) for module in model.modules()) == (patching[-1] == "apply"), said


@pytest.mark.parametrize("name", ("flux", "qwen"))
def test_a_backend_of_all_models_is_taken(name):
    """By `attention_backend`, or as DIFFUSERS_ATTN_BACKEND does when diffusers is imported."""
    want, model = drawn(made(name), name, {}, lambda: attention_backend("_native_math")), made(name)
    plain = drawn(made(name), name, {})
    assert not torch.allclose(want, plain, rtol=1e-2)
    patch.apply(model)
    got = drawn(model, name, {}, lambda: attention_backend("_native_math"))
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(drawn(model, name, {}), plain, rtol=1e-4, atol=1e-4)
    _AttentionBackendRegistry.set_active_backend(AttentionBackendName._NATIVE_MATH)
    torch.testing.assert_close(drawn(model, name, {}), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("flux", "qwen", "sd35-medium"))
@torch.no_grad()
def test_one_timestep_for_a_batch(name):
    given = inputs(name) | {"timestep": torch.tensor([0.3])}
    given |= {} if name == "qwen" else {"pooled_projections": torch.ones(1, 12)}
    given |= {"guidance": torch.tensor([2.0])} if name == "flux" else {}
    model = made(name)
    want = model(**given, return_dict=False)[0]
    patch.apply(model)
    torch.testing.assert_close(model(**given, return_dict=False)[0], want, rtol=1e-4, atol=1e-4)


@pytest.fixture
def mesh(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("order", ORDERS)
def test_sharded_models_keep_their_sharding(order, mesh):
    def shard(model):
        for block in model.transformer_blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)

    want = drawn(made("sd35-large"), "sd35-large", {})
    model = ordered("sd35-large", shard, order)
    torch.testing.assert_close(drawn(model, "sd35-large", {}), want, rtol=1e-4, atol=1e-4)
    blocks = model.transformer_blocks
    assert all(isinstance(block, FSDPModule) for block in (model, *blocks))
    blocks[0].set_requires_gradient_sync(False)
    fused = "revert" not in order
    assert all(isinstance(block, Fused) == fused for block in blocks)
    told = patch.report(model)
    assert (told.replaced if fused else dict(told.left)).get(
        "JointTransformerBlock" if fused else ("JointTransformerBlock", "not patched")
    ) == 3


def test_the_report_says_when_the_own_code_runs():
    model = made("qwen")
    said = "2 QwenDoubleStreamAttnProcessor2_0: fused, its own runs with a text mask"
    assert said in str(patch.apply(model)) and said in str(patch.report(model))
    assert "its own runs with an attention mask" in str(patch.apply(made("flux")))
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]]).bool()
    want = run(made("qwen"), "qwen", encoder_hidden_states_mask=mask)
    torch.testing.assert_close(run(model, "qwen", encoder_hidden_states_mask=mask), want, rtol=1e-4, atol=1e-4)
