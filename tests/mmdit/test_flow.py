import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from mmdit import flow, keyed
from mmdit.flow import CosMap, LogitNormal, Mode, RectifiedFlow, Shifted, Uniform, Velocity, by_name

DENSITIES = {
    "uniform": Uniform(),
    "lognorm(0,1)": LogitNormal(),
    "lognorm(-0.5,0.6)": LogitNormal(-0.5, 0.6),
    "lognorm(1,2.2)": LogitNormal(1.0, 2.2),
    "mode(1.29)": Mode(1.29),
    "mode(1.75)": Mode(1.75),
    "mode(-1)": Mode(-1.0),
    "cosmap": CosMap(),
    "shifted": Shifted(LogitNormal(), 3.0),
    "shifted-uniform": Shifted(Uniform(), 3.0),
}


def cdf(density, points):
    """The integral of pdf from 0 up to each point, by Simpson's rule in logit space, with points crowded around
    t = 1/2, where mode(1.75) comes close to a pole."""
    x = 1e-3 * torch.sinh(torch.linspace(-10.8, 10.8, 200_001, dtype=torch.float64))
    t = torch.sigmoid(x)
    values = (density.pdf(t) * t * torch.sigmoid(-x)).numpy()
    total = integrate.cumulative_simpson(values, x=x.numpy(), initial=0)
    return torch.from_numpy(np.interp(np.asarray(points), t.numpy(), total))


@pytest.mark.parametrize("name", DENSITIES)
def test_density_integrates_to_one(name):
    # mode(-1) is flat at u = 0 and 1, so its density has integrable poles at t = 1 and 0
    tolerance = 1e-3 if name == "mode(-1)" else 1e-6
    assert float(cdf(DENSITIES[name], [1.0])[0]) == pytest.approx(1, abs=tolerance)


@pytest.mark.parametrize("name", DENSITIES)
def test_samples_follow_the_density(name):
    """Kolmogorov-Smirnov distance of 4000 samples to the integral of pdf; 1.63/sqrt(n) is the 1 % level."""
    density = DENSITIES[name]
    t = density.sample(keyed.uniforms(4000, 0, "ks", [(0,)])[0]).sort().values
    assert ((t >= 0) & (t <= 1)).all()
    steps = torch.arange(1, 4001, dtype=torch.float64) / 4000
    assert (cdf(density, t) - steps).abs().max() < 1.63 / math.sqrt(4000)


def test_logit_normal_against_scipy():
    t = LogitNormal(0.5, 0.6).sample(keyed.uniforms(4000, 1, "ks", [(0,)])[0])
    assert stats.kstest(torch.logit(t).numpy(), "norm", args=(0.5, 0.6)).pvalue > 0.01
    assert t.median() > 0.5, "a positive mean favours noise, t -> 1"


def test_cosmap_has_the_log_snr_of_the_cosine_schedule():
    u = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    cosine = 2 * (torch.cos(math.pi / 2 * u).log() - torch.sin(math.pi / 2 * u).log())
    torch.testing.assert_close(RectifiedFlow().log_snr(CosMap().sample(u)), cosine)


def test_shift_moves_the_log_snr():
    t, alpha = torch.linspace(0.01, 0.99, 50, dtype=torch.float64), 3.0
    path = RectifiedFlow()
    torch.testing.assert_close(path.log_snr(flow.shift_time(t, alpha)), path.log_snr(t) - 2 * math.log(alpha))


def test_mode_refuses_scales_where_the_map_turns_back():
    Mode(2 / (math.pi - 2))
    for scale in (-1.01, 1.76):
        with pytest.raises(ValueError, match="monotone only in"):
            Mode(scale)


def test_velocity_is_the_derivative_of_the_path():
    x0, noise = torch.randn(2, 3, 4, dtype=torch.float64)
    t = torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64, requires_grad=True)
    path = RectifiedFlow()
    z = path.a(t)[:, None] * x0 + path.b(t)[:, None] * noise
    slope = torch.stack([torch.autograd.grad(z[:, i].sum(), t, retain_graph=True)[0] for i in range(4)], 1)
    p, q = Velocity().coefficients(path, t.detach())
    torch.testing.assert_close(p[:, None] * x0 + q[:, None] * noise, slope)
    pair = by_name("rf").training_pair(x0, noise, t.detach())
    torch.testing.assert_close(pair, (z.detach(), slope))


def test_names():
    assert by_name("rf").density == Uniform()
    assert by_name("rf/lognorm(0.00,1.00)").density == LogitNormal()
    assert by_name("rf/mode(1.29)").density == Mode(1.29)
    assert by_name("rf/cosmap", shift=3.0).density == Shifted(CosMap(), 3.0)
    for bad in ("rf/lognorm", "rf/lognorm(1)", "rf/normal(0,1)", "edm", "rf/mode(x)", "rf/lognorm(0,0)"):
        with pytest.raises(ValueError, match=r"formulation|std"):
            by_name(bad)


