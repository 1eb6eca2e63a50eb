"""A sanitizer for Triton kernels that needs no GPU: python -m rfkernels.sanitize SCRIPT.py. See README.md here."""

from rfkernels.sanitize.canary import check_results, poison
from rfkernels.sanitize.findings import Finding, Settings, watch
from rfkernels.sanitize.interpreter import install

__all__ = ["Finding", "Settings", "check_results", "install", "poison", "watch"]
