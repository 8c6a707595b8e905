"""The measuring instrument: finds a digit by its colour, cuts it out, and says which it is, or that it is none.

One path serves training and measuring, pixels -> mask -> place -> crop -> network, so what is measured looks exactly like
what was learnt. The network saw train-split handwriting only, and half digits, blobs, bars and molten digits as "none".
`python -m sfjax.instrument` trains it on a CPU (see evaluation/instrument_training.py) and writes checkpoints/classifier.npz.

Letters: B frames, S rows and columns of a frame, C of a crop, K classes (ten digits, then "none").
"""

import functools
import pathlib
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, UInt8

from sfjax import checkpoint
from sfjax.data import handwriting
from sfjax.data.digits import COLOURS
from sfjax.errors import UserError

SHIPPED = pathlib.Path(__file__).parent.parent / "checkpoints" / "classifier.npz"
NONE = handwriting.CLASSES
IN_SIGHT = 80.0  # pixels of ink; the thinnest digits in full view have 84, the median one 135

_CROP = 26  # the largest glyph, 22, and the distance of its ink's centroid from its middle
_BATCH = 512
_EMPTY = 20.0  # pixels of ink below which there is nothing to read
_MEASURED = ("accuracy", "false_positives")  # kept beside the weights
_NAMES = tuple(COLOURS)
_RGB = np.array(list(COLOURS.values()), np.float32)
_HUES = _RGB - _RGB.mean(1, keepdims=True)  # the direction away from grey


class Reading(NamedTuple):
  """What the instrument sees of one colour in every frame.

  Attributes:
    probabilities: of the ten digits and "none". area: pixels of ink. centroid: (x, y) in pixels, of the pixel corner grid.
  """

  probabilities: Float[np.ndarray, "*B 11"]
  area: Float[np.ndarray, "*B"]
  centroid: Float[np.ndarray, "*B 2"]


# --- mask, place, crop


def colour_mask(frames: UInt8[Array, "B S S 3"], colour: Int[Array, " B"]) -> Float[Array, "B S S"]:
  """Soft alpha of the pixels of one colour (an index into COLOURS): far enough from grey, and nearer to it than to others."""
  x = frames.astype(jnp.float32)
  x = x - x.mean(-1, keepdims=True)
  hues = jnp.asarray(_HUES)
  length = jnp.linalg.norm(hues, axis=-1)
  along = jnp.einsum("bijc,kc->kbij", x, hues / length[:, None])
  own = along[colour, jnp.arange(x.shape[0])]
  is_own = jnp.arange(len(_NAMES))[:, None] == colour
  rival = jnp.where(is_own[..., None, None], -jnp.inf, along).max(0)
  # as a cosine, 0.27 lies between the colour itself and the nearest other one (cyan and blue)
  nearer = (own - rival) / jnp.maximum(jnp.linalg.norm(x, axis=-1), 1)
  gate = jnp.clip(0.5 + nearer / 0.27, 0, 1)
  return jnp.clip((own / length[colour][:, None, None] - 0.15) / 0.7, 0, 1) * gate


def _band(size: int, sigma: float) -> np.ndarray:
  at = np.arange(size)
  return np.exp(-0.5 * ((at[:, None] - at) / sigma) ** 2).astype(np.float32)


