"""LoRA files: diffusers and PEFT read what we write and write what we read; kohya's and ComfyUI's rules by a reader of
their own here."""

import json
from dataclasses import replace

import pytest
import torch
from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmdit import adapters, checkpoint
from mmdit.adapters import Lora

from .test_adapters import PRESETS, inputs, model_of, randomised

CONFIGS = pytest.mark.parametrize("config", PRESETS.values(), ids=PRESETS)


def adapted(config, **settings):
    model = model_of(config)
    adapters.attach(model, Lora(**{"rank": 3, "alpha": 5, "targets": ("all",)} | settings))
    return randomised(model)


def deltas(adapter):
    """What an adapter adds to each weight, in fp64."""
    found = {}
    for layer, parts in adapter.by_layer().items():
        rows = max(part.end for part in parts)
        found[layer] = torch.zeros(rows, parts[0].a.shape[1], dtype=torch.float64)
        for part in parts:
            found[layer][part.first : part.end] += part.delta()
    return found


def same(one, two, **tolerance):
    one, two = deltas(one), deltas(two)
    assert one.keys() == two.keys()
    for layer in one:
        torch.testing.assert_close(one[layer], two[layer], **tolerance)


def in_diffusers(config, folder):
    """The base model there."""
    checkpoint.save(model_of(config), folder / "base", layout="diffusers")
    return SD3Transformer2DModel.from_pretrained(folder / "base")


def velocity(theirs, x):
    latent, t, context, pooled = x
    return theirs(latent, context, pooled, 1000 * t, return_dict=False)[0]


# --- diffusers --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("metadata", (True, False))
@CONFIGS
def test_diffusers_draws_the_same_with_what_we_write(config, metadata, tmp_path):
    model, x = adapted(config), inputs(config)
    file = adapters.save(adapters.of_model(model), tmp_path / "lora", config, format="diffusers")
    if not metadata:
        save_file(load_file(file), file)
    theirs = in_diffusers(config, tmp_path)
    before = velocity(theirs, x)
    state, about = StableDiffusion3Pipeline.lora_state_dict(file, return_lora_metadata=True)
    StableDiffusion3Pipeline.load_lora_into_transformer(state, theirs, metadata=about)
    after = velocity(theirs, x)
    assert (after - before).abs().max() > 0.05
    torch.testing.assert_close(after, model(*x), rtol=1e-3, atol=1e-4)


@CONFIGS
def test_we_draw_the_same_with_what_peft_writes(config, tmp_path):
    """Alpha other than the rank, ranks and alphas by pattern, rank-stabilised scaling."""
    theirs, x = in_diffusers(config, tmp_path), inputs(config)
    torch.manual_seed(3)
    about = LoraConfig(
        r=3, lora_alpha=5, use_rslora=True, init_lora_weights=False,
        target_modules=["to_q", "to_v", "add_k_proj", "ff.net.2", "norm1_context.linear", "proj_out"],
        rank_pattern={"ff.net.2": 2}, alpha_pattern={"to_v": 7},
    )  # fmt: skip
    theirs.add_adapter(about)
    StableDiffusion3Pipeline.save_lora_weights(
        tmp_path, get_peft_model_state_dict(theirs), transformer_lora_adapter_metadata=about.to_dict()
    )
    model = model_of(config)
    adapters.load(model, adapters.read(tmp_path, config))
    assert (model_of(config)(*x) - model(*x)).abs().max() > 0.05
    torch.testing.assert_close(model(*x), velocity(theirs, x), rtol=1e-3, atol=1e-4)


# --- kohya and ComfyUI ------------------------------------------------------------------------------------------------


def patched(config, file, key):
    """The model in the released layout, as a program that applies ``alpha / rank * up @ down`` by a module's name reads
    it. Args: key: of a module's name, what the file calls it."""
    tensors, weights = load_file(file), {}
    checkpoint.save(model_of(config), file.with_name("base.safetensors"), layout="sd3")
    for name, value in load_file(file.with_name("base.safetensors")).items():
        weights[name] = value.double()
        module = key(name.removeprefix("model.diffusion_model.").removesuffix(".weight"))
        up, down = (next((f"{module}{e}" for e in ends if f"{module}{e}" in tensors), None) for ends in (
            (".lora_up.weight", ".lora_B.weight"), (".lora_down.weight", ".lora_A.weight")))  # fmt: skip
        if name.endswith(".weight") and up:
            scale = float(tensors.pop(f"{module}.alpha")) / tensors[down].shape[0]
            weights[name] = weights[name] + scale * tensors.pop(up).double() @ tensors.pop(down).double()
    assert not tensors, sorted(tensors)[:5]
    weights = {name: value.float() for name, value in weights.items()}
    return checkpoint.load(weights, heads=config.heads, head_dim=config.head_dim)


