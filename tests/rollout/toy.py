"""A tiny model and memory to roll out, what tests of it start from, and how far two results are apart."""

import jax
import numpy as np

from sfjax.routing import MemoryConfig
from tests.memory.test_equality import tiny

MODEL = tiny(latent_size=(4, 6), tile=(1, 2, 3), layers=2, prediction="x0")
MEMORY = MemoryConfig(window=2, persistent=3, top_k=0.4, rope_cap=6)
KEY = jax.random.key(7)
FAR = 1e-2  # a thousand times what rounding does


def distance(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


# Of a leaf's largest. Means are rounded to bfloat16, one in thousands the other way, and scores are made of them.
TOLERANCE = {"k": 2e-5, "v": 2e-5, "cross_k": 2e-5, "cross_v": 2e-5, "pooled": 2**-8, "score": 2**-8}


def same_memory(got, want):
  """Every leaf, of programs that do the same sums in another order."""
  for name, x in vars(want).items():
    a, b = (None if m is None else np.asarray(m, np.float64) for m in (getattr(got, name), x))
    if b is not None:
      np.testing.assert_allclose(a, b, rtol=0, atol=TOLERANCE.get(name, 0) * np.abs(b).max(), err_msg=name)
