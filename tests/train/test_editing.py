"""Instruction editing: the model's pictures to edit, the data, the objective, guidance by two scales, and runs."""

import dataclasses
import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from mmdit import MMDiT, checkpoint, flow, presets
from mmdit.encoders import Conditioning
from mmdit.sampling.sample import Sampler, Settings, denoise
from train.__main__ import COMMANDS
from train.config import Optimizer, Parallel
from train.data import edits
from train.data.precompute import precompute
from train.data.records import DataError
from train.data.settings import Precompute
from train.data.shards import Cache
from train.data.sources import open_source
from train.engine.initial import start_from
from train.engine.loop import train
from train.objectives import EditingObjective, Flow

from . import launching
from .conftest import changed

CHANNELS, TOKENS = {"reference_channels": 12}, {"reference_tokens": True}
BOTH = pytest.mark.parametrize("how", [CHANNELS, TOKENS], ids=["channels", "tokens"])


def drawn(model, std=0.05):
    """With weights that do something."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return model


# --- the model --------------------------------------------------------------------------------------------------------


def inputs(batch=2, channels=12):
    torch.manual_seed(1)
    return torch.randn(batch, channels, 8, 8), torch.rand(batch), torch.randn(batch, 5, 64), torch.randn(batch, 64)


@BOTH
def test_at_the_first_step_the_model_is_its_base(how, config, tmp_path):
    """Whatever picture it is shown, in every layout that says the base."""
    base = drawn(MMDiT(config.model))
    checkpoint.save(base, tmp_path / "base.safetensors")
    model = drawn(MMDiT(dataclasses.replace(config.model, **how)), std=1.0)
    torch.manual_seed(2)
    model.init_weights()
    named = start_from(model, tmp_path / "base.safetensors")
    assert named == (["patch_embed.proj.weight"] if how == CHANNELS else named) and named
    x, reference = inputs(), torch.randn(2, 12, 8, 8)
    with torch.no_grad():
        assert torch.equal(model(*x, references=[reference]), base(*x)) or how == CHANNELS
        torch.testing.assert_close(model(*x, references=[reference]), base(*x), rtol=1e-5, atol=1e-6)
    model(*x, references=[reference]).square().mean().backward()
    new = [p for name, p in model.named_parameters() if name in named and ("proj." in name)]
    assert all(p.grad.abs().max() > 0 for p in new)


def test_references_as_tokens_are_several_and_of_any_size(config):
    model = drawn(MMDiT(dataclasses.replace(config.model, **TOKENS)))
    x = inputs()
    one, two = torch.randn(2, 12, 4, 16), torch.randn(2, 12, 8, 8)
    with torch.no_grad():
        outs = [model(*x, references=r) for r in ([], [one], [one, two], [two, one])]
        alone = model(*(part[:1] for part in x), references=[one[:1], two[:1]])
    assert all(not torch.allclose(a, b) for i, a in enumerate(outs) for b in outs[:i])
    torch.testing.assert_close(outs[2][:1], alone, rtol=1e-4, atol=1e-5)                   # of samples no other
    with torch.no_grad():
        zeros = model(*x, references=[torch.zeros_like(x[0])])
    assert torch.equal(outs[0], zeros)                                              # as training leaves pictures out
    with pytest.raises(ValueError, match="4 references are given; expected at most 3"):
        model(*x, references=[one] * 4)
    with pytest.raises(ValueError, match=r"references have shapes \[\[2, 4, 8, 8\]\]; expected \[2, 12, 'h', 'w'\]"):
        model(*x, references=[two[:, :4]])


@BOTH
def test_an_editing_model_compiles_whole(how, config):
    model = drawn(MMDiT(dataclasses.replace(config.model, **how)))
    x, references = inputs(), [torch.randn(2, 12, 8, 8)]
    with torch.no_grad():
        want = model(*x, references=references)
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(*x, references=references)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_references_that_do_not_fit_are_refused_by_name(config):
    x, reference = inputs(), torch.randn(2, 12, 8, 8)
    with pytest.raises(ValueError, match="references are given; the model has neither"):
        MMDiT(config.model)(*x, references=[reference])
    model = MMDiT(dataclasses.replace(config.model, **CHANNELS))
    for wrong in ([reference[:, :4]], [reference[..., :4]], [reference, reference], [reference[:1]]):
        with pytest.raises(ValueError, match=r"references have shapes .*; expected \[2, 12, 8, 8\] together"):
            model(*x, references=wrong)
    for values in ({**CHANNELS, **TOKENS}, {**TOKENS, "weight_sets": 1}, {**TOKENS, "backbone": "cross"}):
        with pytest.raises(ValueError, match=r"reference_tokens with .*; expected 0, joint and 2 or 3"):
            dataclasses.replace(config.model, **values)


@pytest.mark.parametrize("layout", ["native", "sd3", "diffusers"])
def test_channels_of_a_picture_to_edit_are_in_every_layout(layout, tmp_path):
    """As diffusers has it: in_channels 8, out_channels 4; and they are told from the tensors alone."""
    config = presets.tiny(reference_channels=4, token_pixels=16, max_height=64, max_width=64, resolution=64)
    model = drawn(MMDiT(config))
    target = tmp_path / ("x.safetensors" if layout != "diffusers" else "x")
    checkpoint.save(model, target, layout=layout)
    again = checkpoint.load(target)
    assert (again.config.in_channels, again.config.reference_channels) == (4, 4)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in model.state_dict().items())
    if layout == "diffusers":
        said = json.loads((target / "config.json").read_text())
        assert (said["in_channels"], said["out_channels"]) == (8, 4)


def test_diffusers_draws_the_same_with_the_channels(tmp_path):
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    config = presets.tiny(reference_channels=4, token_pixels=16, max_height=64, max_width=64, resolution=64)
    model = drawn(MMDiT(config)).eval()
    checkpoint.save(model, tmp_path / "x", layout="diffusers")
    theirs = diffusers.SD3Transformer2DModel.from_pretrained(tmp_path / "x").eval()
    z, reference = torch.randn(2, 4, 8, 8), torch.randn(2, 4, 8, 8)
    t, context, pooled = torch.rand(2), torch.randn(2, 5, 32), torch.randn(2, 16)
    with torch.no_grad():
        want = theirs(torch.cat([z, reference], 1), context, pooled, t * 1000).sample
        got = model(z, t, context, pooled, references=[reference])
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


# --- guidance ---------------------------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("text", "picture"), [(3.0, 1.5), (3.0, 1.0), (1.0, 1.5), (0.0, 1.0)])
def test_guidance_by_two_scales(how, text, picture, config):
    """Equation 3 of InstructPix2Pix, from three calls of the model; of a scale of 1 what it is without."""
    model = drawn(MMDiT(dataclasses.replace(config.model, **how))).eval()
    z, _, context, pooled = inputs()
    reference, lengths = torch.randn(2, 12, 8, 8), torch.tensor([5, 3])
    said, none = (Conditioning(context * k, lengths, pooled * k) for k in (1, 0))

    @torch.no_grad()
    def velocity(words, shown):
        return model(z, torch.ones(2), words.context, words.pooled, words.lengths, references=[shown])

    neither, seen, both = velocity(none, torch.zeros_like(z)), velocity(none, reference), velocity(said, reference)
    v = neither + picture * (seen - neither) + max(text, 1) * (both - seen)
    chosen = Settings(steps=1, guidance=text, image_guidance=picture)
    got = denoise(model, z, said, none, chosen, references=[reference], masked=True)
    torch.testing.assert_close(got, z - v, rtol=1e-4, atol=1e-5)


def test_how_many_evaluations_guidance_takes(config):
    model, rows = drawn(MMDiT(dataclasses.replace(config.model, **CHANNELS))).eval(), []
    model.register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    z, _, context, pooled = inputs()
    text = Conditioning(context, torch.tensor([5, 5]), pooled)
    for guidance, picture, shown in ((3, 1.5, [z]), (3, 1, [z]), (1, 1.5, [z]), (1, 1, [z]), (3, 1.5, []), (1, 2, [])):
        denoise(model, z, text, text, Settings(steps=1, guidance=guidance, image_guidance=picture), references=shown)
    assert rows == [6, 4, 6, 2, 4, 2]


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", edits.WORLDS)
def test_what_an_edit_should_give_is_judged_right(world):
    """And its source is not, where the instruction asks for something; what was kept is seen as kept."""
    found = edits.held_out(world, 6)
    assert [e.task for e in found[:10]] == list(edits.TASKS)
    judged = np.array([edits.judged(e.target(), e) for e in found])
    assert judged.mean(0).min() >= (1.0 if world == "shapes" else 0.97)      # small objects of scenes are misread
    changes = [e for e in found if e.task in ("recolour", "move", "resize", "replace", "remove", "add")]
    assert not any(edits.judged(e.source(), e)[0] for e in changes)
    moved = [e for e in changes if e.task in ("recolour", "move", "resize", "replace")]
    assert np.mean([edits.judged(e.source(), e)[1] for e in moved]) > 0.9


@pytest.mark.parametrize("world", edits.WORLDS)
def test_held_out_edits_end_in_what_no_training_edit_shows(world):
    trained = [edits.make(world, task, False, np.random.default_rng(i)) for i in range(40) for task in edits.TASKS]
    shown = [one for e in trained if e.task != "segment" for part in (e.before[:1], e.after[:1]) for one in part]
    assert not any(edits.is_held_out(world, one) for one in shown)
    named = [e for e in edits.held_out(world, 8) if e.task in ("recolour", "move", "resize", "replace", "add")]
    assert all(edits.is_held_out(world, e.after[0]) for e in named)


def png(value):
    file = io.BytesIO()
    Image.new("RGB", (32, 32), (value,) * 3).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def folder(tmp_path):
    """Twelve edits: light pictures become dark."""
    root = tmp_path / "edits"
    root.mkdir()
    lines = []
    for i in range(12):
        for kind, value in (("before", 220), ("after", 20)):
            (root / f"{i}-{kind}.png").write_bytes(png(value + i))
        split = "val" if i < 4 else "train"
        lines.append({"source": f"{i}-before.png", "target": f"{i}-after.png", "instruction": "darker", "split": split})
    (root / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return root


def test_an_edit_is_one_sample_with_the_picture_after_first(folder, tmp_path):
    precompute(Precompute(source=str(folder), cache=tmp_path / "cache"))
    cache = Cache(tmp_path / "cache")
    bucket = cache.buckets("train")["32x32"]
    sample = bucket[0]
    assert cache.settings["pair"] == "edit" and set(bucket.captions()) == {"darker"}
    assert sample.latent[:12].float().mean() < -0.5 and sample.latent[12:].float().mean() > 0.5


@pytest.mark.parametrize(("after", "before", "said"), [
    ("target", "source", "instruction"), ("edited_image", "original_image", "edit_prompt"),
    ("edited_image", "source_image", "edit_prompt"), ("edited_image", "input_image", "edit_prompt"),
    ("output_image", "input_image", "edit"), ("target_img", "source_img", "instruction"),
])  # fmt: skip
def test_columns_of_edits(after, before, said, tmp_path):
    """InstructPix2Pix's, UltraEdit's, HQ-Edit's and MagicBrush's; captions of the pictures are not instructions."""
    arrow = pytest.importorskip("pyarrow", reason="extra [parquet] is not installed")
    from pyarrow import parquet

    rows = {before: [png(1), png(2)], after: [png(11), png(12)], said: ["do a", "do b"], "caption": ["x", "y"]}
    parquet.write_table(arrow.table(rows), tmp_path / "x.parquet")
    found = open_source(str(tmp_path / "x.parquet"))
    assert [[image.getpixel((0, 0))[0] for image in r.read()[0]] for r in found] == [[11, 1], [12, 2]]
    assert [(r.caption, r.pair) for r in found] == [("do a", "edit"), ("do b", "edit")]


def test_edits_and_other_pictures_are_not_mixed(folder, config, tmp_path):
    lines = (folder / "metadata.jsonl").read_text().splitlines()
    (folder / "metadata.jsonl").write_text("\n".join([*lines, json.dumps({"file_name": "0-after.png", "text": "x"})]))
    with pytest.raises(DataError, match=r"after an edit \(11-after\.png\) and single pictures \(0-after\.png\)"):
        precompute(Precompute(source=str(folder), cache=tmp_path / "mixed"))
    (folder / "metadata.jsonl").write_text("\n".join(lines))
    precompute(Precompute(source=str(folder), cache=tmp_path / "cache"))
    with pytest.raises(ValueError, match="holds pictures before and after an edit, which the objective flow does"):
        train(changed(config, cache=tmp_path / "cache"))


# --- the objective ----------------------------------------------------------------------------------------------------


def test_text_picture_and_both_are_dropped_in_equal_shares(folder, tmp_path):
    precompute(Precompute(source=str(folder), cache=tmp_path / "cache"))
    bucket = Cache(tmp_path / "cache").buckets("train")["32x32"]
    objective = EditingObjective(Flow(flow.by_name("rf"), 64, 0.0, seed=3), 0.1)
    counts = np.zeros(4)
    for step in range(150):
        batch = objective.draw(bucket, np.arange(8), step)
        silent = batch.text.pooled.abs().sum(1) == 0
        blind = batch.reference.abs().flatten(1).sum(1) == 0
        cases = (silent & ~blind, ~silent & blind, silent & blind, ~silent & ~blind)
        counts += [int(case.sum()) for case in cases]
    share = counts / counts.sum()
    assert np.abs(share - [0.1, 0.1, 0.1, 0.7]).max() < 0.03
    one = objective.draw(bucket, np.array([5]), 7)
    many = objective.draw(bucket, np.array([2, 5]), 7)
    assert torch.equal(one.x0[0], many.x0[1]) and torch.equal(one.reference[0], many.reference[1])


@pytest.fixture
def editing(folder, config, tmp_path):
    """A run of edits from a base."""
    precompute(Precompute(source=str(folder), cache=tmp_path / "cache"))
    checkpoint.save(drawn(MMDiT(config.model)), tmp_path / "base.safetensors")
    return changed(
        config, cache=tmp_path / "cache", initial=tmp_path / "base.safetensors", objective="editing",
        model=dataclasses.replace(config.model, **CHANNELS),
    )  # fmt: skip


@BOTH
def test_a_run_resumes_exactly(how, editing, killed_at):
    other = dataclasses.replace(editing.model, reference_channels=0, **how) if how == TOKENS else editing.model
    whole = changed(editing, model=other, run=editing.run.with_name("whole"))
    train(whole)
    killed_at(changed(editing, model=other), step=7)
    train(changed(editing, model=other))
    one, two = (checkpoint.load(c.run / "model.safetensors").state_dict() for c in (whole, editing))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert len(list((whole.run / "samples").glob("*.png"))) > 0


@BOTH
def test_two_processes_train_the_same_model(how, editing, launch):
    """With full checkpointing besides."""
    model = dataclasses.replace(editing.model, **{"reference_channels": 0, **how})
    editing = changed(editing, model=model, optimizer=Optimizer(lr=1e-3, warmup=4, eps=1e-6))
    one = launching.plain(editing, editing.run.with_name("one"))
    train(one)
    two = launching.plain(one, one.run.with_name("two"), parallel=Parallel(checkpointing="full"))
    launch(two, 2)
    launching.agree(one.run, two.run)


def test_what_cannot_be_meant_is_refused(editing, config):
    from mmdit.adapters import Lora

    plain = dataclasses.replace(editing.model, reference_channels=0)
    for changes, told in (
        ({"model": plain}, "objective is editing, for this model expected model.reference_channels or"),
        ({"adapter": Lora(rank=2)}, "objective is editing with adapter.rank 2 and prior None; expected 0 and None"),
        ({"edit_dropout": 0.5}, "edit_dropout is 0.5; expected a number from 0 to 0.333"),
        ({"objective": "flow"}, "objective is flow, for this model expected editing"),
    ):
        with pytest.raises(ValueError, match=told):
            changed(editing, **changes)
    with pytest.raises(ValueError, match=r"model\.reference_channels is 5; expected 12, or 0"):
        train(changed(editing, model=dataclasses.replace(editing.model, reference_channels=5)))


def test_from_a_run_to_edited_pictures(config, tmp_path, capsys):
    """Every command, with budgets of a few steps."""
    base = changed(config, run=tmp_path / "base", steps=2)
    train(base)
    precompute(Precompute(source="shapes-edits", cache=tmp_path / "edits", copies=1))
    run = changed(
        base, run=tmp_path / "edit", cache=tmp_path / "edits", initial=base.run / "model.safetensors",
        objective="editing", model=dataclasses.replace(base.model, **CHANNELS),
    )  # fmt: skip
    train(run)
    COMMANDS["score"]([str(run.run), "--images", "1"])
    told = capsys.readouterr().out
    assert "recolour" in told and "without the picture" in told and (run.run / "edits.png").is_file()
    sampler = Sampler.load(run.run)
    drawn(sampler.model, std=0.1)                                  # a few steps make no difference that a pixel shows
    picture = Image.fromarray(edits.held_out("shapes", 1)[0].source())
    one = sampler(["make it blue"] * 2, edit=picture, steps=2)
    other = sampler(["make it blue"] * 2, edit=[picture, picture.rotate(90)], steps=2)
    assert np.array_equal(one[0], other[0]) and not np.array_equal(one[1], other[1])
    with pytest.raises(ValueError, match="3 pictures to edit for 2 images; expected one, or as many"):
        sampler(["a", "b"], edit=[picture] * 3)
    with pytest.raises(ValueError, match=r"\[2\] pictures to edit for an image; expected one number, from 1 to 1"):
        sampler(["a"], edit=[[picture, picture]])
    with pytest.raises(ValueError, match="a picture to edit is given; the model has neither"):
        Sampler.load(base.run)(["a"], edit=picture)
