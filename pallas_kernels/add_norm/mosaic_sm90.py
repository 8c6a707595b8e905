"""The "mosaic_sm90" implementation: four warps hold some rows of a frame in registers, so that each is read and written once.

A program takes a few rows that have their vectors in common and ends; several share a multiprocessor and hide each other's
waiting.

Letters: B batch, R rows, D width, F frames, V frames of a vector (F or 1).
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import current_device

WARPS, LANES, VECTOR = 4, 32, 4
ACROSS = WARPS * LANES * VECTOR  # columns side by side
MOST = 64  # elements of rows that a thread holds


def unsupported(x) -> str | None:
  """Why this implementation cannot serve a call, or None."""
  device = current_device()
  if getattr(device, "compute_capability", None) != "9.0":
    return f"implementation: mosaic_sm90 wants a Hopper GPU, not {device.device_kind}"
  if x.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x: dtype {x.dtype}; mosaic_sm90 wants bfloat16 or float16"
  d, least, most = x.shape[2], 2 * ACROSS, MOST * WARPS * LANES
  if d % ACROSS or not least <= d <= most:
    return f"x: rows of {d}; mosaic_sm90 wants a multiple of {ACROSS} from {least} to {most}"
  return None


def add_norm(x, term, scale, shift, run, frames, eps, interpret=None):
  """See `api.add_norm`, and `api.norm` where term is None."""
  b, r, d = x.shape
  rows = max(n for n in range(1, run + 1) if run % n == 0 and n * d <= MOST * WARPS * LANES)
  groups = r // rows
  shape = (rows, d // ACROSS, WARPS, LANES, VECTOR)  # a quarter of each row's columns to a warp
  whole = plgpu.Layout.TILED(plgpu.Tiling((shape,)), warp_dims=(-3,), lane_dims=(-2,), vector_dim=-1)
  split = lambda a: a.reshape(-1, d // ACROSS, WARPS, LANES, VECTOR)
  operands = {"x": x, "scale": scale, "shift": shift}
  operands |= {} if term is None else {name: a for name, a in term._asdict().items() if a is not None}
  shapes = {name: a.shape for name, a in operands.items()}

  def add_norm(*refs):
    refs, (*added_ref, h_ref) = dict(zip(operands, refs, strict=False)), refs[len(operands) :]
    batch, group = lax.axis_index("batch"), lax.axis_index("group")
    mine = pl.ds(pl.multiple_of((batch * groups + group) * rows, rows), rows)
    frame = lax.rem(lax.div(group, jnp.int32(run // rows)), jnp.int32(frames))

    def load(name):
      return plgpu.load(refs[name].at[mine], layout=whole, optimized=False).astype(jnp.float32)

    def vector(name):
      own, of_frames = shapes[name][0] > 1, shapes[name][1] > 1
      at = batch * own * shapes[name][1] + frame * of_frames
      a = plgpu.load(refs[name].at[at], layout=whole.reduce(0), optimized=False).astype(jnp.float32)
      return lax.broadcast_in_dim(a, shape, (1, 2, 3, 4))

    def mean(x):
      return lax.broadcast_in_dim(x.sum(4).sum(1).sum(2).sum(1) * (1 / d), shape, (0,))

    x = load("x")
    if term is not None:
      y = load("product") + vector("bias")
      x = (x + (y if term.gate is None else y * vector("gate"))).astype(h_ref.dtype)
      added_ref[0][mine] = x
      x = x.astype(jnp.float32)
    y = x - mean(x)
    h = y * lax.rsqrt(mean(y * y) + eps) * vector("scale") + vector("shift")
    h_ref[mine] = h.astype(h_ref.dtype)

  out = jax.ShapeDtypeStruct(split(x).shape, x.dtype)
  found = plgpu.kernel(
    add_norm,
    out_type=[out] * (1 if term is None else 2),
    grid=(b, groups),
    grid_names=("batch", "group"),
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=rows * WARPS * LANES * 4),
    interpret=interpret,
    kernel_name="add_norm",
  )(*map(split, operands.values()))
  found = [a.reshape(x.shape) for a in found]
  return found[0] if term is None else tuple(found)
