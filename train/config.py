"""The configuration of a training run. A recipe (train/recipes.py) is a function that returns one."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from mmdit import keyed, numbers, presets
from mmdit.adapters import Lora
from mmdit.config import MMDiTConfig
from mmdit.files import read_json

SIDE = ("run", "cache", "samples", "checkpoint_every", "keep", "device", "threads", "validation", "parallel",
        "skip_nonfinite", "read_ahead", "wandb", "keep_best", "log_every")  # fmt: skip
"""What may change when a run resumes: it does not decide the weights."""
OptimizerKind = Literal["adamw", "muon"]
MOST_THREADS = 1024
Grid = Literal["paper", "midpoints", "mlperf"]


@dataclass(frozen=True)
class Optimizer:
    """AdamW as in the paper, or Muon.

    Examples:
        >>> Optimizer(lr=2e-4, states="int8", weights="bf16").betas
        (0.9, 0.999)
    """

    kind: OptimizerKind = "adamw"
    """muon: Muon for the matrices inside blocks, AdamW for the rest."""
    states: Literal["fp32", "bf16", "int8"] = "fp32"
    """Of AdamW's moments. With fewer bits they are rounded at random (rfkernels.optim), and eps is at least 1e-8."""
    weights: Literal["fp32", "bf16"] = "fp32"
    """How trained weights are stored where a run computes in bf16; bf16 needs states of fewer bits, which round them at
    random, so that small steps add up."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    lr: float = 1e-4
    """Peak learning rate."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of the moments."""
    eps: float = 1e-15
    """The paper's value for bf16-mixed training with QK-norm, not PyTorch's 1e-8."""
    weight_decay: float = 0.0
    """Decoupled; applied to matrices, not to biases and norm weights."""
    warmup: int = 1000
    """Steps of linear warmup."""
    decay: Literal["none", "linear", "cosine"] = "none"
    """Of the learning rate, down to zero at the end of the budget (steps or minutes)."""
    clip: float = 1.0
    """Largest norm of the gradient; 0 switches clipping off."""


@dataclass(frozen=True)
class Ema:
    """Moving average of the weights, in fp32; it is what samples are drawn from.

    Examples:
        >>> Ema(decay=0.999, every=10)
        Ema(decay=0.999, every=10)
    """

    decay: float = 0.99
    """Weight of the former average at each update."""
    every: int = 100
    """Steps between updates."""


@dataclass(frozen=True)
class Validation:
    """Loss on held-out data, at fixed times and with fixed noise.

    Examples:
        >>> Validation(every=500, grid="midpoints").samples
        256
    """

    every: int = 1000
    """Steps between validations; 0: only at the end."""
    grid: Grid = "paper"
    """Times: paper: i/8, i = 1..8, the mean leaves out t = 1; midpoints: (i + 1/2)/8; mlperf: i/8, i = 0..7."""
    samples: int = 256
    """Held-out samples used, at most."""


@dataclass(frozen=True)
class Samples:
    """Pictures drawn during training.

    Examples:
        >>> Samples(prompts=("a red circle",), shift=3.0).guidance
        3.0
    """

    every: int = 1000
    """Steps between grids; 0: only at the end."""
    prompts: tuple[str, ...] = ()
    """Prompts; empty: captions of the validation split."""
    count: int = 16
    """How many validation captions to draw."""
    steps: int = 25
    """Euler steps."""
    guidance: float = 3.0
    """Classifier-free guidance."""
    image_guidance: float = 1.5
    """Of a picture to edit, beside guidance, which is then the instruction's; 1: none."""
    shift: float | None = None
    """alpha of the timestep shift in sampling, also of `train score` and `mmdit sample`; None: as in training."""


