"""Products of 8-bit floats: their rounding, the parameters made for them, and a chunk beside float32's."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from sfjax import float8, rollout
from sfjax.errors import UserError
from sfjax.flow import SamplerConfig
from sfjax.model import Float8Linear, Float8RowsLinear, Linear
from sfjax.parts import load_parts, with_linear
from sfjax.routing import MemoryConfig
from sfjax.sampling import SHIPPED
from tests.memory.test_equality import random_params, tiny

MODEL = tiny(latent_size=(4, 6), tile=(1, 2, 3), layers=2, prediction="x0")
FLOAT8 = dataclasses.replace(MODEL, linear="float8")
HALF_UNIT = 2.0**-4  # of an element's rounding to 4 significant bits, over that element
# Of a product whose two factors are rounded, each element's error drawn from the whole unit: of sums of many, less.
ERROR = 2**0.5 * HALF_UNIT / 3**0.5


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def distance(a, b):
  a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
  return np.linalg.norm(a - b) / np.linalg.norm(b)


@pytest.mark.parametrize("size", [1e-4, 1.0, 448 * 8, 1e4])
def test_weights_come_back(size):
  kernel = size * normal(3, 40, 24).at[1].set(0).at[2, 0, 0].set(9)
  kernel_t, scale = float8.weights(kernel)
  back = kernel_t.astype(jnp.float32).swapaxes(1, 2) * scale[:, None, None]
  # Below the smallest normal number, 2^-6, steps are even.
  assert (jnp.abs(back - kernel) <= HALF_UNIT * jnp.maximum(jnp.abs(kernel), 2.0**-6 * scale[:, None, None])).all()
  assert scale[1] == 1 and not back[1].any()
  np.testing.assert_array_equal(np.frexp(np.asarray(scale))[0], 0.5)
  largest = jnp.abs(kernel_t.astype(jnp.float32)).max((1, 2))[jnp.array([0, 2])]
  assert ((largest > 200) & (largest <= 448)).all()


def test_rows_come_back_and_nothing_overflows():
  x = normal(4, 64) * jnp.array([[1e-6], [0.0], [1.0], [1e6]])
  rows, scale = float8.by_rows(x)
  back = rows.astype(jnp.float32) * scale
  assert (jnp.abs(back - x) <= 1.001 * HALF_UNIT * jnp.maximum(jnp.abs(x), 2.0**-6 * scale)).all() and not back[1].any()
  ends = float8.rounded(jnp.array([1e9, -jnp.inf, 448.0, 463.0])).astype(jnp.float32)
  np.testing.assert_array_equal(ends, [448, -448, 448, 448])


@pytest.mark.parametrize(
  ("kind", "sizes"), [(Float8Linear, [1]), (Float8RowsLinear, [1, 1e-3, 1e3])], ids=["as is", "by rows"]
)
def test_a_product(kind, sizes):
  plain, low = Linear(MODEL, 96, 48, nnx.Rngs(0)), kind(FLOAT8, 96, 48, nnx.Rngs(0))
  for size in sizes:
    plain.bias[...] = low.bias[...] = size * normal(48, seed=1) / 8
    x = size * normal(2, 21, 96)
    for how in ("__call__", "total"):
      got, want = getattr(low, how)(x), getattr(plain, how)(x)
      assert got.shape == want.shape and ERROR / 8 < distance(got, want) <= ERROR


def test_parameters_are_those_of_such_a_model():
  """The same numbers, whether rounded when made or later; and half the bytes of bfloat16 in large layers."""
  like = rollout.abstract_params(FLOAT8)
  made, later = rollout.init_params(FLOAT8), float8.quantised(rollout.init_params(MODEL), like)
  assert jax.tree.structure(made) == jax.tree.structure(later) == jax.tree.structure(like)
  jax.tree.map(np.testing.assert_array_equal, made, later)
  assert made["blocks"]["ffn_in"]["kernel_t"].dtype == float8.E4M3
  assert "kernel" in made["blocks"]["cross_attn"]["k"] and "kernel" in made["time_in"]


@pytest.mark.parametrize("rows", [1, 3])
def test_a_chunk(rows):
  cfg, sampler = MemoryConfig(window=2), SamplerConfig("few_step", steps=2)
  text, key = normal(rows, MODEL.text_len, MODEL.text_dim, seed=2), jax.random.key(3)
  params = random_params(MODEL, 1)

  def run(model, params):
    memory, made = rollout.start(model, cfg, params, text), []
    chunk = jax.jit(
      lambda m: rollout.rollout_chunk(model, cfg, sampler, params, m, key, jnp.arange(rows), in_place=True)
    )
    for _ in range(2):
      x, memory = chunk(memory)
      made.append(x)
    return jnp.stack(made)

  want = run(MODEL, params)
  got = run(FLOAT8, float8.quantised(params, rollout.abstract_params(FLOAT8)))
  # A layer adds three sums to its stream, each behind at most four rounded products; a stream of two layers and the next
  # pass, which begins where this one ends, as sums of independent errors.
  assert ERROR / 8 < distance(got, want) <= ERROR * (4 * 3 * MODEL.layers * sampler.passes) ** 0.5


def test_a_folder_is_rounded_once():
  parts = load_parts(SHIPPED)
  low = with_linear(parts, "float8")
  assert with_linear(low, "float8") is low and with_linear(parts, "dtype") is parts
  assert low.config.model.linear == "float8" and parts.config.model.linear == "dtype"
  with pytest.raises(ValueError, match="^linear: 'dtype'; the weights are for 'float8' alone"):
    with_linear(low, "dtype")
  with pytest.raises(UserError, match="^--linear: 'int4'; want one of dtype, float8"):
    with_linear(parts, "int4")
