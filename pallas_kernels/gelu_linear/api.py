"""The public call: the feed-forward's first half, gelu(x W + b).

Letters: R rows, K inputs, F outputs.
"""

import functools

import jax
from jaxtyping import Array, Float

from pallas_kernels.device import current_device, multiprocessors
from pallas_kernels.gelu_linear import mosaic_sm90
from pallas_kernels.implementations import always, chosen


def gelu_linear(
  x: Float[Array, "R K"],
  kernel: Float[Array, "K F"],
  bias: Float[Array, "F"],
  *,
  implementation: str | None = None,
) -> Float[Array, "R F"]:
  """gelu(x kernel + bias), GELU by its formula with tanh (Hendrycks and Gimpel, arXiv 1606.08415).

  Args:
    implementation: "mosaic_sm90" (Hopper, 16 bit, R a multiple of 8, K one of 64 from 1024 on, F one of 256), "xla" (anywhere),
      or None for the first of these that supports the arguments.

  Returns:
    [R,F] in x's dtype. Differentiable; where a gradient is taken, "xla" also finds the value, as it keeps what is before GELU.

  Raises:
    ValueError: wrong shapes or dtypes. NotImplementedError: the implementation cannot do this.
  """
  if x.ndim != 2:
    raise ValueError(f"x: shape {x.shape}; want [R,K]")
  if kernel.ndim != 2 or kernel.shape[0] != x.shape[1]:
    raise ValueError(f"kernel: shape {kernel.shape}; want [K,F] with K = {x.shape[1]}")
  if bias.shape != kernel.shape[1:]:
    raise ValueError(f"bias: shape {bias.shape}; want {kernel.shape[1:]}")
  for name, a in (("kernel", kernel), ("bias", bias)):
    if a.dtype != x.dtype:
      raise ValueError(f"{name}: dtype {a.dtype}; want x's dtype {x.dtype}")
  reasons = {"mosaic_sm90": lambda: mosaic_sm90.unsupported(x, kernel), "xla": always}
  if chosen(implementation, reasons) == "mosaic_sm90":
    return _by_kernel(multiprocessors(current_device()), x, kernel, bias)
  return by_xla(x, kernel, bias)


def by_xla(x, kernel, bias):
  """By one product of cuBLAS with its epilogue, on a GPU: what the kernel is held to."""
  return jax.nn.gelu(x @ kernel + bias, approximate=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _by_kernel(multiprocessors, x, kernel, bias):
  return mosaic_sm90.gelu_linear(x, kernel, bias, multiprocessors)


_by_kernel.defvjp(lambda _, *args: jax.vjp(by_xla, *args), lambda _, back, g: back(g))
