"""Released weights in diffusers' folders: the same text features, the same pictures, and back."""

import io
import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from safetensors.torch import save_file

from mmdit import Pipeline, checkpoint, commands
from mmdit.__main__ import COMMANDS
from mmdit.autoencoder import to_float, to_uint8
from mmdit.encoders import T5, Clip, Sd3Text
from mmdit.model import MMDiT
from mmdit.sampling.references import encoded
from mmdit.sampling.sample import Settings
from tests.mmdit.conftest import VARIANTS

from ..processes import called
from .forms import forms

PROMPTS = ["a red circle", "two blue squares at the top and a very long tail of words " * 3]


def drawn_by_diffusers(pipe, latents, **settings):
    out = pipe(prompt=PROMPTS, negative_prompt=["ugly", ""], latents=latents, output_type="np", **settings)
    return np.round(out.images * 255).astype(int)


def difference(images, theirs):
    return np.abs(np.stack([np.asarray(i) for i in images]).astype(int) - theirs).max()


@pytest.mark.parametrize("name", VARIANTS)
def test_draws_what_diffusers_draws_and_a_folder_saved_here_runs_there(name, folders, tmp_path):
    theirs, folder = folders(name)
    latents = torch.randn(2, 16, 8, 12)
    settings = {"num_inference_steps": 28, "guidance_scale": 5.0, "height": 64, "width": 96}
    want = drawn_by_diffusers(theirs, latents, **settings)
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    out = pipe(PROMPTS, negative_prompt=["ugly", ""], latents=latents, progress=False, **settings)
    assert out.images[0].size == (96, 64) and want.std() > 5
    assert difference(out.images, want) <= 2
    pipe.save_pretrained(tmp_path / "ours")
    again = StableDiffusion3Pipeline.from_pretrained(tmp_path / "ours")
    again.set_progress_bar_config(disable=True)
    assert np.abs(drawn_by_diffusers(again, latents, **settings) - want).max() <= 2


@pytest.mark.parametrize("guidance", (0.0, 0.5, 1.0))
def test_guidance_up_to_one_is_none_as_in_diffusers(guidance, folders):
    theirs, folder = folders()
    latents = torch.randn(2, 16, 8, 8)
    settings = {"num_inference_steps": 4, "guidance_scale": guidance, "height": 64, "width": 64, "latents": latents}
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    out = pipe(PROMPTS, progress=False, **settings)
    assert difference(out.images, drawn_by_diffusers(theirs, **settings)) <= 2
    other = pipe(["zzz qqq"] * 2, progress=False, **settings)
    assert difference(other.images, np.stack(list(map(np.asarray, out.images))).astype(int)) > 2    # the prompt is read


def test_skip_layer_guidance_is_diffusers(folders):
    theirs, folder = folders("sd35-medium")
    latents = torch.randn(2, 16, 8, 8)
    settings = {"num_inference_steps": 10, "guidance_scale": 4.0, "height": 64, "width": 64}
    skip = {"skip_guidance_layers": [1], "skip_layer_guidance_scale": 2.5}
    want = drawn_by_diffusers(theirs, latents, **settings, **skip, skip_layer_guidance_stop=0.4)
    pipe = Pipeline.from_pretrained(folder, device="cpu")
    call = {"negative_prompt": ["ugly", ""], "latents": latents, "progress": False, **settings}
    out = pipe(PROMPTS, **call, skip_blocks=(1,), skip_scale=2.5, skip_until=0.4)
    assert difference(out.images, want) <= 2
    assert difference(pipe(PROMPTS, **call).images, want) > 2


