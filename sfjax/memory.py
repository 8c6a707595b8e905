"""The memory: one functional pytree of persistent blocks and a ring of recent chunks, the same for sampling and training.

A layer holds C persistent blocks, then the window's W chunks (chunk t in ring slot t mod W). Every leaf leads with the layer
axis; the functions below take one layer's slice, so `jax.vmap` or a scan over layers applies them. A snapshot is the pytree.

Slots may be float8 (`MemoryConfig.slots`), a scale for each block and head beside them. Attention reads them widened, a layer
at a time (`opened`), the chunk's own as they were made; they are rounded when the chunk is committed (`closed`).

Letters: L layers, B batch, N heads, H head dim, S slots, K = S / 64 blocks, R = K resident blocks, M text rows,
A and I pooled vectors of a block and of a query tile.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.sharding import PartitionSpec
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.pbsa import BLOCK
from pallas_kernels.slots import to_slots
from sfjax.axes import count_of_heads
from sfjax.float8 import E4M3, scale_of
from sfjax.model import ModelConfig
from sfjax.rope import turn_forward
from sfjax.routing import (
  MemoryConfig,
  block_content,
  block_means,
  capped_turn,
  eviction_scores,
  importance,
  pool_keys,
  pooled_keys,
  pooled_queries,
  route_window,
  select_persistent,
  tile_means,
)


@struct.dataclass
class KVMemory:
  """Keys, values and bookkeeping of every layer.

  Attributes:
    k, v: slots, persistent blocks first; keys are stored rotated at their own frame.
    pooled: mean keys of a block's patches, bfloat16. score: importance.
    origin: chunk * nb + tile a block came from, -1 when empty.
    chunk: the chunk to be generated next (or being generated). rng: key data of each row, for "random" importance.
    cross_k, cross_v, cross_distinct: of the prompt, see `DiT.text_kv`.
    k_scale, v_scale: of float8 slots, see `narrow`; else None.
  """

  k: Float[Array, "*L B S N H"]
  v: Float[Array, "*L B S N H"]
  pooled: Float[Array, "*L B K A N H"]
  score: Float[Array, "*L B N K"]
  origin: Int32[Array, "*L B N K"]
  chunk: Int32[Array, "*L"]
  rng: Array  # [*L,B,2]
  cross_k: Float[Array, "*L B M N H"]
  cross_v: Float[Array, "*L B M N H"]
  cross_distinct: Int32[Array, "*L B"]
  k_scale: Float[Array, "*L B K N"] | None = None
  v_scale: Float[Array, "*L B K N"] | None = None

  @property
  def text_kv(self) -> tuple[Array, Array, Array]:
    return self.cross_k, self.cross_v, self.cross_distinct

  def with_text(self, text_kv: tuple[Array, Array, Array]) -> "KVMemory":
    """The same memory under another prompt."""
    k, v, distinct = text_kv
    return self.replace(cross_k=k, cross_v=v, cross_distinct=distinct)


def split(axis: str) -> KVMemory:
  """How the memory of all layers is split along a mesh's axis: a device has its heads', along "tokens" all of a prompt's."""
  slots = PartitionSpec(None, None, None, axis)
  prompt = PartitionSpec() if axis == "tokens" else slots
  return KVMemory(
    k=slots,
    v=slots,
    pooled=PartitionSpec(None, None, None, None, axis),
    score=PartitionSpec(None, None, axis),
    origin=PartitionSpec(None, None, axis),
    chunk=PartitionSpec(),
    rng=PartitionSpec(),
    cross_k=prompt,
    cross_v=prompt,
    cross_distinct=PartitionSpec(),
    k_scale=slots,
    v_scale=slots,
  )


class Commit(NamedTuple):
  """What a layer's committing pass hands to `commit_chunk`; k and v are None where the memory holds them already."""

  k: Float[Array, "*L B Sc N H"] | None
  v: Float[Array, "*L B Sc N H"] | None
  pooled: Float[Array, "*L B nb A N H"]
  score: Float[Array, "*L B N R"]


