"""A product with its bias and GELU."""

from pallas_kernels.gelu_linear.api import gelu_linear

__all__ = ["gelu_linear"]