@pytest.mark.parametrize("shift", (1.0, 3.0))
def test_euler_recovers_a_gaussian(shift):
    """Data N(2, 0.5^2) has a closed-form velocity; Euler's error falls with the step count."""
    mean, std = 2.0, 0.5
    velocity = gaussian_velocity(mean, std)
    noise = torch.linspace(-2, 2, 9)[:, None]
    exact = mean + std * noise
    errors = [
        (flow.euler(velocity, noise, flow.times(n, shift)) - exact).abs().max().item() for n in (8, 32, 128, 512)
    ]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.02


def gaussian_velocity(mean, std):
    """dz/dt of the straight path from N(mean, std^2) to noise, in closed form."""
    def velocity(z, t):
        var = (1 - t) ** 2 * std**2 + t**2
        return (t - (1 - t) * std**2) / var * (z - (1 - t) * mean) - mean

    return velocity


@pytest.mark.parametrize(
    "solver, schedule, order",
    [("euler", "paper", 1), ("euler", "sd3_release", 1), ("heun", "paper", 2), ("heun", "sd3_release", 2),
     ("dpmpp_2m", "sd3_release", 2), ("dpmpp_2m", "paper", 1)],
)  # fmt: skip
def test_the_order_of_each_solver(solver, schedule, order):
    """Four times the steps: the error of a first-order method falls by 4, of a second-order one by 16. The steps of the
    paper's schedule never become small in log t, which costs DPM-Solver++ its order at the end."""
    mean, std, noise = 2.0, 0.5, torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    errors = [
        (flow.SOLVERS[solver](gaussian_velocity(mean, std), noise, flow.times(n, 3.0, schedule)) - (mean + std * noise))
        .abs().max().item() for n in (16, 64)
    ]  # fmt: skip
    assert errors[0] / errors[1] > 0.7 * 4**order


def test_the_released_schedule_is_diffusers_to_the_bit():
    from diffusers import FlowMatchEulerDiscreteScheduler

    for shift in (1.0, 3.0, 6.5):
        theirs = FlowMatchEulerDiscreteScheduler(shift=shift)
        for steps in (1, 4, 28, 50):
            theirs.set_timesteps(steps)
            assert torch.equal(flow.times(steps, shift, "sd3_release"), theirs.sigmas)
    assert flow.times(28, 3.0, "sd3_release")[-2].item() == pytest.approx(0.008929, abs=1e-6)
    with pytest.raises(ValueError, match="schedule is 'karras'; expected one of paper, sd3_release"):
        flow.times(4, 1.0, "karras")


def test_starting_below_noise_and_constraints_after_each_step():
    ts = flow.starting_at(flow.times(4), 0.6)
    assert ts.tolist() == [0.6, 0.5, 0.25, 0.0]
    with pytest.raises(ValueError, match="start is 0"):
        flow.starting_at(flow.times(4), 0)
    for solver in flow.SOLVERS.values():
        seen = []
        out = solver(lambda z, t: z, torch.ones(1, 1), ts, constrain=lambda z, t, seen=seen: seen.append(t) or 0 * z)
        assert seen == [0.5, 0.25, 0.0]
        assert not out.any()


def test_paper_schedule_at_28_steps_shift_3():
    torch.testing.assert_close(
        flow.times(28, 3.0)[-4:], torch.tensor([0.2647, 0.1875, 0.1, 0.0], dtype=torch.float64), atol=6e-5, rtol=0
    )


def test_guidance_acts_on_all_channels():
    conditional, unconditional = torch.randn(2, 3, 16, 4, 4)
    field = flow.guided(lambda z, t: torch.cat([conditional, unconditional]), 2.5)
    got = field(torch.zeros(3, 16, 4, 4), 0.0)
    torch.testing.assert_close(got, unconditional + 2.5 * (conditional - unconditional))


def test_keyed_numbers_depend_on_the_key_alone():
    keys = [(3, 7), (3, 8), (4, 7)]
    together = keyed.normals((5,), 1, "noise", keys)
    torch.testing.assert_close(keyed.normals((5,), 1, "noise", keys[::-1]).flip(0), together, atol=0, rtol=0)
    others = [
        keyed.normals((5,), 2, "noise", keys), keyed.normals((5,), 1, "time", keys),
        keyed.normals((5,), 1, "noise", [(7, 3), (8, 3), (7, 4)]),
    ]
    for other in others:
        assert not (other == together).any()
    pooled = keyed.normals((64,), 0, "noise", [(i, j) for i in range(20) for j in range(20)])
    assert stats.kstest(pooled.flatten().numpy(), "norm").pvalue > 0.01
    assert torch.corrcoef(pooled)[0, 1:].abs().max() < 0.5
