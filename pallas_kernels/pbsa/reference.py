"""The "xla" implementation: online softmax over chunks of gathered key blocks, differentiable by JAX itself.

Letters: B batch, T query rows, S key slots, N heads, H head dim, Q query tiles, R rows of a tile (128), K listed
blocks, G blocks per step, J valid slots of a block.
"""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.pbsa.lists import BLOCK, TILE, valid_slots

_STEP_BLOCKS = 8  # key blocks gathered per step of the scan


def _accumulate(carry, q, k, v, mask, scale):
  """One online-softmax step. q [B,N,Q,R,H]; k, v [B,N,Q|1,X,H]; mask broadcasts to [B,N,Q,R,X]."""
  acc, m, l = carry
  s = (
    jnp.einsum("bnqrh,bnqxh->bnqrx", q, k, preferred_element_type=jnp.float32)
    if k.shape[2] != 1
    else jnp.einsum("bnqrh,bnxh->bnqrx", q, k[:, :, 0], preferred_element_type=jnp.float32)
  )
  s = jnp.where(mask, s * scale, -jnp.inf)
  m_new = jnp.maximum(m, jax.lax.stop_gradient(s.max(-1)))
  shift = jnp.where(jnp.isfinite(m_new), m_new, 0.0)  # rows that have read nothing yet keep exp(-inf) = 0
  p = jnp.exp(s - shift[..., None])
  alpha = jnp.exp(m - shift)
  pv = p.astype(v.dtype)
  o = (
    jnp.einsum("bnqrx,bnqxh->bnqrh", pv, v, preferred_element_type=jnp.float32)
    if v.shape[2] != 1
    else jnp.einsum("bnqrx,bnxh->bnqrh", pv, v[:, :, 0], preferred_element_type=jnp.float32)
  )
  return acc * alpha[..., None] + o, m_new, l * alpha + p.sum(-1)


def pbsa_xla(q, k, v, block_ids, block_counts, prefix_blocks, prefix_k, kv_valid, kv_short, scale, kv_grad_range):
  """See `api.pbsa`; k and v are one layer's [B,S,N,H]. Returns out in q's dtype and lse float32 [B,N,T]."""
  b, t, n, h = q.shape
  blocks = k.shape[1] // BLOCK
  tiles, kmax = t // TILE, block_ids.shape[-1]

  def to_blocks(x):  # [B,S,N,H] -> [B,N,K,J,H]: only slots that hold a token
    return x.reshape(b, -1, BLOCK, n, h)[:, :, :kv_valid].transpose(0, 3, 1, 2, 4)

  def slots(ok, ids):  # which of the blocks are read -> which of their slots, [..,G] -> [..,G J]
    if kv_short is None:
      return jnp.repeat(ok, kv_valid, -1)
    valid = jnp.arange(kv_valid) < valid_slots(ids, kv_valid, kv_short)[..., None]
    return (ok[..., None] & valid).reshape(*ok.shape[:-1], -1)

  kb, vb = to_blocks(k), to_blocks(v)
  if kv_grad_range is not None:
    ids = jnp.arange(blocks)[:, None, None]
    inside = (ids >= kv_grad_range[0]) & (ids <= kv_grad_range[1])
    kb = jnp.where(inside, kb, jax.lax.stop_gradient(kb))
    vb = jnp.where(inside, vb, jax.lax.stop_gradient(vb))
  qt = q.reshape(b, tiles, TILE, n, h).transpose(0, 3, 1, 2, 4)
  carry = (
    jnp.zeros((b, n, tiles, TILE, h), jnp.float32),
    jnp.full((b, n, tiles, TILE), -jnp.inf, jnp.float32),
    jnp.zeros((b, n, tiles, TILE), jnp.float32),
  )
  step = jax.checkpoint(functools.partial(_accumulate, scale=scale))

  # Prefix: contiguous blocks, the same for every tile.
  pk = kb if prefix_k is None else to_blocks(prefix_k)
  bound = pk.shape[2]
  if isinstance(prefix_blocks, int):
    bound = min(bound, prefix_blocks)
  for first in range(0, bound, _STEP_BLOCKS):
    size = min(_STEP_BLOCKS, bound - first)
    ids = first + jnp.arange(size, dtype=jnp.int32)
    ok = slots(ids < prefix_blocks, ids)
    read = functools.partial(
      lambda c, a, x, y, ok: step(c, a, x, y, ok),
      ok=ok,
    )
    kk = jnp.where(ok[:, None], pk[:, :, first : first + size].reshape(b, n, 1, -1, h), 0)
    vv = jnp.where(ok[:, None], vb[:, :, first : first + size].reshape(b, n, 1, -1, h), 0)
    if isinstance(prefix_blocks, int):
      carry = read(carry, qt, kk, vv)
    else:
      carry = jax.lax.cond(first < prefix_blocks, read, lambda c, *_: c, carry, qt, kk, vv)

  # Lists: each tile gathers its own blocks, a few at a time.
  gather = jax.vmap(jax.vmap(lambda x, i: x[i]))  # [K,J,H], [Q,G] -> [Q,G,J,H]

  def listed(carry, xs):
    ids, ok = xs  # [B,N,Q,G]
    ok = slots(ok, ids)
    kk = jnp.where(ok[..., None], gather(kb, ids).reshape(b, n, tiles, -1, h), 0)
    vv = jnp.where(ok[..., None], gather(vb, ids).reshape(b, n, tiles, -1, h), 0)
    return _accumulate(carry, qt, kk, vv, ok[:, :, :, None, :], scale), None

  pad = -kmax % _STEP_BLOCKS if kmax > _STEP_BLOCKS else 0
  ok = jnp.arange(kmax + pad) < block_counts[..., None]
  ids = jnp.clip(jnp.pad(block_ids, ((0, 0),) * 3 + ((0, pad),)), 0, blocks - 1)
  group = min(_STEP_BLOCKS, kmax)
  if kmax:
    split = lambda x: jnp.moveaxis(x.reshape(b, n, tiles, -1, group), 3, 0)
    carry, _ = jax.lax.scan(jax.checkpoint(listed), carry, (split(ids), split(ok)))

  acc, m, l = carry
  empty = l == 0
  out = acc / jnp.where(empty, 1.0, l)[..., None]
  lse = jnp.where(empty, -jnp.inf, jnp.where(empty, 0.0, m) + jnp.log(jnp.where(empty, 1.0, l)))
  out = out.transpose(0, 2, 3, 1, 4).reshape(b, t, n, h).astype(q.dtype)
  return out, lse.reshape(b, n, t)
