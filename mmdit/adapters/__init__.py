"""Low-rank adapters (LoRA): layers, and files in the formats that people exchange.

    adapter = adapters.read("style.safetensors")            # diffusers, kohya, ComfyUI or ours
    adapters.load(model, adapter.times(0.8))                # on top of the weights, which are not touched
    adapters.save(adapter, "folder", model.config, format="diffusers")

`layers` has the layer, `lora` which layers are meant, `parts` low-rank parts apart from any model, `formats` and
`writing` the files.
"""

from mmdit.adapters.formats import FORMATS, about, is_file, read
from mmdit.adapters.layers import LoraLinear, layers, off
from mmdit.adapters.lora import PRESETS, Lora, attach
from mmdit.adapters.parts import Adapter, Part, load, merge, of_model, remove
from mmdit.adapters.writing import save

__all__ = [
    "FORMATS", "PRESETS", "Adapter", "Lora", "LoraLinear", "Part", "about", "attach", "is_file", "layers", "load",
    "merge", "of_model", "off", "read", "remove", "save",
]  # fmt: skip
