"""Intervals agree with published values, and pairing narrows a difference."""

import numpy as np
import pytest

from sfjax.evaluation.intervals import estimate, paired_difference, wilson


@pytest.mark.parametrize(
  ("hits", "videos", "low", "high"),
  [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (50, 100, 0.4038, 0.5962), (100, 100, 0.9630, 1.0)],
)
def test_wilson(hits, videos, low, high):
  np.testing.assert_allclose(wilson(hits, videos), (low, high), atol=1e-4)
  found = estimate(np.arange(videos) < hits)
  assert (found.low, found.high, found.videos) == (*wilson(hits, videos), videos) and found.value == hits / videos


def test_bootstrap_of_a_mean():
  x = np.random.default_rng(0).normal(3, 2, 400)
  found = estimate(x)
  half = 1.96 * x.std() / 20
  np.testing.assert_allclose((found.low, found.high), (x.mean() - half, x.mean() + half), atol=0.03)
  assert found == estimate(x)
  gappy = estimate(np.append(x, np.nan))
  assert gappy.videos == 400 and gappy.value == found.value


def test_pairing_narrows_a_difference():
  rng = np.random.default_rng(1)
  a = rng.normal(size=300)
  b = a - 0.1 + 0.05 * rng.normal(size=300)
  found = paired_difference(a, b)
  assert 0.09 < found.low < 0.1 < found.high < 0.11
  hits = paired_difference(a > 0, a > 1)
  np.testing.assert_allclose(hits.value, (a > 0).mean() - (a > 1).mean())


def test_nothing_to_estimate():
  assert str(estimate(np.array([np.nan, np.nan]))) == "-" and estimate(np.array([], bool)).videos == 0
