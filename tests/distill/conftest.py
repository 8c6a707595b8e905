"""Tiny programs spend more time in the compiler than in running; here it does not try hard."""

import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def cheap_compilation():
  before = jax.config.read("jax_disable_most_optimizations")
  jax.config.update("jax_disable_most_optimizations", True)
  yield
  jax.config.update("jax_disable_most_optimizations", before)
