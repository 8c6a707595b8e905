"""The best entries of each row of scores, as lists of blocks."""

from pallas_kernels.choice.api import top_lists

__all__ = ["top_lists"]
