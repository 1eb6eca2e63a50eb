"""Draws with a patched Stable Diffusion 3 pipeline of diffusers: python docs/examples/sd3_pipeline.py [FOLDER [PROMPT]]

FOLDER is a pipeline on disk (save_pretrained); without it a small random one stands in, with random text features.
"""

import sys

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

import rfkernels

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
if len(sys.argv) > 1:
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    pipe = StableDiffusion3Pipeline.from_pretrained(sys.argv[1], torch_dtype=dtype)
    text = {"prompt": sys.argv[2] if len(sys.argv) > 2 else "a photograph of a lighthouse at dawn"}
else:
    transformer = SD3Transformer2DModel(sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=32,
                                        joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=32,
                                        in_channels=4, out_channels=4, qk_norm="rms_norm")  # fmt: skip
    down, up = ["DownEncoderBlock2D"] * 4, ["UpDecoderBlock2D"] * 4
    vae = AutoencoderKL(sample_size=64, scaling_factor=1.5305, shift_factor=0.0609, use_quant_conv=False,
                        use_post_quant_conv=False, norm_num_groups=4, block_out_channels=(8, 8, 8, 8),
                        down_block_types=down, up_block_types=up)  # fmt: skip
    pipe = StableDiffusion3Pipeline(transformer, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, *[None] * 6)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    text = {name: torch.randn((1, 32) if "pooled" in name else (1, 77, 64), device=device) for name in names}

pipe.to(device)
print(rfkernels.patch.apply(pipe.transformer))                       # rfkernels.patch.revert gives it back
image = pipe(**text, num_inference_steps=4, generator=torch.Generator("cpu").manual_seed(0)).images[0]
image.save("sd3.png")
print("wrote sd3.png,", image.size)
