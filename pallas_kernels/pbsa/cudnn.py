"""The "cudnn" implementation: every query tile gathers its blocks, then cuDNN's fused attention runs with tiles as batch rows.

Where there are no lists all tiles read the prefix, and nothing is gathered.

It costs a copy of the gathered keys and values, but no score ever leaves the chip: that makes training practical on a GPU.
The gradients of a block, from every tile that read it, are summed by one matrix product in float32: no atomics.

cuDNN reads a row's first keys, so many as there are: where blocks are short, a tile gathers those last, and tokens, not blocks.

Letters: B batch, T query rows, S key slots or blocks, N heads, H head dim, Q query tiles, K listed blocks, R those of all
tiles, J valid slots of a block, E the width of a block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.pbsa.lists import BLOCK, TILE, valid_slots

_FUSED = "cudnn"  # of jax.nn.dot_product_attention


def unsupported(device, q, block_ids, prefix_blocks, prefix_k, kv_grad_range, return_lse) -> str | None:
  """Why this implementation cannot serve a call, or None."""
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q: dtype {q.dtype}; cudnn wants bfloat16 or float16"
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f"q: head dim {q.shape[-1]}; cudnn wants a multiple of 8, at most 128"
  if block_ids.shape[-1] and not isinstance(prefix_blocks, int) and prefix_k is None:
    return "prefix_blocks: beside lists cudnn wants an int, or prefix_k, which bounds it"
  if kv_grad_range is not None or return_lse:
    return "kv_grad_range, return_lse: not in cudnn"
  if device.platform != "gpu":
    return "implementation: cudnn wants an NVIDIA GPU"
  return None


@jax.custom_vjp
def take_blocks(x, ids):
  """x [B,N,S,E], ids int32 [B,N,R] -> [B,N,R,E]."""
  return jnp.take_along_axis(x, ids[..., None], 2)


def _take_forward(x, ids):
  return take_blocks(x, ids), (ids, x.shape[2])


def _take_backward(saved, g):
  return _summed(*saved, g), None


def _summed(ids, blocks: int, g):
  """The sum of g [B,N,R,E] over all that read a block: [B,N,S,E]."""
  reads = jax.nn.one_hot(ids, blocks, dtype=g.dtype)
  total = jnp.einsum("bnrs,bnre->bnse", reads, g, preferred_element_type=jnp.float32)
  return total.astype(g.dtype)


take_blocks.defvjp(_take_forward, _take_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def take_tokens(x, ids, whole, few: int):
  """x [B,N,S,J,H], ids int32 [B,N,Q,K] -> [B,N,Q,K J,H]: first J tokens of each of a tile's `whole` [B,N,Q] first blocks, then
  `few` of each other; what comes after all these is some token."""
  (b, n, _, j, h), k = x.shape, ids.shape[-1]
  row, end = jnp.arange(k * j), whole[..., None] * j
  past = row - end
  block, slot = (jnp.where(past < 0, op(row, j), op(past, few)) for op in (jnp.floor_divide, jnp.remainder))
  block = jnp.minimum(jnp.where(past < 0, block, whole[..., None] + block), k - 1)
  token = jnp.take_along_axis(ids, block, -1) * j + slot
  return take_blocks(x.reshape(b, n, -1, h), token.reshape(b, n, -1)).reshape(*ids.shape[:3], k * j, h)


def _take_tokens_forward(x, ids, whole, few):
  return take_tokens(x, ids, whole, few), (ids, whole, x.shape)


def _take_tokens_backward(few, saved, g):
  """Back into blocks, then as blocks; g is zero past the last token that counts."""
  ids, whole, (b, n, blocks, j, h) = saved
  which, slot, whole = jnp.arange(ids.shape[-1])[:, None], jnp.arange(j), whole[..., None, None]
  row = jnp.where(which < whole, which * j + slot, whole * (j - few) + which * few + slot)
  there = (which < whole) | (slot < few)
  g = jnp.take_along_axis(g, row.reshape(*ids.shape[:3], -1, 1), -2).reshape(*ids.shape, j, h)
  g = jnp.where(there[..., None], g, 0)
  total = _summed(ids.reshape(b, n, -1), blocks, g.reshape(b, n, -1, j * h))
  return total.reshape(b, n, blocks, j, h), None, None


take_tokens.defvjp(_take_tokens_forward, _take_tokens_backward)


def pbsa_cudnn(q, k, v, block_ids, block_counts, prefix_blocks, prefix_k, kv_valid: int, kv_short, scale: float):
  """See `api.pbsa`. Returns out in q's dtype."""
  if not block_ids.shape[-1]:
    return _prefix_alone(q, k if prefix_k is None else prefix_k, v, prefix_blocks, kv_valid, kv_short, scale)
  if prefix_k is not None:
    k = jnp.concatenate([prefix_k, k[:, prefix_k.shape[1] :]], 1)
  bound = prefix_blocks if isinstance(prefix_blocks, int) else prefix_k.shape[1] // BLOCK
  if bound:
    block_ids, block_counts = _with_prefix(block_ids, block_counts, prefix_blocks, bound)
  b, t, n, h = q.shape
  tiles, kmax = t // TILE, block_ids.shape[-1]
  blocks = k.shape[1] // BLOCK
  if kv_short is None:
    ids, length = jnp.clip(block_ids, 0, blocks - 1), block_counts * kv_valid
  else:
    few = kv_short[1]
    ids, whole = _short_last(block_ids, block_counts, blocks, kv_valid, kv_short)
    length = whole * (kv_valid - few) + block_counts * few

  def gather(x):  # [B,S,N,H] -> [B N Q, K J, 1, H]
    x = x.reshape(b, blocks, BLOCK, n, h)[:, :, :kv_valid].transpose(0, 3, 1, 2, 4)
    if kv_short is None:
      x = take_blocks(x.reshape(b, n, blocks, -1), ids.reshape(b, n, -1))
    else:
      x = take_tokens(x, ids, whole, few)
    return x.reshape(b * n * tiles, kmax * kv_valid, 1, h)

  rows = q.reshape(b, tiles, TILE, n, h).transpose(0, 3, 1, 2, 4).reshape(b * n * tiles, TILE, 1, h)

  @jax.checkpoint  # the gathered copies are made again for the backward pass, not kept
  def attend(rows, k, v):
    return _attend(rows, gather(k), gather(v), length.reshape(-1), scale)

  out = attend(rows, k, v)
  return out.reshape(b, n, tiles, TILE, h).transpose(0, 2, 3, 1, 4).reshape(b, t, n, h)


