"""Index lists: which key blocks each query tile reads, and the check that they are well formed."""

import numpy as np
from jaxtyping import Array, Int32

BLOCK = 64  # key slots in a block
TILE = 128  # query rows in a tile: two neighbouring blocks


def validate_lists(ids: Int32[Array, "B N Q K"], counts: Int32[Array, "B N Q"], num_slots: int) -> None:
  """Checks concrete lists on the host.

  Args:
    ids: listed key blocks, ascending and unique within the first `counts` entries of each row.
    counts: number of listed blocks per query tile.
    num_slots: S, the number of key slots.

  Raises:
    ValueError: names the first bad (batch, head, tile) and what is wrong with it.
  """
  ids, counts = np.asarray(ids), np.asarray(counts)
  if ids.ndim != 4 or counts.shape != ids.shape[:3]:
    raise ValueError(
      f"block_counts: shape {counts.shape} does not match block_ids {ids.shape}; want [B,N,Q] and [B,N,Q,K]"
    )
  num_blocks, kmax = num_slots // BLOCK, ids.shape[-1]
  listed = np.arange(kmax) < counts[..., None]
  ascending = np.diff(ids, axis=-1) > 0
  problems = (
    ((counts < 0) | (counts > kmax), f"count outside 0..{kmax}"),
    ((listed & ((ids < 0) | (ids >= num_blocks))).any(-1), f"block id outside 0..{num_blocks - 1}"),
    ((listed[..., 1:] & ~ascending).any(-1), "block ids not strictly ascending"),
  )
  for bad, what in problems:
    if bad.any():
      where = tuple(int(i) for i in np.argwhere(bad)[0])
      raise ValueError(f"block_ids: {what} at (batch, head, tile) = {where}")
