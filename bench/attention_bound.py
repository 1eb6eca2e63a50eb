"""What joint attention costs by arithmetic, and the least time that follows: python -m bench.attention_bound

Counts per head at SD3's shapes (154 text tokens; 256, 512, 1024 pixels) against an H100's limits by its data sheet. No
measurement: what a kernel would take if its busiest resource never waited.
"""

from __future__ import annotations

from dataclasses import dataclass

DIM, TEXT, TILE = 64, 154, 64
# H100 SXM: 132 multiprocessors at 1.83 GHz; per clock each 4096 bf16 matrix FLOP, 16 exponentials, 4 warp instructions.
CLOCK, SMS = 1.83e9, 132
FLOPS, EXPONENTIALS, ISSUES, BYTES = 4096 * CLOCK * SMS, 16 * CLOCK * SMS, 4 * CLOCK * SMS, 3.35e12


@dataclass(frozen=True)
class Variant:
    """Per score: matrix products of 2 * DIM FLOP, exponentials, warp instructions (from the inner loops that
    `rfkernels.inspect` compiles for sm_90). passes: times a tensor [S, DIM] of bf16 crosses HBM."""

    name: str
    products: int
    exponentials: int
    instructions: float
    passes: float


# Instructions of one iteration of four warps over 64 x 64 scores: forward 234 bounded, 350 online; backward 322, 341.
PER_SCORE = 4 / TILE**2
VARIANTS = (
    Variant("forward, bounded softmax", 2, 1, 234 * PER_SCORE, 5),
    Variant("forward, online softmax", 2, 1, 350 * PER_SCORE, 5),
    Variant("backward, two kernels", 7, 2, (322 + 341) * PER_SCORE, 15.4),
)


def padded(tokens: int) -> int:
    return -(-TEXT // TILE) * TILE + -(-(tokens - TEXT) // TILE) * TILE


def bounds(variant: Variant, tokens: int) -> dict[str, float]:
    """Nanoseconds per head by each resource."""
    scores = padded(tokens) ** 2
    return {
        "tensor cores": scores * variant.products * 2 * DIM / FLOPS * 1e9,
        "exponentials": scores * variant.exponentials / EXPONENTIALS * 1e9,
        "issue": scores * variant.instructions / ISSUES * 1e9,
        "memory": variant.passes * tokens * DIM * 2 / BYTES * 1e9,
    }


def main() -> None:
    print("nanoseconds per head on an H100, by resource; the largest bounds the kernel")
    print("| variant | tokens | useful | tensor cores | exponentials | issue | memory | bound |")
    print("|---|---|---|---|---|---|---|---|")
    for variant in VARIANTS:
        for tokens in (410, 1178, 4250):
            by = bounds(variant, tokens)
            useful = (tokens / padded(tokens)) ** 2
            times = " | ".join(f"{t:.0f}" for t in by.values())
            print(f"| {variant.name} | {tokens} | {useful:.0%} | {times} | {max(by, key=lambda k: by[k])} |")


if __name__ == "__main__":
    main()
