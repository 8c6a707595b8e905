"""fp64 NumPy oracle of pbsa: a mask over all slots, no tricks."""

import numpy as np


def slots_of(blocks, kv_valid, kv_short=None):
  """The valid slots of some blocks, as an index of slots."""
  short, few = kv_short or ((), 0)
  own = [np.arange(x * 64, x * 64 + (few if x in short else kv_valid)) for x in map(int, blocks)]
  return np.concatenate([np.zeros(0, int), *own])


def oracle(q, k, v, ids, counts, *, prefix_blocks=0, prefix_k=None, kv_valid=64, kv_short=None, scale=None):
  q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
  b, t, n, h = q.shape
  s = k.shape[1]
  out, lse = np.zeros_like(q), np.full((b, n, t), -np.inf)
  keys = k.copy()
  if prefix_k is not None:
    keys[:, : prefix_blocks * 64] = np.asarray(prefix_k, np.float64)[:, : prefix_blocks * 64]
  for i in range(b):
    for j in range(n):
      for tile in range(t // 128):
        read = list(range(prefix_blocks)) + [int(x) for x in ids[i, j, tile, : counts[i, j, tile]]]
        slots = slots_of(read, kv_valid, kv_short)
        if not len(slots):
          continue
        rows = slice(tile * 128, tile * 128 + 128)
        logits = q[i, rows, j] @ keys[i, slots, j].T * (h**-0.5 if scale is None else scale)
        m = logits.max(-1, keepdims=True)
        p = np.exp(logits - m)
        out[i, rows, j] = p @ v[i, slots, j] / p.sum(-1, keepdims=True)
        lse[i, j, rows] = (m + np.log(p.sum(-1, keepdims=True)))[:, 0]
  assert s % 64 == 0
  return out, lse


def random_lists(rng, b, n, q, kmax, first, blocks):
  """Random ascending unique lists over blocks first..blocks-1 with random counts, garbage past the count."""
  kmax = min(kmax, blocks - first)
  ids = rng.integers(-5, blocks + 5, (b, n, q, kmax))
  counts = rng.integers(0, kmax + 1, (b, n, q))
  for at in np.ndindex(b, n, q):
    ids[at][: counts[at]] = np.sort(rng.choice(np.arange(first, blocks), counts[at], replace=False))
  return ids.astype(np.int32), counts.astype(np.int32)
