"""Random names, captions and formats, laid out in every way a source knows: what the cache holds is what was there."""

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
from train.data import records
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.data.shards import Cache

from ..mmdit.forms import forms

FORMATS = {".png": "PNG", ".PNG": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".jfif": "JPEG", ".webp": "WEBP",
           ".bmp": "BMP", ".gif": "GIF", ".tif": "TIFF", ".tiff": "TIFF"}  # fmt: skip
ANY = st.characters(exclude_categories=("Cs", "Cc"), exclude_characters="/.\0")
NAMES = st.text(ANY, min_size=1, max_size=12).map(lambda name: unicodedata.normalize("NFC", f"p{name}q"))
CAPTIONS = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=20).filter(str.strip)
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


def made(source, cache):
    precompute(Precompute(source=str(source), cache=cache, sizes=((8, 8),), val_share=0.0, workers=1))
    bucket = Cache(cache).buckets("train")["8x8"]
    return [bucket[i] for i in range(len(bucket))]


def held(samples):
    """(pixels, caption) of each, sorted; a latent of the cache is pixels, in bf16."""
    return sorted((sample.latent.float().numpy().tobytes(), sample.caption) for sample in samples)


@pytest.mark.parametrize("laid", (sidecars, listed, archived, tabled))
@settings(max_examples=12, deadline=None, suppress_health_check=list(HealthCheck))
@example(tree={"p\u2028q": (".jpg", "a\u2028b"), "pÉq": (".gif", " \x85x"), "p\U0001f600q": (".tif", "\ufeffy")})
@given(tree=TREES)
def test_what_a_cache_holds_is_what_was_there(laid, tree, tmp_path_factory):
    folder, plain = tmp_path_factory.mktemp("set"), tmp_path_factory.mktemp("plain")
    files = [(name, suffix, picture(i, suffix), said) for i, (name, (suffix, said)) in enumerate(tree.items())]
    got = made(laid(folder, files), folder / "cache")
    for i, (_, _, content, caption) in enumerate(files):                     # names and formats that nobody trips over
        with Image.open(io.BytesIO(content)) as image:
            image.convert("RGB").save(plain / f"{i}.png")
        text = caption.strip().replace("\r\n", "\n").replace("\r", "\n") if laid is sidecars else caption.strip()
        (plain / f"{i}.txt").write_text(text, encoding="utf-8", newline="")
    assert held(got) == held(made(plain, plain / "cache")) and len(got) == len(files)


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
    (one,), (other,) = (made(tmp_path / name, tmp_path / f"cache {name}") for name in ("as it is", "shown"))
    assert held([one]) == held([other])


def test_what_has_its_size_and_time_is_not_read_again(tmp_path, monkeypatch):
    """Millions of pictures are looked up, not read: only one whose time is another is hashed."""
    (tmp_path / "set").mkdir()
    for i in range(3):
        (tmp_path / "set" / f"{i}.png").write_bytes(picture(i, ".png"))
        (tmp_path / "set" / f"{i}.txt").write_text("it")
    made(tmp_path / "set", tmp_path / "cache")
    (tmp_path / "set" / "1.png").touch()
    read = []
    digest = records.digest_of
    monkeypatch.setattr(records, "digest_of", lambda *given: read.append(given) or digest(*given))
    monkeypatch.setattr(pictures, "opened", lambda path: pytest.fail(f"{path} is decoded"))
    assert len(made(tmp_path / "set", tmp_path / "cache")) == 3
    assert len(read) == 1
