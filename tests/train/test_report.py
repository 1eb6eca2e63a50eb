"""A run's page: what is on it, how large it gets, and that nothing of it stops a run."""

import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmdit import MMDiT, checkpoint
from mmdit.adapters import Lora
from train import report
from train.__main__ import COMMANDS
from train.config import Config, Optimizer, Samples
from train.engine.log import Log
from train.engine.loop import train
from train.report import card
from train.report.curves import thinned

from .conftest import changed, small


@pytest.fixture(scope="module")
def finished(cache, tmp_path_factory):
    """Of twelve steps with three previews, resumed with other settings."""
    first = changed(
        small(cache, tmp_path_factory.mktemp("finished") / "run"), samples=Samples(every=4, count=3, steps=1), steps=4,
        keep=1, optimizer=Optimizer(lr=1e-3, warmup=4),
    )  # fmt: skip
    train(first)
    train(changed(first, steps=12, keep=2))
    return first.run


@pytest.fixture
def run(finished, config):
    """A copy of it."""
    shutil.copytree(finished, config.run)
    return config.run


def test_a_run_writes_its_page_at_each_preview(run, config):
    page = (run / report.NAME).read_text()
    assert page.count('class="step"') == 3 and 'data-step="12"' in page and "http" not in _without_namespaces(page)
    for title in ("Loss", "Gradient norm", "Attention"):
        assert f"<figcaption>{title}</figcaption><svg" in page
    captions = json.loads((run / "samples" / report.CAPTIONS).read_text())
    assert len(captions) == 3 and all(f"<li>{caption}</li>" in page for caption in captions)
    assert re.search(r"<code>keep</code>: 1 → 2", page) and re.search(r"<code>steps</code>: 4 → 12", page)
    assert "12 of 12" in page and "<code>optimizer.lr</code>" in page


def test_pages_take_a_twentieth_of_the_time(config, monkeypatch):
    clock, written = [0.0], []

    def write(run):
        written.append(clock[0])
        clock[0] += 1

    monkeypatch.setattr("train.engine.log.time.monotonic", lambda: clock[0])
    monkeypatch.setattr(report, "write", write)
    log = Log(config, 0)
    for now in (0.0, 5.0, 19.0, 20.0, 25.0):
        clock[0] = now
        log.page()
    log.close()
    assert written == [0.0, 20.0, 25.0], "the last one, which was due, when the run ends"
    Log(config, 0).close()
    assert len(written) == 3


def _without_namespaces(page):
    """SVG names its language by an address, which nobody opens."""
    return re.sub(r'xmlns(:\w+)?="http[^"]*"', "", page)


def test_a_page_of_many_large_previews_stays_small(run):
    """Of 40 grids of noise of 2048 pixels, 12 MB each, 24 are on it, the first and last among them."""
    noise = np.random.default_rng(0).integers(0, 256, (2048, 2048, 3), dtype=np.uint8)
    first = run / "samples" / "step-00000100.png"
    Image.fromarray(noise).save(first, compress_level=0)
    for step in range(200, 4100, 100):
        shutil.copy(first, run / "samples" / f"step-{step:08d}.png")
    path = report.write(run)
    steps = re.findall(r'data-step="(\d+)"', path.read_text())
    assert path.stat().st_size < 10e6 and len(steps) == 24 and (steps[0], steps[-1]) == ("4", "4000")


def test_what_a_file_says_is_text_on_the_page(run):
    """Captions and names are no markup."""
    (run / "samples" / report.CAPTIONS).write_text(json.dumps(["<script>alert(1)</script>"]))
    page = report.write(run).read_text()
    assert "<script>alert(1)" not in page and "&lt;script&gt;alert(1)" in page


def test_the_command_and_its_errors(run, capsys, tmp_path):
    COMMANDS["report"]([str(run)])
    assert f"wrote {run / report.NAME}" in capsys.readouterr().out
    with pytest.raises(FileNotFoundError, match=r"is no run folder: it holds no config\.json"):
        COMMANDS["report"]([str(tmp_path)])
    (run / "config.json").write_text("{nothing}\n")
    with pytest.raises(ValueError, match=r"config\.json"):
        COMMANDS["report"]([str(run)])


def test_a_last_line_that_a_kill_has_cut_is_passed_over(run):
    for name in ("metrics.jsonl", "speed.jsonl", report.STARTS):
        with (run / name).open("a") as file:
            file.write('{"step": 12, "spe')
    assert "<code>steps</code>: 4 → 12" in report.write(run).read_text()


