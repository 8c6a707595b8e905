"""Tiny programs spend more time in the compiler than in running; here it does not try hard."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.memory.test_equality import random_params
from tests.rollout.toy import MODEL


@pytest.fixture(scope="package", autouse=True)
def cheap_compilation():
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def params():
  return random_params(MODEL, 1)


@pytest.fixture(scope="module")
def text():
  """Of three videos."""
  return jnp.asarray(np.random.default_rng(2).normal(size=(3, MODEL.text_len, MODEL.text_dim)), jnp.float32)
