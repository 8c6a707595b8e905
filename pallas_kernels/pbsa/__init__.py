"""Persistent block-sparse attention: every query tile reads the prefix blocks whole and its own listed blocks."""

from pallas_kernels.pbsa.api import pbsa
from pallas_kernels.pbsa.lists import BLOCK, TILE, top_lists, validate_lists

__all__ = ["BLOCK", "TILE", "pbsa", "top_lists", "validate_lists"]
