"""The rollout: snapshots and forks, noise that knows no batch, known frames, guidance, one scan, gradients."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import memory as kv
from sfjax import rollout
from sfjax.flow import SamplerConfig
from sfjax.routing import MemoryConfig, pool_keys
from tests.rollout.toy import FAR, KEY, MEMORY, MODEL, distance

FEW = SamplerConfig("few_step", steps=2)


@pytest.fixture(scope="module")
def programs():
  return rollout.Compiled(MODEL, MEMORY, FEW)


@pytest.fixture(scope="module")
def strong():
  return rollout.Compiled(MODEL, MEMORY, dataclasses.replace(FEW, guidance=3.0))


def play(programs, params, memory, key, samples, chunks):
  """`chunks` chunks, [B,n,F,h,w,C], and the memory after them; the memory given is consumed."""
  out = []
  for _ in range(chunks):
    x, memory = programs.chunk(params, memory, key, jnp.asarray(samples))
    out.append(x)
  return np.stack(out, 1), memory


def snapshot(memory):
  return jax.tree.map(jnp.copy, memory)


def test_a_snapshot_forks_and_rolls_back(programs, params, text):
  _, memory = play(programs, params, programs.start(params, text[:2], 0, None), KEY, [0, 1], 3)
  saved = snapshot(memory)
  on, after = play(programs, params, memory, KEY, [0, 1], 3)
  again, after_again = play(programs, params, snapshot(saved), KEY, [0, 1], 3)
  np.testing.assert_array_equal(on, again)
  jax.tree.map(np.testing.assert_array_equal, after, after_again)
  # A fork shares its past: P and the chunk before it are the same to the bit, its own chunk is not.
  one, after_one = play(programs, params, snapshot(saved), KEY, [0, 1], 1)
  other, after_other = play(programs, params, snapshot(saved), jax.random.key(8), [0, 1], 1)
  np.testing.assert_array_equal(one[:, 0], on[:, 0])
  assert distance(other, one) > FAR
  own = MEMORY.persistent + (3 % MEMORY.window) * MODEL.layout.blocks  # first block of chunk 3's ring slot
  own = np.arange(own * 64, own * 64 + MODEL.layout.slots)
  for a, b in ((after_one.k, after_other.k), (after_one.v, after_other.v)):
    np.testing.assert_array_equal(np.delete(a, own, 2), np.delete(b, own, 2))
    assert np.count_nonzero(np.delete(a, own, 2)) and distance(a[:, :, own], b[:, :, own]) > FAR


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_video_does_not_depend_on_its_batch(params, text, programs, strong, guidance):
  programs, null = (programs, None) if guidance == 1 else (strong, jnp.zeros_like(text[:1]))
  batch, _ = play(programs, params, programs.start(params, text[:2], 0, null), KEY, [5, 0], 5)
  alone, _ = play(programs, params, programs.start(params, text[1:2], 0, null), KEY, [0], 5)
  assert distance(batch[1:], alone) <= 1e-5  # design.md section 7
  assert distance(batch[1], batch[0]) > FAR


def test_noise_is_of_run_sample_and_chunk():
  draw = lambda key, sample, chunk: jax.random.key_data(rollout.chunk_keys(key, jnp.asarray(sample), jnp.int32(chunk)))
  whole = draw(KEY, [4, 2, 7], 3)
  np.testing.assert_array_equal(whole[1], draw(KEY, [2], 3)[0])
  others = [*whole, draw(KEY, [2], 4)[0], draw(KEY, [3], 2)[0], draw(jax.random.key(8), [2], 3)[0]]
  assert len({np.asarray(k).tobytes() for k in others}) == 6


def test_known_frames_come_back_and_condition_the_rest(programs, params, text):
  rng = np.random.default_rng(3)
  known = rng.normal(size=(2, 3, *MODEL.latent_size, MODEL.latent_channels)).astype(np.float32)
  start = lambda: programs.start(params, text[:2], 0, None)
  chunk = lambda frames: programs.chunk(params, start(), KEY, jnp.arange(2), known, jnp.asarray(frames))
  free, _ = chunk([False] * 3)
  assert distance(free, play(programs, params, start(), KEY, [0, 1], 1)[0][:, 0]) <= 1e-5
  first, _ = chunk([True, False, False])
  np.testing.assert_array_equal(first[:, 0], known[:, 0])
  assert distance(first[:, 1:], free[:, 1:]) > FAR
  # A chunk of which everything is known is a chunk that is appended.
  whole, memory = chunk([True] * 3)
  np.testing.assert_array_equal(whole, known)
  appended = programs.append(params, start(), jnp.asarray(known))
  for name in ("k", "v", "score"):
    assert distance(getattr(memory, name), getattr(appended, name)) <= 1e-5, name  # another program, the same sums
  np.testing.assert_array_equal(memory.origin, appended.origin)


def test_guidance_of_one_is_the_prompt_alone(programs, strong, params, text):
  barely = float(np.nextafter(1, 2))  # one in float32, yet it runs both branches
  guided = rollout.Compiled(MODEL, MEMORY, dataclasses.replace(FEW, guidance=barely))
  null = jnp.zeros_like(text[:1])
  alone, _ = play(programs, params, programs.start(params, text[:2], 0, None), KEY, [0, 1], 3)
  memory = guided.start(params, text[:2], 0, null)
  assert memory.k.shape[1] == 4
  both, memory = play(guided, params, memory, KEY, [0, 1], 3)
  assert distance(both, alone) <= 1e-5  # u + 1 (c - u) is c but for two roundings
  assert distance(memory.k[:, 2:], memory.k[:, :2]) > FAR  # the null rows remember with their own prompt
  start = strong.start(params, text[:2], 0, text[:1])  # the second video's null prompt is the first one's prompt
  moved, _ = play(strong, params, start, KEY, [0, 1], 3)
  assert distance(moved[:1], alone[:1]) <= 1e-5  # where the null prompt is the prompt, no weight matters
  assert distance(moved[1:], alone[1:]) > FAR


def test_one_scan_equals_chunk_by_chunk(programs, params, text):
  by_hand, memory = play(programs, params, programs.start(params, text[:2], 0, None), KEY, [0, 1], 4)
  scan = jax.jit(lambda m: rollout.rollout(MODEL, MEMORY, FEW, params, m, KEY, jnp.arange(2), 4))
  at_once, memory_at_once = scan(programs.start(params, text[:2], 0, None))
  assert at_once.shape == (2, 4, 3, *MODEL.latent_size, MODEL.latent_channels)
  assert distance(at_once, by_hand) <= 1e-5  # another program, the same sums
  np.testing.assert_array_equal(memory_at_once.origin, memory.origin)


def test_another_prompt_from_the_next_chunk_on(programs, params, text):
  _, memory = play(programs, params, programs.start(params, text[:2], 0, None), KEY, [0, 1], 1)
  prompts = [programs.prompt(params, rows, None) for rows in (text[1:], text[:2])]
  changed, same = (snapshot(memory).with_text(x) for x in prompts)
  np.testing.assert_array_equal(changed.k, memory.k)
  kept, changed, same = (play(programs, params, m, KEY, [0, 1], 1)[0] for m in (memory, changed, same))
  assert distance(changed, kept) > FAR and distance(same, kept) <= 1e-5


def test_gradient_flows_through_the_memory(params, text):
  """The last chunk's loss against the values of the first chunk, of which it reads but P: the window is one chunk."""
  cfg = MemoryConfig(window=1, persistent=3, top_k=0.5, rope_cap=4)
  rng = np.random.default_rng(4)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  layout, heads = MODEL.layout, (MODEL.heads, MODEL.head_dim)
  k, v = (layout.pack(draw(MODEL.layers, 1, layout.tokens, *heads)) for _ in range(2))
  score = draw(MODEL.layers, 1, MODEL.heads, cfg.resident_blocks(layout))
  memory = kv.per_layer(kv.begin_chunk, MODEL, cfg, rollout.start(MODEL, cfg, params, text[:1]))
  memory = kv.per_layer(kv.commit_chunk, MODEL, cfg, memory, kv.Commit(k, v, pool_keys(k, layout), score))
  target = draw(1, 3, *MODEL.latent_size, MODEL.latent_channels)

  def loss(params, v):
    sampler, past = SamplerConfig("few_step", steps=1), memory.replace(v=v)
    x, _ = rollout.rollout(MODEL, cfg, sampler, params, past, KEY, jnp.arange(1), 2)
    return ((x[:, -1] - target) ** 2).mean()

  both = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
  _, (by_params, by_v) = both(params, memory.v)
  assert all(np.isfinite(g).all() for g in jax.tree.leaves(by_params))
  layers = by_params["blocks"]["self_attn"]["v"]["kernel"]
  assert all(np.abs(g).max() > 0 for g in (*layers, *by_v))  # of every layer
  norm = float(jnp.linalg.norm(by_v))
  step = 0.02 * by_v / norm
  rise = float(both(params, memory.v + step)[0] - both(params, memory.v - step)[0])
  # A central difference errs by the third derivative times the step squared, and float32 by 1e-6 of the loss.
  assert abs(rise / (0.04 * norm) - 1) < 0.05


def test_a_chunk_calls_nobody_on_the_host(programs, params, text):
  program = programs.chunk.trace(params, programs.start(params, text[:2], 0, None), KEY, jnp.arange(2))
  for word in ("callback", "infeed", "outfeed", "debug_print"):
    assert word not in str(program.jaxpr) and word not in program.lower().as_text()
