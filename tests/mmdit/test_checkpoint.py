"""Weights in and out: three layouts, exact both ways, strict, streamed."""

import json
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from diffusers import SD3Transformer2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmdit import MMDiT, checkpoint, presets
from mmdit.checkpoint.layouts import pieces
from tests.mmdit.pipelines import transformer

from ..processes import called

SMALL = {"in_channels": 16, "context_dim": 48, "pooled_dim": 32, "max_height": 128, "max_width": 128, "resolution": 64}
VARIANTS = {
    "sd3-medium": presets.by_depth(3, heads=2, head_dim=32, **{**SMALL, "qk_norm": False}),
    "sd35-medium": presets.by_depth(3, heads=2, head_dim=32, dual_attention=(0, 1), **SMALL),
    "sd35-large": presets.by_depth(3, heads=2, head_dim=32, **SMALL),
}


def model_of(config, dtype=torch.float32):
    torch.manual_seed(1)
    model = MMDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model.to(dtype).eval()


def same(a, b):
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), name


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("fp32", "bf16"))
@pytest.mark.parametrize("layout", ("sd3", "diffusers"))
@pytest.mark.parametrize("name", VARIANTS)
def test_round_trips_are_bitwise(name, layout, dtype, tmp_path):
    """native -> other -> native, by save and load, and by conversion on disk; sharded on the way."""
    model = model_of(VARIANTS[name], dtype)
    other = tmp_path / ("folder" if layout == "diffusers" else "other.safetensors")
    checkpoint.save(model, other, layout=layout)
    known = {"heads": 2, "head_dim": 32}
    loaded = checkpoint.load(other, **known)
    same(loaded.state_dict(), model.state_dict())
    assert replace(loaded.config, resolution=64) == replace(VARIANTS[name], resolution=64)
    checkpoint.save(model, tmp_path / "native.safetensors")
    files = checkpoint.convert(tmp_path / "native.safetensors", other, layout=layout, max_shard_bytes=200_000)
    assert sum(f.suffix == ".safetensors" for f in files) > 2
    index = next(f for f in files if f.name.endswith(".index.json"))
    back = tmp_path / "back.safetensors"
    checkpoint.convert(index, back, layout="native", **known)
    same(load_file(back), load_file(tmp_path / "native.safetensors"))


@pytest.mark.parametrize(
    "preset, released, diffusers", [("sd3_medium", 491, 683), ("sd35_medium", 665, 909), ("sd35_large", 923, 1227)]
)
def test_key_sets_and_shapes_of_the_released_models(preset, released, diffusers):
    config = getattr(presets, preset)()
    found, _ = pieces(config)
    sd3 = {p.sd3: p.shape for p in found}
    theirs = {name: p.part_shape("diffusers") for p in found for name in p.diffusers}
    assert (len(sd3), len(theirs)) == (released, diffusers)
    from mmdit.checkpoint.store import diffusers_config

    with torch.device("meta"):
        arguments = {k: v for k, v in diffusers_config(config).items() if not k.startswith("_")}
        reference = SD3Transformer2DModel(**arguments).state_dict()
    assert theirs == {name: tuple(value.shape) for name, value in reference.items()}
    assert sd3["joint_blocks.0.x_block.attn.qkv.weight"] == (3 * config.width, config.width)
    assert sd3[f"joint_blocks.{config.depth - 1}.context_block.adaLN_modulation.1.bias"] == (2 * config.width,)
    assert "joint_blocks.0.context_block.attn2.qkv.weight" not in sd3


@pytest.mark.parametrize("qk_norm, dual", [(False, ()), (True, ()), (True, (0, 2))], ids=str)
def test_a_folder_of_diffusers_is_the_same_function(qk_norm, dual, tmp_path):
    theirs = transformer(dual, qk_norm)
    theirs.save_pretrained(tmp_path / "theirs")
    ours = checkpoint.load(tmp_path / "theirs")
    latent, context = torch.randn(2, 16, 8, 12), torch.randn(2, 5, 48)
    pooled, t = torch.randn(2, 32), torch.tensor([0.3, 0.9])
    with torch.no_grad():
        want = theirs(latent, context, pooled, 1000 * t, return_dict=False)[0]
        torch.testing.assert_close(ours(latent, t, context, pooled), want, rtol=1e-4, atol=1e-4)
    checkpoint.save(ours, tmp_path / "ours", layout="diffusers")
    again = SD3Transformer2DModel.from_pretrained(tmp_path / "ours")
    same(again.state_dict(), theirs.state_dict())
    assert again.config.qk_norm == theirs.config.qk_norm


