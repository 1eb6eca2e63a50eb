"""The numbers of arXiv 2403.03206 that a study's tables stand beside."""

RANKS: dict[str, tuple[float, float, float]] = {
    "rf/lognorm(0.00,1.00)": (1.54, 1.25, 1.50),
    "rf/lognorm(1.00,0.60)": (2.08, 3.50, 2.00),
    "rf/lognorm(0.50,0.60)": (2.71, 8.50, 1.00),
    "rf/mode(1.29)": (2.75, 3.25, 3.00),
    "rf/lognorm(0.50,1.00)": (2.83, 1.50, 2.50),
    "eps/linear": (2.88, 4.25, 2.75),
    "rf/mode(1.75)": (3.33, 2.75, 2.75),
    "rf/cosmap": (4.13, 3.75, 4.00),
    "edm(0.00,0.60)": (5.63, 13.25, 3.25),
    "rf": (5.67, 6.50, 5.75),
    "v/linear": (6.83, 5.75, 7.75),
    "edm(0.60,1.20)": (9.00, 13.00, 9.00),
    "v/cos": (9.17, 12.25, 8.75),
    "edm/cos": (11.04, 14.25, 11.25),
    "edm/rf": (13.04, 15.25, 13.25),
    "edm(-1.20,1.20)": (15.58, 20.25, 15.00),
}
"""Table 1: mean ranks over all settings, those of 5 steps, those of 50."""

METRICS: dict[str, tuple[float, float]] = {
    "rf": (0.217, 94.90),
    "edm(-1.20,1.20)": (0.200, 116.60),
    "eps/linear": (0.222, 90.34),
    "v/cos": (0.209, 97.87),
    "v/linear": (0.217, 100.76),
    "rf/lognorm(0.50,0.60)": (0.233, 120.84),
    "rf/mode(1.75)": (0.218, 94.06),
    "rf/lognorm(1.00,0.60)": (0.234, 147.69),
    "rf/lognorm(-0.50,1.00)": (0.219, 89.70),
    "rf/lognorm(0.00,1.00)": (0.224, 89.91),
}
"""Table 2, CC12M, 25 steps: CLIP score and FID."""

EFFICIENCY: dict[str, tuple[float, float, float, float]] = {
    "depth=15": (4.30, 0.86, 0.21, 191.13),
    "depth=30": (3.59, 0.70, 0.24, 187.96),
    "depth=38": (2.71, 0.14, 0.08, 185.96),
}
"""Table 6: relative decrease of the CLIP score at 5, 10 and 20 of 50 steps in percent, and path length."""