@pytest.mark.parametrize("absent", ((), ("text_encoder_3",), ("text_encoder",), ("text_encoder_2", "text_encoder_3")))
def test_text_is_that_of_encode_prompt(absent, folders):
    """All encoders, and subsets of them with zeros for the others, which diffusers only knows for T5."""
    theirs, folder = folders()
    text = Pipeline.from_pretrained(folder, device="cpu", t5="text_encoder_3" not in absent).text
    text = Sd3Text(
        *(None if name in absent else e for name, e in zip(("text_encoder", "text_encoder_2", "text_encoder_3"),
                                                            text.encoders, strict=True)),
        context_dim=48, pooled_dim=32,
    )  # fmt: skip
    got = text.encode(PROMPTS)
    with torch.no_grad():
        want, _, pooled, _ = theirs.encode_prompt(PROMPTS, PROMPTS, PROMPTS, do_classifier_free_guidance=False)
    parts = {"text_encoder": (slice(0, 77), slice(0, 12)), "text_encoder_2": (slice(0, 77), slice(12, 32)),
             "text_encoder_3": (slice(77, None), slice(None))}  # fmt: skip
    for name in absent:
        want[:, *parts[name]] = 0
        if name != "text_encoder_3":
            pooled[:, parts[name][1]] = 0
    assert got.context.shape == (2, 77 + 256, 48) and got.lengths.tolist() == [333, 333]
    torch.testing.assert_close(got.context, want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got.pooled, pooled, rtol=1e-4, atol=1e-5)


def test_a_prompt_that_is_cut_is_said_once(folders, caplog):
    _, folder = folders()
    clip = Clip(str(folder / "text_encoder"), str(folder / "tokenizer"))
    clip.encode(["a short one"])
    assert not caplog.records
    for _ in range(2):
        clip.encode(["a short one", "long " * 200])
    (said,) = [record.getMessage() for record in caplog.records]
    assert said.startswith("clip reads 77 tokens; a prompt of ") and said.endswith(" is cut there")


def test_encoders_come_back_from_their_specs_and_know_their_weights(folders):
    from mmdit import encoders

    _, folder = folders()
    clip = Clip(str(folder / "text_encoder_2"), str(folder / "tokenizer_2"), beside=True)
    t5 = T5(str(folder / "text_encoder_3"), str(folder / "tokenizer_3"), max_tokens=77)
    for encoder in (clip, t5):
        spec = json.loads(json.dumps(encoder.spec()))
        again = encoders.build(spec)
        assert torch.equal(again.encode(["abc"])[0].tokens, encoder.encode(["abc"])[0].tokens)
        assert (again.beside, again.max_tokens) == (encoder.beside, encoder.max_tokens)
        with pytest.raises(ValueError, match="not 0000"):
            encoders.build({**spec, "weights": "0000"})
    with pytest.raises(ValueError, match=r"the encoders have \[12, 20, 48\] channels; the model reads 30"):
        Sd3Text(Clip(str(folder / "text_encoder"), str(folder / "tokenizer")), clip, t5, context_dim=30, pooled_dim=32)


@pytest.fixture(scope="module")
def pipe(folders):
    return Pipeline.from_pretrained(folders()[1], device="cpu", offload=True, t5_tokens=77)


def draw(pipe, prompts, **settings):
    settings = {"num_inference_steps": 4, "height": 64, "width": 64, "progress": False, **settings}
    return [np.asarray(i).astype(int) for i in pipe(prompts, **settings).images]


def test_a_seed_gives_the_same_image_in_any_batch(pipe):
    together = draw(pipe, ["a", "b", "c"], seed=3)
    alone = draw(pipe, ["a", "b", "c"], seed=3, batch=1)
    assert all(np.abs(a - b).max() <= 1 for a, b in zip(alone, together, strict=True))
    assert np.abs(draw(pipe, ["a"], seed=4)[0] - together[0]).mean() > 3
    twice = draw(pipe, "a", num_images_per_prompt=2, seed=3)
    assert np.abs(twice[0] - together[0]).max() <= 1 and np.abs(twice[1] - twice[0]).mean() > 3


def test_guidance_interval_and_the_two_unconditionals(pipe):
    plain, empty = draw(pipe, "a", guidance_scale=1.0)[0], draw(pipe, "a")[0]
    assert (draw(pipe, "a", unconditional="zeros")[0] != empty).any()
    assert (draw(pipe, "a", negative_prompt="b")[0] != empty).any()
    assert (draw(pipe, "a", interval=(0.0, 0.0))[0] == plain).all()                     # never within
    assert (draw(pipe, "a", interval=(0.5, 0.9))[0] != plain).any()


