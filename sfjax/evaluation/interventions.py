"""What P holds, and what becomes of a video if P is taken away or exchanged: the test that P, and not the window, remembers.

Letters: L layers, B videos (guidance adds as many rows), N heads, C persistent blocks, F frames, n chunks, nb blocks a chunk.
"""

import dataclasses

import numpy as np
from jaxtyping import Bool, Float, Int

from pallas_kernels.pbsa import BLOCK
from sfjax.codec import DigitsCodec
from sfjax.memory import KVMemory
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig

INTERVENTIONS = ("empty", "swap")
_COVERS = 0.1  # share of the digit's cell that a tile must hold to count as holding the digit
_SEEN = 0.5  # share of a digit's ink that must be in sight for its tile to tell anything


def _parts(memory: KVMemory, persistent: int) -> dict[str, tuple]:
  """Where P lies in the memory's leaves that have a part for it."""
  by_block, by_head = np.s_[:, :, :persistent], np.s_[..., :persistent]
  where = {
    "k": np.s_[:, :, : persistent * BLOCK],
    "v": np.s_[:, :, : persistent * BLOCK],
    "k_scale": by_block,
    "v_scale": by_block,
    "pooled": by_block,
    "score": by_head,
    "origin": by_head,
  }
  return {name: at for name, at in where.items() if getattr(memory, name) is not None}


def without_persistent(cfg: MemoryConfig, memory: KVMemory) -> tuple[MemoryConfig, KVMemory]:
  """The same memory with a P of no capacity: nothing of it is read, the window and what is read of it stay as they are.

  Zeroed blocks would not do: their logits of 0 still take part in the softmax. Meant for a P that is full, as the budget of
  an unfilled P goes to the window.
  """
  rest = lambda i: tuple(slice(s.stop, None) if isinstance(s, slice) and s.stop else s for s in i)
  kept = {name: getattr(memory, name)[rest(at)] for name, at in _parts(memory, cfg.persistent).items()}
  return dataclasses.replace(cfg, persistent=0), memory.replace(**kept)


def swap_persistent(cfg: MemoryConfig, memory: KVMemory) -> KVMemory:
  """Videos 2i and 2i + 1 exchange their P: keys, values, scores and origins. Raises ValueError if their number is odd."""
  rows = np.arange(memory.k.shape[1])
  if len(rows) % 2:
    raise ValueError(f"memory: {len(rows)} videos; want an even number")
  changed = {}
  for name, part in _parts(memory, cfg.persistent).items():
    leaf = getattr(memory, name)
    changed[name] = leaf.at[part].set(leaf[part][:, rows ^ 1])
  return memory.replace(**changed)


def tiles_with_digit(
  model: ModelConfig, boxes: Float[np.ndarray, "F 4"], visibility: Float[np.ndarray, " F"]
) -> Bool[np.ndarray, "n nb"]:
  """Which blocks of every chunk hold a digit while it is in sight.

  Args:
    boxes: (x0, y0, x1, y1) in pixels. visibility: share of its ink that is seen, in every frame.
  """
  layout, codec = model.layout, DigitsCodec()
  pad = codec.time - 1  # the first frame is a latent of its own
  boxes = np.concatenate([np.repeat(boxes[:1], pad, 0), boxes]).reshape(-1, model.chunk_frames, codec.time, 4)
  seen = np.concatenate([np.repeat(visibility[:1], pad), visibility]).reshape(boxes.shape[:3]) >= _SEEN
  pixels = np.array(model.patch) * codec.space
  blocks = np.split(layout.positions, range(layout.valid, layout.tokens, layout.valid))
  low, high = np.stack([p.min(0) for p in blocks]), np.stack([p.max(0) for p in blocks]) + 1  # [nb,(frame,row,column)]
  corner = lambda ends: (ends[:, 1:] * pixels)[:, ::-1]  # (x, y)
  overlap = np.minimum(boxes[..., None, 2:], corner(high)) - np.maximum(boxes[..., None, :2], corner(low))
  cell = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
  covers = (np.maximum(overlap, 0).prod(-1) >= _COVERS * cell[..., None]) & seen[..., None]  # [n,frame,time,nb]
  frame = np.arange(model.chunk_frames)[:, None]
  inside = (frame >= low[:, 0]) & (frame < high[:, 0])
  held = (covers.any(2) & inside).any(1)
  return np.pad(held, ((0, 0), (0, layout.blocks - layout.full_blocks)))


def persistent_shares(
  cfg: MemoryConfig,
  origins: Int[np.ndarray, "L B N C"],
  holding: Bool[np.ndarray, "B n nb"],
  whole_blocks: int,
) -> dict[str, Float[np.ndarray, " B"]]:
  """How much of P holds the digit, per video.

  Args:
    origins: from `memory.stored_blocks` after n chunks; -1 where empty. holding: from `tiles_with_digit`.
    whole_blocks: of a chunk, the first; no other may stay.

  Returns:
    P holds it: share of P's blocks, over layers and heads. by chance: the share among all whole blocks that left the window.
    some of P: share of layers and heads whose P has at least one.
  """
  flat = holding.reshape(len(holding), -1)
  hit = flat[np.arange(len(flat))[:, None, None], np.maximum(origins, 0)] & (origins >= 0)
  evicted = holding[:, : max(holding.shape[1] - cfg.window, 0), :whole_blocks].reshape(len(holding), -1)
  chance = evicted.mean(1) if evicted.shape[1] else np.full(len(holding), np.nan)
  return {
    "P holds it": hit.sum((0, 2, 3)) / np.maximum((origins >= 0).sum((0, 2, 3)), 1),
    "by chance": chance,
    "some of P": hit.any(-1).mean((0, 2)),
  }