def test_a_released_file_holds_other_parts_and_says_so(tmp_path):
    model = model_of(VARIANTS["sd35-large"], torch.float16)
    checkpoint.save(model, tmp_path / "a.safetensors", layout="sd3")
    tensors = load_file(tmp_path / "a.safetensors")
    assert all(name.startswith("model.diffusion_model.") for name in tensors)
    tensors |= {"first_stage_model.decoder.x": torch.ones(2), "text_encoders.clip_l.y": torch.ones(3)}
    save_file(tensors, tmp_path / "b.safetensors")                       # without our metadata, as released ones are
    opened = checkpoint.open_checkpoint(tmp_path / "b.safetensors")
    assert opened.others == {"first_stage_model.": 1, "text_encoders.": 1}
    same(opened.model().state_dict(), model.state_dict())
    bare = {name.removeprefix("model.diffusion_model."): t for name, t in tensors.items() if name.startswith("model.")}
    same(checkpoint.load(bare).state_dict(), model.state_dict())             # a state dict, without the prefix
    save_file(tensors | {"lora_unet.x": torch.ones(1)}, tmp_path / "c.safetensors")
    with pytest.raises(ValueError, match=r"tensor lora_unet\.x belongs to nothing that is known"):
        checkpoint.load(tmp_path / "c.safetensors")


def spoiled(tmp_path, change, layout="sd3"):
    """A file of the released layout with its tensors changed."""
    path = tmp_path / "file.safetensors"
    checkpoint.save(model_of(VARIANTS["sd35-large"]), path, layout=layout)
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    return path


QKV, FC1 = (f"model.diffusion_model.joint_blocks.1.x_block.{n}.weight" for n in ("attn.qkv", "mlp.fc1"))


def nan(tensors):
    tensors[QKV][3, 4] = float("nan")


@pytest.mark.parametrize(
    "change, message",
    [
        (nan, rf"tensor {QKV} holds NaN or infinities"),
        (lambda t: t.pop(QKV), r"missing joint_blocks\.1\.x_block\.attn\.qkv\.weight"),
        (lambda t: t.update({FC1: t[FC1][:8].clone()}), r"mlp\.fc1\.weight has shape \[8, 64\], expected \[256, 64\]"),
        (lambda t: t.update({QKV + "x": torch.ones(1)}), r"unknown joint_blocks\.1\.x_block\.attn\.qkv\.weightx"),
        (lambda t: t.update({QKV: t[QKV].half()}), r"mixes dtypes: F32 .*F16 \(joint_blocks\.1\.x_block\.attn"),
        (lambda t: t.update({k: v.to(torch.int8) for k, v in t.items()}), r"has dtype I8; expected one of F64, .*E5M2"),
        (lambda t: t.update({"transformer_blocks.0.ff.x": torch.ones(1)}), r"mixes layouts: sd3 .* and diffusers"),
    ],
    ids=("nan", "missing", "misshaped", "unknown", "mixed-dtypes", "quantised", "mixed-layouts"),
)  # fmt: skip
def test_what_does_not_fit_is_named(change, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        checkpoint.load(spoiled(tmp_path, change))


def test_truncated_foreign_and_pickled_files(tmp_path):
    path = spoiled(tmp_path, lambda t: None)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"file\.safetensors is not a complete safetensors file"):
        checkpoint.load(path)
    path.write_bytes(whole)
    assert checkpoint.load(path, dtype=torch.bfloat16).blocks[0].image.attn.qkv.weight.dtype == torch.bfloat16
    save_file({"unet.conv.weight": torch.ones(2)}, path)
    with pytest.raises(ValueError, match=r"holds no MM-DiT in a layout that is known .* it has unet\.conv\.weight"):
        checkpoint.load(path)
    folder = tmp_path / "pickled"
    folder.mkdir()
    torch.save({"a": torch.ones(1)}, folder / "diffusion_pytorch_model.bin")
    with pytest.raises(ValueError, match="holds pickles only"):
        checkpoint.load(folder)
    with pytest.raises(ValueError, match="is a pickle, which can run code"):
        checkpoint.load(folder / "diffusion_pytorch_model.bin")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"holds no model\.safetensors"):
        checkpoint.load(tmp_path / "empty")


@pytest.mark.parametrize("name", ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
                                  "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight",
                                  "transformer_blocks.0.attn.to_q.lora.down.weight"))  # fmt: skip
def test_an_adapter_given_as_weights_is_told_apart(name, tmp_path):
    save_file({name: torch.ones(2, 4)}, tmp_path / "lora.safetensors")
    with pytest.raises(ValueError, match=r"lora\.safetensors holds low-rank adapters \(LoRA\), not a model's weights"):
        checkpoint.load(tmp_path / "lora.safetensors")


