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
