"""The "mosaic_sm90" implementation: Pallas Mosaic GPU kernels for Hopper, with their gradient.

Letters: B batch, T query rows, S key slots, N heads, H head dim, Q query tiles, K key blocks.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.pbsa.lists import BLOCK, transpose_lists
from pallas_kernels.pbsa.mosaic_sm90_backward import backward_kv, backward_q
from pallas_kernels.pbsa.mosaic_sm90_forward import forward
from pallas_kernels.pbsa.mosaic_sm90_parts import LOG2E, Call


def unsupported(device: jax.Device, q, scale: float) -> str | None:
  """Why this implementation cannot serve a call, or None."""
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"q: dtype {q.dtype}; mosaic_sm90 wants bfloat16 or float16"
  if q.shape[-1] not in (64, 128):
    return f"q: head dim {q.shape[-1]}; mosaic_sm90 wants 64 or 128"
  if not scale > 0:
    return f"scale: {scale}; mosaic_sm90 wants a positive number"
  if getattr(device, "compute_capability", None) != "9.0":
    return f"implementation: mosaic_sm90 wants a Hopper GPU (wgmma), not {device.device_kind}"
  return None


def pbsa_mosaic(call: Call, q, k, v, prefix_k, block_ids, block_counts, prefix_blocks, layer=None):
  """See `api.pbsa`; with `layer`, k, v and prefix_k are [L,B,..,N,H] and nothing is differentiable.

  Returns out in q's dtype and lse float32 [B,N,T].
  """
  call = dataclasses.replace(call, most_blocks=most_blocks(k, prefix_k, block_ids, prefix_blocks))
  prefix_blocks = jnp.asarray(prefix_blocks, jnp.int32).reshape(1)
  if not block_ids.shape[-1]:  # a kernel's input has at least one element
    block_ids = jnp.zeros((*block_counts.shape, 1), jnp.int32)
  if layer is None:
    return _attend(call, q, k, v, prefix_k, block_ids, block_counts, prefix_blocks)
  layer = jnp.asarray(layer, jnp.int32).reshape(1)
  return forward(call, q, k, v, prefix_k, block_ids, block_counts, prefix_blocks, layer)[:2]


def most_blocks(k, prefix_k, block_ids, prefix_blocks) -> int:
  """How many blocks a tile reads at most, as shapes tell."""
  blocks = k.shape[-3] // BLOCK
  if isinstance(prefix_blocks, int):
    prefix = prefix_blocks
  else:
    prefix = blocks if prefix_k is None else prefix_k.shape[-3] // BLOCK
  return min(blocks, prefix + block_ids.shape[-1])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attend(call, *args):
  return forward(call, *args)[:2]


def _attend_forward(call, *args):
  # Named, so that a checkpoint policy can save them and the backward pass need not run this kernel again.
  out, lse, rest = (checkpoint_name(x, "pbsa") for x in forward(call, *args, remainder=True))
  return (out, lse), (*args, out, rest, lse)


def _attend_backward(call, saved, cotangents):
  q, k, v, prefix_k, ids, counts, prefix_blocks, out, rest, lse = saved
  dout, dlse = cotangents
  whole = out.astype(jnp.float32) + rest.astype(jnp.float32)
  delta = (whole * dout.astype(jnp.float32)).sum(-1).swapaxes(1, 2) - dlse
  rows = (dout, lse * LOG2E, delta)
  dq = backward_q(call, q, k, v, prefix_k, ids, counts, prefix_blocks, *rows)

  blocks = k.shape[1] // BLOCK
  wanted = call.kv_grad_range or (0, blocks - 1)
  first, last = wanted
  if prefix_k is not None:  # its own gradient knows no range
    first, last = 0, max(last, prefix_k.shape[1] // BLOCK - 1)
  tiles, readers = (x[:, :, first : last + 1] for x in transpose_lists(ids, counts, prefix_blocks[0], blocks))
  dk, dv = backward_kv(call, first, q, k, v, prefix_k, tiles, readers, prefix_blocks, *rows)
  slots = first * BLOCK + jnp.arange(dk.shape[1])[:, None, None]
  dprefix = None
  if prefix_k is not None:
    prefix = slots < prefix_blocks[0] * BLOCK
    dprefix = jnp.where(prefix, dk, 0)[:, : prefix_k.shape[1]]
    inside = (slots >= wanted[0] * BLOCK) & (slots < (wanted[1] + 1) * BLOCK)
    dk, dv = jnp.where(inside & ~prefix, dk, 0), jnp.where(inside, dv, 0)
  rest_of_blocks = ((0, 0), (first * BLOCK, (blocks - 1 - last) * BLOCK), (0, 0), (0, 0))
  dk, dv = (jnp.pad(x, rest_of_blocks) for x in (dk, dv))
  return dq, dk, dv, dprefix, None, None, None


_attend.defvjp(_attend_forward, _attend_backward)
