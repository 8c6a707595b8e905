"""The memory's parts one by one: sizes, selection, routing, and what a block's slots hold."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sfjax import memory as kv
from sfjax import rollout
from sfjax.config import Config, load_config, to_dataclass
from sfjax.model import ModelConfig
from sfjax.routing import (
  MemoryConfig,
  block_content,
  block_mass,
  block_means,
  block_scores,
  capped_turn,
  eviction_scores,
  importance,
  pool_keys,
  pool_queries,
  redundancy,
  route_window,
  select_persistent,
  tile_means,
)
from sfjax.tiles import BlockLayout
from sfjax.wan import MEMORY
from tests.memory.test_equality import tiny

WAN = ModelConfig.wan_1_3b()
SPARSE = MEMORY["sparse"]
ODD = BlockLayout((3, 2, 3), (1, 2, 3))  # 3 blocks of 6 tokens, and an empty one
EVEN = BlockLayout((3, 4, 4), (3, 2, 2))  # 4 blocks of 12
PACKED = BlockLayout((3, 4, 4), (3, 2, 1), 13)  # 3 blocks of 13, and a short one of 9


def nbytes(*leaves):
  return sum(math.prod(x.shape) * x.dtype.itemsize for x in leaves)


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
  ("model", "cfg"),
  [
    (WAN, SPARSE),
    (WAN, dataclasses.replace(SPARSE, slots="float8")),
    (dataclasses.replace(WAN, tile=(3, 5, 4), block_tokens=0), SPARSE),
    (tiny(latent_size=(4, 6), tile=(1, 2, 3)), MemoryConfig(window=2, persistent=5, top_k=0.3)),
    (tiny(latent_size=(8, 8), tile=(3, 2, 4), dtype="bfloat16"), MemoryConfig(window=4)),
  ],
)
def test_memory_bytes_is_exact(model, cfg, batch):
  text = jax.ShapeDtypeStruct((batch, model.text_len, model.text_dim), jnp.float32)
  m = jax.eval_shape(lambda p, t: rollout.start(model, cfg, p, t), rollout.abstract_params(model), text)
  assert kv.memory_bytes(model, cfg, batch) == {
    "kv": nbytes(*jax.tree.leaves(kv.slots_of(m)), m.pooled),
    "cross": nbytes(m.cross_k, m.cross_v),
    "bookkeeping": nbytes(m.score, m.origin, m.chunk, m.rng, m.cross_distinct),
  }
  assert sum(kv.memory_bytes(model, cfg, batch).values()) == nbytes(*jax.tree.leaves(m))


def test_float8_slots_take_half_of_16_bit():
  half, whole = (kv.memory_bytes(WAN, dataclasses.replace(SPARSE, slots=s)) for s in ("float8", "model"))
  slots, scales = 2 * 30 * 278 * 64 * 1536, 2 * 30 * 278 * 12 * 4
  assert whole["kv"] - half["kv"] == slots - scales == 1_638_910_080


def test_default_memory_of_1_3b_is_45_percent_below_dense():
  assert SPARSE.resident_blocks(WAN.layout) == 278 and SPARSE.full_k(WAN.layout) == 56
  m = jax.eval_shape(
    lambda t: kv.init_memory(WAN, SPARSE, (t, t, t[..., 0, 0, 0])), jnp.zeros((30, 1, 1, 12, 128), jnp.bfloat16)
  )
  assert m.k.shape[2] == 17_792
  kept = kv.memory_bytes(WAN, SPARSE)["kv"]
  assert kept <= 0.55 * kv.memory_bytes(WAN, MemoryConfig(window=7))["kv"]
  assert kept <= 0.55 * 2 * 2 * 30 * 32_760 * 1536  # 21 frames without tiles or pooled keys: Self-Forcing's 6.04 GB


def test_digits_memory_is_42_percent_below_dense():
  config = to_dataclass(Config, load_config("configs/digits.py"))
  sparse, dense = (kv.memory_bytes(config.model, m)["kv"] for m in (config.memory, MemoryConfig(window=7)))
  assert sparse <= 0.58 * dense


def kept_by_hand(cfg, layout, score, origin):
  """The rule of design.md section 5, one head at a time."""
  size = len(origin[0])
  out = []
  for n in range(len(origin)):
    ranked = []
    for i in range(size):
      s = sum(row[i] for row in score) if cfg.sharing == "layer" else score[n][i]
      if origin[n][i] >= 0:
        ranked.append((-math.inf if origin[n][i] < cfg.sink_chunks * layout.blocks else -s, i))
    best = sorted(i for _, i in sorted(ranked)[: cfg.persistent])
    out.append(best + [size] * (cfg.persistent - len(best)))
  return out


@st.composite
def candidates(draw):
  """C = 5 slots of P, then the evicted chunk's 4 tiles, ascending; few distinct scores, so that ties abound."""
  heads, sharing = 2, draw(st.sampled_from(["head", "layer"]))
  p = st.lists(st.integers(0, 15), max_size=5, unique=True).map(sorted)
  sets = [draw(p)] * heads if sharing == "layer" else [draw(p) for _ in range(heads)]
  tiles = draw(st.sampled_from([[16, 17, 18, 19], [16, 17, 18, -1], [-1] * 4]))
  origin = [old + [-1] * (5 - len(old)) + tiles for old in sets]
  score = [[float(draw(st.integers(0, 3))) for _ in range(9)] for _ in range(heads)]
  cfg = MemoryConfig(window=2, persistent=5, sharing=sharing, sink_chunks=draw(st.integers(0, 2)))
  return cfg, score, origin