@pytest.mark.parametrize("kind", ("fp16", "bf16"))
def test_a_variant_alone_is_read_and_two_are_refused(kind, tmp_path):
    model = model_of(VARIANTS["sd35-large"])
    checkpoint.save(model, tmp_path / "m", layout="diffusers")
    plain = tmp_path / "m" / "diffusion_pytorch_model.safetensors"
    plain.rename(plain.with_name(f"diffusion_pytorch_model.{kind}.safetensors"))
    same(checkpoint.load(tmp_path / "m").state_dict(), model.state_dict())
    plain.with_name("diffusion_pytorch_model.fp32.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"holds the variants .*; expected one, or none"):
        checkpoint.load(tmp_path / "m")


def test_shards_that_are_missing_or_do_not_hold_what_the_index_says(tmp_path):
    model = model_of(VARIANTS["sd35-large"])
    files = checkpoint.save(model, tmp_path / "m.safetensors", max_shard_bytes=300_000)
    *shards, index = files
    assert shards[0].name == f"m-00001-of-{len(shards):05d}.safetensors"
    same(checkpoint.load(index).state_dict(), model.state_dict())
    same(checkpoint.load(tmp_path / "m.safetensors").state_dict(), model.state_dict())  # its name leads there
    table = json.loads(index.read_text())
    table["weight_map"]["absent.weight"] = shards[0].name
    index.write_text(json.dumps(table))
    with pytest.raises(ValueError, match="names tensors that its shards do not hold: absent"):
        checkpoint.load(index)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=f"names shards that are not there: {shards[1].name}"):
        checkpoint.load(index)
    index.write_text("{")
    with pytest.raises(ValueError, match="is no index of shards"):
        checkpoint.load(index)


def test_what_a_layout_cannot_hold_is_refused(tmp_path):
    wide = MMDiT(presets.tiny(max_width=32))
    with pytest.raises(ValueError, match="a square position table; the model has joint, 2 and 16 x 8"):
        checkpoint.save(wide, tmp_path / "x.safetensors", layout="sd3")
    with pytest.raises(ValueError, match="the model has joint, 3 and 16 x 16"):
        checkpoint.save(MMDiT(presets.tiny(weight_sets=3)), tmp_path / "x", layout="diffusers")
    with pytest.raises(ValueError, match="layout is 'onnx'; expected one of native, sd3, diffusers"):
        checkpoint.save(wide, tmp_path / "x.safetensors", layout="onnx")
    checkpoint.save(MMDiT(presets.tiny(weight_sets=3)), tmp_path / "three.safetensors")
    assert checkpoint.load(tmp_path / "three.safetensors").config.weight_sets == 3


def test_our_files_are_safetensors_to_the_library(tmp_path):
    """The writer is ours, because the library's holds a whole shard; the reader in this test is the library's."""
    model = model_of(VARIANTS["sd35-medium"], torch.bfloat16)
    checkpoint.save(model, tmp_path / "m.safetensors", extra={"a": 1})
    same(load_file(tmp_path / "m.safetensors"), model.state_dict())
    with safe_open(tmp_path / "m.safetensors", "pt") as file:
        assert json.loads(file.metadata()["extra"]) == {"a": 1}
    assert not list(tmp_path.glob("*.partial"))


def test_command_line(tmp_path):
    theirs = transformer((0,))
    theirs.save_pretrained(tmp_path / "theirs")
    run = lambda *words: called("mmdit", *words)  # noqa: E731
    done = run("convert", tmp_path / "theirs", tmp_path / "a.safetensors", "--layout", "sd3")
    assert done.returncode == 0 and "a.safetensors" in done.stdout, done.stderr
    back = run("convert", tmp_path / "a.safetensors", tmp_path / "back", "--layout", "diffusers")
    assert back.returncode == 0, back.stderr
    same(load_file(tmp_path / "back" / "diffusion_pytorch_model.safetensors"), theirs.state_dict())
    told = run("inspect", tmp_path / "a.safetensors")
    assert told.returncode == 0, told.stdout + told.stderr
    assert "layout sd3" in told.stdout and "dual_attention=(0,)" in told.stdout and "anomaly" not in told.stderr
    nans = spoiled(tmp_path, nan)
    told = run("inspect", nans)
    assert told.returncode == 1 and "anomaly: joint_blocks.1.x_block.attn.qkv.weight holds NaN" in told.stderr
    wrong = run("convert", tmp_path / "none", tmp_path / "x", "--layout", "sd3")
    assert wrong.returncode == 1 and wrong.stderr.startswith("error: ") and "Traceback" not in wrong.stderr


def test_conversion_holds_a_tensor_at_a_time(tmp_path, monkeypatch):
    """No part of what is written is larger than the largest projection, the stacked modulation included."""
    from mmdit.checkpoint import tensors

    model = model_of(VARIANTS["sd35-large"])
    checkpoint.save(model, tmp_path / "m.safetensors")
    sizes, write_parts = [], tensors._write_parts

    def measuring(file, name, tensor):
        def parts():
            for part in tensor.parts():
                sizes.append(part.numel())
                yield part

        write_parts(file, name, replace(tensor, parts=parts))

    monkeypatch.setattr(tensors, "_write_parts", measuring)
    chain = (("m.safetensors", "native"), ("s.safetensors", "sd3"), ("d", "diffusers"), ("n.safetensors", "native"))
    for (source, _), (target, layout) in pairwise(chain):
        checkpoint.convert(tmp_path / source, tmp_path / target, layout=layout)
    assert max(sizes) == 6 * 64 * 64 < model.modulation.linear.weight.numel()
