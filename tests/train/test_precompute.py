"""Precompute at scale: shared by processes, killed at any moment, repaired; and what it costs."""

import json
import os
import random
import re
import signal
import time
from contextlib import suppress

import numpy as np
import pytest
from PIL import Image

from mmdit.autoencoder import PixelSpace
from train.data import costs, shards
from train.data.blocks import Block, check
from train.data.encoding import caption_of
from train.data.precompute import precompute
from train.data.records import DataError, Record
from train.data.settings import Precompute
from train.data.shards import Cache, Index, captions_of

from ..processes import module, ranks
from ..processes import start as begin
from .launching import ended, said
from .test_data import count_encoded

KILLS = int(os.environ.get("RFKERNELS_KILLS", "5"))


def contents(cache):
    """Everything in a cache but its quarantine."""
    files = (p for p in cache.rglob("*") if p.is_file() and "quarantine" not in p.parts and p.suffix != ".partial")
    return {str(p.relative_to(cache)): p.read_bytes() for p in files}


def start(cache, processes, *flags):
    """python -m train precompute of the shapes on n processes."""
    words = ["train", "precompute", "--cache", str(cache), "--copies", "3", "--shard-size", "100", *flags]
    return ranks(module, (words,), processes) if processes > 1 else begin(*words)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    path = tmp_path_factory.mktemp("undisturbed")
    precompute(Precompute(cache=path, copies=3, shard_size=100))
    return contents(path)


def test_two_processes_make_the_same_cache(undisturbed, tmp_path):
    output = ended(start(tmp_path / "cache", 2))
    assert contents(tmp_path / "cache") == undisturbed
    assert output.count("samples in") == 2, "one line for a bucket, from one process"


def test_killed_at_random_moments_nothing_is_lost_or_made_twice(undisturbed, tmp_path):
    """SIGKILL of all processes, again and again (RFKERNELS_KILLS); then to the end."""
    cache, rng, unfinished = tmp_path / "cache", random.Random(0), 0
    blocks = len([name for name in undisturbed if name.startswith("blocks/")])
    for _ in range(KILLS):
        process = start(cache, rng.choice((1, 2)))
        before = len(list((cache / "blocks").glob("*.json")))
        for _ in range(600):                                         # until it has begun, else this tests imports
            if process.poll() is not None or len(list((cache / "blocks").glob("*.json"))) > before:
                break
            time.sleep(0.05)
        time.sleep(rng.random() * 0.1)
        for pid in process.pids:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)
        process.wait()
        unfinished += not Index.load(cache).complete
        if len(list((cache / "blocks").glob("*.json"))) == blocks:
            for path in list((cache / "blocks").glob("*.json"))[::2]:                 # all done: some of it again
                path.unlink()
    assert unfinished >= KILLS // 2, "they were killed at work"
    ended(start(cache, 1))
    assert contents(cache) == undisturbed
    files = [cache / entry["file"] for entries in Cache(cache).index.shards.values() for entry in entries]
    ids = [sample["id"] for file in files for sample in captions_of(file)]
    assert sorted(ids) == list(range(3 * 416 + 4 * 64))


def test_a_signal_keeps_what_is_encoded(undisturbed, tmp_path):
    cache = tmp_path / "cache"
    process = start(cache, 1, "--batch", "1", "--workers", "1")
    for _ in range(600):
        if process.poll() is not None or list((cache / "blocks").glob("*.json")):
            break
        time.sleep(0.02)
    os.kill(process.pids[0], signal.SIGTERM)
    output = said(process)
    assert process.returncode == 130 and "keeping what is encoded" in output, output
    newest = max((cache / "blocks").glob("*.json"))
    block = Block.load(cache, int(newest.stem))
    assert not Index.load(cache).complete and sum(e["samples"] for e in block.shards.values()) <= 100
    precompute(Precompute(cache=cache, copies=3, shard_size=100))
    assert contents(cache) == undisturbed


def test_only_what_was_damaged_is_made_anew(folder, tmp_path, monkeypatch):
    config = Precompute(
        source=str(folder), cache=tmp_path / "cache", val_share=0.0, shard_size=6, sizes=((16, 16), (16, 32))
    )
    precompute(config)
    whole = contents(config.cache)
    shard = config.cache / "train" / "16x16" / "00001.safetensors"
    content = bytearray(shard.read_bytes())
    content[-3] ^= 8
    shard.write_bytes(content)
    assert re.search("00001.safetensors: its checksum differs", check(config.cache, make_anew=True)[0])
    assert (config.cache / "quarantine" / "train" / "16x16" / "00001.safetensors").read_bytes() == content
    encoded = count_encoded(monkeypatch)
    precompute(config)
    assert sum(encoded) == 1 and contents(config.cache) == whole


def test_a_damaged_shard_can_be_done_without(folder, tmp_path):
    config = Precompute(source=str(folder), cache=tmp_path / "cache", val_share=0.0, shard_size=5)
    precompute(config)
    (config.cache / "train/32x32/00001.safetensors").write_bytes(b"")
    with pytest.raises(DataError, match="has 0 bytes"):
        Cache(config.cache)
    assert len(check(config.cache, take_out=True)) == 1
    assert len(Cache(config.cache).buckets("train")["32x32"]) == 5 and not check(config.cache)
    precompute(config)
    assert len(Cache(config.cache).buckets("train")["32x32"]) == 5, "it stays without"