@dataclass(frozen=True)
class Preference:
    """Direct preference optimisation (Diffusion-DPO, arXiv 2311.12908) on the formulation's output.

    Examples:
        >>> Preference(beta=2000.0, safeguard=0.5).weight
        'constant'
    """

    beta: float = 500.0
    """How far the model may leave its base: of mean squared errors, not of sums, which differ with the resolution."""
    smoothing: float = 0.0
    """Share of pairs whose order is taken to be wrong."""
    weight: Literal["constant", "data", "noise"] = "constant"
    """Of a time t: constant: 1; data: t^2, errors of the picture; noise: (1 - t)^2, of the noise, as published."""
    safeguard: float | None = None
    """mu of Diffusion-SDPO (arXiv 2511.03317), 0 to 1: keeps worse pictures' gradient from making better ones worse."""

    def __post_init__(self) -> None:
        numbers.above("Preference: beta", self.beta, 0)
        numbers.between("Preference: smoothing", self.smoothing, 0, 0.5)
        if self.safeguard is not None:
            numbers.between("Preference: safeguard", self.safeguard, 0, 1)


@dataclass(frozen=True)
class Parallel:
    """How a run is spread over the processes that torchrun started; the weights do not depend on it.

    Examples:
        >>> Parallel(replicas=8, checkpointing="selective").accumulate
        1
    """

    replicas: int = 1
    """Groups of processes, each of which shards a whole model (HSDP); 1: all processes shard one (FSDP)."""
    accumulate: int = 1
    """Parts in which each process computes its share of a batch, one after another, to hold fewer activations."""
    checkpointing: Literal["none", "selective", "full"] = "none"
    """Activations of a block that are computed again in the backward: none; all but attention and the projections back
    to the width; all."""
    compile: bool = False
    """torch.compile each block."""
    prefetch: int = 1
    """Blocks whose weights are gathered while the one before them computes, forward and backward."""
    timeout_minutes: float = 10.0
    """How long processes wait for each other before the run ends."""
    watch_seconds: float = 120.0
    """Time without progress after which each process says which ones are behind."""


