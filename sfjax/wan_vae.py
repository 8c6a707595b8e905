"""Wan2.1's video VAE: 4 frames by 8x8 pixels become one latent of 16 channels; the first frame is a latent of its own.

One step takes one latent (1 pixel frame if it is the video's first, else 4) and the last frames that each convolution in
time saw, and returns both anew. A whole clip is a scan of that step, so a stream and a clip are one program.
Numerics: self_forcing sections 5 and 5.1; the weights' official names are in `wan_vae_keys.py`.

Letters: B videos, F pixel frames, T = 1 + (F - 1) / 4 latent frames, H, W pixels, h = H / 8, w = W / 8, C channels.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, UInt8

from pallas_kernels.frames import normed_frames
from sfjax.errors import check

# fmt: off
_MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
         0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
_STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
        3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)
# fmt: on


@dataclasses.dataclass(frozen=True)
class WanVAEConfig:
  """Sizes and numerics; the defaults are Wan2.1's.

  Attributes:
    z_dim: latent channels. dim: channels at full resolution. mult: of dim, per encoder stage. res_blocks: per encoder stage.
    time_down: whether the step down after each stage but the last halves time too; space it always halves.
    mean, std: of raw latents, per channel. dtype: of activations, and of the state of a stream
      ("float64" too, where JAX allows it).
  """

  z_dim: int = 16
  dim: int = 96
  mult: tuple[int, ...] = (1, 2, 4, 4)
  res_blocks: int = 2
  time_down: tuple[bool, ...] = (False, True, True)
  mean: tuple[float, ...] = _MEAN
  std: tuple[float, ...] = _STD
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    check(
      self,
      ("time_down", len(self.time_down) == len(self.mult) - 1, f"{len(self.mult) - 1} values, one between two of mult"),
      ("mean", len(self.mean) == self.z_dim, f"{self.z_dim} values"),
      ("std", len(self.std) == self.z_dim, f"{self.z_dim} values"),
      ("dtype", self.dtype in ("float32", "bfloat16", "float64"), "float32, bfloat16 or float64"),
    )


def encoder_plan(cfg: WanVAEConfig) -> list[tuple]:
  """The encoder's blocks between its first convolution and its middle: ("residual", in, out) or ("down", channels, in time)."""
  plan, dims = [], [cfg.dim * m for m in (1, *cfg.mult)]
  for i, (a, b) in enumerate(itertools.pairwise(dims)):
    plan += [("residual", b if j else a, b) for j in range(cfg.res_blocks)]
    plan += [("down", b, down) for down in cfg.time_down[i : i + 1]]
  return plan


def decoder_plan(cfg: WanVAEConfig) -> list[tuple]:
  """The decoder's blocks between its middle and its head: ("residual", in, out) or ("up", channels in, in time)."""
  plan, dims = [], [cfg.dim * m for m in (cfg.mult[-1], *reversed(cfg.mult))]
  for i, (a, b) in enumerate(itertools.pairwise(dims)):
    a = a // 2 if i else a  # a step up has halved them
    plan += [("residual", b if j else a, b) for j in range(cfg.res_blocks + 1)]
    plan += [("up", b, up) for up in cfg.time_down[::-1][i : i + 1]]
  return plan


def at_least_float32(x):
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


class Norm(nnx.Module):
  """Channels scaled to mean square 1, float32 inside, times gamma."""

  def __init__(self, cfg: WanVAEConfig, c: int):
    self.gamma = nnx.Param(jnp.ones((c,), jnp.dtype(cfg.param_dtype)))

  def __call__(self, x):
    y = at_least_float32(x)
    length = jnp.maximum(jnp.sqrt((y * y).sum(-1, keepdims=True)), 1e-12)
    return (y / length * (math.sqrt(x.shape[-1]) * self.gamma[...].astype(y.dtype))).astype(x.dtype)


def _precision(x):
  return "highest" if x.dtype == jnp.float32 else None  # a GPU's default for float32 is TF32


