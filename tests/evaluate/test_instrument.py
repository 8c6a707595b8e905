"""The shipped instrument reads real digits it never saw, in any colour, and refuses what is no digit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import instrument
from sfjax.data.digits import COLOURS, DigitsConfig, render
from sfjax.errors import UserError
from sfjax.evaluation.instrument_training import KINDS, bank, scenes
from sfjax.instrument import NONE


@pytest.fixture(scope="module")
def params():
  return instrument.load()[0]


@pytest.fixture(scope="module")
def real():
  """Digits in plain view in test-split clips: frames, colours, labels, middles of their cells."""
  rows = []
  for index in range(350):
    clip = render(DigitsConfig(split="test", chunks=2), 77, index)
    at = index % len(clip.frames)
    for i in np.flatnonzero(clip.visibility[at] >= 0.9):
      x0, y0, x1, y1 = clip.boxes[at, i]
      colour = instrument.colour_index(clip.colours[i])
      rows.append((clip.frames[at], colour, clip.labels[i], ((x0 + x1) / 2, (y0 + y1) / 2)))
  return tuple(np.array(x) for x in zip(*rows, strict=True))


def test_it_reads_real_digits_of_unseen_handwriting(params, real):
  frames, colours, labels, middles = real
  seen = instrument.read(params, frames, colours)
  assert (seen.probabilities.argmax(-1) == labels).mean() >= 0.96
  assert (seen.area >= instrument.IN_SIGHT).mean() >= 0.98
  assert np.abs(seen.centroid - middles).max() < 8 and np.abs(seen.centroid - middles).mean() < 1.5
  np.testing.assert_allclose(seen.probabilities.sum(-1), 1, rtol=1e-5)


def test_a_colour_nobody_has_is_none(params):
  empty = instrument.read(params, np.full((3, 64, 64, 3), 20, np.uint8), np.arange(3))
  assert (empty.probabilities[:, NONE] == 1).all() and (empty.area == 0).all()
  clips = [render(DigitsConfig(split="test", chunks=1, max_digits=1), 78, index) for index in range(40)]
  frames = np.stack([clip.frames[-1] for clip in clips])
  own = np.array([instrument.colour_index(clip.colours[0]) for clip in clips])
  for step in range(1, len(COLOURS)):
    seen = instrument.read(params, frames, (own + step) % len(COLOURS))
    assert (seen.probabilities.argmax(-1) == NONE).all() and (seen.area < instrument.IN_SIGHT / 2).all()


@pytest.mark.parametrize("name", COLOURS)
def test_masks_know_their_colour(name):
  frame = np.full((64, 64, 3), 25, np.uint8)
  frame[20:30, 20:30] = COLOURS[name]
  frame[40:50, 40:50] = 128  # a grey cover is nobody's
  masks = np.asarray(instrument.colour_mask(jnp.asarray(frame)[None].repeat(6, 0), jnp.arange(6)))
  own = instrument.colour_index(name)
  want = np.zeros((64, 64))
  want[20:30, 20:30] = 1
  np.testing.assert_allclose(masks[own], want, atol=1e-6)
  assert np.delete(masks, own, 0).max() < 0.1


def test_what_is_no_digit_is_seldom_read_as_one(params):
  drawn = jax.jit(scenes, static_argnums=3)(jax.random.key(5), *(jnp.asarray(x) for x in bank("test")), 768)
  drawn = jax.tree.map(np.asarray, drawn)
  taken = instrument.read(params, drawn.frames, drawn.colour).probabilities.argmax(-1) != NONE
  rate = {kind: taken[(drawn.kind == i) & (drawn.weight > 0)].mean() for i, kind in enumerate(KINDS)}
  assert rate["nothing"] == 0
  assert max(rate["bar"], rate["blob"]) < 0.1 and rate["molten"] < 0.3
  half = (drawn.kind == KINDS.index("digit")) & (drawn.label == NONE)
  assert taken[half].mean() < 0.1


def test_reading_does_not_depend_on_the_batch(params, real):
  frames, colours, _, _ = real
  whole = instrument.read(params, frames[:6], colours[:6])
  pairs = instrument.read(params, frames[:6].reshape(3, 2, 64, 64, 3), colours[:6].reshape(3, 2))
  assert pairs.probabilities.shape == (3, 2, 11) and pairs.centroid.shape == (3, 2, 2)
  for a, b in zip(whole, pairs, strict=True):
    np.testing.assert_array_equal(a, b.reshape(a.shape))
  with pytest.raises(ValueError, match="frames: shape"):
    instrument.read(params, frames[..., :2], colours)


def test_the_file_tells_its_accuracy_and_is_small():
  _, measured = instrument.load()
  assert measured["accuracy"] >= 0.97 and 0 <= measured["false_positives"] < 0.3
  assert instrument.SHIPPED.stat().st_size < 500_000


def test_a_damaged_file_is_one_line(tmp_path):
  whole = instrument.SHIPPED.read_bytes()
  (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
  with np.load(instrument.SHIPPED) as arrays:
    np.savez(tmp_path / "less.npz", **{k: arrays[k] for k in arrays.files[1:]})
    np.savez(tmp_path / "shape.npz", **{k: arrays[k][..., :-1] if arrays[k].ndim else arrays[k] for k in arrays.files})
  for name, message in (
    ("absent", "no such file"), ("cut", "damaged"), ("less", "not a classifier"), ("shape", "not a classifier")
  ):  # fmt: skip
    with pytest.raises(UserError, match=f"{name}.npz: .*{message}"):
      instrument.load(tmp_path / f"{name}.npz")
