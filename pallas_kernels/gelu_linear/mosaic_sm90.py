"""The "mosaic_sm90" implementation: a tile's GELU runs beside the next tile's product, so that tensor cores do not wait for it.

Programs stay on their multiprocessor and take one tile after the other. A program has three warpgroups: two multiply, each for
64 of a tile's 128 rows, the third starts copies into a ring of shared-memory slots. A finished sum is rounded into half its
registers and leaves these a quarter at a time, in the next tile's first steps, each while two of these are multiplied.

Programs come in pairs, which take two tiles of the same columns at once: each copies half of the weights' part to both. One
program alone would ask more of the cache between memory and multiprocessors than it gives at the tensor cores' rate.

Letters: R rows, K inputs, F outputs.
"""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import current_device
from pallas_kernels.pbsa import mosaic_sm90_parts as parts
from pallas_kernels.pbsa.mosaic_sm90_parts import BY_COLUMN, ROWS, WARPGROUPS

TILE, COLUMNS = WARPGROUPS * ROWS, 256  # of a tile
DEPTH = 64  # inputs multiplied in a step
PIECES, PIECE = 4, COLUMNS // 4  # columns that leave at a time
STAGES = 4


def unsupported(x, kernel) -> str | None:
  """Why this implementation cannot serve a call, or None."""
  device = current_device()
  if getattr(device, "compute_capability", None) != "9.0":
    return f"implementation: mosaic_sm90 wants a Hopper GPU (wgmma), not {device.device_kind}"
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x: dtype {x.dtype}; mosaic_sm90 wants bfloat16 or float16"
  if x.shape[0] % 8:
    return f"x: {x.shape[0]} rows; mosaic_sm90 wants a multiple of 8"
  (k, f), least = kernel.shape, 2 * PIECES * DEPTH
  if k % DEPTH or k < least or f % COLUMNS:
    return (
      f"kernel: shape {kernel.shape}; mosaic_sm90 wants a multiple of {DEPTH} from {least} on, and one of {COLUMNS}"
    )
  return None


