"""Tiles of a kernel's last, partly filled round, cut into pieces: which program works on what, and what joins pieces.

A piece walks over its share of a tile's blocks and leaves its sums in float32. A second, short kernel adds them up in a
fixed order and writes the tile's rows where the first kernel wrote none.

Letters: N heads, H head dim, Q query tiles, R tiles that are cut.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pbsa import mosaic_sm90_parts as parts
from pallas_kernels.pbsa.lists import TILE
from pallas_kernels.pbsa.mosaic_sm90_config import whole_and_pieces
from pallas_kernels.pbsa.mosaic_sm90_parts import ROWS, WARPGROUPS, Call

_COLUMNS = 32  # that a program joins: many programs, as there are few tiles


class Cut(NamedTuple):
  """How [B,N,Q] tiles are shared out: the first `whole` to a program each, of the others every piece to one.

  All first pieces come before all second ones: programs beside each other read the same blocks of the prefix.
  """

  shape: tuple[int, int, int]
  whole: int
  pieces: int

  @property
  def split(self) -> int:
    """R."""
    b, n, q = self.shape
    return b * n * q - self.whole

  @property
  def programs(self) -> int:
    return self.whole + self.pieces * self.split

  def where(self, index):
    """A tile's batch row, head and place in it."""
    _, n, q = self.shape
    of_all = lax.div(index, jnp.int32(q))
    return lax.div(of_all, jnp.int32(n)), lax.rem(of_all, jnp.int32(n)), lax.rem(index, jnp.int32(q))

  def work(self, program):
    """A program's tile and its share of the steps, as `parts.walk` wants them."""
    if not self.split:
      return self.where(program), (0, 1)
    past = program - self.whole
    split = past >= 0
    tile = jnp.where(split, self.whole + lax.rem(past, jnp.int32(self.split)), program)
    piece = jnp.where(split, lax.div(past, jnp.int32(self.split)), 0)
    return self.where(tile), (piece, jnp.where(split, self.pieces, 1))

  def sums(self, *lengths: int) -> list[jax.ShapeDtypeStruct]:
    """What the pieces leave: float32 [pieces R,128,length] for each length, or [pieces R,128] where it is 0."""
    rows = self.pieces * self.split, TILE
    return [jax.ShapeDtypeStruct((*rows, *[x] * (x > 0)), jnp.float32) for x in lengths if self.split]

  def store(self, program, whole, sums, refs):
    """Ends a program: whole() where it took a whole tile, else its warpgroup's sums go to refs."""

    def leave():
      mine = pl.ds(lax.axis_index("wg") * ROWS, ROWS)
      for ref, x in zip(refs, sums, strict=True):
        ref[program - self.whole, mine] = x

    if not self.split:
      return whole()
    pl.when(program < self.whole)(whole)
    pl.when(program >= self.whole)(leave)


def cut(call: Call, shape: tuple[int, int, int]) -> Cut:
  """How the tiles of a call are shared out."""
  b, n, q = shape
  return Cut(shape, *whole_and_pieces(b * n * q, call.most_blocks, call.multiprocessors))


def join(call: Call, cut: Cut, outputs, sums, total):
  """Writes the tiles that were cut into the first kernel's outputs.

  Args:
    outputs: [rows,N,H], or [B,N,T] for a vector.
    sums: as `Cut.sums`.
    total: function of every piece's sums, a list of tuples [64,columns] or [64] -> this tile's part of each output.

  Returns:
    the outputs; the same memory under jit.
  """
  if not cut.split:
    return outputs
  q = cut.shape[2]

  def pbsa_join(*refs):
    sum_refs, out_refs = refs[: len(sums)], refs[len(sums) :]
    at, part, wg = (lax.axis_index(x) for x in ("tile", "part", "wg"))
    batch, head, tile = cut.where(cut.whole + at)
    mine, columns = pl.ds(wg * ROWS, ROWS), pl.ds(part * _COLUMNS, _COLUMNS)

    def read(ref, piece):
      own = ref.at[piece * cut.split + at, mine]
      if len(own.shape) == 1:
        return plgpu.load(own, layout=parts.BY_ROW, optimized=False)
      return plgpu.load(own.at[:, columns], layout=plgpu.Layout.WGMMA, optimized=False)

    found = total([tuple(read(ref, piece) for ref in sum_refs) for piece in range(cut.pieces)])
    for ref, x in zip(out_refs, found, strict=True):
      if x.ndim == 2:
        first = parts.row(batch * q * TILE, tile * TILE, wg * ROWS)
        ref[pl.ds(first, ROWS), head, columns] = x.astype(ref.dtype)
      else:

        @pl.when(part == 0)
        def _(ref=ref, x=x):
          ref[batch, head, pl.ds(tile * TILE + wg * ROWS, ROWS)] = x

  grid = dict(tile=cut.split, part=sums[0].shape[-1] // _COLUMNS)
  launch = parts.launch(pbsa_join, call, (), grid, warpgroups=WARPGROUPS)

  @jax.custom_batching.sequential_vmap
  def write(outputs, sums):
    # As one function of arrays: jax.checkpoint drops a kernel of which it sees nothing but that it writes to references.
    return pl.run_state(lambda refs: launch(*sums, *refs))(outputs)

  # Kept apart: where a loop stacks this, XLA would let the kernel write into the stack, and it writes these few tiles alone.
  return jax.lax.optimization_barrier(write(list(outputs), list(sums)))
