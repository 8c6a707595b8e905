"""Sparse Forcing: real-time autoregressive video diffusion in JAX. `sfjax.sample(...)` gives the frames of a video."""

from typing import Any


def __getattr__(name: str) -> Any:
  if (
    name == "sample"
  ):  # only when asked for: it loads the model's code, which a config or an error message does not need
    from sfjax.sampling import sample

    return sample
  raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