def row_keys(seed: int, rows: int) -> Array:
  """Keys of a memory's rows."""
  key = jax.random.key(seed, impl="threefry2x32")
  return jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(rows))


def layer_rng(keys: Array, layers: int) -> Array:
  """`KVMemory.rng` [L,B,2] of so many layers from a key for each row; "random" importance alone draws from it."""
  return jnp.moveaxis(jax.vmap(lambda key: jax.random.key_data(jax.random.split(key, layers)))(keys), 1, 0)


def init_memory(
  model: ModelConfig, cfg: MemoryConfig, text_kv: tuple[Array, Array, Array], keys: Array | None = None
) -> KVMemory:
  """An empty memory for the batch of prompts whose `DiT.text_kv` is given. keys: of its rows; by default those of seed 0."""
  layers, batch, _, heads, dim = text_kv[0].shape
  heads = count_of_heads(heads)
  blocks = cfg.resident_blocks(model.layout)
  float8 = cfg.slots == "float8"
  slots = jnp.zeros((layers, batch, blocks * BLOCK, heads, dim), E4M3 if float8 else jnp.dtype(model.dtype))
  scale = jnp.zeros((layers, batch, blocks, heads), jnp.float32) if float8 else None
  keys = row_keys(0, batch) if keys is None else keys
  return KVMemory(
    k=slots,
    v=slots,
    pooled=jnp.zeros((layers, batch, blocks, cfg.route_parts**2, heads, dim), jnp.bfloat16),
    score=jnp.zeros((layers, batch, heads, blocks), jnp.float32),
    origin=jnp.full((layers, batch, heads, blocks), -1, jnp.int32),
    chunk=jnp.zeros((layers,), jnp.int32),
    rng=layer_rng(keys, layers),
    cross_k=text_kv[0],
    cross_v=text_kv[1],
    cross_distinct=text_kv[2],
    k_scale=scale,
    v_scale=scale,
  )


def memory_bytes(model: ModelConfig, cfg: MemoryConfig, batch: int = 1) -> dict[str, int]:
  """Exact sizes, in bytes: "kv" is slots, their scales and pooled keys; "cross" the prompt's K/V; "bookkeeping" the rest."""
  blocks = cfg.resident_blocks(model.layout)
  width = model.layers * batch * model.heads * model.head_dim
  size, float8 = jnp.dtype(model.dtype).itemsize, cfg.slots == "float8"
  block = BLOCK * model.head_dim * (1 if float8 else size) + (4 if float8 else 0)  # a head's K, or V, and its scale
  return {
    "kv": 2 * model.layers * batch * model.heads * blocks * block + width * blocks * cfg.route_parts**2 * 2,
    "cross": 2 * width * model.text_len * size,
    "bookkeeping": model.layers * (batch * (model.heads * blocks * 8 + 4 + 8) + 4),
  }


def held_bytes(m: KVMemory) -> int:
  """What `memory_bytes` predicts as "kv", measured."""
  return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves((slots_of(m), m.pooled)))


def slots_of(m: KVMemory) -> dict[str, Array | None]:
  """The memory's slots, and their scales if they are float8, by the names of its attributes."""
  return {name: getattr(m, name) for name in ("k", "v", "k_scale", "v_scale")}


def narrow(x: Float[Array, "*B S N H"]) -> tuple[Float[Array, "*B S N H"], Float[Array, "*B K N"]]:
  """Slots rounded to float8_e4m3fn, and what each block and head was divided by.

  That is a power of two, so that all that errs is the rounding: each element by at most 2^-4 of itself, or 2^-17 of its block's
  largest, if that is more.
  """
  blocks = x.reshape(*x.shape[:-3], -1, BLOCK, *x.shape[-2:]).astype(jnp.float32)
  scale = scale_of(jnp.abs(blocks).max((-3, -1)))
  return (blocks / scale[..., None, :, None]).astype(E4M3).reshape(x.shape), scale


