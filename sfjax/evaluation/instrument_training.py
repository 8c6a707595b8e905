"""Teaches the instrument, on endless drawn scenes: digits as a video shows them, and what a failing model shows instead.

Scenes are drawn and learnt in one compiled step. A shape is a warped glyph or no digit at all; others pass before and
behind it, a grey bar may cover it, and the frame is blurred and noised a little. How much ink remains decides the label.

Letters: B scenes, P rows and columns of a shape, S of a frame, G of a glyph.
"""

import functools
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.scipy.ndimage import map_coordinates
from jaxtyping import Array, Float, Int, UInt8

from sfjax import instrument
from sfjax.data import handwriting
from sfjax.data.digits import COLOURS, SIZE, DigitsConfig, render
from sfjax.errors import Parser, UserError, command
from sfjax.instrument import NONE

KINDS = ("digit", "molten", "blob", "bar", "nothing")
_SHARES = (0.7, 0.17, 0.06, 0.04, 0.03)
_NONE_WEIGHT = 0.3  # a fat one is a blob, an unlucky eight is molten: in doubt it is a digit
_LEGIBLE = (0.45, 0.6)  # share of a digit's ink below which it is "none", and above which it is itself
_ALIKE = 0.75  # overlap (intersection over union) beyond which a molten shape is still one of its digits
_GLYPH, _PATCH = 22, 32
_STEPS, _BATCH, _RATE = 2500, 256, 3e-3


class Scenes(NamedTuple):
  """Frames to learn from, the colour to look for, the class to find (NONE for none); weight 0 where tastes differ."""

  frames: UInt8[Array, "B S S 3"]
  colour: Int[Array, " B"]
  label: Int[Array, " B"]
  weight: Float[Array, " B"]
  kind: Int[Array, " B"]


@functools.cache
def bank(split: str) -> tuple[Float[np.ndarray, "n G G"], Int[np.ndarray, " n"]]:
  """Every glyph of a split, and its class."""
  labels = handwriting.load(split)[1]
  return np.stack([handwriting.glyph(split, i, _GLYPH) for i in range(len(labels))]), labels


def _stretch(cells: int, size: int) -> np.ndarray:
  """Linear interpolation from a few cells to `size` pixels, [size, cells]."""
  t = np.linspace(0, cells - 1, size)[:, None] - np.arange(cells)
  return np.maximum(1 - np.abs(t), 0).astype(np.float32)


def _smooth_field(key, shape: tuple[int, ...], cells: int, size: int):
  """Smooth normal noise [*shape, size, size]."""
  up = _stretch(cells, size)
  return up @ jax.random.normal(key, (*shape, cells, cells)) @ up.T


def _blur(image: Float[Array, "s s *C"], soft) -> Float[Array, "s s *C"]:
  """Every pixel gives a share `soft` to each of its neighbours along both axes."""
  n = len(image)
  mix = (1 - 2 * soft) * jnp.eye(n) + soft * (jnp.eye(n, k=1) + jnp.eye(n, k=-1))
  return jnp.einsum("yi,ij...,xj->yx...", mix, image, mix)


def _plane() -> Float[np.ndarray, "2 P P"]:
  """(y, x) of a patch's pixels from its middle."""
  return np.mgrid[:_PATCH, :_PATCH].astype(np.float32) - (_PATCH - 1) / 2


def _warp(key, glyph: Float[Array, "G G"], bend) -> Float[Array, "P P"]:
  """A glyph in another hand: 17 to 23 pixels large, turned, slanted, bent by `bend` pixels, finer or bolder."""
  a, b, c, d, e, f = jax.random.split(key, 6)
  scale = jax.random.uniform(a, (2, 1, 1), minval=_GLYPH / 23, maxval=_GLYPH / 17)
  turn, slant = 0.12 * jax.random.normal(b, (2,)).clip(-2, 2)
  y, x = _plane()
  at = jnp.stack([y + turn * x, x - (turn + slant) * y]) * scale * (1 + 0.05 * jax.random.normal(c, (2, 1, 1)))
  at = at + bend * _smooth_field(d, (2,), 4, _PATCH) + (_GLYPH - 1) / 2
  ink = map_coordinates(glyph, at, order=1)
  stroke = jnp.clip((_blur(ink, 0.25) - jax.random.uniform(e, minval=0.25, maxval=0.65)) / 0.6 + 0.5, 0, 1)
  return jnp.where(jax.random.bernoulli(f), stroke, ink)


