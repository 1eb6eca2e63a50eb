"""Captions with any character come back: JSON lines end at a newline and nowhere else."""

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mmdit.files import read_lines
from train.data import shards
from train.data.blocks import check
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.data.shards import Cache
from train.data.sources import open_source
from train.evaluate.prompts import compbench

CUTTING = "\x0b\x0c\x1c\x1d\x1e\x85\u2028\u2029"             # where str.splitlines cuts, besides newlines
CAPTIONS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")) | st.text(CUTTING + "a b")


def captions_through(folder, captions, source):
    for i in range(len(captions)):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    source(folder, captions)
    config = Precompute(source=str(folder), cache=folder / "cache", sizes=((8, 8),), val_share=0.0, workers=1)
    precompute(config)
    assert check(config.cache) == [] and precompute(config).complete
    return sorted(Cache(config.cache).buckets("train")["8x8"].captions())


def sidecars(folder, captions):
    for i, caption in enumerate(captions):
        (folder / f"{i}.txt").write_text(caption, encoding="utf-8")


def metadata(folder, captions):
    lines = [json.dumps({"file_name": f"{i}.png", "text": c}, ensure_ascii=False) for i, c in enumerate(captions)]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8-sig")


@pytest.mark.parametrize("source", (sidecars, metadata))
def test_characters_that_look_like_line_ends_go_through(source, tmp_path):
    captions = [f"a{character}b" for character in CUTTING]
    assert captions_through(tmp_path, captions, source) == sorted(captions)


@settings(max_examples=25, deadline=None)
@given(st.lists(CAPTIONS.filter(lambda c: c.strip()), min_size=1, max_size=4))
def test_any_caption_comes_back(captions):
    with tempfile.TemporaryDirectory() as folder:
        assert captions_through(Path(folder), captions, metadata) == sorted(c.strip() for c in captions)


def test_caches_that_hold_them_unescaped_are_read(tmp_path):
    """As an earlier version wrote them."""
    line = json.dumps({"id": 0, "key": "k", "caption": f"a{CUTTING}b"}, ensure_ascii=False)
    (tmp_path / "0.jsonl").write_text(line + "\n", encoding="utf-8")
    assert shards.captions_of(tmp_path / "0.safetensors")[0]["caption"] == f"a{CUTTING}b"


def test_a_byte_order_mark_is_no_part_of_a_text(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one\u2028still one\r\ntwo\n", encoding="utf-8-sig")
    assert read_lines(path) == [task.prompt for task in compbench(path, tmp_path)] == ["one\u2028still one", "two"]
    Image.new("RGB", (8, 8)).save(tmp_path / "x.png")
    assert next(iter(open_source(str(tmp_path)))).caption == "one\u2028still one\ntwo"