@dataclass(frozen=True)
class Config:
    """A training run. Exactly one of `steps` and `minutes` is its budget.

    Examples:
        >>> config = Config(run=Path("runs/mine"), cache=Path("cache/mine"), steps=1000)
        >>> Config.from_json(config.to_json()) == config
        True
    """

    run: Path
    """Run folder; a run found there resumes."""
    cache: Path
    """Precomputed data (python -m train precompute)."""
    model: MMDiTConfig = field(default_factory=presets.tiny)
    """Architecture."""
    formulation: str = "rf/lognorm(0.00,1.00)"
    """By the paper's name."""
    shift: float = 1.0
    """alpha of the timestep shift, in training, and in sampling unless samples.shift is given."""
    unit_latents: bool = False
    """Scale latents to mean 0 and deviation 1, by the cache's own statistics."""
    initial: Path | None = None
    """Weights to start from, in any layout; norms of q and k that they lack start at one."""
    objective: Literal["flow", "preference", "editing"] = "flow"
    """flow: pictures, by the formulation. preference: pairs of a better and a worse one (DPO), with an adapter.
    editing: a picture before, an instruction, the picture after, with model.reference_channels or reference_tokens."""
    preference: Preference = field(default_factory=Preference)
    """Of the objective preference."""
    edit_dropout: float = 0.05
    """Of editing: share of samples without text, as many without the picture, as many without both; at most 1/3."""
    prior: Path | None = None
    """A cache of what the model is not to forget: beside each sample one of it is trained on."""
    prior_weight: float = 1.0
    """Of their loss."""
    adapter: Lora = field(default_factory=Lora)
    """Train low-rank adapters of `initial` instead of the whole model."""
    batch: int = 64
    """Samples per step."""
    steps: int | None = None
    """Budget in steps."""
    minutes: float | None = None
    """Budget in minutes of training, validation and sampling included."""
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema: Ema = field(default_factory=Ema)
    encoder_dropout: float = 0.464
    """Probability of zeroing each text encoder, independently. With three encoders 0.464 leaves 10 % unconditional."""
    caption_dropout: float = 0.0
    """Probability of zeroing all of them at once."""
    validation: Validation = field(default_factory=Validation)
    samples: Samples = field(default_factory=Samples)
    log_every: int = 10
    """Steps after which their losses and gradient norms are read and logged: only then a GPU is waited for."""
    checkpoint_every: int = 1000
    """Steps between checkpoints; the last one is always written."""
    keep: int = 2
    """Checkpoints kept."""
    keep_best: bool = False
    """Keep the weights with the lowest validation loss besides, averaged and raw."""
    seed: int = 0
    """Data order, noise, times, dropout and initial weights follow from it."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """bf16: autocast over fp32 master weights. auto: bf16 on a GPU, fp32 on a CPU."""
    threads: int = 0
    """CPU threads; 0: PyTorch's choice."""
    read_ahead: int = 2
    """Parts of steps that are read before they are needed, each by a thread of its own; 0: when they are needed."""
    wandb: str = ""
    """Weights & Biases project to which metrics go too, by the package wandb; WANDB_MODE=offline keeps them here."""
    skip_nonfinite: int = 10
    """Steps in a row whose loss or gradient is not finite that are passed over before the run stops."""
    parallel: Parallel = field(default_factory=Parallel)

    def __post_init__(self) -> None:
        if (self.steps is None) == (self.minutes is None):
            raise ValueError(f"Config: steps is {self.steps} and minutes is {self.minutes}; give exactly one of them")
        for name in ("encoder_dropout", "caption_dropout"):
            numbers.between(f"Config: {name}", getattr(self, name), 0, 1)
        numbers.between("Config: prior_weight", self.prior_weight, 0)
        numbers.between("Config: edit_dropout", self.edit_dropout, 0, 1 / 3)
        if (self.objective == "editing") != self.model.takes_references:
            wants = "model.reference_channels or model.reference_tokens" if self.objective == "editing" else "editing"
            raise ValueError(f"Config: objective is {self.objective}, for this model expected {wants}")
        if self.objective == "editing" and (self.adapter.rank or self.prior is not None):
            came = f"adapter.rank {self.adapter.rank} and prior {self.prior}"
            raise ValueError(f"Config: objective is editing with {came}; expected 0 and None: it trains a whole model")
        if self.objective == "preference" and self.prior is not None:
            raise ValueError(f"Config: prior is {self.prior} and objective preference; expected one of the two")
        if self.objective == "preference" and not self.adapter.rank:
            raise ValueError("Config: objective is preference and adapter.rank 0; the reference is the base without it")
        if self.adapter.rank and (self.initial is None or self.optimizer.kind != "adamw"):
            came = f"initial is {self.initial} and optimizer.kind {self.optimizer.kind}"
            raise ValueError(f"Config: {came}; an adapter needs the weights that it adapts, and AdamW")
        self._check_numbers()
        least_one: dict[str, Any] = {
            name: getattr(self, name) for name in ("batch", "keep", "log_every", "checkpoint_every")
        }
        least_one |= {"ema.every": self.ema.every, "samples.steps": self.samples.steps}
        least_one |= {"parallel.replicas": self.parallel.replicas, "parallel.accumulate": self.parallel.accumulate}
        least_one |= {"parallel.prefetch": self.parallel.prefetch}
        least_one |= {"validation.samples": self.validation.samples, "steps": 1 if self.steps is None else self.steps}
        for name, value in least_one.items():
            numbers.whole(f"Config: {name}", value, 1)
        if self.minutes is not None:
            numbers.above("Config: minutes", self.minutes, 0)
        for name, value in (("threads", self.threads), ("read_ahead", self.read_ahead)):
            numbers.whole(f"Config: {name}", value, 0)
            numbers.between(f"Config: {name}", value, 0, MOST_THREADS)

    def _check_numbers(self) -> None:
        """What cannot be meant, here and in the parts. Raises: ValueError, TypeError."""
        optimizer, samples, parallel = self.optimizer, self.samples, self.parallel
        above = {"shift": self.shift, "optimizer.lr": optimizer.lr, "optimizer.muon_lr": optimizer.muon_lr}
        above |= {"parallel.timeout_minutes": parallel.timeout_minutes, "optimizer.eps": optimizer.eps}
        above |= {"parallel.watch_seconds": parallel.watch_seconds}
        above |= {} if samples.shift is None else {"samples.shift": samples.shift}
        for name, value in above.items():
            numbers.above(f"Config: {name}", value, 0)
        for name, value in (("samples.guidance", samples.guidance), ("samples.image_guidance", samples.image_guidance),
                            ("optimizer.weight_decay", optimizer.weight_decay),
                            ("optimizer.clip", optimizer.clip)):  # fmt: skip
            numbers.between(f"Config: {name}", value, 0)
        if optimizer.kind == "muon" and optimizer.states != "fp32":
            raise ValueError(f"Config: optimizer.states is {optimizer.states}; of muon they are fp32")
        if optimizer.weights == "bf16" and optimizer.states == "fp32":
            raise ValueError("Config: optimizer.weights is bf16, optimizer.states fp32; expected states of fewer bits")
        numbers.between("Config: ema.decay", self.ema.decay, 0, 1)
        if len(optimizer.betas) != 2:
            raise ValueError(f"Config: optimizer.betas is {optimizer.betas}; expected two numbers")
        for beta in optimizer.betas:
            numbers.between("Config: optimizer.betas", beta, 0, 1)
            if beta == 1:
                raise ValueError(f"Config: optimizer.betas is {optimizer.betas}; expected numbers below 1")
        if optimizer.kind not in get_args(OptimizerKind):
            wanted = ", ".join(get_args(OptimizerKind))
            raise ValueError(f"Config: optimizer.kind is {optimizer.kind!r}; expected one of {wanted}")
        for name, whole in (("optimizer.warmup", optimizer.warmup), ("validation.every", self.validation.every),
                            ("samples.every", samples.every), ("samples.count", samples.count),
                            ("skip_nonfinite", self.skip_nonfinite)):  # fmt: skip
            numbers.whole(f"Config: {name}", whole, 0)
        keyed.checked(self.seed)

    @property
    def pictures(self) -> int:
        """Of a sample that the model is trained on: pairs have two, as has a sample with one of a prior beside it."""
        return 2 if self.objective == "preference" or self.prior is not None else 1

    @property
    def flops_share(self) -> float:
        """FLOPs of a sample over those of training a whole model on a picture: a forward is a third of that, a backward
        to the inputs another. Frozen weights save the last third, a preference's reference is one more forward."""
        each = (2 if self.adapter.rank else 3) + (1 if self.objective == "preference" else 0)
        return self.pictures * each / 3

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=1, default=_plain)

    @classmethod
    def from_json(cls, text: str) -> Config:
        """Of `to_json`. Raises: TypeError for fields that it does not have."""
        return _made(cls, json.loads(text))

    @classmethod
    def of_run(cls, run: Path) -> Config:
        """Raises: FileNotFoundError or ValueError, with the file."""
        path = run / "config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{run} is no run folder: it holds no config.json")
        try:
            return _made(cls, read_json(path))
        except (TypeError, AttributeError) as error:
            raise ValueError(f"{path} is not the configuration of a run ({error})") from error

    def decides(self) -> dict[str, Any]:
        """The part of the configuration that decides the weights: a run can only resume with the same."""
        values = json.loads(self.to_json())
        for name in SIDE:
            values.pop(name)
        return values


def _plain(value: Any) -> Any:
    """Paths as text, a number of NumPy as Python's."""
    return value.item() if hasattr(value, "item") else str(value)


def with_defaults(decides: dict[str, Any]) -> dict[str, Any]:
    """What an older version's `decides` said, with the defaults of settings that have come since."""
    defaults = Config(Path(), Path(), steps=1).decides()
    parts = (name for name, value in defaults.items() if isinstance(value, dict) and name != "model")
    nested = {name: {**defaults[name], **decides.get(name, {})} for name in parts}
    return {**defaults, **decides, **nested}


def _made(kind: type, values: dict[str, Any]) -> Any:
    """A dataclass from what JSON left of it: paths and tuples are there again."""
    types, found = get_type_hints(kind), {}
    for name, value in values.items():
        wanted = types.get(name)
        if dataclasses.is_dataclass(wanted):
            value = _made(wanted, value)                                                             # type: ignore[arg-type]
        elif isinstance(value, list):
            value = tuple(value)
        elif value is not None and wanted in (Path, Path | None):
            value = Path(value)
        found[name] = value
    return kind(**found)
