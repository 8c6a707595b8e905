"""Tier E, on a GPU (`pytest -o addopts= -m gpu`): "mosaic_sm90" and "cudnn" against "xla" in float32, forward and gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pbsa import mosaic_sm90_pieces, pbsa
from pallas_kernels.pbsa.lists import TILE
from tests.pbsa.oracle import random_lists


def poison(*arrays):
  """Leaves NaN in freed memory of these sizes: rows that a kernel forgets show up."""
  jax.block_until_ready([jnp.full_like(x, jnp.nan) for x in arrays for _ in range(2)])


# H 128 is one ragged quarter of the production shape, H 64 that of digits with keys of its own for the prefix. The
# last two have more tiles than an H100 has multiprocessors, so that those of their last round are cut into pieces.
SHAPES = {
  "production": dict(b=1, tiles=13, n=3, h=128, blocks=160, kmax=41, prefix=20, valid=60, own_keys=False),
  "digits": dict(b=2, tiles=6, n=4, h=64, blocks=84, kmax=21, prefix=12, valid=48, own_keys=True),
  "rounds": dict(b=1, tiles=23, n=6, h=128, blocks=70, kmax=31, prefix=9, valid=60, own_keys=True),
  "short": dict(
    b=1, tiles=23, n=6, h=128, blocks=70, kmax=31, prefix=9, valid=64, own_keys=True, short=(range(4, 70, 5), 8)
  ),
}


def problem(scale, *, b, tiles, n, h, blocks, kmax, prefix, valid, own_keys, short=None):
  """Arrays to differentiate, pbsa with everything else bound, and cotangents of out and lse; some tile has an empty list."""
  rng = np.random.default_rng(int(scale))
  draw = lambda *s: jnp.asarray(rng.normal(size=s) * scale, jnp.bfloat16)
  x = [draw(b, tiles * TILE, n, h), draw(b, blocks * 64, n, h), draw(b, blocks * 64, n, h)]
  x += [draw(b, prefix * 64, n, h)] * own_keys
  ids, counts = random_lists(rng, b, n, tiles, kmax, prefix, blocks)
  counts[0, 0, 0] = 0

  def attend(implementation, q, k, v, prefix_k=None, **more):
    return pbsa(
      q, k, v, jnp.asarray(ids), jnp.asarray(counts), prefix_blocks=jnp.int32(prefix), prefix_k=prefix_k,
      kv_valid=valid, kv_short=short, return_lse=True, implementation=implementation, **more,
    )  # fmt: skip

  cotangents = (
    jnp.asarray(rng.normal(size=x[0].shape), jnp.bfloat16),
    jnp.asarray(rng.normal(size=(b, n, tiles * TILE)), jnp.float32),
  )
  return x, attend, cotangents


@functools.partial(jax.jit, static_argnums=0)
def value_and_gradients(attend, x, cotangents):
  value, vjp = jax.vjp(attend, *x)
  return (*value, *vjp(jax.tree.map(lambda c, y: c.astype(y.dtype), cotangents, value)))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("scale", [1.0, 4.0, 16.0])
def test_mosaic_equals_xla(shape, scale):
  x, attend, cotangents = problem(scale, **SHAPES[shape])
  with jax.default_device(jax.devices("cpu")[0]):  # where float32 is float32, and nothing is tuned first
    wide = [np.asarray(a, np.float32) for a in x]
    want = value_and_gradients(functools.partial(attend, "xla"), wide, jax.tree.map(np.asarray, cotangents))
  poison(*x, *x)
  mosaic = functools.partial(attend, "mosaic_sm90")  # one object: jit knows it again
  run = lambda: value_and_gradients(mosaic, x, cotangents)
  got = run()
  names = ("out", "lse", "dq", "dk", "dv", "dprefix_k")
  for name, a, w in zip(names, got, want, strict=False):
    a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
    error = np.linalg.norm(a - w) / np.linalg.norm(w)
    print(f"{shape} scale {scale} {name}: {error:.2e}")
    assert error <= (1e-5 if name == "lse" else 3e-3 if name == "out" else 5e-3), name
  for _ in range(20):
    for a, again in zip(got, run(), strict=True):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(again))


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_equal_whole_tiles(shape, monkeypatch):
  x, attend, cotangents = problem(4.0, **SHAPES[shape])
  run = lambda: value_and_gradients(functools.partial(attend, "mosaic_sm90"), x, cotangents)
  monkeypatch.setattr(mosaic_sm90_pieces, "whole_and_pieces", lambda *_: (2, 3))
  cut = run()
  monkeypatch.setattr(mosaic_sm90_pieces, "whole_and_pieces", lambda tiles, *_: (tiles, 1))
  differs = False
  for name, a, w in zip(("out", "lse", "dq", "dk", "dv", "dprefix_k"), cut, run(), strict=False):
    a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
    error = np.linalg.norm(a - w) / np.linalg.norm(w)
    print(f"{shape} {name}: {error:.2e}")
    # Probabilities are rounded to bf16 around another maximum where a tile is cut; sums are of float32 both times.
    assert error <= (1e-6 if name == "lse" else 3e-3), name
    differs |= error > 0
  assert differs


@pytest.mark.gpu
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_in_a_loop_equal_whole_tiles(shape, monkeypatch):
  """Two layers that the backward pass walks back: what the first kernel and the one that joins leave is stacked."""
  (q, *rest), attend, (dout, _) = problem(1.0, **SHAPES[shape])

  def run():
    def layers(q, *rest):
      layer = lambda x, size: (x + attend("mosaic_sm90", (size * x).astype(x.dtype), *rest)[0], None)
      return (jax.lax.scan(layer, q, jnp.array([1.0, 0.7]))[0].astype(jnp.float32) * dout).sum()

    return jax.jit(jax.grad(layers, range(1 + len(rest))))(q, *rest)

  monkeypatch.setattr(mosaic_sm90_pieces, "whole_and_pieces", lambda *_: (2, 3))
  cut = run()
  monkeypatch.setattr(mosaic_sm90_pieces, "whole_and_pieces", lambda tiles, *_: (tiles, 1))
  for a, w in zip(cut, run(), strict=True):
    a, w = np.asarray(a, np.float64), np.asarray(w, np.float64)
    assert np.linalg.norm(a - w) <= 5e-3 * np.linalg.norm(w)  # as against float32


@pytest.mark.gpu
def test_mosaic_special_calls():
  x, attend, cotangents = problem(1.0, **SHAPES["production"])
  plain = attend("mosaic_sm90", *x)
  for a, w in zip(attend(None, *x), plain, strict=True):
    np.testing.assert_array_equal(np.asarray(a), np.asarray(w))
  stacked = attend(
    "mosaic_sm90", x[0], *(jnp.stack([0 * a, a, -a]) for a in x[1:]), layer=jnp.int32(1)
  )  # prefix_k, too
  np.testing.assert_array_equal(np.asarray(plain[0]), np.asarray(stacked[0]))
  full = value_and_gradients(functools.partial(attend, "mosaic_sm90"), x, cotangents)
  part = value_and_gradients(functools.partial(attend, "mosaic_sm90", kv_grad_range=(20, 99)), x, cotangents)
  inside = slice(20 * 64, 100 * 64)
  for a, w in zip(part[3:], full[3:], strict=True):
    np.testing.assert_array_equal(np.asarray(a[:, inside]), np.asarray(w[:, inside]))
    assert not np.any(a[:, : 20 * 64]) and not np.any(a[:, 100 * 64 :])
  with pytest.raises(NotImplementedError, match="layer"):
    k, v = (a[None] for a in x[1:])
    jax.grad(lambda q: attend("mosaic_sm90", q, k, v, layer=jnp.int32(0))[0].astype(jnp.float32).sum())(x[0])


@pytest.mark.gpu
def test_mosaic_reads_nothing():
  x = [jnp.ones((1, 128, 1, 64), jnp.bfloat16)] * 3
  ids, counts = jnp.zeros((1, 1, 1, 0), jnp.int32), jnp.zeros((1, 1, 1), jnp.int32)
  poison(*x)
  f = lambda *x: pbsa(*x, ids, counts, return_lse=True, implementation="mosaic_sm90")
  (out, lse), vjp = jax.vjp(f, *x)
  assert not np.any(out) and np.all(np.isneginf(lse))
  assert not any(np.any(g) for g in vjp((out + 1, jnp.zeros_like(lse))))


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, 4.0])
@pytest.mark.parametrize(
  "form",
  ["lists", "prefix and lists", "prefix and lists of short blocks", "prefix alone", "prefix alone of short blocks"],
)
def test_cudnn_equals_xla(scale, form):
  rng = np.random.default_rng(0)
  b, tiles, n, h, blocks, kmax, valid = 2, 6, 3, 64, 40, 20, 48
  draw = lambda *s: jnp.asarray(rng.normal(size=s) * scale, jnp.bfloat16)
  q, k, v = draw(b, tiles * 128, n, h), draw(b, blocks * 64, n, h), draw(b, blocks * 64, n, h)
  bound = 0 if form == "lists" else 5
  lists = [bound + np.sort(rng.permutation(blocks - bound)[:kmax]) for _ in range(b * n * tiles)]
  ids = jnp.asarray(np.reshape(lists, (b, n, tiles, kmax)), jnp.int32)
  counts = jnp.asarray(rng.integers(1, kmax + 1, (b, n, tiles)), jnp.int32)
  short = (range(1, blocks, 2), 8) if "short" in form else None
  if "prefix alone" in form:
    ids, counts = ids[..., :0], 0 * counts
  prefix_k = draw(b, bound * 64, n, h) if "prefix and lists" in form else None
  g = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

  def run(implementation, *x, prefix_k):

    def f(q, k, v, prefix):
      out = pbsa(
        q, k, v, ids, counts, prefix_blocks=prefix if bound else 0, prefix_k=prefix_k, kv_valid=valid, kv_short=short,
        implementation=implementation,
      )  # fmt: skip
      return (out.astype(jnp.float32) * g).sum(), out

    grads, out = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(*x, jnp.int32(bound - 1))
    return [np.asarray(x, np.float64) for x in (out, *grads)]

  got = run("cudnn", q, k, v, prefix_k=prefix_k)
  q, k, v, g, prefix_k, ids, counts = jax.tree.map(np.asarray, (q, k, v, g, prefix_k, ids, counts))
  wide = lambda x: None if x is None else x.astype(np.float32)
  with jax.default_device(jax.devices("cpu")[0]):
    ids, counts = jnp.asarray(ids), jnp.asarray(counts)
    want = run("xla", *map(wide, (q, k, v)), prefix_k=wide(prefix_k))
  errors = [np.linalg.norm(a - w) / np.linalg.norm(w) for a, w in zip(got, want, strict=True)]
  print(errors)
  assert errors[0] <= 5e-3 and max(errors[1:]) <= 2e-2  # bf16 output, bf16 probabilities and delta in backward
