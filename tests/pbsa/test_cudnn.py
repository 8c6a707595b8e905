"""The "cudnn" implementation's own work, gathering and merging lists, with XLA's attention in cuDNN's place on a CPU."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pbsa import api, cudnn, pbsa
from tests.pbsa.oracle import oracle, random_lists

attend = cudnn._attend


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


SHORT = [(range(1, 6, 2), 8), (range(0, 6), 47), (range(3, 4), 48)]  # some, all, and as long as the others


@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize("short", SHORT)
def test_lists_with_short_blocks(prefix, short):
  q, k, v, pk, ids, counts = draw(prefix + 20)
  counts[0, 0, 0] = 0
  more = dict(prefix_k=pk, kv_valid=48, kv_short=short, scale=0.25)
  call = jax.jit(lambda p: cudnn.pbsa_cudnn(q, k, v, ids, counts, p, **more))
  want = oracle(q, k, v, ids, counts, prefix_blocks=prefix, **more)[0]
  np.testing.assert_allclose(call(jnp.int32(prefix)), want, atol=2e-5)


@pytest.mark.parametrize("prefix", [0, 1, 5, 6])
@pytest.mark.parametrize("short", [None, (range(1, 6, 3), 8)])
def test_prefix_alone(prefix, short):
  q, k, v, *_ = draw(7)
  ids, counts = np.zeros((2, 2, 2, 0), np.int32), np.zeros((2, 2, 2), np.int32)
  out = jax.jit(lambda p: cudnn.pbsa_cudnn(q, k, v, ids, counts, p, None, 60, short, 0.25))(jnp.int32(prefix))
  want = oracle(q, k, v, ids, counts, prefix_blocks=prefix, kv_valid=60, kv_short=short, scale=0.25)[0]
  np.testing.assert_allclose(out, want, atol=2e-5)


@pytest.mark.parametrize("short", [None, *SHORT])
def test_gradients_equal_those_of_xla(short):
  q, k, v, pk, ids, counts = draw(9)
  g = np.random.default_rng(1).normal(size=q.shape).astype(np.float32)
  more = dict(prefix_blocks=1, kv_valid=48, kv_short=short)
  xla = lambda q, k, v, pk: pbsa(q, k, v, ids, counts, prefix_k=pk, implementation="xla", **more)
  ours = lambda q, k, v, pk: cudnn.pbsa_cudnn(q, k, v, ids, counts, prefix_k=pk, scale=0.25, **more)
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


def test_a_layer_of_a_stack(monkeypatch):
  """As sampling calls it, on a GPU that has no kernel of ours."""
  gpu = types.SimpleNamespace(platform="gpu", compute_capability="8.0", device_kind="NVIDIA A100")
  monkeypatch.setattr(api, "current_device", lambda: gpu)
  q, k, v, pk, ids, counts = (jnp.asarray(x) for x in draw(5))
  half = lambda *x: [a.astype(jnp.bfloat16) for a in x]
  stack = lambda x: jnp.stack([x * 0, x])
  more = dict(prefix_blocks=jnp.int32(1), kv_valid=60, kv_short=(range(1, 6, 3), 8))
  q, k, v, pk = half(q, k, v, pk)
  call = jax.jit(lambda layer: pbsa(q, stack(k), stack(v), ids, counts, prefix_k=stack(pk), layer=layer, **more))
  asked = []
  monkeypatch.setattr(cudnn, "_attend", lambda *x: asked.append(1) or attend(*x))
  want = oracle(
    *(np.asarray(x, np.float64) for x in (q, k, v)), ids, counts, prefix_k=np.asarray(pk, np.float64), **more
  )
  error = np.linalg.norm(np.asarray(call(jnp.int32(1)), np.float64) - want[0]) / np.linalg.norm(want[0])
  assert asked and error <= 3e-3  # as the kernels' bound
  with pytest.raises(NotImplementedError, match="layer: the stacked form is forward only"):
    jax.grad(lambda k: pbsa(q, k, stack(v), ids, counts, prefix_k=stack(pk), layer=1, **more).sum())(stack(k))


def test_what_it_cannot_do_is_said():
  q, k, v, _, ids, counts = draw(3)
  half = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  with pytest.raises(NotImplementedError, match="prefix_blocks: beside lists cudnn wants an int, or prefix_k"):
    pbsa(*half, ids, counts, prefix_blocks=jnp.int32(1), implementation="cudnn")
  with pytest.raises(NotImplementedError, match="kv_grad_range, return_lse: not in cudnn"):
    pbsa(*half, ids, counts, return_lse=True, implementation="cudnn")
  with pytest.raises(NotImplementedError, match="q: dtype float32"):
    pbsa(q, k, v, ids, counts, implementation="cudnn")
