"""Folders for one process alone, and files that are named when they cannot be read."""

import os
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmdit import MMDiT, checkpoint, commands, presets
from mmdit.files import InUse, claimed, read_json
from mmdit.sampling.sample import Sampler

from ..processes import called

HOLDS = """
import sys, time
from pathlib import Path
from mmdit.files import claimed
with claimed(Path(sys.argv[1])):
    print("has it", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDS, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "has it\n"
    with process:
        yield process
        process.kill()


def test_a_second_process_is_refused_and_told_who_is_first(holder, tmp_path):
    with pytest.raises(InUse, match=f"is in use by process {holder.pid} on .* since 20"), claimed(tmp_path):
        pass


@pytest.mark.parametrize("how", (signal.SIGKILL, signal.SIGTERM))
def test_a_killed_process_leaves_nothing_to_remove(holder, tmp_path, how):
    os.kill(holder.pid, how)
    holder.wait()
    with claimed(tmp_path):
        pass
    with claimed(tmp_path), claimed(tmp_path, "another"):
        pass
    assert (tmp_path / "lock").read_text() == ""


@pytest.mark.parametrize("content", (b"", b"{", b"\xff\xfe\xff", b"not json"))
def test_json_that_cannot_be_read_is_named(content, tmp_path):
    (tmp_path / "a.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.json is no JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("metadata", ({"extra": "not json"}, {"extra": "[1]"}, {"config": "x", "format": "pt"}))
def test_a_foreign_metadata_key_makes_no_weights_unreadable(metadata, tmp_path):
    torch.manual_seed(0)
    model = MMDiT(presets.by_depth(2, heads=2, head_dim=32, max_height=64, max_width=64, resolution=64))
    checkpoint.save(model, tmp_path / "a.safetensors", layout="sd3")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "b.safetensors", metadata)
    loaded = checkpoint.load(tmp_path / "b.safetensors", heads=2, head_dim=32)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_what_a_library_raises_is_one_line(capsys, monkeypatch):
    def failing(error):
        def command(arguments):
            """Fails."""
            raise error

        return command

    errors = {"key": KeyError("width"), "type": TypeError("two"), "os": PermissionError(13, "no permission", "x.png")}
    for name, error in errors.items():
        with pytest.raises(SystemExit) as stopped:
            commands.dispatch("python -m it", "About.", {name: failing(error)}, [name])
        assert str(stopped.value).startswith("error: ") and "\n" not in str(stopped.value)
    assert "x.png" in str(stopped.value)
    monkeypatch.setenv(commands.TRACEBACK, "1")
    with pytest.raises(KeyError):
        commands.dispatch("python -m it", "About.", {"key": failing(errors["key"])}, ["key"])


@pytest.mark.parametrize("out", ("folder", "x.jpg", "x"))
def test_where_a_picture_goes_is_checked_before_anything_is_loaded(out, tmp_path):
    (tmp_path / "folder").mkdir()
    done = called("mmdit", "sample", tmp_path / "nothing", "a", "--out", tmp_path / out)
    assert done.returncode == 1 and "expected a file that ends in .png" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_run_whose_weights_say_nothing_readable_is_named(tmp_path):
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors", {"format": "rfkernels.mmdit", "config": "{"})
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        Sampler.load(tmp_path)
