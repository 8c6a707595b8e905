"""Index lists: which key blocks each query tile reads, the same by block, and the check that they are well formed."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

BLOCK = 64  # key slots in a block
TILE = 128  # query rows in a tile: two neighbouring blocks


def valid_slots(
  blocks: Int32[Array, "*K"], kv_valid: int, kv_short: tuple[range, int] | None
) -> int | Int32[Array, "*K"]:
  """How many slots of each block hold a token, by `api.pbsa`'s kv_valid and kv_short; one number where it is that of all."""
  if kv_short is None:
    return kv_valid
  short, few = kv_short
  past = blocks - short.start
  return jnp.where((past >= 0) & (blocks < short.stop) & (jax.lax.rem(past, jnp.int32(short.step)) == 0), few, kv_valid)


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


def top_lists(
  scores: Float[Array, "*B X"],
  budget: int | Int32[Array, ""],
  size: int,
  first: int | Int32[Array, ""] = 0,
  begin: int = 0,
) -> tuple[Int32[Array, "*B {size}"], Int32[Array, "*B"]]:
  """The best entries of every row as a list for `pbsa`; -inf is never listed. No gradient.

  Args:
    budget: how many at most. size: length of the lists, at least as many as are ever listed.
    first: of equals, the one is listed that is met first from here on, round the end of the row.
    begin: id of a row's first entry.

  Returns:
    ids, ascending, begin + X past the end, and how many count.
  """
  x, scores = scores.shape[-1], jax.lax.stop_gradient(scores)
  best, index = jax.lax.top_k(jnp.roll(scores, -first, -1), size)
  listed = (best > -jnp.inf) & (jnp.arange(size) < budget)
  ids = begin + jnp.where(listed, (index + first) % x, x)
  return jnp.sort(ids, -1).astype(jnp.int32), listed.sum(-1, dtype=jnp.int32)


def transpose_lists(
  ids: Int32[Array, "B N Q Kmax"],
  counts: Int32[Array, "B N Q"],
  prefix_blocks: int | Int32[Array, ""],
  num_blocks: int,
) -> tuple[Int32[Array, "B N K Q"], Int32[Array, "B N K"]]:
  """The lists by block: which query tiles read it, the prefix's readers included.

  Args:
    ids, counts: the lists of the query tiles.
    prefix_blocks: blocks 0..prefix_blocks-1 are read by every tile.
    num_blocks: K.

  Returns:
    tiles, ascending in the first `count` entries of each row, and those counts. The same bits every time.
  """
  b, n, q, kmax = ids.shape
  target = jnp.where(jnp.arange(kmax) < counts[..., None], ids, num_blocks)
  at = jnp.ogrid[:b, :n, :q]
  read = jnp.zeros((b, n, q, num_blocks), bool)
  read = read.at[*(x[..., None] for x in at), target].set(True, mode="drop", unique_indices=True)
  read = (read | (jnp.arange(num_blocks) < prefix_blocks)).swapaxes(2, 3)
  # By comparing, not sorting: the r-th reader comes after as many tiles as have at most r readers up to them.
  tile = jnp.arange(q)
  until = (read[..., None, :] & (tile <= tile[:, None])).sum(-1, dtype=jnp.int32)
  return (until[..., None, :] <= tile[:, None]).sum(-1, dtype=jnp.int32), read.sum(-1, dtype=jnp.int32)
