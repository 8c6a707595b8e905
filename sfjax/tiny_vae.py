"""TAEHV's decoder for Wan2.1's latents (taew2_1.pth): a small stand-in for the VAE's.

The same interface as `WanVAE`'s decoder: one step takes one latent and gives 4 frames, of the first latent's only the last.
A block's memory is its previous frame, zeros at the start, so that a stream gives the whole clip's very frames; the demo of
Self-Forcing decodes every chunk anew behind 3 old latents instead. (self_forcing section 5.2)

Letters: B videos, F pixel frames, T = 1 + (F - 1) / 4 latent frames, H, W pixels, h = H / 8, w = W / 8, C channels.
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from sfjax import keys
from sfjax.checkpoint import named
from sfjax.errors import check
from sfjax.wan_vae import Conv, at_least_float32, scan_frames


@dataclasses.dataclass(frozen=True)
class TinyVAEConfig:
  """Sizes and numerics; the defaults are taew2_1's.

  Attributes:
    dims: channels of the stages, and of the last map. time_up: whether a stage doubles the frames; rows and columns always.
  """

  z_dim: int = 16
  dims: tuple[int, ...] = (256, 128, 64, 64)
  time_up: tuple[bool, ...] = (False, True, True)
  dtype: str = "float32"
  param_dtype: str = "float32"

  def __post_init__(self):
    check(
      self,
      ("time_up", len(self.time_up) == len(self.dims) - 1, f"{len(self.dims) - 1} values, one less than dims"),
      ("dtype", self.dtype in ("float32", "bfloat16", "float64"), "float32, bfloat16 or float64"),
    )


class MemBlock(nnx.Module):
  """relu(x + three convolutions of this frame beside the one before). State: the last frame."""

  def __init__(self, cfg: TinyVAEConfig, c: int, rngs: nnx.Rngs):
    self.convs = nnx.List([Conv(cfg, (3, 3), n * c, c, rngs) for n in (2, 1, 1)])

  def __call__(self, x, past):
    past = jnp.zeros_like(x[:, :1]) if past is None else past
    y = jnp.concatenate([x, jnp.concatenate([past, x[:, :-1]], 1)], -1)
    for i, conv in enumerate(self.convs):
      y = _same(conv, jax.nn.relu(y) if i else y)
    return jax.nn.relu(y + x), x[:, -1:]


class Stage(nnx.Module):
  """Three blocks, twice the rows and columns, and twice the frames where time grows."""

  def __init__(self, cfg: TinyVAEConfig, c_in: int, c_out: int, in_time: bool, rngs: nnx.Rngs):
    self.blocks = nnx.List([MemBlock(cfg, c_in, rngs) for _ in range(3)])
    self.grow = Conv(cfg, (), c_in, c_in * (1 + in_time), rngs, bias=False)
    self.conv = Conv(cfg, (3, 3), c_in, c_out, rngs, bias=False)

  def __call__(self, x, pasts):
    new = []
    for block, past in zip(self.blocks, pasts or (None,) * 3, strict=True):
      x, past = block(x, past)
      new.append(past)
    b, f, h, w, c = x.shape
    y = self.grow(x)  # before the pixels are repeated: the same numbers, a quarter of the work
    y = y.reshape(b, f, h, w, -1, c).transpose(0, 1, 4, 2, 3, 5).reshape(b, -1, h, w, c)
    return _same(self.conv, y.repeat(2, 2).repeat(2, 3)), tuple(new)


class TinyDecoder(nnx.Module):
  """Latents to pixels in -1..1: [B,t,h,w,C] -> [B,4 t,H,W,3]."""

  def __init__(self, cfg: TinyVAEConfig, rngs: nnx.Rngs):
    pairs = zip(itertools.pairwise(cfg.dims), cfg.time_up, strict=True)
    self.conv_in = Conv(cfg, (3, 3), cfg.z_dim, cfg.dims[0], rngs)
    self.stages = nnx.List([Stage(cfg, a, b, in_time, rngs) for (a, b), in_time in pairs])
    self.conv_out = Conv(cfg, (3, 3), cfg.dims[-1], 3, rngs)

  def __call__(self, x, pasts):
    x = jax.nn.relu(_same(self.conv_in, 3 * jnp.tanh(x / 3)))
    new = []
    for stage, past in zip(self.stages, pasts or (None,) * len(self.stages), strict=True):
      x, past = stage(x, past)
      new.append(past)
    x = at_least_float32(_same(self.conv_out, jax.nn.relu(x)))
    return jnp.clip(x, 0, 1) * 2 - 1, tuple(new)


def _same(conv, x):
  return conv(x, padding=((1, 1), (1, 1)))


@functools.cache
def _graph(cfg: TinyVAEConfig):
  return nnx.graphdef(nnx.eval_shape(functools.partial(TinyDecoder, cfg), nnx.Rngs(0)))


@functools.cache
def _state_shapes(cfg: TinyVAEConfig, shape: tuple[int, ...]):
  """What the decoder leaves behind after a first input of that shape."""
  x = jax.ShapeDtypeStruct(shape, jnp.dtype(cfg.dtype))
  return jax.eval_shape(lambda x: TinyDecoder(cfg, nnx.Rngs(0))(x, None)[1], x)


@dataclasses.dataclass(frozen=True)
class TinyVAE:
  """The decoder: pure functions of `params`, an nnx.State. Latents are normalised, as the DiT has them."""

  config: TinyVAEConfig = TinyVAEConfig()

  @property
  def time(self) -> int:
    return 2 ** sum(self.config.time_up)

  @property
  def space(self) -> int:
    return 2 ** len(self.config.time_up)

  @property
  def channels(self) -> int:
    return self.config.z_dim

  def init(self, seed: int = 0) -> nnx.State:
    """Random weights."""
    return nnx.state(TinyDecoder(self.config, nnx.Rngs(params=jax.random.key(seed, impl="rbg"))))

  def decode(self, params, latents: Float[Array, "B T h w C"]) -> Float[Array, "B F H W 3"]:
    """Float32 pixels of a whole clip, in -1..1."""
    return self.decode_chunk(params, None, latents, first=True)[1]

  def init_decoder_state(self, batch: int, h: int, w: int) -> Any:
    """The state before a video of h x w latents begins: a pytree of zeros."""
    shapes = _state_shapes(self.config, (batch, 1, h, w, self.channels))
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

  def decode_chunk(
    self, params, state, latents: Float[Array, "B t h w C"], first: bool = False
  ) -> tuple[Any, Float[Array, "B f H W 3"]]:
    """The next t latents to f = 4 t frames, or the first to 1 + 4 (t - 1), which forget what the state held.

    Returns (state, pixels); raises ValueError on other shapes.
    """
    b, t, h, w, c = latents.shape
    if t < 1 or c != self.channels:
      raise ValueError(f"latents: shape {latents.shape}; want at least one frame of {self.channels} channels")
    decoder = nnx.merge(_graph(self.config), params)

    def step(state, z):
      pixels, state = decoder(z, state)
      return state, pixels

    x = latents.astype(jnp.dtype(self.config.dtype))[:, :, None]
    state = self.init_decoder_state(b, h, w) if first else state
    state, pixels = scan_frames(step, state, x)
    return state, pixels[:, self.time - 1 :] if first else pixels


def table(cfg: TinyVAEConfig) -> dict[str, tuple[str, bool]]:
  """Official names, their paths here, and whether a weight is a 1x1 convolution."""
  found = {"decoder.1": ("conv_in", False)}
  for i in range(len(cfg.time_up)):
    at = 3 + 6 * i  # three blocks, the repetition, grow, conv
    blocks = itertools.product(range(3), range(3))
    found |= {f"decoder.{at + j}.conv.{2 * k}": (f"stages/{i}/blocks/{j}/convs/{k}", False) for j, k in blocks}
    found |= {f"decoder.{at + 4}.conv": (f"stages/{i}/grow", True), f"decoder.{at + 5}": (f"stages/{i}/conv", False)}
  return found | {f"decoder.{3 + 6 * len(cfg.time_up) + 1}": ("conv_out", False)}


def from_official(cfg: TinyVAEConfig, arrays: Mapping[str, np.ndarray], source: str = "TAEHV weights") -> nnx.State:
  """`TinyVAE` parameters, NumPy arrays in cfg.param_dtype.

  Args:
    arrays: by official name, every one of the decoder's; the encoder's are not looked at. Where time could grow but does not,
      the last frame's channels of a wider map are taken, as TAEHV does. source: what an error names, the file.

  Raises:
    UserError: a weight is missing, unexpected or wrongly shaped.
  """
  shapes = jax.eval_shape(lambda: TinyVAE(cfg).init())
  ours = {name.removesuffix("/value"): x.shape for name, x in named(shapes).items()}
  arrays = {n: x for n, x in arrays.items() if not n.startswith("encoder.")}
  want, loaded = {}, {}
  for official, (where, point) in table(cfg).items():
    shape = ours[f"{where}/kernel"]
    want[f"{official}.weight"] = (*shape[:-3:-1], *((1, 1) if point else shape[:2]))
    if f"{where}/bias" in ours:
      want[f"{official}.bias"] = ours[f"{where}/bias"]
    if point and f"{official}.weight" in arrays:
      arrays[f"{official}.weight"] = arrays[f"{official}.weight"][-shape[-1] :]
  keys.check(want, arrays, source)
  for official, (where, _) in table(cfg).items():
    kernel = np.moveaxis(np.asarray(arrays[f"{official}.weight"]), (0, 1), (-1, -2))
    loaded[f"{where}/kernel"] = kernel.reshape(ours[f"{where}/kernel"])
    if f"{where}/bias" in ours:
      loaded[f"{where}/bias"] = np.asarray(arrays[f"{official}.bias"])
  return jax.tree.unflatten(
    jax.tree.structure(shapes), [np.ascontiguousarray(loaded[n], np.dtype(cfg.param_dtype)) for n in ours]
  )
