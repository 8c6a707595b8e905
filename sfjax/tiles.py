"""Tiles: the one permutation that makes a spatiotemporal neighbourhood contiguous, so that sparsity works on blocks."""

import dataclasses
import functools
import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.pbsa import BLOCK


def fitting_tiles(grid: tuple[int, int, int]) -> list[tuple[int, int, int]]:
  """Tiles of at most 64 tokens that divide the grid, fullest first."""
  divisors = [[d for d in range(1, n + 1) if n % d == 0] for n in grid]
  tiles = [(f, h, w) for f in divisors[0] for h in divisors[1] for w in divisors[2] if f * h * w <= BLOCK]
  return sorted(tiles, key=lambda t: (-math.prod(t), max(t[1:]) / min(t[1:]), t))


@dataclasses.dataclass(frozen=True)
class BlockLayout:
  """How one chunk's tokens lie in blocks of 64 slots.

  Attributes:
    grid: tokens of a chunk along (frame, row, column).
    tile: tokens that lie together, along the same axes; it divides the grid and holds at most 64.
    block_tokens: tokens of a block, cut one after the other along the tiles; the last block of a chunk may be short.
      0: one tile's.
  """

  grid: tuple[int, int, int]
  tile: tuple[int, int, int]
  block_tokens: int = 0

  def __post_init__(self):
    if not 0 <= self.block_tokens <= BLOCK:
      raise ValueError(f"block_tokens: {self.block_tokens}; want 1..{BLOCK}, or 0 for one tile's")
    if any(g % t for g, t in zip(self.grid, self.tile, strict=True)) or math.prod(self.tile) > BLOCK:
      fits = ", ".join(map(str, fitting_tiles(self.grid)[:5]))
      raise ValueError(
        f"tile: {self.tile} does not divide the chunk's grid {self.grid} in at most {BLOCK} tokens; {fits} fit"
      )

  @property
  def valid(self) -> int:
    """Slots of a block that hold a token, unless it is short."""
    return self.block_tokens or math.prod(self.tile)

  @property
  def tokens(self) -> int:
    """Tokens of a chunk."""
    return math.prod(self.grid)

  @property
  def full_blocks(self) -> int:
    """Blocks of a chunk that hold tokens."""
    return -(-self.tokens // self.valid)

  @property
  def whole_blocks(self) -> int:
    """Blocks of a chunk that are not short."""
    return self.tokens // self.valid

  @property
  def short(self) -> int:
    """Tokens of a chunk's short block, the last one that holds any; 0 where there is none."""
    return self.tokens % self.valid

  @property
  def blocks(self) -> int:
    """Blocks of a chunk; an odd number gets one empty block, so that two make a query tile."""
    return self.full_blocks + self.full_blocks % 2

  @property
  def slots(self) -> int:
    return self.blocks * BLOCK

  @functools.cached_property
  def sizes(self) -> np.ndarray:
    """Tokens of each block, [blocks]."""
    return np.clip(self.tokens - np.arange(self.blocks) * self.valid, 0, self.valid)

  def short_blocks(self, chunks: int, first: int = 0) -> tuple[range, int] | None:
    """`pbsa`'s kv_short for the blocks of so many chunks one after the other, the first of them block `first`."""
    at = range(first + self.whole_blocks, first + chunks * self.blocks, self.blocks)
    return (at, self.short) if self.short else None

  @functools.cached_property
  def order(self) -> np.ndarray:
    """Raster index of each token in tile order.

    Where blocks are cut without regard to tiles, their rows run back and forth: a block that turns a corner stays compact.
    """
    (f, h, w), (tf, th, tw) = self.grid, self.tile
    raster = np.arange(self.tokens).reshape(f // tf, tf, h // th, th, w // tw, tw).transpose(0, 2, 4, 1, 3, 5).copy()
    if self.block_tokens:
      raster[1::2] = raster[1::2, ::-1]
      rows = raster.reshape(-1, *raster.shape[2:])
      rows[1::2] = rows[1::2, ::-1]
    return raster.reshape(-1)

  @functools.cached_property
  def positions(self) -> np.ndarray:
    """(frame, row, column) of each token in tile order, [tokens, 3]."""
    return np.stack(np.unravel_index(self.order, self.grid), -1)

  def to_tiles(self, x: Float[Array, "*B tokens D"]) -> Float[Array, "*B tokens D"]:
    """Raster order to tile order."""
    return x[..., self.order, :]

  def from_tiles(self, x: Float[Array, "*B tokens D"]) -> Float[Array, "*B tokens D"]:
    """Tile order to raster order."""
    return x[..., np.argsort(self.order), :]

  def pack(self, x: Float[Array, "*B tokens N H"]) -> Float[Array, "*B slots N H"]:
    """Tokens in tile order to slots; padding slots are zero."""
    *b, _, n, h = x.shape
    same = [(0, 0)] * len(b)
    x = jnp.pad(x, [*same, (0, self.full_blocks * self.valid - self.tokens), (0, 0), (0, 0)])
    x = x.reshape(*b, self.full_blocks, self.valid, n, h)
    x = jnp.pad(x, [*same, (0, self.blocks - self.full_blocks), (0, BLOCK - self.valid), (0, 0), (0, 0)])
    return x.reshape(*b, self.slots, n, h)

  def unpack(self, x: Float[Array, "*B slots D"]) -> Float[Array, "*B tokens D"]:
    """Slots back to tokens in tile order."""
    *b, _, d = x.shape
    x = x.reshape(*b, self.blocks, BLOCK, d)[..., : self.full_blocks, : self.valid, :]
    return x.reshape(*b, -1, d)[..., : self.tokens, :]

  @property
  def run(self) -> int:
    """Tokens of a latent frame that lie together; so many of each of the tile's frames take turns."""
    return self.tile[1] * self.tile[2]

  @property
  def shared_rows(self) -> int:
    """Devices that share a chunk's tokens get whole groups of so many: of all frames, and of 8 rows for the kernels."""
    return math.lcm(self.tile[0] * self.run, 8)

  def framed(self, x: Float[Array, "*B tokens D"]) -> Float[Array, "B*a rows D"]:
    """A view whose rows are of the same tile[0] frames; of a device's own rows, too, where a tile spans all frames."""
    return x.reshape(-1, x.shape[-2] // (self.grid[0] // self.tile[0]), x.shape[-1])

  def frame_vectors(self, e: Float[Array, "*B F D"]) -> Float[Array, "B*a f D"]:
    """Per-frame values as `framed` rows take them, in turns."""
    return e.reshape(-1, self.tile[0], e.shape[-1])
