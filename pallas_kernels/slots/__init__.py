"""From a layer's projections to the slots that attention reads: norm, RoPE, packing, the write into the cache, block means."""

from pallas_kernels.slots.api import to_slots

__all__ = ["to_slots"]
