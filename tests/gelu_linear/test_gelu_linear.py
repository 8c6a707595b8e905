"""gelu(x W + b): the Mosaic kernel in the GPU interpreter and on a GPU, against float64."""

import functools
import json
import os
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gelu_linear import api, gelu_linear, mosaic_sm90


def draw(r=40, k=1024, f=256, dtype=jnp.bfloat16):
  rng = np.random.default_rng(r + k)
  normal = lambda *s, size=1.0: jnp.asarray(rng.normal(size=s) * size, dtype)
  return normal(r, k), normal(k, f, size=k**-0.5), normal(f)


def excess(got, x, kernel, bias, more=0.0) -> float:
  """The largest error over what roundings allow: one each (half an ulp) of the product, the sum before GELU, whose slope is at
  most 1.13, and the result; of float32's sums; tanh by the GPU is right to 2^-11. more: roundings of the sum's size."""
  half = float(jnp.finfo(x.dtype).eps) / 2
  x, kernel, bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
  product = x @ kernel
  y = product + bias
  want = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
  sums = x.shape[1] * 2.0**-24 * (np.abs(x) @ np.abs(kernel))
  allowed = half * (1.13 * (abs(product) + abs(y)) + abs(want) + more * abs(y)) + 1.13 * sums
  return float((abs(np.asarray(got, np.float64) - want) / (allowed + 2.0**-12 * abs(y) * (half > 2.0**-20))).max())


CASES = dict(  # r, k, f, multiprocessors
  a_tile_each=(304, 1024, 768, 132),
  some_tiles_each=(640, 1088, 512, 4),  # and steps that are no multiple of the ring's
  one_tile=(40, 1024, 256, 2),
)


@pytest.fixture(scope="module")
def interpreted():
  """{case: (excess, races)}. Blocking callbacks of six threads want as many of XLA, whose number is that of the cores.

  The interpreter finishes a product at once: when a slot is free again, only a GPU shows.
  """
  env = os.environ | dict(NPROC="8", JAX_PLATFORMS="cpu")
  line = [sys.executable, "-m", "tests.gelu_linear.interpreted"]
  run = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
  assert run.returncode == 0, run.stderr[-2000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_in_the_interpreter(interpreted, case):
  error, races = interpreted[case]
  assert error <= 1 and not races


@pytest.mark.parametrize("shape", [(4680, 1536, 8960), (4680, 5120, 13824), (264, 1088, 768), (8, 1024, 256)])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_lowers_for_cuda(shape, dtype):
  r, k, f = shape
  of = lambda *s: jax.ShapeDtypeStruct(s, dtype)
  kernel = jax.jit(functools.partial(mosaic_sm90.gelu_linear, multiprocessors=132)).trace(of(r, k), of(k, f), of(f))
  assert kernel.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4680, 1536, 8960), (4680, 5120, 13824), (9360, 1536, 8960), (264, 1088, 768)])
def test_the_kernel_on_a_gpu(shape):
  x = draw(*shape)
  run = jax.jit(lambda *x: gelu_linear(*x, implementation="mosaic_sm90"))
  got = run(*x)
  assert excess(got, *x) <= 1
  for _ in range(20):
    assert jnp.array_equal(got, run(*x))


FORMULA = 8  # GELU's operations, each rounded


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_by_xla(dtype):
  x = draw(dtype=dtype)
  assert excess(gelu_linear(*x), *x, more=FORMULA) <= 1


def test_gradient_and_its_value_are_those_of_xla(monkeypatch):
  x = draw(dtype=jnp.float32)
  monkeypatch.setattr(mosaic_sm90, "gelu_linear", lambda *x: api.by_xla(*x[:3]) + 1)
  kernel = functools.partial(api._by_kernel, 132)
  assert jnp.array_equal(kernel(*x), api.by_xla(*x) + 1)
  size = lambda f: lambda *x: (f(*x) ** 2).sum()
  got, want = (jax.value_and_grad(size(f), range(3))(*x) for f in (kernel, api.by_xla))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  ("argument", "change", "line"),
  [
    (0, lambda x: x[None], r"x: shape \(1, 40, 1024\); want \[R,K\]"),
    (1, lambda x: x[1:], r"kernel: shape \(1023, 256\); want \[K,F\] with K = 1024"),
    (2, lambda x: x[1:], r"bias: shape \(255,\); want \(256,\)"),
    (1, lambda x: x.astype(jnp.float32), "kernel: dtype float32; want x's dtype bfloat16"),
    (2, lambda x: x.astype(jnp.float32), "bias: dtype float32; want x's dtype bfloat16"),
  ],
)
def test_wrong_arguments(argument, change, line):
  x = list(draw())
  x[argument] = change(x[argument])
  with pytest.raises(ValueError, match=line):
    gelu_linear(*x)


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (dict(dtype=jnp.float32), "x: dtype float32; mosaic_sm90 wants bfloat16 or float16"),
    (dict(r=44), "x: 44 rows; mosaic_sm90 wants a multiple of 8"),
    (dict(k=1056), r"kernel: shape \(1056, 256\); mosaic_sm90 wants a multiple of 64 from 1024 on, and one of 256"),
    (dict(k=960), r"kernel: shape \(960, 256\)"),
    (dict(f=320), r"kernel: shape \(1024, 320\)"),
  ],
)
def test_what_the_kernel_cannot_do(monkeypatch, change, line):
  x = draw(**change)
  with pytest.raises(NotImplementedError, match="implementation: 'triton'"):
    gelu_linear(*x, implementation="triton")
  with pytest.raises(NotImplementedError, match="mosaic_sm90 wants a Hopper GPU"):
    gelu_linear(*x, implementation="mosaic_sm90")
  hopper = types.SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H100")
  monkeypatch.setattr(mosaic_sm90, "current_device", lambda: hopper)
  with pytest.raises(NotImplementedError, match=line):
    gelu_linear(*x, implementation="mosaic_sm90")
  assert excess(gelu_linear(*x), *x, more=FORMULA) <= 1  # falls back