def widen(model: ModelConfig, x: Float[Array, "*B S N H"], scale: Float[Array, "*B K N"] | None):
  """Slots in the model's dtype, as attention reads them; exact. Without a scale they are that already."""
  if scale is None:
    return x
  blocks = x.reshape(*scale.shape[:-1], BLOCK, *x.shape[-2:]).astype(jnp.float32)
  return (blocks * scale[..., None, :, None]).astype(jnp.dtype(model.dtype)).reshape(x.shape)


def opened(model: ModelConfig, m: KVMemory, layer: Int32[Array, ""], prefix_k: Float[Array, "L B CS N H"] | None):
  """What a layer's pass reads and writes, of a memory with the slots of all layers and of `persistent_keys` of all.

  Slots in the model's dtype are there as they are; of float8 ones the layer's alone, widened, P's keys turned already.

  Returns:
    m, the layer's place among its slots, and prefix_k as `pbsa` wants it with them.
  """
  if m.k_scale is None:
    return m, layer, prefix_k
  at = lambda x: jax.lax.dynamic_index_in_dim(x, layer, 0)
  k, v = (widen(model, at(x), at(scale)) for x, scale in ((m.k, m.k_scale), (m.v, m.v_scale)))
  if prefix_k is not None:
    k = jnp.concatenate([at(prefix_k), k[:, :, prefix_k.shape[2] :]], 2)
  return m.replace(k=k, v=v, k_scale=None, v_scale=None), jnp.int32(0), None


def closed(model: ModelConfig, cfg: MemoryConfig, slots: dict, m: KVMemory, layer, commit: bool) -> dict:
  """The slots of all layers after a layer's pass over m, `opened` from them; float8 ones get what is committed alone."""
  if slots["k_scale"] is None:
    return slots_of(m)
  if not commit:
    return slots
  first = ring_block(model, cfg, m.chunk)
  own = (jax.lax.dynamic_slice_in_dim(x[0], first * BLOCK, model.layout.slots, 1) for x in (m.k, m.v))
  return slots_of(_store(m.replace(**slots), *own, first, layer))


def _store(m: KVMemory, k: Float[Array, "B s N H"], v: Float[Array, "B s N H"], first, layer=None) -> KVMemory:
  """Puts k and v into the slots from block `first` on; `layer`: of `_put`."""
  if m.k_scale is None:
    return m.replace(k=_put(m.k, k, first * BLOCK, layer), v=_put(m.v, v, first * BLOCK, layer))
  (k, k_scale), (v, v_scale) = narrow(k), narrow(v)
  return m.replace(
    k=_put(m.k, k, first * BLOCK, layer),
    v=_put(m.v, v, first * BLOCK, layer),
    k_scale=_put(m.k_scale, k_scale, first, layer),
    v_scale=_put(m.v_scale, v_scale, first, layer),
  )


def ring_block(model: ModelConfig, cfg: MemoryConfig, chunk) -> Array:
  """First block of a chunk's ring slot."""
  return cfg.persistent + (chunk % cfg.window) * model.layout.blocks


def _resident(model: ModelConfig, cfg: MemoryConfig, chunk) -> Int32[Array, "R"]:
  """Blocks in the order of the resident view: P, then the window's chunks, oldest first."""
  first = ring_block(model, cfg, chunk + 1 + jnp.arange(cfg.window))
  window = first[:, None] + jnp.arange(model.layout.blocks)
  return jnp.concatenate([jnp.arange(cfg.persistent), window.reshape(-1)])


def _own_origin(model: ModelConfig, chunk) -> Int32[Array, "nb"]:
  tile = jnp.arange(model.layout.blocks)
  return jnp.where(tile < model.layout.full_blocks, chunk * model.layout.blocks + tile, -1)


