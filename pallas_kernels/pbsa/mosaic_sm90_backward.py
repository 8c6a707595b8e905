"""The backward kernels: dq over each query tile's blocks, dk and dv over each block's query tiles; no atomics.

Both recompute the probabilities from lse, as p = exp2(scale log2(e) s - lse2), and need ds = p (dp - delta), where delta
holds the row sums of out dout, less lse's gradient. Logits are raw 16-bit products scaled in float32, as in the forward.

Letters: B batch, T query rows, S key slots, N heads, H head dim, Q query tiles, K key blocks, J slots loaded of a block,
W blocks per step.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pbsa import mosaic_sm90_parts as parts
from pallas_kernels.pbsa import mosaic_sm90_pieces as pieces
from pallas_kernels.pbsa.lists import BLOCK, TILE
from pallas_kernels.pbsa.mosaic_sm90_parts import LOG2E, ROWS, WARPGROUPS, Call


def backward_q(call: Call, q, k, v, prefix_k, ids, counts, prefix_blocks, dout, lse2, delta):
  """dq [B,T,N,H]; arguments as `forward`'s, with dout like q, and lse2, delta float32 [B,N,T]."""
  b, t, n, h = q.shape
  width, stages = call.config.dq_width, call.config.dq_stages
  columns = width * call.loaded(width)
  rows_of_memory, slots = parts.memory(k, v, prefix_k)
  cut = pieces.cut(call, counts.shape)

  def pbsa_dq(*refs, smem, barriers):
    q_ref, *memory = refs[:8]
    dout_ref, lse_ref, delta_ref, dq_ref, *sum_refs = refs[8:]
    q_s, dout_s, lse_s, delta_s, k_s, v_s = smem
    rows_full, (k_full, k_free), (v_full, v_free) = barriers
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    where, share = cut.work(program)
    batch, head, tile = where
    blocks, steps, load, ends = parts.walk(call, width, where, share, slots, memory, k_s, v_s, k_full, v_full)

    pl.when(wg == WARPGROUPS)(lambda: parts.fetch(steps, stages, (k_free, v_free), load))

    @pl.when(wg < WARPGROUPS)
    def _():
      plgpu.set_max_registers(240, action="increase")
      mine = pl.ds(parts.row(batch * t, tile * TILE, wg * ROWS), ROWS)
      scalars = pl.ds(tile * TILE + wg * ROWS, ROWS)
      for source, target in (
        (q_ref.at[mine, head], q_s),
        (dout_ref.at[mine, head], dout_s),
        (lse_ref.at[batch, head, scalars], lse_s),
        (delta_ref.at[batch, head, scalars], delta_s),
      ):
        plgpu.copy_gmem_to_smem(source, target.at[wg], rows_full.at[wg])
      plgpu.barrier_wait(rows_full.at[wg])
      my_lse, my_delta = (
        parts.over_columns(plgpu.load(x.at[wg], layout=parts.BY_ROW), (ROWS, columns)) for x in (lse_s, delta_s)
      )

      at = parts.in_ring(stages)

      def scores(i, then):
        """then(s, dp), the products of step i's keys and values having started."""

        # One accumulator inside the other, not side by side: then neither is cleared, its first product overwrites it.
        def start_s(s):
          plgpu.wgmma(s, q_s.at[wg], at(k_s, i).T)
          return pl.run_scoped(lambda dp: start_dp(s, dp), score)

        def start_dp(s, dp):
          plgpu.barrier_wait(at(v_full, i))
          plgpu.wgmma(dp, dout_s.at[wg], at(v_s, i).T)
          return then(s, dp)

        score = plgpu.ACC((ROWS, columns), jnp.float32)
        return pl.run_scoped(start_s, score)

      def gradient(i, own_ends, s, dp, later):
        """ds of step i; `later`: products that were started after its own."""
        p = jnp.exp2(plgpu.wgmma_accumulator_load(s, wait_n=1 + later) * (call.scale * LOG2E) - my_lse)
        ds = p * (plgpu.wgmma_accumulator_load(dp, wait_n=later) - my_delta)
        plgpu.barrier_arrive(at(v_free, i))
        return parts.hide(call, width, i, blocks, own_ends, ds, 0.0)

      def step(i, carry):
        """The next step's products and this one's part of dq in one go; the next ds is made beside the latter."""
        acc, ds = carry
        next_ends = ends(i + 1)  # early: what is read from memory takes its time

        def make_next(s, dp):
          next_ds = lax.optimization_barrier(gradient(i + 1, next_ends, s, dp, 1))
          wait_for_keys(i + 2)  # a branch here, or ptxas moves the above behind the wait for dq
          return [next_ds]

        (acc,), (next_ds,) = parts.accumulate(
          call,
          (acc, lambda: ds, at(k_s, i)),
          within=lambda body: scores(i + 1, body),
          during=make_next,
          results=[parts.filled((ROWS, columns), 0)],
        )
        plgpu.barrier_arrive(at(k_free, i))
        return acc, next_ds.astype(q.dtype)  # rounded only now: until here the registers of the old ds were being read

      def wait_for_keys(i):
        pl.when(i < steps)(lambda: plgpu.barrier_wait(at(k_full, i)))

      def read():
        first_ends = ends(0)
        wait_for_keys(0)
        ds = scores(0, lambda s, dp: gradient(0, first_ends, s, dp, 0)).astype(q.dtype)
        wait_for_keys(1)
        acc, ds = lax.fori_loop(0, steps - 1, step, (nothing(), ds))
        last = steps - 1
        (acc,), _ = parts.accumulate(call, (acc, lambda: ds, at(k_s, last)))
        plgpu.barrier_arrive(at(k_free, last))
        return acc

      nothing = lambda: parts.filled((ROWS, h), 0)
      acc = lax.cond(steps > 0, read, nothing)

      def whole():
        q_s[wg] = (acc * call.scale).astype(q.dtype)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_s.at[wg], dq_ref.at[mine, head])
        plgpu.wait_smem_to_gmem(0)

      cut.store(program, whole, (acc,), sum_refs)

  dq, *sums = parts.launch(
    pbsa_dq,
    call,
    [jax.ShapeDtypeStruct((b * t, n, h), q.dtype), *cut.sums(h)],
    dict(program=cut.programs),
    smem=(
      *[parts.tiled((WARPGROUPS, ROWS, h), q.dtype)] * 2,
      *[plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32)] * 2,
      *[parts.tiled((stages, columns, h), q.dtype)] * 2,
    ),
    barriers=(
      plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
      *[parts.ring(stages, width)] * 2,
    ),
  )(
    parts.flat(q),
    *rows_of_memory,
    ids,
    counts,
    prefix_blocks,
    jnp.zeros_like(prefix_blocks),
    parts.flat(dout),
    lse2,
    delta,
  )
  total = lambda of_pieces: [sum(acc for (acc,) in of_pieces) * call.scale]
  return pieces.join(call, cut, [dq], sums, total)[0].reshape(q.shape)


