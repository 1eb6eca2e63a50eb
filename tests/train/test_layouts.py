"""Data sets as people have them: splits said by names, lists in folders, tables beside tars, what was mended since."""

import json
import tarfile

import pytest

from train.data.records import DataError
from train.data.sources import open_source
from train.data.splits import mapped, of_archives

from .test_damaged import tar_of
from .test_sources import cached, captions, png


def pictures(folder, *names, captions=True):
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(png(i))
        if captions:
            (folder / name).with_suffix(".txt").write_text(f"caption of {name}")


def splits(source, **options):
    return [(record.key, record.split) for record in open_source(str(source), **options)]


@pytest.mark.parametrize(
    "names, wanted",
    [
        (("train-0.tar", "val-0.tar"), ["train", "val"]),
        (("train2017.tar", "val2017.tar"), ["train", "val"]),
        (("coco-train-0.tar", "coco_test.tar"), ["train", "val"]),
        (("partial-train/0000.parquet", "partial-test/0000.parquet"), ["train", "val"]),
        (("train-0.tar", "train-1.tar"), [None, None]),
        (("a.tar", "b.tar"), [None, None]),
        (("my-test-data/a.tar", "my-test-data/b.tar"), [None, None]),
        (("retrain.tar", "validity.tar"), [None, None]),
    ],
)
def test_splits_of_archives_by_a_word_of_their_names(names, wanted, tmp_path):
    assert of_archives([tmp_path / name for name in names], mapped(())) == wanted


def test_an_archive_without_a_split_among_others_with_one_is_refused(tmp_path):
    tar_of(tmp_path / "train-0.tar", ["0.png"])
    tar_of(tmp_path / "eval-0.tar", ["1.png"])
    with pytest.raises(DataError, match=r"eval-0.tar names no split, .*train-0.tar does \(train\); with --splits"):
        open_source(str(tmp_path))
    assert [split for _, split in splits(tmp_path, splits=("eval=val",))] == ["val", "train"]
    assert len(splits(tmp_path, splits=("eval=-",))) == 1
    assert [split for _, split in splits(tmp_path, splits=("eval-0=val",))] == ["val", "train"]


def test_splits_of_pictures_by_their_folders(tmp_path):
    pictures(tmp_path, "train/0.png", "val/0.png")
    assert splits(tmp_path) == [("train/0.png", "train"), ("val/0.png", "val")]
    found = open_source(str(tmp_path), splits=("val=-",))
    assert len(found) == 1 and found.passed["of a split that is left out"] == 1


def test_names_that_somebody_gave_hold_alone(tmp_path):
    pictures(tmp_path, "clean/0.png", "noisy/1.png")
    assert splits(tmp_path, splits=("noisy=-",)) == [("clean/0.png", None)]
    assert splits(tmp_path, splits=("noisy=val",)) == [("clean/0.png", None), ("noisy/1.png", "val")]
    archives = [tmp_path / "noisy-0.tar", tmp_path / "noisy-1.tar"]
    assert of_archives(archives, mapped(("noisy=val",))) == ["val", "val"]
    assert of_archives([*archives, tmp_path / "a.tar"], mapped(("noisy=-",))) == ["-", "-", None]


def test_one_folder_that_is_named_like_a_split_is_a_class(tmp_path):
    pictures(tmp_path, "bus/0.png", "train/0.png")
    assert {split for _, split in splits(tmp_path)} == {None}


@pytest.mark.parametrize("kind", ("jsonl", "csv"))
def test_lists_in_folders_that_are_splits(kind, tmp_path):
    pictures(tmp_path, "train/0.png", "test/0.png", "more/9.png", captions=False)
    for split in ("train", "test"):
        said = 'file_name,text\n0.png,"red, in ' + split + '"\n'
        said = said if kind == "csv" else json.dumps({"file_name": "0.png", "text": f"red, in {split}"})
        (tmp_path / split / f"metadata.{kind}").write_text(said)
    found = open_source(str(tmp_path))
    assert [(r.key, r.caption, r.split) for r in found] == [
        ("test/0.png", "red, in test", "val"), ("train/0.png", "red, in train", "train"),
    ]  # fmt: skip
    assert found.files == 4 and found.passed == {"beside folders with lists": 1}


def test_a_table_names_pictures_and_a_line_that_names_none_is_named(tmp_path):
    pictures(tmp_path, "0.png", captions=False)
    (tmp_path / "metadata.csv").write_text('file_name,caption,split\r\n0.png,"two\r\nlines",\r\n')
    assert [(r.caption, r.split) for r in open_source(str(tmp_path))] == [("two\nlines", None)]
    (tmp_path / "metadata.csv").write_text("file_name,caption\n,a\n")
    with pytest.raises(DataError, match=r"metadata.csv, line 2: expected columns with file_name"):
        open_source(str(tmp_path))


def test_a_table_of_something_else_is_no_list(tmp_path):
    pictures(tmp_path, "0.png")
    (tmp_path / "metadata.csv").write_text("url,width\nhere,3\n")
    found = open_source(str(tmp_path))
    assert found[0].caption == "caption of 0.png" and found.passed == {"no picture (.csv)": 1}


