"""gelu(x W + b): the Mosaic kernel in the GPU interpreter and on a GPU, against float64."""

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


def draw(r=40, k=256, f=256, dtype=jnp.bfloat16):
  rng = np.random.default_rng(r + k)
  normal = lambda *s, size=1.0: jnp.asarray(rng.normal(size=s) * size, dtype)
  return normal(r, k), normal(k, f, size=k**-0.5), normal(f)


def excess(got, x, kernel, bias) -> float:
  """Error over what roundings allow: half an ulp (2^-9) each of the product, the sum before GELU, whose slope is at most 1.13,
  and the result; tanh by the GPU is right to 2^-11."""
  x, kernel, bias = (np.asarray(a, np.float64) for a in (x, kernel, bias))
  product = x @ kernel
  y = product + bias
  want = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
  size = np.linalg.norm
  allowed = 2.0**-9 * (1.13 * (size(product) + size(y)) + size(want)) + 2.0**-12 * size(y)
  return size(np.asarray(got, np.float64) - want) / allowed


CASES = dict(  # r, k, f, multiprocessors
  one_pair=(256, 256, 256, 132),
  odd_tiles_and_columns=(300, 320, 768, 132),
  many_units=(640, 256, 768, 4),
  one_tile=(40, 256, 512, 2),
)


@pytest.fixture(scope="module")
def interpreted():
  """{case: (excess, races)}. Blocking callbacks of six threads want as many of XLA, whose number is that of the cores."""
  env = os.environ | dict(NPROC="8", JAX_PLATFORMS="cpu")
  line = [sys.executable, "-m", "tests.gelu_linear.interpreted"]
  run = subprocess.run(line, env=env, capture_output=True, text=True, timeout=300)
  assert run.returncode == 0, run.stderr[-2000:]
  return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", CASES)
def test_the_kernel_in_the_interpreter(interpreted, case):
  error, races = interpreted[case]
  assert error <= 1 and not races


@pytest.mark.parametrize("shape", [(4680, 1536, 8960), (4680, 5120, 13824), (9360, 1536, 8960)])
def test_lowers_for_cuda(shape):
  r, k, f = shape
  of = lambda *s: jax.ShapeDtypeStruct(s, jnp.bfloat16)
  kernel = jax.jit(mosaic_sm90.gelu_linear).trace(of(r, k), of(k, f), of(f))
  assert kernel.lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2") == 1


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(4680, 1536, 8960), (4680, 5120, 13824), (9360, 1536, 8960), (257, 256, 768)])
def test_the_kernel_on_a_gpu(shape):
  x = draw(*shape)
  run = jax.jit(lambda *x: gelu_linear(*x, implementation="mosaic_sm90"))
  got = run(*x)
  assert excess(got, *x) <= 1
  for _ in range(20):
    assert jnp.array_equal(got, run(*x))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_by_xla(dtype):
  x = draw(dtype=dtype)
  assert excess(gelu_linear(*x), *x) <= 1


def test_gradient_and_its_value_are_those_of_xla(monkeypatch):
  x = draw(dtype=jnp.float32)
  monkeypatch.setattr(mosaic_sm90, "gelu_linear", lambda *x: api.by_xla(*x) + 1)
  assert jnp.array_equal(api._by_kernel(*x), api.by_xla(*x) + 1)
  size = lambda f: lambda *x: (f(*x) ** 2).sum()
  got, want = (jax.value_and_grad(size(f), range(3))(*x) for f in (api._by_kernel, api.by_xla))
  jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
  ("argument", "change", "line"),
  [
    (0, lambda x: x[None], r"x: shape \(1, 40, 256\); want \[R,K\]"),
    (1, lambda x: x[1:], r"kernel: shape \(255, 256\); want \[K,F\] with K = 256"),
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
    (dict(k=288), r"kernel: shape \(288, 256\); mosaic_sm90 wants a multiple of 64 from 256 on, and one of 256"),
    (dict(k=192), r"kernel: shape \(192, 256\)"),
    (dict(f=320), r"kernel: shape \(256, 320\)"),
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
  assert excess(gelu_linear(*x), *x) <= 1  # falls back
