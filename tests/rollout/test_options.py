"""The sampler's options: lists found once a chunk, and a commit without a pass of its own, against what they stand for."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.pbsa import BLOCK
from sfjax import attention, rollout
from sfjax import memory as kv
from sfjax.flow import SamplerConfig, few_step, to_x0
from sfjax.routing import pool_keys
from tests.rollout.toy import FAR, KEY, MEMORY, MODEL, distance, same_memory

STEPS, CHUNKS = 3, 3


def few(**options):
  return SamplerConfig("few_step", steps=STEPS, **options)


def start(params, text, cfg=MEMORY, null=None):
  return rollout.start(MODEL, cfg, params, text[:2], null_text=null)


def play(sampler, params, memory, cfg=MEMORY, in_place=True, beginning=None):
  """Latents [n,B,F,h,w,C] of three chunks and the memory after them: the window is full then, and P holds blocks."""
  chunk = jax.jit(
    lambda m: rollout.rollout_chunk(
      MODEL, cfg, sampler, params, m, KEY, jnp.arange(2), in_place=in_place, beginning=beginning
    )
  )
  made = []
  for _ in range(CHUNKS):
    x, memory = chunk(memory)
    made.append(x)
  return np.stack(made), memory


@pytest.fixture(scope="module")
def played(params, text):
  """A sampler's latents and last memory, and what pbsa was asked to read in each pass [L,B,N,Q,K], -1 past the end."""
  told, pbsa = [], attention.pbsa

  def tell(ids, counts):
    told.append(np.where(np.arange(ids.shape[-1]) < np.asarray(counts)[..., None], ids, -1))

  def spy(q, k, v, ids, counts, **how):
    jax.debug.callback(tell, ids, counts, ordered=True)
    return pbsa(q, k, v, ids, counts, **how)

  @functools.cache
  def run(sampler):
    null = None if sampler.guidance == 1 else jnp.zeros_like(text[:1])
    with pytest.MonkeyPatch.context() as m:
      m.setattr(attention, "pbsa", spy)
      made, memory = play(sampler, params, start(params, text, null=null))
    jax.effects_barrier()
    passes = [np.stack(told[i : i + MODEL.layers]) for i in range(0, len(told), MODEL.layers)]
    told.clear()
    return made, memory, passes

  return run


@pytest.mark.parametrize("routing", ["step", "chunk"])
def test_lists_of_the_first_step_serve_the_chunk(played, routing):
  """And nothing else: the commit finds its own, and so does the next chunk."""
  sampler = few(routing=routing)
  _, _, passes = played(sampler)
  assert len(passes) == CHUNKS * sampler.passes == CHUNKS * (STEPS + 1)
  first, *later, commit = passes[-sampler.passes :]
  same = [np.array_equal(first, x) for x in later]
  assert all(same) if routing == "chunk" else not any(same)
  assert not np.array_equal(first, commit) and not np.array_equal(first, passes[-2 * sampler.passes])


def test_where_all_is_read_once_a_chunk_is_no_change(params, text, monkeypatch):
  """The same bits as with every step's own lists, in a program that has, as this one, each step for itself."""
  cfg, two = dataclasses.replace(MEMORY, top_k=1.0), SamplerConfig("few_step", steps=2)
  once, memory_once = play(dataclasses.replace(two, routing="chunk"), params, start(params, text, cfg), cfg)
  with monkeypatch.context() as m:
    m.setattr(rollout, "_phases", lambda sampler: [((False, False), range(i, i + 1)) for i in range(2)])
    usual, memory = play(two, params, start(params, text, cfg), cfg)
  np.testing.assert_array_equal(once, usual)
  jax.tree.map(np.testing.assert_array_equal, memory_once, memory)


