"""The paper's 61 formulations, against closed forms written down here."""

import math
from functools import cache

import numpy as np
import pytest
import torch
from scipy import stats

from mmdit import flow, keyed
from mmdit.flow import FORMULATIONS, by_name

PRINTED = (
    "rf/lognorm(0.00,1.00)", "rf/lognorm(1.00,0.60)", "rf/lognorm(0.50,0.60)", "rf/mode(1.29)",
    "rf/lognorm(0.50,1.00)", "eps/linear", "rf/mode(1.75)",
    "rf/cosmap", "edm(0.00,0.60)", "rf", "v/linear", "edm(0.60,1.20)", "v/cos", "edm/cos",
    "edm/rf", "edm(-1.20,1.20)", "rf/lognorm(-0.50,1.00)",
)  # fmt: skip
EACH = pytest.mark.parametrize("name", FORMULATIONS)
T = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)


def family(name):
    """(kind, arguments)."""
    kind, _, arguments = name.partition("(")
    return kind, [float(a) for a in arguments.rstrip(")").split(",")] if arguments else []


def process(name, t):
    """a and b of the paper's forward process, as functions of t."""
    kind, arguments = family(name)
    if kind.startswith("rf"):
        return 1 - t, t
    if kind.endswith("/cos") and not kind.startswith("edm"):
        return torch.cos(math.pi / 2 * t), torch.sin(math.pi / 2 * t)
    if kind.endswith("/linear"):                                           # the product of a thousand steps, in between
        betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
        log_a = np.concatenate([[0.0], np.cumsum(np.log(1 - betas)) / 2])
        a = torch.from_numpy(np.exp(np.interp(t.numpy() * 1000, np.arange(1001), log_a)))
        return a, (1 - a**2).sqrt()
    sigma = {"edm/rf": lambda: t / (1 - t), "edm/cos": lambda: torch.tan(math.pi / 2 * t)}.get(
        kind, lambda: torch.from_numpy(np.exp(stats.norm.ppf(t.numpy(), *arguments)))
    )()
    return torch.ones_like(t), sigma


def output(name, a, b, x0, noise):
    """What the network should say."""
    kind, z = family(name)[0], a * x0 + b * noise
    if kind.startswith("rf"):
        return noise - x0
    if kind.startswith("eps"):
        return noise
    if kind.startswith("v"):
        return a * noise - b * x0
    skip, out = 0.25 / (b**2 + 0.25), b * 0.5 / (b**2 + 0.25).sqrt()
    return (x0 - skip * z) / out


def common(name, t):
    """(w_t of the paper times a constant, the constant) where the paper states w_t."""
    kind, arguments = family(name)
    a, b = process(name, t)
    log_snr = 2 * (a / b).log()
    if kind.startswith("rf"):
        return t / (1 - t) * FORMULATIONS[name].density.pdf(t), 1.0
    if kind == "edm":
        normal = torch.from_numpy(stats.norm.pdf(log_snr.numpy(), -2 * arguments[0], 2 * arguments[1]))
        return normal * (torch.exp(-log_snr) + 0.5**2), 8.0
    if kind == "eps/cos":
        return 1 / torch.cosh(log_snr / 2), 1 / math.pi
    if kind == "v/cos":
        return torch.exp(-log_snr / 2), 2 / math.pi
    return None, 0.0


def test_there_are_61_and_all_that_the_tables_print():
    assert len(FORMULATIONS) == 61
    assert set(PRINTED) <= FORMULATIONS.keys()
    assert sum(name.startswith("rf/lognorm") for name in FORMULATIONS) == 30
    assert sum(name.startswith("edm(") for name in FORMULATIONS) == 15
    assert by_name("rf").density.pdf(T).allclose(by_name("rf/mode(0)").density.pdf(T))


@EACH
def test_forward_process_and_target_are_the_papers(name):
    made, rng = FORMULATIONS[name], np.random.default_rng(0)
    a, b = process(name, T)
    # LDM's steps are discrete: the path between them and through them differ in the third digit of b near t = 0
    tolerance = {"rtol": 2e-3, "atol": 0} if name.endswith("linear") else {"rtol": 1e-9, "atol": 0}
    torch.testing.assert_close(made.path.a(T), a, **tolerance)
    torch.testing.assert_close(made.path.b(T), b, **tolerance)
    torch.testing.assert_close(made.path.log_snr(T), 2 * (a / b).log(), rtol=1e-6, atol=5e-3 if "lin" in name else 1e-9)
    a, b = made.path.a(T), made.path.b(T)
    x0, noise = torch.from_numpy(rng.standard_normal((2, len(T))))
    read, target = made.training_pair(x0[:, None], noise[:, None], T)
    torch.testing.assert_close(target[:, 0], output(name, a, b, x0, noise), rtol=1e-9, atol=1e-12)
    length = (b**2 + 0.25).sqrt() if name.startswith("edm") else 1.0
    torch.testing.assert_close(read[:, 0], (a * x0 + b * noise) / length, rtol=1e-9, atol=1e-12)


