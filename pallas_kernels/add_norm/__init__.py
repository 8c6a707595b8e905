"""What stands between a layer's products, in one pass over its rows: a gated residual, then LayerNorm, scaled and shifted."""

from pallas_kernels.add_norm.api import Term, add, add_norm, norm

__all__ = ["Term", "add", "add_norm", "norm"]
