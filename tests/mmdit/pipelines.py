"""A small StableDiffusion3Pipeline of diffusers with random weights, every component there, tokenizers included."""

import string

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

HEADS, HEAD_DIM, DEPTH, CHANNELS, MOST = 2, 32, 3, 16, 8
CLIP_L, CLIP_G, T5_DIM = 12, 20, 48


def scattered(model, std=0.2):
    """Weights that are zero nowhere."""
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name and name.endswith("weight")), std=std)
    return model.eval()


def transformer(dual=(), qk_norm=True, depth=DEPTH):
    """Of weights small enough that the flow is not chaotic: at 0.1 a change of 1e-6 in the noise moved pixels by 100
    without QK-norm, at 0.05 and 0.07 by 0.001."""
    torch.manual_seed(5)
    return scattered(SD3Transformer2DModel(
        sample_size=8, patch_size=2, in_channels=CHANNELS, out_channels=CHANNELS, num_layers=depth,
        attention_head_dim=HEAD_DIM, num_attention_heads=HEADS, joint_attention_dim=T5_DIM,
        caption_projection_dim=HEADS * HEAD_DIM, pooled_projection_dim=CLIP_L + CLIP_G, pos_embed_max_size=MOST,
        dual_attention_layers=dual, qk_norm="rms_norm" if qk_norm else None,
    ), 0.06)  # fmt: skip


def clip(dim, act, projection=None):
    config = CLIPTextConfig(
        vocab_size=60, hidden_size=dim, intermediate_size=2 * dim, num_hidden_layers=3, num_attention_heads=2,
        projection_dim=projection or dim, hidden_act=act, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    return scattered(CLIPTextModelWithProjection(config))


def clip_tokenizer(pad):
    """One token a letter."""
    words = ["<|startoftext|>", "<|endoftext|>", "!", *string.ascii_lowercase]
    words += [f"{letter}</w>" for letter in string.ascii_lowercase]
    vocab = {word: i for i, word in enumerate(words)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token=pad, model_max_length=77)


def t5_tokenizer():
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -1.0)]
    return T5TokenizerFast(vocab=pieces + [(letter, -2.0) for letter in string.ascii_lowercase], extra_ids=0)


def made(dual=(), qk_norm=True, **absent):
    torch.manual_seed(6)
    t5 = T5Config(vocab_size=40, d_model=T5_DIM, d_kv=8, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0)
    parts = {
        "text_encoder": clip(CLIP_L, "quick_gelu"), "tokenizer": clip_tokenizer("<|endoftext|>"),
        "text_encoder_2": clip(CLIP_G, "gelu"), "tokenizer_2": clip_tokenizer("!"),
        "text_encoder_3": scattered(T5EncoderModel(t5)), "tokenizer_3": t5_tokenizer(),
    } | absent  # fmt: skip
    vae = AutoencoderKL(
        sample_size=64, latent_channels=CHANNELS, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
        use_post_quant_conv=False, norm_num_groups=4, block_out_channels=(4, 4, 4, 4), layers_per_block=1,
        down_block_types=["DownEncoderBlock2D"] * 4, up_block_types=["UpDecoderBlock2D"] * 4,
    ).eval()  # fmt: skip
    pipe = StableDiffusion3Pipeline(
        transformer=transformer(dual, qk_norm), scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0), vae=vae, **parts
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
