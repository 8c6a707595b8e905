"""Handwriting: real 8x8 digits, split by writer, enlarged to smooth alpha masks.

The digits are the UCI optical-recognition set that scikit-learn carries. Neighbours in it share writers, so the test
split is a contiguous tail of every class, never a random draw.
"""

import functools

import numpy as np
from jaxtyping import Float, Int
from PIL import Image

SPLITS = ("train", "test")
CLASSES = 10
_TEST_SHARE = 0.2
_INK = (0.15, 0.7)  # upsampled ink at or below the first is transparent, at or above the second opaque


@functools.cache
def load(split: str) -> tuple[Float[np.ndarray, "n 8 8"], Int[np.ndarray, " n"]]:
  """Images (float32, ink 0..1) and labels of one split, in the order of the data set; both read-only.

  Raises:
    ValueError: split is neither "train" nor "test".
  """
  if split not in SPLITS:
    raise ValueError(f'split: {split!r} is not one of "train", "test"')
  from sklearn.datasets import load_digits  # a slow import that a plain vocabulary lookup should not pay

  bunch = load_digits()
  is_test = np.zeros(len(bunch.target), bool)
  for label in range(CLASSES):
    members = np.flatnonzero(bunch.target == label)
    is_test[members[len(members) - round(len(members) * _TEST_SHARE) :]] = True
  keep = is_test == (split == "test")
  images, labels = (bunch.images[keep] / 16).astype(np.float32), bunch.target[keep].astype(np.int64)
  images.flags.writeable = labels.flags.writeable = False
  return images, labels


@functools.cache
def members(split: str, label: int) -> Int[np.ndarray, " m"]:
  """Indices into `load(split)` of one class."""
  return np.flatnonzero(load(split)[1] == label)


@functools.cache
def glyph(split: str, sample: int, size: int) -> Float[np.ndarray, "size size"]:
  """Alpha mask (float32, 0..1, read-only) of one digit, enlarged to size x size pixels by a smooth (bicubic) filter."""
  ink = Image.fromarray(load(split)[0][sample]).resize((size, size), Image.Resampling.BICUBIC)
  low, high = _INK
  alpha = np.clip((np.asarray(ink) - low) / (high - low), 0, 1)
  alpha.flags.writeable = False
  return alpha
