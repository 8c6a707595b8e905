"""Attention of many rows to the few rows of a prompt, of which those past the text are all alike."""

from pallas_kernels.few_keys.api import few_keys

__all__ = ["few_keys"]