class Conv(nnx.Module):
  """A convolution. `size`: the kernel in (time and) space, or () for a map of each position's channels.

  In time it is one of images that hold several frames' channels side by side, or, where it gives few channels, one that gives
  every frame's share in several: cuDNN takes images as they lie, channels last, and turns clips around before and after.
  """

  def __init__(self, cfg, size: tuple[int, ...], c_in: int, c_out: int, rngs: nnx.Rngs, bias: bool = True):
    dtype = jnp.dtype(cfg.param_dtype)
    self.kernel = nnx.Param(nnx.initializers.lecun_normal()(rngs.params(), (*size, c_in, c_out), dtype))
    self.bias = nnx.Param(jnp.zeros((c_out,), dtype)) if bias else None

  def __call__(self, x, stride: int = 1, padding=((0, 0), (0, 0)), step: int = 1):
    """x [*B, *positions, C]. stride, padding: in space. step: frames from one output frame to the next."""
    kernel = self.kernel[...].astype(x.dtype)
    if kernel.ndim == 2:
      return self._biased(jnp.matmul(x, kernel, precision=_precision(x)))
    if kernel.ndim == 4:
      return self._biased(_of_images(x, kernel, stride, padding))
    n, *size, c_in, c_out = kernel.shape
    frames = [slice(i, x.shape[1] - n + 1 + i, step) for i in range(n)]  # of the kernel's i-th, for all outputs
    if n * c_out >= c_in:
      return self.of_windows(jnp.concatenate([x[:, those] for those in frames], -1), stride, padding)
    y = _of_images(x, jnp.moveaxis(kernel, 0, 3).reshape(*size, c_in, n * c_out), stride, padding)
    shares = jnp.split(at_least_float32(y), n, -1)
    return self._biased(sum(y[:, those] for y, those in zip(shares, frames, strict=True)).astype(x.dtype))

  def of_windows(self, x, stride: int = 1, padding=((0, 0), (0, 0))):
    """One in time, of the frames that each output frame sees, side by side: [B,f,h,w,n C]."""
    kernel = jnp.moveaxis(self.kernel[...].astype(x.dtype), 0, 2)
    return self._biased(_of_images(x, kernel.reshape(*kernel.shape[:2], x.shape[-1], -1), stride, padding))

  def _biased(self, y):
    return y if self.bias is None else y + self.bias[...].astype(y.dtype)


def _of_images(x, kernel, stride: int, padding):
  """A convolution of the images [h,w,C] of x."""
  y = jax.lax.conv_general_dilated(
    x.reshape(-1, *x.shape[-3:]),
    kernel,
    (stride, stride),
    padding,
    dimension_numbers=("NHWC", "HWIO", "NHWC"),
    precision=_precision(x),
  )
  return y.reshape(*x.shape[:-3], *y.shape[1:])


def _no_frames(x, n: int):
  """n frames like those of x, of zeros."""
  return jnp.zeros((x.shape[0], n, *x.shape[2:]), x.dtype)


def _extended(past, x, n: int):
  """The last n input frames of the step before (None: there is none yet, zeros), and then this step's."""
  return jnp.concatenate([_no_frames(x, n) if past is None else past, x], 1)


# A layer: (x [B,f,h,w,C], past, first) -> (x, past); past is its state, () for none; first: this is the video's first frame.


class CausalConv(Conv):
  """3x3x3; frames before the video are zeros. State: the last 2 input frames."""

  def __init__(self, cfg: WanVAEConfig, c_in: int, c_out: int, rngs: nnx.Rngs):
    super().__init__(cfg, (3, 3, 3), c_in, c_out, rngs)

  def __call__(self, x, past, first):
    x = _extended(past, x, 2)
    return super().__call__(x, padding=((1, 1), (1, 1))), x[:, -2:]

  def after(self, norm: Norm, x, past):
    """What this makes of silu(norm(x)), and its state."""
    past = _no_frames(x, 2) if past is None else past
    gamma = norm.gamma[...].astype(jnp.promote_types(x.dtype, jnp.float32))
    x, past = normed_frames(x, past, math.sqrt(x.shape[-1]) * gamma)
    return self.of_windows(x, padding=((1, 1), (1, 1))), past