def locate(alpha: Float[Array, "B S S"]) -> tuple[Float[Array, " B"], Float[Array, "B 2"]]:
  """Area and centroid (x, y) of the densest patch of ink as large as a digit; specks elsewhere do not count."""
  size = alpha.shape[-1]
  band = jnp.asarray(_band(size, 5.0))
  dense = (band @ alpha @ band).reshape(len(alpha), -1)
  start = jnp.argmax(dense, -1)
  at = jnp.stack([start % size, start // size], -1) + 0.5
  grid = jnp.arange(size) + 0.5
  for _ in range(3):
    near = jnp.clip(_CROP / 2 + 0.5 - jnp.abs(grid - at[..., None]), 0, 1)  # [B, (x, y), S]
    inside = alpha * near[:, 1, :, None] * near[:, 0, None, :]
    area = inside.sum((1, 2))
    moment = jnp.stack([inside.sum(1) @ grid, inside.sum(2) @ grid], -1)
    at = jnp.where(area[:, None] > 1, moment / jnp.maximum(area, 1)[:, None], at)
  return area, at


def crop(alpha: Float[Array, "B S S"], centroid: Float[Array, "B 2"]) -> Float[Array, "B C C"]:
  """Squares of a digit's size around the centroids, with bilinear weights; beyond the frame there is no ink."""
  grid = jnp.arange(alpha.shape[-1]) + 0.5
  at = centroid[..., None] + jnp.arange(_CROP) - (_CROP - 1) / 2
  columns, rows = jnp.moveaxis(jnp.maximum(1 - jnp.abs(at[..., None] - grid), 0), 1, 0)
  return jnp.einsum("biy,byx,bjx->bij", rows, alpha, columns)


def see(
  frames: UInt8[Array, "B S S 3"], colour: Int[Array, " B"]
) -> tuple[Float[Array, "B C C"], Float[Array, " B"], Float[Array, "B 2"]]:
  """From pixels to the network's input: crops, areas and centroids."""
  alpha = colour_mask(frames, colour)
  area, centroid = locate(alpha)
  return crop(alpha, centroid), area, centroid


# --- the network


class Network(nnx.Module):
  """Three convolutions and two linear maps: crops to logits of ten digits and "none"."""

  def __init__(self, rngs: nnx.Rngs):
    he = dict(kernel_init=nnx.initializers.he_normal(), rngs=rngs)
    self.conv1 = nnx.Conv(1, 16, (3, 3), **he)
    self.conv2 = nnx.Conv(16, 32, (3, 3), **he)
    self.conv3 = nnx.Conv(32, 64, (3, 3), **he)
    self.hidden = nnx.Linear(64 * 3 * 3, 96, **he)
    self.out = nnx.Linear(96, NONE + 1, rngs=rngs)

  def __call__(self, crops: Float[Array, "B C C"], keep: Float[Array, "B 576"] | float = 1.0) -> Float[Array, "B 11"]:
    """Logits; `keep` multiplies the features (dropout in training)."""
    x = crops[..., None]
    for conv in (self.conv1, self.conv2, self.conv3):
      x = nnx.max_pool(nnx.relu(conv(x)), (2, 2), strides=(2, 2))
    x = x.reshape(x.shape[0], -1) * keep
    return self.out(nnx.relu(self.hidden(x)))


@functools.cache
def _structure():
  return nnx.split(nnx.eval_shape(lambda: Network(nnx.Rngs(0))))


def init(seed: int) -> dict:
  """Random weights as a pure dict."""
  return nnx.to_pure_dict(nnx.state(Network(nnx.Rngs(seed))))


def network(params: dict) -> Network:
  """The network with these weights."""
  graph, state = _structure()
  state = jax.tree.map(lambda x: x, state)  # a fresh container: the cached one stays abstract
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)


# --- files


def save(path, params: dict, measured: dict[str, float]) -> None:
  """Weights in float16 and what was measured of them, "accuracy" and "false_positives", both of test handwriting."""
  half = {name: x.astype(np.float16) for name, x in checkpoint.flatten(params).items()}
  checkpoint.save_arrays(path, half | {name: np.float32(measured[name]) for name in _MEASURED})


@functools.cache
def load(path=SHIPPED) -> tuple[dict, dict[str, float]]:
  """Weights (float32) and what was measured of them.

  Raises:
    UserError: the file is absent, damaged, or holds another network.
  """
  arrays = checkpoint.load_arrays(path)
  like = init(0)
  want = checkpoint.flatten(like) | {name: np.zeros(()) for name in _MEASURED}
  for name in [*want, *arrays]:
    if name not in want or name not in arrays or arrays[name].shape != want[name].shape:
      raise UserError(f"{path}: not a classifier of this version ({name})")
  weights = [jnp.asarray(arrays[name], jnp.float32) for name in checkpoint.flatten(like)]
  return jax.tree.unflatten(jax.tree.structure(like), weights), {name: float(arrays[name]) for name in _MEASURED}


# --- reading


def classify(params: dict, frames: UInt8[Array, "B S S 3"], colour: Int[Array, " B"]) -> Reading:
  """`read` for use inside a compiled program: one row of frames, no batching."""
  crops, area, centroid = see(frames, colour)
  probabilities = jax.nn.softmax(network(params)(crops))
  none = jax.nn.one_hot(NONE, NONE + 1)
  return Reading(jnp.where((area < _EMPTY)[:, None], none, probabilities), area, centroid)


_compiled = jax.jit(classify)


def read(params: dict, frames: UInt8[np.ndarray, "*B S S 3"], colour: Int[np.ndarray, "*B"]) -> Reading:
  """What every frame shows in a colour (an index into COLOURS, broadcast to the frames' leading axes).

  Works in batches of one size, so that any number of frames compiles once. Raises ValueError unless frames are RGB squares.
  """
  lead, shape = frames.shape[:-3], frames.shape[-3:]
  if shape[2:] != (3,) or shape[0] != shape[1]:
    raise ValueError(f"frames: shape {frames.shape}; want squares of RGB pixels")
  rows = frames.reshape(-1, *shape)
  colour = np.broadcast_to(np.asarray(colour, np.int32), lead).reshape(-1)
  parts = []
  for i in range(0, len(rows), _BATCH):
    some, hue = rows[i : i + _BATCH], colour[i : i + _BATCH]
    spare = _BATCH - len(some)
    part = _compiled(params, np.pad(some, ((0, spare), (0, 0), (0, 0), (0, 0))), np.pad(hue, (0, spare)))
    parts.append([np.asarray(x)[: len(some)] for x in part])
  return Reading(*(np.concatenate(x).reshape(*lead, *x[0].shape[1:]) for x in zip(*parts, strict=True)))


def colour_index(name: str) -> int:
  """Index of a colour's name."""
  return _NAMES.index(name)


if __name__ == "__main__":
  from sfjax.evaluation.instrument_training import main

  main(sys.argv[1:])
