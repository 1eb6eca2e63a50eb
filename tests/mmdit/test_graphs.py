"""Replayed forwards, with a capture that runs the forward again: what a GPU does, without one."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from mmdit import MMDiT, flow, presets
from mmdit.encoders import Conditioning
from mmdit.sampling import graphs
from mmdit.sampling.sample import Settings, denoise

B = 3


@pytest.fixture
def model():
    model = MMDiT(presets.tiny())
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


@pytest.fixture
def captures(monkeypatch):
    """How many captures there were; a replay computes on what the captured tensors hold now."""
    made = []

    def recording(forward, device):
        out = forward()
        made.append(out)
        return lambda: out.copy_(forward()), out

    monkeypatch.setattr(graphs, "refusal", lambda model: None)
    monkeypatch.setattr(graphs.Graphs.__init__, "__defaults__", (recording,))
    return made


def draw(model, seed, graph, batch=B, **settings):
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    c = model.config
    texts = [
        Conditioning(normal(batch, 5, c.context_dim), torch.tensor([5, 2, 4])[:batch], normal(batch, c.pooled_dim))
        for _ in range(2)
    ]
    chosen = Settings(steps=4, guidance=3.0, graph=graph, **settings)
    return denoise(model, normal(batch, c.in_channels, 8, 8), *texts, chosen, masked=True)


def test_one_capture_serves_all_batches_texts_and_times_of_a_shape(model, captures):
    for seed in (0, 1, 2):
        assert torch.equal(draw(model, seed, True), draw(model, seed, False))
    assert len(captures) == 1
    assert torch.equal(draw(model, 3, True, batch=2), draw(model, 3, False, batch=2))
    assert len(captures) == 2, "the last, smaller batch"
    skipping = {"skip_blocks": (0,), "skip_from": 0.0, "skip_until": 1.0}
    assert torch.equal(draw(model, 4, True, **skipping), draw(model, 4, False, **skipping))
    assert len(captures) == 3
    for batch in (1, 2, 3):
        draw(model, 5, True, batch=batch)
    assert len(graphs.of(model).captured) <= graphs.KEPT


def test_weights_may_change_in_place_and_are_captured_anew_when_they_move(model, captures):
    draw(model, 0, True)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    assert torch.equal(draw(model, 0, True), draw(model, 0, False)) and len(captures) == 1
    model.double().float()
    assert torch.equal(draw(model, 0, True), draw(model, 0, False)) and len(captures) == 2


def test_what_cannot_be_replayed_is_run(model, monkeypatch):
    assert graphs.refusal(model) == "the model is on cpu"
    assert torch.equal(draw(model, 0, True), draw(model, 0, False))
    handle = model.blocks[0].register_forward_hook(lambda *a: None)
    assert graphs.refusal(model) == "the model has forward hooks"
    handle.remove()
    with FakeTensorMode(), torch.device("cuda"):
        there = MMDiT(model.config)
        assert graphs.refusal(there) is None
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda kind: kind == "cuda")
        assert graphs.refusal(there).startswith("autocast is on")


def test_without_memory_for_graphs_it_samples_all_the_same(model, captures, monkeypatch):
    def full(forward, device):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(graphs.Graphs.__init__, "__defaults__", (full,))
    with pytest.warns(UserWarning, match="no GPU memory for CUDA graphs"):
        got = draw(model, 0, True)
    assert torch.equal(got, draw(model, 0, False)) and not captures


def test_sampling_makes_no_graph_of_gradients_and_asks_the_host_for_times_once(model, monkeypatch):
    calls, original = [], flow.by_name("rf").path.__class__.time
    monkeypatch.setattr(flow.by_name("rf").path.__class__, "time", lambda *a: calls.append(a) or original(*a))
    seen = []
    condition = model.condition
    monkeypatch.setattr(model, "condition", lambda *a: seen.append(condition(*a)) or seen[-1])
    draw(model, 0, False)
    assert len(calls) == 1 and len(seen) == 1 and not seen[0].requires_grad
