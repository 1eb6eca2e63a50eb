"""A released single file with everything in it: the pictures of the folder it came from; what is missing is named."""

import logging

import numpy as np
import pytest
import torch
import transformers
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from mmdit import Pipeline, checkpoint
from mmdit.__main__ import COMMANDS
from mmdit.encoders import Clip, build
from mmdit.encoders import single_file as reading
from tests.mmdit.single_files import made, rounded, written

open_clip = pytest.importorskip("open_clip")
PROMPTS = ["a red circle, 3 of them & <more>", "Two BLUE squares — at the top\tand a very long tail of words " * 3]
FP8 = {"fp8": "plain", "fp8-scaled": "scaled"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """storage -> (the pipeline's folder, its single file); made when first asked for."""
    found = {}

    def get(storage="fp16"):
        if storage not in found:
            pipe, folder = made(transformers), tmp_path_factory.mktemp(storage)
            rounded(pipe)
            pipe.to(torch.float16 if storage == "fp16" else torch.bfloat16).save_pretrained(folder / "folder")
            file = written(folder / "folder", folder / "all.safetensors", FP8.get(storage))
            found[storage] = folder / "folder", file
        return found[storage]

    return get


def drawn(pipe):
    out = pipe(PROMPTS, num_inference_steps=4, guidance_scale=4.0, height=64, width=64, seed=3, progress=False)
    return np.stack([np.asarray(image) for image in out.images])


@pytest.mark.parametrize("storage", ("fp16", "bf16", "fp8", "fp8-scaled"))
def test_one_file_draws_what_its_folder_draws(storage, saved):
    folder, file = saved(storage)
    want = Pipeline.from_pretrained(folder, device="cpu")
    got = Pipeline.from_single_file(file, t5_tokenizer=folder / "tokenizer_3", device="cpu")
    for ours, theirs in zip(got.text.encoders, want.text.encoders, strict=True):
        assert torch.equal(ours.ids(PROMPTS), theirs.ids(PROMPTS)) and ours.model.dtype == theirs.model.dtype
    dtypes = [{p.dtype for p in pipe.model.parameters()} for pipe in (got, want)]
    assert dtypes[0] == dtypes[1] and len(dtypes[0]) == 1 and got.shift == 3.0
    assert np.array_equal(drawn(got), picture := drawn(want)) and picture.std() > 5


def test_the_tokenizer_is_open_clips():
    """Which pads with 0. It also undoes HTML's entities, which the released pipelines do not."""
    texts = ["wow! a cat", *PROMPTS[1:], "", "naïve café — 日本語 🙂", "it's 2024's   best", "a photo of a cat"]
    want = open_clip.tokenize(texts)
    padded = torch.arange(77) > want.argmax(-1, keepdim=True)
    for part, pad in (("clip_l", 49407), ("clip_g", 0)):
        tokenizer = reading.clip_tokenizer(transformers, part)
        got = tokenizer(texts, padding="max_length", max_length=77, truncation=True, return_tensors="pt").input_ids
        assert torch.equal(got[1:], want.masked_fill(padded, pad)[1:])
        # In the released folders "!" is CLIP-G's padding, so it is read as that in a prompt too.
        assert torch.equal(got[0] != want.masked_fill(padded, pad)[0], (want[0] == 256) & (part == "clip_g"))


def test_parts_from_files_of_their_own(saved, tmp_path):
    """As SD3.5 comes: the model and the autoencoder, and each text encoder in a file without a prefix."""
    folder, _ = saved()
    prefixes = {name: f"text_encoders.{name}.transformer." for name in ("clip_l", "clip_g", "t5xxl")}
    file = written(folder, tmp_path / "model-and-vae.safetensors", without=set(prefixes.values()))
    with pytest.raises(FileNotFoundError, match=r"clip_l: nothing at /nowhere"):
        Pipeline.from_single_file(file, clip_l="/nowhere", device="cpu")
    with pytest.raises(ValueError, match=r"t5xxl is given without t5_tokenizer"):
        Pipeline.from_single_file(file, t5xxl=file, device="cpu")
    diffusers_names = folder / "vae" / "diffusion_pytorch_model.safetensors"
    with pytest.raises(ValueError, match=r"its names are diffusers': give the folder with its config\.json"):
        Pipeline.from_single_file(saved()[1], autoencoder=diffusers_names, device="cpu")
    with pytest.raises(ValueError, match=r"holds no clip_l \(text_encoders\.clip_l\.tr.*\*\), clip_g .*; give"):
        Pipeline.from_single_file(file, device="cpu")
    files = {}
    for name, prefix in prefixes.items():
        alone = load_file(saved()[1])
        alone = {k.removeprefix(prefix): v for k, v in alone.items() if k.startswith(prefix)}
        alone["logit_scale"] = torch.tensor(4.6)                                      # in fp32, and no part of it
        save_file(alone, files.setdefault(name, tmp_path / f"{name}.safetensors"))
    got = Pipeline.from_single_file(file, **files, t5_tokenizer=folder / "tokenizer_3", device="cpu")
    assert np.array_equal(drawn(got), drawn(Pipeline.from_pretrained(folder, device="cpu")))


def test_t5_is_left_out_where_its_tokenizer_is_and_that_is_said(saved, caplog):
    folder, file = saved()
    with caplog.at_level(logging.WARNING):
        pipe = Pipeline.from_single_file(file, device="cpu")
    assert "T5 lacks its tokenizer (t5_tokenizer=); drawing without T5" in caplog.text
    assert np.array_equal(drawn(pipe), drawn(Pipeline.from_pretrained(folder, device="cpu", t5=False)))
    caplog.clear()
    Pipeline.from_single_file(file, device="cpu", t5=False)
    assert not caplog.text                                                                          # it was asked for


def spoiled(file, tmp_path, drop="", **put):
    tensors = {name: value for name, value in load_file(file).items() if not drop or drop not in name}
    save_file(tensors | put, tmp_path / "spoiled.safetensors")
    return tmp_path / "spoiled.safetensors"


CLIP, T5 = "text_encoders.clip_g.transformer.", "text_encoders.t5xxl.transformer."


@pytest.mark.parametrize(
    "drop, message",
    [
        (f"{CLIP}text_model.encoder.layers.1.mlp.fc1.bias", r"missing text_model\.encoder\.layers\.1\.mlp\.fc1\.bias"),
        (f"{CLIP}text_projection.weight", r"missing text_projection\.weight"),
        (f"{CLIP}text_model.final_layer_norm", r"missing text_model\.final_layer_norm\.bias; missing text_m"),
        (f"{T5}encoder.block.0.layer.0.SelfAttention.relative", r"missing encoder\.block\.0\..*relative_attention"),
        ("first_stage_model.decoder.up.2.block.1.conv2.weight", r"misses decoder\.up_blocks\.1\.resnets\.1\.conv2"),
        ("first_stage_model.", r"holds no autoencoder \(first_stage_model\.\*\); give autoencoder: a file or folder"),
        ("model.diffusion_model.joint_blocks.1.x_block.mlp.fc1.weight", r"missing joint_blocks\.1\.x_block\.mlp\.fc1"),
    ],
    ids=("layer", "projection", "norm", "t5", "autoencoder-tensor", "autoencoder", "model"),
)  # fmt: skip
def test_what_is_missing_is_named(drop, message, saved, tmp_path):
    folder, file = saved()
    with pytest.raises(ValueError, match=message):
        Pipeline.from_single_file(
            spoiled(file, tmp_path, drop), device="cpu", t5_tokenizer=folder / "tokenizer_3"
        )  # fmt: skip


def test_a_folders_encoder_without_a_tensor_is_refused(saved, tmp_path):
    """transformers would draw it at random."""
    folder, _ = saved()
    broken = tmp_path / "broken"
    for path in (folder / "text_encoder").iterdir():
        (broken / path.name).parent.mkdir(exist_ok=True)
        (broken / path.name).write_bytes(path.read_bytes())
    tensors = load_file(broken / "model.safetensors")
    tensors.pop("text_model.encoder.layers.2.mlp.fc2.weight")
    save_file(tensors, broken / "model.safetensors", {"format": "pt"})
    short = {"text_model.encoder.layers.0.mlp.fc1.bias": torch.zeros(3)}
    with pytest.raises(ValueError, match=r"broken: missing text_model\.encoder\.layers\.2\.mlp\.fc2\.weight"):
        Clip(str(broken), str(folder / "tokenizer"))
    save_file(load_file(folder / "text_encoder" / "model.safetensors") | short, broken / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.fc1\.bias has shape \[3\], expected \[128\]"):
        Clip(str(broken), str(folder / "tokenizer"))


@pytest.mark.parametrize("scale, message", ((torch.ones(128, 1), r"is not one number"), (None, None)))
def test_fp8_with_scales_of_another_kind_is_refused(scale, message, saved, tmp_path):
    _, file = saved("fp8-scaled")
    name = "model.diffusion_model.joint_blocks.0.x_block.attn.proj."
    if scale is None:                                                                    # newer files' name of the same
        moved = {name + "weight_scale": load_file(file)[name + "scale_weight"], name + "input_scale": torch.ones(1)}
        again = checkpoint.load(spoiled(file, tmp_path, name + "scale_weight", **moved)).state_dict()
        want = checkpoint.load(file).state_dict()
        assert all(torch.equal(value, want[key]) for key, value in again.items())
        return
    with pytest.raises(ValueError, match=message):
        checkpoint.load(spoiled(file, tmp_path, **{name + "scale_weight": scale}))


def test_a_pipeline_of_a_file_is_saved_as_a_folder_that_diffusers_reads(saved, tmp_path):
    folder, file = saved()
    pipe = Pipeline.from_single_file(file, t5_tokenizer=folder / "tokenizer_3", device="cpu")
    pipe.save_pretrained(tmp_path / "again")
    StableDiffusion3Pipeline.from_pretrained(tmp_path / "again")
    assert np.array_equal(drawn(Pipeline.from_pretrained(tmp_path / "again", device="cpu")), drawn(pipe))


def test_a_file_serves_as_encoders_of_training_too(saved):
    _, file = saved()
    encoder = Clip(str(file), part="clip_g", beside=True)
    again = build(encoder.spec())
    assert again.spec() == encoder.spec() and again.beside
    assert torch.equal(again.encode(["a cat"])[0].tokens, encoder.encode(["a cat"])[0].tokens)
    with pytest.raises(ValueError, match=r"part is ''; expected one of clip_l, clip_g"):
        Clip(str(file))


def test_the_command_draws_from_one_file(saved, tmp_path):
    folder, file = saved("bf16")
    command = [str(file), PROMPTS[0], "--steps", "2", "--size", "64", "64", "--device", "cpu", "--out",
               str(tmp_path / "out.png")]  # fmt: skip
    COMMANDS["sample"]([*command, "--t5-tokenizer", str(folder / "tokenizer_3")])
    pipe = Pipeline.from_single_file(file, t5_tokenizer=folder / "tokenizer_3", device="cpu")
    want = pipe(PROMPTS[0], num_inference_steps=2, height=64, width=64, progress=False).images[0]
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), np.asarray(want))
    with pytest.raises(ValueError, match=r"is a single file, which holds the model; weights are for"):
        COMMANDS["sample"]([*command, "--weights", str(file)])
    with pytest.raises(ValueError, match=r"is a pipeline's folder; clip_l are for a released single file"):
        COMMANDS["sample"]([str(folder), *command[1:], "--clip-l", str(file)])
