"""AdamW with states of few bits: against fp64, its kernel against its definition, shards, and what rounding does."""

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import Shard, distribute_tensor

import rfkernels
from rfkernels.optim import AdamW, launch, native, reference
from rfkernels.optim.reference import BLOCK, Settings, decoded, encoded, noise, to_bf16
from rfkernels.triton_support import INSTALLED

from ..processes import ranks

needs_triton = pytest.mark.skipif(not INSTALLED, reason="Triton is not installed")
SETTINGS = Settings(1e-2, 0.9, 0.99, 1e-8, 0.1, seed=7)


def gradients(shape, steps, seed=0):
    """Of sizes that differ by orders of magnitude from element to element."""
    torch.manual_seed(seed)
    sizes = torch.exp(2 * torch.randn(shape))
    return [sizes * torch.randn(shape) for _ in range(steps)]


def in_fp64(p, grads, settings=SETTINGS):
    p, m, v = p.double(), 0.0, 0.0
    for t, g in enumerate(grads, 1):
        g = g.double()
        m, v = settings.beta1 * m + (1 - settings.beta1) * g, settings.beta2 * v + (1 - settings.beta2) * g * g
        update = (m / (1 - settings.beta1**t)) / ((v / (1 - settings.beta2**t)).sqrt() + settings.eps)
        p = p - settings.lr * settings.weight_decay * p - settings.lr * update
    return p


def taken(run, p, grads, states, **more):
    p = p.clone()
    state = reference.empty_state(p, states)
    for t, g in enumerate(grads, 1):
        run(p, g, state, torch.tensor(float(t)), SETTINGS, **more)
    return p, state


# --- what it computes -------------------------------------------------------------------------------------------------


