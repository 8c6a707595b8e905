"""What the Hopper kernels share: matrix products, a ring of shared-memory slots, and the walk over a tile's blocks.

A program has three warpgroups. Two compute, each on 64 of a tile's 128 rows; the third only starts copies, so that the
next operands land in a ring of slots while the others multiply. It alone reads block ids: to the two that compute, a
gathered block looks like any other; unless some are short, when they read the ids, too. The same code runs on CPU in jax's
GPU interpreter, but for `accumulate`.

Letters: B batch, T query rows, S key slots, N heads, H head dim, Q query tiles, K key blocks, J slots loaded of a block,
W blocks per step.
"""

import dataclasses
import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pbsa.lists import BLOCK, TILE, valid_slots
from pallas_kernels.pbsa.mosaic_sm90_config import Config, loaded

WARPGROUPS = 2  # that compute
ROWS = TILE // WARPGROUPS
LOG2E = math.log2(math.e)
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True)
class Call:
  """Static facts of one call: what multiplies logits, valid slots of a block, and how to run.

  most_blocks: that a tile can read, as far as it is known; where it is not, no list is cut into pieces.
  """

  scale: float
  kv_valid: int
  kv_grad_range: tuple[int, int] | None = None
  config: Config = Config()
  interpret: plgpu.InterpretGPUParams | None = None
  most_blocks: int = 0
  multiprocessors: int = 132  # an H100's or H200's
  kv_short: tuple[range, int] | None = None

  def valid_slots(self, block):
    """How many slots of a block hold a token."""
    return valid_slots(block, self.kv_valid, self.kv_short)

  def loaded(self, width: int) -> int:
    """J: slots of a block that are loaded."""
    return loaded(self.kv_valid, width)


