"""What a source takes and what it passes over: nothing vanishes uncounted, and what is taken comes back exactly."""

import io
import json
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from train.data.precompute import precompute
from train.data.records import DataError
from train.data.settings import Precompute
from train.data.shards import Cache, captions_of
from train.data.sources import open_source

FEW = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


def png(value=0):
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


def cached(folder, cache, **options):
    return precompute(Precompute(source=str(folder), cache=cache, sizes=((8, 8),), workers=1, **options))


def captions(cache):
    return sorted(said["caption"] for path in cache.rglob("*.safetensors") for said in captions_of(path))


# --- Folders ----------------------------------------------------------------------------------------------------------

NAMES = st.text("ab. é\u2028", min_size=1, max_size=6).filter(lambda name: name.strip(". ") and name[0] != ".")
TEXTS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20)
FILES = st.dictionaries(
    st.tuples(st.sampled_from(("", "one/", "one/two/", "__MACOSX/", ".hidden/")), NAMES),
    st.tuples(st.sampled_from((".png", ".PNG", ".txt", ".synthetic.txt", ".md", "", "._", "broken")), TEXTS),
    max_size=10,
)


@FEW
@given(files=FILES, linked=st.booleans())
def test_every_file_of_a_folder_is_taken_or_counted(files, linked, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source")
    there, pictures, said = set(), {}, {}
    for number, ((where, name), (kind, text)) in enumerate(files.items()):
        file = f"._{name}.png" if kind == "._" else f"{name}.png" if kind == "broken" else name + kind
        path = folder / where / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() or path.is_symlink():
            continue
        if kind == "broken":
            path.symlink_to(folder / "nothing")
        elif kind in (".png", ".PNG"):
            path.write_bytes(png(number))
            if where in ("", "one/", "one/two/"):
                pictures[path] = number
        else:
            path.write_text(text, encoding="utf-8")
            said[path] = text
        there.add(path)
    if linked:
        (folder / "loop").symlink_to(folder)
    try:
        found = open_source(str(folder))
    except DataError as error:
        assert not pictures and "holds no images" in str(error)
        return
    assert len(found) == len(pictures)
    again = len(os.listdir(folder)) - sum(p.is_dir() for p in folder.iterdir()) if linked else 0   # below the link
    assert found.files + found.passed.total() == len(there) + again
    for record in found:
        path = Path(record.file)
        assert np.asarray(record.image())[0, 0, 0] == pictures[path]
        for suffix, got in ((".txt", record.caption), (".synthetic.txt", record.synthetic)):
            assert got == (said.get(path.with_suffix(suffix), "").strip() or None)


def test_linked_folders_are_followed_once(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "a.png").write_bytes(png())
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "link").symlink_to(tmp_path / "real")
    (tmp_path / "set" / "again").symlink_to(tmp_path / "real")
    found = open_source(str(tmp_path / "set"))
    assert [r.key for r in found] == ["again/a.png"] and found.passed == {
        "below a folder that was there already, by a link": 1
    }


def test_a_source_says_what_it_took_and_what_not(tmp_path, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    for name in ("a.png", "b.PNG", "._a.png", ".DS_Store", "c.heic", "notes.md", "d.txt"):
        (folder / name).write_bytes(png() if name.lower().endswith(".png") else b"x")
    (folder / "a.txt").write_text("one")
    (folder / "b.txt").write_text("two")
    cached(folder, tmp_path / "cache", val_share=0.0)
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        "2 pictures; passed over 5: 1 a caption without a picture, 2 left by macOS, 1 no picture (.heic), "
        "1 no picture (.md)"
    )


@pytest.mark.parametrize("encoding", ("utf-8", "utf-8-sig", "utf-16", "utf-16-le"))
def test_captions_of_other_encodings(encoding, tmp_path):
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_bytes("naïve 😀".encode(encoding))
    (record,) = open_source(str(tmp_path))
    if encoding == "utf-16-le":                                          # without a mark nobody can tell
        assert record.problem or "\0" in record.caption
    else:
        assert record.caption == "naïve 😀"


