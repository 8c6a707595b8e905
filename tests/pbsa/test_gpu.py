"""On a GPU (`pytest -m gpu`): the "cudnn" implementation against "xla" in float32, forward and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pbsa import pbsa


@pytest.mark.gpu
@pytest.mark.parametrize("scale", [1.0, 4.0])
def test_cudnn_equals_xla(scale):
  rng = np.random.default_rng(0)
  b, tiles, n, h, blocks, kmax, valid = 2, 6, 3, 64, 40, 20, 48
  draw = lambda *s: jnp.asarray(rng.normal(size=s) * scale, jnp.bfloat16)
  q, k, v = draw(b, tiles * 128, n, h), draw(b, blocks * 64, n, h), draw(b, blocks * 64, n, h)
  ids = np.stack([np.sort(rng.permutation(blocks)[:kmax]) for _ in range(b * n * tiles)]).reshape(b, n, tiles, kmax)
  counts = jnp.asarray(rng.integers(1, kmax + 1, (b, n, tiles)), jnp.int32)
  g = jnp.asarray(rng.normal(size=q.shape), jnp.float32)

  def run(implementation, dtype):
    def f(q, k, v):
      out = pbsa(q, k, v, jnp.asarray(ids, jnp.int32), counts, kv_valid=valid, implementation=implementation)
      return (out.astype(jnp.float32) * g).sum(), out

    grads, out = jax.jit(jax.grad(f, (0, 1, 2), has_aux=True))(*(x.astype(dtype) for x in (q, k, v)))
    return [np.asarray(x, np.float64) for x in (out, *grads)]

  with jax.default_matmul_precision("highest"):
    want = run("xla", jnp.float32)
  got = run("cudnn", jnp.bfloat16)
  errors = [np.linalg.norm(a - w) / np.linalg.norm(w) for a, w in zip(got, want, strict=True)]
  print(errors)
  assert errors[0] <= 5e-3 and max(errors[1:]) <= 2e-2  # bf16 output, bf16 probabilities and delta in backward