SPELLED = {
    "kohya": lambda module: "lora_unet_" + module.replace(".", "_"),
    "comfyui": lambda module: "diffusion_model." + module,
}


@pytest.mark.parametrize("format", SPELLED)
@CONFIGS
def test_readers_by_kohyas_and_comfyuis_rules_get_the_same_model(config, format, tmp_path):
    model = adapted(config)
    file = adapters.save(adapters.of_model(model), tmp_path / "lora.safetensors", config, format=format)
    read = patched(config, file, SPELLED[format])
    found = {name: value for name, value in read.state_dict().items() if "pos_embed" not in name}
    for layer, delta in deltas(adapters.of_model(model)).items():
        base = model_of(config).get_submodule(layer).weight.double()
        torch.testing.assert_close(found[f"{layer}.weight"].double(), base + delta, rtol=1e-5, atol=1e-6)


def test_comfyui_reads_diffusers_names_by_its_own_table(tmp_path):
    """to_q, to_k, to_v are the rows of qkv; norm_out and the last text modulation have their halves exchanged."""
    config = PRESETS["sd35-medium"]
    model, d, last = adapted(config), config.width, config.depth - 1
    file = adapters.save(adapters.of_model(model), tmp_path, config, format="diffusers")
    tensors = load_file(file)

    def product(name):
        a, b = (tensors[f"transformer.{name}.lora_{which}.weight"].double() for which in "AB")
        return b @ a

    ours = deltas(adapters.of_model(model))
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        rows = ours["blocks.0.image.attn2.qkv"][i * d : (i + 1) * d]
        torch.testing.assert_close(product(f"transformer_blocks.0.attn2.{name}"), rows, rtol=1e-6, atol=1e-7)
    # the stacked modulation ends with the last block's text (2 vectors), its image (6) and the final layer (2)
    for name, first in ((f"transformer_blocks.{last}.norm1_context.linear", -10 * d), ("norm_out.linear", -2 * d)):
        shift, scale = ours["modulation.linear"][first : first + 2 * d or None].chunk(2)
        torch.testing.assert_close(product(name), torch.cat([scale, shift]), rtol=1e-6, atol=1e-7)


# --- round trips ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("split", (True, False))
@pytest.mark.parametrize("format", adapters.FORMATS)
@CONFIGS
def test_a_round_trip_is_exact(config, format, split, tmp_path):
    one = adapters.of_model(adapted(config, split_qkv=split))
    one.parts = [replace(part, a=part.a.double(), b=part.b.double()) for part in one.parts]
    file = adapters.save(one, tmp_path / "a.safetensors", config, format=format, dtype=torch.float64)
    two = adapters.read(file, config)
    same(one, two, rtol=0, atol=1e-15)
    again = adapters.save(two, tmp_path / "b.safetensors", config, format="native", dtype=torch.float64)
    same(two, adapters.read(again), rtol=0, atol=1e-15)


@pytest.mark.parametrize("format", adapters.FORMATS)
def test_one_for_the_model_beneath_fits_a_model_that_edits(format, tmp_path):
    base = PRESETS["sd35-medium"]
    adapter = adapters.of_model(adapted(base, targets=("blocks",)))
    file = adapters.save(adapter, tmp_path / "lora.safetensors", base, format=format)
    editing = replace(base, reference_tokens=True)
    found = adapters.read(file, editing)
    same(found, adapter, rtol=1e-6, atol=1e-6)
    adapters.load(model_of(editing), found)


def test_q_k_and_v_that_share_a_come_back_with_their_rank(tmp_path):
    config = PRESETS["sd3"]
    one = adapters.of_model(adapted(config, targets=("attention",), split_qkv=False))
    through = adapters.read(adapters.save(one, tmp_path, config, format="diffusers"), config)
    file = adapters.save(through, tmp_path / "kohya.safetensors", config, format="kohya")
    assert {t.shape[0] for name, t in load_file(file).items() if name.endswith("attn_qkv.lora_down.weight")} == {3}


def test_text_encoders_tensors_are_kept_and_named(tmp_path):
    config = PRESETS["sd3"]
    file = adapters.save(adapters.of_model(adapted(config)), tmp_path, config, format="diffusers")
    tensors = load_file(file)
    name = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight"
    save_file({**tensors, name: torch.ones(2, 4)}, file)
    read = adapters.read(file, config)
    assert set(read.others) == {name} and "text encoders are kept, not used: text_encoder." in read.notes[0]
    assert name in load_file(adapters.save(read, tmp_path / "again", config, format="diffusers"))


