"""The "mosaic_sm90" implementation: one program per frame and 64 positions, which reads once and writes each frame thrice.

XLA writes the activation, reads it three times and writes it three times; memory is all that this takes.

Letters: B videos, f frames, R positions of a frame, C channels.
"""

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.device import current_device

ROWS = 64


def unsupported(x) -> str | None:
  """Why this implementation cannot serve a call, or None."""
  rows, c = x.shape[2] * x.shape[3], x.shape[-1]
  device = current_device()
  if getattr(device, "compute_capability", None) != "9.0":
    return f"implementation: mosaic_sm90 wants a Hopper GPU, not {device.device_kind}"
  if x.dtype != jnp.bfloat16:
    return f"x: dtype {x.dtype}; mosaic_sm90 wants bfloat16"
  if rows % ROWS or c % 32 or c > 256:
    return f"x: {rows} positions of {c} channels; mosaic_sm90 wants multiples of {ROWS} and of 32, at most 256 channels"
  return None


def normed_frames(x, past, gamma, interpret=None):
  """See `api.normed_frames`."""
  b, f, *size, c = x.shape
  rows = size[0] * size[1]

  def normed_frames(x_ref, past_ref, gamma_ref, y_ref, new_ref, *, smem, full):
    a_s, gamma_s = smem
    video, frame, tile = (lax.axis_index(n) for n in ("video", "frame", "tile"))
    at = lambda frames, frame: pl.ds(pl.multiple_of((video * frames + frame) * rows + tile * ROWS, ROWS), ROWS)

    def load(source, rows):
      plgpu.copy_gmem_to_smem(source.at[rows], a_s, full)

    plgpu.copy_gmem_to_smem(gamma_ref, gamma_s, full)
    pl.when(frame < 2)(lambda: load(past_ref, at(2, frame)))
    pl.when(frame >= 2)(lambda: load(x_ref, at(f, frame - 2)))
    plgpu.barrier_wait(full)

    @pl.when(frame >= 2)
    def _():
      y = plgpu.load(a_s, layout=plgpu.Layout.WGMMA).astype(jnp.float32)
      weight = plgpu.load(gamma_s, layout=plgpu.Layout.WGMMA.reduce(0))
      length = jnp.maximum((y * y).sum(1), 1e-24)
      y = y * lax.broadcast_in_dim(lax.rsqrt(length), y.shape, [0]) * lax.broadcast_in_dim(weight, y.shape, [1])
      y = y.astype(jnp.bfloat16).astype(jnp.float32)  # the norm's own rounding
      a_s[...] = (y / (1 + jnp.exp(-y))).astype(jnp.bfloat16)
      plgpu.commit_smem()

    for place in range(3):  # the frame is the last, the middle and the first of a window

      def store(window=frame - place, place=place):
        plgpu.copy_smem_to_gmem(a_s, y_ref.at[at(f, window), pl.ds(c * place, c)])

      pl.when((frame >= place) & (frame - place < f))(store)
    pl.when(frame >= f)(lambda: plgpu.copy_smem_to_gmem(a_s, new_ref.at[at(2, frame - f)]))
    plgpu.wait_smem_to_gmem(0)

  flat = lambda x: x.reshape(-1, c)
  y, new = plgpu.kernel(
    normed_frames,
    out_type=[jax.ShapeDtypeStruct((b * f * rows, 3 * c), x.dtype), jax.ShapeDtypeStruct((b * 2 * rows, c), x.dtype)],
    scratch_types=dict(
      smem=(
        plgpu.SMEM((ROWS, c), x.dtype, transforms=(plgpu.TilingTransform((8, 32)), plgpu.SwizzleTransform(64))),
        plgpu.SMEM((c,), jnp.float32),
      ),
      full=plgpu.Barrier(num_arrivals=2),
    ),
    grid=(b, f + 2, rows // ROWS),
    grid_names=("video", "frame", "tile"),
    compiler_params=plgpu.CompilerParams(approx_math=True),
    interpret=interpret,
    kernel_name="normed_frames",
  )(flat(x), flat(past), gamma.astype(jnp.float32))
  return y.reshape(b, f, *size, 3 * c), new.reshape(b, 2, *size, c)
