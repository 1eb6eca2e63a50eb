"""Fine-tuning of the demo's model: a prior beside the samples, a new word, pairs by rule, and their scores."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit import keyed
from mmdit.adapters import Lora
from mmdit.flow import by_name
from train.__main__ import COMMANDS
from train.config import Optimizer
from train.data import shapes
from train.data.precompute import precompute
from train.data.settings import Precompute
from train.data.shards import Cache
from train.data.sources import open_source
from train.engine.loop import train
from train.evaluate.tuned import make_pairs
from train.objectives import Flow, WithPrior

from .conftest import changed


def test_the_new_colour_is_in_no_old_caption_and_can_be_read():
    learned, held_out = shapes.in_new_colour()
    assert (len(learned), len(held_out)) == (20, 40) and not set(learned) & set(held_out)
    assert not {what.colour for what in shapes.everything()} & set(shapes.NEW_COLOUR)
    drawn = [shapes.draw(what, keyed.generator(0, "test", i)) for i, what in enumerate(learned + held_out)]
    assert [shapes.read(image) for image in drawn] == learned + held_out
    assert len([r for r in open_source("new-colour") if r.split == "train"]) == 20


def test_a_redrawn_picture_is_the_same_with_clean_edges():
    what = shapes.everything()[7]
    ragged = shapes.draw(what, keyed.generator(0, "test", 1)).astype(int)
    ragged = np.clip(ragged + np.random.default_rng(0).integers(-40, 40, ragged.shape), 0, 255).astype(np.uint8)
    clean = shapes.redrawn(ragged, shapes.find(ragged))
    assert shapes.read(clean) == what
    before, after = (shapes.edges(image, shapes.find(image))[0] for image in (ragged, clean))
    assert after < 0.05 < before


@pytest.fixture
def flow():
    return Flow(by_name("rf/lognorm(0,1)"), 64, 0.1, seed=0)


def test_the_loss_is_that_of_the_samples_and_of_the_priors(config, flow):
    cache = Cache(config.cache)
    bucket = cache.buckets("train")["32x32"]
    objective = WithPrior(flow, cache, weight=0.5)
    cpu = torch.device("cpu")
    batch = objective.draw(bucket, np.arange(4), step=2).to(cpu)
    again = objective.draw(bucket, np.arange(2, 4), step=2).to(cpu)
    assert torch.equal(batch.prior.x0[2:], again.prior.x0)                    # keyed by the sample beside it
    assert not torch.equal(batch.own.x0, batch.prior.x0)

    def model(z, *_):
        return 0.3 * z

    loss, metrics = objective.loss(model, batch)
    own, prior = (flow.loss(model, part)[0] for part in batch)
    assert loss == own + 0.5 * prior and metrics["prior_loss"] == prior
    held_out = objective.at([bucket[0]], 0.5).to(cpu)
    assert objective.loss(model, held_out)[0] == flow.loss(model, held_out)[0]


def test_from_a_run_to_a_new_word_and_a_preference(config, tmp_path, capsys):
    """Every command of `make demo-tune`, with budgets of a few steps."""
    base = changed(config, run=tmp_path / "base", steps=2)
    train(base)
    weights, lora = base.run / "model.safetensors", Lora(rank=2, targets=("all",))
    precompute(Precompute(source="new-colour", cache=tmp_path / "word"))
    word = changed(
        base, run=tmp_path / "w", cache=tmp_path / "word", initial=weights, adapter=lora, prior=base.cache, batch=2,
        optimizer=Optimizer(lr=1e-3, warmup=1),
    )  # fmt: skip
    train(word)
    COMMANDS["score"]([str(word.run), "--images", "1"])
    found = json.loads((word.run / "score.json").read_text())
    assert {"new before", "new after", "old before", "old after"} < found.keys() and (word.run / "word.png").is_file()
    assert "with the new word, pink" in capsys.readouterr().out
    pairs = changed(word, run=tmp_path / "p", objective="preference", prior=None, cache=tmp_path / "pairs")
    assert make_pairs(base.run, tmp_path / "drawn", images=1) < 50             # two steps draw little that is right
    folder = tmp_path / "edges"
    folder.mkdir()
    for i, what in enumerate(shapes.everything()[:6]):
        image = shapes.draw(what, keyed.generator(0, "test", i))
        for name in ("a", "b"):
            Image.fromarray(image).save(folder / f"{i}{name}.png")
    lines = [{"winner": f"{i}a.png", "loser": f"{i}b.png", "caption": "c", "split": "train"} for i in range(6)]
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    precompute(Precompute(source=str(folder), cache=tmp_path / "pairs"))
    train(pairs)
    COMMANDS["score"]([str(pairs.run), "--images", "1"])
    found = json.loads((pairs.run / "score.json").read_text())
    assert {"wins", "edge before", "edge after"} < found.keys()


def test_make_pairs_keeps_what_shows_its_caption(config, tmp_path, monkeypatch):
    """The better one of each is the rendering that fits the picture."""
    from train.evaluate import tuned

    def draw(wanted):
        drawn = np.stack([shapes.draw(what, keyed.generator(0, "test", i)) for i, what in enumerate(wanted)])
        drawn[5:] = 235                                                        # nothing
        return drawn

    monkeypatch.setattr(tuned, "_drawing", lambda run, seed: (None, draw))
    assert make_pairs(tmp_path, tmp_path / "out", images=1) == 5
    records = open_source(str(tmp_path / "out"))
    assert len(records) == 5 and records[0].split == "val" and records[1].split == "train"
    better, worse = (np.asarray(image).astype(int) for image in records[1].read()[0])
    assert np.abs(better - worse).max() < 60
