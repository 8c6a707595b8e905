"""The public call: RMS norm over channels, SiLU, and for each frame the two before it beside it.

Letters: B videos, f frames, h, w their positions, C channels.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.frames import mosaic_sm90
from pallas_kernels.implementations import always, chosen


def normed_frames(
  x: Float[Array, "B f h w C"],
  past: Float[Array, "B 2 h w C"],
  gamma: Float[Array, " C"],
  *,
  implementation: str | None = None,
) -> tuple[Float[Array, "B f h w 3C"], Float[Array, "B 2 h w C"]]:
  """a = silu(x / |x| gamma), |x| the length over channels; then each frame of a with the two before it, oldest first.

  Args:
    x: new frames. past: the last two frames of a before them. gamma: the norm's weight times sqrt(C).
    implementation: "mosaic_sm90" (Hopper, bfloat16), "xla" (anywhere), or None for the first that supports the arguments.

  Returns:
    [past, a] in windows of three frames, channels side by side, and the last two frames of [past, a].

  Raises:
    ValueError: wrong shapes or dtypes. NotImplementedError: the implementation cannot do this.
  """
  b, f, *size, c = x.shape
  if past.shape != (b, 2, *size, c) or past.dtype != x.dtype:
    raise ValueError(f"past: {past.dtype} {past.shape}; want {x.dtype} {(b, 2, *size, c)}, two frames like x's")
  if gamma.shape != (c,):
    raise ValueError(f"gamma: shape {gamma.shape}; want {(c,)}")
  reasons = {"mosaic_sm90": lambda: mosaic_sm90.unsupported(x), "xla": always}
  if chosen(implementation, reasons) == "mosaic_sm90":
    return _by_kernel(x, past, gamma)
  return _by_xla(x, past, gamma)


def _by_xla(x, past, gamma):
  f = x.shape[1]
  y = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  length = jnp.maximum(jnp.sqrt((y * y).sum(-1, keepdims=True)), 1e-12)
  a = jax.nn.silu((y / length * gamma.astype(y.dtype)).astype(x.dtype))
  frames = jnp.concatenate([past, a], 1)
  return jnp.concatenate([frames[:, i : f + i] for i in range(3)], -1), frames[:, -2:]


@jax.custom_vjp
def _by_kernel(x, past, gamma):
  return mosaic_sm90.normed_frames(x, past, gamma)


_by_kernel.defvjp(
  lambda *args: (_by_kernel(*args), args), lambda args, cotangents: jax.vjp(_by_xla, *args)[1](cotangents)
)
