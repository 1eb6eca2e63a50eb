"""CLIP through open_clip: the features, and the score, that transformers gives with the same weights."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

from mmdit import Pipeline
from mmdit.encoders import Clip, OpenClip, build, single_file
from tests.mmdit.pipelines import scattered
from train.evaluate import critics

pytest.importorskip("open_clip")
TEXTS = ["a red circle", "Two BLUE squares — and a long tail of words " * 4, "", "日本語 🙂 it's 2024's best"]
NAMES = (
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.encoder\.layers", "transformer.resblocks"), (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^vision_model\.embeddings\.class_embedding", "visual.class_embedding"),
    (r"^vision_model\.embeddings\.patch_embedding", "visual.conv1"),
    (r"^vision_model\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"^vision_model\.pre_layrnorm", "visual.ln_pre"), (r"^vision_model\.post_layernorm", "visual.ln_post"),
    (r"^vision_model\.encoder\.layers", "visual.transformer.resblocks"), (r"layer_norm([12])", r"ln_\1"),
    (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), (r"self_attn\.out_proj", "attn.out_proj"),
)  # fmt: skip


def as_open_clip(model):
    """A state dict of transformers' CLIPModel under open_clip's names."""
    found, halves = {}, {}
    for name, value in model.state_dict().items():
        for old, new in NAMES:
            name = re.sub(old, new, name)
        if match := re.search(r"self_attn\.([qkv])_proj\.(weight|bias)", name):
            halves.setdefault(name[: match.start()] + f"attn.in_proj_{match[2]}", {})[match[1]] = value
        elif name in ("text_projection.weight", "visual_projection.weight"):
            found["text_projection" if name[0] == "t" else "visual.proj"] = value.T.contiguous()
        elif not name.endswith("position_ids"):
            found[name] = value
    return found | {name: torch.cat([parts[p] for p in "qkv"]) for name, parts in halves.items()}


@pytest.fixture(scope="module", params=("clip_l", "clip_g"))
def both(request, tmp_path_factory):
    """(part, the folder transformers reads, the folder open_clip reads): random weights, small, CLIP's vocabulary."""
    torch.manual_seed(3)
    act = single_file.ACTIVATIONS[request.param]
    config = transformers.CLIPConfig(
        projection_dim=96,
        text_config={"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2,
                     "hidden_act": act, "bos_token_id": 49406, "eos_token_id": 49407, "projection_dim": 96},
        vision_config={"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "hidden_act": act, "image_size": 32, "patch_size": 8},
    )  # fmt: skip
    model, folder = scattered(transformers.CLIPModel(config), 0.1), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "theirs")
    single_file.clip_tokenizer(transformers, request.param).save_pretrained(folder / "theirs")
    kind = "CLIPImageProcessorPil" if hasattr(transformers, "CLIPImageProcessorPil") else "CLIPImageProcessor"
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    getattr(transformers, kind)(**size).save_pretrained(folder / "theirs")
    layers = {"heads": 2, "width": 128, "layers": 3}
    vision = {"layers": 2, "width": 128, "head_width": 64, "patch_size": 8, "image_size": 32}
    cfg = {"embed_dim": 96, "quick_gelu": act == "quick_gelu", "vision_cfg": vision, "text_cfg": layers}
    (folder / "ours").mkdir()
    (folder / "ours" / "open_clip_config.json").write_text(json.dumps({"model_cfg": cfg, "preprocess_cfg": {}}))
    save_file(as_open_clip(model), folder / "ours" / "open_clip_model.safetensors")
    return request.param, folder / "theirs", folder / "ours"