def _shape(key, glyphs, labels) -> tuple[Array, Array, Array, Array]:
  """A patch of ink [P,P], its class, its kind, and whether it is clearly of that kind."""
  k = iter(jax.random.split(key, 16))
  uniform = lambda low, high: jax.random.uniform(next(k), minval=low, maxval=high)
  kind = jax.random.choice(next(k), len(KINDS), p=jnp.array(_SHARES))
  i = jax.random.randint(next(k), (), 0, len(labels))
  other = jax.random.choice(next(k), len(labels), p=(labels != labels[i]).astype(jnp.float32))
  digit, second = _warp(next(k), glyphs[i], uniform(0.0, 0.8)), _warp(next(k), glyphs[other], uniform(0.0, 2.0))

  # both digits stay visible: where only one has ink, the blend is still half opaque or more
  blend, cut = uniform(0.4, 0.6), uniform(0.15, 0.4)
  molten = blend * digit + (1 - blend) * second
  molten = jnp.clip((molten - cut) / 0.4 + 0.5, 0, 1) * (molten > 0.05)
  alike = lambda a: jnp.minimum(a, molten).sum() > _ALIKE * jnp.maximum(a, molten).sum()
  clear = (kind != KINDS.index("molten")) | ~(alike(digit) | alike(second))

  y, x = _plane()
  round_or_flat = jnp.hypot(uniform(1.0, 1.6) * y, x) / uniform(7.0, 11.0)  # a tall blob is a bold one
  field = _smooth_field(next(k), (), 5, _PATCH) + 1.2 - round_or_flat**2
  blob = jnp.clip(1.5 * field, 0, 1)

  angle = uniform(0.25 * np.pi, 0.75 * np.pi)  # from upright, where a bar is a one
  along, across = y * jnp.cos(angle) + x * jnp.sin(angle), x * jnp.cos(angle) - y * jnp.sin(angle)
  within = lambda distance, half: jnp.clip(half + 0.5 - jnp.abs(distance), 0, 1)
  bar = within(along, uniform(6.0, 14.0)) * within(across, uniform(2.0, 5.0))

  return jnp.stack([digit, molten, blob, bar, jnp.zeros_like(digit)])[kind], labels[i], kind, clear


def _place(patch: Float[Array, "P P"], at: Float[Array, "2"]) -> Float[Array, "S S"]:
  """Ink on the frame, the patch's middle at (y, x); the frame's edge cuts it."""
  cells = at[:, None] + jnp.arange(_PATCH) - (_PATCH - 1) / 2
  rows, columns = jnp.maximum(1 - jnp.abs(cells[:, None] - (jnp.arange(SIZE)[:, None] + 0.5)), 0)
  return rows @ patch @ columns.T


def _box(key, near: Float[Array, "2"]) -> Float[Array, "S S"]:
  """An upright box near a place."""
  a, b = jax.random.split(key)
  half = jax.random.uniform(a, (2, 1), minval=4.5, maxval=24.0)
  middle = near + jax.random.uniform(b, (2,), minval=-26.0, maxval=26.0)
  rows, columns = jnp.clip(half + 0.5 - jnp.abs(jnp.arange(SIZE) + 0.5 - middle[:, None]), 0, 1)
  return rows[:, None] * columns


def _scene(key, patch, neighbour) -> tuple[Array, Array, Array]:
  """A frame around one shape: pixels, colour, share of the shape's ink that is left."""
  k = iter(jax.random.split(key, 24))
  uniform = lambda low, high, *shape: jax.random.uniform(next(k), shape, minval=low, maxval=high)
  chance = lambda p: (jax.random.uniform(next(k)) < p).astype(jnp.float32)
  at = uniform(6.0, 58.0, 2)

  # a straight cut through the shape
  angle, offset = uniform(0.0, 2 * np.pi), uniform(-8.0, 12.0)
  y, x = _plane()
  kept = jnp.clip(0.5 + offset + y * jnp.sin(angle) + x * jnp.cos(angle), 0, 1)
  ink = _place(jnp.where(chance(0.15), kept * patch, patch), at)

  passer = _place(neighbour, at + uniform(-26.0, 26.0, 2)) * chance(0.6)
  over = chance(0.5)
  bar = _box(next(k), at) * chance(0.45)
  share = (ink * (1 - over * passer) * (1 - bar)).sum() / jnp.maximum(patch.sum(), 1e-6)

  colour = jax.random.randint(next(k), (), 0, len(COLOURS))
  rival = (colour + jax.random.randint(next(k), (), 1, len(COLOURS))) % len(COLOURS)
  rgb = jnp.array(list(COLOURS.values()), jnp.float32)
  tint = lambda c: rgb[c] * uniform(0.85, 1.1) + 8 * jax.random.normal(next(k), (3,))
  paint = lambda image, alpha, hue: image + alpha[..., None] * (hue - image)
  other = tint(rival)
  image = uniform(8.0, 32.0) + jnp.moveaxis(4 * _smooth_field(next(k), (3,), 4, SIZE), 0, -1)
  image = paint(image, passer * (1 - over), other)
  image = paint(image, ink, tint(colour))
  image = paint(image, passer * over, other)
  image = paint(image, bar, uniform(90.0, 155.0))

  image = _blur(image, uniform(0.0, 0.22) * chance(0.5))
  image = image + uniform(0.0, 10.0) * chance(0.5) * jax.random.normal(next(k), image.shape)
  return jnp.clip(jnp.round(image), 0, 255).astype(jnp.uint8), colour, share