def _with_prefix(ids, counts, prefix_blocks, bound: int):
  """Lists that name the prefix, too: its blocks first, then the listed ones, at most `bound` more entries."""
  own = jnp.broadcast_to(jnp.arange(bound, dtype=jnp.int32), (*ids.shape[:3], bound))
  past = jnp.iinfo(jnp.int32).max
  listed = jnp.arange(ids.shape[-1]) < counts[..., None]
  merged = jnp.concatenate([jnp.where(own < prefix_blocks, own, past), jnp.where(listed, ids, past)], -1)
  return jnp.sort(merged, -1), counts + prefix_blocks


def _short_last(ids, counts, blocks: int, kv_valid: int, kv_short):
  """Lists of which those blocks that are short come last, and how many are not."""
  listed = jnp.arange(ids.shape[-1]) < counts[..., None]
  short = valid_slots(ids, kv_valid, kv_short) < kv_valid
  place = jnp.sort(jnp.where(listed, ids + blocks * short, 2 * blocks), -1)
  return place % blocks, (place < blocks).sum(-1, dtype=jnp.int32)


def _prefix_alone(q, k, v, prefix_blocks, kv_valid: int, kv_short, scale: float):
  """All tiles read the same blocks: one call, nothing gathered but valid slots."""
  b, _, n, h = q.shape
  slots = min(k.shape[1], v.shape[1])
  if kv_short is None:
    valid = lambda x: x[:, :slots].reshape(b, -1, BLOCK, n, h)[:, :, :kv_valid].reshape(b, -1, n, h)
    length = prefix_blocks * kv_valid
  else:
    short, few = kv_short
    sizes = np.array([few if block in short else kv_valid for block in range(slots // BLOCK)])
    index = np.flatnonzero(np.arange(BLOCK) < sizes[:, None])
    valid = lambda x: jnp.asarray(x).at[:, index].get(indices_are_sorted=True, unique_indices=True)
    length = jnp.asarray(np.append(0, sizes.cumsum()), jnp.int32)[prefix_blocks]
  return _attend(q, valid(k), valid(v), jnp.full((b,), length, jnp.int32), scale)


def _attend(q, k, v, length, scale: float):
  """Attention to the first `length` keys of every row; zeros where there is none."""
  out = jax.nn.dot_product_attention(
    q,
    k,
    v,
    scale=scale,
    query_seq_lengths=jnp.full_like(length, q.shape[1]),
    key_value_seq_lengths=jnp.maximum(length, 1),
    implementation=_FUSED,
  )
  return jnp.where((length > 0)[:, None, None, None], out, 0)
