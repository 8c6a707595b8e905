"""From projections to slots: XLA's form against NumPy, the Mosaic kernel in the GPU interpreter, and on a GPU."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.pbsa import BLOCK
from pallas_kernels.slots import api, mosaic_sm90, to_slots

EPS = 1e-6


def draw(dtype, b=1, blocks=2, valid=60, n=2, h=128, layers=2, chunks=3, short=0):
  """Arguments of `to_slots`: a cache of random numbers, the second layer, the second chunk; the last block may be short."""
  rng = np.random.default_rng(blocks * valid + n)
  normal = lambda *s, scale=1.0: jnp.asarray(rng.normal(size=s) * scale, dtype)
  t, d = blocks * valid - (valid - short) * (short > 0), n * h
  angles = rng.uniform(0, 2 * np.pi, (t, h // 2))
  cos, sin = (jnp.asarray(x, jnp.float32) for x in (np.cos(angles), np.sin(angles)))
  products = [normal(b, t, d, scale=s) for s in (3, 0.5, 1)]
  cache = [normal(layers, b, chunks * blocks * BLOCK, n, h) for _ in range(2)]
  vectors = jnp.concatenate([normal(3, d, scale=0.3), 1 + normal(2, d, scale=0.1)])
  return *products, vectors, cos, sin, *cache, jnp.int32(1), jnp.int32(blocks)


def oracle(valid, q, k, v, vectors, cos, sin, k_slots, v_slots, layer, first):
  """In float64; the means are of what is written."""
  dtype, n, h = q.dtype, *k_slots.shape[-2:]
  wide = lambda x: np.asarray(x, np.float64)
  rounded = lambda x: wide(jnp.asarray(x, dtype))
  q, k, v = (wide(x) + wide(bias) for x, bias in zip((q, k, v), vectors[:3], strict=True))
  turned = []
  for x, weight in zip((q, k), vectors[3:], strict=True):
    y = (x / np.sqrt((x * x).mean(-1, keepdims=True) + EPS) * wide(weight)).reshape(*x.shape[:2], n, h // 2, 2)
    turn = (wide(cos) + 1j * wide(sin))[:, None]
    z = (y[..., 0] + 1j * y[..., 1]) * turn
    turned.append(np.stack([z.real, z.imag], -1).reshape(x.shape))
  blocks = np.stack([*turned, v])
  blocks = np.pad(blocks, [(0, 0)] * 2 + [(0, -blocks.shape[2] % valid), (0, 0)])
  blocks = blocks.reshape(3, q.shape[0], -1, valid, n, h)
  sizes = np.full(blocks.shape[2], valid)
  sizes[-1] = (q.shape[1] - 1) % valid + 1
  empty = [(0, 0)] * 2 + [(0, blocks.shape[2] % 2)]
  means = np.pad(rounded(blocks).sum(3) / sizes[:, None, None], [*empty, (0, 0), (0, 0)])
  packed = np.pad(blocks, [*empty, (0, BLOCK - valid), (0, 0), (0, 0)])
  q, k, v = packed.reshape(3, q.shape[0], -1, n, h)
  k_slots, v_slots = wide(k_slots).copy(), wide(v_slots).copy()
  at = slice(int(first) * BLOCK, int(first) * BLOCK + q.shape[1])
  k_slots[int(layer), :, at], v_slots[int(layer), :, at] = k, v
  return q, k_slots, v_slots, means


def check(got, want, dtype):
  eps = float(jnp.finfo(dtype).eps)
  *slots, means = got
  for x, w in zip(slots, want, strict=False):
    x = np.asarray(x, np.float64)
    assert x.shape == w.shape
    # One rounding of the result, of at most eps / 2 in 16 bit; in float32 about five, and sums of a thousand squares.
    part = 0.6 if dtype == jnp.bfloat16 else 4
    assert np.linalg.norm(x - w) <= part * eps * np.linalg.norm(w)
    assert (np.abs(x - w) <= part * eps * np.abs(w).max(-1, keepdims=True)).all()  # and holes are zeros
  w = want[-1]
  assert means.dtype == jnp.float32 and means.shape == w.shape
  # In bfloat16 of the same rounded values, but for the few that round the other way; in float32 every sum rounds.
  part = 1 / 8 if dtype == jnp.bfloat16 else 1
  assert np.linalg.norm(np.asarray(means, np.float64) - w) <= part * eps * np.linalg.norm(w)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("blocks", "valid", "short"), [(2, 60, 0), (3, 48, 0), (2, 64, 0), (2, 64, 8), (3, 60, 1)])
def test_xla_equals_numpy(blocks, valid, short, dtype):
  x = draw(dtype, b=2, blocks=blocks, valid=valid, short=short, n=3, h=64, chunks=4)
  check(to_slots(*x, valid=valid, eps=EPS, implementation="xla"), oracle(valid, *x), dtype)


def longer(x, rows=4):
  """The same arguments, with rows behind the products that nobody is to read."""
  return *(jnp.pad(a, ((0, 0), (0, rows), (0, 0)), constant_values=jnp.nan) for a in x[:3]), *x[3:]


def test_rows_past_the_tokens_are_not_read():
  x = draw(jnp.float32, b=2)
  check(to_slots(*longer(x), valid=60, eps=EPS, implementation="xla"), oracle(60, *x), jnp.float32)
  with pytest.raises(ValueError, match=r"^q: shape \(2, 116, 256\); want \(2, 120, 256\)"):
    to_slots(*(a[:, :116] for a in x[:3]), *x[3:], valid=60, eps=EPS)


@pytest.mark.parametrize(
  "shape",
  [
    dict(valid=60, n=2, h=128),
    dict(b=2, valid=16, n=4, h=64),
    dict(valid=64, n=2, h=128),
    dict(b=2, valid=64, short=8, n=2, h=128),
    dict(valid=12, short=10, n=2, h=64, blocks=4),
  ],
)
def test_the_kernel_in_the_interpreter(shape):
  x, valid = draw(jnp.bfloat16, **shape), shape["valid"]
  try:
    *slots, sums = mosaic_sm90.to_slots(valid, EPS, *longer(x), interpret=plgpu.InterpretGPUParams(detect_races=True))
    check((*slots, api._means(sums.sum(3), x[4].shape[0], valid)), oracle(valid, *x), jnp.bfloat16)
    assert not interpreter.get_races().races_found
  finally:
    interpreter.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(
  ("n", "h", "valid", "blocks", "short"),
  [(12, 128, 60, 78, 0), (40, 128, 60, 78, 0), (6, 64, 48, 16, 0), (12, 128, 64, 74, 8), (40, 128, 64, 74, 8)],
)
def test_lowers_for_cuda(n, h, valid, blocks, short):
  of = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
  t, d, slots = blocks * valid - (valid - short) * (short > 0), n * h, 3 * blocks * BLOCK
  angles, number = of(t, h // 2, dtype=jnp.float32), of(dtype=jnp.int32)
  x = *[of(1, t, d)] * 3, of(5, d), angles, angles, *[of(4, 1, slots, n, h)] * 2, number, number
  kernel = jax.jit(functools.partial(mosaic_sm90.to_slots, valid, EPS), donate_argnums=(6, 7))
  text = kernel.trace(*x).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu_v2") == 1
  for result, operand in ((2, 8), (3, 9)):  # the cache is the same memory before and after
    assert f"output_tuple_indices = [{result}], operand_index = {operand}," in text


@pytest.mark.gpu
@pytest.mark.parametrize(
  "shape", [dict(), dict(n=40), dict(b=2, valid=48, n=6, h=64, blocks=16), dict(blocks=74, valid=64, short=8)]
)
def test_the_kernel_on_a_gpu(shape):
  shape = dict(blocks=78, n=12, chunks=2) | shape
  x, valid = draw(jnp.bfloat16, **shape), shape.get("valid", 60)
  run = jax.jit(functools.partial(to_slots, valid=valid, eps=EPS, implementation="mosaic_sm90"))
  got = run(*x)
  with jax.default_device(jax.devices("cpu")[0]):
    check(got, oracle(valid, *(np.asarray(a) for a in x)), jnp.bfloat16)
  for _ in range(20):
    for a, again in zip(got, run(*x), strict=True):
      assert jnp.array_equal(a, again)


def test_gradient_of_the_kernel_is_that_of_the_reference(monkeypatch):
  x = draw(jnp.float32, valid=16, n=1, h=64)

  def by_reference(valid, eps, *args):
    *slots, means = api.by_xla(valid, eps, *args)
    return *slots, means[:, :, :, None] * valid

  monkeypatch.setattr(mosaic_sm90, "to_slots", by_reference)
  sizes = lambda f: lambda *some: sum((y * y).sum() for y in f(16, EPS, *some, *x[4:]))
  got, want = (jax.grad(sizes(f), range(4))(*x[:4]) for f in (api._by_kernel, api.by_xla))
  for a, w in zip(got, want, strict=True):
    np.testing.assert_allclose(a, w, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ("argument", "change", "line"),
  [
    (1, lambda x: x[:, 1:], "k: shape"),
    (2, lambda x: x.astype(jnp.bfloat16), "v: dtype bfloat16; want float32"),
    (3, lambda x: x[:2], r"vectors: shape \(2, 256\); want \(5, 256\)"),
    (4, lambda x: x[:, :3], "cos: shape"),
    (5, lambda x: x.astype(jnp.bfloat16), "sin: dtype"),
    (7, lambda x: x[1:], "v_slots: shape"),
  ],
)
def test_wrong_arguments(argument, change, line):
  x = list(draw(jnp.float32))
  x[argument] = change(x[argument])
  with pytest.raises(ValueError, match=line):
    to_slots(*x, valid=60, eps=EPS)


def test_wrong_blocks():
  x = draw(jnp.float32)
  with pytest.raises(ValueError, match="valid: 65; want 1..64"):
    to_slots(*x, valid=65, eps=EPS)
  with pytest.raises(ValueError, match="k_slots: S = 64"):
    to_slots(*x[:6], *(a[:, :, :64] for a in x[6:8]), *x[8:], valid=60, eps=EPS)


def test_what_the_kernel_cannot_do(monkeypatch):
  x = draw(jnp.float32)
  with pytest.raises(NotImplementedError, match="implementation: 'triton'"):
    to_slots(*x, valid=60, eps=EPS, implementation="triton")
  ask = functools.partial(to_slots, valid=60, eps=EPS, implementation="mosaic_sm90")
  if jax.default_backend() != "gpu":
    with pytest.raises(NotImplementedError, match="wants a Hopper GPU"):
      ask(*x)
  monkeypatch.setattr(mosaic_sm90, "current_device", lambda: types.SimpleNamespace(compute_capability="9.0"))
  for other, line in (
    (dict(), "q: dtype float32; mosaic_sm90 wants bfloat16"),
    (dict(dtype=jnp.bfloat16, n=42), "q: 42 heads of 128"),
    (dict(dtype=jnp.bfloat16, n=3), "q: 3 heads of 128; mosaic_sm90 wants an even number"),
    (dict(dtype=jnp.bfloat16, blocks=3), "valid: 3 blocks of 60; mosaic_sm90 wants even"),
    (dict(dtype=jnp.bfloat16, short=7), "valid: 2 blocks of 60, 7 in the last; mosaic_sm90 wants even"),
  ):
    with pytest.raises(NotImplementedError, match=line):
      ask(*draw(**(dict(dtype=jnp.float32, chunks=4) | other)))