def test_records_left_out_are_asked_for_again_where_errors_stop(folder, tmp_path):
    config = Precompute(source=str(folder), cache=tmp_path / "cache", val_share=0.0, on_error="skip")
    good = (folder / "6.png").read_bytes()
    (folder / "6.png").write_bytes(b"no image")
    precompute(config)
    again = Precompute(source=str(folder), cache=tmp_path / "cache", val_share=0.0)
    with pytest.raises(DataError, match=r"6.png: not a readable image"):
        precompute(again)
    (folder / "6.png").write_bytes(good)
    precompute(again)
    bucket = Cache(config.cache).buckets("train")["32x32"]
    assert [bucket[i].id for i in range(10)] == list(range(10))


@pytest.mark.parametrize("written", ("captions", "captions and tensors"))
def test_a_kill_while_a_partial_block_is_written_anew(folder, tmp_path, monkeypatch, written):
    """The block's file still tells of the shard that was there: what does not fit it is encoded again."""
    from train.data import blocks

    config = Precompute(source=str(folder), cache=tmp_path / "cache", val_share=0.0)
    (folder / "6.txt").rename(tmp_path / "kept.txt")
    with pytest.raises(DataError, match=r"6.png: no caption"):
        precompute(config)
    (tmp_path / "kept.txt").rename(folder / "6.txt")
    write = blocks.write_shard

    def killed(cache, file, samples):
        if written == "captions":
            shards.write_atomically((cache / file).with_suffix(".jsonl"), b"".join(
                json.dumps({"id": s.id, "key": s.key, "caption": s.caption}).encode() + b"\n" for s in samples))
        else:
            write(cache, file, samples)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(blocks, "write_shard", killed)
        precompute(config)
    precompute(config)
    bucket = Cache(config.cache).buckets("train")["32x32"]
    assert [bucket[i].id for i in range(10)] == list(range(10)) and not check(config.cache)


def test_what_fails_in_the_last_batch_is_not_called_done(folder, tmp_path, monkeypatch):
    config = Precompute(source=str(folder), cache=tmp_path / "cache", val_share=0.0)
    (folder / "6.txt").rename(tmp_path / "kept.txt")
    precompute(Precompute(source=str(folder), cache=tmp_path / "cache", val_share=0.0, on_error="skip"))
    assert (config.cache / "rejected.jsonl").is_file()
    (tmp_path / "kept.txt").rename(folder / "6.txt")

    def failing(*args):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch, pytest.raises(RuntimeError, match="out of memory"):
        patch.setattr(PixelSpace, "encode", failing)
        precompute(config)
    with pytest.raises(DataError, match="precompute did not finish"):
        Cache(config.cache)
    precompute(config)
    assert len(Cache(config.cache).buckets("train")["32x32"]) == 10
    assert not (config.cache / "rejected.jsonl").exists()


def test_a_shard_that_is_gone_is_said_by_precompute_and_lost_block_files_are_no_loss(folder, tmp_path):
    config = Precompute(
        source=str(folder), cache=tmp_path / "cache", val_share=0.0, shard_size=5, sizes=((16, 16), (16, 32))
    )
    precompute(config)
    (config.cache / "train/16x32/00000.safetensors").unlink()
    with pytest.raises(DataError, match=r"00000.safetensors is missing or cut off: run python -m train verify"):
        precompute(config)
    (config.cache / "blocks/00001.json").unlink()
    (config.cache / "train/16x16/00001.safetensors").write_bytes(b"")
    assert len(check(config.cache)) == 2, "what the index lists is checked"
    assert len(check(config.cache, take_out=True)) == 2
    left = Cache(config.cache).buckets("train")
    assert {name: len(bucket) for name, bucket in left.items()} == {"16x16": 0, "16x32": 4}


def test_half_the_captions_are_synthetic_by_key():
    records = [Record(f"{i}.png", "original", lambda: Image.new("RGB", (1, 1)), None, "synthetic") for i in range(4000)]
    chosen = [caption_of(record, 0.5) for record in records]
    assert np.mean([caption == "synthetic" for caption in chosen]) == pytest.approx(0.5, abs=0.03)
    assert chosen[::-1] == [caption_of(record, 0.5) for record in reversed(records)]
    for share, only_one in ((0.0, "original"), (1.0, "synthetic")):
        assert {caption_of(record, share) for record in records} == {only_one}
    only = Record("a", None, lambda: Image.new("RGB", (1, 1)), None, "synthetic")
    assert caption_of(only, 0.0) == "synthetic"


def test_buckets_of_one_area():
    buckets = Precompute(area=512).buckets
    assert (512, 512) in buckets and len(buckets) == 7
    for height, width in buckets:
        assert height % 64 == width % 64 == 0 and max(height, width) <= 768
        assert height * width == pytest.approx(512**2, rel=0.07)


def test_the_report_is_of_what_it_says(folder, monkeypatch):
    slow = PixelSpace.encode
    monkeypatch.setattr(PixelSpace, "encode", lambda self, images: time.sleep(0.1) or slow(self, images))
    config = Precompute(source=str(folder), report=True, batch=10, step_ms=100.0)
    pixels, words = costs.measure(config)
    assert pixels.seconds == pytest.approx(0.01, rel=0.5) and pixels.storage == 2 * 12 * 16 * 16 and not pixels.memory
    assert words.storage == 2 * (3 * 64 + 64)
    told = costs.report(config)
    share = re.search(r"\| pixels \|.*\| ([\d.]+)% \|", told)
    assert float(share[1]) == pytest.approx(100 * 10 * 10 / 100, rel=0.5) and "| all |" in told


@pytest.mark.parametrize("flag, value", [("shard_size", 0), ("workers", 0), ("synthetic", 1.5)])
def test_impossible_settings_are_refused(flag, value):
    with pytest.raises(DataError, match=f"{flag} is {value}"):
        Precompute(**{flag: value})


def test_blocks_are_json(undisturbed):
    block = json.loads(undisturbed["blocks/00000.json"])
    assert block["done"] and sum(entry["samples"] for entry in block["shards"].values()) == 100
