"""The "mosaic_sm90" implementation: a warpgroup takes 64 queries of a head over the keys that differ, 64 at a time.

Most prompts fit one step, so what counts is how soon a program is done and how many share a multiprocessor: nothing is
loaded ahead, three programs hide each other's waiting.

Letters: B batch, T query rows, M rows of a prompt, N heads, H head dim.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import current_device
from pallas_kernels.pbsa import mosaic_sm90_parts as parts
from pallas_kernels.pbsa.mosaic_sm90_forward import finish
from pallas_kernels.pbsa.mosaic_sm90_parts import BY_COLUMN, BY_ROW, LOG2E, ROWS, Call

KEYS = 64  # of a step


def unsupported(q, k) -> str | None:
  """Why this implementation cannot serve a call, or None."""
  device = current_device()
  if getattr(device, "compute_capability", None) != "9.0":
    return f"implementation: mosaic_sm90 wants a Hopper GPU (wgmma), not {device.device_kind}"
  if q.dtype not in (jnp.bfloat16, jnp.float16):
    return f"product: dtype {q.dtype}; mosaic_sm90 wants bfloat16 or float16"
  if q.shape[-1] not in (64, 128):
    return f"product: head dim {q.shape[-1]}; mosaic_sm90 wants 64 or 128"
  if q.shape[1] % 8 or q.shape[1] < ROWS:
    return f"product: T = {q.shape[1]} rows; mosaic_sm90 wants a multiple of 8, at least {ROWS}"
  if k.shape[1] % KEYS:
    return f"k: M = {k.shape[1]} rows; mosaic_sm90 wants a multiple of {KEYS}"
  return None


def few_keys(width, eps, q, vectors, squares, k, v, distinct, interpret=None):
  """See `api.few_keys`."""
  (b, t, n, h), m = q.shape, k.shape[1]
  call, tiles = Call(h**-0.5, KEYS, interpret=interpret), -(-t // ROWS)

  def few_keys(q_ref, vectors_ref, squares_ref, k_ref, v_ref, distinct_ref, out_ref, smem, barriers):
    q_s, k_s, v_s = smem
    q_full, k_full, v_full = barriers
    batch, head, tile = (lax.axis_index(x) for x in ("batch", "head", "tile"))
    differ = distinct_ref[batch]
    alike = parts.filled((ROWS,), (m + 1 - differ).astype(jnp.float32), BY_ROW)
    weight = parts.over_columns(jnp.log(alike) * LOG2E, (ROWS, KEYS))
    # Where T is no multiple of a tile's rows, the last tile begins early.
    first = parts.row(batch * t, jnp.minimum(tile * ROWS, t - ROWS))
    steps = lax.div(differ + (KEYS - 1), jnp.int32(KEYS))

    def take(i):
      rows = pl.ds(parts.row(batch * m, i * KEYS), KEYS)
      plgpu.copy_gmem_to_smem(k_ref.at[rows, head], k_s, k_full)
      plgpu.copy_gmem_to_smem(v_ref.at[rows, head], v_s, v_full)

    plgpu.copy_gmem_to_smem(q_ref.at[pl.ds(first, ROWS), head], q_s, q_full)
    take(jnp.int32(0))
    wide = lambda ref, layout: plgpu.load(ref, layout=layout, optimized=False).astype(jnp.float32)
    bias, norm = (lax.broadcast_in_dim(wide(vectors_ref.at[i, head], BY_COLUMN), (ROWS, h), [1]) for i in range(2))
    scale = lax.rsqrt(wide(squares_ref.at[pl.ds(first, ROWS)], BY_ROW) * (1 / width) + eps)
    plgpu.barrier_wait(q_full)
    x = plgpu.load(q_s, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
    q_s[...] = ((x + bias) * parts.over_columns(scale, x.shape) * norm).astype(q.dtype)
    plgpu.commit_smem()

    def step(i, carry):
      acc, top, total = carry
      plgpu.barrier_wait(k_full)

      def scores(s):
        plgpu.wgmma(s, q_s, k_s.T)
        return s[...]

      s = pl.run_scoped(scores, plgpu.ACC((ROWS, KEYS), jnp.float32))
      key = i * KEYS + plgpu.broadcasted_iota(jnp.int32, s.shape, 1, layout=plgpu.Layout.WGMMA)
      s = s * (call.scale * LOG2E) + jnp.where(key == differ - 1, weight, 0.0)
      s = jnp.where(key < differ, s, -jnp.inf)
      new_top = jnp.maximum(top, s.max(1))
      p = jnp.exp2(s - parts.over_columns(new_top, s.shape))
      alpha = jnp.exp2(top - new_top)
      plgpu.barrier_wait(v_full)
      acc = acc * parts.over_columns(alpha, acc.shape)
      (acc,), _ = parts.accumulate(call, (acc, lambda: p.astype(q.dtype), v_s))
      pl.when(i + 1 < steps)(lambda: take(i + 1))
      return acc, new_top, total * alpha + p.sum(1)

    vector = lambda value: parts.filled((ROWS,), value, BY_ROW)
    acc, top, total = lax.fori_loop(0, steps, step, (parts.filled((ROWS, h), 0), vector(-jnp.inf), vector(0)))
    q_s[...] = finish(acc, top, total)[0].astype(q.dtype)
    plgpu.commit_smem()

    def write(begin):  # a tile's rows from there on
      rows = pl.ds(parts.row(first, begin), ROWS - begin)
      plgpu.copy_smem_to_gmem(q_s.at[pl.ds(begin, ROWS - begin)], out_ref.at[rows, head])

    overlap = -t % ROWS  # rows of the last tile that are the one before's
    if overlap:
      pl.when(tile < tiles - 1)(lambda: write(0))
      pl.when(tile == tiles - 1)(lambda: write(overlap))
    else:
      write(0)
    plgpu.wait_smem_to_gmem(0)

  out = parts.launch(
    few_keys,
    call,
    jax.ShapeDtypeStruct((b * t, n, h), q.dtype),
    dict(batch=b, head=n, tile=tiles),
    warpgroups=1,
    smem=(parts.tiled((ROWS, h), q.dtype), *[parts.tiled((KEYS, h), q.dtype)] * 2),
    barriers=[plgpu.Barrier()] * 3,
  )(parts.flat(q), vectors, squares.reshape(-1), parts.flat(k), parts.flat(v), distinct)
  return out.reshape(q.shape)
