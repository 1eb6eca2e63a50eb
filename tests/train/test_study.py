"""The study's parts against their definitions; a study that is killed and run again."""

import dataclasses
import json
import os
import signal
import time

import numpy as np
import pytest
import torch
from scipy import linalg

from mmdit import flow
from train.data import shapes
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.data.shards import Cache
from train.engine.metrics import frechet
from train.study import figures, judge, ranking
from train.study.plan import SETTINGS, changed, small_base
from train.study.report import report
from train.study.variants import BACKBONES, VARIANTS, backbones, default, parameters, step_flops

from ..processes import called, start


def test_ranks_are_the_rounds_in_which_nothing_dominates():
    rng = np.random.default_rng(0)
    points = {str(i): tuple(rng.integers(0, 8, 2).astype(float)) for i in range(60)}
    left, round_, want = dict(points), 0, {}
    while left:                                                          # by definition, pair by pair
        round_ += 1
        front = [
            a for a in left
            if not any(
                left[b][0] >= left[a][0] and left[b][1] <= left[a][1] and left[b] != left[a] for b in left
            )
        ]  # fmt: skip
        want |= dict.fromkeys(front, round_)
        left = {name: point for name, point in left.items() if name not in front}
    assert ranking.ranks(points) == want and max(want.values()) > 3
    assert ranking.ranks({"good": (1.0, 1.0), "broken": (float("nan"), 0.0)}) == {"good": 1, "broken": 2}
    mean = ranking.mean_ranks([{"a": (1.0, 0.0), "b": (0.0, 1.0)}, {"a": (0.0, 1.0), "b": (1.0, 0.0), "c": (2.0, 0.0)}])
    assert mean == {"a": 1.5, "b": 1.5}


@pytest.mark.parametrize("samples", (200, 5))
def test_frechet_distance_against_the_matrix_root(samples):
    rng = np.random.default_rng(1)
    one, other = rng.standard_normal((samples, 8)), 2 + rng.standard_normal((samples, 8)) @ rng.standard_normal((8, 8))
    c1, c2 = np.cov(one, rowvar=False), np.cov(other, rowvar=False)
    want = ((one.mean(0) - other.mean(0)) ** 2).sum() + np.trace(c1 + c2 - 2 * linalg.sqrtm(c1 @ c2).real)
    assert frechet(one, other) == pytest.approx(want, rel=1e-4)
    # of five samples in eight dimensions four eigenvalues are rounding, 1e-16, and their roots 1e-8: 1.3e-7 measured
    assert frechet(one, one) == pytest.approx(0, abs=1e-6)
    with pytest.raises(ValueError, match="expected two samples or more"):
        frechet(one[:1], other)


def test_path_length_of_flows_in_closed_form():
    """Straight to one point it is the distance; around a circle, the arc that Euler's chords come near."""
    noise = torch.tensor([[3.0, 4.0]])
    way = flow.PathLength(noise)
    flow.euler(lambda z, t: noise, noise, flow.times(10), constrain=way)
    assert way.lengths.item() == pytest.approx(5.0)
    way = flow.PathLength(noise)
    flow.euler(lambda z, t: z.flip(1) * torch.tensor([1.0, -1.0]), noise, flow.times(2000), constrain=way)
    assert way.lengths.item() == pytest.approx(5.0, rel=1e-3), "radius 5, one radian"


