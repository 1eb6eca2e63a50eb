"""The runner of a borrowed GPU's minutes: deadlines, what is kept, and what it needs."""

import json
import subprocess
import sys
import tarfile
import time

import pytest
import torch

from bench import environment, models
from bench.cases import cases
from bench.device import precompile
from bench.device.__main__ import CALLS, OPS, STEP
from bench.device.runner import Part, Queue, pack, unpack


def python(code):
    return [sys.executable, "-c", code]


HANGS = "import time; print('verdict: half of it', flush=True); time.sleep(100)"
DEAF = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('x', flush=True); time.sleep(100)"


def test_a_part_that_hangs_is_ended_and_the_others_run(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.device.runner.GRACE", 0.5)
    queue, began = Queue(tmp_path, 60, {}), time.monotonic()
    queue.run([
        Part("hangs", python(HANGS), 1.5), Part("deaf", python(DEAF), 1.5), Part("fails", python("1 / 0"), 10),
        Part("passes", python("print('verdict: all well')"), 10), Part("absent", ["x"], 10, needs="no-such-program"),
    ])  # fmt: skip
    assert time.monotonic() - began < 20
    status = {o.name: o.status for o in queue.outcomes}
    assert status["hangs"].startswith("stopped after 2 s") and status["deaf"].startswith("stopped after")
    assert (status["fails"], status["passes"]) == ("failed (1)", "passed")
    assert status["absent"] == "not run: there is no no-such-program"
    assert [o.name for o in queue.outcomes if not o.good] == ["hangs", "deaf", "fails"]
    said = queue.verdict()
    assert "half of it" in said and "ZeroDivisionError" in said and "ok   passes" in said
    assert "all well" in (tmp_path / "passes.log").read_text()


def test_a_part_beside_others_runs_with_them_and_the_clock_ends_all(tmp_path):
    queue = Queue(tmp_path, 3, {})
    waits = "import pathlib, time\nwhile not pathlib.Path('{}').exists(): time.sleep(0.05)"
    queue.run([
        Part("beside", python(waits.format(tmp_path / "there")), 2.9, beside=True),
        Part("main", python(f"import pathlib; pathlib.Path('{tmp_path / 'there'}').touch()"), 2.5),
        Part("late", python("print(1)"), 100),
    ])  # fmt: skip
    status = {o.name: o.status for o in queue.outcomes}
    assert status == {"beside": "passed", "main": "passed", "late": "no time left"}


def test_a_part_waits_for_what_it_needs(tmp_path):
    there = tmp_path / "there"
    made = f"import pathlib, time; time.sleep(0.5); pathlib.Path('{there}').touch()"
    queue = Queue(tmp_path, 20, {})
    queue.run([
        Part("build", python(made), 10, beside=True),
        Part("uses", python(f"import pathlib; assert pathlib.Path('{there}').exists()"), 10, after="build"),
    ])  # fmt: skip
    assert [o.status for o in queue.outcomes] == ["passed", "passed"]


def test_a_call_goes_on_from_the_archive_of_one_before(tmp_path, monkeypatch):
    work, again = tmp_path / "work", tmp_path / "again"
    work.mkdir(), again.mkdir()
    parts = [Part("a", python("print('verdict: 1')"), 10), Part("b", python("1 / 0"), 10)]
    queue = Queue(work, 60, {})
    queue.run(parts)
    (work / "deep").mkdir()
    (work / "deep" / "file").write_text("x")
    (work / "deep" / "large").write_bytes(b"x" * 5000)
    (work / "cache").mkdir()
    (work / "cache" / "data").write_text("x")
    monkeypatch.setattr("bench.device.runner.MOST_BYTES", 4000)
    pack(work, tmp_path / "one.tgz", {"card": "a card"})
    assert not list(tmp_path.glob("*.partial"))
    with tarfile.open(tmp_path / "one.tgz") as tar:
        assert {"a.log", "b.log", "parts.json", "about.json", "deep/file"} == set(tar.getnames())
    known = unpack(tmp_path / "one.tgz", again)
    assert json.loads((again / "about.json").read_text()) == {"card": "a card", "left_out": ["deep/large"]}
    queue = Queue(again, 60, known)
    queue.run(parts)
    assert [o.status for o in queue.outcomes] == ["passed earlier", "failed (1)"] and queue.outcomes[0].verdict == ["1"]


@pytest.mark.parametrize("call", CALLS)
def test_deadlines_leave_room(call, tmp_path):
    """No part may take all the time, and what is compiled beside does not count."""
    parts = CALLS[call](tmp_path, False)
    assert len({part.name for part in parts}) == len(parts)
    assert all(part.seconds <= (250 if part.beside else 150) for part in parts)


def test_nothing_needs_diffusers_or_tyro():
    modules = ["bench.device.__main__", "bench.device.attention", "bench.device.training", "bench.device.tuning",
               "bench.device.optimizers", "bench.device.precompile", "bench.sweep", "bench.profile",
               "bench.attention_error", "bench.test_model",
               "bench.test_ops"]  # fmt: skip
    code = "import sys\nfor name in ('tyro', 'diffusers'): sys.modules[name] = None\n"
    code += "\n".join(f"import {module}" for module in modules)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_settings_that_spill_are_not_measured():
    now = {"block_m": 64, "block_n": 64, "warps": 4}
    fast, spilling, slow = ({**now, "block_n": n} for n in (32, 128, 16))
    said = {"spills": 0, "occupancy": 0.5, "loops": [200]}
    tried = [(now, {**said, "loops": [400]}), (slow, said), (spilling, {**said, "spills": 8}), (fast, said)]
    kept = precompile.chosen({"k": tried}, {"k": now})["k"]
    assert [json.loads(s) for s in kept] == [now, fast, slow]


def test_what_is_measured_exists_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    names = {case.name for case in cases(torch.device("cuda"))}
    measured = {part: sorted(name for name in names if environment.asked_for(name, ops)) for part, ops in OPS.items()}
    assert measured == {
        "attention": sorted(f"joint_attention-H24-{s}" for s in ("B64-S154+256", "B16-S154+1024", "B4-S154+4096")),
        "block": ["block-1536-B4-S154+4096", "block-1536-B64-S154+256"],
        "rows": sorted(f"{op}-1536-B64-S256" for op in ("adaln", "gated_adaln", "qk_norm", "gelu_mlp")),
    }
    sizes = {size.name(step) for size in models.GPU for step in models.STEPS}
    assert {name for name in sizes if environment.asked_for(name, STEP)} == {f"{STEP} {s} step" for s in models.STEPS}
