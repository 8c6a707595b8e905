"""Rotary positions exact at any frame and linear; tiles permute, pack and pad without loss."""

import chex
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax.model import ModelConfig
from sfjax.rope import phase, rope_angles, rotate, turn_forward
from sfjax.tiles import BlockLayout, fitting_tiles

TURN = 2 * np.pi


def between(a, b):
  """Distance of angles on the circle."""
  d = np.asarray(a, np.float64) - b
  return np.abs(d - TURN * np.round(d / TURN)).max()


@pytest.mark.parametrize("head_dim", [128, 64, 16])
@pytest.mark.parametrize("frame", [0, 1000, 8000])
def test_angles_are_exact(head_dim, frame):
  c, frames = head_dim // 2, frame + np.arange(3)
  row, column = np.arange(3) * 14, np.arange(3) * 25
  want = np.concatenate(
    [
      position[:, None] * 10000.0 ** (-2 * np.arange(n) / (2 * n))
      for position, n in ((frames, c - 2 * (c // 3)), (row, c // 3), (column, c // 3))
    ],
    -1,
  )
  got = rope_angles(frames, row, column, head_dim)
  assert got.shape == (3, c)
  assert between(got, want) < 1e-6  # float32 resolves an angle below 2 pi to 5e-7


def test_phase_of_fractional_timesteps():
  t = np.random.default_rng(0).uniform(0, 1000, 200).astype(np.float32)
  freqs = 10000.0 ** (-np.arange(128) / 128)
  assert between(phase(t, freqs), t.astype(np.float64)[:, None] * freqs) < 1e-6


def test_rotation_is_interleaved_and_linear():
  rng = np.random.default_rng(1)
  x = rng.normal(size=(5, 48, 2, 16)).astype(np.float32)
  angles = rng.uniform(0, TURN, (5, 48, 8)).astype(np.float32)
  z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angles.astype(np.float64))[:, :, None]
  np.testing.assert_allclose(
    rotate(x, np.cos(angles), np.sin(angles)), np.stack([z.real, z.imag], -1).reshape(x.shape), atol=1e-6
  )

  # One age for a block, so its mean can be turned instead of every key: the mean of 48 sums adds a few roundings of 6e-8.
  age = np.array([0, 1, 42, 999, 7000])
  pooled = turn_forward(x.mean(1), np.repeat(age[:, None], 2, 1))
  turned = turn_forward(x, np.broadcast_to(age[:, None, None], x.shape[:3])).mean(1)
  np.testing.assert_allclose(pooled, turned, atol=1e-6)


def test_turning_forward_equals_standing_there():
  rng = np.random.default_rng(2)
  k = rng.normal(size=(64, 3, 64)).astype(np.float32)
  frame, move = rng.integers(0, 4000, 64), rng.integers(0, 4000, 64)
  row, column = rng.integers(0, 30, 64), rng.integers(0, 52, 64)
  angles = lambda f: rope_angles(f, row, column, 64)
  at = lambda f: rotate(k, jnp.cos(angles(f)), jnp.sin(angles(f)))
  turned = turn_forward(at(frame), np.repeat(move[:, None], 3, 1))
  np.testing.assert_allclose(turned, at(frame + move), atol=5e-6)  # |k| < 4.5, three angles each good to 5e-7
  assert np.abs(at(frame) - at(frame + move)).max() > 1
  np.testing.assert_array_equal(turned[..., 24:], at(frame)[..., 24:])  # rows and columns stand still
  half = turn_forward(at(frame).astype(jnp.bfloat16), np.repeat(move[:, None], 3, 1))
  assert half.dtype == jnp.bfloat16


LAYOUTS = [
  BlockLayout((3, 4, 6), (1, 2, 3)),
  BlockLayout((3, 4, 4), (3, 2, 4)),
  BlockLayout((3, 3, 5), (1, 3, 5)),
  BlockLayout((3, 30, 52), (3, 5, 4)),
]
# An even number of blocks, an odd one, none short, two tiles of frames with rows of either parity, a short block alone.
PACKED = [
  BlockLayout((3, 30, 52), (3, 5, 1), 64),
  BlockLayout((3, 3, 5), (3, 1, 1), 10),
  BlockLayout((3, 4, 4), (3, 2, 1), 12),
  BlockLayout((6, 6, 4), (3, 2, 1), 13),
  BlockLayout((6, 4, 4), (3, 2, 2), 50),
  BlockLayout((1, 2, 2), (1, 2, 1), 64),
]


@pytest.mark.parametrize("layout", LAYOUTS + PACKED, ids=str)
def test_round_trips(layout):
  x = np.random.default_rng(3).normal(size=(2, layout.tokens, 3)).astype(np.float32)
  np.testing.assert_array_equal(layout.from_tiles(layout.to_tiles(x)), x)
  assert sorted(layout.order) == list(range(layout.tokens))
  heads = x.reshape(2, layout.tokens, 3, 1)
  slots = layout.pack(heads)
  chex.assert_shape(slots, (2, layout.blocks * 64, 3, 1))
  np.testing.assert_array_equal(layout.unpack(slots[..., 0]), x)
  padding = np.asarray(slots).reshape(2, layout.blocks, 64, 3)
  held = np.arange(64) < layout.sizes[:, None]
  assert not padding[:, ~held].any() and (padding[:, held] != 0).all()
  np.testing.assert_array_equal(padding[:, held], x)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_a_block_is_one_tile(layout):
  """Every block holds exactly the tokens of one box of the grid, boxes in raster order."""
  blocks = layout.positions.reshape(layout.full_blocks, layout.valid, 3) // layout.tile
  np.testing.assert_array_equal(blocks, np.broadcast_to(blocks[:, :1], blocks.shape))
  counts = [g // t for g, t in zip(layout.grid, layout.tile, strict=True)]
  np.testing.assert_array_equal(blocks[:, 0], np.stack(np.unravel_index(np.arange(layout.full_blocks), counts), -1))
  assert len({tuple(p) for p in layout.positions}) == layout.tokens


@pytest.mark.parametrize("layout", PACKED, ids=str)
def test_tiles_run_back_and_forth_where_blocks_do_not_follow_them(layout):
  """From tile to tile one step along one axis, frames outermost; every tile as where blocks are tiles."""
  size, plain = np.prod(layout.tile), BlockLayout(layout.grid, layout.tile)
  tiles = layout.positions.reshape(-1, size, 3)
  steps = np.abs(np.diff(tiles[:, 0] // layout.tile, axis=0))
  assert (steps.sum(1) == 1).all() and (np.diff(tiles[:, 0, 0]) >= 0).all()
  inside = lambda x: {tuple(map(tuple, tile)) for tile in x.positions.reshape(-1, size, 3)}
  assert inside(layout) == inside(plain)


@pytest.mark.parametrize("layout", LAYOUTS + PACKED, ids=str)
def test_blocks_and_their_sizes(layout):
  assert layout.sizes.sum() == layout.tokens and layout.blocks == len(layout.sizes) and layout.blocks % 2 == 0
  assert (layout.sizes[: layout.whole_blocks] == layout.valid).all() and layout.valid <= 64
  assert layout.sizes[layout.whole_blocks : layout.full_blocks].tolist() == [layout.short] * (layout.short > 0)
  found = layout.short_blocks(3, 5)
  assert (found is None) == (layout.short == 0)
  if found:
    want = 5 + np.flatnonzero(np.tile(layout.sizes == layout.short, 3))
    assert list(found[0]) == want.tolist() and found[1] == layout.short and max(want) < 5 + 3 * layout.blocks


@pytest.mark.parametrize("layout", LAYOUTS + PACKED, ids=str)
def test_per_frame_values_meet_their_frame(layout):
  tokens = jnp.asarray(layout.positions[None, :, :1], jnp.float32)
  frame = jnp.arange(layout.grid[0], dtype=jnp.float32)[None, :, None]
  rows, values = layout.framed(tokens), layout.frame_vectors(frame)
  frame_of = np.arange(rows.shape[1]) // layout.run % layout.tile[0]
  np.testing.assert_array_equal(rows, values[:, frame_of])


def test_sizes():
  wan, digits = ModelConfig.wan_1_3b().layout, ModelConfig.digits().layout
  assert (wan.grid, wan.blocks, wan.whole_blocks, wan.valid, wan.short) == ((3, 30, 52), 74, 73, 64, 8)
  whole = ModelConfig.wan_14b(chunk_frames=21).layout  # the bidirectional model's
  assert (whole.tokens, whole.blocks, whole.whole_blocks, whole.short) == (32_760, 512, 511, 56)
  tiles = ModelConfig.wan_1_3b(tile=(3, 5, 4), block_tokens=0).layout
  assert (tiles.blocks, tiles.blocks // 2, tiles.valid, tiles.short) == (78, 39, 60, 0)
  assert (digits.grid, digits.blocks, digits.valid) == ((3, 16, 16), 16, 48)
  assert BlockLayout((3, 52, 30), (3, 4, 5)).blocks == 78
  odd = BlockLayout((3, 3, 5), (1, 3, 5))
  assert (odd.full_blocks, odd.blocks, odd.slots) == (3, 4, 256)


@pytest.mark.parametrize(
  ("grid", "tile"), [((3, 16, 16), (3, 5, 4)), ((3, 16, 16), (3, 8, 8)), ((3, 7, 13), (3, 2, 2))]
)
def test_a_tile_that_does_not_fit_is_refused_with_ones_that_do(grid, tile):
  with pytest.raises(ValueError, match="^tile: ") as error:
    BlockLayout(grid, tile)
  line = str(error.value)
  best = fitting_tiles(grid)
  assert str(tile) in line and str(grid) in line and str(best[0]) in line and "\n" not in line
  for fits in best:
    BlockLayout(grid, fits)


@pytest.mark.parametrize("tokens", [-1, 65])
def test_blocks_that_hold_no_such_number_are_refused(tokens):
  with pytest.raises(ValueError, match=f"^block_tokens: {tokens}; want 1..64, or 0 for one tile's"):
    ModelConfig.digits(block_tokens=tokens)


def test_a_latent_size_off_the_patch_is_refused():
  with pytest.raises(ValueError, match=r"^latent_size: \(31, 32\)"):
    _ = ModelConfig.digits(latent_size=(31, 32)).layout
