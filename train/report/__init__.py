"""A run as one page that opens from disk, without a network: `python -m train report RUN`."""

from train.report.page import CAPTIONS, NAME, STARTS, entries, write

__all__ = ["CAPTIONS", "NAME", "STARTS", "entries", "write"]
