"""Rotary positions over (frame, row, column), with angles computed for any frame: there is no table to outgrow.

An angle is a position times a frequency; it is reduced to a fraction of a turn before it meets float32, so that it is as
exact at frame 8,000 as at frame 0.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

_HI_BITS = 11  # position (up to 2^13) x leading bits of the frequency stays exact in float32's 24


def _split_turns(freq: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
  turns = np.asarray(freq, np.float64) / (2 * np.pi)
  scale = 2.0 ** (_HI_BITS - np.ceil(np.log2(turns)))
  hi = np.floor(turns * scale) / scale
  return hi.astype(np.float32), (turns - hi).astype(np.float32)


def phase(position: Float[Array, "*P"], freq: np.ndarray) -> Float[Array, "*P J"]:
  """position x freq in radians, reduced to one turn.

  Args:
    position: |position| <= 8192, whole or fractional.
    freq: radians per unit of position, float64 [J].
  """
  hi, lo = _split_turns(freq)
  position = jnp.asarray(position, jnp.float32)[..., None]
  whole = jnp.floor(position)
  turns = (whole * hi) % 1.0 + whole * lo + (position - whole) * (hi + lo)
  return (turns % 1.0) * (2 * np.pi)


def _axis_channels(head_dim: int) -> tuple[int, int, int]:
  """Complex channels of (frame, row, column): Wan's split, 22/21/21 of 64."""
  c = head_dim // 2
  return c - 2 * (c // 3), c // 3, c // 3


def axis_freqs(head_dim: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
  """10000^(-2j/n) per axis, n = twice the axis' complex channels."""
  return tuple(10000.0 ** (-np.arange(c) / c) for c in _axis_channels(head_dim))


def rope_angles(frame, row, column, head_dim: int) -> Float[Array, "*P half"]:
  """Angles of every complex channel of a head at the given positions (broadcast together)."""
  parts = [phase(p, f) for p, f in zip((frame, row, column), axis_freqs(head_dim), strict=True)]
  shape = jnp.broadcast_shapes(*(p.shape[:-1] for p in parts))
  return jnp.concatenate([jnp.broadcast_to(p, (*shape, p.shape[-1])) for p in parts], -1)


def rotate(x: Float[Array, "*B N H"], cos: Float[Array, "*B half"], sin: Float[Array, "*B half"]):
  """Turns interleaved pairs (2j, 2j+1) of every head by the angle whose cosine and sine lie at j, in float32.

  cos and sin broadcast against x without its head axis; fewer of them than pairs turn only the leading channels. Like x.
  """
  half = cos.shape[-1]
  cos, sin = cos[..., None, :, None], sin[..., None, :, None]
  pairs = x[..., : 2 * half].astype(jnp.promote_types(x.dtype, jnp.float32)).reshape(*x.shape[:-1], half, 2)
  turned = pairs * cos + jnp.flip(pairs, -1) * sin * jnp.array([-1, 1], pairs.dtype)  # not stacked: XLA can fuse this
  turned = turned.reshape(*turned.shape[:-2], 2 * half).astype(x.dtype)
  return turned if 2 * half == x.shape[-1] else jnp.concatenate([turned, x[..., 2 * half :]], -1)


def turn_forward(x: Float[Array, "*B H"], frames: Float[Array, "*B"]) -> Float[Array, "*B H"]:
  """Moves rotated keys forward in time by whole frames: only the temporal channels turn."""
  angles = phase(frames, axis_freqs(x.shape[-1])[0])
  return rotate(x[..., None, :], jnp.cos(angles), jnp.sin(angles))[..., 0, :]