def begin_chunk(model: ModelConfig, cfg: MemoryConfig, m: KVMemory) -> KVMemory:
  """Evicts the oldest chunk of a full window, updates P, and gives its ring slot to the chunk that begins. One layer."""
  nb, c = model.layout.blocks, cfg.persistent
  first = ring_block(model, cfg, m.chunk)
  if c:
    order = _resident(model, cfg, m.chunk - 1)
    content = block_content(widen(model, m.v, m.v_scale), model.layout, kept=c)[:, order]
    score = eviction_scores(cfg, model.layout, m.score[:, :, order], m.origin[:, :, order], content)
    candidates = order[: c + nb]
    index = select_persistent(cfg, model.layout, score, m.origin[:, :, candidates])
    kept = index < c + nb
    index = jnp.minimum(index, c + nb - 1)
    by_head = lambda x: jnp.where(kept, jnp.take_along_axis(x[:, :, candidates], index, -1), -1)
    origin, score = by_head(m.origin), by_head(m.score)

    def by_block(x, width):  # every head gathers its own blocks, of `width` vectors each
      blocks = x.reshape(x.shape[0], -1, width, *x.shape[-2:])
      at, keep = (a.transpose(0, 2, 1)[:, :, None, :, None] for a in (index, kept))
      moved = jnp.where(keep, jnp.take_along_axis(blocks[:, candidates], at, 1), 0)
      return blocks.at[:, :c].set(moved).reshape(x.shape)

    if m.k_scale is not None:
      k_scale, v_scale = (by_block(x[..., None], 1)[..., 0] for x in (m.k_scale, m.v_scale))
      m = m.replace(k_scale=k_scale, v_scale=v_scale)
    m = m.replace(
      k=by_block(m.k, BLOCK),
      v=by_block(m.v, BLOCK),
      pooled=by_block(m.pooled, cfg.route_parts**2),
      score=m.score.at[:, :, :c].set(score),
      origin=m.origin.at[:, :, :c].set(origin),
    )
  own = jnp.broadcast_to(_own_origin(model, m.chunk), (*m.origin.shape[:2], nb))
  return m.replace(origin=jax.lax.dynamic_update_slice_in_dim(m.origin, own, first, 2))


def write_chunk(model: ModelConfig, cfg: MemoryConfig, m: KVMemory, k, v, layer=None) -> KVMemory:
  """Puts the current chunk's k and v (slots, [B,Sc,N,H]) and pooled keys into its ring slot. One layer.

  With `layer`, m.k and m.v are those of all layers.
  """
  first = ring_block(model, cfg, m.chunk)
  pooled = _put(m.pooled, pool_keys(k, model.layout, cfg.route_parts), first)
  return _store(m, k, v, first, layer).replace(pooled=pooled)


def write_projections(model: ModelConfig, cfg: MemoryConfig, m: KVMemory, unfinished, turn, layer):
  """`write_chunk` of what `Attention.unfinished` gives, normed, turned and packed on the way; m.k and m.v are all layers'.

  Returns:
    m, q in slots, and what `pool_queries` finds of q and `block_content` of v. For cfg.route_parts = 1.
  """
  layout, first = model.layout, ring_block(model, cfg, m.chunk)
  products, vectors = unfinished
  q, k_slots, v_slots, means = to_slots(
    *products, vectors, *turn, m.k, m.v, layer, first, valid=layout.valid, eps=model.eps
  )
  with jax.named_scope("lists"):
    q_means, k_pooled, content = means[:, :, :, None]
    m = m.replace(k=k_slots, v=v_slots, pooled=_put(m.pooled, pooled_keys(k_pooled), first))
    return m, q, pooled_queries(q_means, layout), pooled_keys(content)[:, :, 0]