@pytest.mark.parametrize("line", ("{garbage}", "", "3", "[]", '{"loss": 1.0}', '{"step": null}'))
def test_any_other_line_that_is_no_entry_is_named(run, line):
    path = run / "metrics.jsonl"
    path.write_text(f"{line}\n{path.read_text()}")
    with pytest.raises(ValueError, match=r"metrics\.jsonl: line 1 is no entry about a step, got '"):
        report.write(run)


def test_a_run_of_an_older_version_has_a_page(run):
    (run / report.STARTS).unlink()
    (run / "samples" / report.CAPTIONS).unlink()
    assert "begun by a version that did not write them down" in report.write(run).read_text()


def test_a_page_that_cannot_be_written_stops_no_run(config, monkeypatch, capsys):
    def fails(run):
        raise OSError("no room")

    monkeypatch.setattr(report, "write", fails)
    assert train(changed(config, steps=2)).step == 2
    assert "report.html was not written (OSError: no room)" in capsys.readouterr().out


def test_long_curves_are_thinned_to_means():
    points = [(i, float(i % 2)) for i in range(10_000)]
    few = thinned(points, 100)
    assert len(few) == 100 and few[-1][0] == 9_999 and {value for _, value in few} == {0.5}
    assert thinned(points[:3]) == points[:3] and thinned([]) == []


@pytest.mark.skipif(shutil.which("chromium") is None, reason="there is no chromium on this machine")
def test_the_slider_shows_the_preview_of_its_step(run, tmp_path):
    """In a browser: the page's own script, moved to the first preview."""
    page = (run / report.NAME).read_text()
    moved = page.replace("</body>", """<script>
      slider.value = 0; slider.dispatchEvent(new Event("input"));
      const one = [...shown].filter(image => !image.hidden);
      document.title = `${one.length} ${one[0].dataset.step} ${one[0].naturalWidth > 0} ${step.textContent}`;
    </script></body>""")
    file = tmp_path / "moved.html"
    file.write_text(moved)
    flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync",
             f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom")  # fmt: skip
    done = subprocess.run(["chromium", *flags, file.as_uri()], capture_output=True, text=True, timeout=120)
    assert re.search(r"<title>(.*)</title>", done.stdout)[1] == "1 4 true 4"


# --- what people upload -----------------------------------------------------------------------------------------------


def test_a_run_is_exported_with_a_card(run, config, tmp_path, capsys):
    COMMANDS["export"]([str(run), str(tmp_path / "out"), "--license", "apache-2.0", "--dtype", "bfloat16"])
    assert "wrote" in capsys.readouterr().out
    text = (tmp_path / "out" / "README.md").read_text()
    count = sum(p.numel() for p in MMDiT(config.model).parameters())
    assert text.startswith("---\nlicense: apache-2.0\n") and f"An MM-DiT of {count:,} parameters" in text
    assert "trained for 12 steps" in text and "| `optimizer.lr` | 0.001 |" in text and "adapter.rank" not in text
    captions = json.loads((run / "samples" / report.CAPTIONS).read_text())
    assert all(caption in text for caption in captions) and (tmp_path / "out" / "samples.png").is_file()
    weights = checkpoint.load(tmp_path / "out" / "model.safetensors").state_dict()
    for name, value in checkpoint.load(run / "model.safetensors").state_dict().items():
        kept = value if name == "patch_embed.pos_embed" else value.bfloat16()
        assert torch.equal(weights[name].to(kept.dtype), kept), name
    with pytest.raises(FileExistsError, match="out is there already; expected a new or empty folder"):
        COMMANDS["export"]([str(run), str(tmp_path / "out")])


def test_diffusers_reads_what_is_exported_and_is_told_what_it_cannot_know(run, tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    config = changed(Config.of_run(run), formulation="x/lognorm(1.00,1.00)", run=tmp_path / "other")
    train(config)
    card.export(config.run, tmp_path / "out", "diffusers")
    diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "out")
    said = (tmp_path / "out" / "README.md").read_text()
    assert "was trained as x/lognorm(1.00,1.00) and does not give a velocity" in said


def test_an_adapter_is_exported_for_other_programs(run, tmp_path):
    tuned = changed(
        Config.of_run(run), run=tmp_path / "lora", initial=run / "model.safetensors", steps=2,
        adapter=Lora(rank=2, targets=("attention",)),
    )  # fmt: skip
    train(tuned)
    files = card.export(tuned.run, tmp_path / "out", "kohya")
    names = load_file(files[0]).keys()
    text = files[-1].read_text()
    assert all(name.startswith("lora_unet_") for name in names) and "A LoRA of" in text and "`adapter.rank` | 2" in text