SELECT = jax.jit(select_persistent, static_argnums=(0, 1))


@settings(max_examples=150, deadline=None)
@given(candidates())
def test_select_persistent_follows_the_rule(case):
  cfg, score, origin = case
  got = SELECT(cfg, ODD, jnp.asarray([score]), jnp.asarray([origin]))
  assert got[0].tolist() == kept_by_hand(cfg, ODD, score, origin)


def test_a_row_of_the_batch_selects_for_itself():
  rng = np.random.default_rng(0)
  score = rng.normal(size=(3, 2, 9)).astype(np.float32)
  origin = np.broadcast_to(np.arange(9), score.shape)
  cfg = MemoryConfig(window=2, persistent=4, sharing="layer")
  whole = SELECT(cfg, ODD, score, origin)
  for b in range(3):
    np.testing.assert_array_equal(whole[b], SELECT(cfg, ODD, score[b : b + 1], origin[b : b + 1])[0])
  assert len({row.tobytes() for row in np.asarray(whole)}) > 1


@pytest.mark.parametrize("sharing", ["head", "layer"])
@pytest.mark.parametrize("sinks", [0, 2])
def test_a_short_block_never_stays(sharing, sinks):
  cfg = MemoryConfig(window=2, persistent=5, sharing=sharing, sink_chunks=sinks)
  origin = jnp.asarray([[[0, 1, 2, -1, -1, 4, 5, 6, 7]] * 2])  # 7 is short, and ranks first
  score = jnp.asarray([[[1.0, 2, 3, 9, 9, 4, 5, 6, 99]] * 2])
  kept = [0, 1, 2, 5, 6] if sinks else [1, 2, 5, 6, 7]  # of equals the oldest
  assert SELECT(cfg, PACKED, score, origin)[0].tolist() == [kept] * 2
  assert [cfg.persistent_count(PACKED, t) for t in range(5)] == [0, 0, 3, 5, 5]
  few = dataclasses.replace(cfg, persistent=9)
  assert SELECT(few, PACKED, score, origin)[0].tolist() == [[0, 1, 2, 5, 6, 7, 9, 9, 9]] * 2


ROUTE = jax.jit(route_window, static_argnums=(0, 1))
ROUTES = {
  "sparse": MemoryConfig(window=3, top_k=0.4),
  "with_p": MemoryConfig(window=3, persistent=5, top_k=0.4),
  "own_only": MemoryConfig(window=3, top_k=0.01),
  "whole": MemoryConfig(window=3),
}


