"""Autoencoders between images and the latents the model sees, behind one small interface."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from mmdit import keyed, numbers


class Autoencoder(Protocol):
    @property
    def channels(self) -> int: ...

    @property
    def factor(self) -> int:
        """Image pixels per latent pixel and axis."""
        ...

    def encode(self, images: Tensor) -> Tensor:
        """[B, 3, H, W] in [-1, 1] -> latents [B, channels, H/factor, W/factor]."""
        ...

    def decode(self, latents: Tensor) -> Tensor:
        """The inverse; not clamped."""
        ...

    def spec(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class PixelSpace:
    """No autoencoder: a block of factor x factor pixels becomes the channels of one latent pixel. Lossless."""

    factor: int = 1

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ValueError(f"PixelSpace: factor is {self.factor}; expected at least 1")

    @property
    def channels(self) -> int:
        return 3 * self.factor**2

    def encode(self, images: Tensor) -> Tensor:
        return F.pixel_unshuffle(images, self.factor)

    def decode(self, latents: Tensor) -> Tensor:
        return F.pixel_shuffle(latents, self.factor)

    def spec(self) -> dict[str, Any]:
        return {"kind": "pixels", "factor": self.factor}


@dataclass(frozen=True)
class Unit:
    """Latents scaled to mean 0 and deviation 1: ``(z - mean) / std``."""

    mean: float = 0.0
    std: float = 1.0

    def encode(self, latents: Tensor) -> Tensor:
        return latents if self == Unit() else (latents.float() - self.mean) / self.std

    def decode(self, latents: Tensor) -> Tensor:
        return latents * self.std + self.mean


class Scaled:
    """Another autoencoder, its latents scaled to unit size.

    Args: of: its spec. mean, std: of its latents.
    """

    def __init__(self, of: dict[str, Any], mean: float, std: float) -> None:
        self.inner, self.unit = build(of), Unit(mean, std)
        self.channels, self.factor = self.inner.channels, self.inner.factor
        self.model = getattr(self.inner, "model", None)

    def encode(self, images: Tensor) -> Tensor:
        return self.unit.encode(self.inner.encode(images))

    def decode(self, latents: Tensor) -> Tensor:
        return self.inner.decode(self.unit.decode(latents))

    def spec(self) -> dict[str, Any]:
        return {"kind": "unit", "of": self.inner.spec(), **asdict(self.unit)}


SD3_SCALE, SD3_SHIFT = 1.5305, 0.0609        # of the released autoencoder: the model sees (z - shift) * scale
KL_IMAGES = 8           # at a time: one of 1024 pixels takes gigabytes in the first level of the released autoencoder


def _key(image: Tensor) -> int:
    """A number that is the image's own."""
    digest = hashlib.blake2b(image.float().cpu().numpy().tobytes(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


class KL:
    """A variational autoencoder of Stable Diffusion 3 (AutoencoderKL of diffusers, 16 channels, factor 8). The model
    sees ``(z - shift) * scale``: 1.5305 and 0.0609 in the released ones.

    Args:
        folder: with config.json and safetensors; or a released single file, or one of the autoencoder alone.
        posterior: "mode", the posterior's mean; "sample", a draw of it, a function of the image alone.
        dtype: "float32" or "bfloat16". In fp16 the released decoder overflows.
        tiled: decode in overlapping tiles, for large images on small memory.
    Raises: ImportError without diffusers; ValueError for other weights than `weights` names.
    """

    def __init__(
        self, folder: str, *, posterior: str = "mode", dtype: str = "float32", tiled: bool = False,
        device: str = "cpu", weights: str | None = None, settings: str | None = None,
    ) -> None:  # fmt: skip
        from mmdit.checkpoint.tensors import variant
        from mmdit.encoders.pretrained import fingerprint_of, settings_of
        from mmdit.files import naming, read_object

        if posterior not in ("mode", "sample") or dtype not in ("float32", "bfloat16"):
            raise ValueError(
                f"autoencoder kl: posterior is {posterior!r} and dtype {dtype!r}; expected mode or sample, float32 or "
                "bfloat16"
            )
        try:
            from diffusers import AutoencoderKL
        except ImportError as error:
            raise ImportError("autoencoder kl needs diffusers: pip install diffusers") from error
        self.folder, self.posterior, self.dtype, self.tiled = folder, posterior, dtype, tiled
        self._weights = fingerprint_of(Path(folder))
        if weights is not None and weights != self._weights:
            raise ValueError(f"autoencoder kl: the weights in {folder} are {self._weights}, not {weights}")
        file = Path(folder).is_file()
        self._settings = settings_of() if file else settings_of(folder)
        if settings is not None and settings != self._settings:
            raise ValueError(f"autoencoder kl: the configuration of {folder} is another")
        if not file:
            read_object(Path(folder) / "config.json")
        with naming(folder):
            self.model: Any = _kl_from_file(folder, getattr(torch, dtype)) if file else AutoencoderKL.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, torch_dtype=getattr(torch, dtype),
                variant=variant(Path(folder)), low_cpu_mem_usage=False,
            )  # fmt: skip
            numbers.above("scaling_factor", self.model.config.scaling_factor, 0)
            numbers.between("shift_factor", self.model.config.shift_factor or 0.0)
        self.model.eval().requires_grad_(False).to(device)
        if tiled:
            self.model.enable_tiling()

    def save(self, folder: Path) -> None:
        """As diffusers reads it."""
        from mmdit.files import copied

        copied(self.folder, folder, self.model)

    @property
    def channels(self) -> int:
        return int(self.model.config.latent_channels)

    @property
    def factor(self) -> int:
        return int(2 ** (len(self.model.config.block_out_channels) - 1))

    def encode(self, images: Tensor) -> Tensor:
        return torch.cat([self._encode(part) for part in images.split(KL_IMAGES)])

    @torch.no_grad()
    def _encode(self, images: Tensor) -> Tensor:
        posterior = self.model.encode(images.to(self.model.device, self.model.dtype)).latent_dist
        z = posterior.mean.float()
        if self.posterior == "sample":
            noise = torch.cat([keyed.normals(z.shape[1:], _key(image), "posterior", [()]) for image in images])
            z = z + posterior.std.float() * noise.to(z.device)
        config = self.model.config
        return (z - (config.shift_factor or 0.0)) * config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        return torch.cat([self._decode(part) for part in latents.split(KL_IMAGES)])

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> Tensor:
        config = self.model.config
        z = latents.to(self.model.device) / config.scaling_factor + (config.shift_factor or 0.0)
        decoded: Tensor = self.model.decode(z.to(self.model.dtype), return_dict=False)[0]
        return decoded.float()

    def spec(self) -> dict[str, Any]:
        settings = {"posterior": self.posterior, "dtype": self.dtype, "tiled": self.tiled}
        found = {"kind": "kl", "folder": self.folder, "weights": self._weights, "settings": self._settings}
        return found | settings


def _kl_from_file(file: str, dtype: torch.dtype) -> Any:
    """The autoencoder of a single file, whose names are those of latent diffusion, which diffusers converts. The file
    does not say how latents are scaled: as in all of Stable Diffusion 3."""
    from diffusers import AutoencoderKL
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    from mmdit.checkpoint import parts

    state, _ = parts.read(file, "autoencoder", dtype)
    if "encoder.down.0.block.0.conv1.weight" not in state:
        known = "encoder.down_blocks.0.resnets.0.conv1.weight" in state
        why = "its names are diffusers': give the folder with its config.json" if known else "it has no encoder.down.0"
        raise ValueError(f"{file} is no autoencoder of a single file: {why}")
    levels = range(len({name.split(".")[2] for name in state if name.startswith("encoder.down.")}))
    blocks = {name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}
    latents, narrowest = state["decoder.conv_in.weight"].shape[1], state["encoder.conv_in.weight"].shape[0]
    model: Any = AutoencoderKL(
        latent_channels=latents, layers_per_block=len(blocks), norm_num_groups=min(32, narrowest),
        block_out_channels=[len(state[f"encoder.down.{i}.block.0.conv1.weight"]) for i in levels],
        down_block_types=["DownEncoderBlock2D"] * len(levels), up_block_types=["UpDecoderBlock2D"] * len(levels),
        use_quant_conv="quant_conv.weight" in state, use_post_quant_conv="post_quant_conv.weight" in state,
        mid_block_add_attention="encoder.mid.attn_1.q.weight" in state, force_upcast=True,
        scaling_factor=SD3_SCALE, shift_factor=SD3_SHIFT,
    )  # fmt: skip
    converted = convert_ldm_vae_checkpoint(state, model.config)
    if missing := sorted(model.state_dict().keys() - converted.keys()):
        raise ValueError(f"{file}: its autoencoder misses {', '.join(missing[:5])}")
    model.load_state_dict(converted, strict=True)
    return torch.nn.Module.to(model, dtype)                # diffusers' own warns of parts to keep in fp32, and has none


AUTOENCODERS: dict[str, Callable[..., Autoencoder]] = {"pixels": PixelSpace, "kl": KL, "unit": Scaled}


def build(spec: dict[str, Any]) -> Autoencoder:
    """The autoencoder a spec describes. Raises: ValueError for an unknown kind."""
    arguments = dict(spec)
    kind = arguments.pop("kind", None)
    if kind not in AUTOENCODERS:
        raise ValueError(f"autoencoder {kind!r} is unknown; expected one of {', '.join(AUTOENCODERS)}")
    return AUTOENCODERS[kind](**arguments)


def to_float(images: np.ndarray) -> Tensor:
    """uint8 [B, H, W, 3] -> fp32 [B, 3, H, W] in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_uint8(images: Tensor) -> np.ndarray:
    """[B, 3, H, W] in [-1, 1] (clamped) -> uint8 [B, H, W, 3]."""
    return ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()
