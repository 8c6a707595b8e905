"""The public call: q, k and v of a chunk, normed, turned and laid into blocks; k and v where the cache keeps them.

Letters: B batch, T tokens of a chunk in tile order, D = N H width, N heads, H head dim, L layers, S slots of a layer,
K blocks of a chunk, s = 64 K; the last that holds tokens may be short; an odd number gets one empty block.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels.implementations import always, chosen
from pallas_kernels.pbsa import BLOCK, TILE
from pallas_kernels.slots import mosaic_sm90


def to_slots(
  q: Float[Array, "B R D"],
  k: Float[Array, "B R D"],
  v: Float[Array, "B R D"],
  vectors: Float[Array, "5 D"],
  cos: Float[Array, "T half"],
  sin: Float[Array, "T half"],
  k_slots: Float[Array, "L B S N H"],
  v_slots: Float[Array, "L B S N H"],
  layer: Int32[Array, ""],
  first: Int32[Array, ""],
  *,
  valid: int,
  eps: float,
  implementation: str | None = None,
) -> tuple[Float[Array, "B s N H"], Float[Array, "L B S N H"], Float[Array, "L B S N H"], Float[Array, "3 B K N H"]]:
  """Biases, RMS norm over the whole width of q and k, RoPE of both, blocks of 64 slots, and their means.

  All in float32, rounded once, where it is written; the means are of what is written.

  Args:
    q, k, v: products with their weights, R >= T; rows past T are not read.
    vectors: the biases of q, k and v and the norms' weights of q and k, in one array.
    cos, sin: of each token's angles, float32; the pair (2 j, 2 j + 1) of every head turns by angle j.
    k_slots, v_slots: the stacked cache, written in place where it is donated: blocks first .. first + K - 1 of `layer`.
    valid: tokens of a block, T % valid of the last one if that is not 0; the slots behind them become zero.
    implementation: "mosaic_sm90" (Hopper, bfloat16), "xla" (anywhere), or None for the first that supports the arguments.

  Returns:
    q in slots, k_slots, v_slots, and the mean q, k and v of each block, float32.

  Raises:
    ValueError: wrong shapes or dtypes. NotImplementedError: the implementation cannot do this.
  """
  (b, r, d), t = q.shape, cos.shape[0]
  *_, slots, n, h = k_slots.shape
  for name, x, want in (
    ("q", q, (b, max(r, t), d)),
    ("k", k, q.shape),
    ("v", v, q.shape),
    ("vectors", vectors, (5, d)),
    ("cos", cos, (t, h // 2)),
    ("sin", sin, (t, h // 2)),
    ("k_slots", k_slots, (k_slots.shape[0], b, slots, n, d // n)),
    ("v_slots", v_slots, k_slots.shape),
  ):
    if x.shape != want:
      raise ValueError(f"{name}: shape {x.shape}; want {want}")
    dtype = jnp.float32 if name in ("cos", "sin") else q.dtype
    if x.dtype != dtype:
      raise ValueError(f"{name}: dtype {x.dtype}; want {dtype}")
  if not 1 <= valid <= BLOCK:
    raise ValueError(f"valid: {valid}; want 1..{BLOCK}")
  tiles = -(-t // (2 * valid))
  if slots % BLOCK or slots < tiles * TILE:
    raise ValueError(f"k_slots: S = {slots}; want a multiple of {BLOCK}, at least {tiles * TILE}")
  args = (q, k, v, vectors, cos, sin, k_slots, v_slots, layer, first)
  reasons = {"mosaic_sm90": lambda: mosaic_sm90.unsupported(q, t, (n, h), valid), "xla": always}
  if chosen(implementation, reasons) == "mosaic_sm90":
    return _by_kernel(valid, eps, *args)
  return by_xla(valid, eps, *args)


def by_xla(valid, eps, q, k, v, vectors, cos, sin, k_slots, v_slots, layer, first):
  """What the kernel is held to."""
  wide = jnp.promote_types(q.dtype, jnp.float32)
  n, h = k_slots.shape[-2:]
  q, k, v = (x[:, : cos.shape[0]] for x in (q, k, v))

  def turned(x, weight):
    y = x * jax.lax.rsqrt((x * x).mean(-1, keepdims=True) + eps) * weight
    y = y.reshape(*x.shape[:2], n, h // 2, 2)
    c, s = (a[:, None, :, None] for a in (cos, sin))
    return y * c + jnp.flip(y, -1) * s * jnp.array([-1, 1], wide)

  dtype, vectors = q.dtype, vectors.astype(wide)
  q, k, v = (x.astype(wide) + bias for x, bias in zip((q, k, v), vectors[:3], strict=True))
  rows = jnp.stack([x.reshape(*x.shape[:2], n, h) for x in (turned(q, vectors[3]), turned(k, vectors[4]), v)])
  rows = jnp.pad(rows.astype(dtype), [(0, 0)] * 2 + [(0, -rows.shape[2] % valid), (0, 0), (0, 0)])
  blocks = rows.reshape(*rows.shape[:2], -1, valid, n, h)
  blocks = jnp.pad(blocks, [(0, 0)] * 2 + [(0, blocks.shape[2] % 2), (0, BLOCK - valid), (0, 0), (0, 0)])
  means = _means(blocks.astype(jnp.float32).sum(3), cos.shape[0], valid)
  q, k, v = blocks.reshape(3, q.shape[0], -1, n, h)
  put = lambda old, new: jax.lax.dynamic_update_slice(old, new[None], (layer, 0, first * BLOCK, 0, 0))
  return q, put(k_slots, k), put(v_slots, v), means


def _means(sums, t: int, valid: int):
  """Sums [3,B,K,N,H] of each block's tokens over their number."""
  return sums / np.clip(t - valid * np.arange(sums.shape[2]), 1, valid).astype(np.float32)[:, None, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(valid, eps, *args):
  q, k_slots, v_slots, sums = mosaic_sm90.to_slots(valid, eps, *args)
  return q, k_slots, v_slots, _means(sums.sum(3), args[4].shape[0], valid)


_by_kernel.defvjp(
  lambda *args: (_by_kernel(*args), args[2:]),
  lambda valid, eps, args, cotangents: jax.vjp(functools.partial(by_xla, valid, eps), *args)[1](cotangents),
)
