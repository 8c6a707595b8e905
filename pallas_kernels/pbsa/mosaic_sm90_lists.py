"""Lists from scores in one kernel: a warp finds a row's threshold by bisection of its bits, and sorts nothing.

A row's scores lie in registers, 32 to a register. As integers they are ordered like the scores, so the threshold is found bit
by bit, by counting; of equals, the last one taken is found the same way. What is chosen is then a mask of 32 bits for each
register, and the k-th entry of the list is the k-th bit that is set.

Letters: R rows, X scores of a row, G groups of 32.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import current_device

ROWS, LANES = 4, 32  # of a warpgroup: a row to a warp
WIDEST = 512
ROW = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, LANES), (1,))), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
BY_ROW = ROW.reduce(1)
NOTHING = np.float32(-np.inf).view(np.int32) ^ 0x7FFFFFFF  # -inf in order


def unsupported(scores) -> str | None:
  """Why this implementation cannot serve a call, or None."""
  *rows, x = scores.shape
  device = current_device()
  if getattr(device, "compute_capability", None) != "9.0":
    return f"implementation: mosaic_sm90 wants a Hopper GPU, not {device.device_kind}"
  if scores.dtype != jnp.float32:
    return f"scores: dtype {scores.dtype}; mosaic_sm90 wants float32"
  if np.prod(rows) % ROWS or not np.prod(rows) or x > WIDEST:
    return f"scores: {rows} rows of {x}; mosaic_sm90 wants a multiple of {ROWS} rows, of at most {WIDEST}"
  return None


def _in_order(scores):
  """int32, ordered as the scores are."""
  bits = lax.bitcast_convert_type(scores, jnp.int32)
  return bits ^ (lax.shift_right_arithmetic(bits, 31) & 0x7FFFFFFF)


def _bits_set(x):
  x = x - (lax.shift_right_logical(x, 1) & 0x55555555)
  x = (x & 0x33333333) + (lax.shift_right_logical(x, 2) & 0x33333333)
  return lax.shift_right_logical(((x + lax.shift_right_logical(x, 4)) & 0x0F0F0F0F) * 0x01010101, 24)


def _place_of_bit(mask, n):
  """Place of the n-th set bit, from 0."""
  place = jnp.zeros_like(n)
  for width in (16, 8, 4, 2, 1):
    below = _bits_set(lax.shift_right_logical(mask, place) & ((1 << width) - 1))
    place, n = jnp.where(n >= below, place + width, place), jnp.where(n >= below, n - below, n)
  return place


def top_lists(scores, budget, size: int, first, interpret=None):
  """See `lists.top_lists`; scores [R,X]."""
  r, x = scores.shape
  groups, out_groups = -(-x // LANES), -(-size // LANES)
  shape = (ROWS, LANES)

  def top_lists(scores_ref, budget_ref, first_ref, ids_ref, counts_ref):
    rows = pl.ds(pl.multiple_of(lax.axis_index("program") * ROWS, ROWS), ROWS)
    over = lambda a: lax.broadcast_in_dim(a, shape, [0])
    of_rows = lambda value: plgpu.layout_cast(jnp.full((ROWS,), value, jnp.int32), BY_ROW)
    lane = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=ROW)

    def count(condition):
      """How many of each row's entries satisfy condition(group)."""
      return sum(jnp.where(condition(g), 1, 0) for g in range(groups)).sum(1)

    keys = [
      _in_order(plgpu.load(scores_ref.at[rows, pl.ds(g * LANES, LANES)], layout=ROW, optimized=False))
      for g in range(groups)
    ]
    wanted = jnp.minimum(count(lambda g: keys[g] > NOTHING), jnp.minimum(budget_ref[0], size))

    def climb(bits: int, start, allowed):
      """The largest number from start on, in so many bits, that is allowed: if one is, so is every smaller one."""

      def step(i, found):
        higher = found + lax.shift_left(jnp.int32(1), jnp.int32(bits - 1) - i)
        return jnp.where(allowed(higher), higher, found)

      return lax.fori_loop(0, bits, step, of_rows(start))

    least = climb(32, np.iinfo(np.int32).min, lambda least: count(lambda g: keys[g] >= over(least)) >= wanted)

    ring = [g * LANES + lane - first_ref[0] for g in range(groups)]
    ring = [jnp.where(a < 0, a + x, a) for a in ring]
    missing = wanted - count(lambda g: keys[g] > over(least))
    equal = [jnp.where(key == over(least), a, WIDEST) for key, a in zip(keys, ring, strict=True)]
    last = climb((x - 1).bit_length(), 0, lambda last: count(lambda g: equal[g] < over(last)) < missing)

    chosen = [jnp.where(k > over(least), 1, jnp.where(e <= over(last), 1, 0)) for k, e in zip(keys, equal, strict=True)]
    masks = [over(lax.shift_left(a, lane).sum(1)) for a in chosen]
    starts = [0]
    for mask in masks:
      starts.append(starts[-1] + _bits_set(mask))

    @pl.loop(0, out_groups)
    def _(o):
      k = o * LANES + lane
      mask, n, base = masks[0], k, jnp.zeros_like(k)
      for g in range(1, groups):
        here = k >= starts[g]
        mask, n = jnp.where(here, masks[g], mask), jnp.where(here, k - starts[g], n)
        base = jnp.where(here, g * LANES, base)
      ids_ref[rows, pl.ds(pl.multiple_of(o * LANES, LANES), LANES)] = jnp.where(
        k < over(wanted), base + _place_of_bit(mask, n), x
      )

    counts_ref[rows] = wanted

  scalar = lambda a: jnp.asarray(a, jnp.int32).reshape(1)
  ids, counts = plgpu.kernel(
    top_lists,
    out_type=[jax.ShapeDtypeStruct((r, out_groups * LANES), jnp.int32), jax.ShapeDtypeStruct((r,), jnp.int32)],
    grid=(r // ROWS,),
    grid_names=("program",),
    compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
    interpret=interpret,
    kernel_name="top_lists",
  )(jnp.pad(scores, [(0, 0), (0, groups * LANES - x)], constant_values=-np.inf), scalar(budget), scalar(first))
  return ids[:, :size], counts