@pytest.mark.parametrize(
    "given, message",
    [
        ({"prompt": None}, "prompt is None"), ({"prompt": ["a", 5]}, "prompt is"),
        ({"negative_prompt": 5}, "negative_prompt"),
        ({"image": 1}, "image is of"), ({"image": "x.png", "mask_image": 5}, "image is of"),
        ({"latents": np.zeros((1, 4, 8, 8))}, "latents is of"),
    ],
)  # fmt: skip
def test_what_is_of_another_kind_is_named(given, message, pipe):
    with pytest.raises(TypeError, match=message):
        pipe(**{"prompt": "a", "progress": False, **given})


def test_settings_of_a_pipeline(pipe):
    assert (draw(pipe, "a", negative_prompt=None)[0] == draw(pipe, "a")[0]).all()
    blocks = (block for block in (0,))
    assert (draw(pipe, "a", skip_blocks=blocks)[0] == draw(pipe, "a", skip_blocks=(0,))[0]).all()
    with pytest.raises(ValueError, match="shift is nan"):
        Pipeline(pipe.model, pipe.text, pipe.autoencoder, shift=float("nan"))
    with pytest.raises(ValueError, match=r"skip_from, skip_until is \(0.6, 0.5\)"):
        draw(pipe, "a", skip_from=0.6, skip_until=0.5)


def test_an_image_to_start_from_and_a_mask(pipe):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    vae = pipe.autoencoder
    decoded = to_uint8(vae.decode(vae.encode(to_float(np.array(picture)[None]))))[0].astype(int)
    steps = {"num_inference_steps": 20, "guidance_scale": 1.0}
    off = [np.abs(draw(pipe, "a", image=picture, strength=s, **steps)[0] - decoded).mean() for s in (0.1, 0.5, 1.0)]
    assert off == sorted(off) and off[0] < 0.6 * off[2]
    assert (draw(pipe, "a", image=picture, strength=1.0)[0] == draw(pipe, "a")[0]).all()          # all of the way
    mask = Image.fromarray(np.repeat(np.arange(64) >= 32, 64).reshape(64, 64).astype(np.uint8) * 255)
    kept = draw(pipe, "a", image=picture, mask_image=mask, strength=1.0, **steps)[0]
    assert np.abs(kept[:16] - decoded[:16]).mean() < 0.5 * np.abs(kept[48:] - decoded[48:]).mean()
    nothing = Image.fromarray(np.zeros((64, 64), np.uint8))
    assert np.abs(draw(pipe, "a", image=picture, mask_image=nothing, strength=1.0, **steps)[0] - decoded).max() <= 1


def test_what_a_mask_keeps_is_noised_to_the_time_of_the_step(pipe):
    picture, mask = Image.new("RGB", (64, 64), "red"), Image.new("L", (64, 64), 0)
    noise = torch.randn(1, 16, 8, 8)
    z, constrain = pipe._started(noise, picture, mask, 0.7)
    x0 = pipe.autoencoder.encode(to_float(np.array(picture)[None]))
    torch.testing.assert_close(z, 0.3 * x0 + 0.7 * noise)
    torch.testing.assert_close(constrain(torch.zeros_like(z), 0.4), 0.6 * x0 + 0.4 * noise)
    _, constrain = pipe._started(noise, picture, Image.new("L", (64, 64), 255), 0.7)
    assert not constrain(torch.zeros_like(z), 0.4).any()


def test_modulations_of_all_steps_are_made_at_once(pipe, monkeypatch):
    from mmdit.sampling import sample

    calls, condition = [], pipe.model.condition
    monkeypatch.setattr(pipe.model, "condition", lambda *a: calls.append(len(a[0])) or condition(*a))
    together = draw(pipe, "a")[0]
    assert calls == [4 * 2]                                                   # of four steps, both sides of guidance
    monkeypatch.setattr(sample, "MODULATION_BYTES", 0)
    assert np.abs(draw(pipe, "a")[0] - together).max() <= 1 and calls == [8, 2, 2, 2, 2]


