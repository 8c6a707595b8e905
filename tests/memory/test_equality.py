"""The heart of the project: the cached rollout and one parallel forward pass decide and compute the same."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import memory as kv
from sfjax import rollout
from sfjax.attention import parallel_attention
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig

CHUNKS = 7
CONFIGS = {
  "dense": MemoryConfig(window=CHUNKS),
  "window": MemoryConfig(window=2),
  "window_sparse": MemoryConfig(window=3, top_k=0.4),
  "sinks": MemoryConfig(window=2, persistent=4, sink_chunks=1),
  "sparse_head": MemoryConfig(window=2, persistent=5, top_k=0.3),
  "sparse_layer": MemoryConfig(window=2, persistent=5, top_k=0.3, sharing="layer"),
  "decay": MemoryConfig(window=2, persistent=3, top_k=0.3, score_decay=0.5),
  "learned": MemoryConfig(window=2, persistent=6, top_k=0.3, importance="learned"),
  "learned_layer": MemoryConfig(window=3, persistent=5, top_k=0.3, importance="learned", sharing="layer"),
  "random": MemoryConfig(window=2, persistent=4, top_k=0.5, importance="random"),
  "rope_cap": MemoryConfig(window=2, persistent=5, top_k=0.3, rope_cap=7),
  "rope_cap_idle": MemoryConfig(window=2, persistent=5, top_k=0.3, rope_cap=18),
  "rope_cap_sinks_layer": MemoryConfig(window=2, persistent=6, sink_chunks=1, sharing="layer", rope_cap=4),
  "patches": MemoryConfig(window=2, persistent=5, top_k=0.3, rope_cap=7, route_parts=2),
  "patches_learned": MemoryConfig(window=3, persistent=4, top_k=0.3, importance="learned", route_parts=2),
  "novelty": MemoryConfig(window=2, persistent=5, top_k=0.3, novelty=4.0),
  "novelty_learned": MemoryConfig(window=3, persistent=6, top_k=0.3, importance="learned", novelty=4.0, rope_cap=7),
  "novelty_layer": MemoryConfig(window=2, persistent=5, importance="learned", sharing="layer", novelty=4.0),
  "window_one": MemoryConfig(window=1, persistent=5, top_k=0.5),
}
# An even number of blocks, full; an odd number of half-empty blocks: the padded one must never be read. And blocks that are cut
# without regard to tiles, the last of them short: 3 of 13 tokens and one of 9; 4 of 10, one of 5, and an empty one.
SHAPES = {
  "even": dict(latent_size=(8, 8), tile=(3, 2, 4)),
  "odd": dict(latent_size=(4, 6), tile=(1, 2, 3)),
  "packed": dict(latent_size=(8, 8), tile=(3, 2, 1), block_tokens=13),
  "packed odd": dict(latent_size=(6, 10), tile=(1, 1, 5), block_tokens=10),
}


def tiny(**kw):
  defaults = dict(
    dim=32, layers=3, heads=2, ffn_dim=48, text_dim=8, text_len=4, latent_channels=3, freq_dim=16,
    importance_head=True, dtype="float32",
  )  # fmt: skip
  return ModelConfig(**{**defaults, **kw})


def random_params(model, seed=0):
  """Every weight random, so that no path is silent (fresh heads are zero)."""
  rng = np.random.default_rng(seed)
  draw = lambda p: jnp.asarray(rng.normal(0, 1, p.shape) * (0.15 if p.ndim > 2 else 0.5), p.dtype)
  return jax.tree.map(draw, rollout.abstract_params(model))


start = jax.jit(rollout.start, static_argnums=(0, 1))


def cached_pass(model, cfg, params, text, clean, noisy, sigma):
  """Chunk by chunk: a denoising pass on the noisy latents, then the commit of the clean ones."""

  @jax.jit
  def one(m, x, s, x0):
    m = kv.per_layer(kv.begin_chunk, model, cfg, m)
    out, _, _ = rollout._forward(model, cfg, params, m, x, s, commit=False)
    return out, m, rollout.commit(model, cfg, params, m, x0)

  m = start(model, cfg, params, text)
  outs, persistent = [], []
  for t in range(noisy.shape[1]):
    out, begun, m = one(m, noisy[:, t], sigma[:, t], clean[:, t])
    outs.append(np.asarray(out))
    persistent.append(kv.stored_blocks(cfg, begun))
  return np.stack(outs, 1), np.stack(persistent, 2)


def of_shape(cfg, shape):
  """A tiny model of that shape, or of one that patches divide."""
  if cfg.route_parts > 1 and "packed" in shape:
    pytest.skip("patches want blocks that are tiles")
  return tiny(**SHAPES[shape] if cfg.route_parts == 1 or shape == "even" else dict(latent_size=(4, 4), tile=(1, 2, 2)))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", CONFIGS)
def test_cached_rollout_equals_one_parallel_forward(name, shape):
  cfg = CONFIGS[name]
  model = of_shape(cfg, shape)
  if "odd" in shape and name not in ("dense", "sparse_head", "learned_layer", "rope_cap", "patches", "novelty_learned"):
    pytest.skip("one config of each kind is enough for the odd grid")
  params = random_params(model)
  rng = np.random.default_rng(1)
  draw = lambda *s: jnp.asarray(rng.normal(size=s), jnp.float32)
  b, frame = 2, (*model.latent_size, model.latent_channels)
  clean, noisy = draw(b, CHUNKS, 3, *frame), draw(b, CHUNKS, 3, *frame)
  sigma = jnp.asarray(rng.uniform(0, 1, (b, CHUNKS, 3)), jnp.float32)
  text = draw(b, model.text_len, model.text_dim)

  out_c, persistent_c = cached_pass(model, cfg, params, text, clean, noisy, sigma)

  given = CHUNKS - (shape in ("even", "packed"))  # the last clean chunk may be absent
  m = start(model, cfg, params, text)
  chunk = jnp.concatenate([jnp.arange(given), jnp.arange(CHUNKS)])
  t = jnp.concatenate([jnp.zeros_like(sigma)[:, :given], sigma], 1) * 1000
  attend = parallel_attention(model, cfg, CHUNKS)
  out_p, _, plan = jax.jit(
    lambda x: rollout.apply(model, params, x, t, chunk, m.text_kv, attend, m.rng)
  )(jnp.concatenate([clean[:, :given], noisy], 1))  # fmt: skip

  np.testing.assert_array_equal(persistent_c, np.asarray(plan.persistent))
  out_p = out_p[:, given:]
  scale = float(jnp.abs(out_p).max())
  np.testing.assert_allclose(out_c, out_p, atol=2e-5 * scale, rtol=0)
  kept = persistent_c[persistent_c >= 0]
  if cfg.persistent:
    counts = (persistent_c[:, :, -1] >= 0).sum(-1)
    want = cfg.persistent_count(model.layout, CHUNKS - 1)
    assert (counts == want).all() and kept.size
    assert (kept % model.layout.blocks < model.layout.whole_blocks).all()


def test_rope_cap_acts_only_beyond_the_cap():
  model = tiny(**SHAPES["even"])
  params = random_params(model)
  rng = np.random.default_rng(2)
  x = jnp.asarray(rng.normal(size=(1, CHUNKS, 3, *model.latent_size, 3)), jnp.float32)
  text = jnp.asarray(rng.normal(size=(1, 4, 8)), jnp.float32)
  sigma = jnp.full((1, CHUNKS, 3), 0.5)
  base = MemoryConfig(window=2, persistent=5, top_k=0.3)
  outs = [
    cached_pass(model, dataclasses.replace(base, rope_cap=r), params, text, x, x + 1, sigma)[0] for r in (None, 18, 4)
  ]  # fmt: skip
  # Keys turned by zero are the same bits, but other programs may sum them in another order: float32 rounding.
  apart = lambda a, b: float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
  assert apart(outs[1], outs[0]) <= 2e-6 and apart(outs[2][:, :2], outs[0][:, :2]) <= 2e-6
  assert apart(outs[2][:, -1], outs[0][:, -1]) > 1e-3


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", ["dense", "sparse_head", "learned_layer", "rope_cap", "patches"])
def test_a_memory_written_in_place_is_the_same(name, shape):
  cfg = CONFIGS[name]
  model = of_shape(cfg, shape)
  params = random_params(model)
  rng = np.random.default_rng(3)
  x = jnp.asarray(rng.normal(size=(CHUNKS - 2, 2, 3, *model.latent_size, 3)), jnp.float32)
  text = jnp.asarray(rng.normal(size=(2, 4, 8)), jnp.float32)
  append = jax.jit(rollout.append_chunk, static_argnums=(0, 1), static_argnames="in_place")
  memories = []
  for in_place in (False, True):
    m = start(model, cfg, params, text)
    for x0 in x:
      m = append(model, cfg, params, m, x0, in_place=in_place)
    memories.append(m)
  np.testing.assert_array_equal(memories[0].origin, memories[1].origin)
  # Means are rounded to bfloat16, one in thousands the other way, and learned scores are made of them.
  for leaf, tolerance in (("k", 2e-6), ("v", 2e-6), ("pooled", 2**-8), ("score", 2**-8)):
    a, b = (np.asarray(getattr(m, leaf), np.float64) for m in memories)
    np.testing.assert_allclose(a, b, rtol=0, atol=tolerance * np.abs(a).max())
