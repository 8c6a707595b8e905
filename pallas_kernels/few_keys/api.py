"""The public call: attention to keys and values of which the last ones are one and the same.

A prompt is padded to a fixed number of rows, and what is not masked there counts: m equal rows are one whose weight is m.

Letters: B batch, T query rows, M rows of a prompt, N heads, H head dim.
"""

import jax
from jaxtyping import Array, Float, Int32

from pallas_kernels.dense import dense_attention
from pallas_kernels.few_keys import mosaic_sm90

IMPLEMENTATIONS = ("mosaic_sm90", "cudnn", "xla")


def few_keys(
  q: Float[Array, "B T N H"],
  k: Float[Array, "B M N H"],
  v: Float[Array, "B M N H"],
  distinct: Int32[Array, "B"],
  *,
  implementation: str | None = None,
) -> Float[Array, "B T N H"]:
  """Attention of every query to all M keys, scaled by 1/sqrt(H).

  Args:
    distinct: rows of k and v that differ, at least 1: row `distinct` - 1 and all behind it are equal. That is a promise: an
      implementation may read those once and weigh them by their number, or read them all.
    implementation: "mosaic_sm90" (Hopper, 16 bit, head dim 64 or 128), "cudnn" (NVIDIA, 16 bit; reads them all), "xla"
      (anywhere; likewise), or None for the first of these that supports the arguments.

  Returns:
    what attention to all M keys gives, in q's dtype. Differentiable in q, k and v, as if each row were its own.

  Raises:
    ValueError: wrong shapes or dtypes. NotImplementedError: the implementation cannot do this.
  """
  b, _, n, h = q.shape
  for name, x, want in (("k", k, (b, k.shape[1], n, h)), ("v", v, k.shape), ("distinct", distinct, (b,))):
    if x.shape != want:
      raise ValueError(f"{name}: shape {x.shape}; want {want}")
  for name, x in (("k", k), ("v", v)):
    if x.dtype != q.dtype:
      raise ValueError(f"{name}: dtype {x.dtype}; want q's dtype {q.dtype}")
  if implementation not in (None, *IMPLEMENTATIONS):
    raise NotImplementedError(f"implementation: {implementation!r}; this build has {', '.join(IMPLEMENTATIONS)}")
  if implementation in (None, "mosaic_sm90"):
    reason = mosaic_sm90.unsupported(q, k)
    if implementation and reason:
      raise NotImplementedError(reason)
    if reason is None:
      return _by_kernel(q, k, v, distinct)
  return dense_attention(q, k, v, implementation=implementation)


@jax.custom_vjp
def _by_kernel(q, k, v, distinct):
  return mosaic_sm90.few_keys(q, k, v, distinct)


def _forward(*args):
  return _by_kernel(*args), args


def _backward(args, cotangent):
  return *jax.vjp(dense_attention, *args[:3])[1](cotangent), None


_by_kernel.defvjp(_forward, _backward)
