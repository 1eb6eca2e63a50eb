"""How fast a process reads: python -m bench.reading

Fills a cache with random samples of the paper's sizes (a 16 x 32 x 32 latent, 77 tokens of CLIP-L, CLIP-G and T5: 1 MB
in bf16), then draws batches from it as training does: samples and noise keyed, text assembled, read ahead by threads.
The files were just written, so they come from the page cache: what is measured is the process, not a disk.
"""

from __future__ import annotations

import platform
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mmdit import flow, presets
from mmdit.cost.flops import TEXT_TOKENS, training_flops
from mmdit.cost.hardware import GPUS
from mmdit.encoders import TextFeatures
from train.data.plan import Plan
from train.data.shards import Cache, Index, Sample, write_shard
from train.engine.parallel import World
from train.engine.reader import Reader
from train.objectives import Flow

LATENT, ENCODERS = (16, 32, 32), ((77, 768, 768), (77, 1280, 1280), (77, 4096, 0))
SHARE = 0.4
"""Of an H100's peak, to say what GPUs would ask for: an assumption."""


@dataclass(frozen=True)
class Arguments:
    samples: int = 2048
    """Of the cache: 1 MB each."""
    shard_size: int = 256
    """Samples of a shard."""
    batch: int = 32
    """Samples of a batch."""
    batches: int = 60
    """Batches that are timed."""
    ahead: tuple[int, ...] = (0, 1, 2, 4)
    """Threads that read ahead."""
    folder: Path | None = None
    """Where the cache is written for as long as it takes."""


def random_cache(
    path: Path, samples: int, shard_size: int, latent: tuple[int, ...] = LATENT, factor: int = 0
) -> Cache:
    """Of the paper's sizes, whole. With `factor` latents are pixels, so many a side, and a model can train on it."""
    generator = torch.Generator().manual_seed(0)
    normal = lambda *shape: torch.randn(*shape, generator=generator)  # noqa: E731
    entries = []
    for first in tqdm(range(0, samples, shard_size), desc="filling a cache"):
        shard = [
            Sample(i, str(i), "", normal(*latent), [TextFeatures(normal(n, d), normal(p)) for n, d, p in ENCODERS])
            for i in range(first, min(first + shard_size, samples))
        ]
        entries.append(write_shard(path, f"train/256x256/{first // shard_size:05d}.safetensors", shard))
    specs = [{"kind": "random", "dim": d, "pooled_dim": p, "beside": i == 1} for i, (_, d, p) in enumerate(ENCODERS)]
    autoencoder = {"kind": "pixels", "factor": factor} if factor else {"kind": "none"}
    settings = {"source": "random", "sizes": [[256, 256]], "autoencoder": autoencoder, "encoders": specs}
    Index(settings, True, {"train/256x256": entries}).save(path)
    return Cache(path)


def samples_per_second(cache: Cache, batch: int, batches: int, ahead: int) -> float:
    buckets = cache.buckets("train")
    objective = Flow(flow.by_name("rf/lognorm(0.00,1.00)"), 4096, 0.464, 0, (False, True, False))
    plan = Plan({name: len(bucket) for name, bucket in buckets.items()}, batch, 0)
    with Reader(plan, objective, buckets, World(torch.device("cpu")), 1, ahead) as reader:
        for step in range(5):
            list(reader.parts(step))
        start = time.perf_counter()
        for step in range(5, 5 + batches):
            list(reader.parts(step))
        return batch * batches / (time.perf_counter() - start)


def main() -> None:
    import tyro

    arguments = tyro.cli(Arguments, prog="python -m bench.reading", description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        cache = random_cache(Path(folder), arguments.samples, arguments.shard_size)
        size = sum(e["bytes"] for entries in cache.index.shards.values() for e in entries) / arguments.samples
        print(f"{platform.processor() or platform.machine()}, torch {torch.__version__}, {size / 1e6:.2f} MB a sample")
        for ahead in arguments.ahead:
            rate = samples_per_second(cache, arguments.batch, arguments.batches, ahead)
            print(f"{ahead} threads ahead: {rate:7.0f} samples/s, {rate * size / 1e6:6.0f} MB/s a process")
    for depth in (24, 38):
        flops = training_flops(presets.by_depth(depth), 256, TEXT_TOKENS).total
        rate = SHARE * GPUS["H100 80GB HBM3"].flops / flops
        print(
            f"d = {depth} at 256 pixels on an H100 at {SHARE:.0%} of its peak: {rate:.0f} samples/s, "
            f"{rate * size / 1e6:.0f} MB/s; eight of them: {8 * rate:.0f} samples/s, {8 * rate * size / 1e9:.2f} GB/s"
        )


if __name__ == "__main__":
    main()
