"""Model weights in and out, in three layouts: ours, the released SD3 files', and diffusers'.

    model = checkpoint.load("sd3.5_medium.safetensors")          # a file, a folder, or a state dict; any of the three
    checkpoint.save(model, "folder", layout="diffusers")
    checkpoint.convert("sd3.5_large.safetensors", "folder", layout="diffusers")     # without holding the model

`layouts` has the table, `tensors` the reading and writing.
"""

from mmdit.checkpoint.store import Checkpoint, convert, fingerprint, load, open_checkpoint, save

__all__ = ["Checkpoint", "convert", "fingerprint", "load", "open_checkpoint", "save"]
