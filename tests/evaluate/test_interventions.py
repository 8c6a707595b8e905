"""P taken away or swapped: exactly P, and nothing else; and how much of P holds a digit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import memory as kv
from sfjax.evaluation.interventions import (
  persistent_shares,
  swap_persistent,
  tiles_with_digit,
  without_persistent,
)
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig

MODEL = ModelConfig.digits(dim=64, layers=2, heads=2, ffn_dim=64, dtype="float32")
CFG = MemoryConfig(window=2, persistent=4, top_k=0.5, rope_cap=6)
BLOCK = 64


@pytest.fixture(scope="module", params=["model", "float8"])
def memory(request):
  rng = np.random.default_rng(0)
  text = jnp.zeros((2, 4, 3, 2, 32))
  m = kv.init_memory(
    MODEL, dataclasses.replace(CFG, slots=request.param), (text, text, jnp.ones(text.shape[:2], jnp.int32))
  )
  draw = lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype)
  origin = jnp.asarray(rng.integers(0, 16, m.origin.shape), jnp.int32)
  slots = jax.tree.map(draw, kv.slots_of(m))
  return m.replace(**slots, pooled=draw(m.pooled), score=draw(m.score), origin=origin, chunk=m.chunk + 5)


def test_emptying_leaves_the_window_and_what_it_reads(memory):
  cfg, emptied = without_persistent(
    dataclasses.replace(CFG, slots="model" if memory.k_scale is None else "float8"), memory
  )
  fresh = kv.init_memory(MODEL, cfg, memory.text_kv)
  assert jax.tree.map(jnp.shape, emptied) == jax.tree.map(jnp.shape, fresh)
  np.testing.assert_array_equal(emptied.k, memory.k[:, :, CFG.persistent * BLOCK :])
  np.testing.assert_array_equal(emptied.origin, memory.origin[..., CFG.persistent :])
  layer = lambda m: jax.tree.map(lambda x: x[0], m)
  q = jnp.asarray(np.random.default_rng(1).normal(size=(4, 8, 1, 2, 32)), jnp.bfloat16)
  ids, counts = kv.route(MODEL, CFG, layer(memory), q)
  ids_after, counts_after = kv.route(MODEL, cfg, layer(emptied), q)
  np.testing.assert_array_equal(counts, counts_after)
  for i in np.ndindex(counts.shape):
    np.testing.assert_array_equal(ids[i][: counts[i]] - CFG.persistent, ids_after[i][: counts[i]])


def test_swapping_exchanges_p_between_neighbours_only(memory):
  swapped = swap_persistent(CFG, memory)
  part = np.s_[:, :, : CFG.persistent * BLOCK]
  np.testing.assert_array_equal(swapped.v[part], memory.v[part][:, [1, 0, 3, 2]])
  np.testing.assert_array_equal(swapped.v[:, :, CFG.persistent * BLOCK :], memory.v[:, :, CFG.persistent * BLOCK :])
  assert not np.array_equal(swapped.origin, memory.origin)
  jax.tree.map(np.testing.assert_array_equal, swap_persistent(CFG, swapped), memory)
  with pytest.raises(ValueError, match="even"):
    swap_persistent(CFG, memory.replace(k=memory.k[:, :3]))


def test_tiles_with_a_digit():
  boxes = np.tile([17.0, 33.0, 31.0, 47.0], (21, 1))  # inside the tile of row 2, column 1
  seen = np.ones(21)
  seen[9:] = 0.2
  held = tiles_with_digit(MODEL, boxes, seen)
  assert held.shape == (2, MODEL.layout.blocks) and held[0].sum() == 1 and not held[1].any()
  tile = int(np.flatnonzero(held[0])[0])
  tokens = MODEL.layout.positions.reshape(MODEL.layout.full_blocks, -1, 3)[tile]
  assert tokens[:, 1].min() * 4 == 32 and tokens[:, 2].min() * 4 == 16
  straddling = tiles_with_digit(MODEL, boxes + 8, np.ones(21))
  assert straddling.sum(1).tolist() == [4, 4]


def test_blocks_with_a_digit_where_they_are_not_tiles():
  model = dataclasses.replace(MODEL, tile=(3, 4, 1), block_tokens=50)  # 768 tokens: 15 blocks and a short one of 18
  held = tiles_with_digit(model, np.tile([17.0, 33.0, 31.0, 47.0], (21, 1)), np.ones(21))
  assert held.shape == (2, 16) and (held[0] == held[1]).all()
  for block in np.flatnonzero(held[0]):
    tokens = model.layout.positions[50 * block : 50 * block + 50] * 4
    assert ((tokens[:, 1] >= 32) & (tokens[:, 1] < 48)).any() and ((tokens[:, 2] >= 16) & (tokens[:, 2] < 32)).any()
  assert 1 <= held[0].sum() <= 3


def test_shares_of_p():
  nb = MODEL.layout.blocks
  holding = np.zeros((1, 4, nb), bool)
  holding[0, 1, :4] = True
  origins = np.array([[[[nb, nb + 1, 5, -1], [0, 1, 2, 3]]]])  # one layer, one video, two heads
  shares = persistent_shares(CFG, origins, holding, MODEL.layout.full_blocks)
  assert shares["P holds it"] == [2 / 7] and shares["some of P"] == [0.5]
  assert shares["by chance"] == [4 / (2 * MODEL.layout.full_blocks)]  # chunks 2 and 3 are in the window