def test_features_are_those_of_transformers(both):
    part, theirs, ours = both
    want = Clip(str(theirs), str(theirs), projected=part == "clip_g", beside=part == "clip_g")
    got = OpenClip(str(ours), part)
    assert (got.dim, got.pooled_dim, got.beside) == (want.dim, want.pooled_dim, want.beside)
    assert torch.equal(got.ids(TEXTS), want.ids(TEXTS))
    for one, other in zip(got.encode(TEXTS), want.encode(TEXTS), strict=True):
        torch.testing.assert_close(one.tokens, other.tokens, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.pooled, other.pooled, rtol=1e-4, atol=1e-4)
    again = build(got.spec())
    assert torch.equal(again.encode(TEXTS)[1].tokens, got.encode(TEXTS)[1].tokens)
    with pytest.raises(ValueError, match=r"text encoder openclip: the weights in .* are .*, not other"):
        build({**got.spec(), "weights": "other"})


def test_the_score_is_that_of_transformers(both, tmp_path):
    _, theirs, ours = both
    images = np.random.default_rng(0).integers(0, 256, (3, 40, 48, 3), dtype=np.uint8)
    got, want = critics.clip(ours), critics.clip(theirs)
    assert isinstance(got, critics.OpenClip) and isinstance(want, critics.Clip)
    shutil.copytree(theirs, tmp_path / "both")
    shutil.copytree(ours, tmp_path / "both", dirs_exist_ok=True)
    assert isinstance(critics.clip(tmp_path / "both"), critics.Clip)                     # as before there was a choice
    np.testing.assert_allclose(got.embedded(images), want.embedded(images), rtol=1e-3, atol=1e-3)
    assert got.score(images, TEXTS[:3]) == pytest.approx(want.score(images, TEXTS[:3]), abs=1e-4)


def test_a_pipeline_takes_open_clips_folders(both, folders):
    """In place of transformers'. They are not written into diffusers' folder, which has no place for them."""
    part, _, ours = both
    from mmdit.encoders.sd3 import Sd3Text, clip

    encoder = clip(str(ours), part=part)
    given = {"clip_l": encoder if part == "clip_l" else None, "clip_g": encoder if part == "clip_g" else None}
    other = 64
    text = Sd3Text(**given, t5=None, context_dim=256, pooled_dim=encoder.pooled_dim + other)
    assert text.encode(["a cat"]).context.shape == (1, 333, 256)
    pipe = Pipeline.from_pretrained(folders()[1], device="cpu")
    pipe.text = text
    with pytest.raises(ValueError, match=r"is a CLIP in open_clip's files, which have no place in diffusers' folder"):
        pipe.save_pretrained(ours.parent / "saved")


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda c, t: t.pop("ln_final.bias"), r"open_clip_model\.safetensors misses ln_final\.bias"),
        (lambda c, t: t.update({"text.x": torch.ones(1)}), r"has unknown text\.x"),
        (lambda c, t: c["model_cfg"]["text_cfg"].update(hf_model_name="x"), r"no CLIP as .*: text_cfg has hf_"),
        (lambda c, t: c["model_cfg"]["text_cfg"].update(no_causal_mask=True, pool_type="last"),
         r"describes no CLIP as OpenAI's: text_cfg has no_causal_mask, pool_type"),
        (lambda c, t: t.clear(), r"misses "),
    ],
    ids=("missing", "unknown", "other", "mask", "empty"),
)  # fmt: skip
def test_what_does_not_fit_is_named(spoil, message, both, tmp_path):
    from safetensors.torch import load_file

    config = json.loads((both[2] / "open_clip_config.json").read_text())
    tensors = load_file(both[2] / "open_clip_model.safetensors")
    spoil(config, tensors)
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    save_file(tensors, tmp_path / "open_clip_model.safetensors")
    with pytest.raises(ValueError, match=message):
        OpenClip(str(tmp_path), both[0])
    (tmp_path / "open_clip_model.safetensors").rename(tmp_path / "open_clip_pytorch_model.bin")
    if "text_cfg" not in message:
        with pytest.raises(FileNotFoundError, match=r"holds no open_clip_model\.safetensors; pickles are never loaded"):
            OpenClip(str(tmp_path), both[0])
