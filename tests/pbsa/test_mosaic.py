"""Tiers C and D: the Mosaic kernels themselves, in jax's GPU interpreter with race detection, and lowered for CUDA."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pbsa import mosaic_sm90, mosaic_sm90_pieces, pbsa, validate_lists
from pallas_kernels.pbsa.lists import top_lists, transpose_lists
from pallas_kernels.pbsa.mosaic_sm90 import Call, pbsa_mosaic
from pallas_kernels.pbsa.mosaic_sm90_config import Config, heuristic, whole_and_pieces
from pallas_kernels.pbsa.mosaic_sm90_forward import forward
from tests.pbsa.oracle import oracle, random_lists, slots_of


@pytest.fixture
def interpret():
  yield plgpu.InterpretGPUParams(detect_races=True)
  interpreter.reset_gpu_interpret_mode_state()


@pytest.fixture
def force(monkeypatch):
  """force(whole, pieces): so many tiles are whole, the rest is cut, whether it pays or not."""
  return lambda *cut: monkeypatch.setattr(mosaic_sm90_pieces, "whole_and_pieces", lambda *_: cut)


def no_races():
  return not interpreter.get_races().races_found


def draw(seed, *shapes, dtype=jnp.bfloat16, scale=1.0):
  rng = np.random.default_rng(seed)
  return [jnp.asarray(rng.standard_normal(s) * scale, dtype) for s in shapes]


def lists(seed, counts, first, blocks):
  """Random lists of the given counts [B,N,Q], with garbage past each count."""
  rng = np.random.default_rng(seed)
  counts = np.asarray(counts, np.int32)
  ids = rng.integers(-5, blocks + 5, (*counts.shape, max(1, counts.max() + 1))).astype(np.int32)
  for at in np.ndindex(counts.shape):
    ids[at][: counts[at]] = np.sort(rng.permutation(np.arange(first, blocks))[: counts[at]])
  validate_lists(ids, counts, blocks * 64)
  return jnp.asarray(ids), jnp.asarray(counts)


def oracle_gradients(q, k, v, ids, counts, dout, dlse, *, prefix_blocks, prefix_k, kv_valid, kv_short=None, scale):
  """dq, dk, dv, dprefix_k in fp64."""
  q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
  keys = k.copy()
  if prefix_k is not None:
    keys[:, : prefix_blocks * 64] = np.asarray(prefix_k, np.float64)
  dq, dkeys, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(k)
  for b, n, tile in np.ndindex(counts.shape):
    read = [*range(prefix_blocks), *np.asarray(ids[b, n, tile, : counts[b, n, tile]])]
    if not read:
      continue
    slots = slots_of(read, kv_valid, kv_short)
    rows = slice(tile * 128, tile * 128 + 128)
    s = q[b, rows, n] @ keys[b, slots, n].T * scale
    p = np.exp(s - s.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    dp = dout[b, rows, n] @ v[b, slots, n].T
    ds = p * (dp - (p * dp).sum(-1, keepdims=True) + np.asarray(dlse[b, n, rows], np.float64)[:, None]) * scale
    dq[b, rows, n] = ds @ keys[b, slots, n]
    dkeys[b, slots, n] += ds.T @ q[b, rows, n]
    dv[b, slots, n] += p.T @ dout[b, rows, n]
  if prefix_k is None:
    return dq, dkeys, dv
  own = dkeys[:, : prefix_blocks * 64].copy()
  dkeys[:, : prefix_blocks * 64] = 0
  return dq, dkeys, dv, own


def close(got, want, limit):
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  error = np.linalg.norm(got - want) / np.linalg.norm(want)
  assert error <= limit, f"relative L2 {error}"


# 2e-3 is what rounding the output and the probabilities to bf16 costs.
@pytest.mark.parametrize(
  "h, dtype, valid, prefix, own_keys, counts, settings",
  [
    (64, jnp.bfloat16, 60, 0, False, [[[0, 7]], [[4, 1]]], Config()),
    (64, jnp.bfloat16, 48, 3, True, [[[2, 5]]], heuristic(64, 48)),
    (128, jnp.bfloat16, 64, 1, False, [[[6], [3]]], heuristic(128, 64)),
    (128, jnp.float16, 60, 2, True, [[[0], [5]]], Config(forward_stages=3, forward_width=1)),
  ],
)
def test_forward_matches_oracle(interpret, h, dtype, valid, prefix, own_keys, counts, settings):
  blocks, (b, n, q) = 10, np.shape(counts)
  shapes = [(b, q * 128, n, h), *[(b, blocks * 64, n, h)] * 2, (b, prefix * 64, n, h)]
  q, k, v, prefix_k = draw(h + valid, *shapes, dtype=dtype)
  prefix_k = prefix_k if own_keys else None
  ids, counts = lists(1, counts, prefix, blocks)
  call = Call(h**-0.5, valid, config=settings, interpret=interpret)
  out, lse = pbsa_mosaic(call, q, k, v, prefix_k, ids, counts, jnp.int32(prefix))
  want, want_lse = oracle(q, k, v, ids, counts, prefix_blocks=prefix, prefix_k=prefix_k, kv_valid=valid)
  close(out, want, 3e-3)
  np.testing.assert_allclose(lse, want_lse, atol=2e-6)
  assert no_races()


def test_stacked_layer(interpret):
  q, k, v, own = draw(3, (2, 128, 2, 64), *[(3, 2, 256, 2, 64)] * 2, (3, 2, 64, 2, 64))
  ids, counts = lists(4, [[[1], [2]], [[3], [0]]], 1, 4)
  for prefix_k in (None, own):
    out, _ = pbsa_mosaic(Call(0.1, 60, interpret=interpret), q, k, v, prefix_k, ids, counts, 1, jnp.int32(2))
    keys = None if prefix_k is None else prefix_k[2]
    close(out, oracle(q, k[2], v[2], ids, counts, prefix_blocks=1, prefix_k=keys, kv_valid=60, scale=0.1)[0], 3e-3)
  assert no_races()


def test_the_detector_sees_a_missing_fence(interpret, monkeypatch):
  monkeypatch.setattr(plgpu, "commit_smem", lambda: None)
  q, k, v = draw(5, (1, 128, 1, 64), *[(1, 128, 1, 64)] * 2)
  ids, counts = lists(6, [[[2]]], 0, 2)
  pbsa_mosaic(Call(0.1, 64, interpret=interpret), q, k, v, None, ids, counts, 0)
  assert not no_races()


def close_gradients(call, got, want):
  """Those of the oracle, dk and dv none outside the range that is asked for; and zeros where it has zeros."""
  first, last = call.kv_grad_range or (0, want[1].shape[1] // 64)
  for array in want[1:3]:
    array[:, : first * 64], array[:, (last + 1) * 64 :] = 0, 0
  for a, w in zip(got, want, strict=True):
    close(a, w, 5e-3)
    assert not np.any(np.asarray(a)[w == 0])


@pytest.mark.parametrize(
  "h, valid, prefix, own_keys, counts, grad_range, scale, settings",
  [
    (64, 60, 0, False, [[[0, 3]], [[4, 1]]], None, 1.0, Config(dkv_blocks=4)),
    (64, 48, 2, True, [[[1, 2]]], (1, 3), 4.0, heuristic(64, 48)),
    (128, 64, 1, False, [[[4, 1]]], (2, 4), 16.0, heuristic(128, 64)),
  ],
)
def test_gradients_match_oracle(interpret, h, valid, prefix, own_keys, counts, grad_range, scale, settings):
  blocks, (b, n, q) = 6, np.shape(counts)
  shapes = [(b, q * 128, n, h), *[(b, blocks * 64, n, h)] * 2, *[(b, prefix * 64, n, h)] * own_keys]
  x = draw(h + valid, *shapes, scale=scale)
  dout, dlse = draw(8, (b, q * 128, n, h))[0], draw(9, (b, n, q * 128), dtype=jnp.float32)[0]
  ids, counts = lists(7, counts, prefix, blocks)
  call = Call(
    h**-0.5, valid, grad_range, settings, interpret, multiprocessors=1
  )  # so that programs take several blocks
  f = lambda q, k, v, p=None: pbsa_mosaic(call, q, k, v, p, ids, counts, jnp.int32(prefix))
  got = jax.vjp(f, *x)[1]((dout, dlse))
  assert no_races()
  want = oracle_gradients(
    *x[:3], ids, counts, dout, dlse,
    prefix_blocks=prefix, prefix_k=x[3] if own_keys else None, kv_valid=valid, scale=call.scale,
  )  # fmt: skip
  close_gradients(call, got, want)


def matches_oracle(call, x, ids, counts, prefix):
  """Output, lse and gradients; x: q, k, v, and prefix_k if there is one."""
  (b, t, n, _), own = x[0].shape, x[3] if len(x) > 3 else None
  dout, dlse = draw(8, x[0].shape)[0], draw(9, (b, n, t), dtype=jnp.float32)[0]
  f = lambda q, k, v, p=None: pbsa_mosaic(call, q, k, v, p, ids, counts, jnp.int32(prefix))
  (out, lse), vjp = jax.vjp(f, *x)
  got = vjp((dout, dlse))
  assert no_races()
  more = dict(prefix_blocks=prefix, prefix_k=own, kv_valid=call.kv_valid, kv_short=call.kv_short)
  want, want_lse = oracle(*x[:3], ids, counts, **more)
  close(out, want, 3e-3)
  assert not np.any(np.asarray(out)[want == 0])
  np.testing.assert_allclose(lse, want_lse, atol=2e-6)
  close_gradients(call, got, oracle_gradients(*x[:3], ids, counts, dout, dlse, scale=call.scale, **more))


# Steps are of two blocks forward, of one backward: tiles of 8, 5 and 1 blocks, of an odd number in the last step, of fewer
# steps than pieces and of none at all.
@pytest.mark.parametrize(
  "h, valid, prefix, own_keys, counts, grad_range, whole, pieces",
  [
    (64, 60, 1, False, [[[7, 4, 0]]], None, 1, 3),
    (64, 48, 0, False, [[[3], [0]]], None, 0, 2),
    (128, 64, 2, True, [[[1]], [[3]]], (1, 3), 1, 2),
  ],
)
def test_pieces_match_oracle(interpret, force, h, valid, prefix, own_keys, counts, grad_range, whole, pieces):
  force(whole, pieces)
  blocks, (b, n, q) = 9, np.shape(counts)
  shapes = [(b, q * 128, n, h), *[(b, blocks * 64, n, h)] * 2, *[(b, prefix * 64, n, h)] * own_keys]
  x = draw(h + valid, *shapes)
  matches_oracle(Call(h**-0.5, valid, grad_range, interpret=interpret), x, *lists(7, counts, prefix, blocks), prefix)


# Listed and in the prefix, as the first and the last block of a step, in one with a block past the end, alone in a tile.
@pytest.mark.parametrize(
  "h, valid, short, prefix, own_keys, counts, grad_range, pieces, settings",
  [
    (64, 64, (range(1, 8, 3), 8), 3, False, [[[4, 1]], [[0, 3]]], None, 1, Config()),
    (64, 48, (range(0, 8, 2), 23), 2, True, [[[3, 5]]], None, 1, heuristic(64, 48)),
    (128, 60, (range(5, 8), 1), 0, False, [[[5], [8]]], (3, 6), 3, Config(dq_width=2, dq_stages=3)),
    (128, 64, (range(0, 1), 40), 1, True, [[[0, 2]]], None, 1, Config(forward_width=1)),
  ],
)
def test_short_blocks_match_oracle(
  interpret, force, h, valid, short, prefix, own_keys, counts, grad_range, pieces, settings
):
  blocks, (b, n, q) = 8, np.shape(counts)
  force(0 if pieces > 1 else b * n * q, pieces)
  shapes = [(b, q * 128, n, h), *[(b, blocks * 64, n, h)] * 2, *[(b, prefix * 64, n, h)] * own_keys]
  x = draw(h + valid, *shapes)
  for i, a in enumerate(x[1:], 1):
    hole = np.ones(a.shape[1], bool)
    hole[slots_of(range(a.shape[1] // 64), valid, short)] = False
    x[i] = jnp.where(hole[:, None, None], 2.0**100, a)
  call = Call(h**-0.5, valid, grad_range, settings, interpret, multiprocessors=1, kv_short=short)
  matches_oracle(call, x, *lists(7, counts, prefix, blocks), prefix)


def test_pieces_of_a_stacked_layer(interpret, force):
  force(1, 2)
  q, k, v, own = draw(3, (2, 128, 1, 64), *[(3, 2, 256, 1, 64)] * 2, (3, 2, 64, 1, 64))
  ids, counts = lists(4, [[[3]], [[3]]], 1, 4)
  out, _ = pbsa_mosaic(Call(0.1, 60, interpret=interpret), q, k, v, own, ids, counts, 1, jnp.int32(2))
  close(out, oracle(q, k[2], v[2], ids, counts, prefix_blocks=1, prefix_k=own[2], kv_valid=60, scale=0.1)[0], 3e-3)
  assert no_races()


def test_pieces_under_vmap(interpret, force):
  force(0, 2)
  q, k, v = draw(17, (2, 1, 128, 1, 64), *[(2, 1, 256, 1, 64)] * 2)
  ids, counts = (x[:, None] for x in lists(18, [[[3]], [[4]]], 0, 4))
  out, _ = jax.vmap(lambda *x: pbsa_mosaic(Call(0.1, 64, interpret=interpret), *x[:3], None, *x[3:], 0))(
    q, k, v, ids, counts
  )
  for i in range(2):
    close(out[i], oracle(q[i], k[i], v[i], ids[i], counts[i], scale=0.1)[0], 3e-3)


def test_the_rest_of_a_joined_tile(interpret, force):
  """out + rest is right to 16 bits, a hundred times what bf16 alone is."""
  force(0, 2)
  q, k, v = draw(13, (1, 128, 1, 64), *[(1, 256, 1, 64)] * 2)
  ids, counts = lists(14, [[[4]]], 0, 4)
  # Equal keys: bf16 holds the probabilities before they are normalised, all 1.
  args = q, jnp.ones_like(k), v, None, ids, counts, jnp.zeros(1, jnp.int32)
  out, _, rest = forward(Call(0.125, 64, interpret=interpret), *args, remainder=True)
  want = oracle(*args[:3], ids, counts)[0]
  close(np.asarray(out, np.float64) + np.asarray(rest, np.float64), want, 2**-16)
  assert np.linalg.norm(np.asarray(out, np.float64) - want) > 2**-11 * np.linalg.norm(want)


@pytest.mark.parametrize("shape, whole, pieces", [((2, 3, 5), 22, 3), ((1, 2, 3), 0, 2), ((1, 2, 2), 4, 1)])
def test_programs_share_out_all_work(shape, whole, pieces):
  cut = mosaic_sm90_pieces.Cut(shape, whole, pieces)
  shares = {}
  for program in range(cut.programs):
    where, share = cut.work(jnp.int32(program))
    shares.setdefault(tuple(map(int, where)), []).append(tuple(map(int, share)))
  assert sorted(shares) == list(np.ndindex(shape))
  for index, where in enumerate(np.ndindex(shape)):
    assert shares[where] == ([(0, 1)] if index < whole else [(i, pieces) for i in range(pieces)])


@pytest.mark.parametrize(
  "tiles, blocks, multiprocessors, want",
  [
    (432, 124, 132, (396, 3)),  # 36 are left over: 108 thirds in one short round
    (468, 119, 132, (396, 3)),  # fifths and sevenths have shorter rounds, but more sums to write: measured
    (444, 116, 132, (396, 2)),
    (40, 124, 132, (40, 1)),
    (432, 8, 132, (432, 1)),
    (432, 0, 132, (432, 1)),
    (264, 124, 132, (264, 1)),
    (524, 124, 132, (524, 1)),
  ],
)
def test_lists_are_cut_where_it_pays(tiles, blocks, multiprocessors, want):
  assert whole_and_pieces(tiles, blocks, multiprocessors) == want


@pytest.mark.parametrize("prefix, own, most", [(3, None, 5), (None, None, 8), (None, 4, 6), (7, None, 8)])
def test_the_most_a_tile_reads(prefix, own, most):
  k, ids = jnp.zeros((1, 512, 1, 64)), jnp.zeros((1, 1, 1, 2), jnp.int32)
  own = None if own is None else jnp.zeros((1, own * 64, 1, 64))
  assert mosaic_sm90.most_blocks(k, own, ids, jnp.int32(1) if prefix is None else prefix) == most


def test_checkpoints_make_again_what_pieces_sum_up_to(force):
  """Recomputed for the backward pass, forward is both kernels again: jax.checkpoint sees what the second one is for."""
  force(1, 2)
  q, k, v = draw(15, (1, 256, 1, 64), *[(1, 256, 1, 64)] * 2)
  ids, counts = lists(16, [[[4, 3]]], 0, 4)
  f = jax.checkpoint(lambda *x: pbsa_mosaic(Call(0.1, 64), *x, None, ids, counts, 0)[0].astype(jnp.float32).sum())
  text = jax.jit(jax.value_and_grad(f, range(3))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu_v2") == 2 + 2 + 2 + 1  # forward twice, dq, and dk with dv


def test_what_is_joined_is_kept_from_a_stack(force):
  """In a loop XLA gives a kernel its place in the stack of results; one that fills its outputs in part must not get it."""
  force(1, 2)
  q, k, v = draw(15, (1, 256, 1, 64), *[(1, 256, 1, 64)] * 2)
  ids, counts = lists(16, [[[4, 3]]], 0, 4)

  def layers(q, k, v):
    layer = lambda x, _: (x + pbsa_mosaic(Call(0.1, 64), x, k, v, None, ids, counts, 0)[0], None)
    return jax.lax.scan(layer, q, None, 2)[0].astype(jnp.float32).sum()

  text = jax.jit(jax.grad(layers, range(3))).trace(q, k, v).lower(lowering_platforms=("cuda",)).as_text()
  ops = text.splitlines()
  joined = [i for i, op in enumerate(ops) if "@mosaic_gpu_v2" in op and "output_operand_alias<" in op]
  assert len(joined) == 2  # of the forward pass and of dq
  for i in joined:
    name = ops[i].split()[0].partition(":")[0]
    assert re.search(rf"optimization_barrier {name}\b", ops[i + 1])


def test_top_lists():
  rng = np.random.default_rng(12)
  scores = rng.integers(-2, 3, (4, 5, 9)).astype(np.float32)  # ties
  scores[scores == -2], scores[scores == 2] = -np.inf, np.inf
  scores[0, 0] = -np.inf
  for budget, first in ((0, 0), (3, 0), (3, 7), (9, 4)):
    ids, counts = top_lists(jnp.asarray(scores), jnp.int32(budget), 7 if budget < 9 else 9, jnp.int32(first))
    for at in np.ndindex(4, 5):
      order = sorted(np.flatnonzero(scores[at] > -np.inf).tolist(), key=lambda i: (-scores[at][i], (i - first) % 9))
      want = sorted(order[:budget])
      assert int(counts[at]) == len(want) and ids[at].tolist() == want + [9] * (ids.shape[-1] - len(want))


def test_transposed_lists():
  ids, counts = random_lists(np.random.default_rng(9), 2, 3, 5, 4, 2, 9)
  tiles, readers = (np.asarray(x) for x in jax.jit(transpose_lists, static_argnums=3)(ids, counts, 2, 9))
  for b, n, block in np.ndindex(readers.shape):
    want = [q for q in range(5) if block < 2 or block in ids[b, n, q, : counts[b, n, q]]]
    assert list(tiles[b, n, block, : readers[b, n, block]]) == want


PRODUCTION = dict(h=128, n=12, tiles=39, blocks=294, kmax=59, prefix=60, valid=60, short=None)
PACKED = dict(h=128, n=12, tiles=37, blocks=278, kmax=56, prefix=56, valid=64, short=(range(129, 278, 74), 8))
DIGITS = dict(h=64, n=4, tiles=6, blocks=84, kmax=21, prefix=12, valid=48, short=None)


@pytest.mark.parametrize("shape", [PRODUCTION, PACKED, DIGITS], ids=["production", "packed", "digits"])
@pytest.mark.parametrize("gradient", [False, True])
@pytest.mark.parametrize("pieces", [1, 3], ids=["whole", "pieces"])
def test_lowers_for_cuda(shape, gradient, pieces, force):
  h, n, tiles, blocks, kmax, prefix, valid, short = shape.values()
  force(20 if pieces > 1 else 2 * n * tiles, pieces)
  of = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
  call = Call(h**-0.5, valid, None, heuristic(h, valid), multiprocessors=132, kv_short=short)
  stack = () if gradient else (30,)

  def attend(q, k, v, prefix_k, ids, counts, prefix):
    layer = None if gradient else jnp.int32(7)
    return pbsa_mosaic(call, q, k, v, prefix_k, ids, counts, prefix, layer)[0].astype(jnp.float32).sum()

  lowered = jax.jit(jax.grad(attend, range(4)) if gradient else attend).trace(
    of(2, tiles * 128, n, h),
    *[of(*stack, 2, blocks * 64, n, h)] * 2,
    of(*stack, 2, prefix * 64, n, h),
    of(2, n, tiles, kmax, dtype=jnp.int32),
    of(2, n, tiles, dtype=jnp.int32),
    of(dtype=jnp.int32),
  )
  text = lowered.lower(lowering_platforms=("cuda",)).as_text()
  kernels = 3 if gradient else 1
  if pieces > 1:
    kernels += 2 if gradient else 1  # that join pieces
  assert text.count("@mosaic_gpu_v2") == kernels


@pytest.mark.parametrize(
  "h, dtype, scale, match",
  [
    (64, jnp.float32, None, "dtype float32"),
    (96, jnp.bfloat16, None, "head dim 96"),
    (64, jnp.bfloat16, -1.0, "scale: -1"),
    (64, jnp.bfloat16, None, "Hopper GPU"),
  ],
)
def test_unsupported_calls_say_why(h, dtype, scale, match):
  x = draw(10, (1, 128, 1, h), *[(1, 128, 1, h)] * 2, dtype=dtype)
  ids, counts = lists(11, [[[2]]], 0, 2)
  with pytest.raises(NotImplementedError, match=match):
    pbsa(*x, ids, counts, scale=scale, implementation="mosaic_sm90")


def test_hopper_is_the_first_choice(monkeypatch):
  monkeypatch.setattr(mosaic_sm90, "unsupported", lambda *_: None)
  x = draw(10, (1, 128, 1, 64), *[(1, 128, 1, 64)] * 2)
  ids, counts = lists(11, [[[2]]], 0, 2)
  text = jax.jit(lambda *x: pbsa(*x, ids, counts)).trace(*x).lower(lowering_platforms=("cuda",)).as_text()
  assert "@mosaic_gpu_v2" in text


def test_no_hopper_falls_back():
  x = draw(10, (1, 128, 1, 64), *[(1, 128, 1, 64)] * 2)
  ids, counts = lists(11, [[[2]]], 0, 2)
  np.testing.assert_array_equal(pbsa(*x, ids, counts), pbsa(*x, ids, counts, implementation="xla"))


@pytest.mark.parametrize(
  "change, match",
  [
    (dict(prefix_blocks=3), "prefix_blocks: 3"),
    (dict(kv_grad_range=(1, 2)), r"kv_grad_range: \(1, 2\)"),
    (dict(kv_short=(range(1, 3), 8)), r"kv_short: range\(1, 3\); want an ascending range in 0..1"),
    (dict(kv_short=(range(1, -1, -1), 8)), "kv_short: range.* an ascending range"),
    (dict(kv_short=(range(2), 61), kv_valid=60), "kv_short: 61 slots; want 1..60, kv_valid"),
    (dict(prefix_k=jnp.zeros((1, 192, 1, 64), jnp.bfloat16)), "prefix_k: 192 slots"),
  ],
)
def test_wrong_ranges_are_named(change, match):
  x = draw(12, (1, 128, 1, 64), *[(1, 128, 1, 64)] * 2)
  with pytest.raises(ValueError, match=match):
    pbsa(*x, *lists(11, [[[2]]], 0, 2), **change)