class Residual(nnx.Module):
  """x + conv(silu(norm(conv(silu(norm(x)))))). State: that of the two convolutions."""

  def __init__(self, cfg: WanVAEConfig, c_in: int, c_out: int, rngs: nnx.Rngs):
    self.norm1, self.conv1 = Norm(cfg, c_in), CausalConv(cfg, c_in, c_out, rngs)
    self.norm2, self.conv2 = Norm(cfg, c_out), CausalConv(cfg, c_out, c_out, rngs)
    self.shortcut = Conv(cfg, (), c_in, c_out, rngs) if c_in != c_out else None

  def __call__(self, x, past, first):
    past1, past2 = past or (None, None)
    y, past1 = self.conv1.after(self.norm1, x, past1)
    y, past2 = self.conv2.after(self.norm2, y, past2)
    return (self.shortcut(x) if self.shortcut else x) + y, (past1, past2)


class Attention(nnx.Module):
  """x + attention of one head among the positions of a frame."""

  def __init__(self, cfg: WanVAEConfig, c: int, rngs: nnx.Rngs):
    self.norm, self.qkv, self.out = Norm(cfg, c), Conv(cfg, (), c, 3 * c, rngs), Conv(cfg, (), c, c, rngs)

  def __call__(self, x, past, first):
    b, f, h, w, c = x.shape
    q, k, v = jnp.split(self.qkv(self.norm(x)).reshape(b, f, h * w, 3 * c), 3, -1)
    exact = dict(precision=_precision(x), preferred_element_type=jnp.promote_types(x.dtype, jnp.float32))
    p = jax.nn.softmax(jnp.einsum("bfqc,bfkc->bfqk", q, k, **exact) / math.sqrt(c), axis=-1)
    y = jnp.einsum("bfqk,bfkc->bfqc", p.astype(x.dtype), v, **exact).astype(x.dtype)
    return x + self.out(y.reshape(x.shape)), ()


