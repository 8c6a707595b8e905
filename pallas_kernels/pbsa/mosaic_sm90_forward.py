"""The forward kernel: one program per query tile, or piece of one, online softmax in base 2 over the tile's blocks.

A warpgroup's softmax runs beside its own product with the values, and beside the other warpgroup's products.

Letters: B batch, T query rows, S key slots, N heads, H head dim, Q query tiles, J slots loaded of a block, W blocks per
step.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pbsa import mosaic_sm90_parts as parts
from pallas_kernels.pbsa import mosaic_sm90_pieces as pieces
from pallas_kernels.pbsa.lists import TILE
from pallas_kernels.pbsa.mosaic_sm90_parts import LOG2E, ROWS, WARPGROUPS, Call


def forward(call: Call, q, k, v, prefix_k, ids, counts, prefix_blocks, layer=None, remainder=False):
  """Runs the kernel.

  Args:
    q: [B,T,N,H]. k, v: [B,S,N,H], or [L,B,S,N,H] with layer int32 [1]. prefix_k: [B,P,N,H], [L,B,P,N,H] or None.
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
  cut = pieces.cut(call, counts.shape)

  def pbsa_forward(*refs, smem, barriers):
    q_ref, *memory = refs[:8]
    out_ref, lse_ref, *more = refs[8:]
    rest_ref, sum_refs = more[:remainder], more[remainder:]
    q_s, k_s, v_s, lse_s = smem
    q_full, (k_full, k_free), (v_full, v_free) = barriers
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    where, share = cut.work(program)
    batch, head, tile = where
    blocks, steps, load, ends = parts.walk(call, width, where, share, slots, memory, k_s, v_s, k_full, v_full)

    pl.when(wg == WARPGROUPS)(lambda: parts.fetch(steps, stages, (k_free, v_free), load))

    @pl.when(wg < WARPGROUPS)
    def _():
      plgpu.set_max_registers(240, action="increase")
      mine, my_q = pl.ds(parts.row(batch * t, tile * TILE, wg * ROWS), ROWS), q_s.at[wg]
      plgpu.copy_gmem_to_smem(q_ref.at[mine, head], my_q, q_full.at[wg])
      plgpu.barrier_wait(q_full.at[wg])

      at = parts.in_ring(stages)

      def scores(i, then):
        """then(s), the product of step i's scores having started."""

        def start(s):
          plgpu.wgmma(s, my_q, at(k_s, i).T)
          return then(s)

        return pl.run_scoped(start, plgpu.ACC((ROWS, columns), jnp.float32))

      def wait_for_keys(i):
        pl.when(i < steps)(lambda: plgpu.barrier_wait(at(k_full, i)))

      def softmax(i, own_ends, s, m, l):
        s = parts.hide(call, width, i, blocks, own_ends, s, -jnp.inf)
        new_m = jnp.maximum(m, s.max(1) * (call.scale * LOG2E))
        p = jnp.exp2(s * (call.scale * LOG2E) - parts.over_columns(new_m, s.shape))
        alpha = jnp.exp2(m - new_m)
        return p, new_m, l * alpha + p.sum(1), alpha

      def step(i, carry):
        """The next step's scores and this one's values are multiplied in one go; the next softmax runs beside the values."""
        acc, p, m, l = carry
        next_ends = ends(i + 1)  # early: what is read from memory takes its time

        def next_softmax(s):
          s = plgpu.wgmma_accumulator_load(s, wait_n=1)
          plgpu.barrier_arrive(at(k_free, i + 1))
          found = lax.optimization_barrier(softmax(i + 1, next_ends, s, m, l))
          wait_for_keys(i + 2)  # a branch here, or ptxas moves the softmax behind the wait for the values
          return found

        plgpu.barrier_wait(at(v_full, i))
        (acc,), (p, m, l, alpha) = parts.accumulate(
          call,
          (acc, lambda: p, at(v_s, i)),
          within=lambda body: scores(i + 1, body),
          during=next_softmax,
          results=(parts.filled((ROWS, columns), 0), m, l, m),
        )
        plgpu.barrier_arrive(at(v_free, i))
        # Rounded only now: until here the registers of the old p were being read.
        return acc * parts.over_columns(alpha, acc.shape), p.astype(q.dtype), m, l

      def read():
        first_ends = ends(0)
        wait_for_keys(0)
        s = scores(0, lambda s: s[...])
        plgpu.barrier_arrive(at(k_free, 0))
        p, m, l, _ = softmax(0, first_ends, s, *nothing()[1:])
        wait_for_keys(1)
        acc, p, m, l = lax.fori_loop(0, steps - 1, step, (nothing()[0], p.astype(q.dtype), m, l))
        last = steps - 1
        plgpu.barrier_wait(at(v_full, last))
        (acc,), _ = parts.accumulate(call, (acc, lambda: p, at(v_s, last)))
        plgpu.barrier_arrive(at(v_free, last))
        return acc, m, l

      def nothing():
        vector = lambda value: parts.filled((ROWS,), value, parts.BY_ROW)
        return parts.filled((ROWS, h), 0), vector(-jnp.inf), vector(0)

      acc, m, l = lax.cond(steps > 0, read, nothing)

      def whole():
        value, lse_s[wg] = finish(acc, m, l)
        out = value.astype(q.dtype)
        my_q[...] = out
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(lse_s.at[wg], lse_ref.at[batch, head, pl.ds(tile * TILE + wg * ROWS, ROWS)])
        plgpu.copy_smem_to_gmem(my_q, out_ref.at[mine, head])
        plgpu.wait_smem_to_gmem(0)
        if rest_ref:
          my_q[...] = (value - out.astype(jnp.float32)).astype(q.dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(my_q, rest_ref[0].at[mine, head])
          plgpu.wait_smem_to_gmem(0)

      cut.store(program, whole, (acc, m, l), sum_refs)

  rows = jax.ShapeDtypeStruct((b * t, n, h), q.dtype)
  found = parts.launch(
    pbsa_forward,
    call,
    [rows, jax.ShapeDtypeStruct((b, n, t), jnp.float32), *[rows] * remainder, *cut.sums(h, 0, 0)],
    dict(program=cut.programs),
    smem=(
      parts.tiled((WARPGROUPS, ROWS, h), q.dtype),
      *[parts.tiled((stages, columns, h), q.dtype)] * 2,
      plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
    ),
    barriers=(
      plgpu.Barrier(num_barriers=WARPGROUPS),
      *[parts.ring(stages, width)] * 2,
    ),
  )(parts.flat(q), *rows_of_memory, ids, counts, prefix_blocks, layer)

  def total(of_pieces):
    """The online softmax's last steps, each with all that a piece has read."""
    m = functools.reduce(jnp.maximum, (m for _, m, _ in of_pieces))
    shift = jnp.where(m == -jnp.inf, 0, m)  # a tile that reads nothing keeps exp2(-inf) = 0
    acc, l = 0, 0
    for part, own_m, own_l in of_pieces:
      alpha = jnp.exp2(own_m - shift)
      acc, l = acc + part * parts.over_columns(alpha, part.shape), l + own_l * alpha
    acc, lse = finish(acc, m, l)
    return acc, lse, *[acc - acc.astype(q.dtype).astype(jnp.float32)] * remainder

  own = 2 + remainder
  out, lse, *rest = pieces.join(call, cut, found[:own], found[own:], total)
  return out.reshape(q.shape), lse, (rest[0].reshape(q.shape) if remainder else None)


def finish(acc, m, l):
  """The output in float32, and lse, -inf where nothing was read, of an online softmax's sums."""
  return acc * parts.over_columns(1 / jnp.where(l > 0, l, 1), acc.shape), m / LOG2E + jnp.log(l)
