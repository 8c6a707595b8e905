"""The public calls: LayerNorm with a scale and a shift, of rows alone or of rows to which a product is added.

Rows of several frames lie in turns: a run of the first one's, of the second one's .. of the last one's, and from the start.

Letters: B batch, R rows, D width, F frames, V frames of a vector: F, or 1 where all have the same.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.add_norm import mosaic_sm90
from pallas_kernels.implementations import always, chosen


class Term(NamedTuple):
  """What is added to rows: (product + bias) gate.

  Attributes:
    gate: None for 1.
  """

  product: Float[Array, "B R D"]
  bias: Float[Array, "1 1 D"]
  gate: Float[Array, "B V D"] | None = None


def norm(
  x: Float[Array, "B R D"],
  scale: Float[Array, "B V D"],
  shift: Float[Array, "B V D"],
  *,
  run: int,
  frames: int,
  eps: float,
  implementation: str | None = None,
) -> Float[Array, "B R D"]:
  """LayerNorm(x) scale + shift, in float32 and rounded once; see `add_norm`."""
  return _call(x, None, scale, shift, run, frames, eps, implementation)


def add_norm(
  x: Float[Array, "B R D"],
  term: Term,
  scale: Float[Array, "B V D"],
  shift: Float[Array, "B V D"],
  *,
  run: int,
  frames: int,
  eps: float,
  implementation: str | None = None,
) -> tuple[Float[Array, "B R D"], Float[Array, "B R D"]]:
  """x + (product + bias) gate, and of that, rounded to x's dtype, LayerNorm(..) scale + shift; both in float32, rounded once.

  Args:
    scale, shift, and the term's vectors: in x's dtype or float32, for all of a batch where their first axis is 1. Of F frames,
      row r takes that of frame r // run % F.
    run: rows of a frame that lie together. frames: F.
    implementation: "mosaic_sm90" (Hopper, 16 bit, D a multiple of 512 from 1024 to 8192), "xla" (anywhere), or None for the
      first of these that supports the arguments.

  Returns:
    two arrays like x. Differentiable; where a gradient is taken, "xla" also finds the values, as it keeps what is between.

  Raises:
    ValueError: wrong shapes or dtypes. NotImplementedError: the implementation cannot do this.
  """
  return _call(x, term, scale, shift, run, frames, eps, implementation)


def _call(x, term, scale, shift, run, frames, eps, implementation):
  if x.ndim != 3:
    raise ValueError(f"x: shape {x.shape}; want [B,R,D]")
  b, r, d = x.shape
  if r % (run * frames):
    raise ValueError(f"x: {r} rows; want a multiple of run x frames, {run} x {frames}")
  if term is not None and (term.product.shape, term.product.dtype) != (x.shape, x.dtype):
    raise ValueError(f"product: {term.product.dtype}{list(term.product.shape)}; want x's {x.dtype}{list(x.shape)}")
  bias, gate = (None, None) if term is None else term[1:]
  if bias is not None and bias.shape != (1, 1, d):
    raise ValueError(f"bias: shape {bias.shape}; want [1, 1, {d}]")
  wide = jnp.promote_types(x.dtype, jnp.float32)
  for name, a in (("scale", scale), ("shift", shift), ("bias", bias), ("gate", gate)):
    if a is None:
      continue
    if a.ndim != 3 or a.shape[0] not in (1, b) or a.shape[1] not in (1, frames) or a.shape[2] != d:
      raise ValueError(f"{name}: shape {a.shape}; want [{b} or 1, {frames} or 1, {d}]")
    if a.dtype not in (x.dtype, wide):
      raise ValueError(f"{name}: dtype {a.dtype}; want x's dtype {x.dtype}, or {wide}")
  reasons = {"mosaic_sm90": lambda: mosaic_sm90.unsupported(x), "xla": always}
  how = _by_kernel if chosen(implementation, reasons) == "mosaic_sm90" else by_xla
  return how(run, frames, eps, x, term, scale, shift)


def add(x: Float[Array, "B R D"], term: Term, *, run: int, frames: int) -> Float[Array, "B R D"]:
  """x + (product + bias) gate in float32, rounded once to x's dtype, by XLA's own fusion; see `add_norm`."""
  y = _wide(term.product) + _wide(term.bias)
  if term.gate is not None:
    y = (_per_frame(y, run, frames) * _over(term.gate)).reshape(y.shape)
  return (_wide(x) + y).astype(x.dtype)


def by_xla(run, frames, eps, x, term, scale, shift):
  """By XLA's own fusions: what the kernel is held to."""
  if term is not None:
    # Or XLA would write it wide, for its readers.
    x = jax.lax.optimization_barrier(add(x, term, run=run, frames=frames))
  y = _wide(x)
  y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
  h = (_per_frame(y, run, frames) * _over(scale) + _over(shift)).reshape(y.shape).astype(x.dtype)
  return h if term is None else (x, h)


def _wide(a):
  return a.astype(jnp.promote_types(a.dtype, jnp.float32))


def _per_frame(a, run, frames):
  return a.reshape(a.shape[0], -1, frames, run, a.shape[2])


def _over(vector):
  """[B,V,D] against `_per_frame`, wide."""
  return _wide(vector)[:, None, :, None]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _by_kernel(run, frames, eps, x, term, scale, shift):
  return mosaic_sm90.add_norm(x, term, scale, shift, run, frames, eps)


_by_kernel.defvjp(
  lambda run, frames, eps, *args: jax.vjp(functools.partial(by_xla, run, frames, eps), *args),
  lambda run, frames, eps, back, g: back(g),
)