def by_hand(sampler, params, memory):
  """A chunk of which the last step's keys, values and scores are kept, step by step; guidance as rows side by side."""
  memory = kv.per_layer(kv.begin_chunk, MODEL, MEMORY, memory)
  prefix, keys = (
    kv.per_layer(kv.persistent_keys, MODEL, MEMORY, memory),
    rollout.chunk_keys(KEY, jnp.arange(2), memory.chunk[0]),
  )
  x, lists = rollout._first_noise(MODEL, keys), None
  twice = lambda x: jnp.concatenate([x] * (memory.k.shape[1] // 2))
  for i, sigma in enumerate(sampler.sigmas[:-1]):
    sigma = jnp.full(x.shape[:2], sigma)
    out, memory, (read, _) = rollout._forward(
      MODEL,
      MEMORY,
      params,
      memory,
      twice(x),
      twice(sigma),
      False,
      in_place=True,
      prefix_k=prefix,
      keep=True,
      lists=lists,
    )
    if sampler.routing == "chunk":
      lists = lists or (read.ids, read.counts)
    if sampler.guidance != 1:
      out = out[2:] + sampler.guidance * (out[:2] - out[2:])
    x0, x = to_x0(MODEL, out, x, sigma), few_step(MODEL, sampler, x, out, i, keys)
  first, layout = kv.ring_block(MODEL, MEMORY, memory.chunk[0]), MODEL.layout
  own = jax.lax.dynamic_slice_in_dim(memory.k, first * BLOCK, layout.slots, 2)
  pooled = jax.lax.dynamic_update_slice_in_dim(memory.pooled, pool_keys(own, layout), first, 2)
  memory = memory.replace(pooled=pooled)
  score = jax.vmap(lambda m, q: kv.resident_scores(MODEL, MEMORY, m, None, None, q))(memory, read.queries)
  order = kv._resident(MODEL, MEMORY, memory.chunk[0])
  return x0, memory.replace(score=memory.score.at[..., order].set(score), chunk=memory.chunk + 1)


@pytest.mark.parametrize(("routing", "guidance"), [("step", 1.0), ("chunk", 3.0)])
def test_what_the_last_step_leaves_is_the_commit(played, params, text, routing, guidance):
  sampler = few(routing=routing, commit="last", guidance=guidance)
  got, memory, passes = played(sampler)
  assert len(passes) == CHUNKS * STEPS == CHUNKS * sampler.passes
  null = None if guidance == 1 else jnp.zeros_like(text[:1])
  want, hand = [], start(params, text, null=null)
  step = jax.jit(lambda m: by_hand(sampler, params, m))
  for _ in range(CHUNKS):
    x, hand = step(hand)
    want.append(x)
  assert distance(got, want) <= 1e-5  # another program, the same sums
  same_memory(memory, hand)


def test_a_kept_last_step_is_not_a_clean_one(played, params, text):
  (clean, after, _), (last, after_last, _) = (played(few(commit=c)) for c in ("clean", "last"))
  assert distance(last[0], clean[0]) <= 1e-5 and distance(last[1], clean[1]) > FAR
  assert distance(after_last.k, after.k) > FAR
  _, beside = play(few(commit="last"), params, start(params, text), in_place=False)
  np.testing.assert_array_equal(beside.origin, after_last.origin)
  assert distance(beside.k, after_last.k) <= 1e-5 and distance(beside.v, after_last.v) <= 1e-5


@pytest.mark.parametrize(("guidance", "in_place"), [(1.0, False), (3.0, True)])
def test_a_real_chunk_is_committed_clean(params, text, guidance, in_place):
  """Of two videos the first is real: its memory is that of `append_chunk`, the other's as without a beginning."""
  sampler, before = few(commit="last", guidance=guidance), start(params, text, null=None if guidance == 1 else text[2:])
  shape = (2, CHUNKS, 3, *MODEL.latent_size, MODEL.latent_channels)
  latents = jax.random.normal(jax.random.key(8), shape)
  beginning = rollout.Beginning(latents, jnp.asarray([[True] * CHUNKS, [False] * CHUNKS]))
  made, memory = play(sampler, params, before, in_place=in_place, beginning=beginning)
  usual, without = play(sampler, params, before, in_place=in_place)
  append, given = jax.jit(lambda m, x0: rollout.append_chunk(MODEL, MEMORY, params, m, x0, in_place)), before
  for t in range(CHUNKS):
    given = append(given, latents[:, t])
  np.testing.assert_array_equal(made[:, 0], latents[0])
  assert distance(made[:, 1], usual[:, 1]) <= 1e-5
  for i, want in enumerate((given, without)):  # a video's rows: of its prompt, and of the null prompt
    same_memory(*(jax.tree.map(lambda x: x[:, i::2] if x.ndim > 2 else x, m) for m in (memory, want)))  # noqa: B023
  assert distance(memory.k[:, ::2], without.k[:, ::2]) > FAR
