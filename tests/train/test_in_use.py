"""A folder in which another process works: what fills, mends, trains or evaluates there is refused."""

import shutil
from contextlib import contextmanager

import pytest

from mmdit.files import InUse, claimed
from train.data import blocks
from train.data.blocks import check
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.data.shards import Index
from train.engine.loop import train
from train.evaluate.run import Evaluation, evaluate
from train.study import run as study
from train.study.plan import Study
from train.study.variants import VARIANTS

from .conftest import changed


def contents(folder):
    files = (path for path in folder.rglob("*") if path.is_file() and not path.name.endswith("lock"))
    return {path.relative_to(folder): path.read_bytes() for path in files}


@pytest.fixture
def copied(cache, tmp_path):
    return shutil.copytree(cache, tmp_path / "cache")


def calls(what, config, cache):
    """(what is called, the folder in which it works, the name of its lock)"""
    return {
        "run": (lambda: train(config), config.run, "lock"),
        "precompute": (lambda: precompute(Precompute(cache=cache, copies=1, shard_size=100)), cache, "lock"),
        "take out": (lambda: check(cache, take_out=True), cache, "lock"),
        "make anew": (lambda: check(cache, make_anew=True), cache, "lock"),
        "study": (lambda: study.run(Study(folder=config.run), VARIANTS), config.run, "lock"),
        "evaluate": (lambda: evaluate(Evaluation(run=config.run)), config.run, "evaluation.lock"),
    }[what]


@pytest.mark.parametrize("what", ("run", "precompute", "take out", "make anew", "study", "evaluate"))
def test_a_second_process_is_refused_and_changes_nothing(what, config, copied):
    if what == "evaluate":
        config = changed(config, steps=2)
        train(config)
    shard = next((copied / "train").rglob("*.safetensors"))
    shard.write_bytes(b"damaged")                                            # something to take out, and to make anew
    call, folder, lock = calls(what, config, copied)
    with claimed(folder, lock):
        before = contents(folder)
        with pytest.raises(InUse, match=r"is in use by process \d+ on .* since 20"):
            call()
        assert contents(folder) == before


def test_what_only_reads_is_let_in(copied, config):
    """A lock keeps nobody from training from a cache or verifying it."""
    with claimed(copied):
        assert check(copied) == []
        assert train(changed(config, cache=copied, steps=2)).step == 2


def test_a_cache_is_read_when_it_is_ones_own(copied, monkeypatch):
    """What another process has written until it let go is not written over."""
    (shard, other) = sorted((copied / "train").rglob("*.safetensors"))[:2]
    shard.write_bytes(b"damaged")

    @contextmanager
    def later(folder):
        with claimed(folder):
            index = Index.load(folder)                                       # the other process's last deed
            gone = str(other.relative_to(folder))
            index.shards = {b: [e for e in entries if e["file"] != gone] for b, entries in index.shards.items()}
            index.save(folder)
            yield

    monkeypatch.setattr(blocks, "claimed", later)
    check(copied, take_out=True)
    left = [entry["file"] for entries in Index.load(copied).shards.values() for entry in entries]
    assert not {str(p.relative_to(copied)) for p in (shard, other)} & set(left)
