"""Self-attention over the sparse memory: chunk by chunk over the cache, and all chunks at once in training.

All return a function for `DiT.__call__`'s `attend`. The parallel form scans over chunks on pooled vectors to find every
chunk's P and lists, then one `pbsa` call attends for all chunks of the clean and the noisy stream together. The replayed form
does so for chunks that were rolled out before: what each of them read is known.

Letters: B batch, G chunks side by side, n chunks of a clip, T tokens, N heads, H head dim, Q query tiles, C persistent blocks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.dense import dense_attention
from pallas_kernels.pbsa import BLOCK, pbsa
from sfjax import memory as kv
from sfjax.axes import all_chunks, by_heads, by_tokens, own_chunks, shares_tokens, splits_chunks, splits_heads
from sfjax.model import ModelConfig
from sfjax.rope import turn_forward
from sfjax.routing import (
  MemoryConfig,
  block_content,
  block_means,
  capped_turn,
  eviction_scores,
  importance,
  patch_mass,
  pool_keys,
  pool_queries,
  route_window,
  select_persistent,
  tile_means,
)
from sfjax.tiles import BlockLayout


def cached_attention(model: ModelConfig, cfg: MemoryConfig, commit: bool, prefix_k=None, keep=False):
  """Attends from one chunk to the memory, begun for that chunk.

  The layer input is a `KVMemory`, the layer's index or None, and the lists (ids, counts) to read by, or None: then this pass
  finds its own.

  The memory's slots come in one of two ways. As part of the layer input, that of the layer: nothing is changed, and all is
  differentiable. Or as the carry, `memory.slots_of` all layers, the index telling which one: the chunk is written there, in
  place where the carry is donated, and no slot is copied; forward only. Beside it, a `Read` with `keep`, else None; and with
  `commit` a `Commit`, with k and v only where the carry does not hold them already, else None.

  prefix_k: with the carry, `memory.persistent_keys` of all layers, found once for all passes of a chunk.
  """
  layout = model.layout

  def attend(block, slots, given: tuple[kv.KVMemory, Int32[Array, ""] | None, tuple[Array, Array] | None], h, turn):
    m, index, lists = given
    if slots is None:
      layer, keys = None, kv.persistent_keys(model, cfg, m)
    else:
      m, layer, keys = kv.opened(model, m.replace(**slots), index, prefix_k)
    if slots is None or cfg.route_parts > 1 or splits_heads():
      rows = by_heads([x[:, 0] for x in block.self_attn.turned(h, turn)], layout.tokens)
      q, k, v = map(layout.pack, rows)
      m = kv.write_chunk(model, cfg, m, k, v, layer)
      q_pooled, content = pool_queries(q, layout, cfg.route_parts), block_content(v, layout)
    else:  # all of this in one kernel, where there is one; it knows one mean a block, and wants all heads of all rows
      unfinished = block.self_attn.unfinished(h[:, 0])
      m, q, q_pooled, content = kv.write_projections(model, cfg, m, unfinished, [x[0] for x in turn], layer)
    if cfg.selects or layout.blocks > layout.full_blocks:
      with jax.named_scope("lists"):
        ids, counts = kv.route(model, cfg, m, q_pooled) if lists is None else lists
      prefix = cfg.persistent_count(layout, m.chunk) if cfg.persistent else 0
    else:  # all that is there, in the order in which it lies
      ids = jnp.zeros((q.shape[0], q.shape[2], layout.blocks // 2, 0), jnp.int32)
      counts = jnp.zeros(ids.shape[:3], jnp.int32)
      prefix = jnp.minimum(m.chunk + 1, cfg.window) * layout.blocks
    holes = dict(kv_valid=layout.valid, kv_short=layout.short_blocks(cfg.window, cfg.persistent))
    out = pbsa(q, m.k, m.v, ids, counts, prefix_blocks=prefix, prefix_k=keys, layer=layer, **holes)
    read, update = Read(q_pooled, ids, counts) if keep else None, None
    if commit:
      nb = layout.blocks
      own = jax.lax.dynamic_slice_in_dim(m.pooled, kv.ring_block(model, cfg, m.chunk), nb, 1)
      with jax.named_scope("memory"):
        score = kv.resident_scores(model, cfg, m, block.log_importance, content, q_pooled)
      update = kv.Commit(*((k, v) if slots is None else (None, None)), own, score)
    if shares_tokens():
      out = block.self_attn.out(by_tokens(_tokens(layout, out), h.shape[-2]))[:, None]
    else:
      out = _projected(layout, block, out)[:, None]
    return out, slots and kv.closed(model, cfg, slots, m, index, commit), (read, update)

  return attend


def _projected(layout: BlockLayout, block, x: Float[Array, "*B S N H"]) -> Float[Array, "*B T D"]:
  """`Attention.out` of rows in slots, as tokens: taken out of their slots first where that moves none."""
  if layout.valid < BLOCK:
    return layout.unpack(block.self_attn.out(x))
  return block.self_attn.out(_tokens(layout, x))


def _tokens(layout: BlockLayout, x: Float[Array, "*B S N H"]) -> Float[Array, "*B T N H"]:
  """`BlockLayout.unpack` of heads."""
  tokens = layout.unpack(x.reshape(*x.shape[:-2], -1))
  return tokens.reshape(*tokens.shape[:-1], *x.shape[-2:])


class Read(NamedTuple):
  """What a chunk's denoising step read of its memory in a layer.

  Attributes:
    queries: pooled. ids, counts: its lists, of the memory's blocks; empty where it reads all there is.
  """

  queries: Float[Array, "*L B Q I N H"]
  ids: Int32[Array, "*L B N Q K"]
  counts: Int32[Array, "*L B N Q"]


class Replay(NamedTuple):
  """A layer's input for `replayed_attention`: the memory before the first of n chunks, and what the rollout left of them.

  Attributes:
    k, v, origin: of the memory then. clean_k, clean_v: what the chunks committed. origins: of the memory when each was
      denoised. ids, counts: their lists, see `Read`.
  """

  k: Float[Array, "*L B S N H"]
  v: Float[Array, "*L B S N H"]
  origin: Int32[Array, "*L B N R"]
  clean_k: Float[Array, "*L n B Sc N H"]
  clean_v: Float[Array, "*L n B Sc N H"]
  origins: Int32[Array, "*L n B N R"]
  ids: Int32[Array, "*L n B N Q K"]
  counts: Int32[Array, "*L n B N Q"]


def replayed_attention(
  model: ModelConfig,
  cfg: MemoryConfig,
  first: Int32[Array, ""],
  straight_through: bool,
  real: Bool[Array, "B n"] | None = None,
):
  """Attends for the noisy chunks first .. first + n - 1 of a rollout, side by side; the layer input is a `Replay`.

  A chunk reads its own noisy keys and values, and earlier chunks' kept ones wherever they lay in its memory, P or window; with
  straight_through these carry the gradient of the noisy ones, which stand beside them here. Chunks that are real did not come
  from those: theirs carry none.
  """
  layout, nb, c = model.layout, model.layout.blocks, cfg.persistent

  def carrying(clean, noisy):  # with the gradient of the noisy ones, [B,n,..]
    if not straight_through:
      return clean
    carried = noisy - jax.lax.stop_gradient(noisy)  # zero, and its gradient
    if real is not None:
      carried = jnp.where(real[:, :, None, None, None], 0, carried)
    return clean + carried

  def in_window(given: Replay, q, k, v):  # a memory that selects nothing: tokens, no lists
    tokens = lambda x: layout.unpack(x.reshape(*x.shape[:-2], -1)).reshape(*x.shape[:2], *q.shape[2:])
    at = jnp.arange(q.shape[1])

    def read(before, clean, noisy):  # a chunk's own first, then the newest: what is not there yet comes last
      ring = before.reshape(before.shape[0], cfg.window, layout.slots, *before.shape[2:])
      ring = jnp.take(tokens(ring), (first + jnp.arange(cfg.window)) % cfg.window, 1)  # oldest first
      past = jnp.concatenate([ring, carrying(tokens(jnp.moveaxis(clean, 0, 1)), noisy)], 1)
      windows = [noisy, *(past[:, cfg.window - age :][:, : len(at)] for age in range(1, cfg.window))]
      return jnp.stack(windows, 2).reshape(-1, cfg.window * layout.tokens, *q.shape[3:])

    there = jnp.minimum(first + at + 1, cfg.window) * layout.tokens
    there = jnp.broadcast_to(there, q.shape[:2]).reshape(-1)
    keys, values = read(given.k, given.clean_k, k), read(given.v, given.clean_v, v)
    return dense_attention(q.reshape(-1, *q.shape[2:]), keys, values, there).reshape(q.shape)

  def attend(block, carry, given: Replay, h, turn):
    rows = block.self_attn.turned(h, turn)
    if not cfg.selects:
      return block.self_attn.out(in_window(given, *rows)), carry, None
    q, k, v = (layout.pack(x) for x in rows)  # [B,n,Sc,N,H]
    b, n, _, heads, dim = q.shape
    resident = given.origin.shape[-1]
    flat = lambda x: x.reshape(b, -1, heads, dim)
    past = lambda before, clean, noisy: jnp.concatenate(  # blocks that were there, then those of the n chunks
      [before, flat(carrying(jnp.moveaxis(clean, 0, 1), noisy))], 1
    )
    past_k, past_v = past(given.k, given.clean_k, k), past(given.v, given.clean_v, v)
    keys, values = [past_k, flat(k)], [past_v, flat(v)]

    # Where the blocks of a chunk's memory stand in these arrays; `big` where there is none.
    big = 2 * n * nb + resident + n * c
    t = first + jnp.arange(n)[:, None, None, None]
    found = jnp.argmax(given.origins[..., None] == given.origin[..., None, :], -1)
    later = given.origins - first * nb
    stands = jnp.where(later < 0, found, resident + later + jnp.where(given.origins // nb == t, n * nb, 0))
    stands = jnp.where(given.origins < 0, big, stands)
    at = jnp.pad(stands, [(0, 0)] * 3 + [(0, 1)], constant_values=big)[..., None, :]
    ids, counts = jnp.take_along_axis(at, given.ids, -1), given.counts
    if c:
      origin, p = given.origins[..., :c], stands[..., :c]
      if cfg.rope_cap is not None:  # each chunk's P as a segment of its own: its keys turn by the chunk's own ages
        source = jnp.minimum(p, past_k.shape[1] // BLOCK - 1).transpose(1, 0, 3, 2).reshape(b, n * c, 1, heads, 1)
        gather = lambda x: flat(jnp.take_along_axis(x.reshape(b, -1, BLOCK, heads, dim), source, 1))
        delta = capped_turn(cfg, (t - origin // nb) * model.chunk_frames).transpose(1, 0, 3, 2)
        keys.append(turn_forward(gather(past_k), jnp.repeat(delta.reshape(b, n * c, heads), BLOCK, 1)))
        values.append(gather(past_v))
        segment = resident + 2 * n * nb + jnp.arange(n)[:, None, None, None] * c + jnp.arange(c)
        p = jnp.where(origin >= 0, segment, big)
      ids = jnp.concatenate([jnp.broadcast_to(p[..., None, :], (*ids.shape[:-1], c)), ids], -1)
      counts = counts + (origin >= 0).sum(-1)[..., None].astype(jnp.int32)
    longest = cfg.full_k(layout) + c  # P and its unused budget share so many entries
    ids = jnp.sort(ids, -1)[..., :longest].astype(jnp.int32)
    rows = lambda x: jnp.moveaxis(x, 0, 2).reshape(b, heads, -1, *x.shape[4:])
    holes = dict(kv_valid=layout.valid, kv_short=layout.short_blocks(cfg.window + 2 * n, c))
    out = pbsa(flat(q), jnp.concatenate(keys, 1), jnp.concatenate(values, 1), rows(ids), rows(counts), **holes)
    out = _projected(layout, block, out.reshape(q.shape))
    return out, carry, None

  return attend


class Parallel(NamedTuple):
  """What the parallel form found in a layer.

  Attributes:
    persistent: origins of each chunk's P, [B,n,N,C], -1 where empty.
    ids, counts: the pbsa lists of all rows, clean chunks first; None where the memory reads all it has.
    importance_loss: mean squared error of the learned importance head; 0 unless it is in use.
  """

  persistent: Int32[Array, "*L B n N C"]
  ids: Int32[Array, "*L B N Q K"] | None
  counts: Int32[Array, "*L B N Q"] | None
  importance_loss: Float[Array, "*L"]


def parallel_attention(model: ModelConfig, cfg: MemoryConfig, chunks: int, later: int | None = None):
  """Attends for a whole clip under teacher forcing: the clean chunks side by side, then the noisy ones.

  Noisy chunk t reads what a rollout reads: P_t, the clean window before t, and itself. So the last chunk may be absent from
  the clean stream (G = 2 n or 2 n - 1). The layer input is the layer's rng, see `KVMemory`.

  Where devices along "context" share the chunks, a device attends for its own, clean and noisy, to the keys and values of all,
  and all of them make the same plan.

  `later`: reads at least so many chunks after a block's own teach the importance head (the window by default).
  """
  layout, n, nb, c = model.layout, chunks, model.layout.blocks, cfg.persistent
  turning = c > 0 and cfg.rope_cap is not None and (n - 1) * model.chunk_frames > cfg.rope_cap
  apart = splits_chunks(n)

  def joined(x):  # all devices' chunks, of both streams
    if not apart:
      return x
    return all_chunks(x.reshape(x.shape[0], 2, -1, *x.shape[2:]), 2).reshape(x.shape[0], 2 * n, *x.shape[2:])

  def own(lists):  # of a device's rows
    b, heads, rows, *rest = lists.shape
    if not apart:
      return lists
    return own_chunks(lists.reshape(b, heads, 2, n, rows // (2 * n), *rest), 3).reshape(b, heads, -1, *rest)

  def attend(block, carry, rng, h, turn):
    rows = block.self_attn.turned(h, turn)
    b, streams, _, heads, dim = rows[0].shape
    q, k, v = (layout.pack(x) for x in rows)  # [B,G,Sc,N,H]
    pooled = pool_queries(q, layout, cfg.route_parts), pool_keys(k, layout, cfg.route_parts), block_content(v, layout)
    q_pooled, k_pooled, content = (joined(x) for x in pooled)
    content = content[:, :-n]
    loss = jnp.zeros(())
    if cfg.importance == "learned":
      predicted = block.log_importance(content.reshape(b, -1, heads, dim))
      loss = importance_loss(model, later or cfg.window, n, predicted, q_pooled[:, -n:], k_pooled[:, :-n])
    if not cfg.selects and not apart:
      nobody = jnp.zeros((b, n, heads, 0), jnp.int32)
      return block.self_attn.out(_window_attention(cfg, n, *rows)), carry, Parallel(nobody, None, None, loss)
    plan = _plan(model, cfg, n, block.log_importance, content, q_pooled, k_pooled, rng, segments=turning)
    flat = lambda x: x.reshape(b, -1, heads, dim)
    keys, values = flat(joined(k)), flat(joined(v))
    holes = dict(kv_valid=layout.valid, kv_short=layout.short_blocks(keys.shape[1] // layout.slots))
    if turning:  # each chunk's P as its own segment: its keys turn by the chunk's own ages
      delta = capped_turn(cfg, (jnp.arange(n)[:, None, None] - plan.persistent // nb) * model.chunk_frames)  # [B,n,N,C]
      source = jnp.maximum(plan.persistent, 0).transpose(0, 1, 3, 2).reshape(b, n * c, 1, heads, 1)
      gather = lambda x: jnp.take_along_axis(x.reshape(b, -1, BLOCK, heads, dim), source, 1).reshape(b, -1, heads, dim)
      delta = jnp.repeat(delta.transpose(0, 1, 3, 2).reshape(b, n * c, heads), BLOCK, 1)
      keys = jnp.concatenate([keys, turn_forward(gather(keys), delta)], 1)
      values = jnp.concatenate([values, gather(values)], 1)
    out = pbsa(flat(q), keys, values, own(plan.ids), own(plan.counts), **holes)
    out = _projected(layout, block, out.reshape(b, streams, layout.slots, heads, dim))
    return out, carry, plan._replace(importance_loss=loss)

  return attend


def _window_attention(cfg: MemoryConfig, n: int, q, k, v) -> Float[Array, "B G T N H"]:
  """The parallel form of a memory that selects nothing: every chunk attends to its whole window, no lists needed."""
  b, rows, given = *q.shape[:2], q.shape[1] - n
  chunk = [*range(given), *range(n)]
  out = [None] * rows
  for size in range(1, min(cfg.window, n) + 1):  # rows that read equally many chunks, side by side
    same = [row for row in range(rows) if min(chunk[row] + 1, cfg.window) == size]
    before = [slice(chunk[row] - size + 1, chunk[row]) for row in same]
    window = lambda x, row, past: jnp.concatenate([x[:, past], x[:, row : row + 1]], 1)
    q_s = jnp.stack([q[:, row] for row in same], 1)
    k_s, v_s = (jnp.stack([window(x, *w) for w in zip(same, before, strict=True)], 1) for x in (k, v))
    q_s, k_s, v_s = (x.reshape(b * len(same), -1, *q.shape[3:]) for x in (q_s, k_s, v_s))
    found = dense_attention(q_s, k_s, v_s)
    for row, x in zip(same, jnp.unstack(found.reshape(b, len(same), *q.shape[2:]), axis=1), strict=True):
      out[row] = x
  return jnp.stack(out, 1)


def _plan(model, cfg: MemoryConfig, n: int, head, content, q_pooled, k_pooled, rng, segments: bool) -> Parallel:
  """Every chunk's P and lists from pooled vectors [B,G,Q|nb,I|A,N,H]: the cached rollout's decisions, replayed.

  content [B,G,nb,N,H] is that of the clean chunks' blocks.
  """
  layout, nb, c, w = model.layout, model.layout.blocks, cfg.persistent, cfg.window
  b, streams, _, patches, heads, dim = k_pooled.shape
  given = streams - n  # clean chunks
  clean, noisy = k_pooled[:, :given], k_pooled[:, given:]
  # Blocks by origin; in front of them W chunks that never were, behind them the last chunk where it is absent (nobody reads
  # it) and one empty block.
  by_origin = lambda x: jnp.pad(
    x.reshape(b, given * nb, *x.shape[3:]), [(0, 0), (w * nb, (n - given) * nb + 1)] + [(0, 0)] * (x.ndim - 3)
  )
  history, content = by_origin(clean), by_origin(content)
  means = block_means(history)
  key = jax.random.wrap_key_data(rng, impl="threefry2x32")
  tile_ok = jnp.arange(nb) < layout.full_blocks
  big = streams * nb + n * c
  at = lambda x, i: jax.lax.dynamic_index_in_dim(x, i, 1, keepdims=False)
  window = lambda x, t: jax.lax.dynamic_slice_in_dim(x, (t + 1) * nb, w * nb, 1)
  of_heads = lambda x, origin: jnp.take_along_axis(  # every head's own blocks
    x, jnp.where(origin >= 0, origin + w * nb, x.shape[1] - 1).transpose(0, 2, 1)[..., None], 1
  )

  def window_of(t):  # origin of each window position, and whether a block with tokens is there
    position = (t - w + 1) * nb + jnp.arange(w * nb)
    return position, (position >= 0) & jnp.tile(tile_ok, w)

  def step(carry, t):
    persistent, p_score, score = carry  # [B,N,C] origins, their scores; window scores [B,N,W nb], oldest chunk first
    if c:
      before, there = window_of(t - 1)
      origin = jnp.broadcast_to(jnp.where(there, before, -1), (b, heads, w * nb))
      origin = jnp.concatenate([persistent, origin], -1)
      old = jnp.concatenate([p_score, score], -1)
      said = jnp.concatenate([of_heads(content, persistent), window(content, t - 1)], 1)
      index = select_persistent(cfg, layout, eviction_scores(cfg, layout, old, origin, said), origin[..., : c + nb])
      kept, index = index < c + nb, jnp.minimum(index, c + nb - 1)
      take = lambda x: jnp.where(kept, jnp.take_along_axis(x, index, -1), -1)
      persistent, p_score = take(origin), take(old)
    score = jnp.roll(score, -nb, -1)
    _, valid = window_of(t)
    resident, ok = window(means, t), jnp.broadcast_to(valid, (b, heads, w * nb))  # the commit pass: their new scores
    if c:
      p_pooled = of_heads(means, persistent)
      if cfg.rope_cap is not None:
        p_pooled = turn_forward(
          p_pooled, capped_turn(cfg, (t - persistent // nb) * model.chunk_frames).transpose(0, 2, 1)
        )
      resident = jnp.concatenate([p_pooled, resident], 1)
      ok = jnp.concatenate([persistent >= 0, ok], -1)
    new = importance(
      cfg,
      layout,
      head,
      window(content, t)[:, -nb:],
      tile_means(layout, at(q_pooled, t)),
      resident,
      ok,
      jnp.concatenate([p_score, score], -1),
      jnp.asarray(t, jnp.int32),
      key,
    )
    return (persistent, new[..., :c], new[..., c:]), persistent

  def lists(t, persistent):  # over the key array [clean | noisy | P segments], of the clean and of the noisy chunk
    position, valid = window_of(t)
    clean_keys = window(history, t)
    noisy_keys = jnp.concatenate([clean_keys[:, : (w - 1) * nb], at(noisy, t)], 1)
    noisy_position = jnp.where(jnp.arange(w * nb) >= (w - 1) * nb, position + given * nb, position)
    out = []
    for row, keys, where in ((t, clean_keys, position), (given + t, noisy_keys, noisy_position)):
      index, counts = route_window(cfg, layout, at(q_pooled, row), keys, valid, t, (w - 1) * nb)
      ids = jnp.append(where, big)[index]
      if c:
        p_ids = streams * nb + t * c + jnp.arange(c) if segments else persistent
        p_ids = jnp.where(persistent >= 0, p_ids, big)[:, :, None]
        ids = jnp.concatenate([jnp.broadcast_to(p_ids, (*ids.shape[:3], c)), ids], -1)
        counts = counts + cfg.persistent_count(layout, t)
      # P and its unused budget share full_k + C entries, so the rest of a sorted list is never read
      out.append((jnp.sort(ids, -1)[..., : cfg.full_k(layout) + c].astype(jnp.int32), counts))
    return out

  start = (
    jnp.full((b, heads, c), -1, jnp.int32),
    jnp.zeros((b, heads, c), jnp.float32),
    jnp.zeros((b, heads, w * nb), jnp.float32),
  )
  _, persistent = jax.lax.scan(step, start, jnp.arange(n))  # one after the other, as little as can be
  found = jax.vmap(lists)(jnp.arange(n), persistent)
  # [n,B,N,Q,...] of both streams -> rows in the order of q: clean chunks, then noisy ones.
  rows = lambda x: jnp.moveaxis(x, 0, 2).reshape(b, heads, -1, *x.shape[4:])
  ids, counts = (jnp.concatenate([rows(found[0][i][:given]), rows(found[1][i])], 2) for i in (0, 1))
  plan = jax.lax.stop_gradient((jnp.moveaxis(persistent, 0, 1), ids, counts))
  return Parallel(*checkpoint_name(plan, "plan"), jnp.zeros(()))


def importance_loss(
  model: ModelConfig,
  later: int,
  n: int,
  predicted: Float[Array, "B N K"],
  q_noisy: Float[Array, "B n Q I N H"],
  k_clean: Float[Array, "B g nb A N H"],
) -> Float[Array, ""]:
  """Squared error of the predicted log importance against the largest attention a block gets later.

  The target is log(y + 1e-3), y the largest dense attention that a patch of the noisy queries, at least `later` chunks after
  the block, gives to the block's patches together (sparse_forcing, learned importance). Queries and keys are constants.

  Args:
    predicted: of the g = n or n - 1 clean chunks' blocks, K = g nb.
  """
  layout, nb = model.layout, model.layout.blocks
  if n <= later:
    return jnp.zeros(())
  read = (n - 1) * nb  # nobody reads the last chunk later
  k = k_clean[:, : n - 1].reshape(q_noisy.shape[0], read, *k_clean.shape[3:])
  chunk_of_key = jnp.repeat(jnp.arange(n - 1), nb)
  real, may_stay = (jnp.tile(jnp.arange(nb) < held, n - 1) for held in (layout.full_blocks, layout.whole_blocks))

  def reads(best, xs):
    t, q = xs
    y = patch_mass(layout, q, k, real & (chunk_of_key < t)).max((2, 3))
    return jnp.maximum(best, jnp.where(chunk_of_key + later <= t, jnp.exp(y), 0)), None

  start = jnp.zeros(predicted.shape[:2] + (read,), jnp.float32)
  best, _ = jax.lax.scan(reads, start, (jnp.arange(1, n), jnp.moveaxis(q_noisy[:, 1:], 1, 0)))
  target = checkpoint_name(jax.lax.stop_gradient(jnp.log(best + 1e-3)), "plan")
  weight = (may_stay & (chunk_of_key < n - later)).astype(jnp.float32)
  error = (predicted[..., :read] - target) ** 2
  count = jnp.maximum(weight.sum(), 1)  # a chunk may be too small for a whole block
  return (weight * error).sum() / (count * error.shape[0] * error.shape[1])
