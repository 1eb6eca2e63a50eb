"""What evaluation says of pictures whose truth is known, and of a run."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit import Sampler
from train.config import Config
from train.data import scenes
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.data.shapes import Found
from train.data.shards import Cache
from train.data.sources import open_source
from train.engine.loop import train
from train.engine.metrics import frechet
from train.evaluate import emoji, held_out
from train.evaluate.critics import Clip, feature_network
from train.evaluate.prompts import compbench, fill, geneval
from train.evaluate.run import Evaluation, compared, evaluate, score_scenes

from .conftest import changed


@pytest.mark.parametrize("tag", scenes.TAGS)
def test_scenes_are_read_back_and_others_are_not_taken_for_them(tag):
    rng, prompts = np.random.default_rng(0), scenes.everything(tag)
    right, others = [], []
    for _ in range(12):
        one, other = (prompts[i] for i in rng.choice(len(prompts), 2, replace=False))
        image = scenes.draw(one, rng)
        right.append(scenes.correct(image, one))
        others.append(scenes.correct(image, other))
    assert all(right) and not any(others)


def test_a_scene_in_one_detail_wrong_is_wrong():
    rng = np.random.default_rng(1)
    by_text = {prompt["prompt"]: prompt for tag in scenes.TAGS for prompt in scenes.everything(tag)}
    drawn = {text: scenes.draw(prompt, rng) for text, prompt in by_text.items()}
    for shown, asked, verdict in [
        ("three circles", "two circles", False),
        ("two circles", "three circles", False),
        ("four circles", "a circle", True),                                     # GenEval lets others be there
        ("a red circle and a blue square", "a red circle", True),
        ("a red circle and a blue square", "a circle and a square", True),
        ("a red circle and a blue square", "a blue circle and a red square", False),
        ("a circle left of a square", "a square right of a circle", True),
        ("a circle left of a square", "a circle right of a square", False),
        ("a circle above a square", "a circle left of a square", False),
        ("two circles", "a circle and a square", False),
    ]:
        assert scenes.correct(drawn[shown], by_text[asked]) is verdict, (shown, asked)
    coloured = [by_text[f"{colour} circle"] for colour in ("a red", "a blue", "a green")]
    assert not all(scenes.correct(drawn["four circles"], prompt) for prompt in coloured)
    assert scenes.read(np.full((32, 32, 3), 235, np.uint8)) == []


def test_relation_is_genevals():
    """A tenth of both sizes counts for nothing, and the rest has to point more there than elsewhere (half, of one)."""
    at = lambda x, y: Found("red", "circle", x, y, 5.0)  # noqa: E731
    assert scenes.stands(at(8, 16), "left of", at(24, 16)) and not scenes.stands(at(8, 16), "above", at(24, 16))
    assert not scenes.stands(at(15, 16), "left of", at(16, 16)), "one pixel is within a tenth of 2 x 10"
    assert scenes.stands(at(8, 8), "left of", at(20, 20)) and scenes.stands(at(8, 8), "above", at(20, 20))
    assert not scenes.stands(at(12, 8), "left of", at(16, 24)), "2 of 4 pixels left, 14 of 16 above: mostly above"


def test_prompts_that_are_asked_are_new_where_there_are_many():
    for tag in ("colors", "position", "color_attr"):
        train_on, asked = ({p["prompt"] for p in part} for part in scenes.split(tag))
        assert len(asked) >= 8 and not asked & train_on
    records = open_source("scenes", copies=1)
    assert len(records) == 6 * (64 + 32) and len({record.key for record in records}) == len(records)
    assert {r.caption for r in records if r.split == "val"} == {prompt["prompt"] for prompt in scenes.asked()}


def test_retrieval_finds_what_was_asked_for_and_nothing_by_chance():
    rng = np.random.default_rng(0)
    wanted = rng.integers(0, 256, (64, 16, 16, 3), dtype=np.uint8)
    noisy = np.clip(wanted.astype(int) + rng.integers(-60, 60, wanted.shape), 0, 255).astype(np.uint8)
    assert emoji.retrieval(noisy, wanted) == 1
    assert emoji.retrieval(np.roll(noisy, 1, axis=0), wanted) == 0


def test_recolourings_are_of_other_hues_and_keep_what_is_grey():
    red = np.full((8, 8, 3), 255, np.uint8)
    red[:4] = (234, 90, 71)
    known = {"red heart": red, "heart": red, "page": np.full((8, 8, 3), 200, np.uint8)}
    asked = emoji.never_seen(known, 5)                              # no colour in the name, and a picture with a hue
    ((prompt, image),) = asked.items()
    colour = prompt.split()[1]
    assert prompt == f"a {colour} heart" and colour in ("green", "blue", "purple")
    hue, saturation = emoji.hue_and_saturation(image)
    assert np.abs(hue[:4] - emoji.HUES[colour]).max() < 3 and saturation[:4].min() > 0.5
    assert (image[4:] == 255).all()


def test_real_pictures_are_the_caches_whatever_the_model_draws(config):
    """A model of scaled latents is compared with the pictures themselves: drawn again, their distance is 0."""
    config = changed(config, unit_latents=True, steps=1)
    train(config)
    cache, sampler = Cache(config.cache), Sampler.load(config.run, "cpu")
    real = np.concatenate(list(held_out.pictures(cache)))
    colours = lambda images: images.reshape(len(images), -1, 3).mean(1).astype(np.float64)  # noqa: E731
    wanted = Evaluation(config.run, images=len(real))
    found = compared(wanted, sampler, cache, lambda asked: real, {"colours": colours}, None)
    assert found["colours"] == pytest.approx(0, abs=1e-6)


def test_score_of_scenes_that_are_all_right_and_all_wrong(tmp_path):
    by_text = {prompt["prompt"]: prompt for prompt in scenes.asked()}
    rng = np.random.default_rng(2)
    truth = score_scenes(lambda prompts: np.stack([scenes.draw(by_text[p], rng) for p in prompts]), tmp_path, 1)
    assert min(truth.values()) > 0.95 and (tmp_path / "scenes.png").is_file()
    nothing = score_scenes(lambda prompts: np.full((len(prompts), 32, 32, 3), 235, np.uint8), images=1)
    assert set(nothing.values()) == {0.0}


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A small CLIPModel with random weights, as save_pretrained leaves one."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tests.mmdit.pipelines import clip_tokenizer

    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    text = {"vocab_size": 60, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2,
            "num_attention_heads": 2, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}  # fmt: skip
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
              "image_size": 32, "patch_size": 8}  # fmt: skip
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    transformers.CLIPModel(config).save_pretrained(folder)
    clip_tokenizer("<|endoftext|>").save_pretrained(folder)
    processor = getattr(transformers, "CLIPImageProcessorPil", transformers.CLIPImageProcessor)
    processor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_clip_score_and_features_are_the_models_own(clip_folder):
    critic = Clip(clip_folder)
    rng = np.random.default_rng(3)
    images = rng.integers(0, 256, (70, 40, 48, 3), dtype=np.uint8)
    captions = [f"{'ab' * (i % 5)} c" for i in range(70)]
    pixels = critic.processor(list(images), return_tensors="pt")
    tokens = critic.tokenizer(captions, padding=True, return_tensors="pt")
    with torch.no_grad():
        out = critic.model(**pixels, **tokens)
    cosine = (out.logits_per_image.diagonal() / critic.model.logit_scale.detach().exp()).mean()
    assert critic.score(images, captions) == pytest.approx(float(cosine), abs=1e-5)
    features = critic.embedded(images)
    assert features.dtype == np.float64 and features.shape == (70, 12)
    unit = features / np.linalg.norm(features, axis=1, keepdims=True)
    np.testing.assert_allclose(unit, out.image_embeds.numpy(), atol=1e-5)


def flat(images):
    """A feature network for the tests: 2 x 2 means of each channel."""
    n, h, w, c = images.shape
    return images.reshape(n, 2, h // 2, 2, w // 2, c).mean((2, 4)).reshape(n, -1)


def test_a_run_is_evaluated_with_what_is_at_hand(config, clip_folder, tmp_path):
    precompute(Precompute(source="scenes", cache=tmp_path / "scenes", copies=1))
    config = changed(config, cache=tmp_path / "scenes")
    train(config)
    lists = tmp_path / "evaluation_metadata.jsonl", tmp_path / "color_val.txt"
    lists[0].write_text('{"tag": "colors", "include": [], "prompt": "a red circle"}\n')
    lists[1].write_text("a red circle\tcolor\n")
    wanted = Evaluation(
        config.run, images=20, reference=30, clip=clip_folder, features=f"{__name__}:flat", geneval=lists[0],
        compbench=(lists[1],), steps=2, device="cpu",
    )  # fmt: skip
    found = evaluate(wanted)
    last = [json.loads(line) for line in (config.run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(last) if "validation/loss" in line)
    names = [name for name in found if name.startswith("validation/")]
    assert len(names) == 9
    assert {name: found[name] for name in names} == pytest.approx({name: last[name] for name in names}, rel=1e-5)
    assert -1 <= found["CLIP score"] <= 1 and found["FID (CLIP features)"] > 0
    assert set(found) >= {f"scenes/{tag}" for tag in (*scenes.TAGS, "mean")}
    kept = json.loads((config.run / "evaluation.json").read_text())
    assert kept.pop("with")["steps"] == 2 and kept == found and found["reference pictures"] == 30
    assert (config.run / "geneval" / "00000" / "samples" / "00003.png").is_file()
    assert len(list((config.run / "compbench" / "color_val" / "samples").glob("a red circle_00000*.png"))) == 10

    # the distance, from the pictures that are there: drawn again, and the validation split's first thirty
    from mmdit.sampling.sample import Sampler

    asked = held_out.captions(Cache(config.cache), 20)
    drawn = Sampler.load(config.run, "cpu")(asked, steps=2, guidance=5.0)
    truth = [np.asarray(r.image()) for r in open_source("scenes", copies=1) if r.split == "val"][:30]
    distance = frechet(flat(drawn).astype(float), flat(np.stack(truth)).astype(float))
    assert found[f"Frechet distance ({__name__}:flat)"] == pytest.approx(distance, rel=0.02), "latents are bf16"


def test_sample_folders_are_those_the_benchmarks_read_and_go_on(tmp_path):
    lines = [
        '{"tag": "counting", "include": [{"class": "bird", "count": 2}], "prompt": "a photo of two birds"}',
        '{"tag": "colors", "include": [{"class": "cup", "count": 1}], "prompt": "a photo of a cup"}',
    ]
    (tmp_path / "meta.jsonl").write_text("\n".join(lines))
    calls = []

    def draw(prompts, first):
        calls.append((prompts[0], len(prompts), first))
        return np.full((len(prompts), 8, 8, 3), first, np.uint8)

    tasks = list(geneval(tmp_path / "meta.jsonl", tmp_path / "out", images=3))
    out = tmp_path / "out"
    fill(tasks, draw, out, {"seed": 0})
    assert calls == [("a photo of two birds", 3, 0), ("a photo of a cup", 3, 3)]
    for i, line in enumerate(lines):
        folder = tmp_path / "out" / f"{i:05}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == json.loads(line)
        assert sorted(p.name for p in (folder / "samples").iterdir()) == ["00000.png", "00001.png", "00002.png"]
        assert np.asarray(Image.open(folder / "samples" / "00002.png")).max() == 3 * i
    (tmp_path / "out" / "00001" / "samples" / "00001.png").unlink()
    fill(tasks, draw, out, {"seed": 0})
    assert calls[2:] == [("a photo of a cup", 3, 3)], "only what is not whole, from the same noise"

    with pytest.raises(ValueError, match="out holds pictures drawn with other seed; move it away"):
        fill(tasks, draw, out, {"seed": 1})
    with pytest.raises(ValueError, match="drawn with other prompts"):
        fill(tasks[1:], draw, out, {"seed": 0})

    (tmp_path / "color_val.txt").write_text("a green bench and a blue bowl\n\na red car\tcolor\n")
    fill(list(compbench(tmp_path / "color_val.txt", tmp_path / "bench", images=2)), draw, tmp_path / "bench", {})
    assert sorted(p.name for p in (tmp_path / "bench" / "samples").iterdir()) == [
        "a green bench and a blue bowl_000000.png", "a green bench and a blue bowl_000001.png",
        "a red car_000002.png", "a red car_000003.png",
    ]  # fmt: skip


def test_evaluation_errors_name_what_came(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is no run folder: it holds no config\.json"):
        evaluate(Evaluation(tmp_path))
    with pytest.raises(FileNotFoundError, match="nowhere is no folder of a CLIPModel"):
        Clip(tmp_path / "nowhere")
    bad = tmp_path / "list"
    for text, tasks, message in [
        ("", compbench, "holds no prompts"),
        ("fine\n9 / 10", compbench, "line 2: '9 / 10' cannot be part of a file's name"),
        ('{"tag": "colors"}', geneval, 'line 1: expected JSON with a "prompt"'),
        ("a red circle", geneval, 'line 1: expected JSON with a "prompt"'),
    ]:
        bad.write_text(text)
        with pytest.raises(ValueError, match=message):
            list(tasks(bad, tmp_path))
    for name in ("nowhere", "nowhere:f", "json:nothing"):
        with pytest.raises(ValueError, match=f"features is '{name}'; expected package.module:function"):
            feature_network(name)


def test_a_configuration_comes_back_from_json(config):
    wide = changed(config, initial=config.run / "start", encoder_dropout=0.2)
    assert Config.from_json(wide.to_json()) == wide