def backward_kv(call: Call, first: int, q, k, v, prefix_k, tiles, counts, prefix_blocks, dout, lse2, delta):
  """dk and dv of blocks first..first + R - 1.

  A program takes a few blocks in turn, so that the end of one hides the loading of the next: most have few readers.

  Args:
    tiles: int32 [B,N,R,Q], the query tiles that read a block. counts: int32 [B,N,R].
    The rest as in `backward_q`.

  Returns:
    two arrays [B,64 R,N,H]; a prefix block's dk is that of prefix_k where prefix_k was given.
  """
  b, t, n, h = q.shape
  stages = call.config.dkv_stages
  num = tiles.shape[2]
  in_turn = parts.in_turn(call, num * b * n, call.config.dkv_blocks)
  rows_of_memory, slots = parts.memory(k, v, prefix_k)

  def pbsa_dkv(*refs, smem, barriers):
    q_ref, k_ref, v_ref, prefix_ref, tiles_ref, counts_ref, count_ref = refs[:7]
    dout_ref, lse_ref, delta_ref, dk_ref, dv_ref = refs[7:]
    k_s, v_s, q_s, dout_s, lse_s, delta_s, part_s = smem
    (block_full, block_free), (q_full, q_free), (dout_full, dout_free), swap = barriers
    # A head's blocks vary fastest: programs that run beside each other share its queries.
    batch, head, program, wg = (lax.axis_index(x) for x in ("batch", "head", "program", "wg"))
    turns = jnp.minimum(num - program * in_turn, in_turn)

    def work(turn):
      block = program * in_turn + turn
      return block, counts_ref[batch, head, block]

    @pl.when(wg == WARPGROUPS)
    def _():
      def load_block(turn, block):
        at, slot = first + block, lax.rem(turn, jnp.int32(2))

        def copy(source, base, target):
          rows = pl.ds(parts.row(base, at * BLOCK), BLOCK)
          plgpu.copy_gmem_to_smem(source.at[rows, head], target.at[slot], block_full.at[slot])

        own = lambda: copy(k_ref, batch * slots[0], k_s)
        if slots[1]:
          pl.when(at >= count_ref[0])(own)
          pl.when(at < count_ref[0])(lambda: copy(prefix_ref, batch * slots[1], k_s))
        else:
          own()
        copy(v_ref, batch * slots[0], v_s)

      def load_rows(block, step, slot):
        tile = tiles_ref[batch, head, block, step]
        rows, scalars = pl.ds(parts.row(batch * t, tile * TILE), TILE), pl.ds(tile * TILE, TILE)

        def pair(matrix, ring, vector, vector_ring, full):
          plgpu.copy_gmem_to_smem(matrix.at[rows, head], ring.at[slot], full.at[slot])
          plgpu.copy_gmem_to_smem(vector.at[batch, head, scalars], vector_ring.at[slot], full.at[slot])

        return (
          lambda: pair(q_ref, q_s, lse_ref, lse_s, q_full),
          lambda: pair(dout_ref, dout_s, delta_ref, delta_s, dout_full),
        )

      def take(turn, done):
        block, steps = work(turn)
        pl.when(turn >= 2)(lambda: plgpu.barrier_wait(block_free.at[lax.rem(turn, jnp.int32(2))]))
        load_block(turn, block)
        load = lambda step, slot: load_rows(block, step - done, slot)
        parts.produce(done, done + steps, stages, (q_free, dout_free), load)
        return done + steps

      plgpu.set_max_registers(24, action="decrease")
      done = lax.fori_loop(0, turns, take, jnp.int32(0))
      parts.drain(done, stages, (q_free, dout_free))
      parts.drain(turns, 2, (block_free,))

    @pl.when(wg < WARPGROUPS)
    def _():
      plgpu.set_max_registers(240, action="increase")
      half = pl.ds(wg * ROWS, ROWS)

      def take(turn, done):
        block, steps = work(turn)
        mine = lax.rem(turn, jnp.int32(2))
        my_k, my_v = k_s.at[mine], v_s.at[mine]
        plgpu.barrier_wait(block_full.at[mine])

        def step(i, carry):
          dk, dv = carry
          slot = lax.rem(i, jnp.int32(stages))
          my_q, my_dout = q_s.at[slot, half], dout_s.at[slot, half]

          def over_rows(x):  # [128] of a slot -> [64 slots of the block, 64 query rows]
            x = plgpu.load(x.at[slot, half], layout=parts.BY_COLUMN)
            return lax.broadcast_in_dim(x, (BLOCK, ROWS), [1])

          def gradients(s, dp):  # both transposed: a block's slots by query rows
            plgpu.wgmma(s, my_k, my_q.T)
            plgpu.barrier_wait(dout_full.at[slot])
            plgpu.wgmma(dp, my_v, my_dout.T)
            p = jnp.exp2(plgpu.wgmma_accumulator_load(s, wait_n=1) * (call.scale * LOG2E) - lse)
            delta = over_rows(delta_s)
            ds = lambda: p * (plgpu.wgmma_accumulator_load(dp, wait_n=1) - delta)  # while dv multiplies
            sums, _ = parts.accumulate(
              call, (dv, lambda: p.astype(q.dtype), my_dout), (dk, lambda: ds().astype(q.dtype), my_q)
            )
            return sums

          plgpu.barrier_wait(q_full.at[slot])
          lse = over_rows(lse_s)  # early: a load from shared memory takes its time
          dv, dk = pl.run_scoped(gradients, *[plgpu.ACC((BLOCK, ROWS), jnp.float32)] * 2)
          plgpu.commit_smem()  # lse and delta were read here before the next copy replaces them
          plgpu.barrier_arrive(q_free.at[slot])
          plgpu.barrier_arrive(dout_free.at[slot])
          return dk, dv

        zero = parts.filled((BLOCK, h), 0)
        dk, dv = lax.fori_loop(done, done + steps, step, (zero, zero))

        def meet():
          plgpu.barrier_arrive(swap)
          plgpu.barrier_wait(swap)

        def finish(total, factor, target, out_ref):
          row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, h), 0, layout=plgpu.Layout.WGMMA)
          target[...] = jnp.where(row < call.valid_slots(first + block), total * factor, 0).astype(q.dtype)
          plgpu.commit_smem()
          plgpu.copy_smem_to_gmem(target, out_ref.at[pl.ds(parts.row((batch * num + block) * BLOCK), BLOCK), head])
          plgpu.wait_smem_to_gmem(0)

        # Each warpgroup has half of both sums: the first gets the other's dk, then gives its own dv.
        @pl.when(wg == 0)
        def _():
          meet()
          total = dk + part_s[...]
          part_s[...] = dv
          meet()
          finish(total, call.scale, my_k, dk_ref)

        @pl.when(wg == 1)
        def _():
          part_s[...] = dk
          meet()
          meet()
          finish(dv + part_s[...], 1.0, my_v, dv_ref)

        plgpu.barrier_arrive(block_free.at[mine])
        return done + steps

      lax.fori_loop(0, turns, take, jnp.int32(0))

  rows = jax.ShapeDtypeStruct((b * num * BLOCK, n, h), q.dtype)
  dk, dv = parts.launch(
    pbsa_dkv,
    call,
    [rows, rows],
    dict(batch=b, head=n, program=-(-num // in_turn)),
    smem=(
      *[parts.tiled((2, BLOCK, h), q.dtype)] * 2,
      *[parts.tiled((stages, TILE, h), q.dtype)] * 2,
      *[plgpu.SMEM((stages, TILE), jnp.float32)] * 2,
      parts.tiled((BLOCK, h), jnp.float32),
    ),
    barriers=(
      parts.ring(2, 2),
      *[parts.ring(stages, 2)] * 2,
      plgpu.Barrier(num_arrivals=WARPGROUPS),
    ),
  )(parts.flat(q), *rows_of_memory, tiles, counts, prefix_blocks, parts.flat(dout), lse2, delta)
  return dk.reshape(b, num * BLOCK, n, h), dv.reshape(b, num * BLOCK, n, h)