def test_captions_beside_folders_with_lists_are_refused(tmp_path):
    pictures(tmp_path, "0.png")
    pictures(tmp_path, "more/1.png", captions=False)
    (tmp_path / "more" / "metadata.jsonl").write_text('{"file_name": "1.png", "text": "a"}')
    with pytest.raises(DataError, match=r"has captions beside folders with lists \(.*more/metadata.jsonl\)"):
        open_source(str(tmp_path))


def test_a_picture_of_the_readme_hides_no_archives(tmp_path):
    pictures(tmp_path, "assets/teaser.png", captions=False)
    (tmp_path / "data").mkdir()
    tar_of(tmp_path / "data" / "0.tar", ["0.png"])
    found = open_source(str(tmp_path))
    assert len(found) == 1 and found.passed == {"a picture beside archives": 1}


def test_what_img2dataset_writes_is_its_tars(tmp_path):
    tar_of(tmp_path / "00000.tar", ["0.png"])
    (tmp_path / "00000.parquet").write_bytes(b"where pictures came from")
    (tmp_path / "00000_stats.json").write_text("{}")
    found = open_source(str(tmp_path))
    assert len(found) == 1
    assert found.passed == {"a table beside a tar of its name": 1, "no archive (.json)": 1}


def test_two_stars_reach_every_folder(tmp_path):
    for folder in ("", "a/", "a/b/"):
        (tmp_path / folder).mkdir(exist_ok=True)
        tar_of(tmp_path / f"{folder}x.tar", ["0.png"])
    keys = [key for key, _ in splits(tmp_path / "**" / "*.tar")]
    assert sorted(keys) == ["./x.tar:0.png", "a/b/x.tar:0.png", "a/x.tar:0.png"]
    assert len(splits(tmp_path / "a" / "**")) == 2, "what lies in a folder is read with it, once"


def test_keys_of_several_folders_differ(tmp_path):
    pictures(tmp_path, "one/0.png", "two/0.png")
    assert [key for key, _ in splits(tmp_path / "*")] == ["one/0.png", "two/0.png"]


def test_two_captions_of_one_name_are_counted(tmp_path):
    pictures(tmp_path, "a.png")
    (tmp_path / "a.TXT").write_text("another")
    found = open_source(str(tmp_path))
    assert len(found) == 1 and found.files == 2 and found.passed == {"a second caption of one name": 1}


def test_an_empty_text_beside_json_says_nothing(tmp_path):
    pictures(tmp_path, "1.png", captions=False)
    (tmp_path / "1.txt").write_text(" \n")
    (tmp_path / "1.json").write_text('{"caption": "of the JSON"}')
    (tmp_path / "2.txt").write_bytes(b"one\r\ntwo")
    (tmp_path / "2.png").write_bytes(png(2))
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name in ("1.png", "1.txt", "1.json", "2.png", "2.txt"):
            tar.add(tmp_path / name, name)
    assert [record.caption for record in open_source(str(tmp_path / "x.tar"))] == ["of the JSON", "one\ntwo"]


def test_what_was_left_out_is_tried_again_when_it_was_mended(tmp_path, capsys):
    pictures(tmp_path / "in", "0.png", "1.png", "2.png")
    (tmp_path / "in" / "1.png").write_bytes(b"")
    (tmp_path / "in" / "2.txt").unlink()
    cache, skipping = tmp_path / "cache", {"on_error": "skip", "val_share": 0.0}
    cached(tmp_path / "in", cache, **skipping)
    said = capsys.readouterr().out
    assert "2 of 3 pictures were left out; " in said and "BytesIO" not in (cache / "rejected.jsonl").read_text()
    (tmp_path / "in" / "1.png").write_bytes(png(1))
    cached(tmp_path / "in", cache, **skipping)
    (tmp_path / "in" / "2.txt").write_text("a caption at last")
    cached(tmp_path / "in", cache, **skipping)
    assert captions(cache) == ["a caption at last", "caption of 0.png", "caption of 1.png"]
    assert not (cache / "rejected.jsonl").exists()


def test_a_cache_in_which_nothing_validates_says_so(tmp_path, capsys):
    pictures(tmp_path / "in", "0.png")
    cached(tmp_path / "in", tmp_path / "cache", val_share=0.0)
    assert "nothing validates (val_share 0)" in capsys.readouterr().out
    with pytest.raises(DataError, match="no usable training sample among 1 records; all validate"):
        cached(tmp_path / "in", tmp_path / "other", val_share=1.0)


def test_a_parquet_file_written_anew_is_read_anew(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="extra [parquet] is not installed")
    from pyarrow import parquet

    for value in (200, 20):
        table = pyarrow.table({"image": [png(value)], "text": [f"red {value}"]})
        parquet.write_table(table, tmp_path / "x.parquet")
        (record,) = open_source(str(tmp_path / "x.parquet"))
        assert record.caption == f"red {value}" and record.image().getpixel((0, 0)) == (value, 0, 0)
