"""Checkpoints are read without running anything that somebody put into them."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from train.engine.loop import train
from train.engine.storage import CONTENTS, FORMER, Reader, Writer

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")       # what is meant
WRITTEN = Path(__file__).with_name("written_by_159f3e4") / "run" / "checkpoints" / "step-00000002"
STATE = {"a": {"w": torch.arange(6.0).view(2, 3)}, "b": torch.ones(3, dtype=torch.bfloat16), "step": torch.tensor(7.0)}


def read(folder):
    state = {"a": {"w": torch.zeros(2, 3)}, "b": torch.zeros(3, dtype=torch.bfloat16), "step": torch.zeros(())}
    dcp.load(state, storage_reader=Reader(folder), no_dist=True)
    return state


@pytest.fixture
def written(tmp_path):
    dcp.save(STATE, storage_writer=Writer(tmp_path), no_dist=True)
    return tmp_path


def same(one, two):
    for read_from in (lambda s: s["a"]["w"], lambda s: s["b"], lambda s: s["step"]):
        assert torch.equal(read_from(one), read_from(two))


def test_what_is_written_comes_back_and_no_pickle_is_the_table_of_contents(written):
    same(read(written), STATE)
    assert not (written / FORMER).exists()
    said = json.loads((written / CONTENTS).read_text())
    assert said["tensors"]["b"] == {"dtype": "bfloat16", "size": [3], "chunks": [[[0], [3]]]}


def test_a_runs_checkpoints_hold_no_pickled_table(config):
    train(config)
    found = list((config.run / "checkpoints").rglob("*"))
    assert any(path.name == CONTENTS for path in found) and not any(path.name == FORMER for path in found)


def test_checkpoints_of_before_are_read(tmp_path):
    dcp.save(STATE, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    same(read(tmp_path), STATE)
    assert len(Reader(WRITTEN).read_metadata().state_dict_metadata) > 20


class Planted:
    def __reduce__(self):
        return os.mkdir, ("planted",)


@pytest.mark.parametrize("place", ("alone", "inside"))
def test_a_planted_pickle_runs_nothing(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    dcp.save(STATE, storage_writer=dcp.FileSystemWriter(tmp_path / "c"), no_dist=True)
    path = tmp_path / "c" / FORMER
    held = pickle.loads(path.read_bytes())
    if place == "inside":
        held.planner_data = {"x": Planted()}
    path.write_bytes(pickle.dumps(held if place == "inside" else Planted()))
    with pytest.raises(ValueError, match=r"posix\.mkdir, which is no part of a checkpoint"):
        Reader(tmp_path / "c").read_metadata()
    assert not (tmp_path / "planted").exists()


def test_a_run_is_not_resumed_from_a_planted_pickle(config, tmp_path, monkeypatch):
    """As somebody else's run folder, in the form of before, might hold."""
    monkeypatch.chdir(tmp_path)
    constant = replace(config, optimizer=replace(config.optimizer, decay="none"))
    train(replace(constant, steps=4))
    (last,) = [p for p in (config.run / "checkpoints").iterdir() if p.name.endswith("4")]
    (last / CONTENTS).unlink()
    (last / FORMER).write_bytes(pickle.dumps(Planted()))
    with pytest.raises(ValueError, match=r"posix\.mkdir, which is no part of a checkpoint"):
        train(replace(constant, steps=6))
    assert not (tmp_path / "planted").exists()


def test_a_planted_tensor_runs_nothing(written, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = json.loads((written / CONTENTS).read_text())
    place = next(p for p in said["places"] if p[0] == "b")
    torch.save(Planted(), written / "planted.distcp")
    place[3:] = "planted.distcp", 0, (written / "planted.distcp").stat().st_size
    (written / CONTENTS).write_text(json.dumps(said))
    with pytest.raises(CheckpointException, match="Weights only load failed"):
        read(written)
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("file", ("../outside.distcp", "/etc/passwd", "a/../../b"))
def test_no_entry_names_a_file_outside(file, written):
    said = json.loads((written / CONTENTS).read_text())
    said["places"][0][3] = file
    (written / CONTENTS).write_text(json.dumps(said))
    with pytest.raises(ValueError, match=r"contents\.json is no table of contents"):
        Reader(written).read_metadata()


@pytest.mark.parametrize("content", ("{", "[]", '{"tensors": {"a": {"dtype": "no", "size": [1], "chunks": []}}}'))
def test_a_damaged_table_is_named(content, written):
    (written / CONTENTS).write_text(content)
    with pytest.raises(ValueError, match=r"contents\.json"):
        Reader(written).read_metadata()


def test_a_full_disk_is_what_is_told(tmp_path):
    """torch.save's own error, a position in an archive, would hide it."""
    (tmp_path / "__0_0.distcp").symlink_to("/dev/full")
    with pytest.raises(CheckpointException) as error:
        dcp.save(STATE, storage_writer=Writer(tmp_path), no_dist=True)
    assert str(error.value).strip().endswith("No space left on device")