# --- what is odd ------------------------------------------------------------------------------------------------------


def diffusers_file(tmp_path, config, **settings):
    """(path, tensors) of a file in diffusers' format without metadata."""
    file = adapters.save(adapters.of_model(adapted(config, **settings)), tmp_path, config, format="diffusers")
    return file, load_file(file)


def test_mixed_ranks_and_missing_parts(tmp_path):
    config, d = PRESETS["sd3"], 64
    file, tensors = diffusers_file(tmp_path, config, targets=("attention",))
    kept = {}
    for name, tensor in tensors.items():
        if "attn.to_q" in name or "add_k_proj" in name:
            continue
        rank = 2 if "to_v" in name else 3
        kept[name] = (tensor[:rank] if "lora_A" in name else tensor[:, :rank]).contiguous()
    save_file(kept, file)
    read = adapters.read(file, config)
    found = deltas(read)["blocks.0.image.attn.qkv"]
    assert not found[:d].any() and found[d:].any()
    a, b = (kept[f"transformer.transformer_blocks.0.attn.to_v.lora_{w}.weight"].double() for w in "AB")
    torch.testing.assert_close(found[2 * d :], b @ a)
    model = model_of(config)
    adapters.load(model, read)
    same(adapters.of_model(model), read, rtol=1e-6, atol=1e-7)
    out = load_file(adapters.save(adapters.of_model(model), tmp_path / "out", config, format="diffusers"))
    assert {t.shape[0] for name, t in out.items() if "lora_A" in name} == {3}       # one for all
    assert not any("attn.to_q" in name for name in out)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"transformer.transformer_blocks.0.attn.to_q.lora_magnitude_vector": torch.ones(64)}, "of DoRA"),
        ({"lora_unet_joint_blocks_0_x_block_attn_proj.dora_scale": torch.ones(64, 1)}, "of DoRA"),
        ({"lycoris_transformer_blocks_0_attn_to_q.hada_w1_a": torch.ones(64, 2)}, "of LoHa"),
        ({"lycoris_transformer_blocks_0_attn_to_q.lokr_w1": torch.ones(8, 8)}, "of LoKr"),
        ({"diffusion_model.final_layer.linear.diff_b": torch.ones(16)}, "of whole weights"),
        ({"transformer.transformer_blocks.9.attn.to_q.lora_A.weight": torch.ones(3, 64)}, "unknown module .*blocks.9"),
        ({"transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight": torch.ones(3, 64)}, "unknown module .*gle"),
        ({"transformer.transformer_blocks.0.attn.to_q.gamma": torch.ones(3)}, "unknown transformer.*gamma"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_B.weight": None}, "attn.to_q has a alone"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(3, 60)}, r"to_q has shapes \[3, 60\]"),
        ({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(3, 64) / 0}, "to_q holds NaN or inf"),
        ({"transformer.pos_embed.proj.lora_A.weight": torch.ones(3, 4, 2, 2)}, "unknown module transformer.pos_embed"),
    ],
)  # fmt: skip
def test_what_is_not_understood_is_refused_by_name(change, message, tmp_path):
    file, tensors = diffusers_file(tmp_path, PRESETS["sd3"], targets=("attention",))
    tensors |= change
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, file)
    with pytest.raises(ValueError, match=message):
        adapters.read(file, PRESETS["sd3"])


def test_dora_in_the_metadata_is_refused(tmp_path):
    file, tensors = diffusers_file(tmp_path, PRESETS["sd3"], targets=("attention",))
    about = {"transformer.r": 3, "transformer.lora_alpha": 3, "transformer.use_dora": True}
    save_file(tensors, file, {"lora_adapter_metadata": json.dumps(about)})
    with pytest.raises(ValueError, match="use_dora"):
        adapters.read(file, PRESETS["sd3"])


def test_kohyas_split_qkv_fault_is_mended_and_said(tmp_path):
    """sd-scripts writes three parts block-diagonally and leaves alpha as it was."""
    config = PRESETS["sd3"]
    one = adapters.of_model(adapted(config, targets=(r"blocks\.\d\.\w+\.attn\.qkv",), alpha=None))
    file = adapters.save(one, tmp_path / "lora.safetensors", config, format="kohya")
    tensors = load_file(file)
    for name in tensors:
        if name.endswith(".alpha"):
            tensors[name] = tensors[name] / 3
    save_file(tensors, file, {"ss_network_args": json.dumps({"split_qkv": "True"})})
    read = adapters.read(file, config)
    same(one, read, rtol=1e-6, atol=1e-7)
    assert "a third of what was trained" in read.notes[0]
    save_file(tensors, file)                                             # nothing says so: as every other reader has it
    same(adapters.read(file, config), one.times(1 / 3), rtol=1e-6, atol=1e-7)


