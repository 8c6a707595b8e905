"""The public call: a layer's queries of a prompt, of whose keys and values the last ones are one and the same.

A prompt is padded to a fixed number of rows, and what is not masked there counts: m equal rows are one whose weight is m.

Letters: B batch, T query rows, M rows of a prompt, N heads, H head dim.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.dense import dense_attention
from pallas_kernels.few_keys import mosaic_sm90
from pallas_kernels.implementations import always, chosen


def few_keys(
  product: Float[Array, "B T N H"],
  vectors: Float[Array, "2 N H"],
  squares: Float[Array, "B T"],
  k: Float[Array, "B M N H"],
  v: Float[Array, "B M N H"],
  distinct: Int32[Array, "B"],
  *,
  width: int,
  eps: float,
  implementation: str | None = None,
) -> Float[Array, "B T N H"]:
  """Attention of a layer's queries to all M keys, its logits scaled by 1/sqrt(H).

  q = x / sqrt(squares / width + eps) vectors[1], where x = product + vectors[0], in float32 and rounded once: a projection's
  last steps and RMSNorm.

  Args:
    product: with the queries' weights. vectors: its bias, and the norm's weight. squares: of each row, float32, the sum of
      x^2 over the norm's width, which is that of all heads, also where others have some of them.
    distinct: rows of k and v that differ, at least 1: row `distinct` - 1 and all behind it are equal. That is a promise: an
      implementation may read those once and weigh them by their number, or read them all.
    implementation: "mosaic_sm90" (Hopper, 16 bit, head dim 64 or 128), "dense" (anywhere; reads them all), or None for the
      first of these that supports the arguments.

  Returns:
    what attention to all M keys gives, in product's dtype. Differentiable in all but distinct, as if each row were its own.

  Raises:
    ValueError: wrong shapes or dtypes. NotImplementedError: the implementation cannot do this.
  """
  b, t, n, h = product.shape
  for name, x, want in (
    ("vectors", vectors, (2, n, h)),
    ("squares", squares, (b, t)),
    ("k", k, (b, k.shape[1], n, h)),
    ("v", v, k.shape),
    ("distinct", distinct, (b,)),
  ):
    if x.shape != want:
      raise ValueError(f"{name}: shape {x.shape}; want {want}")
  for name, x in (("vectors", vectors), ("k", k), ("v", v)):
    if x.dtype != product.dtype:
      raise ValueError(f"{name}: dtype {x.dtype}; want product's dtype {product.dtype}")
  wide = jnp.promote_types(product.dtype, jnp.float32)
  if squares.dtype != wide:
    raise ValueError(f"squares: dtype {squares.dtype}; want {wide}")
  reasons = {"mosaic_sm90": lambda: mosaic_sm90.unsupported(product, k), "dense": always}
  if chosen(implementation, reasons) == "mosaic_sm90":
    return _by_kernel(width, eps, product, vectors, squares, k, v, distinct)
  return every_key(width, eps, product, vectors, squares, k, v)


def every_key(width, eps, product, vectors, squares, k, v):
  """Plain attention to all rows: what the kernel is held to."""
  wide = lambda x: x.astype(jnp.promote_types(product.dtype, jnp.float32))
  scale = jax.lax.rsqrt(squares / width + eps)[..., None, None]
  q = (wide(product) + wide(vectors[0])) * scale * wide(vectors[1])
  return dense_attention(q.astype(product.dtype), k, v)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _by_kernel(width, eps, *args):
  return mosaic_sm90.few_keys(width, eps, *args)


_by_kernel.defvjp(
  lambda *args: (_by_kernel(*args), args[2:-1]),
  lambda width, eps, args, g: (*jax.vjp(functools.partial(every_key, width, eps), *args)[1](g), None),
)
