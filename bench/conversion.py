"""Memory of a conversion: python -m bench.conversion --depth 4

Writes a file in the released layout at the width of SD3.5 large (2432), `depth` blocks of its 38, fp16, converts it to
the other layouts, and reports the most anonymous memory that took (mapped pages of the source are the file's own and
can be dropped at any time), against the largest tensor and the file.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from functools import partial
from pathlib import Path

import torch

from mmdit import checkpoint, presets
from mmdit.checkpoint.layouts import SD3_PREFIX, pieces
from mmdit.checkpoint.tensors import Entry, Planned, write


def anonymous_bytes() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return 1024 * int(line.split()[1])
    raise RuntimeError("this system does not tell anonymous memory (RssAnon)")


class Peak:
    """The most anonymous memory inside, above what there was before."""

    def __enter__(self) -> Peak:
        self.before, self.bytes, self._stop = anonymous_bytes(), 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.is_set():
            self.bytes = max(self.bytes, anonymous_bytes() - self.before)
            time.sleep(0.001)

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()


def main(depth: int, folder: Path) -> None:
    config = presets.by_depth(depth, heads=38, resolution=1024, max_height=3072, max_width=3072)
    found, _ = pieces(config)
    random = lambda shape: iter([torch.rand(shape).half()])  # noqa: E731
    plan = {SD3_PREFIX + p.sd3: Planned(Entry(p.shape, "F16"), partial(random, p.shape)) for p in found}
    source = folder / "released.safetensors"
    write(source, plan, {}, 1 << 60)
    size, largest = source.stat().st_size, max(t.entry.bytes for t in plan.values())
    print(f"{depth} blocks of width {config.width}: {size / 1e9:.2f} GB, largest tensor {largest / 1e6:.0f} MB")
    for layout, target in (("diffusers", "folder"), ("native", "native.safetensors"), ("sd3", "again.safetensors")):
        start = time.perf_counter()
        with Peak() as peak:
            written = checkpoint.convert(source, folder / target, layout=layout)
        seconds = time.perf_counter() - start
        biggest = max(path.stat().st_size for path in written)
        print(
            f"to {layout:10s} {peak.bytes / 1e6:6.0f} MB at most, largest file {biggest / 1e9:.2f} GB, {seconds:.0f} s"
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m bench.conversion", description="Memory of a conversion.")
    parser.add_argument("--depth", type=int, default=4, help="blocks, of SD3.5 large's 38 (4)")
    with tempfile.TemporaryDirectory() as name:
        main(parser.parse_args().depth, Path(name))
