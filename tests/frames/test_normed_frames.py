"""The input of a causal convolution: XLA's form against NumPy, the Mosaic kernel in the GPU interpreter, and on a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.frames import mosaic_sm90, normed_frames


def draw(b, f, h, w, c, dtype):
  rng = np.random.default_rng(f * c)
  x, past = (jnp.asarray(rng.normal(size=(b, n, h, w, c)) * 3, dtype) for n in (f, 2))
  return x, past, jnp.asarray(rng.normal(1, 0.1, c) * c**0.5, jnp.float32)


def oracle(x, past, gamma):
  """In float64, but for the rounding of the norm."""
  x, past, gamma, dtype = *(np.asarray(a, np.float64) for a in (x, past, gamma)), x.dtype
  n = x / np.linalg.norm(x, axis=-1, keepdims=True) * gamma
  n = np.asarray(jnp.asarray(n, dtype), np.float64)
  frames = np.concatenate([past, n / (1 + np.exp(-n))], 1)
  return np.concatenate([frames[:, i : i + x.shape[1]] for i in range(3)], -1), frames[:, -2:]


def check(got, want, dtype):
  for a, w in zip(got, want, strict=True):
    a = np.asarray(a, np.float64)
    assert a.shape == w.shape
    # One rounding of the result; where a norm lies near the middle of two bfloat16, it may round the other way.
    eps = float(jnp.finfo(dtype).eps)
    assert np.linalg.norm(a - w) <= eps * np.linalg.norm(w)
    np.testing.assert_allclose(a, w, rtol=3 * eps, atol=3 * eps)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("f", [1, 2, 4])
def test_xla_equals_numpy(f, dtype):
  x = draw(2, f, 3, 5, 24, dtype)
  check(normed_frames(*x, implementation="xla"), oracle(*x), dtype)


@pytest.mark.parametrize(("b", "f", "c"), [(1, 1, 96), (2, 3, 64)])
def test_the_kernel_in_the_interpreter(b, f, c):
  x = draw(b, f, 8, 16, c, jnp.bfloat16)
  try:
    check(
      mosaic_sm90.normed_frames(*x, interpret=plgpu.InterpretGPUParams(detect_races=True)), oracle(*x), jnp.bfloat16
    )
    assert not interpreter.get_races().races_found
  finally:
    interpreter.reset_gpu_interpret_mode_state()


@pytest.mark.parametrize(("h", "w", "c"), [(480, 832, 96), (240, 416, 192), (240, 416, 256)])
def test_lowers_for_cuda(h, w, c):
  of = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
  x = of(1, 4, h, w, c), of(1, 2, h, w, c), of(c, dtype=jnp.float32)
  assert (
    jax.jit(mosaic_sm90.normed_frames).trace(*x).lower(lowering_platforms=("cuda",)).as_text().count("@mosaic_gpu_v2")
    == 1
  )


@pytest.mark.gpu
@pytest.mark.parametrize(("h", "w", "c"), [(48, 832, 96), (24, 416, 192), (24, 208, 64)])
def test_the_kernel_on_a_gpu(h, w, c):
  x = draw(1, 4, h, w, c, jnp.bfloat16)
  run = jax.jit(lambda *x: normed_frames(*x, implementation="mosaic_sm90"))
  got = run(*x)
  with jax.default_device(jax.devices("cpu")[0]):
    check(got, oracle(*x), jnp.bfloat16)
  for _ in range(20):
    for a, again in zip(got, run(*x), strict=True):
      np.testing.assert_array_equal(np.asarray(a), np.asarray(again))


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (lambda x, past, g: (x, past[:, :1], g), "past: .*two frames like x's"),
    (lambda x, past, g: (x, past.astype(jnp.bfloat16), g), "past: bfloat16"),
    (lambda x, past, g: (x, past, g[:3]), r"gamma: shape \(3,\); want \(24,\)"),
  ],
)
def test_wrong_arguments(change, line):
  with pytest.raises(ValueError, match=line):
    normed_frames(*change(*draw(1, 2, 3, 5, 24, jnp.float32)))


def test_what_the_kernel_cannot_do():
  x = draw(1, 2, 3, 5, 24, jnp.float32)
  with pytest.raises(NotImplementedError, match="implementation: 'triton'"):
    normed_frames(*x, implementation="triton")
  if jax.default_backend() != "gpu":
    with pytest.raises(NotImplementedError, match="wants a Hopper GPU"):
      normed_frames(*x, implementation="mosaic_sm90")
