"""The "mosaic_sm90" implementation: two warps hold a row in registers, so that a norm is a few shuffles and one exchange.

Rows go from memory to registers and back, once. A program takes some rows of one block, of q, k or v, two at a time, and reads
the next two before it works on these; several programs share a multiprocessor and hide each other's waiting.

Letters: B batch, T tokens of a chunk, N heads, H head dim, S slots of a layer, K blocks of a chunk, P programs a block.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import current_device
from pallas_kernels.pbsa import BLOCK

ROWS = 2  # at a time
MOST_STEPS = 6  # a program's
WIDEST = 5120  # of a row: 254 of 255 registers
# [rows, N, H / 2, 2]: a row to two warps, neighbouring pairs to neighbouring lanes, which then read 128 bytes in one go.
PAIRS = plgpu.Layout.TILED(plgpu.Tiling(((ROWS, 2, 32, 2),)), warp_dims=(-4, -3), lane_dims=(-2,), vector_dim=-1)
BY_ROW, BY_COLUMN, BY_ANGLE = PAIRS.reduce((1, 2, 3)), PAIRS.reduce(0), PAIRS.reduce((1, 3))


def unsupported(q, tokens: int, heads: tuple[int, int], valid: int) -> str | None:
  """Why this implementation cannot serve a call, or None. heads: (N, H)."""
  n, h = heads
  device = current_device()
  if getattr(device, "compute_capability", None) != "9.0":
    return f"implementation: mosaic_sm90 wants a Hopper GPU, not {device.device_kind}"
  if q.dtype != jnp.bfloat16:
    return f"q: dtype {q.dtype}; mosaic_sm90 wants bfloat16"
  if h % 64 or n % 2 or n * h > WIDEST:
    return (
      f"q: {n} heads of {h}; mosaic_sm90 wants an even number of heads of a multiple of 64, at most {WIDEST} in all"
    )
  blocks, short = -(-tokens // valid), tokens % valid
  if valid % ROWS or q.shape[1] % ROWS or blocks % 2 or short % ROWS:
    last = f", {short} in the last" * (short > 0)
    return f"valid: {blocks} blocks of {valid}{last}; mosaic_sm90 wants even numbers of all"
  return None


def to_slots(valid, eps, q, k, v, vectors, cos, sin, k_slots, v_slots, layer, first, interpret=None):
  """See `api.to_slots`; in place of means come the sums of each block's P parts, [3,B,K,P,N,H]."""
  (b, r, _), t = q.shape, cos.shape[0]
  n, h = k_slots.shape[-2:]
  blocks, groups, short = -(-t // valid), valid // ROWS, t % valid
  # A program's rows all hold tokens, or none do.
  steps = max(s for s in range(1, MOST_STEPS + 1) if math.gcd(groups, short // ROWS) % s == 0)
  parts = groups // steps

  def to_slots(*refs):
    products = refs[:3]
    vector_ref, cos_ref, sin_ref, layer_ref, first_ref, k_ref, v_ref, q_ref, sums_ref = refs[3:]
    which, batch, block, part = (lax.axis_index(x) for x in ("which", "batch", "block", "part"))
    shape = (ROWS, n, h // 2, 2)
    over = lambda x, *axes: lax.broadcast_in_dim(x, shape, axes)
    rows = lambda *places: pl.ds(pl.multiple_of(sum(places), ROWS), ROWS)
    row = lambda step: (part * steps + step) * ROWS  # of the block
    cached = (layer_ref[0] * b + batch) * k_slots.shape[2] + first_ref[0] * BLOCK

    def load(ref, layout=PAIRS):
      return plgpu.load(ref, layout=layout, optimized=False)

    def normed(x, i):
      size = (x * x).sum(3).sum(1).sum(1) * (1 / (n * h))
      return (
        x * over(lax.rsqrt(size + eps), 0) * over(load(vector_ref.at[3 + i], BY_COLUMN).astype(jnp.float32), 1, 2, 3)
      )

    def turned(x, step):
      token = rows(block * valid, row(step))
      c, s = (over(load(a.at[token], BY_ANGLE), 0, 2) for a in (cos_ref, sin_ref))
      first = plgpu.broadcasted_iota(jnp.int32, shape, 3, layout=PAIRS) == 0
      bits = lax.bitcast_convert_type(x, jnp.int32)  # a sum with zero is then no instruction
      member = lambda bits: lax.bitcast_convert_type(over(bits.sum(3), 0, 1, 2), jnp.float32)
      one, other = member(jnp.where(first, bits, 0)), member(jnp.where(first, 0, bits))
      return x * c + jnp.where(first, -other, one) * s

    def run(i, target, base):
      token = lambda step: rows(batch * r, block * valid, row(step))

      def take(step, carry):
        total, raw = carry
        later = load(products[i].at[token(jnp.minimum(step + 1, steps - 1))])
        x = raw.astype(jnp.float32) + over(load(vector_ref.at[i], BY_COLUMN).astype(jnp.float32), 1, 2, 3)
        x = (turned(normed(x, i), step) if i < 2 else x).astype(jnp.bfloat16)
        target[rows(base, block * BLOCK, row(step))] = x
        return total + x.astype(jnp.float32), later

      nothing = plgpu.layout_cast(jnp.zeros(shape, jnp.float32), PAIRS)

      def work():
        total, _ = lax.fori_loop(0, steps, take, (nothing, load(products[i].at[token(0)])))
        sums_ref[i, batch, block, part] = total.sum(0)

      def clear(row):
        target[rows(base, block * BLOCK, row)] = plgpu.layout_cast(jnp.zeros(shape, jnp.bfloat16), PAIRS)

      def rest():
        for step in range(steps):
          clear(row(step))
        sums_ref[i, batch, block, part] = nothing.sum(0)

      if short:
        holds = block * valid + row(0) < t
        pl.when(holds)(work)
        pl.when(jnp.logical_not(holds))(rest)
      else:
        work()

      @pl.when(part == parts - 1)
      def _():
        for hole in range(valid, BLOCK, ROWS):
          clear(hole)

    for i, (target, base) in enumerate(((q_ref, batch * blocks * BLOCK), (k_ref, cached), (v_ref, cached))):
      pl.when(which == i)(lambda i=i, target=target, base=base: run(i, target, base))

  flat = lambda x: x.reshape(-1, n, h // 2, 2)
  k_ref, v_ref = (jax.new_ref(flat(x)) for x in (k_slots, v_slots))
  scalar = lambda x: jnp.asarray(x, jnp.int32).reshape(1)
  packed, sums = plgpu.kernel(
    to_slots,
    out_type=[
      jax.ShapeDtypeStruct((b * blocks * BLOCK, n, h // 2, 2), q.dtype),
      jax.ShapeDtypeStruct((3, b, blocks, parts, n, h // 2, 2), jnp.float32),
    ],
    grid=(3, b, blocks, parts),
    grid_names=("which", "batch", "block", "part"),
    compiler_params=plgpu.CompilerParams(
      approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=ROWS * n * h * 4
    ),
    interpret=interpret,
    kernel_name="to_slots",
  )(*map(flat, (q, k, v, vectors)), cos, sin, scalar(layer), scalar(first), k_ref, v_ref)
  k_slots, v_slots = (jax.freeze(x).reshape(k_slots.shape) for x in (k_ref, v_ref))
  return packed.reshape(b, blocks * BLOCK, n, h), k_slots, v_slots, sums.reshape(*sums.shape[:-2], h)
