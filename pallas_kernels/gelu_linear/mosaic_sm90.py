"""The "mosaic_sm90" implementation: a tile's GELU runs beside the next tile's product, so that tensor cores do not wait for it.

Programs stay on their multiprocessor and take one tile after the other. A program has three warpgroups: two multiply, each for
64 of a tile's 128 rows, the third starts copies into a ring of shared-memory slots. A finished sum is rounded into half its
registers and leaves these a sixteenth at a time, one in each of the next tile's first steps: so little at once that its bias,
GELU and store take less time than the step's products, beside which they run.

Letters: R rows, K inputs, F outputs.
"""

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
PIECES, PIECE = 16, COLUMNS // 16  # columns finished in a step
COPIED = 4 * PIECE  # columns that one copy takes to memory
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
  (k, f), least = kernel.shape, PIECES * DEPTH
  if k % DEPTH or k < least or f % COLUMNS:
    return (
      f"kernel: shape {kernel.shape}; mosaic_sm90 wants a multiple of {DEPTH} from {least} on, and one of {COLUMNS}"
    )
  return None


def gelu_linear(x, kernel, bias, multiprocessors, interpret=None):
  """See `api.gelu_linear`. multiprocessors: how many programs run at a time."""
  (r, k), f = x.shape, kernel.shape[1]
  rows, steps = -(-r // TILE), k // DEPTH
  tiles = rows * (f // COLUMNS)
  programs = min(multiprocessors, tiles)

  def gelu_linear(x_ref, kernel_ref, bias_ref, out_ref, x_s, kernel_s, bias_s, out_s, full, free, bias_full):
    program, wg = lax.axis_index("program"), lax.axis_index("wg")
    mine = lax.div(tiles - 1 - program, programs) + 1
    at, of_tile = parts.in_ring(STAGES), parts.in_ring(2)

    def place(i):
      """The first row and column of this program's i-th tile."""
      tile = program + i * programs
      return lax.rem(tile, jnp.int32(rows)) * TILE, lax.div(tile, jnp.int32(rows)) * COLUMNS

    def load(step, slot):
      i, j = (op(step, jnp.int32(steps)) for op in (lax.div, lax.rem))
      row, column = place(i)
      depth, columns = pl.ds(j * DEPTH, DEPTH), pl.ds(column, COLUMNS)
      copy = plgpu.copy_gmem_to_smem

      def start():
        copy(x_ref.at[pl.ds(row, TILE), depth], x_s.at[slot], full.at[slot])
        copy(kernel_ref.at[depth, columns], kernel_s.at[slot], full.at[slot])
        # In place of that of the last tile but one, which left beside the last one: whose steps are done, as this slot is free.
        pl.when(j == STAGES)(lambda: copy(bias_ref.at[columns], of_tile(bias_s, i), of_tile(bias_full, i)))

      return (start,)

    def leave(i, piece, rounded):
      """Finishes a piece of the i-th tile's sum, rounded; the last one of a copy starts it."""
      copied, first = divmod(piece * PIECE, COPIED)
      slot = out_s.at[wg, copied % 2]
      bias = plgpu.load(of_tile(bias_s, i).at[pl.ds(piece * PIECE, PIECE)], layout=BY_COLUMN, optimized=False).astype(
        jnp.float32
      )
      y = gelu(rounded.astype(jnp.float32) + lax.broadcast_in_dim(bias, rounded.shape, [1]))
      if first == 0:
        plgpu.wait_smem_to_gmem(1, wait_read_only=True)  # the slot's last copy is the last but one
      slot[:, first : first + PIECE] = y.astype(out_s.dtype)
      if first == COPIED - PIECE:
        row, column = place(i)
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(slot, out_ref.at[pl.ds(row + wg * ROWS, ROWS), pl.ds(column + copied * COPIED, COPIED)])

    def tile(i, before):
      first = i * steps

      def multiply(acc):
        def step(j, beside=lambda: None):
          plgpu.barrier_wait(at(full, first + j))
          plgpu.wgmma(acc, at(x_s, first + j).at[pl.ds(wg * ROWS, ROWS)], at(kernel_s, first + j))
          plgpu.wgmma_wait(1)  # the step before is done
          pl.when(j > 0)(lambda: plgpu.barrier_arrive(at(free, first + j - 1)))
          beside()

        pl.when(i > 0)(lambda: plgpu.barrier_wait(of_tile(bias_full, i - 1)))
        for piece, rounded in enumerate(before):
          step(piece, lambda piece=piece, rounded=rounded: pl.when(i > 0)(lambda: leave(i - 1, piece, rounded)))
        pl.loop(PIECES, steps)(step)
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
      last = lax.fori_loop(0, mine, tile, (nothing,) * PIECES)
      plgpu.barrier_wait(of_tile(bias_full, mine - 1))
      for piece, rounded in enumerate(last):
        leave(mine - 1, piece, rounded)
      plgpu.wait_smem_to_gmem(0)

  narrow = plgpu.TilingTransform((8, PIECE)), plgpu.SwizzleTransform(PIECE * x.dtype.itemsize)
  return plgpu.kernel(
    gelu_linear,
    out_type=jax.ShapeDtypeStruct((r, f), x.dtype),
    scratch_types=dict(
      x_s=parts.tiled((STAGES, TILE, DEPTH), x.dtype),
      kernel_s=parts.tiled((STAGES, DEPTH, COLUMNS), x.dtype),
      bias_s=plgpu.SMEM((2, COLUMNS), x.dtype),
      out_s=plgpu.SMEM((WARPGROUPS, 2, ROWS, COPIED), x.dtype, transforms=narrow),
      full=plgpu.Barrier(num_arrivals=2, num_barriers=STAGES),
      free=plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=STAGES),
      bias_full=plgpu.Barrier(num_arrivals=1, num_barriers=2),
    ),
    grid=(programs,),
    grid_names=("program",),
    num_threads=WARPGROUPS + 1,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    interpret=interpret,
    kernel_name="gelu_linear",
  )(x, kernel, bias)


def gelu(y):
  c, half = math.sqrt(2 / math.pi), 0.5 * y
  return half * jnp.tanh(y * (c + (0.044715 * c) * (y * y))) + half
