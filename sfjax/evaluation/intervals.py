"""95 % intervals over videos: Wilson for proportions, the bootstrap for means and for paired differences.

Letters: V videos.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float

_Z = 1.959964  # of the normal distribution, 97.5 %
_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Estimate:
  """A mean over `videos` videos and its 95 % interval; all NaN where there is none."""

  value: float
  low: float
  high: float
  videos: int

  def __str__(self):
    return "-" if self.videos == 0 else f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"


def wilson(hits: int, videos: int) -> tuple[float, float]:
  """Wilson's score interval of a proportion of at least one video."""
  p, spread = hits / videos, _Z**2 / videos
  middle = (p + spread / 2) / (1 + spread)
  half = np.sqrt(p * (1 - p) * spread + spread**2 / 4) / (1 + spread)
  return float(max(middle - half, 0)), float(min(middle + half, 1))


def _bootstrap(values: Float[np.ndarray, " V"]) -> tuple[float, float]:
  """Percentile interval of the mean; the same resamples for the same number of videos."""
  rng = np.random.default_rng(0)
  rows = max(1, 2**22 // len(values))
  means = [
    values[rng.integers(len(values), size=(min(rows, _RESAMPLES - i), len(values)))].mean(1)
    for i in range(0, _RESAMPLES, rows)
  ]
  low, high = np.percentile(np.concatenate(means), (2.5, 97.5))
  return float(low), float(high)


def estimate(scores: Bool[np.ndarray, " V"] | Float[np.ndarray, " V"]) -> Estimate:
  """Mean of one score a video: a proportion if they are booleans; videos whose score is NaN are left out."""
  if scores.dtype == bool:
    interval = wilson(int(scores.sum()), len(scores)) if len(scores) else ()
  else:
    scores = scores[np.isfinite(scores)]
    interval = _bootstrap(scores) if len(scores) else ()
  if not interval:
    return Estimate(np.nan, np.nan, np.nan, 0)
  return Estimate(float(scores.mean()), *interval, len(scores))


def paired_difference(scores: Float[np.ndarray, " V"], other: Float[np.ndarray, " V"]) -> Estimate:
  """Mean of scores - other over the same videos."""
  return estimate(scores.astype(np.float64) - other)