def gelu_linear(x, kernel, bias, multiprocessors, interpret=None):
  """See `api.gelu_linear`. multiprocessors: how many programs run at a time."""
  (r, k), f = x.shape, kernel.shape[1]
  tiles, columns, steps = -(-r // TILE), f // COLUMNS, k // DEPTH
  # Two tiles of the same columns are a pair's work; of an odd number the last one's columns are taken two at a time.
  alike = tiles // 2 * columns
  units = alike + tiles % 2 * -(-columns // 2)
  pairs = min(multiprocessors // 2, units)

  def gelu_linear(x_ref, kernel_ref, bias_ref, out_ref, x_s, kernel_s, out_s, full, free):
    pair, which, wg = (lax.axis_index(axis) for axis in ("pair", "which", "wg"))
    mine = lax.div(units - 1 - pair, pairs) + 1
    at = parts.in_ring(STAGES)

    def place(i):
      """The first row and column of this program's tile in the pair's i-th unit, whether its columns are also the other's, and
      whether there is such a tile."""
      unit = pair + i * pairs
      both, single = unit < alike, 2 * (unit - alike) + which
      of_two = lambda op: op(unit, jnp.int32(max(tiles // 2, 1)))
      row = jnp.where(both, 2 * of_two(lax.rem) + which, tiles - 1)
      column = jnp.where(both, of_two(lax.div), jnp.minimum(single, columns - 1))
      return row * TILE, column * COLUMNS, both, both | (single < columns)

    def load(step, slot):
      row, column, both, _ = place(lax.div(step, jnp.int32(steps)))
      depth = pl.ds(lax.rem(step, jnp.int32(steps)) * DEPTH, DEPTH)
      copy = functools.partial(
        plgpu.copy_gmem_to_smem, kernel_ref.at[depth, pl.ds(column, COLUMNS)], kernel_s.at[slot], full.at[slot]
      )

      def start():
        plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, TILE), depth], x_s.at[slot], full.at[slot])
        pl.when(both)(lambda: copy(collective_axes="which"))
        pl.when(jnp.logical_not(both))(copy)

      return (start,)

    def leave(i, piece, rounded):
      """Finishes a piece of the i-th tile's sum, rounded, and starts its copy; there is none before the first."""
      row, column, _, there = place(jnp.maximum(i, 0))
      there &= i >= 0
      mine = pl.ds(row + wg * ROWS, ROWS), pl.ds(column + piece * PIECE, PIECE)
      bias = plgpu.load(bias_ref.at[mine[1]], layout=BY_COLUMN, optimized=False).astype(jnp.float32)
      y = gelu(rounded.astype(jnp.float32) + lax.broadcast_in_dim(bias, rounded.shape, [1]))
      # The slot's last copy is the last but one; where none follows, that would not be so the next time.
      wait = lambda most: functools.partial(plgpu.wait_smem_to_gmem, most, wait_read_only=True)
      pl.when(there)(wait(1))
      pl.when(jnp.logical_not(there))(wait(0))
      slot = out_s.at[wg, piece % 2]
      slot[...] = y.astype(out_s.dtype)
      plgpu.commit_smem()
      pl.when(there)(lambda: plgpu.copy_smem_to_gmem(slot, out_ref.at[mine]))

    def tile(i, before):
      first = i * steps

      def multiply(acc):
        def step(j, beside=lambda: None):
          plgpu.barrier_wait(at(full, first + j))
          plgpu.wgmma(acc, at(x_s, first + j).at[pl.ds(wg * ROWS, ROWS)], at(kernel_s, first + j))
          beside()
          plgpu.wgmma_wait(1)  # the step before is done
          pl.when(j > 0)(lambda: plgpu.barrier_arrive(at(free, first + j - 1)))

        for piece, rounded in enumerate(before):
          step(2 * piece)
          step(2 * piece + 1, functools.partial(leave, i - 1, piece, rounded))
        pl.loop(2 * PIECES, steps)(step)
        return acc[...]

      acc = pl.run_scoped(multiply, plgpu.ACC((ROWS, COLUMNS), jnp.float32))
      plgpu.barrier_arrive(at(free, first + steps - 1))
      return tuple(acc[:, j * PIECE : (j + 1) * PIECE].astype(x.dtype) for j in range(PIECES))

    @pl.when(wg == WARPGROUPS)
    def _():
      plgpu.set_max_registers(24, action="decrease")
      parts.produce(0, mine * steps, STAGES, (free,), load)
      parts.drain(mine * steps, STAGES, (free,))

    @pl.when(wg < WARPGROUPS)
    def _():
      plgpu.set_max_registers(240, action="increase")
      nothing = plgpu.layout_cast(jnp.zeros((ROWS, PIECE), x.dtype), plgpu.Layout.WGMMA)
      for piece, rounded in enumerate(lax.fori_loop(0, mine, tile, (nothing,) * PIECES)):
        leave(mine - 1, piece, rounded)
      plgpu.wait_smem_to_gmem(0)

  return plgpu.kernel(
    gelu_linear,
    out_type=jax.ShapeDtypeStruct((r, f), x.dtype),
    scratch_types=dict(
      x_s=parts.tiled((STAGES, TILE, DEPTH), x.dtype),
      kernel_s=parts.tiled((STAGES, DEPTH, COLUMNS), x.dtype),
      out_s=parts.tiled((WARPGROUPS, 2, ROWS, PIECE), x.dtype),
      full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      free=plgpu.ClusterBarrier(collective_axes=("which",), num_arrivals=WARPGROUPS, num_barriers=STAGES),
    ),
    grid=(pairs,),
    grid_names=("pair",),
    cluster=(2,),
    cluster_names=("which",),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    interpret=interpret,
    kernel_name="gelu_linear",
  )(x, kernel, bias)


def gelu(y):
  return 0.5 * y * (1 + jnp.tanh(y * (1 + 0.044715 * y * y) * math.sqrt(2 / math.pi)))