def tiled(shape, dtype):
  """A shared-memory array in swizzled tiles 128 bytes wide: what the tensor cores read, and free of bank conflicts."""
  tile = (8, 128 // jnp.dtype(dtype).itemsize)
  return plgpu.SMEM(shape, dtype, transforms=(plgpu.TilingTransform(tile), plgpu.SwizzleTransform(128)))


def flat(x):
  """[..,R,N,H] -> [rows,N,H]: one row index, and a copy descriptor of three axes."""
  return x.reshape(-1, *x.shape[-2:])


def memory(k, v, prefix_k):
  """A kernel's inputs for the keys and values, as rows, and their slots: (S, P), where P = 0 stands for no prefix_k."""
  rows = tuple(map(flat, (k, v, k if prefix_k is None else prefix_k)))
  return rows, (k.shape[-3], 0 if prefix_k is None else prefix_k.shape[-3])


def launch(body, call: Call, out_type, grid: dict[str, int], warpgroups=WARPGROUPS + 1, **scratch):
  """Runs body(*refs, **scratch) on a grid (last axis fastest), by default with one more warpgroup than compute."""
  return plgpu.kernel(
    body,
    out_type=out_type,
    scratch_types=scratch,
    grid=tuple(grid.values()),
    grid_names=tuple(grid),
    num_threads=warpgroups,
    thread_name="wg",
    compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
    interpret=call.interpret,
    kernel_name=body.__name__,
  )


def in_turn(call: Call, items: int, most: int) -> int:
  """How many items a program takes one after the other: at most so many, and fewer before a multiprocessor gets none."""
  return max(1, min(most, items // call.multiprocessors))


def filled(shape, value, layout=plgpu.Layout.WGMMA):
  return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def over_columns(x, shape):
  """[R] -> [R,C]."""
  return lax.broadcast_in_dim(x, shape, [0])


def accumulate(call: Call, *terms, within=lambda body: body(), during=None, results=()):
  """acc + a() @ b of each (acc, a, b): a() in registers, made when its turn comes, b in shared memory.

  Args:
    within: starts other products first, and passes what `during` needs to its argument.
    during: called once all products have started; they are waited for at its end.
    results: arrays like those that `during` returns.

  Returns:
    the sums, and what `during` returned.
  """
  during = during or (lambda *_: ())
  if call.interpret:  # it knows neither register operands nor accumulators with a value

    def now(*started):
      sums = [acc + jnp.dot(a(), b[...], preferred_element_type=jnp.float32) for acc, a, b in terms]
      plgpu.commit_smem()
      return sums, during(*started)

    return within(now)

  def start(refs):  # accumulators with a value before any product starts, or ptxas runs one after the other
    sums, found = refs

    def body(*started):
      for ref, (_, a, b) in zip(sums, terms, strict=True):
        plgpu.wgmma(ref, a(), b)
      for ref, x in zip(found, during(*started), strict=True):
        ref[...] = x

    within(body)

  return pl.run_state(start)(([plgpu.ACC.init(acc) for acc, _, _ in terms], list(results)))


def ring(stages: int, copies: int):
  """A ring's barriers: full, reached by `copies` copies a slot, and free, reached by its readers."""
  return (
    plgpu.Barrier(num_arrivals=copies, num_barriers=stages),
    plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
  )


def in_ring(stages: int):
  """(ring, step) -> the step's slot of a ring of so many."""
  return lambda ring, step: ring.at[lax.rem(jnp.int32(step), jnp.int32(stages))]


def produce(first, last, stages: int, free, load):
  """Fills the ring's slots for steps first..last - 1, each as soon as its readers are done with it.

  Args:
    first, last: int32, traced or not; steps count from the program's start.
    free: one barrier array per operand.
    load: (step, slot) -> one function per operand that starts its copies.
  """

  @pl.loop(first, last)
  def _(step):
    slot = lax.rem(step, jnp.int32(stages))
    for barrier, start in zip(free, load(step, slot), strict=True):
      pl.when(step >= stages)(functools.partial(plgpu.barrier_wait, barrier.at[slot]))
      start()


def drain(steps, stages: int, free):
  """Waits for the last readers: no barrier may end with an arrival that nobody waited for."""

  @pl.loop(jnp.maximum(steps - stages, 0), steps)
  def _(step):
    for barrier in free:
      plgpu.barrier_wait(in_ring(stages)(barrier, step))


def fetch(steps, stages: int, free, load):
  """All that the third warpgroup does for a walk over one list; arguments as `produce`'s."""
  plgpu.set_max_registers(24, action="decrease")
  produce(0, steps, stages, free, load)
  drain(steps, stages, free)


def row(*parts):
  """First row of a copy: a sum of multiples of 8, which the compiler cannot see by itself."""
  return pl.multiple_of(sum(parts), 8)


def walk(call: Call, width: int, where, share, slots: tuple[int, int], refs, k_s, v_s, k_full, v_full):
  """The blocks that a query tile reads: the prefix first, then its list, `width` per step; or a share of these steps.

  Args:
    where: (batch row, head, tile).
    share: (i, p): the i-th of p pieces, as equal as whole steps allow; (0, 1) is all.
    slots: see `memory`. refs: its rows in global memory, then the lists int32 [B,N,Q,Kmax], their counts [B,N,Q], and
      the number of prefix blocks and the layer, int32 [1].
    k_s, v_s: slots of the ring. k_full, v_full: their barriers.

  Returns:
    how many blocks, how many steps, the `load` that `produce` wants, and the `ends` that `hide` wants, by step; steps count
    from the share's first.
  """
  k, v, prefix_k, ids, counts, prefix_blocks, layer = refs
  (b, n, tile), (piece, pieces) = where, share
  prefix, loaded = prefix_blocks[0], call.loaded(width)
  total = prefix + counts[b, n, tile]
  steps_of = lambda blocks: lax.div(blocks + (width - 1), jnp.int32(width))
  begin, end = (width * lax.div(steps_of(total) * i, jnp.int32(pieces)) for i in (piece, piece + 1))
  blocks = jnp.minimum(end, total) - begin
  row_of_batch = layer[0] * counts.shape[0] + b
  first = row_of_batch * slots[0]

  def places(step):
    """Where a step's blocks stand among all that are read, and their ids."""
    last = begin + blocks - 1
    at = [jnp.minimum(begin + step * width + i, last) for i in range(width)]  # past the end: the last block again
    return at, [jnp.where(i < prefix, i, ids[b, n, tile, jnp.maximum(i - prefix, 0)]) for i in at]

  def ends(step):
    if call.kv_short is None:
      return None
    left = blocks - step * width
    return [jnp.where(left > i, call.valid_slots(block), 0) for i, block in enumerate(places(step)[1])]

  def load(step, slot):
    at, block = places(step)  # all ids are read here, before any waiting

    def copy(source, base, block, target, full, i):
      rows = pl.ds(row(base, block * BLOCK), loaded)
      plgpu.copy_gmem_to_smem(source.at[rows, n], target.at[slot, pl.ds(i * loaded, loaded)], full.at[slot])

    def load_k():
      for i in range(width):
        own = functools.partial(copy, k, first, block[i], k_s, k_full, i)
        if slots[1]:
          pl.when(at[i] >= prefix)(own)
          pl.when(at[i] < prefix)(functools.partial(copy, prefix_k, row_of_batch * slots[1], at[i], k_s, k_full, i))
        else:
          own()

    def load_v():
      for i in range(width):
        copy(v, first, block[i], v_s, v_full, i)

    return load_k, load_v

  return blocks, steps_of(blocks), load, ends


def hide(call: Call, width: int, step, blocks, ends, x, fill):
  """x [rows, W J] with `fill` where a column is no token, or lies past the last block.

  ends: how many slots of each of the step's blocks are read; None where no block is short.
  """
  loaded = call.loaded(width)
  column = lambda: plgpu.broadcasted_iota(jnp.int32, x.shape, 1, layout=plgpu.Layout.WGMMA)
  if call.kv_valid < loaded:
    x = jnp.where(column() % loaded < call.kv_valid, x, fill)
  if ends is not None:

    def hidden(x):
      end = ends[-1]
      for i in range(width - 2, -1, -1):
        end = jnp.where(column() < (i + 1) * loaded, ends[i], end)
      return jnp.where(column() % loaded < end, x, fill)

    all_there = functools.reduce(jnp.logical_and, (end == call.kv_valid for end in ends))
    return lax.cond(all_there, lambda x: x, hidden, x)
  if width == 1:
    return x
  left = blocks - step * width
  return lax.cond(left >= width, lambda x: x, lambda x: jnp.where(column() < left * loaded, x, fill), x)