def test_alpha_of_kohya_is_over_its_rank_and_zero_is_none(tmp_path):
    config = PRESETS["sd3"]
    one = adapters.of_model(adapted(config, targets=(r"blocks\.0\.image\.mlp\.fc1",)))
    file = adapters.save(one, tmp_path / "lora.safetensors", config, format="kohya")
    tensors = load_file(file)
    for alpha, scale in ((1.5, 0.5), (0.0, 1.0)):
        save_file({n: torch.tensor(alpha) if n.endswith("alpha") else t for n, t in tensors.items()}, file)
        same(adapters.read(file, config), one.times(scale), rtol=1e-6, atol=1e-7)


def test_the_released_models_are_told_by_names_and_sizes():
    from mmdit import presets
    from mmdit.adapters.formats import places

    for config in (presets.sd3_medium(), presets.sd35_medium(), presets.sd35_large()):
        name, place = next((n, p) for n, p in places(config, "diffusers").items() if "attn" in n)
        if config.dual_attention:
            name, place = next((n, p) for n, p in places(config, "diffusers").items() if "attn2" in n)
        tensors = {f"transformer.{name}.lora_A.weight": torch.ones(1, place.columns),
                   f"transformer.{name}.lora_B.weight": torch.ones(place.rows, 1)}  # fmt: skip
        assert adapters.read(tensors).parts[0].layer == place.layer
    with pytest.raises(ValueError, match=r"fits none of the released models .* give the weights of its base model"):
        adapters.read({"transformer.transformer_blocks.0.attn.to_q.lora_A.weight": torch.ones(1, 7),
                       "transformer.transformer_blocks.0.attn.to_q.lora_B.weight": torch.ones(7, 1)})  # fmt: skip


def test_a_file_without_low_rank_tensors_is_refused(tmp_path):
    save_file({"text_encoder.text_model.q_proj.lora_A.weight": torch.ones(2, 4)}, tmp_path / "text.safetensors")
    with pytest.raises(ValueError, match="no low-rank tensors for the model: 1 tensors are for text encoders"):
        adapters.read(tmp_path / "text.safetensors", PRESETS["sd3"])


def test_our_file_names_its_base_and_holds_no_alpha(tmp_path):
    config = PRESETS["sd3"]
    file = adapters.save(adapters.of_model(adapted(config)), tmp_path / "lora.safetensors", config)
    with safe_open(file, "pt") as opened:
        assert opened.metadata()["format"] == "rfkernels.lora"
        assert "blocks.0.image.attn.qkv[64:128].lora_b" in opened.keys()  # noqa: SIM118
    assert adapters.formats.config_of(file) == config


@pytest.mark.parametrize(
    "about, message",
    [
        ("no json", "lora.safetensors: "), ("[1]", "is list; expected an object"),
        ('{"transformer.lora_alpha": NaN, "transformer.r": 3}', "has an alpha that is no number"),
        ('{"transformer.lora_alpha": "3", "transformer.r": 3}', "has an alpha that is no number"),
        ('{"transformer.alpha_pattern": {"(a+)+$": 3}}', "which is no module's name"),
    ],
)  # fmt: skip
def test_metadata_that_say_nothing_are_refused_with_the_file(about, message, tmp_path):
    _, tensors = diffusers_file(tmp_path, PRESETS["sd3"], targets=("attention",))
    file = tmp_path / "lora.safetensors"
    save_file(tensors, file, {"lora_adapter_metadata": about})
    with pytest.raises(ValueError, match=message):
        adapters.read(file, PRESETS["sd3"])


def test_a_part_without_a_name_in_the_format_is_not_left_out(tmp_path):
    config = PRESETS["sd3"]
    adapter = adapters.of_model(adapted(config))
    adapter.parts.append(replace(adapter.parts[0], layer="blocks.99.image.attn.proj"))
    with pytest.raises(ValueError, match=r"blocks.99.image.attn.proj have no name in the format comfyui"):
        adapters.save(adapter, tmp_path / "x.safetensors", config, format="comfyui")


def test_a_part_of_half_of_keys_and_values_is_computed_in_the_last_block():
    config = PRESETS["sd3"]
    layer = "blocks.1.context.attn.qkv"
    part = adapters.Part(layer, 0, torch.randn(2, 64), torch.randn(96, 2))
    model, merged = model_of(config), model_of(config)
    adapters.load(model, adapters.Adapter([part]))
    with torch.no_grad():
        merged.get_submodule(layer).weight[:96] += part.delta().float()
    torch.testing.assert_close(model(*inputs(config)), merged(*inputs(config)), rtol=1e-4, atol=1e-5)