def test_what_does_not_fit_is_named(pipe, folders, tmp_path):
    for match, changes in (
        ("size is 60 x 64; expected multiples of 16", {"height": 60}),
        ("unconditional is 'none'", {"unconditional": "none"}),
        (r"latents have shape \[1, 16, 4, 4\]; expected \[1, 16, 8, 8\]", {"latents": torch.zeros(1, 16, 4, 4)}),
        ("mask_image is given without image", {"mask_image": Image.new("L", (8, 8))}),
        (r"strength is 0; expected a number in \(0, 1\]", {"strength": 0}),
        ("2 negative prompts for 1 images", {"negative_prompt": ["a", "b"]}),
        ("solver is 'rk4'; expected one of euler, heun, dpmpp_2m", {"solver": "rk4"}),
        ("18 x 4 patches; the position table holds 8 x 8", {"height": 288}),
    ):
        with pytest.raises(ValueError, match=match):
            draw(pipe, "a", **changes)
    with pytest.raises(ValueError, match="schedule is 'karras'"):
        Settings(schedule="karras")
    with pytest.raises(FileNotFoundError, match="is no pipeline's folder"):
        Pipeline.from_pretrained(tmp_path)


def test_command_line_and_the_parameters_in_the_picture(folders, tmp_path):
    _, folder = folders()
    checkpoint.convert(folder, tmp_path / "sd3.safetensors", layout="sd3")
    command = ["mmdit", "sample", folder, "a cat", "--out", "x.png"]
    command += ["--steps", "3", "--size", "64", "96", "--weights", "sd3.safetensors", "--no-t5", "--offload"]
    command += ["--negative", "dog"]
    done = called(*command, "--solver", "dpmpp_2m", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "3/3" in done.stderr                                                                  # the progress bar
    with Image.open(tmp_path / "x.png") as picture:
        parameters = json.loads(picture.text["parameters"])
        assert picture.size == (96, 64)
    assert parameters["prompt"] == "a cat" and parameters["negative_prompt"] == "dog"
    assert (parameters["steps"], parameters["solver"], parameters["schedule"]) == (3, "dpmpp_2m", "sd3_release")


def test_an_editor_sees_the_picture_and_the_png_names_it(folders, tmp_path):
    """With columns of zeros for the picture it draws what it drew; with others the picture counts."""
    _, folder = folders()
    plain = Pipeline.from_pretrained(folder, device="cpu", t5=False)
    photo = Image.new("RGB", (64, 64), "teal")
    photo.save(tmp_path / "photo.png")
    settings = {"num_inference_steps": 2, "height": 64, "width": 64, "progress": False}
    before = plain("make it blue", **settings).images[0]
    weights = {name: value.clone() for name, value in plain.model.state_dict().items()}
    columns = weights["patch_embed.proj.weight"]
    for std, same in ((0.0, True), (0.2, False)):
        widened = {**weights, "patch_embed.proj.weight": torch.cat([columns, std * torch.randn_like(columns)], 1)}
        config = replace(plain.model.config, reference_channels=16)
        model = MMDiT(config)
        model.load_state_dict(widened)
        checkpoint.save(model, tmp_path / "editor", layout="diffusers")
        pipe = Pipeline.from_pretrained(folder, weights=tmp_path / "editor", device="cpu", t5=False)
        drawn = pipe("make it blue", edit=photo, image_guidance=1.0, **settings)
        assert (drawn.images[0].tobytes() == before.tobytes()) == same and drawn.parameters[0]["edit"]
    COMMANDS["sample"]([str(folder), "make it blue", "--weights", str(tmp_path / "editor"), "--no-t5", "--steps", "2",
                        "--edit", str(tmp_path / "photo.png"), "--size", "64", "64", "--image-guidance", "1",
                        "--device", "cpu", "--out", str(tmp_path / "x.png")])  # fmt: skip
    with Image.open(tmp_path / "x.png") as picture:
        assert json.loads(picture.text["parameters"])["edit"] == [str(tmp_path / "photo.png")]
        assert np.array_equal(np.asarray(picture), np.asarray(drawn.images[0]))
    with pytest.raises(ValueError, match=r"the model has neither reference_channels nor reference_tokens"):
        plain("make it blue", edit=photo, **settings)


def both(form):
    """A picture in this form, and what a viewer shows of it."""
    content, _, plain = forms(64, 64)[form]
    return Image.open(io.BytesIO(content)), Image.fromarray(plain)


@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("what", ("image", "mask_image"))
def test_pictures_are_read_as_viewers_show_them(what, form, pipe):
    steps = {"num_inference_steps": 2, "strength": 0.5}
    more = {"image": Image.new("RGB", (64, 64), "red")} if what == "mask_image" else {}
    got, want = (draw(pipe, "a", **{**more, what: picture}, **steps)[0] for picture in both(form))
    assert (got == want).all()


@pytest.mark.parametrize("form", forms())
def test_pictures_to_edit_too(form, pipe):
    config = replace(pipe.model.config, reference_channels=pipe.model.config.in_channels)
    (got,), (want,) = (encoded(picture, 1, (64, 64), config, pipe.autoencoder) for picture in both(form))
    assert torch.equal(got, want)


@pytest.mark.parametrize("shards", (False, True), ids=("one file", "shards"))
def test_every_part_may_be_there_as_a_variant_alone(shards, folders, tmp_path):
    theirs, plain = folders()
    folder = shutil.copytree(plain, tmp_path / "f")
    for part in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3", "vae"):
        shutil.rmtree(folder / part)
        getattr(theirs, part).save_pretrained(folder / part, variant="fp16", max_shard_size="20KB" if shards else "5GB")
        names = [path.name for path in (folder / part).glob("*.safetensors")]
        assert all(".fp16" in name for name in names) and (len(names) > 1) == shards, part
    want = draw(Pipeline.from_pretrained(plain, device="cpu"), "a")[0]
    got = draw(Pipeline.from_pretrained(folder, device="cpu"), "a")[0]
    assert np.abs(got - want).max() <= 1             # weights that lie elsewhere in memory: products round differently


@pytest.mark.parametrize(
    "flags, message",
    [
        (("--steps", "0"), "error: steps is 0"), (("--guidance", "nan"), "guidance is nan"),
        (("--skip-blocks", "9"), "skip_blocks names block 9; the model has 0 to 2"),
        (("--seed", str(1 << 64)), "seed is 18446744073709551616"),
        (("--strength", "0"), "strength is 0"), (("--shift", "0"), "shift is 0"),
        (("--weights", "lora.safetensors"), "holds low-rank adapters"), (("--image", "x.png"), "x.png"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_a_line_that_names_it(flags, message, folders, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file({"transformer_blocks.0.attn.to_q.lora.down.weight": torch.ones(2, 4)}, "lora.safetensors")
    sample = ["sample", str(folders()[1]), "a", "--size", "64", "64"]
    with pytest.raises(SystemExit) as stopped:
        commands.dispatch("python -m mmdit", "", COMMANDS, [*sample, *flags])
    assert message in str(stopped.value) and "\n" not in str(stopped.value)
    assert not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("seed", (None, 1.5, [3], 1 << 64))
def test_a_seed_is_one_integer_of_64_bits(seed, pipe):
    with pytest.raises((TypeError, ValueError), match="seed"):
        draw(pipe, "a", seed=seed)


def test_a_description_that_is_no_json_is_named(folders, tmp_path):
    folder = shutil.copytree(folders()[1], tmp_path / "f")
    (folder / "transformer" / "config.json").write_text("{")
    sample = ["sample", str(folder), "a", "--out", str(tmp_path / "x.png")]
    with pytest.raises(SystemExit) as stopped:
        commands.dispatch("python -m mmdit", "", COMMANDS, sample)
    assert "config.json" in str(stopped.value) and "\n" not in str(stopped.value)
