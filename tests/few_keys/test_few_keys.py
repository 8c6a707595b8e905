"""Attention to a prompt's rows: the Mosaic kernel in the GPU interpreter and on a GPU, against plain attention in float32."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.dense import dense_attention
from pallas_kernels.few_keys import api, few_keys, mosaic_sm90


def draw(distinct, t=72, m=128, n=2, h=64, dtype=jnp.bfloat16, scale=1.0):
  """Arguments of `few_keys`, as many videos as there are numbers of rows that differ."""
  rng = np.random.default_rng(t + sum(distinct))
  normal = lambda *s: jnp.asarray(rng.normal(size=s) * scale, dtype)
  b, distinct = len(distinct), jnp.asarray(distinct, jnp.int32)
  row = jnp.minimum(jnp.arange(m), distinct[:, None] - 1)[..., None, None]
  k, v = (jnp.take_along_axis(normal(b, m, n, h), row, 1) for _ in range(2))
  product, vectors = normal(b, t, n, h), normal(2, n, h)
  squares = ((product.astype(jnp.float32) + vectors[0]) ** 2).sum((2, 3))
  return product, vectors, squares, k, v, distinct


def error(got, *x):
  """Relative, against attention to all rows in float32, of queries that were rounded."""
  product, (bias, norm), squares, k, v = (a.astype(jnp.float32) for a in x[:5])
  scale = 1 / jnp.sqrt(squares / product[0, 0].size + EPS)[..., None, None]
  q = ((product + bias) * scale * norm).astype(x[0].dtype).astype(jnp.float32)
  want = np.asarray(dense_attention(q, k, v))
  return np.linalg.norm(np.asarray(got, np.float32) - want) / np.linalg.norm(want)


EPS = 1e-6
BFLOAT16 = 3e-3  # the forward kernels' bound: probabilities and the result are rounded once, 2^-9 of each at most


@pytest.mark.parametrize(
  ("distinct", "shape"),
  [((1, 64), {}), ((65, 128), {}), ((40, 127), dict(t=128, h=128, n=1)), ((63,), dict(m=64, t=64, scale=4.0))],
)
def test_the_kernel_in_the_interpreter(distinct, shape):
  x = draw(distinct, **shape)
  try:
    got = mosaic_sm90.few_keys(x[0][0, 0].size, EPS, *x, interpret=plgpu.InterpretGPUParams(detect_races=True))
    assert got.dtype == x[0].dtype and error(got, *x) <= BFLOAT16
    assert not interpreter.get_races().races_found
  finally:
    interpreter.reset_gpu_interpret_mode_state()


def test_what_is_behind_the_last_distinct_row_is_never_read():
  *query, k, v, distinct = draw((30, 64))
  wrong = (jnp.where(jnp.arange(128)[:, None, None] < distinct[:, None, None, None], x, 1e3) for x in (k, v))
  got = mosaic_sm90.few_keys(query[0][0, 0].size, EPS, *query, *wrong, distinct, interpret=plgpu.InterpretGPUParams())
  interpreter.reset_gpu_interpret_mode_state()
  assert error(got, *query, k, v, distinct) <= BFLOAT16


@pytest.mark.parametrize("shape", [(1, 4680, 12, 128, 512), (2, 4680, 40, 128, 512), (2, 192, 6, 64, 64)])
def test_lowers_for_cuda(shape):
  b, t, n, h, m = shape
  of = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
  query = of(b, t, n, h), of(2, n, h), of(b, t, dtype=jnp.float32)
  x = *query, of(b, m, n, h), of(b, m, n, h), of(b, dtype=jnp.int32)
  kernel = functools.partial(mosaic_sm90.few_keys, n * h, EPS)
  text = jax.jit(kernel).trace(*x).lower(lowering_platforms=("cuda",)).as_text()
  assert text.count("@mosaic_gpu_v2") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("distinct", [1, 41, 64, 65, 200, 512])
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_the_kernel_on_a_gpu(distinct, scale):
  x = draw((distinct, 512), t=4680, m=512, n=12, h=128, scale=scale)
  run = jax.jit(lambda *x: few_keys(*x, width=12 * 128, eps=EPS, implementation="mosaic_sm90"))
  got = run(*x)
  assert error(got, *x) <= BFLOAT16
  for _ in range(20):
    assert jnp.array_equal(got, run(*x))


def test_gradient_is_that_of_plain_attention(monkeypatch):
  x = draw((5, 16), t=16, m=16, h=8, dtype=jnp.float32)
  monkeypatch.setattr(mosaic_sm90, "few_keys", lambda width, eps, *x: api.every_key(width, eps, *x[:5]))
  size = lambda f: lambda *some: (f(*some) ** 2).sum()
  got = jax.grad(size(lambda *some: api._by_kernel(16, EPS, *some, x[5])), range(5))(*x[:5])
  want = jax.grad(size(functools.partial(api.every_key, 16, EPS)), range(5))(*x[:5])
  for a, w in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, w)


@pytest.mark.parametrize(
  ("argument", "change", "line"),
  [
    (1, lambda x: x[:, :1], r"vectors: shape \(2, 1, 64\); want \(2, 2, 64\)"),
    (2, lambda x: x[:, 1:], r"squares: shape \(2, 71\); want \(2, 72\)"),
    (2, lambda x: x.astype(jnp.bfloat16), "squares: dtype bfloat16; want float32"),
    (3, lambda x: x[:, :, :1], r"k: shape \(2, 128, 1, 64\); want \(2, 128, 2, 64\)"),
    (4, lambda x: x[:, 1:], r"v: shape \(2, 127, 2, 64\); want \(2, 128, 2, 64\)"),
    (4, lambda x: x.astype(jnp.float32), "v: dtype float32; want product's dtype bfloat16"),
    (5, lambda x: x[:1], r"distinct: shape \(1,\); want \(2,\)"),
  ],
)
def test_wrong_arguments(argument, change, line):
  x = list(draw((3, 4)))
  x[argument] = change(x[argument])
  with pytest.raises(ValueError, match=line):
    few_keys(*x, width=128, eps=EPS)


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (dict(dtype=jnp.float32), "product: dtype float32; mosaic_sm90 wants bfloat16 or float16"),
    (dict(h=32), "product: head dim 32; mosaic_sm90 wants 64 or 128"),
    (dict(t=68), "product: T = 68 rows; mosaic_sm90 wants a multiple of 8, at least 64"),
    (dict(m=120), "k: M = 120 rows; mosaic_sm90 wants a multiple of 64"),
  ],
)
def test_what_the_kernel_cannot_do(monkeypatch, change, line):
  x, how = draw((3, 4), **change), dict(width=128, eps=EPS)
  with pytest.raises(NotImplementedError, match="implementation: 'triton'"):
    few_keys(*x, **how, implementation="triton")
  with pytest.raises(NotImplementedError, match="mosaic_sm90 wants a Hopper GPU"):
    few_keys(*x, **how, implementation="mosaic_sm90")
  hopper = types.SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H100")
  monkeypatch.setattr(mosaic_sm90, "current_device", lambda: hopper)
  with pytest.raises(NotImplementedError, match=line):
    few_keys(*x, **how, implementation="mosaic_sm90")
  assert error(few_keys(*x, width=x[0][0, 0].size, eps=EPS), *x) <= BFLOAT16  # falls back