@pytest.mark.parametrize("layout", [EVEN, ODD, PACKED], ids=["even", "odd", "packed"])
@pytest.mark.parametrize("name", ROUTES)
def test_route_window_lists_own_blocks_then_the_best(name, layout):
  cfg, nb, rng = ROUTES[name], layout.blocks, np.random.default_rng(1)
  x, heads = cfg.window * nb, 2
  for chunk in range(5):
    valid = np.tile(np.arange(nb) < layout.full_blocks, cfg.window) & (np.arange(x) >= (cfg.window - 1 - chunk) * nb)
    # Small whole numbers: products are exact and ties abound.
    q = jnp.asarray(rng.integers(-1, 2, (2, nb // 2, heads, 4)), jnp.bfloat16)
    k = jnp.asarray(rng.integers(-1, 2, (2, x, heads, 4)), jnp.bfloat16)
    s = np.asarray(block_scores(q, k))
    full = max(2, math.ceil(cfg.top_k * cfg.window * layout.full_blocks - 1e-9))
    evicted = max(0, chunk - cfg.window + 1) * layout.whole_blocks
    budget = full + cfg.persistent - min(cfg.persistent, evicted)  # P's room goes to the window until P is full
    for ring in range(0, x, nb):  # where in the array the oldest chunk lies
      keys, there = np.roll(k, ring, 1), np.roll(valid, ring)
      ids, counts = ROUTE(cfg, layout, q[:, :, None], keys[:, :, None], there, jnp.int32(chunk), (ring - nb) % x)
      for b, n, t in np.ndindex(2, heads, nb // 2):
        own = [x - nb + 2 * t, x - nb + 2 * t + 1]
        order = sorted(np.flatnonzero(valid).tolist(), key=lambda i: (i not in own, -s[b, n, t, i], i))
        want = sorted((i + ring) % x for i in order[:budget])
        assert ids[b, n, t, : len(want)].tolist() == want and int(counts[b, n, t]) == len(want)
        assert (np.asarray(ids[b, n, t, len(want) :]) == x).all()
        assert set(own) & set(np.flatnonzero(valid)) <= set(order[:budget])


def test_pooled_vectors_are_means_of_valid_rows():
  rng = np.random.default_rng(2)
  for layout in (EVEN, ODD, PACKED):
    rows = rng.normal(size=(2, layout.tokens, 3, 8)).astype(np.float32)
    slots = layout.pack(jnp.asarray(rows))
    own = lambda i, n=1: rows[:, i * layout.valid : (i + n) * layout.valid].astype(np.float64).mean(1)  # noqa: B023
    got = np.asarray(pool_keys(slots, layout), np.float64)[:, : layout.full_blocks, 0]
    want = np.stack([own(i) for i in range(layout.full_blocks)], 1)
    np.testing.assert_allclose(got, want, atol=2**-8)  # |mean| < 2, bfloat16 keeps 8 bits
    tiles = np.asarray(pool_queries(slots, layout), np.float64)[:, :, 0]
    for t in range(layout.blocks // 2):
      np.testing.assert_allclose(tiles[:, t], own(2 * t, 2), atol=2**-8)
    kept = rng.normal(size=(2, 5 * 64, 3, 8)).astype(np.float32)  # whole blocks, before two chunks
    kept = kept * np.tile(np.arange(64) < layout.valid, 5)[:, None, None]
    means = np.asarray(pool_keys(jnp.concatenate([kept, slots, slots], 1), layout, kept=5), np.float64)[:, :, 0]
    want = kept.reshape(2, 5, 64, 3, 8).sum(2) / layout.valid
    np.testing.assert_allclose(means[:, :5], want, atol=2**-8)
    np.testing.assert_array_equal(means[:, -layout.blocks :][:, : layout.full_blocks], got)


def test_patches_are_means_of_their_tokens_and_blocks_of_their_patches():
  rng, (layout, odd) = np.random.default_rng(5), (BlockLayout((3, 4, 8), (3, 4, 4)), BlockLayout((3, 2, 2), (1, 2, 2)))
  grid = rng.normal(size=(2, *layout.grid, 3, 8)).astype(np.float32)
  slots = layout.pack(jnp.asarray(grid.reshape(2, -1, 3, 8)[:, layout.order]))
  got = np.asarray(pool_keys(slots, layout, 2), np.float64)
  for block in range(2):
    for row in range(2):
      for column in range(2):
        x = 4 * block + 2 * column
        want = grid[:, :, 2 * row : 2 * row + 2, x : x + 2].astype(np.float64).mean((1, 2, 3))
        np.testing.assert_allclose(got[:, block, 2 * row + column], want, atol=2**-8)
  np.testing.assert_array_equal(got.reshape(2, 1, 8, 3, 8), np.asarray(pool_queries(slots, layout, 2), np.float64))
  for each in (layout, odd):  # two roundings to bfloat16 of values below 2
    rows = jnp.asarray(rng.normal(size=(2, each.tokens, 3, 8)), jnp.float32)
    fine, whole = (pool_queries(each.pack(rows), each, parts) for parts in (2, 1))
    np.testing.assert_allclose(*(np.asarray(tile_means(each, x), np.float64) for x in (fine, whole)), atol=2**-7)
    fine, whole = (pool_keys(each.pack(rows), each, parts) for parts in (2, 1))
    np.testing.assert_allclose(*(np.asarray(block_means(x), np.float64) for x in (fine, whole)), atol=2**-7)
  with pytest.raises(ValueError, match=r"route_parts: 3 does not divide .* \(3, 4, 4\)"):
    pool_keys(slots, layout, 3)
  with pytest.raises(ValueError, match="route_parts: 2; want 1 where blocks are not tiles"):
    pool_keys(slots, BlockLayout((3, 4, 8), (3, 4, 4), 48), 2)


def test_mass_is_the_attention_between_patches():
  rng, layout = np.random.default_rng(6), BlockLayout((3, 2, 2), (1, 2, 2))  # 3 blocks and an empty one
  q = rng.normal(size=(2, 2, 8, 3, 16)) * 2
  k = rng.normal(size=(2, 8, 4, 3, 16)) * 2
  valid = np.array([0, 0, 0, 0, 1, 1, 1, 0], bool)
  q, k = (np.asarray(jnp.asarray(x, jnp.bfloat16), np.float64) for x in (q, k))
  got = block_mass(layout, *(jnp.asarray(x, jnp.bfloat16) for x in (q, k)), jnp.asarray(valid))
  s = np.einsum("bqinh,bxjnh->bnqixj", q, k) / 4
  p = np.exp(s) * valid[:, None]
  p /= p.sum((-2, -1), keepdims=True)
  p[:, :, 1, 4:] = 0  # the last tile's second block holds no tokens
  np.testing.assert_allclose(np.exp(np.asarray(got, np.float64)), p.sum((3, 5)), rtol=2e-5)


def test_importance_is_the_sum_of_softmaxes_and_decays():
  rng = np.random.default_rng(3)
  q, k = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in ((1, 2, 2, 8), (1, 9, 2, 8)))
  valid = jnp.asarray(np.arange(9) != 2)[None, None].repeat(2, 1)
  old = jnp.asarray(rng.uniform(size=(1, 2, 9)), jnp.float32)
  own = jnp.asarray(rng.normal(size=(1, 4, 2, 8)), jnp.bfloat16)
  head = lambda x: jnp.log(x.astype(jnp.float32).mean(-1) ** 2 + 1).swapaxes(1, 2)

  def score(**kw):
    cfg = MemoryConfig(window=2, persistent=1, **kw)
    return np.asarray(importance(cfg, ODD, head, own, q, k, valid, old, jnp.int32(4), None))

  s = np.exp(np.einsum("bqnh,brnh->bnqr", *(np.asarray(a, np.float64) for a in (q, k))) / np.sqrt(8))
  s[..., 2] = 0  # an empty block takes no part
  want = (s / s.sum(-1, keepdims=True)).sum(2)
  np.testing.assert_allclose(score(), want, rtol=1e-5)  # fp32: logits below 8 are good to 5e-7, 18 of them are summed
  decayed = want + 0.5 * np.where(np.arange(9) < 5, old, 0)  # the chunk's own 4 blocks have no old score
  np.testing.assert_allclose(score(score_decay=0.5), decayed, rtol=1e-5)
  learned = score(importance="learned")
  np.testing.assert_array_equal(learned[..., :5], old[..., :5])  # scored once, at their own commit
  np.testing.assert_allclose(learned[..., 5:], np.exp(head(own)), rtol=1e-6)


def test_a_row_draws_its_random_importance_by_its_own_key():
  cfg, keys = MemoryConfig(window=2, persistent=1, importance="random"), kv.row_keys(3, 2)
  valid, chunk = jnp.ones((2, 2, 9), bool), jnp.int32(4)
  draw = lambda rows, chunk: np.asarray(
    importance(cfg, ODD, None, None, None, None, valid[rows], None, chunk, keys[rows])
  )
  both = draw(slice(2), chunk)
  np.testing.assert_array_equal(both[1:], draw(slice(1, 2), chunk))
  assert len(np.unique([*both.flat, *draw(slice(2), chunk + 1).flat])) == 2 * both.size


def test_redundancy_is_the_cosine_to_what_came_later():
  rng = np.random.default_rng(8)
  origin = np.array([[[0, 2, 5, -1, 8, 9, 10, 11], [1, 2, 6, 7, 8, 9, 10, -1]]] * 2)  # chunks of 4 blocks
  content = np.asarray(jnp.asarray(rng.normal(size=(2, 8, 2, 16)), jnp.bfloat16), np.float64)
  content[0, 6, 0] = content[0, 1, 0]  # seen again in chunk 2
  got = np.asarray(redundancy(ODD, jnp.asarray(content, jnp.bfloat16), jnp.asarray(origin), 5))
  want = np.zeros((2, 2, 5))
  for b, n in np.ndindex(2, 2):
    there = origin[b, n] >= 0
    x = content[b, :, n] - content[b, there, n].mean(0)
    x /= np.linalg.norm(x, axis=-1, keepdims=True)
    for e in range(5):
      later = there & (origin[b, n] // 4 > origin[b, n, e] // 4)
      want[b, n, e] = max([0, *(x[later] @ x[e])]) if there[e] else 0
  np.testing.assert_allclose(got, want, atol=1e-5)
  assert got[0, 0, 1] > 0.999 and (got[:, :, 4] == 0).all()  # nothing is later than the newest chunk


@pytest.mark.parametrize("sharing", ["head", "layer"])
def test_novelty_lowers_the_score_of_what_is_repeated(sharing):
  cfg = MemoryConfig(window=1, persistent=4, sharing=sharing, novelty=3.0)
  rng = np.random.default_rng(9)
  origin = jnp.asarray(np.broadcast_to([0, 1, 4, -1, 8, 9, 10, -1], (1, 2, 8)))
  content = jnp.asarray(rng.normal(size=(1, 8, 2, 16)), jnp.bfloat16).at[0, 4].set(0.5).at[0, 2].set(0.5)
  score = jnp.asarray(rng.uniform(0.5, 1, size=(1, 2, 8)), jnp.float32)
  got = np.asarray(eviction_scores(cfg, ODD, score, origin, content))
  together = content.reshape(1, 8, 1, 32)  # heads that share P are compared as one
  r = redundancy(ODD, together, origin[:, :1], 8) if sharing == "layer" else redundancy(ODD, content, origin, 8)
  np.testing.assert_allclose(got, score * np.exp(-3.0 * np.broadcast_to(r, score.shape)), rtol=1e-6)
  assert (got[:, :, 2] < 0.06 * score[:, :, 2]).all()  # e^-3 of it is left
  plain = eviction_scores(dataclasses.replace(cfg, novelty=0.0), ODD, score, origin, content)
  np.testing.assert_array_equal(plain, score)


def test_content_is_the_mean_of_valid_values():
  v = np.random.default_rng(10).normal(size=(2, ODD.slots, 3, 16)).astype(np.float32)
  want = v.reshape(2, ODD.blocks, 64, 3, 16)[:, :, : ODD.valid].mean(2)
  got = np.asarray(block_content(jnp.asarray(v), ODD), np.float32)
  np.testing.assert_allclose(got, want, rtol=2**-8, atol=1e-6)  # bfloat16 rounds to 2^-9


def test_capped_turn_never_lets_a_block_look_older():
  age = jnp.arange(30)
  cap = MemoryConfig(window=2, persistent=4, rope_cap=7)
  assert (age - capped_turn(cap, age)).tolist() == np.minimum(age, 7).tolist()
  assert not capped_turn(dataclasses.replace(cap, rope_cap=None), age).any()


GRID, PACKED_GRID = dict(latent_size=(4, 6), tile=(1, 2, 3)), dict(latent_size=(8, 8), tile=(3, 2, 1), block_tokens=13)


@pytest.mark.parametrize(
  ("cfg", "grid"),
  [
    (MemoryConfig(window=2, persistent=5, top_k=0.5), GRID),
    (MemoryConfig(window=3, persistent=9, sharing="layer"), GRID),
    (MemoryConfig(window=1, persistent=3, sink_chunks=1), GRID),
    (MemoryConfig(window=2, persistent=5, top_k=0.5, route_parts=2), dict(latent_size=(4, 4), tile=(1, 2, 2))),
    (MemoryConfig(window=2, persistent=5, top_k=0.5), PACKED_GRID),
    (MemoryConfig(window=1, persistent=3, sink_chunks=1), PACKED_GRID),
  ],
  ids=["head", "layer", "sinks", "patches", "packed", "packed sinks"],
)
def test_a_long_rollout_of_random_scores(cfg, grid):
  """A dropped block never returns; P is the best of P and the evicted; the slots hold what the bookkeeping says."""
  model = tiny(**grid, layers=1)
  layout, heads, chunks = model.layout, model.heads, 40
  nb, c, rng = layout.blocks, cfg.persistent, np.random.default_rng(4)
  text = jnp.zeros((1, 1, model.text_len, heads, model.head_dim))
  m = jax.tree.map(lambda x: x[0], kv.init_memory(model, cfg, (text, text, jnp.ones(text.shape[:2], jnp.int32))))

  @jax.jit
  def one(m, score):
    begun = kv.begin_chunk(model, cfg, m)
    block = jnp.arange(model.layout.tokens) // layout.valid
    rows = jnp.broadcast_to(
      (m.chunk * nb + block)[None, :, None, None] + 1.0, (1, layout.tokens, heads, model.head_dim)
    )
    slots = layout.pack(rows)  # every key and value is its block's origin + 1
    return begun, kv.commit_chunk(
      model, cfg, begun, kv.Commit(slots, -slots, pool_keys(slots, layout, cfg.route_parts), score)
    )

  seen, last, given = [set() for _ in range(heads)], [set() for _ in range(heads)], {}
  for t in range(chunks):
    score = rng.normal(size=(1, heads, cfg.resident_blocks(layout))).astype(np.float32)
    begun, m = one(m, score)
    origin = np.asarray(begun.origin[0])
    for n in range(heads):
      p = origin[n, :c][origin[n, :c] >= 0].tolist()
      assert p == sorted(set(p)) and len(p) == cfg.persistent_count(layout, t)
      evicted = {(t - cfg.window) * nb + i for i in range(layout.whole_blocks)} if t >= cfg.window else set()
      assert set(p) <= last[n] | evicted
      assert not set(p) & (seen[n] - last[n])
      if cfg.sink_chunks and t > cfg.window:
        assert set(p) == set(range(layout.whole_blocks))
      elif given:
        value = lambda i: sum(given[h][i] for h in range(heads)) if cfg.sharing == "layer" else given[n][i]  # noqa: B023
        assert set(p) == set(sorted(last[n] | evicted, key=value, reverse=True)[:c])
      seen[n] |= set(p) | evicted
      last[n] = set(p)
    if cfg.sharing == "layer":
      assert (origin[:, :c] == origin[0, :c]).all()
    # Keys, values and pooled keys of every head are those of the blocks named; padding and empty slots are zero.
    origin = np.asarray(m.origin[0])
    want = np.where(origin >= 0, origin + 1, 0).T  # [K,N]
    k, v = (np.asarray(x[0]).reshape(-1, 64, heads, model.head_dim) for x in (m.k, m.v))
    held = np.arange(64) < np.append([layout.valid] * c, np.tile(layout.sizes, cfg.window))[:, None]
    np.testing.assert_array_equal(k, np.broadcast_to((want[:, None] * held[..., None])[..., None], k.shape))
    assert (k == -v).all()
    pooled = np.asarray(m.pooled[0, :, :, :, 0], np.float32)  # [K,A,N]
    np.testing.assert_array_equal(pooled, np.broadcast_to(want.astype(jnp.bfloat16)[:, None], pooled.shape))
    view = np.asarray(m.origin[0])[0][np.asarray(kv._resident(model, cfg, t))[c:]]
    assert view[view >= 0].tolist() == sorted(view[view >= 0].tolist())  # oldest chunk first
    order = np.asarray(kv._resident(model, cfg, t))
    given = [
      {int(o): float(s) for o, s in zip(origin[n][order], score[0, n], strict=True) if o >= 0} for n in range(heads)
    ]
  assert len(seen[0]) == (chunks - cfg.window) * layout.whole_blocks  # everything was a candidate once
