"""The "cudnn" implementation: every query tile gathers its blocks, then cuDNN's fused attention runs with tiles as batch rows.

It costs a copy of the gathered keys and values, but no score ever leaves the chip: that makes training practical on a GPU.
The gradients of a block, from every tile that read it, are summed by one matrix product in float32: no atomics.

Letters: B batch, T query rows, S key slots, N heads, H head dim, Q query tiles, K listed blocks, J valid slots of a block.
"""

import jax
import jax.numpy as jnp

from pallas_kernels.pbsa.lists import BLOCK, TILE


def unsupported(q, prefix_blocks, layer, kv_grad_range, return_lse) -> str | None:
  """Why this implementation cannot serve a call, or None."""
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q: dtype {q.dtype}; cudnn wants bfloat16 or float16"
  if q.shape[-1] % 8 or q.shape[-1] > 128:
    return f"q: head dim {q.shape[-1]}; cudnn wants a multiple of 8, at most 128"
  if not isinstance(prefix_blocks, int) or prefix_blocks:
    return "prefix_blocks: cudnn reads lists only"
  if layer is not None or kv_grad_range is not None or return_lse:
    return "layer, kv_grad_range, return_lse: not in cudnn"
  if jax.default_backend() != "gpu":
    return "implementation: cudnn wants an NVIDIA GPU"
  return None


@jax.custom_vjp
def take_blocks(x, ids):
  """x [B,N,S,E], ids int32 [B,N,R] -> [B,N,R,E]."""
  return jnp.take_along_axis(x, ids[..., None], 2)


def _take_forward(x, ids):
  return take_blocks(x, ids), (ids, x.shape[2])


def _take_backward(saved, g):
  ids, blocks = saved
  reads = jax.nn.one_hot(ids, blocks, dtype=g.dtype)
  total = jnp.einsum("bnrs,bnre->bnse", reads, g, preferred_element_type=jnp.float32)
  return total.astype(g.dtype), None


take_blocks.defvjp(_take_forward, _take_backward)


def pbsa_cudnn(q, k, v, block_ids, block_counts, kv_valid: int, scale: float):
  """See `api.pbsa`; lists only. Returns out in q's dtype."""
  b, t, n, h = q.shape
  tiles, kmax = t // TILE, block_ids.shape[-1]
  ids = jnp.clip(block_ids, 0, k.shape[1] // BLOCK - 1)

  def gather(x):  # [B,S,N,H] -> [B N Q, K J, 1, H]
    x = x.reshape(b, -1, BLOCK, n, h)[:, :, :kv_valid].transpose(0, 3, 1, 2, 4).reshape(b, n, -1, kv_valid * h)
    return take_blocks(x, ids.reshape(b, n, -1)).reshape(b * n * tiles, kmax * kv_valid, 1, h)

  rows = q.reshape(b, tiles, TILE, n, h).transpose(0, 3, 1, 2, 4).reshape(b * n * tiles, TILE, 1, h)
  length = (block_counts * kv_valid).reshape(-1)

  @jax.checkpoint  # the gathered copies are made again for the backward pass, not kept
  def attend(rows, k, v):
    return jax.nn.dot_product_attention(
      rows,
      gather(k),
      gather(v),
      scale=scale,
      query_seq_lengths=jnp.full_like(length, TILE),
      key_value_seq_lengths=jnp.maximum(length, 1),
      implementation="cudnn",
    )

  out = attend(rows, k, v)
  out = jnp.where((length > 0)[:, None, None, None], out, 0)
  return out.reshape(b, n, tiles, TILE, h).transpose(0, 2, 3, 1, 4).reshape(b, t, n, h)
