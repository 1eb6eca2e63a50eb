"""Results on disk, and what is written of them."""

import json
from functools import partial
from pathlib import Path

import pytest
from PIL import Image

from bench import gate, history, pictures, report, roofline, tables
from bench.__main__ import COMMANDS, RESULTS
from mmdit import commands
from tests.bench.results import synthetic

from ..processes import called

README = Path(__file__).parents[2] / "docs/benchmarks.md"


@pytest.fixture
def stored(tmp_path):
    """A folder with one run of a GPU in two parts, an older one, and something else."""
    whole = synthetic()
    for part, cases in (("ops", whole["benchmarks"][:5]), ("model", whole["benchmarks"][5:])):
        (tmp_path / f"synthetic_gpu-2026-01-02-{part}.json").write_text(json.dumps({**whole, "benchmarks": cases}))
    (tmp_path / "synthetic_gpu-2026-01-01.json").write_text(json.dumps({**whole, "benchmarks": []}))
    (tmp_path / "sweep.json").write_text("{}")
    (tmp_path / "synthetic_gpu-2026-01-03-sweep.json").write_text("{}")
    return tmp_path


def test_parts_of_a_run_belong_together_and_the_newest_is_found(stored):
    assert list(gate.runs(stored)) == ["synthetic_gpu-2026-01-02", "synthetic_gpu-2026-01-01"]
    assert gate.newest(stored, "Synthetic GPU") == "synthetic_gpu-2026-01-02"
    assert gate.newest(stored, "Synthetic") is None and gate.newest(stored, "NVIDIA B200") is None
    together = gate.read(gate.runs(stored)["synthetic_gpu-2026-01-02"])
    assert len(together["benchmarks"]) == 9
    assert gate.ratios(together) == {"adaln forward": 0.5, "attention both": 4 / 3, "d2-64px-B2 training step": 0.8}


def test_the_report_shows_times_losses_and_where(stored):
    readme = stored / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nstale\n{report.END}\nafter\n")
    report.main([], stored, readme, check=False)
    text = (stored / "synthetic_gpu-2026-01-02.md").read_text()
    assert "# Synthetic GPU, driver 1.2, torch 3.4, triton 5.6, 2026-01-02" in text and "host" not in text
    assert "| adaln forward | 1.0 us (2.00) | 2.0 us (1.00) |  |  | 100.0 | 50% |  |  | triton |" in text
    assert "| attention both | 4.0 us (0.75) | 3.0 us (1.00) |  | 2.0 us (1.50) |" in text
    assert "slower than eager PyTorch by 1 % or more in 1 of 3" in text and "a line that the run said" in text
    assert "2.00 times as fast in the d2-64px-B2 training step" in text
    assert "| adaln forward | 1.0 us | 2.0 us | 2.00 | eager 2.0 us | 2.00 | 1 / 4 | 8.0 MB / 16.0 MB |" in text
    for name in pictures.shown(synthetic()):
        with Image.open(stored / f"synthetic_gpu-2026-01-02-{name}.png") as picture:
            assert min(picture.size) > 200 and len(set(picture.convert("L").get_flattened_data())) > 20, name
    section = readme.read_text()
    assert section.startswith("before\n") and section.endswith("after\n") and "stale" not in section
    assert "| attention both | 4.0 us | 3.0 us | 0.75 | cudnn 2.0 us | 0.50 |" in section
    report.main([], stored, readme, check=True)
    readme.write_text(section.replace("0.75", "1.75"))
    with pytest.raises(SystemExit, match="is not that of"):
        report.main([], stored, readme, check=True)


def test_cases_over_runs_and_the_gates_limits(stored):
    """Of a device every run that has cases, oldest first; a case that a run lacks is empty there."""
    older = {**synthetic(), "benchmarks": synthetic()["benchmarks"][2:5], "commit_info": {"id": "0123456789"}}
    older["benchmarks"][0]["extra_info"]["ratio"] = 0.5
    (stored / "synthetic_gpu-2025-12-31.json").write_text(json.dumps(older))
    (found,) = history.histories(stored).values()
    assert found.runs == ["2025-12-31 0123456", "2026-01-02"]
    speeds = found.cases
    assert speeds["attention both"] == [2.0, 0.75] and speeds["adaln forward"] == [None, 2.0]
    assert found.limit("adaln forward") == pytest.approx(2.0 / 1.1)
    before = {case: 1 / known[-1] for case, known in speeds.items()}
    for factor, fails in ((0.999, True), (1.001, False)):                        # the limit is where the gate fails
        after = {case: 1 / (found.limit(case) * factor) for case in before}
        assert bool(gate.regressions(before, after, history.SLOWER)) == fails
    section = report.section({}, {"synthetic_gpu": found})
    assert "| attention both | 2.00 | 0.75 | 0.68 |" in section and "| adaln forward |  | 2.00 | 1.82 |" in section
    assert "![Each case over runs](../bench/results/synthetic_gpu-history.png)" in section
    pictures.saved(partial(history.draw, found), stored / "history.png", 3)
    with Image.open(stored / "history.png") as picture:
        assert len(set(picture.convert("L").get_flattened_data())) > 20