def test_path_length_follows_the_solver_to_its_device():
    """Noise is made on the CPU, the solver works where the model is: seen on tensors that only pretend to be there."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        way = flow.PathLength(torch.randn(3, 2))
        way(torch.randn(3, 2, device="cuda"), 0.5)
        way(torch.randn(3, 2, device="cuda"), 0.0)
        assert way.lengths.shape == (3,) and way.lengths.device.type == "cuda"


def test_the_judge_knows_what_is_drawn(tmp_path):
    critic, rng = judge.trained(tmp_path), np.random.default_rng(5)
    wanted = shapes.everything()[::2]
    images = np.stack([shapes.draw(what, rng) for what in wanted])
    captions = [what.caption for what in wanted]
    assert critic.score(images, captions) > 0.95
    assert critic.score(images, [captions[i] for i in rng.permutation(len(captions))]) < 0.35
    kept = judge.trained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(critic.parameters(), kept.parameters(), strict=True))
    with pytest.raises(ValueError, match="caption 'a cat' is none of the shapes'"):
        critic.score(images[:1], ["a cat"])


def test_variants_change_what_they_name():
    study = default("scaling")
    assert len(VARIANTS["formulations"](study)) == 61
    deeper = changed(study.base, VARIANTS["scaling"](study)["depth=6"])
    assert (deeper.model.depth, deeper.model.heads) == (6, 6)
    assert dataclasses.replace(deeper, model=small_base().model) == small_base()
    assert study.seeds == 2


def test_backbones_have_equal_parameters_or_flops(cache):
    """As near as widths in steps of eight channels come: of some eighty, a fifth of the FLOPs; so within a ninth."""
    study = dataclasses.replace(default("backbones"), caches=(cache,))
    variants, measured = backbones(study), {}
    for name, changes in variants.items():
        config = changed(study.base, changes)
        measured[name] = parameters(config.model), step_flops(config, Cache(cache))
    assert {name.split(", equal")[0] for name in variants} == set(BACKBONES)
    for name, values in measured.items():
        for i, measure in enumerate(("parameters", "FLOPs")):
            if name.endswith(measure):
                assert values[i] == pytest.approx(measured["MM-DiT"][i], rel=1 / 9), name


def test_a_killed_study_loses_no_row_and_repeats_none(cache, tmp_path):
    precompute(Precompute(cache=tmp_path / "data", copies=1, sizes=((16, 16),)))
    command = [
        "train", "study", "formulations", "--folder", tmp_path / "study", "--caches", tmp_path / "data",
        "--base.steps", "6", "--base.validation.samples", "4", "--images", "4",
        "--only", "rf", "eps/cos", "edm/rf", "--seeds", "1", "--workers", "1",
    ]  # fmt: skip
    rows = tmp_path / "study" / "rows"
    process = start(*command, OMP_NUM_THREADS="1")
    for _ in range(2400):
        if process.poll() is not None or len(list(rows.glob("*.json"))) >= 1:
            break
        time.sleep(0.05)
    os.killpg(process.pids[0], signal.SIGKILL)
    process.wait()
    before = {path.name: path.read_bytes() for path in rows.glob("*.json")}
    assert 1 <= len(before) < 3
    done = called(*command, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    found = [json.loads(line) for line in (tmp_path / "study" / "rows.jsonl").read_text().splitlines()]
    assert sorted(row["variant"] for row in found) == ["edm/rf", "eps/cos", "rf"]
    assert all((rows / name).read_bytes() == content for name, content in before.items()), "finished is finished"
    assert all(len(row["settings"]) == 12 and row["best_step"] == 6 for row in found)
    # after six steps the average is what it began as: rectified flow stands still, a noise prediction of zero does not
    lengths = {row["variant"]: row["path_length"] for row in found}
    assert lengths["rf"] == 0 and lengths["edm/rf"] > 1
    assert (tmp_path / "study" / "report.md").read_text() == report(found)
    assert (tmp_path / "study" / "formulations.png").stat().st_size > 1000


def row(variant, score, distance, **more):
    """A finished run whose pictures are alike under every setting."""
    settings = [
        {"weights": weights, "steps": steps, "guidance": guidance, "score": score, "distance": distance}
        for weights in ("EMA", "raw")
        for steps, guidance in SETTINGS
    ]
    return {
        "variant": variant, "dataset": "study", "seed": 0, "steps": 100, "batch": 8, "best_step": 100,
        "validation_loss": 0.5, "validation_curve": [[50, 0.7], [100, 0.5]], "flops": 1e12, "parameters": 1000,
        "settings": settings, "path_length": 2.0, "decrease": {"5": 0.1, "10": 0.02, "20": 0.0}, "images": 4,
        "machine": "a machine", "date": "2026-01-01", **more,
    }  # fmt: skip


def test_report_ranks_beside_the_paper(tmp_path):
    found = [row("rf", 0.9, 1.0), row("eps/linear", 0.5, 4.0), row("edm(1.20,0.60)", 0.95, 2.0)]
    found.append({**row("rf", 0.7, 3.0), "seed": 1})                    # rf: 0.8 and 2.0 on average, so second
    lines = report(found).splitlines()
    assert "| edm(1.20,0.60) | 1.00 | 1.00 | 1.00 |  |  |  | 0.950 | 2.00 |  |  | 1 |" in lines
    assert "| rf | 2.00 | 2.00 | 2.00 | 5.67 | 6.50 | 5.75 | 0.800 | 2.00 | 0.217 | 94.9 | 2 |" in lines
    assert "| eps/linear | 3.00 | 3.00 | 3.00 | 2.88 | 4.25 | 2.75 | 0.500 | 4.00 | 0.222 | 90.34 | 1 |" in lines
    assert [path.name for path in figures.draw(found, tmp_path)] == ["formulations.png"]
    assert "of the 3 that" not in report(found)                                 # the paper ranks two of these only
    more = report([*found, row("edm/rf", 0.1, 9.0)])
    assert "of the 3 that it ranks: 0.50." in more, "ours: rf, eps/linear, edm/rf; theirs: eps/linear, rf, edm/rf"
    found.append({**row("rf", 0.9, 1.0), "dataset": "other"})                   # what others lack there is left out
    assert "| rf | 1.00" in report(found) and "eps/linear" not in report(found)


def test_report_of_sizes_fits_a_power_law(tmp_path):
    sizes = {"depth=2": 1e12, "depth=4": 1e13, "depth=8": 3e14}
    found = [
        row(name, 0.9, 1.0, flops=flops, parameters=int(flops / 1e9), validation_loss=3 * flops**-0.125,
            validation_curve=[[50, 0.9], [100, 3 * flops**-0.125]])
        for name, flops in sizes.items()
    ]  # fmt: skip
    text = report(found)
    assert "to the power -0.125 (correlation -1.000)" in text
    assert "| depth=4 | 0.01 M | 10.00 T | 0.0711 ± 0.0000 | 10.00 | 2.00 | 0.00 | 2.00 |" in text
    assert "| paper, depth=38 |  |  |  | 2.71 | 0.14 | 0.08 | 185.96 |" in text
    assert [path.name for path in figures.draw(found, tmp_path)] == ["scaling.png"]
    found = [row("MM-DiT", 0.9, 1.0), row("DiT, equal FLOPs", 0.8, 2.0, parameters=7)]
    assert [path.name for path in figures.draw(found, tmp_path)] == ["backbones.png"]
