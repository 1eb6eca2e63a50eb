"""Damaged archives, caches and run folders: nothing of them is lost in silence, and the error names the file."""

import dataclasses
import io
import json
import shutil
import tarfile

import pytest
from PIL import Image

from mmdit import files
from mmdit.pictures import fit_into
from train.data.blocks import Block
from train.data.precompute import precompute
from train.data.records import DataError
from train.data.settings import Precompute
from train.data.shards import Cache, captions_of
from train.data.sources import open_source
from train.engine.loop import train

from .conftest import changed
from .test_sources import png


def tar_of(path, names, links=()):
    with tarfile.open(path, "w") as tar:
        for i, name in enumerate(names):
            content = png(i) if name.lower().endswith("png") else b"said"
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for name, kind, target in links:
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            tar.addfile(member)
    return path


# --- archives ---------------------------------------------------------------------------------------------------------


def test_a_damaged_header_in_the_middle_of_a_tar_is_no_end(tmp_path):
    path = tar_of(tmp_path / "a.tar", ["0.png", "1.png", "2.png"])
    with tarfile.open(path) as tar:
        third = tar.getmembers()[2].offset
    content = bytearray(path.read_bytes())
    content[third : third + 512] = b"x" * 512
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a.tar: its last member ends at byte \d+, but more follows"):
        open_source(str(path))


def test_two_tars_in_one_file_and_a_cut_one_are_no_tar(tmp_path):
    one = tar_of(tmp_path / "one.tar", ["0.png"]).read_bytes()
    (tmp_path / "two.tar").write_bytes(one + one)
    with pytest.raises(DataError, match="but more follows"):
        open_source(str(tmp_path / "two.tar"))
    with tarfile.open(tmp_path / "one.tar") as tar:
        end = tar.getmembers()[-1].offset_data + 512 * -(-len(png()) // 512)
    (tmp_path / "cut.tar").write_bytes(one[:end])
    with pytest.raises(DataError, match="cut off"):
        open_source(str(tmp_path / "cut.tar"))


def test_of_several_members_of_one_name_the_last_counts(tmp_path):
    found = open_source(str(tar_of(tmp_path / "a.tar", ["a.png", "b.png", "a.png"])))
    assert sorted(r.image().getpixel((0, 0))[0] for r in found) == [1, 2]
    assert found.passed == {"an earlier file of one name": 1}


def test_links_to_links_and_from_the_root_are_followed(tmp_path):
    symbolic = {"b.png": "c.png", "c.png": "a.png", "e.png": "f.png", "f.png": "e.png"}
    links = [("d.png", tarfile.LNKTYPE, "/a.png"), *((name, tarfile.SYMTYPE, to) for name, to in symbolic.items())]
    found = open_source(str(tar_of(tmp_path / "a.tar", ["a.png"], links)))
    assert len(found) == 4 and found.passed == {"a link to nothing in its archive": 2}


def test_a_folder_among_archives_does_not_hide_them(tmp_path):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "notes.md").write_text("no picture")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "b.png").write_bytes(png(7))
    (tmp_path / "more").mkdir()
    for where in ("", "more/"):
        tar_of(tmp_path / f"{where}0.tar", ["a.png"])
    found = open_source(str(tmp_path / "*"))
    assert len(found) == 3 and found.passed == {"no picture (.md)": 1}


def test_suffixes_in_capitals_are_suffixes(tmp_path):
    (tmp_path / "A.PNG").write_bytes(png())
    (tmp_path / "A.TXT").write_text("said")
    tar_of(tmp_path / "X.TAR", ["a.png"])
    assert [r.caption for r in open_source(str(tmp_path / "X.TAR"))] == [None]
    (tmp_path / "X.TAR").rename(tmp_path.parent / "X.TAR")
    assert [r.caption for r in open_source(str(tmp_path))] == ["said"]


# --- pictures and texts -----------------------------------------------------------------------------------------------


def test_a_picture_too_long_to_be_scaled_is_named_and_can_be_skipped(tmp_path):
    with pytest.raises(ValueError, match="65500 x 1 pixels"):
        fit_into(Image.new("RGB", (65500, 1)), 256, 256)
    folder, cache = tmp_path / "in", tmp_path / "cache"
    folder.mkdir()
    Image.new("RGB", (65500, 1)).save(folder / "long.jpg")
    (folder / "whole.png").write_bytes(png())
    for name in ("long", "whole"):
        (folder / f"{name}.txt").write_text("said")
    wanted = Precompute(source=str(folder), cache=cache, sizes=((256, 256),), workers=1, val_share=0)
    with pytest.raises(DataError, match=r"long.jpg: 65500 x 1 pixels"):
        precompute(wanted)
    index = precompute(dataclasses.replace(wanted, cache=tmp_path / "other", on_error="skip"))
    assert sum(s["samples"] for entries in index.shards.values() for s in entries) == 1