def test_host_times_are_read_as_they_were_printed(tmp_path):
    notes = ["before", "microseconds a call, gradients recorded, forward / forward and backward; torch 3.4",
             "no native launcher: it is not built", f"{'':18s}{'eager':>22s}{'triton':>22s}",
             f"{'adaln':18s}{2.8:13.1f} /{15.4:7.1f}{23.6:13.1f} /{107.0:7.1f}",
             f"{'block':18s}{255.1:13.1f} /{1774.0:7.1f}{589.8:13.1f} /{1780.4:7.1f}", "after 1.0 / 2.0"]  # fmt: skip
    found = tables.host_times(notes)
    assert found == {"adaln": {"eager": (2.8, 15.4), "triton": (23.6, 107.0)},
                     "block": {"eager": (255.1, 1774.0), "triton": (589.8, 1780.4)}}  # fmt: skip
    assert tables.host_times(["nothing of it"]) == {}
    results = {**synthetic(), "notes": notes}
    assert "host" in pictures.shown(results) and "host" not in pictures.shown(synthetic())
    pictures.saved(partial(pictures.host, results), tmp_path / "host.png", 3)
    with Image.open(tmp_path / "host.png") as picture:
        assert len(set(picture.convert("L").get_flattened_data())) > 20


def test_a_report_of_nothing_says_what_was_wanted(tmp_path):
    (tmp_path / "synthetic_gpu-2026-01-02.json").write_text("")                  # as a run that was cut off leaves it
    with (
        pytest.warns(UserWarning, match="is not JSON: a run that was cut off"),
        pytest.raises(ValueError, match=r"without results; expected what pytest bench"),
    ):
        report.main([], tmp_path, None, check=False)
    (tmp_path / "x.json").write_text(json.dumps({**synthetic(), "benchmarks": []}))
    with pytest.raises(ValueError, match="found x; expected"):
        report.main([tmp_path / "x.json"], tmp_path, None, check=False)
    with pytest.raises(ValueError, match="has no section"):
        report.replaced("nothing here", "new", README)


def test_the_readme_says_what_was_measured():
    """Its section is what the newest results of each device give: no figure in it is typed by hand."""
    report.main([], RESULTS, README, check=True)


def test_prediction_stands_beside_measurement(stored):
    from bench.models import Size

    size, bf16 = Size(2, 64, 2), roofline.torch.bfloat16
    text = roofline.report(size, "training", "Synthetic GPU", stored, bf16)
    assert "measured, synthetic_gpu-2026-01-02" in text
    predicted = roofline.predict(size, "training", roofline.ceilings("Synthetic GPU", stored)[0])
    fused = next(line for line in text.splitlines() if line.startswith("fused"))
    assert "4.00 ms" in fused and fused.endswith(f"{4e-3 / predicted['fused'].seconds:.2f}")
    assert "5.00 ms" in text and "4.40 ms" in text
    cpu = json.dumps(synthetic("cpu-x86_64", driver=None))
    (stored / "cpu-x86_64-2026-01-02.json").write_text(cpu)
    assert roofline.measurements(size, "training", "cpu-x86_64", stored).keys() == {"eager"}


def test_command_lines():
    for wrong in (["roofline", "--pixels", "500"], ["roofline", "--batch", "0"], ["nothing"]):
        with pytest.raises(SystemExit):
            commands.dispatch("python -m bench", "", COMMANDS, wrong)
    done = called("bench", "roofline", "--gpu", "abacus")
    assert done.returncode == 1 and "error: roofline: gpu is 'abacus'; expected one of A100" in done.stderr


@pytest.mark.parametrize("name, device, said", [
    ("joint_attention-H24-B4-S154+4096", "NVIDIA H100", "1024 pixels"),
    ("adaln-1536-B64-S256", "NVIDIA H100", "256 pixels"),
    ("d24-512px-B8 training", "NVIDIA H100", "512 pixels"), ("adaln-384-B2-S256", "cpu-x86_64", "fp32"),
    ("adaln-384-B2-S256-bf16", "cpu-x86_64", "bf16"),
])  # fmt: skip
def test_bars_of_the_overview_say_what_they_stand_for(name, device, said):
    assert pictures.variant(name, device) == said