@EACH
def test_slopes_are_derivatives(name):
    path, h = FORMULATIONS[name].path, 1e-6
    for value, slope in ((path.a, path.da), (path.b, path.db), (path.log_snr, path.slope)):
        numeric = (value(T + h) - value(T - h)) / (2 * h)
        torch.testing.assert_close(slope(T), numeric, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(path.time(path.straight_time(T)), T, rtol=0, atol=1e-9)


@EACH
def test_the_loss_is_the_common_form(name):
    """-1/2 w_t lambda' |noise_theta - noise|^2 at every time, for a network that says what follows from noise_theta."""
    made, rng = FORMULATIONS[name], np.random.default_rng(1)
    a, b = made.path.a(T), made.path.b(T)
    x0, noise, error = torch.from_numpy(rng.standard_normal((3, len(T))))
    z, guessed = a * x0 + b * noise, noise + error
    said = output(name, a, b, (z - b * guessed) / a, guessed)
    _, target = made.training_pair(x0[:, None], noise[:, None], T)
    own = torch.stack([made.loss(said[i, None, None], target[i, None], T[i, None]) for i in range(len(T))]).double()
    own = own * made.density.pdf(T)                                          # the common form's times are uniform
    w = made.common_weight(T)
    torch.testing.assert_close(own, -w * made.path.slope(T) * error**2 / 2, rtol=1e-5, atol=1e-9)
    paper, constant = common(name, T)
    if paper is not None:
        torch.testing.assert_close(w, constant * paper, rtol=1e-6, atol=0)


@EACH
def test_times_follow_their_distribution(name):
    """Kolmogorov-Smirnov, of what is named in the paper: t for rf, lambda for the others."""
    made = FORMULATIONS[name]
    t = made.density.sample(keyed.uniforms(4000, 0, "ks", [(0,)])[0])
    kind, arguments = family(name)
    log_snr = made.path.log_snr(t).numpy()
    if kind == "rf/lognorm":
        found = stats.kstest(torch.logit(t).numpy(), "norm", args=tuple(arguments))
    elif kind == "edm":
        found = stats.kstest(log_snr, "norm", args=(-2 * arguments[0], 2 * arguments[1]))
    elif kind in ("rf", "edm/rf"):
        found = stats.kstest(log_snr / 2, "logistic")
    elif kind in ("rf/cosmap", "edm/cos", "v/cos", "eps/cos"):
        found = stats.kstest(log_snr / 2, lambda x: 1 - 2 / np.pi * np.arctan(np.exp(-x)))
    elif kind == "rf/mode":                                                  # u falls with t: F(t) = 1 - u(t)
        u = np.linspace(0, 1, 20_001)
        ts = 1 - u - arguments[0] * (np.cos(np.pi / 2 * u) ** 2 - 1 + u)
        found = stats.kstest(t.numpy(), lambda x: np.interp(x, ts[::-1], 1 - u[::-1]))
    else:
        found = stats.kstest(t.numpy(), "uniform")
    assert found.pvalue > 0.01, found


@EACH
def test_nothing_is_infinite_at_the_ends(name):
    made = FORMULATIONS[name]
    t = torch.tensor([0.0, 1e-12, 1e-6, 1 - 1e-6, 1 - 1e-12, 1.0], dtype=torch.float64)
    for at in (t, t.float()):
        read, target = made.training_pair(torch.ones(6, 1), torch.ones(6, 1), at)
        assert read.isfinite().all() and target.isfinite().all() and target.abs().max() < 3
        if not name.startswith("eps"):
            assert made.velocity(torch.ones(6, 1), torch.ones(6, 1), at).isfinite().all()
    ts = made.times(50)
    assert ts[-1] == 0 and (ts.diff() < 0).all() and len(ts) == 51 and ts[0] > 0.9
    own = made.path.time(ts[:1])
    assert made.velocity(torch.ones(1, 1), torch.ones(1, 1), own).abs() < 100


MEANS, DEVIATIONS, SHARES = torch.tensor([-1.0, 0.6]), torch.tensor([0.2, 0.4]), torch.tensor([0.3, 0.7])


def exact(name, made):
    """The straight path's velocity through the formulation's own output, for a mixture of two Gaussians: the network
    that minimises the loss, in closed form."""
    def velocity(point, straight):
        t = made.path.time(torch.full((len(point),), straight, dtype=torch.float64))
        a, b = 1 - straight, straight
        variance = a**2 * DEVIATIONS.double() ** 2 + b**2
        log_weight = SHARES.double().log() - (point - a * MEANS) ** 2 / (2 * variance) - variance.log() / 2
        weight = log_weight.softmax(-1)
        x0 = (weight * (MEANS + a * DEVIATIONS**2 / variance * (point - a * MEANS))).sum(-1, keepdim=True)
        noise = (point - a * x0) / b
        own_a, own_b = made.path.a(t), made.path.b(t)
        last = bool(own_b.isinf().any())                                             # of EDM's times: F = x0 / 0.5
        said = 2 * x0 if last else output(name, own_a[:, None], own_b[:, None], x0, noise)
        return made.velocity(said, point, t)

    return velocity


@cache
def fine_solution():
    """(noise, the data it becomes)"""
    noise, made = torch.from_numpy(stats.norm.ppf((np.arange(400) + 0.5) / 400))[:, None], by_name("rf")
    return noise, flow.heun(exact("rf", made), noise, made.times(800)).sort(0).values


@EACH
def test_euler_recovers_a_mixture_of_gaussians(name):
    """With the exact output the error against a fine solution falls with the steps, and what comes is the mixture."""
    made = FORMULATIONS[name]
    noise, truth = fine_solution()
    errors = []
    for steps in (25, 100, 400):
        ts = made.times(steps)
        drawn = flow.euler(exact(name, made), noise * float(ts[0]), ts)
        errors.append((drawn - truth).abs().mean().item())
    # quantiles of a narrow normal leave the first and the last step large: 0.13 and 0.10 are the worst measured, of
    # edm(1.20,0.60); of all others 0.016 and 0.013
    limits = (0.14, 0.11) if name.startswith("edm") and name.endswith("0.60)") else (0.02, 0.02)
    assert errors[0] > errors[1] > errors[2] and errors[2] < limits[0], errors
    mixture = lambda x: sum(  # noqa: E731
        float(w) * stats.norm.cdf(x, float(m), float(s)) for w, m, s in zip(SHARES, MEANS, DEVIATIONS, strict=True)
    )
    assert stats.kstest(drawn[:, 0].numpy(), mixture).statistic < limits[1]


def test_names_say_what_is_wrong():
    for bad in ("rf/lognorm", "rf/lognorm(1)", "rf/normal(0,1)", "edm", "edm(0,0)", "eps", "v/rf", "edm/linear"):
        with pytest.raises(ValueError, match=r"formulation|std"):
            by_name(bad)
    assert by_name("x/lognorm(1,1)", shift=3.0).density == flow.Shifted(flow.LogitNormal(1, 1), 3.0)


def test_data_is_predicted_under_the_velocitys_loss():
    x0, noise = torch.randn(2, 8, 3, 4, 4).double()
    t = torch.linspace(0.1, 1, 8).double()
    data, plain = by_name("x/mode(1.29)"), by_name("rf/mode(1.29)")
    z, target = data.training_pair(x0, noise, t)
    assert torch.equal(target, x0) and torch.allclose(z, plain.training_pair(x0, noise, t)[0])
    said = x0 + torch.randn_like(x0)
    velocity = data.velocity(said, z, t)
    want = (velocity - (noise - x0)).square().mean()
    assert data.loss(said.float(), target.float(), t.float()) == pytest.approx(float(want), rel=1e-4)
    assert data.weighting.weight(data.path, torch.tensor([0.01, 0.1])).tolist() == pytest.approx([100, 100])


def test_converting_says_what_other_layouts_do_not_know():
    from mmdit.checkpoint.report import left_behind

    assert not left_behind({}) and not left_behind({"formulation": "rf/mode(1.29)", "autoencoder": {"kind": "pixels"}})
    data, scaled = left_behind({"formulation": "x/lognorm(1,1)", "autoencoder": {"kind": "unit"}})
    assert "trained as x/lognorm(1,1)" in data and "unit size" in scaled


def test_shifts_are_for_rectified_flow():
    with pytest.raises(ValueError, match="training times are shifted for rf and x only"):
        by_name("v/cos", shift=3.0)
