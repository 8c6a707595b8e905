"""The digits codec: space-time to depth. Four frames by 2x2 pixels become one latent, the first frame a latent of its own.

The interface that every codec here has: encode, decode, and decode chunk by chunk; strides in time and space.
Letters: B videos, F pixel frames, T = 1 + (F - 1) / 4 latent frames, H, W pixels, h = H / 2, w = W / 2.
"""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

_MEAN, _STD = 0.122, 0.146  # of digit clips, pixels in 0..1


@dataclasses.dataclass(frozen=True)
class DigitsCodec:
  """Lossless but for rounding; the first frame is repeated to fill its latent, and decoded as the mean of the copies."""

  time: int = 4
  space: int = 2

  @property
  def channels(self) -> int:
    return 3 * self.time * self.space**2

  def encode(self, frames: UInt8[Array, "B F H W 3"]) -> Float[Array, "B T h w C"]:
    """Latents of roughly zero mean and unit deviation. Raises ValueError unless F = 1 + 4 (T - 1)."""
    b, f, height, width, _ = frames.shape
    if (f - 1) % self.time or height % self.space or width % self.space:
      raise ValueError(f"frames: shape {frames.shape}; want 1 + {self.time} n frames, sides divisible by {self.space}")
    x = (frames.astype(jnp.float32) / 255 - _MEAN) / _STD
    x = jnp.concatenate([jnp.repeat(x[:, :1], self.time, 1), x[:, 1:]], 1)
    x = x.reshape(b, -1, self.time, height // self.space, self.space, width // self.space, self.space, 3)
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(b, -1, height // self.space, width // self.space, self.channels)

  def decode(self, latents: Float[Array, "B T h w C"], first: bool = True) -> UInt8[Array, "B F H W 3"]:
    """Pixels. `first`: the latents start the video; a later chunk decodes on its own, as nothing reaches across."""
    b, t, h, w, _ = latents.shape
    x = latents.reshape(b, t, h, w, self.time, self.space, self.space, 3).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    if first:
      mean = jnp.broadcast_to(x[:, :1].mean(2, keepdims=True), x[:, :1].shape)
      x = jnp.concatenate([mean, x[:, 1:]], 1)
    x = x.reshape(b, t * self.time, h * self.space, w * self.space, 3)
    x = x[:, self.time - 1 :] if first else x
    return jnp.clip(jnp.round((x * _STD + _MEAN) * 255), 0, 255).astype(jnp.uint8)