@pytest.mark.parametrize("encoding", ("utf-16-le", "utf-32-be"))
def test_text_that_is_in_another_encoding_is_none(encoding):
    with pytest.raises(ValueError, match="NUL"):
        files.decode("a cat".encode(encoding))
    assert files.decode("a cat".encode("utf-32")) == files.decode("a cat".encode("utf-16")) == "a cat"


def test_a_picture_with_its_size_and_time_put_back_is_another(tmp_path):
    import os

    folder, cache = tmp_path / "in", tmp_path / "cache"
    folder.mkdir()
    path = folder / "a.bmp"
    (folder / "a.txt").write_text("said")
    Image.new("RGB", (8, 8), "red").save(path)
    wanted = Precompute(source=str(folder), cache=cache, sizes=((8, 8),), workers=1, val_share=0)
    precompute(wanted)
    status = path.stat()
    Image.new("RGB", (8, 8), "blue").save(path)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with pytest.raises(DataError, match=r"a.bmp: its picture has changed"):
        precompute(wanted)


def test_a_metadata_file_with_a_name_that_is_none_is_refused(tmp_path):
    for name in ("a\0.png", "\ud800.png"):
        (tmp_path / "metadata.jsonl").write_text(json.dumps({"file_name": name}))
        with pytest.raises(DataError, match=r"metadata.jsonl, line 1: file_name is"):
            open_source(str(tmp_path))


# --- caches and runs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "file, content",
    [
        ("index.json", b"[]"), ("index.json", b"\xff"), ("index.json", b"{}"), ("blocks/00000.json", b"[]"),
        ("blocks/00000.json", b'{"a": 1}'), ("blocks/00000.json", b"["),
        ("blocks/00000.json", b'{"number": 0, "shards": 5}'), ("blocks/00000.json", b'{"number": 0, "rejected": [{}]}'),
    ],
)  # fmt: skip
def test_a_damaged_cache_names_the_file(file, content, tmp_path, config):
    cache = tmp_path / "cache"
    shutil.copytree(config.cache, cache)
    (cache / file).write_bytes(content)
    with pytest.raises(DataError, match=f"{file} is damaged"):
        if file == "index.json":
            Cache(cache)
        else:
            Block.load(cache, 0)


def test_damaged_captions_are_named(tmp_path):
    (tmp_path / "0.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(DataError, match=r"0.jsonl is damaged \(an entry lacks"):
        captions_of(tmp_path / "0.safetensors")


@pytest.mark.parametrize("content", (b"", b"[]", b"{}", b'{"step": 1, "seconds": 1, "skipped": 0, "decides": 3}'))
def test_a_damaged_run_names_the_file(config, content, tmp_path):
    run = changed(config, run=tmp_path / "run", steps=2)
    train(run)
    about = next((run.run / "checkpoints").iterdir()) / "run.json"
    about.write_bytes(content)
    with pytest.raises(ValueError, match=r"run.json"):
        train(run)


def test_metrics_that_are_none_name_the_file(config, tmp_path):
    run = changed(config, run=tmp_path / "run", steps=2)
    train(run)
    (run.run / "metrics.jsonl").write_text("{garbage}\n")
    with pytest.raises(ValueError, match=r"metrics.jsonl: "):
        train(run)


def test_a_full_disk_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    import errno

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(OSError, match=r"out.json cannot be written: No space left on device"):
        files.write_atomically(tmp_path / "out.json", b"{}")
    assert not list(tmp_path.iterdir())


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("records", (0, 3))
def test_a_run_goes_on_where_tensorboard_cannot_write(records, config, tmp_path, monkeypatch, capfd):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.summary.writer.record_writer import RecordWriter

    write, written = RecordWriter.write, []

    def full(self, data):
        written.append(data)
        if len(written) > records:
            raise OSError(28, "No space left on device")
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", full)
    run = changed(config, run=tmp_path / "run", steps=40)
    assert train(run).step == 40
    said = capfd.readouterr().out
    assert said.count("tensorboard is not written from here on ([Errno 28] No space left on device)") == 1
    assert len((run.run / "metrics.jsonl").read_text().splitlines()) >= 4
