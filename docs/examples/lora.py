"""Fine-tunes a patched model of diffusers with LoRA: python docs/examples/lora.py [FOLDER]

FOLDER is a diffusers transformer on disk (save_pretrained); without it a small random one stands in. The data are
random latents, to be replaced by your own.
"""

import sys

import torch
from diffusers import SD3Transformer2DModel
from peft import LoraConfig

import rfkernels

device = "cuda" if torch.cuda.is_available() else "cpu"
torch.manual_seed(0)
if len(sys.argv) > 1:
    model = SD3Transformer2DModel.from_pretrained(sys.argv[1])
else:
    model = SD3Transformer2DModel(sample_size=16, num_layers=2, num_attention_heads=2, attention_head_dim=32,
                                  joint_attention_dim=64, caption_projection_dim=64, pooled_projection_dim=32,
                                  qk_norm="rms_norm")  # fmt: skip
model.to(device).requires_grad_(False)
print(rfkernels.patch.apply(model))
model.add_adapter(LoraConfig(r=8, target_modules=["to_q", "to_k", "to_v", "to_out.0"], init_lora_weights="gaussian"))
adapters = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(adapters, lr=1e-3)

config = model.config
latent = torch.randn(4, config.in_channels, config.sample_size, config.sample_size, device=device)
context = torch.randn(4, 77, config.joint_attention_dim, device=device)
pooled = torch.randn(4, config.pooled_projection_dim, device=device)
for step in range(10):
    noise, t = torch.randn_like(latent), torch.randn(4, device=device).sigmoid()
    z, target = rfkernels.rectified_flow(latent, noise, t)
    velocity = model(z, context, pooled, 1000 * t, return_dict=False)[0]
    loss = rfkernels.weighted_mse(velocity, target, torch.ones_like(t))
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step}: loss {loss.item():.4f}")
