"""8-bit floats (e4m3: a sign, 4 bits of exponent, 3 of mantissa) and products of them, for sampling alone.

Every element keeps 4 significant bits wherever it lies between 2^-6 and 448, so a scale need not be fine: what counts is
that no element is too large, and that few are below 2^-6 times the largest's place in that range. Hence
- a matrix W has one scale for a layer, a power of two that takes its largest element to 224 .. 448;
- rows that come from a LayerNorm or a GELU are taken as they are: their mean square is near 1, and no element of a LayerNorm
  is above the root of its width (39 for 1.3B), before its scale and shift;
- rows of attention, means of values of any size, have a scale each.
A matrix's scale enters the product where that is summed, so that a bias, a GELU and the rounding to 8 bits can follow there.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float, Float8e4m3fn

E4M3 = jnp.float8_e4m3fn
LARGEST = 448.0
_LEAST = 2.0**-100  # far from overflow where it divides
ROWS = 16  # of a product with 8-bit floats


def rounded(x: Float[Array, "*S"]) -> Float8e4m3fn[Array, "*S"]:
  """The nearest 8-bit floats, at most `LARGEST`: a plain cast would make NaN of what is larger."""
  return jnp.clip(x, -LARGEST, LARGEST).astype(E4M3)


def by_rows(x: Float[Array, "*S K"]) -> tuple[Float8e4m3fn[Array, "*S K"], Float[Array, "*S 1"]]:
  """Each row over its largest element's share of `LARGEST`, and that scale; a row of zeros stays one."""
  largest = jnp.abs(x).max(-1, keepdims=True, initial=_LEAST).astype(jnp.float32)
  return rounded(x * (LARGEST / largest)), largest * (1 / LARGEST)


def scale_of(largest: Float[Array, "*S"]) -> Float[Array, "*S"]:
  """The power of two over which so large a number lies between 224 and 448; 1 for next to nothing."""
  mantissa, exponent = jnp.frexp(largest / LARGEST)  # mantissa in 1/2 .. 1
  return jnp.where(largest > _LEAST, jnp.ldexp(jnp.float32(1), exponent - (mantissa == 0.5)), 1)


def weights(kernel: Float[Array, "*L K N"]) -> tuple[Float8e4m3fn[Array, "*L N K"], Float[Array, "*L"]]:
  """A matrix as W^T over a scale, as Hopper's products want it, and the scale, a power of two; a matrix of zeros stays one."""
  scale = scale_of(jnp.abs(kernel).max((-2, -1)).astype(jnp.float32))
  return rounded(kernel / scale[..., None, None]).swapaxes(-1, -2), scale.astype(kernel.dtype)


def product(
  x: Float8e4m3fn[Array, "*B T K"], kernel_t: Float8e4m3fn[Array, "N K"], scale: Float[Array, ""], dtype
) -> Float[Array, "*B R N"]:
  """x W in that dtype, with rows of zeros up to a multiple of `ROWS`: else XLA would add them, and take them away at once.

  On Hopper XLA makes one product of 8-bit floats of it; elsewhere they are widened first.
  """
  x = jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, -x.shape[-2] % ROWS), (0, 0)])
  return jnp.einsum("...k,nk->...n", x.astype(dtype), kernel_t.astype(dtype) * scale.astype(dtype))


def quantised(params: dict, like: dict) -> dict:
  """Ordinary parameters as those of a model whose `linear` is "float8".

  Args:
    params: a nested dict. like: that model's, as shapes: a kernel is rounded where it has `kernel_t`.
  """
  if "kernel_t" in like:
    kernel_t, scale = weights(params["kernel"])
    return {"kernel_t": kernel_t, "scale": scale, "bias": params["bias"]}
  return {name: quantised(params[name], x) if isinstance(x, dict) else params[name] for name, x in like.items()}
