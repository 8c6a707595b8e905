"""Tier A: the "xla" implementation against the fp64 oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.test_util import check_grads

from pallas_kernels.pbsa import pbsa, validate_lists
from pallas_kernels.pbsa.cudnn import take_blocks
from tests.pbsa.oracle import oracle, random_lists, slots_of


def make(seed, b=1, n=2, q=2, blocks=6, h=16, kmax=3, prefix=1):
  rng = np.random.default_rng(seed)
  arrays = [rng.standard_normal(s).astype(np.float32) for s in [(b, q * 128, n, h)] + [(b, blocks * 64, n, h)] * 2]
  return *arrays, *random_lists(rng, b, n, q, kmax, prefix, blocks)


@settings(max_examples=15, deadline=None)
@given(
  seed=st.integers(0, 999),
  b=st.integers(1, 2),
  q=st.integers(1, 2),
  blocks=st.sampled_from([4, 11]),
  kmax=st.sampled_from([1, 9]),
  prefix=st.sampled_from([0, 3]),
  kv_valid=st.sampled_from([48, 60, 64]),
  kv_short=st.sampled_from([None, (range(2, 4), 1), (range(1, 11, 4), 40)]),
  traced=st.booleans(),
)
def test_matches_oracle(seed, b, q, blocks, kmax, prefix, kv_valid, kv_short, traced):
  qq, k, v, ids, counts = make(seed, b, 2, q, blocks, 16, kmax, prefix)
  validate_lists(ids, counts, blocks * 64)
  p = jnp.int32(prefix) if traced else prefix
  kv_short = kv_short and (range(blocks)[kv_short[0].start : kv_short[0].stop : kv_short[0].step], kv_short[1])
  out, lse = pbsa(qq, k, v, ids, counts, prefix_blocks=p, kv_valid=kv_valid, kv_short=kv_short, return_lse=True)
  want, want_lse = oracle(qq, k, v, ids, counts, prefix_blocks=prefix, kv_valid=kv_valid, kv_short=kv_short)
  # fp32 dot products of 16 terms and softmax sums: a few hundred ulp at worst.
  np.testing.assert_allclose(out, want, atol=2e-5)
  np.testing.assert_allclose(lse, want_lse, atol=2e-5)


def test_prefix_k_replaces_only_the_prefix_keys():
  q, k, v, ids, counts = make(3, prefix=2)
  pk = np.random.default_rng(9).standard_normal((1, 128, 2, 16)).astype(np.float32)
  out = pbsa(q, k, v, ids, counts, prefix_blocks=2, prefix_k=pk)
  np.testing.assert_allclose(out, oracle(q, k, v, ids, counts, prefix_blocks=2, prefix_k=pk)[0], atol=2e-5)


def test_all_blocks_equal_dense():
  q, k, v, *_ = make(4)
  ids = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (1, 2, 2, 6))
  out = pbsa(q, k, v, ids, jnp.full((1, 2, 2), 6, jnp.int32))
  np.testing.assert_allclose(out, jax.nn.dot_product_attention(q, k, v), atol=2e-5)


def test_disjoint_lists_merge_by_lse():
  q, k, v, *_ = make(5)
  ids = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32), (1, 2, 2, 6))
  three = jnp.full((1, 2, 2), 3, jnp.int32)
  o1, l1 = pbsa(q, k, v, ids[..., :3], three, return_lse=True)
  o2, l2 = pbsa(q, k, v, ids[..., 3:], three, return_lse=True)
  l = jnp.logaddexp(l1, l2)
  w = lambda x: jnp.exp(x - l).transpose(0, 2, 1)[..., None]
  np.testing.assert_allclose(o1 * w(l1) + o2 * w(l2), pbsa(q, k, v, ids, 2 * three), atol=2e-5)


def test_reads_nothing_gives_zeros_and_finite_gradients():
  q, k, v, ids, counts = make(6, prefix=0)
  f = lambda q, k, v: pbsa(q, k, v, ids, 0 * counts, return_lse=True)
  out, lse = f(q, k, v)
  assert not np.any(out) and np.all(np.isneginf(lse))
  for g in jax.grad(lambda *a: f(*a)[0].sum(), (0, 1, 2))(q, k, v):
    assert not np.any(g)


def test_unread_blocks_may_hold_nan():
  q, k, v, ids, counts = make(7, prefix=0, blocks=6)
  ids = np.minimum(ids, 4)
  ids[..., 0], counts[:] = 1, 1
  k[:, 320:], v[:, 320:] = np.nan, np.nan
  k[:, 60:64], v[:, 124:128] = np.nan, np.nan
  k[:, 124:128] = np.nan
  out = pbsa(q, k, v, ids, counts, kv_valid=60)
  assert np.isfinite(out).all()


def test_gradients():
  q, k, v, ids, counts = make(8, n=1, q=1, blocks=3, h=4, kmax=2, prefix=1)
  counts[:] = 1
  f = lambda q, k, v: pbsa(q, k, v, ids, counts, prefix_blocks=1, kv_valid=60, return_lse=True)
  check_grads(f, (q, k, v), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_short_blocks():
  """In the prefix, in its own keys and in lists: what lies behind their tokens is not read, and gets no gradient."""
  q, k, v, ids, counts = make(14, h=4, kmax=2, prefix=3)
  ids[:], counts[:], short = [3, 4], 2, (range(1, 6, 3), 7)  # blocks 1 and 4
  pk = np.random.default_rng(15).standard_normal((1, 192, 2, 4)).astype(np.float32)
  more = dict(prefix_blocks=3, kv_valid=60, kv_short=short)
  f = jax.jit(lambda q, k, v, pk: pbsa(q, k, v, ids, counts, prefix_k=pk, return_lse=True, **more))
  want = oracle(q, k, v, ids, counts, prefix_k=pk, **more)
  poisoned = []
  for x in (k, v, pk):
    hole = np.ones(x.shape[1], bool)
    hole[slots_of(range(x.shape[1] // 64), 60, short)] = False
    poisoned.append(np.where(hole[:, None, None], 1e30, x).astype(np.float32))
  for a, w in zip(f(q, *poisoned), want, strict=True):
    np.testing.assert_allclose(a, w, atol=2e-5)
  gradients = jax.grad(lambda *a: sum((y**2).sum() for y in f(q, *a)), (0, 1, 2))
  for a, b, x in zip(gradients(*poisoned), gradients(k, v, pk), poisoned, strict=True):
    np.testing.assert_array_equal(a, b)
    assert not np.any(np.asarray(a)[x == 1e30])
  assert np.any(np.asarray(gradients(k, v, pk)[2])[:, 64:71])
  check_grads(f, (q, k, v, pk), order=1, modes=["rev"], atol=1e-2, rtol=1e-2)


def test_kv_grad_range():
  q, k, v, ids, counts = make(10)

  def f(k, v, r):
    return (pbsa(q, k, v, ids, counts, prefix_blocks=1, kv_grad_range=r) ** 2).sum()

  full = jax.grad(f, (0, 1))(k, v, None)
  part = jax.grad(f, (0, 1))(k, v, (2, 3))
  for a, b in zip(full, part, strict=True):
    np.testing.assert_allclose(b[:, 128:256], a[:, 128:256], rtol=1e-6)
    assert not np.any(b[:, :128]) and not np.any(b[:, 256:])


def test_stacked_layer_is_forward_only():
  q, k, v, ids, counts = make(11)
  ks, vs = np.stack([v, k]), np.stack([k, v])
  out = pbsa(q, ks, vs, ids, counts, layer=jnp.int32(1))
  np.testing.assert_array_equal(out, pbsa(q, k, v, ids, counts))
  own = v[:, :64]
  out = pbsa(q, ks, vs, ids, counts, prefix_blocks=1, prefix_k=np.stack([0 * own, own]), layer=jnp.int32(1))
  np.testing.assert_array_equal(out, pbsa(q, k, v, ids, counts, prefix_blocks=1, prefix_k=own))
  with pytest.raises(NotImplementedError, match="layer"):
    jax.grad(lambda k: pbsa(q, k, vs, ids, counts, layer=jnp.int32(1)).sum())(ks)


@pytest.mark.parametrize(
  "change, match",
  [
    (dict(q=lambda x: x[:, :100]), "q: T = 100"),
    (dict(k=lambda x: x[:, :100]), "v: shape"),
    (dict(v=lambda x: x.astype(jnp.bfloat16)), "v: dtype bfloat16"),
    (dict(block_ids=lambda x: x[..., 0]), "block_ids: shape"),
    (dict(block_counts=lambda x: x.astype(np.int16)), "block_counts: dtype int16"),
  ],
)
def test_wrong_arguments_are_named(change, match):
  names = ("q", "k", "v", "block_ids", "block_counts")
  args = {name: change.get(name, lambda x: x)(jnp.asarray(x)) for name, x in zip(names, make(0), strict=True)}
  with pytest.raises(ValueError, match=match):
    pbsa(**args)


def test_validate_lists_names_the_first_bad_tile():
  *_, ids, counts = make(12, kmax=3)
  counts[:], ids[:] = 2, [1, 3, 4]
  ids[0, 1, 1] = [3, 1, 4]
  with pytest.raises(ValueError, match=r"ascending at \(batch, head, tile\) = \(0, 1, 1\)"):
    validate_lists(ids, counts, 384)


def test_block_gather_of_cudnn_has_the_gradient_of_indexing():
  rng = np.random.default_rng(13)
  x, g = (rng.normal(size=s).astype(np.float32) for s in ((2, 3, 5, 8), (2, 3, 12, 8)))
  ids = jnp.asarray(rng.integers(0, 5, (2, 3, 12)), jnp.int32)
  want = np.zeros_like(x)
  for b, n, r in np.ndindex(ids.shape):
    want[b, n, ids[b, n, r]] += g[b, n, r]
  out, vjp = jax.vjp(lambda x: take_blocks(x, ids), x)
  np.testing.assert_array_equal(out[1, 2, 7], x[1, 2, ids[1, 2, 7]])
  np.testing.assert_allclose(vjp(jnp.asarray(g))[0], want, rtol=1e-5, atol=1e-6)  # 12 terms in float32
