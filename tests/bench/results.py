"""A results file as the suite writes it. Its numbers are made up, its device says so, and it stays in the tests."""


def entry(group, contender, seconds, **record):
    return {"group": group, "stats": {"median": seconds}, "extra_info": {"contender": contender, **record}}


def synthetic(device="Synthetic GPU", driver="1.2"):
    told = {
        "runs": "adaln: triton (first that can run): one kernel", "GB/s": 100.0, "of_copy": 0.5, "ratio": 0.5,
        "best_other": "eager", "speedup_over_best": 2.0, "launches": 1, "kept_bytes": 8_000_000,
    }  # fmt: skip
    slow = {"ratio": 4 / 3, "best_other": "cudnn", "speedup_over_best": 0.5, "flops": 100, "moved_bytes": 10}
    step = {
        "ratio": 0.8, "ratio_diffusers": 0.5, "best_other": "compile", "speedup_over_best": 1.1, "step": "training",
        "depth": 2, "pixels": 64, "batch": 2, "dtype": "bfloat16", "flops": 1e9, "moved_bytes": 1e7, "MFU": 0.123,
        "peak_bytes": 3_000_000, "breakdown": {"attention": 0.001, "matrix products": 0.003},
    }  # fmt: skip
    machine = {
        "device": device, "driver": driver, "torch": "3.4", "triton": "5.6",
        "ceilings": {"copy": 1e12, "matmul": 1e14, "attention": 5e13, "launch": 2e-6, "source": "measured"},
    }  # fmt: skip
    return {
        "datetime": "2026-01-02T03:04:05",
        "machine_info": {"rfkernels": machine},
        "notes": ["a line that the run said"],
        "benchmarks": [
            entry("adaln forward", "ours", 1e-6, **told),
            entry("adaln forward", "eager", 2e-6, launches=4, kept_bytes=16_000_000),
            entry("attention both", "ours", 4e-6, **slow),
            entry("attention both", "eager", 3e-6),
            entry("attention both", "cudnn", 2e-6),
            entry("d2-64px-B2 training step", "ours", 4e-3, **step),
            entry("d2-64px-B2 training step", "eager", 5e-3, breakdown={"attention": 0.002, "matrix products": 0.003}),
            entry("d2-64px-B2 training step", "compile", 4.4e-3),
            {"group": "host", "stats": {"median": 1.0}, "extra_info": {"above_us": 1}},
        ],
    }