def test_with_fp32_states_it_is_adamw():
    p, grads = torch.randn(3, 300), gradients((3, 300), 20)
    found, _ = taken(reference.adamw, p, grads, "fp32")
    torch.testing.assert_close(found.double(), in_fp64(p, grads), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("states, tolerance", (("bf16", 0.02), ("int8", 0.2)))
def test_with_few_bits_it_goes_the_same_way(states, tolerance):
    """Relative to the whole way of 100 steps, of gradients of noise that differ by e^4 in a block: 0.18 with 8 bits."""
    p, grads = torch.zeros(4, 600), gradients((4, 600), 100)
    found, _ = taken(reference.adamw, p, grads, states)
    expected = in_fp64(p, grads)
    assert ((found - expected).norm() / expected.norm()).item() < tolerance


def test_rounding_is_unbiased():
    value = torch.rand(1, 512) + 0.5
    steps = [torch.tensor(float(t)) for t in range(4000)]
    drawn = torch.stack([to_bf16(value, noise(t, value.shape, SETTINGS, "weight")).float() for t in steps])
    assert ((drawn.mean(0) - value).abs() / value).max() < 4 * 2.0**-8 / 4000**0.5
    coded = []
    for t in steps:
        code, scale = encoded(value, 127, noise(t, value.shape, SETTINGS, "exp_avg"))
        coded.append(decoded(code, scale, 127))
    assert (torch.stack(coded).mean(0) - value).abs().max() < 4 * 0.05 / 4000**0.5


def test_codes_hold_what_they_say():
    """The largest of a block exactly, others to the width of their step; zeros stay; the last block is shorter."""
    x = torch.randn(3, BLOCK + 40) * torch.logspace(-4, 4, 3)[:, None]
    x[1, :5] = 0
    code, scale = encoded(x, 127, noise(torch.tensor(1.0), x.shape, SETTINGS, "exp_avg"))
    back = decoded(code, scale, 127)
    assert scale.shape == (3, 2) and torch.equal(scale[:, 0], x[:, :BLOCK].abs().amax(1))
    whole = scale.repeat_interleave(BLOCK, 1)[:, : x.shape[1]]
    step = (((code + 1) / 127) ** 4 - ((code - 1).clamp(min=0) / 127) ** 4) * whole
    assert ((back - x.abs()).abs() <= step).all() and not back[1, :5].any()


def test_updates_below_a_digit_of_bf16_add_up():
    """A weight of 1 has steps of 2^-8; 400 updates of 1e-4 are lost by rounding to nearest."""
    p = torch.ones(8, 256, dtype=torch.bfloat16)
    state, settings = reference.empty_state(p, "int8"), Settings(1e-4, 0.9, 0.99, 1e-8, 0.0, seed=1)
    for t in range(1, 401):
        reference.adamw(p, torch.ones(8, 256), state, torch.tensor(float(t)), settings)
    assert p.float().mean().item() == pytest.approx(1 - 0.04, abs=0.002)


def test_an_element_with_tiny_gradients_beside_large_ones_takes_no_leap():
    """Its root is below the smallest code: it is stored as that, never as zero."""
    g = torch.full((1, BLOCK), 1e3)
    g[0, 0] = 1e-6
    p, state = taken(reference.adamw, torch.zeros(1, BLOCK), [g] * 50, "int8")
    assert state["exp_avg_sq"].min() == 1 and p.abs().max() < 0.01 * 50 * 1.3


@pytest.mark.parametrize("found", (0.0, 1.0))
@pytest.mark.parametrize("states", reference.STATES)
def test_gradient_scale_and_a_step_that_is_not_taken(found, states):
    p, (g,) = torch.randn(2, 300), gradients((2, 300), 1)
    layer = nn.Linear(300, 2, bias=False)
    layer.weight.data.copy_(p)
    layer.weight.grad = 4 * g
    optimizer = AdamW(layer.parameters(), lr=1e-2, states=states)
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(found)
    optimizer.step()
    state = optimizer.state[layer.weight]
    assert state["step"].item() == 1 - found
    if found:
        assert torch.equal(layer.weight, p) and not any(value.any() for value in state.values())
    else:
        other = nn.Linear(300, 2, bias=False)
        other.weight.data.copy_(p)
        other.weight.grad = g
        AdamW(other.parameters(), lr=1e-2, states=states).step()
        torch.testing.assert_close(layer.weight, other.weight)


def test_bytes_of_the_states():
    layer = nn.Linear(1024, 512)
    optimizer = AdamW(layer.parameters(), states="int8")
    layer(torch.randn(2, 1024)).sum().backward()
    optimizer.step()
    held = sum(v.numel() * v.element_size() for n, v in optimizer.state[layer.weight].items() if n != "step")
    assert held == layer.weight.numel() * (2 + 2 * 4 / BLOCK)
    assert optimizer.state[layer.bias]["exp_avg"].dtype == torch.float32


def test_a_state_dict_goes_on_where_it_was():
    layers = [nn.Linear(300, 4), nn.Linear(300, 4)]
    layers[1].load_state_dict(layers[0].state_dict())
    optimizers = [AdamW(layer.parameters(), states="int8") for layer in layers]
    for step in range(4):
        if step == 2:
            layers[1].load_state_dict(layers[0].state_dict())
            optimizers[1] = AdamW(layers[1].parameters(), states="int8")
            optimizers[1].load_state_dict(optimizers[0].state_dict())
        for layer, optimizer in zip(layers, optimizers, strict=True):
            torch.manual_seed(step)
            layer(torch.randn(2, 300)).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert torch.equal(layers[0].weight, layers[1].weight)


def test_a_parameter_that_is_no_block_of_memory():
    weight = torch.randn(5, 300)
    parameters = [nn.Parameter(weight.clone()), nn.Parameter(weight.t().contiguous().t())]
    for parameter in parameters:
        torch.manual_seed(0)
        parameter.grad = torch.randn(5, 300)
        AdamW([parameter], lr=0.1, states="int8").step()
    assert not parameters[1].is_contiguous()                        # which the native code leaves to the definition
    torch.testing.assert_close(*parameters, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("wrong", ({"states": "int4"}, {"betas": (1.0, 0.9)}, {"lr": -1.0}, {"eps": 0.0}))
def test_what_cannot_be_meant_is_refused(wrong):
    with pytest.raises(ValueError, match="AdamW: "):
        AdamW(nn.Linear(2, 2).parameters(), **wrong)


# --- the kernel -------------------------------------------------------------------------------------------------------


@needs_triton
@pytest.mark.parametrize("weight", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("states", reference.STATES)
@pytest.mark.parametrize("shape", ((3, 300), (1, 1), (5, 256)), ids=str)
def test_the_kernel_is_the_definition(shape, states, weight, on_device):
    """Scales to an ulp, of the root; codes to one that an ulp moves; weights to the powers in the bias correction."""
    p, grads = torch.randn(shape).to(weight), gradients(shape, 3)
    more = {"grad_scale": torch.tensor(2.0), "found_inf": torch.tensor(0.0)}
    (ours, state), (theirs, wanted) = (taken(run, p, grads, states, **more) for run in (launch.adamw, reference.adamw))
    for name, value in wanted.items():
        torch.testing.assert_close(state[name].float(), value.float(), rtol=1e-6, atol=1)
        assert "scale" in name or (state[name] == value).float().mean() > 0.998
        if "scale" in name:
            torch.testing.assert_close(state[name], value, rtol=3e-7, atol=0)
    ulp = 1e-6 if weight == torch.float32 else 2.0**-7
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=ulp, atol=1e-7)
    assert (ours == theirs).float().mean() > 0.9


@needs_triton
def test_one_launch_takes_parameters_of_all_kinds(on_device):
    """Matrices of which some rows are not whole blocks or 16 bytes, large ones, vectors; bits as one by one."""
    shapes = ((40, 256), (3, 300), (7, 1), (4100, 1), (2, 9000), (0, 8), (5, 512))
    settings = [Settings(1e-2, 0.9, 0.99, 1e-8, 0.1, seed=i, first_row=5 * i) for i in range(len(shapes))]
    updates, alone = [], []
    for shape, own in zip(shapes, settings, strict=True):
        p, (g,) = torch.randn(shape).bfloat16(), gradients(shape, 1)
        for into in (updates, alone):
            state = reference.empty_state(p, "int8" if shape[1] > 1 else "fp32")
            into.append(launch.Update(p.clone(), g.bfloat16(), state, torch.tensor(1.0), own))
    launch.adamw_all(updates)
    for one, other in zip(updates, alone, strict=True):
        reference.adamw(*other)
        torch.testing.assert_close(one.parameter.float(), other.parameter.float(), rtol=2.0**-7, atol=1e-7)
        assert (one.parameter == other.parameter).float().mean().nan_to_num(1) > 0.99
        for name, value in one.state.items():
            if name.endswith("scale"):
                torch.testing.assert_close(value, other.state[name], rtol=3e-7, atol=0)
            else:
                assert (value == other.state[name]).float().mean().nan_to_num(1) > 0.98


@needs_triton
def test_the_kernel_leaves_everything_where_found_inf_is_1(on_device):
    p, grads = torch.randn(2, 300), gradients((2, 300), 1)
    found, state = taken(launch.adamw, p, grads, "int8", found_inf=torch.tensor(1.0))
    assert torch.equal(found, p) and not any(value.any() for value in state.values())


# --- the native code --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("states", reference.STATES)
@pytest.mark.parametrize("shape", ((3, 700), (1, 1), (5, 256), (0, 8)), ids=str)
def test_the_native_code_is_the_definition(shape, states, weight, instructions):
    """Of one step all bits but those of roots, where PyTorch's are not exact: scales of v to an ulp, and weights to
    that of the update."""
    p, grads = torch.randn(shape).to(weight), gradients(shape, 1)
    more = {"grad_scale": torch.tensor(3.0), "found_inf": torch.tensor(0.0)}
    (ours, state), (theirs, wanted) = (taken(run, p, grads, states, **more) for run in (native.adamw, reference.adamw))
    for name, value in wanted.items():
        if name == "exp_avg_sq_scale":
            torch.testing.assert_close(state[name], value, rtol=2e-7, atol=0)
        else:
            assert (state[name] == value).float().mean().nan_to_num(1) > (0.998 if states == "int8" else 0.999999)
    torch.testing.assert_close(ours.float(), theirs.float(), rtol=2e-7 if weight == torch.float32 else 0, atol=1e-9)


def test_the_native_code_goes_the_same_way(instructions):
    p, grads = torch.randn(4, 600), gradients((4, 600), 50)
    (ours, _), (theirs, _) = (taken(run, p, grads, "int8") for run in (native.adamw, reference.adamw))
    expected = in_fp64(p, grads)
    assert ((ours - p).norm() / (theirs - p).norm()).item() == pytest.approx(1, abs=0.01)
    assert ((ours - expected).norm() / (expected - p).norm()).item() < 0.2


def test_which_implementation_takes_a_step(monkeypatch):
    """On a CPU the native code, where it is built and nothing else is forced; the definition for odd dtypes."""
    runs = []
    for module in (native, reference):
        run = module.adamw
        monkeypatch.setattr(module, "adamw", lambda *a, run=run, name=module.__name__: (runs.append(name), run(*a)))

    def step(dtype=torch.float32):
        parameter = nn.Parameter(torch.randn(4, 8, dtype=dtype))
        parameter.grad = torch.randn(4, 8, dtype=dtype)
        AdamW([parameter]).step()

    step()
    with rfkernels.backend("reference"):
        step()
    step(torch.float16)
    built = "reference" if rfkernels.native.missing() else "native"
    assert [name.rpartition(".")[2] for name in runs] == [built, "reference", "reference"]
    with rfkernels.backend("triton"), pytest.raises(RuntimeError, match="'triton' was forced but the parameter is on"):
        step()
    with rfkernels.backend("native"), pytest.raises(RuntimeError, match="'native' was forced but"):
        step(torch.float16)


def test_a_backward_through_changed_weights_is_refused():
    """Autograd sees the step, whatever took it."""
    weight = nn.Parameter(torch.randn(4, 8))
    x = torch.randn(3, 4, requires_grad=True)
    y = (x @ weight).sum()
    y.backward(retain_graph=True)
    AdamW([weight]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_what_is_not_finite_shows_in_the_scale_of_its_block_alone(bad, instructions):
    p, g = torch.zeros(1, 2 * BLOCK), torch.ones(1, 2 * BLOCK)
    g[0, 3] = bad
    found, state = taken(native.adamw, p, [g], "int8")
    assert not state["exp_avg_scale"][0, 0].isfinite() and state["exp_avg_scale"][0, 1].isfinite()
    assert found[0, BLOCK:].isfinite().all() and not found[0, 3].isfinite()


# --- shards -----------------------------------------------------------------------------------------------------------


def shards(out):
    dist.init_process_group("gloo")
    mesh = dist.init_device_mesh("cpu", (dist.get_world_size(),))
    torch.manual_seed(0)
    layers = [torch.randn(7, 300), torch.randn(10), torch.randn(4, 5, 60).bfloat16(), torch.randn(1, 40)]
    parameters = [nn.Parameter(distribute_tensor(p, mesh, [Shard(0)])) for p in layers]
    optimizer = AdamW(parameters, lr=1e-2, states="int8", seed=3)
    for step in range(3):
        torch.manual_seed(step)
        for parameter in parameters:
            gradient = torch.randn(parameter.shape).to(parameter.dtype)
            parameter.grad = distribute_tensor(gradient, mesh, [Shard(0)])
        optimizer.step()
    found = [parameter.full_tensor().detach() for parameter in parameters]
    found += [value.full_tensor() for p in parameters for n, value in optimizer.state[p].items() if n != "step"]
    if dist.get_rank() == 0:
        torch.save(found, out)
    dist.destroy_process_group()


def test_shards_have_the_bits_of_the_whole(tmp_path):
    results = []
    for size in (1, 2, 4):
        out = tmp_path / f"{size}.pt"
        assert ranks(shards, (out,), size).wait() == 0
        results.append(torch.load(out, weights_only=True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
