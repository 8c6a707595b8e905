"""Slots in float8: the memory of the model's dtype, rounded block by block when a chunk is committed, and nothing else."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pbsa import BLOCK
from sfjax import memory as kv
from sfjax import rollout
from sfjax.flow import SamplerConfig
from sfjax.routing import MemoryConfig
from tests.rollout.toy import KEY, MEMORY, MODEL, distance

CONFIGS = {
  "sparse": MEMORY,
  "window": MemoryConfig(window=2),
  "layer": MemoryConfig(window=2, persistent=5, top_k=0.4, sharing="layer", score_decay=0.5),
  "novelty": MemoryConfig(window=2, persistent=5, importance="learned", novelty=4.0, rope_cap=6),
}
CHUNKS = 5
FEW = SamplerConfig("few_step", steps=2)
float8 = lambda cfg: dataclasses.replace(cfg, slots="float8")


def rounded(x):
  """Slots after a stay in float8."""
  return kv.widen(MODEL, *kv.narrow(x))


def play(cfg, params, text, sampler=FEW, between=lambda m: m, chunks=CHUNKS, model=MODEL):
  """Latents and memories of every chunk; `between`: what becomes of the memory after each."""
  chunk = jax.jit(lambda m: rollout.rollout_chunk(model, cfg, sampler, params, m, KEY, jnp.arange(2), in_place=True))
  memory, made, memories = rollout.start(model, cfg, params, text[:2]), [], []
  for _ in range(chunks):
    x, memory = chunk(memory)
    memory = between(memory)
    made.append(x)
    memories.append(memory)
  return np.stack(made), memories


def widened(m):
  """A memory of float8 slots in the model's dtype."""
  return m.replace(k=kv.widen(MODEL, m.k, m.k_scale), v=kv.widen(MODEL, m.v, m.v_scale), k_scale=None, v_scale=None)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounding_errs_by_what_float8_has_no_room_for(dtype):
  rng = np.random.default_rng(0)
  sizes = 2.0 ** rng.integers(-40, 20, (3, 2, 1, 2, 1))  # of each block and head
  x = rng.normal(size=(3, 2, BLOCK, 2, 16)) * sizes * 2.0 ** rng.integers(-12, 1, (3, 2, BLOCK, 2, 16))
  x[1, 1, :, 0] = 0
  x = jnp.asarray(x.reshape(3, 2 * BLOCK, 2, 16), dtype)
  model = dataclasses.replace(MODEL, dtype=dtype)
  held, scale = kv.narrow(x)
  got = kv.widen(model, held, scale)
  assert held.dtype == jnp.float8_e4m3fn and got.dtype == dtype and scale.shape == (3, 2, 2)
  wide = lambda x: np.asarray(x, np.float64).reshape(3, 2, BLOCK, 2, 16)
  largest = np.abs(wide(x)).max((2, 4), keepdims=True)
  # Half of the last of 3 bits behind the point; below 2^-6, half of 2^-9, of what is divided by less than 2 largest / 448.
  bound = np.maximum(np.abs(wide(x)) * 2**-4, largest * 2**-9 / 448)
  error = np.abs(wide(got) - wide(x))
  assert np.isfinite(wide(got)).all() and (error <= bound).all() and error.max() > 0
  assert not wide(got)[1, 1, :, 0].any()
  again = kv.narrow(got)
  np.testing.assert_array_equal(kv.widen(model, *again), got)  # so that moving blocks about never rounds twice


@pytest.mark.parametrize("commit", ["clean", "last"])
@pytest.mark.parametrize("name", [*CONFIGS, "packed"])
def test_the_rollout_is_that_of_a_memory_rounded_after_each_chunk(name, commit, params, text):
  """Origins and scores too: what is evicted takes its scales along."""
  if commit == "last" and name != "sparse":
    pytest.skip("one config is enough")
  cfg, sampler = CONFIGS.get(name, MEMORY), dataclasses.replace(FEW, commit=commit)
  model = dataclasses.replace(MODEL, tile=(3, 1, 1), block_tokens=7) if name == "packed" else MODEL
  run = functools.partial(play, model=model)
  between = lambda m: m.replace(k=rounded(m.k), v=rounded(m.v))
  want, after = run(cfg, params, text, sampler, between)
  got, memories = run(float8(cfg), params, text, sampler)
  plain, usual = run(cfg, params, text, sampler)
  np.testing.assert_array_equal(got[0], plain[0])  # all that the first chunk reads is its own
  assert distance(got, want) <= 1e-5 and distance(got[1:], plain[1:]) > 1e-3
  for m, w in zip(memories, after, strict=True):
    assert m.k.dtype == m.v.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(m.origin, w.origin)
  if cfg.persistent:
    assert (np.asarray(memories[-1].origin[..., : cfg.persistent]) >= 0).any()
  # A number between two of float8 falls to either if the sums before it differ in their last bit: by an eighth of itself.
  close = lambda a, b: np.isclose(a, b, rtol=2**-3, atol=2**-16 * np.abs(b).max())
  for leaf in ("k", "v"):
    a, b = (np.asarray(getattr(m, leaf)) for m in (widened(memories[-1]), after[-1]))
    assert close(a, b).all() and (np.abs(a - b) <= 1e-5 * np.abs(b).max()).mean() > 0.999
    a, b = (np.asarray(getattr(m, leaf)) for m in (widened(memories[0]), usual[0]))
    np.testing.assert_array_equal(a, rounded(b))


def test_bytes_are_half_of_16_bit_and_held_as_predicted(params, text):
  m = play(float8(MEMORY), params, text, chunks=1)[1][0]
  predicted = kv.memory_bytes(MODEL, float8(MEMORY), 2)
  assert predicted["kv"] == kv.held_bytes(m)
  assert sum(predicted.values()) == sum(x.nbytes for x in jax.tree.leaves(m))


def test_what_carries_a_gradient_is_refused(params, text):
  cfg = float8(MEMORY)
  memory = rollout.start(MODEL, cfg, params, text[:2])
  with pytest.raises(NotImplementedError, match="^in_place: False for float8 slots"):
    rollout.rollout(MODEL, cfg, FEW, params, memory, KEY, jnp.arange(2), 1)
  with pytest.raises(ValueError, match="^cfg: slots float8; want model"):
    rollout.self_forcing(MODEL, cfg, FEW, params, memory, KEY, jnp.arange(2), 2, jnp.int32(0))