def scenes(key: Array, glyphs: Float[Array, "n G G"], labels: Int[Array, " n"], count: int) -> Scenes:
  """`count` scenes; a scene's neighbour is the shape of the one before it."""
  a, b = jax.random.split(key)
  patches, label, kind, clear = jax.vmap(_shape, (0, None, None))(jax.random.split(a, count), glyphs, labels)
  frames, colour, share = jax.vmap(_scene)(jax.random.split(b, count), patches, jnp.roll(patches, 1, 0))
  low, high = _LEGIBLE
  written = kind == KINDS.index("digit")
  weight = jnp.where(written & (share > low), jnp.where(share < high, 0.0, 1.0), _NONE_WEIGHT)
  weight = jnp.where(clear, weight, 0.0)
  return Scenes(frames, colour, jnp.where(written & (share > low), label, NONE), weight, kind)


def _loss(params, key, crops, label, weight):
  keep = jax.random.bernoulli(key, 0.75, (len(crops), 576)) / 0.75
  target = optax.smooth_labels(jax.nn.one_hot(label, NONE + 1), 0.02)
  error = optax.softmax_cross_entropy(instrument.network(params)(crops, keep), target)
  return (weight * error).sum() / weight.sum()


def train(steps: int = _STEPS, seed: int = 0, log=print) -> dict:
  """Weights learnt from train-split handwriting."""
  glyphs, labels = (jnp.asarray(x) for x in bank("train"))
  tx = optax.adamw(optax.cosine_onecycle_schedule(steps, _RATE, 0.1), weight_decay=1e-3)
  params = instrument.init(seed)
  run = jax.random.key(seed)

  @functools.partial(jax.jit, donate_argnums=(0, 1))
  def advance(params, opt, step):
    draw, drop = jax.random.split(jax.random.fold_in(run, step))
    drawn = scenes(draw, glyphs, labels, _BATCH)
    crops, _, _ = instrument.see(drawn.frames, drawn.colour)
    loss, grads = jax.value_and_grad(_loss)(params, drop, crops, drawn.label, drawn.weight)
    updates, opt = tx.update(grads, opt, params)
    return optax.apply_updates(params, updates), opt, loss

  opt, began = tx.init(params), time.time()
  for step in range(steps):
    params, opt, loss = advance(params, opt, step)
    if step % 200 == 199:
      log(f"step {step + 1} of {steps}, loss {float(loss):.3f}, {time.time() - began:.0f} s")
  return jax.device_get(params)


def ceiling(params: dict, clips: int = 1500, seed: int = 1) -> float:
  """Accuracy on real test-split clips, over digits of which at least 90 % is seen; one frame a clip."""
  config = DigitsConfig(split="test", chunks=2)
  frames, colours, labels = [], [], []
  for index in range(clips):
    clip = render(config, seed, index)
    at = index % len(clip.frames)
    for i in np.flatnonzero(clip.visibility[at] >= 0.9):
      frames.append(clip.frames[at])
      colours.append(instrument.colour_index(clip.colours[i]))
      labels.append(clip.labels[i])
  found = instrument.read(params, np.stack(frames), np.array(colours)).probabilities.argmax(-1)
  return float((found == np.array(labels)).mean())


def false_positives(params: dict, count: int = 4096, seed: int = 2) -> dict[str, float]:
  """Share of every kind of shape that is no digit but is read as one, from test-split handwriting."""
  drawn = jax.jit(scenes, static_argnums=3)(jax.random.key(seed), *(jnp.asarray(x) for x in bank("test")), count)
  drawn = jax.tree.map(np.asarray, drawn)
  taken = instrument.read(params, drawn.frames, drawn.colour).probabilities.argmax(-1) != NONE
  return {
    name: float(taken[(drawn.kind == i) & (drawn.weight > 0)].mean()) for i, name in enumerate(KINDS) if name != "digit"
  }


@command
def main(argv: list[str]) -> None:
  """Trains, measures and writes the classifier."""
  parser = Parser(prog="python -m sfjax.instrument", description=__doc__.splitlines()[0])
  parser.add_argument("--out", default=str(instrument.SHIPPED), help="the npz file to write")
  parser.add_argument("--steps", type=int, default=_STEPS)
  parser.add_argument("--seed", type=int, default=0)
  flags = parser.parse_args(argv)
  if flags.steps < 10:
    raise UserError(f"--steps: {flags.steps}; want at least 10")
  params = train(flags.steps, flags.seed)
  accuracy, wrong = ceiling(params), false_positives(params)
  instrument.save(flags.out, params, {"accuracy": accuracy, "false_positives": wrong["molten"]})
  shares = ", ".join(f"{name} {share:.1%}" for name, share in wrong.items())
  print(f"{flags.out}: accuracy {accuracy:.1%} on test handwriting; taken for digits: {shares}")
