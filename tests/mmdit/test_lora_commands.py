"""python -m mmdit lora, and --lora."""

import json

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from mmdit import adapters, checkpoint
from mmdit.__main__ import COMMANDS
from mmdit.adapters.commands import weighted
from mmdit.sampling.pipeline import Pipeline

from .test_adapters import PRESETS, inputs, model_of
from .test_lora_files import adapted, deltas, same


@pytest.fixture
def files(tmp_path):
    """(base weights, a LoRA of it in diffusers' format, its adapter)."""
    config = PRESETS["sd35-medium"]
    checkpoint.save(model_of(config), tmp_path / "base.safetensors")
    adapter = adapters.of_model(adapted(config))
    return tmp_path / "base.safetensors", adapters.save(adapter, tmp_path / "lora", config, format="diffusers"), adapter


def lora(*arguments):
    COMMANDS["lora"]([str(argument) for argument in arguments])


def test_info_says_what_is_there(files, capsys):
    base, file, adapter = files
    lora("info", file, "--base", base)
    out = capsys.readouterr().out
    assert "format diffusers" in out and "blocks.image.attn2.qkv" in out
    change = torch.stack([deltas(adapter)[name].norm() for name in ("blocks.0.image.attn2.proj",)]).norm()
    assert f"{change:.4g}" in next(line for line in out.splitlines() if "attn2.proj" in line)


def test_a_file_that_is_none_is_one_line(files, capsys):
    base, *_ = files
    with pytest.raises(SystemExit, match=r"base.safetensors is no LoRA that can be read"):
        lora("info", base)


def test_convert_there_and_back(files, tmp_path):
    base, file, adapter = files
    lora("convert", file, tmp_path / "k.safetensors", "--format", "kohya", "--base", base)
    lora("convert", tmp_path / "k.safetensors", tmp_path / "n.safetensors", "--format", "native", "--base", base)
    same(adapters.read(tmp_path / "n.safetensors"), adapter, rtol=1e-5, atol=1e-6)


def test_merge_with_strengths(files, tmp_path):
    base, file, adapter = files
    lora("merge", base, f"{file}:0.5", f"{file}:-0.25", "--out", tmp_path / "merged.safetensors", "--layout", "sd3")
    merged = checkpoint.load(tmp_path / "merged.safetensors")
    expected = model_of(merged.config)
    adapters.load(expected, adapter.times(0.25))
    x = inputs(merged.config)
    torch.testing.assert_close(merged(*x), expected(*x), rtol=1e-4, atol=1e-5)


def test_extract_gets_back_what_was_merged_and_says_what_it_holds(files, tmp_path, capsys):
    base, file, adapter = files
    lora("merge", base, file, "--out", tmp_path / "merged.safetensors")
    lora("extract", tmp_path / "merged.safetensors", base, tmp_path / "x.safetensors", "--rank", 3)
    assert "rank 3 holds 100.0% of the squared difference" in capsys.readouterr().out
    same(adapters.read(tmp_path / "x.safetensors"), adapter, rtol=1e-3, atol=1e-5)


def test_resize_keeps_the_largest_part(files, tmp_path, capsys):
    base, file, adapter = files
    lora("resize", file, tmp_path / "r.safetensors", "--rank", 1, "--base", base, "--format", "native")
    found, whole = deltas(adapters.read(tmp_path / "r.safetensors")), deltas(adapter)
    name = "blocks.0.context.attn.proj"
    u, s, vh = torch.linalg.svd(whole[name])
    torch.testing.assert_close(found[name], s[0] * u[:, :1] @ vh[:1], rtol=1e-4, atol=1e-6)
    squared = lambda deltas: sum(float(delta.square().sum()) for delta in deltas)  # noqa: E731
    lost = squared(whole[n] - found[n] for n in whole) / squared(whole.values())
    assert f"rank 1 holds {1 - lost:.1%}" in capsys.readouterr().out


def test_a_strength_is_a_number(tmp_path):
    assert weighted("a.safetensors:0.8") == (type(tmp_path)("a.safetensors"), 0.8)
    (tmp_path / "odd:name").touch()
    assert weighted(str(tmp_path / "odd:name"))[1] == 1.0
    with pytest.raises(ValueError, match="expected FILE or FILE:STRENGTH"):
        weighted("a.safetensors:strong")


def test_a_pipeline_draws_with_it_and_says_so(folders, tmp_path):
    _, folder = folders()
    pipe = Pipeline.from_pretrained(folder)
    settings = {"num_inference_steps": 2, "height": 32, "width": 32, "progress": False}
    before = pipe("a cat", **settings).images[0]
    model = checkpoint.load(folder / "transformer")
    adapters.attach(model, adapters.Lora(rank=2, targets=("all",)))
    for _, layer in adapters.layers(model):
        torch.nn.init.normal_(layer.lora_b, std=0.5)
    file = adapters.save(adapters.of_model(model), tmp_path / "x.safetensors", model.config, format="kohya")
    pipe.load_lora(file, 0.8)
    drawn = pipe("a cat", **settings)
    assert drawn.images[0].tobytes() != before.tobytes()
    assert drawn.parameters[0]["lora"] == [[str(file), 0.8]]
    adapters.remove(pipe.model)
    assert pipe("a cat", **settings).images[0].tobytes() == before.tobytes()
    COMMANDS["sample"]([str(folder), "a cat", "--steps", "2", "--size", "32", "32", "--out", str(tmp_path / "a.png"),
                        "--lora", f"{file}:0.8", "--lora", str(file)])  # fmt: skip
    assert json.loads(Image.open(tmp_path / "a.png").text["parameters"])["lora"] == [[str(file), 0.8], [str(file), 1.0]]
    assert load_file(file)
