"""A small pipeline with CLIP's real vocabulary, and the single file that released ones come in: the names are those of
the released files, written down here from them."""

import re

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from mmdit import checkpoint
from mmdit.encoders import single_file
from tests.mmdit.pipelines import scattered, t5_tokenizer

CLIP_L, CLIP_G, T5_DIM, CHANNELS = 64, 128, 192, 16
VAE_NAMES = (
    (r"\.mid_block\.resnets\.(\d)", lambda m: f".mid.block_{int(m[1]) + 1}"),
    (r"\.mid_block\.attentions\.0", ".mid.attn_1"),
    (r"down_blocks\.(\d)\.resnets", r"down.\1.block"), (r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample"),
    (r"up_blocks\.(\d)\.resnets", lambda m: f"up.{3 - int(m[1])}.block"),
    (r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{3 - int(m[1])}.upsample"), (r"conv_norm_out", "norm_out"),
    (r"conv_shortcut", "nin_shortcut"), (r"group_norm", "norm"), (r"to_([qkv])\.", r"\1."), (r"to_out\.0", "proj_out"),
)  # fmt: skip


def clip(dim, act):
    config = CLIPTextConfig(
        hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=3, num_attention_heads=dim // 64,
        projection_dim=dim, hidden_act=act, bos_token_id=49406, eos_token_id=49407,
    )  # fmt: skip
    return scattered(CLIPTextModelWithProjection(config))


def made(transformers):
    """CLIP-L's projection is the identity, as in the released folders."""
    torch.manual_seed(8)
    first, second = clip(CLIP_L, "quick_gelu"), clip(CLIP_G, "gelu")
    torch.nn.init.eye_(first.text_projection.weight)
    t5 = T5Config(vocab_size=40, d_model=T5_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
                  feed_forward_proj="gated-gelu")  # fmt: skip
    model = SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=2, attention_head_dim=32,
        num_attention_heads=2, joint_attention_dim=T5_DIM, caption_projection_dim=64, pos_embed_max_size=8,
        pooled_projection_dim=CLIP_L + CLIP_G, qk_norm="rms_norm",
    )  # fmt: skip
    vae = AutoencoderKL(
        sample_size=64, latent_channels=CHANNELS, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False, norm_num_groups=32, block_out_channels=(32, 32, 64, 64), layers_per_block=2,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=scattered(model, 0.06), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae.eval(),
        text_encoder=first, tokenizer=single_file.clip_tokenizer(transformers, "clip_l"),
        text_encoder_2=second, tokenizer_2=single_file.clip_tokenizer(transformers, "clip_g"),
        text_encoder_3=scattered(T5EncoderModel(t5)), tokenizer_3=t5_tokenizer(),
    )  # fmt: skip


def rounded(pipe):
    """Its matrices to what fp8 can say."""
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2", "text_encoder_3"):
        for value in getattr(pipe, part).parameters():
            if value.ndim > 1:
                value.data = value.data.to(torch.float8_e4m3fn).float()


def parts_of(folder, tmp):
    """(prefix, names and tensors) of each part of a pipeline's folder."""
    (converted,) = checkpoint.convert(folder / "transformer", tmp / "model.safetensors", layout="sd3")
    yield "", load_file(converted)
    vae = {}
    for name, value in load_file(folder / "vae" / "diffusion_pytorch_model.safetensors").items():
        for old, new in VAE_NAMES:
            name = re.sub(old, new, name)
        vae[name] = value[:, :, None, None] if re.search(r"attn_1\.\w+\.weight", name) and value.ndim == 2 else value
    yield "first_stage_model.", vae
    for name, encoder in (("clip_l", "text_encoder"), ("clip_g", "text_encoder_2"), ("t5xxl", "text_encoder_3")):
        found = load_file(folder / encoder / "model.safetensors")
        if name == "clip_l":
            del found["text_projection.weight"]
        yield f"text_encoders.{name}.transformer.", found


def written(folder, path, fp8=None, without=()):
    """The single file. fp8: "plain", or "scaled" as ComfyUI writes it."""
    whole = {}
    for prefix, found in parts_of(folder, path.parent):
        if prefix not in without:
            whole |= {prefix + name: value for name, value in found.items()}
    for name, value in list(whole.items()) if fp8 else ():
        if value.ndim > 1 and not name.endswith("pos_embed"):
            scaled = fp8 == "scaled" and name.endswith(".weight")
            whole[name] = (value.float() * (2 if scaled else 1)).to(torch.float8_e4m3fn)
            if scaled:
                whole[name.removesuffix("weight") + "scale_weight"] = torch.tensor(0.5)
    if fp8 == "scaled":
        whole["model.diffusion_model.scaled_fp8"] = torch.zeros(2, dtype=torch.float8_e4m3fn)
        whole["text_encoders.t5xxl.transformer.scaled_fp8"] = torch.zeros(0, dtype=torch.float8_e4m3fn)
    whole["text_encoders.clip_l.logit_scale"] = torch.tensor(4.6)
    save_file({name: value.contiguous() for name, value in whole.items()}, path)
    return path
