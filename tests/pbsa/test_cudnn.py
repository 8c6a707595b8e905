"""The "cudnn" implementation's own work, gathering and merging lists, with XLA's attention in cuDNN's place on a CPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pbsa import cudnn, pbsa
from tests.pbsa.oracle import oracle, random_lists


@pytest.fixture(autouse=True)
def without_cudnn(monkeypatch):
  monkeypatch.setattr(cudnn, "_FUSED", "xla")


def draw(seed, kmax=3, blocks=6, prefix=2):
  rng = np.random.default_rng(seed)
  q, k, v, pk = (
    rng.normal(size=(2, s, 2, 16)).astype(np.float32) for s in (256, blocks * 64, blocks * 64, prefix * 64)
  )
  return q, k, v, pk, *random_lists(rng, 2, 2, 2, kmax, prefix, blocks)


@pytest.mark.parametrize("prefix", [0, 1, 2])
@pytest.mark.parametrize("form", ["int", "traced", "own keys"])
def test_prefix_and_lists(prefix, form):
  q, k, v, pk, ids, counts = draw(prefix)
  own = None if form == "int" else k[:, : pk.shape[1]] if form == "traced" else pk
  blocks = prefix if form == "int" else jnp.int32(prefix)
  call = jax.jit(
    lambda p: cudnn.pbsa_cudnn(q, k, v, ids, counts, p, own, 48, None, 0.25),
    static_argnums=() if own is not None else 0,
  )
  want = oracle(q, k, v, ids, counts, prefix_blocks=prefix, prefix_k=own, kv_valid=48, scale=0.25)[0]
  np.testing.assert_allclose(call(blocks), want, atol=2e-5)  # as in test_xla: a few hundred ulp at worst


@pytest.mark.parametrize("prefix", [0, 1, 5, 6])
@pytest.mark.parametrize("short", [None, (range(1, 6, 3), 8)])
def test_prefix_alone(prefix, short):
  q, k, v, *_ = draw(7)
  ids, counts = np.zeros((2, 2, 2, 0), np.int32), np.zeros((2, 2, 2), np.int32)
  out = jax.jit(lambda p: cudnn.pbsa_cudnn(q, k, v, ids, counts, p, None, 60, short, 0.25))(jnp.int32(prefix))
  want = oracle(q, k, v, ids, counts, prefix_blocks=prefix, kv_valid=60, kv_short=short, scale=0.25)[0]
  np.testing.assert_allclose(out, want, atol=2e-5)


def test_gradients_equal_those_of_xla():
  q, k, v, pk, ids, counts = draw(9)
  g = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
  xla = lambda q, k, v, pk: pbsa(q, k, v, ids, counts, prefix_blocks=1, prefix_k=pk, kv_valid=48, implementation="xla")
  ours = lambda q, k, v, pk: cudnn.pbsa_cudnn(q, k, v, ids, counts, 1, pk, 48, None, 0.25)
  gradient = lambda f: jax.jit(jax.grad(lambda *a: (f(*a) * g).sum(), (0, 1, 2, 3)))(q, k, v, pk)
  want, got = gradient(xla), gradient(ours)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_allclose(a, b, atol=5e-5)


def test_gradients_of_a_prefix_with_short_blocks():
  q, k, v, pk, ids, counts = draw(11)
  ids, counts, short = ids[..., :0], 0 * counts, (range(1, 2), 8)
  g = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
  more = dict(prefix_blocks=2, kv_valid=64, kv_short=short, implementation="xla")
  xla = lambda q, v, pk: pbsa(q, k, v, ids, counts, prefix_k=pk, **more)
  ours = lambda q, v, pk: cudnn.pbsa_cudnn(q, k, v, ids, counts, 2, pk, 64, short, 0.25)
  gradient = lambda f: jax.jit(jax.grad(lambda *a: (f(*a) * g).sum(), (0, 1, 2)))(q, v, pk)
  for a, b in zip(gradient(ours), gradient(xla), strict=True):
    np.testing.assert_allclose(a, b, atol=5e-5)


def test_what_it_cannot_do_is_said():
  q, k, v, _, ids, counts = draw(3)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  with pytest.raises(NotImplementedError, match="prefix_blocks: beside lists cudnn wants an int, or prefix_k"):
    pbsa(*half, ids, counts, prefix_blocks=jnp.int32(1), implementation="cudnn")
  with pytest.raises(NotImplementedError, match="kv_short: beside lists not in cudnn"):
    pbsa(*half, ids, counts, kv_short=(range(2), 8), implementation="cudnn")
  with pytest.raises(NotImplementedError, match="q: dtype float32"):
    pbsa(q, k, v, ids, counts, implementation="cudnn")
