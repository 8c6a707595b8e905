"""The input of a causal convolution in time, made for cuDNN: normalised, SiLU, three frames' channels side by side."""

from pallas_kernels.frames.api import normed_frames

__all__ = ["normed_frames"]
