"""The forward kernel: one program per query tile, online softmax in base 2 over the tile's blocks.

The two computing warpgroups take turns: while one multiplies on the tensor cores, the other does its softmax.

Letters: B batch, T query rows, S key slots, N heads, H head dim, Q query tiles, J slots loaded of a block, W blocks per
step.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pbsa import mosaic_sm90_parts as parts
from pallas_kernels.pbsa.lists import TILE
from pallas_kernels.pbsa.mosaic_sm90_parts import LOG2E, ROWS, WARPGROUPS, Call


def forward(call: Call, q, k, v, prefix_k, ids, counts, prefix_blocks, layer=None, remainder=False):
  """Runs the kernel.

  Args:
    q: [B,T,N,H]. k, v: [B,S,N,H], or [L,B,S,N,H] with layer int32 [1]. prefix_k: [B,P,N,H] or None.
    ids, counts: the lists. prefix_blocks: int32 [1].
    remainder: also return what rounding took from out, so that out + rest is right to 16 bits or more.

  Returns:
    out [B,T,N,H], lse float32 [B,N,T], and rest like out (or None).
  """
  b, t, n, h = q.shape
  width, stages = call.config.forward_width, call.config.forward_stages
  columns = width * call.loaded(width)
  layer = jnp.zeros_like(prefix_blocks) if layer is None else layer
  rows_of_memory, slots = parts.memory(k, v, prefix_k)

  def pbsa_forward(*refs, smem, barriers):
    q_ref, *memory = refs[:8]
    out_ref, lse_ref, *rest_ref = refs[8:]
    q_s, k_s, v_s, lse_s = smem
    q_full, (k_full, k_free), (v_full, v_free), turn = barriers
    where = batch, head, tile = tuple(lax.axis_index(x) for x in ("batch", "head", "tile"))
    wg = lax.axis_index("wg")
    blocks, steps, load = parts.walk(call, width, where, slots, memory, k_s, v_s, k_full, v_full)

    pl.when(wg == WARPGROUPS)(lambda: parts.fetch(steps, stages, (k_free, v_free), load))

    @pl.when(wg < WARPGROUPS)
    def _():
      plgpu.set_max_registers(240, action="increase")
      mine, my_q = pl.ds(parts.row(batch * t, tile * TILE, wg * ROWS), ROWS), q_s.at[wg]
      plgpu.copy_gmem_to_smem(q_ref.at[mine, head], my_q, q_full.at[wg])
      plgpu.barrier_wait(q_full.at[wg])

      def take_turns():
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

      def wait_for_keys(i):
        pl.when(i < steps)(lambda: plgpu.barrier_wait(k_full.at[lax.rem(i, jnp.int32(stages))]))

      def step(i, carry):
        acc, m, l = carry
        slot = lax.rem(i, jnp.int32(stages))

        def multiply(s):
          plgpu.wgmma(s, my_q, k_s.at[slot].T)
          take_turns()
          return s[...]

        s = pl.run_scoped(multiply, plgpu.ACC((ROWS, columns), jnp.float32))
        plgpu.barrier_arrive(k_free.at[slot])
        s = parts.hide(call, width, i, blocks, s, -jnp.inf)
        new_m = jnp.maximum(m, s.max(1) * (call.scale * LOG2E))
        p = jnp.exp2(s * (call.scale * LOG2E) - parts.over_columns(new_m, s.shape))
        alpha = jnp.exp2(m - new_m)
        acc *= parts.over_columns(alpha, acc.shape)
        l = l * alpha + p.sum(1)
        # The barrier keeps the softmax whole on this side of the turn.
        acc, l, m, p = lax.optimization_barrier((acc, l, new_m, p.astype(q.dtype)))
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(v_full.at[slot])
        plgpu.barrier_wait(turn)
        (acc,) = parts.accumulate(call, (acc, lambda: p, v_s.at[slot]), during=lambda: wait_for_keys(i + 1))
        plgpu.barrier_arrive(v_free.at[slot])
        return acc, m, l

      wait_for_keys(0)
      pl.when(wg == 1)(take_turns)
      start = (
        parts.filled((ROWS, h), 0),
        parts.filled((ROWS,), -jnp.inf, parts.BY_ROW),
        parts.filled((ROWS,), 0, parts.BY_ROW),
      )
      acc, m, l = lax.fori_loop(0, steps, step, start)
      pl.when(wg == 0)(take_turns)

      lse_s[wg] = m / LOG2E + jnp.log(l)  # -inf where nothing was read
      acc *= parts.over_columns(1 / jnp.where(l > 0, l, 1), acc.shape)
      out = acc.astype(q.dtype)
      my_q[...] = out
      plgpu.commit_smem()
      plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[batch, head, pl.ds(tile * TILE + wg * ROWS, ROWS)])
      plgpu.copy_smem_to_gmem(my_q, out_ref.at[mine, head])
      plgpu.wait_smem_to_gmem(0)
      if rest_ref:
        my_q[...] = (acc - out.astype(jnp.float32)).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(my_q, rest_ref[0].at[mine, head])
        plgpu.wait_smem_to_gmem(0)

  rows = jax.ShapeDtypeStruct((b * t, n, h), q.dtype)
  out, lse, *rest = parts.launch(
    pbsa_forward,
    call,
    [rows, jax.ShapeDtypeStruct((b, n, t), jnp.float32), *[rows] * remainder],
    dict(batch=b, head=n, tile=t // TILE),
    smem=(
      parts.tiled((WARPGROUPS, ROWS, h), q.dtype),
      *[parts.tiled((stages, columns, h), q.dtype)] * 2,
      plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
    ),
    barriers=(
      plgpu.Barrier(num_barriers=WARPGROUPS),
      *[parts.ring(stages, width)] * 2,
      plgpu.Barrier(num_arrivals=WARPGROUPS),
    ),
  )(parts.flat(q), *rows_of_memory, ids, counts, prefix_blocks, layer)
  return out.reshape(q.shape), lse, (rest[0].reshape(q.shape) if remainder else None)
