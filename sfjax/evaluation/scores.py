"""From what the instrument reads to one score a video: is the digit the one asked for, does it stay, does it move smoothly.

All functions take whole videos and return arrays over videos, booleans where a score is a proportion; NaN where a video
tells nothing. Digits that a video does not have are masked by `present`.

Letters: V videos, F frames, n digits a video may have.
"""

import numpy as np
from jaxtyping import Bool, Float, Int

from sfjax.instrument import IN_SIGHT, NONE, Reading


def _share(hits: np.ndarray, among: np.ndarray) -> Float[np.ndarray, " V"]:
  """Share of hits among what counts, per video."""
  axes = tuple(range(1, among.ndim))
  count = among.sum(axes)
  return np.where(count, (hits & among).sum(axes) / np.maximum(count, 1), np.nan)


def answer(probabilities: Float[np.ndarray, "*V F 11"], frames: Bool[np.ndarray, "*V F"]) -> Int[np.ndarray, "*V"]:
  """Class of the mean probabilities over some frames; NONE if there are none."""
  weight = frames[..., None]
  mean = (probabilities * weight).sum(-2) / np.maximum(weight.sum(-2), 1)
  return np.where(frames.any(-1), mean.argmax(-1), NONE)


def accuracy(
  seen: Reading, labels: Int[np.ndarray, "V n"], present: Bool[np.ndarray, "V n"], frames: slice
) -> dict[str, Float[np.ndarray, " V"]]:
  """Of prompted digits over some frames.

  Args:
    seen: of [V,F,n] (video, frame, digit's colour).

  Returns:
    accuracy: share of (frame, digit) pairs read as the digit, among those with ink in sight; 0 if a digit is never in sight.
    in_sight: share of pairs with ink in sight.
  """
  right = seen.probabilities[:, frames].argmax(-1) == labels[:, None]
  visible = seen.area[:, frames] >= IN_SIGHT
  pairs = np.broadcast_to(present[:, None], visible.shape)
  absent = (present & ~visible.any(1)).any(1)
  return {
    "accuracy": np.where(absent, 0.0, _share(right, visible & pairs)),
    "in_sight": _share(visible, pairs),
  }


def identity_kept(seen: Reading, present: Bool[np.ndarray, "V n"], first: slice, last: slice) -> Bool[np.ndarray, " V"]:
  """Whether every digit reads the same, and as a digit, in two stretches of frames, whatever the prompt was."""
  visible = np.moveaxis(seen.area >= IN_SIGHT, 2, 1)
  probabilities = np.moveaxis(seen.probabilities, 2, 1)
  before, after = (answer(probabilities[:, :, s], visible[:, :, s]) for s in (first, last))
  return ((before == after) & (before != NONE) | ~present).all(1)


def jerk(seen: Reading, present: Bool[np.ndarray, "V n"], frames: slice) -> Float[np.ndarray, " V"]:
  """Mean absolute second difference of the centroids, pixels a frame squared, where ink is in sight in all three frames."""
  visible = (seen.area[:, frames] >= IN_SIGHT) & present[:, None]
  usable = visible[:, 2:] & visible[:, 1:-1] & visible[:, :-2]
  moved = np.abs(np.diff(seen.centroid[:, frames], 2, axis=1)).mean(-1)
  count = usable.sum((1, 2))
  return np.where(count, (moved * usable).sum((1, 2)) / np.maximum(count, 1), np.nan)


def speed(seen: Reading, present: Bool[np.ndarray, "V n"], frames: slice, fps: float) -> Float[np.ndarray, " V"]:
  """How far centroids come within half a second, in pixels a second: a digit that trembles on the spot has none.

  Counted where ink is in sight before and after; NaN where it never is.
  """
  lag = round(fps / 2)
  visible, centroid = seen.area[:, frames] >= IN_SIGHT, seen.centroid[:, frames]
  usable = visible[:, lag:] & visible[:, :-lag] & present[:, None]
  moved = np.linalg.norm(centroid[:, lag:] - centroid[:, :-lag], axis=-1) * fps / lag
  count = usable.sum((1, 2))
  return np.where(count, (moved * usable).sum((1, 2)) / np.maximum(count, 1), np.nan)


def sharpness_drift(edges: Float[np.ndarray, "V F"], first: slice, last: slice) -> Float[np.ndarray, " V"]:
  """Edge energy of the last frames over that of the first."""
  return edges[:, last].mean(1) / np.maximum(edges[:, first].mean(1), 1e-9)


def prompt_scores(
  seen: Reading,
  edges: Float[np.ndarray, "V F"],
  labels: Int[np.ndarray, "V n"],
  present: Bool[np.ndarray, "V n"],
  fps: float,
  seconds: float,
) -> dict[str, np.ndarray]:
  """Every score of the prompt task at a horizon, from readings that reach at least that far."""
  end, second = round(seconds * fps), round(fps)
  whole, first, last = slice(0, end), slice(0, second), slice(max(0, end - second), end)
  at_end = accuracy(seen, labels, present, last)
  return {
    "accuracy, last second": at_end["accuracy"],
    "in sight, last second": at_end["in_sight"],
    "accuracy, whole": accuracy(seen, labels, present, whole)["accuracy"],
    "identity kept": identity_kept(seen, present, first, last),
    "jerk": jerk(seen, present, whole),
    "speed, last second": speed(seen, present, last, fps),
    "sharpness drift": sharpness_drift(edges, first, last),
  }


def memory_scores(
  seen: Reading,
  labels: Int[np.ndarray, " V"],
  revealed: Bool[np.ndarray, "V F"],
  rival: Int[np.ndarray, " V"] | None = None,
) -> dict[str, Bool[np.ndarray, " V"]]:
  """Every score of the memory task: what the uncovered digit is read as.

  Args:
    seen: of [V,F], in the colour of the covered digit. revealed: frames in which it should be in full view.
    rival: the digit of the video whose memory was put in; asks how often that is the answer.
  """
  found = answer(seen.probabilities, revealed)
  scores = {
    "accuracy": found == labels,
    "none": found == NONE,
    "not in sight": ~((seen.area >= IN_SIGHT) & revealed).any(1),
  }
  return scores if rival is None else scores | {"the other's digit": found == rival}