@pytest.mark.parametrize("content", ("naïve".encode("cp1252"), b"\xff"))
def test_a_caption_that_cannot_be_read_is_named_and_can_be_skipped(content, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    for name, text in (("a", content), ("b", b"fine")):
        (folder / f"{name}.png").write_bytes(png())
        (folder / f"{name}.txt").write_bytes(text)
    with pytest.raises(DataError, match=r"a\.png: its caption cannot be read"):
        cached(folder, tmp_path / "stops", val_share=0.0)
    cached(folder, tmp_path / "skips", val_share=0.0, on_error="skip")
    assert captions(tmp_path / "skips") == ["fine"]


def test_names_that_are_no_text_and_captions_with_half_a_character(tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.png"), "wb") as file:
        file.write(png())
    with open(os.path.join(os.fsencode(folder), b"caf\xe9.txt"), "wb") as file:
        file.write(b"coffee")
    cached(folder, tmp_path / "cache", val_share=0.0)
    assert captions(tmp_path / "cache") == ["coffee"]
    (folder / "metadata.jsonl").write_text('{"file_name": "x.png", "text": "half \\ud83d"}\n')
    (record,) = open_source(str(folder))
    assert record.problem == "its caption holds \\ud83d, half of a character" and record.caption is None


# --- metadata.jsonl ---------------------------------------------------------------------------------------------------


def listed(folder, *entries):
    folder.mkdir(exist_ok=True)
    for i in range(len(entries)):
        (folder / f"{i}.png").write_bytes(png(i))
    lines = [json.dumps({"file_name": f"{i}.png", "text": f"caption {i}", **e}) for i, e in enumerate(entries)]
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    return folder


@pytest.mark.parametrize("name", ("validation", "Valid", "val", "dev", "TEST"))
def test_names_of_the_split_that_validates(name, tmp_path):
    folder = listed(tmp_path / "in", {"split": "train"}, {"split": "Training"}, {"split": name})
    cached(folder, tmp_path / "cache")
    cache = Cache(tmp_path / "cache")
    assert [sum(map(len, cache.buckets(split).values())) for split in ("train", "val")] == [2, 1]


def test_other_splits_are_mapped_left_out_or_refused(tmp_path):
    folder = listed(tmp_path / "in", {"split": "train"}, {"split": "holdout"}, {"split": "noisy"})
    with pytest.raises(DataError, match=r"metadata\.jsonl, line 2: split is 'holdout'; expected one of train"):
        open_source(str(folder))
    found = open_source(str(folder), splits=("holdout=val", "noisy=-"))
    assert [r.split for r in found] == ["train", "val"] and found.passed["of a split that is left out"] == 1
    with pytest.raises(DataError, match="splits has 'holdout'"):
        Precompute(splits=("holdout",))


@pytest.mark.parametrize("name", ("../out.png", "/etc/passwd", "a/../../b.png", "C:/x.png", ""))
def test_no_entry_names_a_file_outside_its_folder(name, tmp_path):
    folder = listed(tmp_path / "in", {"file_name": name})
    with pytest.raises(DataError, match="line 1: file_name is"):
        open_source(str(folder))


def test_metadata_in_another_encoding_is_named(tmp_path):
    folder = listed(tmp_path / "in", {})
    (folder / "metadata.jsonl").write_bytes('{"file_name": "0.png", "text": "naïve"}'.encode("cp1252"))
    with pytest.raises(DataError, match=r"metadata\.jsonl is neither UTF-8 nor"):
        open_source(str(folder))
    (folder / "metadata.jsonl").write_bytes('{"file_name": "0.png", "text": "naïve"}'.encode("utf-16"))
    assert open_source(str(folder))[0].caption == "naïve"


def test_pictures_that_metadata_does_not_name_are_counted(tmp_path):
    folder = listed(tmp_path / "in", {})
    (folder / "more.png").write_bytes(png())
    found = open_source(str(folder))
    assert found.passed == {"not listed in metadata.jsonl": 1} and found.files == 2


# --- Archives ---------------------------------------------------------------------------------------------------------

MEMBERS = st.dictionaries(
    st.tuples(
        st.sampled_from(("", "a/", "__MACOSX/")),
        st.text("ab1.", min_size=1, max_size=5).filter(lambda name: name.strip(".")),
    ),
    st.sampled_from((".png", ".jpg", ".txt", ".json", ".cls", ".seg.png")), max_size=8,
)  # fmt: skip


@FEW
@given(members=MEMBERS)
def test_every_member_of_a_tar_is_taken_or_counted(members, tmp_path_factory):
    path = tmp_path_factory.mktemp("tar") / "set.tar"
    with tarfile.open(path, "w") as tar:
        for number, ((where, name), kind) in enumerate(members.items()):
            content = png(number) if kind[-3:] in ("png", "jpg") else b'{"text": "x"}' if kind == ".json" else b"text"
            info = tarfile.TarInfo(where + name + kind)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    try:
        found = open_source(str(path))
    except DataError as error:
        assert "holds no images" in str(error)
        return
    assert found.files + found.passed.total() == len(members)
    for record in found:
        record.image()


def test_links_of_a_tar_are_their_pictures(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        info = tarfile.TarInfo("deep/a.png")
        info.size = len(png(7))
        tar.addfile(info, io.BytesIO(png(7)))
        for name, kind, target in (("b.png", tarfile.LNKTYPE, "deep/a.png"), ("deep/c.png", tarfile.SYMTYPE, "a.png"),
                                   ("d.png", tarfile.SYMTYPE, "../outside.png")):  # fmt: skip
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, target
            tar.addfile(info)
    found = open_source(str(tmp_path / "set.tar"))
    assert sorted(r.key for r in found) == ["set.tar:b.png", "set.tar:deep/a.png", "set.tar:deep/c.png"]
    assert {np.asarray(r.image())[0, 0, 0] for r in found} == {7}
    assert found.passed == {"a link to nothing in its archive": 1}


def test_one_picture_a_sample_and_the_others_counted(tmp_path):
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for name in ("1.jpg", "1.png", "1.seg.png", "1.txt"):
            content = b"text" if name.endswith("txt") else png()
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    found = open_source(str(tmp_path / "set.tar"))
    assert [(r.key, r.caption) for r in found] == [("set.tar:1.jpg", "text")]
    assert found.passed == {"another picture of a sample": 2}


def parquet(path, *texts):
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist([{"image": {"bytes": png(), "path": None}, "text": t} for t in texts]), path)


def test_a_clone_of_a_hubs_data_set_has_its_splits(tmp_path):
    for split in ("train", "validation", "test"):
        parquet(tmp_path / "a" / "data" / f"{split}-00000-of-00001.parquet", split)
        parquet(tmp_path / "b" / split / "0000.parquet", split)
    (tmp_path / "a" / "README.md").write_text("---\n---\n")
    for clone in ("a", "b"):
        found = open_source(str(tmp_path / clone))
        assert {r.caption: r.split for r in found} == {"train": "train", "validation": "val", "test": "val"}
    assert open_source(str(tmp_path / "a")).passed == {"no archive (.md)": 1}
    found = open_source(str(tmp_path / "a"), splits=("test=-",))
    assert [r.caption for r in found] == ["train", "validation"]


def test_one_split_alone_is_no_split(tmp_path):
    parquet(tmp_path / "train-00000-of-00002.parquet", "one")
    parquet(tmp_path / "train-00001-of-00002.parquet", "two")
    assert [r.split for r in open_source(str(tmp_path))] == [None, None]


def test_pictures_beside_archives_are_counted(tmp_path):
    parquet(tmp_path / "set.parquet", "x")
    (tmp_path / "a.png").write_bytes(png())
    assert open_source(str(tmp_path)).passed == {"a picture beside archives": 1}


# --- Pictures that were replaced --------------------------------------------------------------------------------------


def test_a_picture_replaced_under_its_name_is_refused_and_a_touched_one_is_not(tmp_path):
    folder = listed(tmp_path / "in", {}, {})
    cached(folder, tmp_path / "cache", val_share=0.0)
    os.utime(folder / "0.png", ns=(1, 1))
    cached(folder, tmp_path / "cache", val_share=0.0)                    # the same bytes
    (folder / "1.png").write_bytes(png(200))
    with pytest.raises(DataError, match=r"1\.png: its picture has changed since .*cache was made"):
        cached(folder, tmp_path / "cache", val_share=0.0)


def test_a_picture_replaced_in_an_archive_is_refused(tmp_path):
    def archive(value):
        with tarfile.open(tmp_path / "set.tar", "w") as tar:
            for name, content in (("a.png", png(value)), ("a.txt", b"x"), ("b.png", png(1)), ("b.txt", b"y")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))

    archive(1)
    cached(tmp_path / "set.tar", tmp_path / "cache", val_share=0.0)
    archive(1)
    os.utime(tmp_path / "set.tar", ns=(1, 1))
    cached(tmp_path / "set.tar", tmp_path / "cache", val_share=0.0)
    archive(2)
    os.utime(tmp_path / "set.tar", ns=(2, 2))
    with pytest.raises(DataError, match=r"a\.png: its picture has changed"):
        cached(tmp_path / "set.tar", tmp_path / "cache", val_share=0.0)


def test_a_cache_of_before_knows_no_digests_and_goes_on(tmp_path):
    folder = listed(tmp_path / "in", {})
    cached(folder, tmp_path / "cache", val_share=0.0)
    for path in (tmp_path / "cache").rglob("*.jsonl"):
        lines = [{k: v for k, v in json.loads(line).items() if k in ("id", "key", "caption")}
                 for line in path.read_text().splitlines()]  # fmt: skip
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    cached(folder, tmp_path / "cache", val_share=0.0)