def _put(old: Float[Array, "..."], new: Float[Array, "B s ..."], at, layer=None):
  """`new` in its place along the axis of slots or blocks; `layer` chooses among those of an array of all layers."""
  start = [0, at] + [0] * (new.ndim - 2)
  new = new.astype(old.dtype)
  return jax.lax.dynamic_update_slice(old, *((new, start) if layer is None else (new[None], [layer, *start])))


def route(model: ModelConfig, cfg: MemoryConfig, m: KVMemory, q_pooled: Float[Array, "B Q I N H"]):
  """Lists for `pbsa` of the current chunk: (block ids int32 [B,N,Q,Kmax], counts int32 [B,N,Q]). One layer."""
  c = cfg.persistent
  own = ring_block(model, cfg, m.chunk) - c
  valid = m.origin[0, 0, c:] >= 0
  return route_window(cfg, model.layout, q_pooled, m.pooled[:, c:], valid, m.chunk, own, c)


def persistent_keys(model: ModelConfig, cfg: MemoryConfig, m: KVMemory) -> Float[Array, "B CS N H"] | None:
  """P's keys turned so that no block looks older than rope_cap; None if there is no cap. One layer."""
  if cfg.rope_cap is None or not cfg.persistent:
    return None
  c = cfg.persistent
  delta = jnp.repeat(_turn(model, cfg, m), BLOCK, -1).transpose(0, 2, 1)
  held = widen(model, m.k[:, : c * BLOCK], None if m.k_scale is None else m.k_scale[:, :c])
  return turn_forward(held, delta)


def _turn(model, cfg, m) -> Int32[Array, "B N C"]:
  chunk = m.origin[:, :, : cfg.persistent] // model.layout.blocks
  return capped_turn(cfg, (m.chunk - chunk) * model.chunk_frames)


def resident_scores(model: ModelConfig, cfg: MemoryConfig, m: KVMemory, head, own, q_pooled) -> Float[Array, "B N R"]:
  """New importance of the resident blocks, in resident order, for a memory that holds the chunk's clean keys. One layer.

  head, own: see `routing.importance`.
  """
  order = _resident(model, cfg, m.chunk)
  pooled = block_means(m.pooled[:, order])
  if cfg.rope_cap is not None and cfg.persistent:
    turned = turn_forward(pooled[:, : cfg.persistent], _turn(model, cfg, m).transpose(0, 2, 1))
    pooled = jnp.concatenate([turned, pooled[:, cfg.persistent :]], 1)
  valid: Bool[Array, "B N R"] = m.origin[:, :, order] >= 0
  rng = jax.random.wrap_key_data(m.rng, impl="threefry2x32")
  means = tile_means(model.layout, q_pooled)
  return importance(cfg, model.layout, head, own, means, pooled, valid, m.score[:, :, order], m.chunk, rng)


def commit_chunk(model: ModelConfig, cfg: MemoryConfig, m: KVMemory, update: Commit) -> KVMemory:
  """Writes the chunk's final K/V, pooled keys and everyone's new scores, and moves on to the next chunk. One layer."""
  order, first = _resident(model, cfg, m.chunk), ring_block(model, cfg, m.chunk)
  if update.k is not None:
    m = _store(m, update.k, update.v, first)
  score = m.score.at[:, :, order].set(update.score)
  return m.replace(pooled=_put(m.pooled, update.pooled, first), score=score, chunk=m.chunk + 1)


def per_layer(fn, model: ModelConfig, cfg: MemoryConfig, m: KVMemory, *args):
  """Applies a one-layer function to all layers at once."""
  with jax.named_scope("memory"):
    return jax.vmap(lambda *a: fn(model, cfg, *a))(m, *args)


def stored_blocks(cfg: MemoryConfig, m: KVMemory) -> np.ndarray:
  """Origins (chunk * nb + tile) of P as a host array [L,B,N,C], -1 where empty; for analysis."""
  return np.asarray(m.origin[..., : cfg.persistent])
