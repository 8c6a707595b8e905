"""Problems to time attention on, and the clock: bursts of equal calls.

A timed run is a burst of calls, enqueued one behind the other, and one wait at its end: launches hide behind the work of
the call before. (In a loop inside jit each call would have to feed the next, or the compiler hoists it out.)
"""

import time
from collections.abc import Callable
from typing import Any

import numpy as np
from jaxtyping import Int32

BURST = 0.05  # seconds of work in a timed run, or one call: starting and ending one costs about half a millisecond


def timed(call: Callable[[], Any], wait: Callable[[Any], Any], runs: int, burst: float = BURST) -> dict:
  """Milliseconds of a call: the median of `runs` bursts of so many seconds, and their 10th and 90th percentiles."""

  def seconds(calls):
    began = time.perf_counter()
    for _ in range(calls):
      out = call()
    wait(out)
    return (time.perf_counter() - began) / calls

  seconds(1)  # compiles
  calls = int(np.clip(burst / min(seconds(1), seconds(1)), 1, 512))
  calls = int(np.clip(burst / seconds(calls), 1, 512))  # a lone call takes longer than one of many
  ms = np.array([seconds(calls) for _ in range(runs)]) * 1e3
  return {"ms": float(np.median(ms)), "ms_p10_p90": np.percentile(ms, (10, 90)).tolist(), "calls": calls}


def random_lists(
  rng, where: tuple[int, int, int], blocks: int, prefix: int, listed: int
) -> tuple[Int32[np.ndarray, "B N Q Kmax"], Int32[np.ndarray, "B N Q"]]:
  """Random ascending lists of the blocks behind the prefix. Counts vary by an eighth, and their mean is exactly `listed`.

  Args:
    where: B, N, Q.
  """
  n, available = int(np.prod(where)), blocks - prefix
  spread = min(max(1, listed // 8), listed, available - listed)
  half = rng.integers(-spread, spread + 1, n // 2)
  counts = listed + rng.permutation(np.concatenate([half, -half, np.zeros(n % 2, int)]))
  ids = prefix + rng.random((n, available)).argsort(-1)[:, : counts.max()]
  ids = np.sort(np.where(np.arange(ids.shape[1]) < counts[:, None], ids, blocks), -1)
  return ids.reshape(*where, -1).astype(np.int32), counts.reshape(where).astype(np.int32)
