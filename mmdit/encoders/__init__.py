"""Text encoders, behind one small interface (`features.TextEncoder`), and those of Stable Diffusion 3 together."""

from mmdit.encoders.features import Conditioning, TextEncoder, TextFeatures, assemble
from mmdit.encoders.minilm import MiniLM
from mmdit.encoders.openclip import OpenClip
from mmdit.encoders.pretrained import T5, Clip
from mmdit.encoders.sd3 import Sd3Text, clip
from mmdit.encoders.table import ENCODERS, build, fingerprint, sizes
from mmdit.encoders.words import WordVectors

__all__ = [
    "ENCODERS",
    "T5",
    "Clip",
    "Conditioning",
    "MiniLM",
    "OpenClip",
    "Sd3Text",
    "TextEncoder",
    "TextFeatures",
    "WordVectors",
    "assemble",
    "build",
    "clip",
    "fingerprint",
    "sizes",
]  # fmt: skip
