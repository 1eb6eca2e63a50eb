"""Random names, captions and formats, laid out in four ways: what the cache holds is what was there."""

import io
import json
import tarfile
import unicodedata

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from mmdit import pictures
from train.data import folders
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.data.shards import Cache

from ..mmdit.forms import forms

FORMATS = {".png": "PNG", ".PNG": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP",
           ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF"}  # fmt: skip
ANY = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/.\0")
NAMES = st.text(ANY, min_size=1, max_size=12).map(lambda name: unicodedata.normalize("NFC", f"pp{name}q"))  # p: a drive
WRITTEN = st.characters(exclude_categories=("Cs",), exclude_characters="\0\ufeff")        # a mark is no part of a text
CAPTIONS = st.text(WRITTEN, max_size=20).filter(str.strip)
TREES = st.dictionaries(NAMES, st.tuples(st.sampled_from(list(FORMATS)), CAPTIONS), min_size=1, max_size=5)


def picture(number, suffix):
    file = io.BytesIO()
    colours = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(colours).save(file, FORMATS[suffix])
    return file.getvalue()


def sidecars(folder, files):
    for name, suffix, content, caption in files:
        (folder / f"{name}{suffix}").write_bytes(content)
        (folder / f"{name}.txt").write_text(caption, encoding="utf-8", newline="")
    return folder


def listed(folder, files):
    lines = []
    for name, suffix, content, caption in files:
        (folder / f"{name}{suffix}").write_bytes(content)
        lines.append(json.dumps({"file_name": f"{name}{suffix}", "text": caption}, ensure_ascii=False))
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8", newline="")
    return folder


def archived(folder, files):
    with tarfile.open(folder / "set.tar", "w") as tar:
        for name, suffix, content, caption in files:
            for member, body in ((name + suffix, content), (f"{name}.txt", caption.encode())):
                info = tarfile.TarInfo(member)
                info.size = len(body)
                tar.addfile(info, io.BytesIO(body))
    return folder / "set.tar"


def tabled(folder, files):
    pyarrow = pytest.importorskip("pyarrow", reason="extra [parquet] is not installed")
    from pyarrow import parquet

    rows = [{"image": {"bytes": content, "path": n + suffix}, "text": said} for n, suffix, content, said in files]
    parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "set.parquet")
    return folder / "set.parquet"


def held(source, cache):
    """[(pixels as the cache has them, caption)], sorted by caption."""
    precompute(Precompute(source=str(source), cache=cache, sizes=((8, 8),), val_share=0.0, workers=1))
    bucket = Cache(cache).buckets("train")["8x8"]
    return sorted((said, bucket[i].latent.float().numpy().tobytes()) for i, said in enumerate(bucket.captions()))


@pytest.mark.parametrize("laid", (sidecars, listed, archived, tabled))
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(tree={"p\u2028q": (".jpg", "a\u2028b"), "pÉq": (".gif", " \x85x"), "p\U0001f600q": (".tif", "y\r\nz\r")})
@given(tree=TREES)
def test_what_a_cache_holds_is_what_was_there(laid, tree, tmp_path_factory):
    """The pixels are those of a folder of PNGs whose names nobody trips over."""
    folder, plain = tmp_path_factory.mktemp("set"), tmp_path_factory.mktemp("plain")
    files = [(name, suffix, picture(i, suffix), said) for i, (name, (suffix, said)) in enumerate(tree.items())]
    for i, (_, _, content, _) in enumerate(files):
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").save(plain / f"{i}.png")
        (plain / f"{i}.txt").write_text(str(i))
    pixels = [latent for _, latent in held(plain, plain / "cache")]
    lines = laid in (sidecars, archived)                                     # a text of its own, read in text mode
    said = [c.replace("\r\n", "\n").replace("\r", "\n") if lines else c for *_, c in files]
    want = sorted(zip((c.strip() for c in said), pixels, strict=True))
    assert held(laid(folder, files), folder / "cache") == want


@pytest.mark.parametrize("form", forms())
def test_precompute_reads_pictures_as_viewers_show_them(form, tmp_path):
    content, suffix, plain = forms(8, 8)[form]
    for name, ending, body in (("as it is", suffix, content), ("shown", ".png", None)):
        (tmp_path / name).mkdir()
        if body is None:
            Image.fromarray(plain).save(tmp_path / name / "a.png")
        else:
            (tmp_path / name / f"a{ending}").write_bytes(body)
        (tmp_path / name / "a.txt").write_text("it")
    one, other = (held(tmp_path / name, tmp_path / f"cache {name}") for name in ("as it is", "shown"))
    assert one == other and one[0][0] == "it"


def test_what_has_its_size_and_time_is_not_read_again(tmp_path, monkeypatch):
    """Millions of pictures are looked up, not read: only one whose time is another is hashed."""
    (tmp_path / "set").mkdir()
    for i in range(3):
        (tmp_path / "set" / f"{i}.png").write_bytes(picture(i, ".png"))
        (tmp_path / "set" / f"{i}.txt").write_text("it")
    before = held(tmp_path / "set", tmp_path / "cache")
    (tmp_path / "set" / "1.png").touch()
    read, content = [], folders._content
    monkeypatch.setattr(folders, "_content", lambda path: read.append(path) or content(path))
    monkeypatch.setattr(pictures, "shown", lambda image: pytest.fail("a picture is decoded"))
    assert held(tmp_path / "set", tmp_path / "cache") == before
    assert [str(path)[-5:] for path in read if str(path).endswith(".png")] == ["1.png"]