class Up(nnx.Module):
  """Twice the rows and columns and half the channels; in time twice the frames, but the first stays one.

  State, if in time: the last 2 input frames. The first frame leaves zeros, so the second sees no history (section 5.1).
  """

  def __init__(self, cfg: WanVAEConfig, c: int, in_time: bool, rngs: nnx.Rngs):
    self.time_conv = Conv(cfg, (3, 1, 1), c, 2 * c, rngs) if in_time else None
    self.conv = Conv(cfg, (3, 3), c, c // 2, rngs)

  def __call__(self, x, past, first):
    b, f, h, w, c = x.shape
    if self.time_conv and first:
      past = _no_frames(x, 2)
    elif self.time_conv:
      x = _extended(past, x, 2)
      past = x[:, -2:]
      x = self.time_conv(x).reshape(b, f, h, w, 2, c)  # even frames, odd frames
      x = x.transpose(0, 1, 4, 2, 3, 5).reshape(b, 2 * f, h, w, c)
    x = jnp.repeat(jnp.repeat(x, 2, 2), 2, 3)
    return self.conv(x, padding=((1, 1), (1, 1))), past if self.time_conv else ()


class Down(nnx.Module):
  """Half the rows and columns; in time half the frames, but the first stays as it is. State, if in time: the last frame."""

  def __init__(self, cfg: WanVAEConfig, c: int, in_time: bool, rngs: nnx.Rngs):
    self.time_conv = Conv(cfg, (3, 1, 1), c, c, rngs) if in_time else None
    self.conv = Conv(cfg, (3, 3), c, c, rngs)

  def __call__(self, x, past, first):
    x = self.conv(x, stride=2, padding=((0, 1), (0, 1)))
    if not self.time_conv:
      return x, ()
    last = x[:, -1:]
    return (x if first else self.time_conv(_extended(past, x, 1), step=2)), last


_BLOCKS = {"residual": Residual, "up": Up, "down": Down}


def _middle(cfg: WanVAEConfig, c: int, rngs: nnx.Rngs):
  return nnx.List([Residual(cfg, c, c, rngs), Attention(cfg, c, rngs), Residual(cfg, c, c, rngs)])


def _through(layers, x, pasts, first: bool):
  """x through the layers in order; pasts None: of a video that has not begun."""
  new = []
  for layer, past in zip(layers, [None] * len(layers) if pasts is None else pasts, strict=True):
    x, past = layer(x, past, first)
    new.append(past)
  return x, tuple(new)


class Encoder(nnx.Module):
  """Pixels of one latent to its mean: [B,1 or 4,H,W,3] -> [B,1,h,w,C]."""

  def __init__(self, cfg: WanVAEConfig, rngs: nnx.Rngs):
    c = cfg.dim * cfg.mult[-1]
    self.conv_in = CausalConv(cfg, 3, cfg.dim, rngs)
    self.blocks = nnx.List([_BLOCKS[kind](cfg, *sizes, rngs) for kind, *sizes in encoder_plan(cfg)])
    self.middle = _middle(cfg, c, rngs)
    self.norm_out, self.conv_out = Norm(cfg, c), CausalConv(cfg, c, 2 * cfg.z_dim, rngs)
    self.quant = Conv(cfg, (), 2 * cfg.z_dim, 2 * cfg.z_dim, rngs)

  def __call__(self, x, past, first: bool):
    *past, past_out = past or (None, None)
    x, past = _through([self.conv_in, *self.blocks, *self.middle], x, past[0], first)
    x, past_out = self.conv_out(jax.nn.silu(self.norm_out(x)), past_out, first)
    return self.quant(x)[..., : x.shape[-1] // 2], (past, past_out)  # the rest is the log variance


class Decoder(nnx.Module):
  """One latent to pixels: [B,1,h,w,C] -> [B,1 or 4,H,W,3]."""

  def __init__(self, cfg: WanVAEConfig, rngs: nnx.Rngs):
    c = cfg.dim * cfg.mult[-1]
    self.quant = Conv(cfg, (), cfg.z_dim, cfg.z_dim, rngs)
    self.conv_in = CausalConv(cfg, cfg.z_dim, c, rngs)
    self.middle = _middle(cfg, c, rngs)
    self.blocks = nnx.List([_BLOCKS[kind](cfg, *sizes, rngs) for kind, *sizes in decoder_plan(cfg)])
    self.norm_out, self.conv_out = Norm(cfg, cfg.dim * cfg.mult[0]), CausalConv(cfg, cfg.dim * cfg.mult[0], 3, rngs)

  def __call__(self, x, past, first: bool):
    past, past_out = past or (None, None)
    x, past = _through([self.conv_in, *self.middle, *self.blocks], self.quant(x), past, first)
    x, past_out = self.conv_out(jax.nn.silu(self.norm_out(x)), past_out, first)
    return x, (past, past_out)


@functools.cache
def _graphs(cfg: WanVAEConfig):
  return tuple(nnx.graphdef(nnx.eval_shape(functools.partial(part, cfg), nnx.Rngs(0))) for part in (Encoder, Decoder))


@functools.cache
def _state_shapes(cfg: WanVAEConfig, part: int, shape: tuple[int, ...]):
  """What the encoder (0) or decoder (1) leaves behind after a first input of that shape."""
  module, x = (Encoder, Decoder)[part], jax.ShapeDtypeStruct(shape, jnp.dtype(cfg.dtype))
  return jax.eval_shape(lambda x: module(cfg, nnx.Rngs(0))(x, None, True)[1], x)


def scan_frames(step, state, x):
  """step(state, x[:, i]) -> (state, y [B,f,...]) for i in turn; the y side by side in time."""
  state, y = jax.lax.scan(step, state, jnp.moveaxis(x, 1, 0))
  y = jnp.moveaxis(y, 0, 1)
  return state, y.reshape(y.shape[0], -1, *y.shape[3:])


@dataclasses.dataclass(frozen=True)
class WanVAE:
  """The codec: pure functions of `params`, {"encoder": State, "decoder": State}; each direction needs its own part only.

  Pixels are in -1..1, latents normalised to about zero mean and unit deviation. Whoever calls jits (`self` and `first` static)
  and chooses what to donate; after the first chunk, all chunks of one length run one program.
  """

  config: WanVAEConfig = WanVAEConfig()

  @property
  def time(self) -> int:
    return 2 ** sum(self.config.time_down)

  @property
  def space(self) -> int:
    return 2 ** len(self.config.time_down)

  @property
  def channels(self) -> int:
    return self.config.z_dim

  def init(self, seed: int = 0) -> dict[str, nnx.State]:
    """Random weights."""
    rngs = nnx.Rngs(params=jax.random.key(seed, impl="rbg"))
    return {"encoder": nnx.state(Encoder(self.config, rngs)), "decoder": nnx.state(Decoder(self.config, rngs))}

  def encode(self, params, pixels: Float[Array, "B F H W 3"]) -> Float[Array, "B T h w C"]:
    """Float32 latents, the mean of the posterior. Raises ValueError unless F = 1 + 4 (T - 1) and sides divide by 8."""
    return self.encode_chunk(params, None, pixels, first=True)[1]

  def decode(self, params, latents: Float[Array, "B T h w C"]) -> Float[Array, "B F H W 3"]:
    """Float32 pixels of a whole clip, clipped to -1..1."""
    return self.decode_chunk(params, None, latents, first=True)[1]

  def init_encoder_state(self, batch: int, height: int, width: int) -> Any:
    """The state before a video of height x width pixels begins: a pytree of zeros."""
    return self._zeros(0, (batch, 1, height, width, 3))

  def init_decoder_state(self, batch: int, h: int, w: int) -> Any:
    """The state before a video of h x w latents begins: a pytree of zeros, 32 arrays at Wan2.1's sizes."""
    return self._zeros(1, (batch, 1, h, w, self.channels))

  def encode_chunk(
    self, params, state, pixels: Float[Array, "B f H W 3"], first: bool = False
  ) -> tuple[Any, Float[Array, "B t h w C"]]:
    """The next f = 4 t frames, or the first 1 + 4 (t - 1), which forget what the state held.

    Returns (state, latents); raises ValueError on other shapes.
    """
    f, (height, width, c) = pixels.shape[1], pixels.shape[2:]
    if f < 1 or (f - first) % self.time or height % self.space or width % self.space or c != 3:
      want = f"{'1 + ' if first else ''}{self.time} n frames, sides divisible by {self.space}, 3 channels"
      raise ValueError(f"pixels: shape {pixels.shape}; want {want}")
    mean, scale = self._mean_scale()
    encoder = nnx.merge(_graphs(self.config)[0], params["encoder"])

    def step(state, x, first=False):
      mu, state = encoder(x, state, first)
      return state, at_least_float32((mu - mean) * scale)

    x = pixels.astype(mean.dtype)
    return self._chunk(step, state, x, first, self.time)

  def decode_chunk(
    self, params, state, latents: Float[Array, "B t h w C"], first: bool = False
  ) -> tuple[Any, Float[Array, "B f H W 3"]]:
    """The next t latents to f = 4 t frames, or the first to 1 + 4 (t - 1), which forget what the state held.

    Returns (state, pixels); raises ValueError on other shapes.
    """
    if latents.shape[1] < 1 or latents.shape[-1] != self.channels:
      raise ValueError(f"latents: shape {latents.shape}; want at least one frame of {self.channels} channels")
    mean, scale = self._mean_scale()
    decoder = nnx.merge(_graphs(self.config)[1], params["decoder"])

    def step(state, z, first=False):
      x, state = decoder(z / scale + mean, state, first)
      return state, jnp.clip(at_least_float32(x), -1, 1)

    return self._chunk(step, state, latents.astype(mean.dtype), first, 1)

  def _chunk(self, step, state, x, first: bool, n: int):
    """step on the first frame alone if it begins the video, then on n frames at a time."""
    out = []
    if first:
      state, y = step(None, x[:, :1], first=True)
      x = x[:, 1:]
      out.append(y)
    if x.shape[1]:
      state, y = scan_frames(step, state, x.reshape(x.shape[0], -1, n, *x.shape[2:]))
      out.append(y)
    return state, jnp.concatenate(out, 1)

  def _mean_scale(self):
    """In the compute dtype, as the official code rounds them (section 5)."""
    dtype = jnp.dtype(self.config.dtype)
    return jnp.asarray(self.config.mean, dtype), 1 / jnp.asarray(self.config.std, dtype)

  def _zeros(self, part: int, shape: tuple[int, ...]):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), _state_shapes(self.config, part, shape))


def parameter_count(cfg: WanVAEConfig) -> int:
  """Counted on shapes; no array is made."""
  return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(jax.eval_shape(lambda: WanVAE(cfg).init())))


def from_uint8(frames: UInt8[Array, "*B H W 3"]) -> Float[Array, "*B H W 3"]:
  """0..255 to -1..1."""
  return frames.astype(jnp.float32) / 127.5 - 1


def to_uint8(pixels: Float[Array, "*B H W 3"]) -> UInt8[Array, "*B H W 3"]:
  """-1..1 to 0..255, rounded to the nearest."""
  return jnp.clip(jnp.round((pixels + 1) * 127.5), 0, 255).astype(jnp.uint8)
