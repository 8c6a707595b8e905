"""Distribution matching: where everything is known in closed form, and the student's gradient against a plain function's."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfjax import distill, rollout
from sfjax import memory as kv
from sfjax.flow import SamplerConfig, few_step
from sfjax.routing import MemoryConfig
from tests.memory.test_equality import random_params, start, tiny
from tests.rollout.toy import TOLERANCE, same_memory

SHAPE = (4096, 2, 1, 2, 3)
SPREAD = 0.7  # of real and of generated clips alike
STUDENT = tiny(latent_size=(4, 6), tile=(1, 2, 3), layers=2, prediction="x0")
PACKED = dataclasses.replace(STUDENT, tile=(3, 1, 1), block_tokens=7)  # 2 blocks, a short one of 4 and an empty one
MEMORY = MemoryConfig(window=1, persistent=3, top_k=0.5, rope_cap=4)  # what a chunk reads of the past is P
FEW = SamplerConfig("few_step", steps=3, shift=5.0)
LAST = dataclasses.replace(FEW, commit="last")


def keys(seed, n=SHAPE[0]):
  return jax.random.split(jax.random.key(seed), n)


def gaussian(mean):
  """The best denoiser of clips drawn from N(mean, SPREAD^2): x0 + noise is Gaussian, so its mean is linear."""

  def denoise(x, sigma):
    s = sigma[..., None, None, None]
    keep = (1 - s) * SPREAD**2 / ((1 - s) ** 2 * SPREAD**2 + s**2)
    return mean + keep * (x - (1 - s) * mean)

  return denoise


def test_levels_and_noise():
  x = jax.random.normal(jax.random.key(0), SHAPE)
  noisy, sigma, noise = distill.noised(keys(1), x, 5.0)
  assert (sigma == sigma[:, :1]).all() and sigma.min() >= 0.02 and sigma.max() <= 0.98
  np.testing.assert_allclose(
    noisy, (1 - sigma[..., None, None, None]) * x + sigma[..., None, None, None] * noise, atol=1e-6
  )
  # u above 0.98 / (0.98 + 5 x 0.02) = 0.907 is clipped; of 4,096 draws the share deviates by 0.005.
  assert abs((sigma[:, 0] == 0.98).mean() - 0.093) < 0.02
  _, sigma, _ = distill.noised(keys(1), x, 5.0, (0.5, 0.995))
  assert sigma.min() == 0.5 and sigma.max() > 0.99
  assert abs(noise.std() - 1) < 0.01


def test_the_direction_is_that_between_the_two_distributions():
  """x = theta + SPREAD z. Both denoisers are Gaussian, so fake - real is (1 - keep (1 - sigma)) (theta - mean)."""
  theta, mean = 0.4, jnp.asarray([1.0, -0.5, 0.4])
  z = jax.random.normal(jax.random.key(2), SHAPE)

  def loss(theta):
    x = theta + SPREAD * z
    return distill.dmd_loss(keys(3), x, gaussian(mean), gaussian(jax.lax.stop_gradient(theta)))[0]

  got = jax.grad(loss)(jnp.full(3, theta))
  x = theta + SPREAD * z
  noisy, sigma, _ = distill.noised(keys(3), x, 5.0)
  s = np.asarray(sigma)[..., None, None, None]
  keep = (1 - s) * SPREAD**2 / ((1 - s) ** 2 * SPREAD**2 + s**2)
  scale = np.abs(x - gaussian(mean)(noisy, sigma)).mean((1, 2, 3, 4), keepdims=True)
  want = (np.broadcast_to((1 - keep * (1 - s)) * (theta - np.asarray(mean)) / scale, SHAPE) / x.size).sum((0, 1, 2, 3))
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-7)
  assert (np.sign(got[:2]) == [-1, 1]).all() and abs(got[2]) < 1e-6  # where it is right already, nothing moves it


@pytest.mark.parametrize("name", ["dmd", "sid"])
def test_descent_ends_at_the_real_distribution(name):
  """The mean of a student of fixed spread, the fake denoiser always that of its clips."""
  mean = jnp.asarray([1.0, -0.5, 0.2])

  @jax.jit
  def step(theta, key):
    noise, draw = jax.random.split(key)
    z = jax.random.normal(draw, (64, *SHAPE[1:]))
    loss = lambda theta: distill.STUDENT_LOSSES[name](
      jax.random.split(noise, 64), theta + SPREAD * z, gaussian(mean), gaussian(jax.lax.stop_gradient(theta))
    )[0]
    return theta - 3.0 * jax.grad(loss)(theta)

  theta = jnp.zeros(3)
  for i in range(60):
    theta = step(theta, jax.random.key(i))
  np.testing.assert_allclose(theta, mean, atol=1e-3)


def test_a_clip_without_a_finite_direction_is_left_alone():
  x = jax.random.normal(jax.random.key(4), (3, 2, 1, 2, 3))
  broken = lambda y, s: gaussian(0.3)(y, s).at[1].set(jnp.nan)
  f = lambda x: distill.dmd_loss(keys(5, 3), x, broken, gaussian(0.0))
  (loss, metrics), grad = jax.value_and_grad(f, has_aux=True)(x)
  assert np.isfinite(loss) and abs(metrics["not_finite"] - 1 / 3) < 1e-6
  assert not grad[1].any() and grad[0].any() and np.isfinite(grad).all()


@pytest.mark.parametrize("prediction", ["x0", "flow"])
def test_the_critic_is_best_where_it_denoises_best(prediction):
  model = dataclasses.replace(STUDENT, prediction=prediction)
  x = 0.4 + SPREAD * jax.random.normal(jax.random.key(6), SHAPE)

  def loss(mean):
    def output(y, s):
      x0 = gaussian(mean)(y, s)
      return x0 if prediction == "x0" else (y - x0) / s[..., None, None, None]

    return distill.critic_loss(keys(7), x, model, output)

  best, below, above = (float(loss(m)) for m in (0.4, 0.3, 0.5))
  assert best < below and best < above
  assert not np.any(jax.grad(lambda x: distill.critic_loss(keys(7), x, model, gaussian(0.4)))(x))


def test_a_bidirectional_model_denoises_the_whole_clip():
  teacher = tiny(latent_size=(4, 6), tile=(3, 2, 3), layers=2, chunk_frames=6, prediction="flow")
  params = random_params(teacher, 2)
  kv = rollout.text_kv(teacher, params, jax.random.normal(jax.random.key(8), (2, teacher.text_len, teacher.text_dim)))
  null = jax.tree.map(jnp.zeros_like, kv)
  x = jax.random.normal(jax.random.key(9), (2, 6, 4, 6, 3))
  sigma = jnp.asarray([[0.5] * 6, [0.9] * 6])
  alone = distill.denoiser(teacher, params, kv)(x, sigma)
  out = distill.whole_clip(teacher, params, kv, x, sigma)
  np.testing.assert_allclose(alone, x - sigma[..., None, None, None] * out, atol=1e-5)
  last = distill.whole_clip(teacher, params, kv, x.at[:, 5].add(1), sigma)
  assert np.abs(last - out)[:, 0].max() > 1e-3  # the first frame sees the last
  without = distill.denoiser(teacher, params, null)(x, sigma)
  guided = distill.denoiser(teacher, params, kv, null, 4.0)(x, sigma)
  np.testing.assert_allclose(guided, without + 4 * (alone - without), rtol=1e-5, atol=1e-4)


@pytest.fixture(scope="module")
def student():
  params = random_params(STUDENT, 3)
  text = jax.random.normal(jax.random.key(10), (1, STUDENT.text_len, STUDENT.text_dim))
  return params, text


def play(
  params,
  text,
  exit_step,
  cache_gradient="straight_through",
  chunks=3,
  memory=MEMORY,
  before=None,
  beginning=None,
  sampler=FEW,
  model=STUDENT,
):
  before = rollout.start(model, memory, params, text) if before is None else before
  key, samples = jax.random.key(11), jnp.arange(len(text))
  return rollout.self_forcing(
    model, memory, sampler, params, before, key, samples, chunks, exit_step, cache_gradient, beginning
  )


def real_chunks(videos, chunks):
  return jax.random.normal(jax.random.key(14), (videos, chunks, 3, *STUDENT.latent_size, STUDENT.latent_channels))


@pytest.mark.parametrize(
  ("memory", "model"),
  [
    (MEMORY, STUDENT),
    (MemoryConfig(window=1), STUDENT),
    (MemoryConfig(window=3), STUDENT),
    (MemoryConfig(window=4), STUDENT),
    (MemoryConfig(window=2, persistent=5, top_k=0.3, sink_chunks=1), STUDENT),
    (MemoryConfig(window=2, persistent=4, top_k=0.4, rope_cap=7, sharing="layer", novelty=2.0), STUDENT),
    (MemoryConfig(window=3), PACKED),
    (MemoryConfig(window=2, persistent=3, top_k=0.6, sink_chunks=1), PACKED),
    (MemoryConfig(window=2, persistent=3, top_k=0.6, rope_cap=7, sharing="layer", novelty=2.0), PACKED),
  ],
)
def test_the_last_exit_is_the_rollout(student, memory, model):
  """After two chunks of a video, from which blocks come into P; the chunks done side by side are those done in turn."""
  params, text = student

  chunk = jax.jit(lambda m: rollout.rollout_chunk(model, memory, FEW, params, m, jax.random.key(11), jnp.arange(1)))
  memories, made = [start(model, memory, params, text)], []
  for _ in range(5):
    x, m = chunk(memories[-1])
    memories.append(m)
    made.append(x)
  exits = jax.jit(lambda exit_step: play(params, text, exit_step, memory=memory, before=memories[2], model=model))
  (x, after, looks), early = exits(FEW.steps - 1), exits(0)[0]
  want, last = jnp.stack(made[2:], 1), memories[-1]
  np.testing.assert_allclose(x, want, atol=1e-5 * float(jnp.abs(want).max()))
  np.testing.assert_array_equal(after.origin, last.origin)
  np.testing.assert_allclose(after.k, last.k, atol=1e-4)
  nb = model.layout.blocks
  ring = memory.persistent + (4 % memory.window) * nb  # where the fifth chunk lies
  np.testing.assert_array_equal(looks.keys[:, :, -1], after.pooled[:, :, ring : ring + nb])
  assert np.abs(early - x).max() > 1e-2


# Its parts, each compiled once for all chunks: written out in one program they would be compiled again for each.
part = functools.partial(jax.jit, static_argnums=(0, 1))
begun = part(lambda model, cfg, memory: kv.per_layer(kv.begin_chunk, model, cfg, memory))
stepped = part(lambda model, cfg, params, m, x, level: rollout._forward(model, cfg, params, m, x, level, commit=True))
committed = part(lambda model, cfg, memory, clean: kv.per_layer(kv.commit_chunk, model, cfg, memory, clean))


def unrolled(
  params, text, exit_step, cache_gradient, memory_config, frozen=None, chunks=3, real=(), sampler=FEW, model=STUDENT
):
  """The same written out chunk by chunk, what is constant handed in: a plain function of params.

  real: latents of the first chunks, if these are given. Returns (clips, constants, memory).
  """
  memory, clips, made = start(model, memory_config, params, text), [], []
  key, level = jax.random.key(11), lambda i: jnp.full((1, 3), FEW.sigmas[i])
  for t in range(chunks):
    memory = begun(model, memory_config, memory)
    step = lambda x, i, m=memory: stepped(model, memory_config, params, m, x, level(i))  # tells its k and v
    if frozen is None:
      keys = rollout.chunk_keys(key, jnp.arange(1), t)
      x = jax.random.normal(jax.random.fold_in(keys[0], 0), (1, 3, *model.latent_size, model.latent_channels))
      for i in range(exit_step):
        x = few_step(model, FEW, x, step(x, i)[0], i, keys)
    else:
      x = frozen[t]["x"]
    x0, _, (_, own) = step(x, exit_step)  # it predicts x0
    if t < len(real):
      x0 = real[t]
    if frozen is None:
      seen, i = x0, -1
      if sampler.commit == "last" and t >= len(real):
        i, sigma = 2, FEW.sigmas[2]
        seen = (1 - sigma) * x0 + sigma * jax.random.normal(jax.random.fold_in(keys[0], i), x.shape)
        seen = x if exit_step == i else seen
      _, clean = step(seen, i)[2]
      made.append({"x": x, "own": own, "clean": clean})
    else:
      clean, was = frozen[t]["clean"], frozen[t]["own"]
      if cache_gradient == "straight_through" and t >= len(real):
        clean = clean._replace(k=clean.k + own.k - was.k, v=clean.v + own.v - was.v)
    memory = committed(model, memory_config, memory, clean)
    clips.append(x0)
  return jnp.stack(clips, 1), made, memory


def test_the_memory_of_a_kept_last_step_is_that_of_sampling(student):
  """Of three steps: by the last and the second exit it is the same, by the first what a plain loop leaves."""
  params, text = student
  memory = MemoryConfig(window=2, persistent=5, top_k=0.3, sink_chunks=1, importance="learned", novelty=2.0)
  chunk = lambda m: rollout.rollout_chunk(STUDENT, memory, LAST, params, m, jax.random.key(11), jnp.arange(1))
  want, made = rollout.start(STUDENT, memory, params, text), []
  for _ in range(4):
    x, want = jax.jit(chunk)(want)
    made.append(x)
  exits = jax.jit(lambda e: play(params, text, e, chunks=4, memory=memory, sampler=LAST)[:2])
  (first, early), (_, middle), (x, last) = (exits(jnp.int32(e)) for e in range(3))
  scale = float(jnp.abs(x).max())
  np.testing.assert_allclose(x, jnp.stack(made, 1), atol=1e-5 * scale)
  same_memory(last, want)
  same_memory(middle, want)  # re-noised as sampling would have, its prediction is what the last step saw
  clips, _, hand = unrolled(params, text, 0, None, memory, chunks=4, sampler=LAST)
  np.testing.assert_allclose(first, clips, atol=1e-5 * scale)
  same_memory(early, hand)
  assert np.abs(early.k - want.k).max() > 1e-2


@pytest.mark.parametrize(
  ("memory", "sampler", "exit_step", "model"),
  [
    (MEMORY, FEW, 1, STUDENT),
    (MemoryConfig(window=2), FEW, 1, STUDENT),
    (MEMORY, LAST, 0, STUDENT),
    (MemoryConfig(window=2, persistent=3, top_k=0.6, rope_cap=4), FEW, 1, PACKED),
  ],
)
def test_gradient_is_that_of_a_plain_function(student, memory, sampler, exit_step, model):
  """By autodiff of the function written out, in which nothing is stopped, and by finite differences of it."""
  params, text = student
  found = {}
  target = jax.random.normal(jax.random.key(12), (1, 3, 3, 4, 6, 3))
  error = lambda x: ((x - target) ** 2).mean()
  more = dict(sampler=sampler, model=model)
  frozen = unrolled(params, text, exit_step, None, memory, **more)[1]
  for how in rollout.CACHE_GRADIENTS:
    value, grads = jax.jit(
      jax.value_and_grad(lambda p, how=how: error(play(p, text, exit_step, how, memory=memory, **more)[0]))
    )(params)
    of = lambda p, how=how: error(unrolled(p, text, exit_step, how, memory, frozen, model=model)[0])
    plain = jax.value_and_grad(of)
    want_value, want = plain(params)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    norm = optax.tree.norm(want)
    assert optax.tree.norm(optax.tree.sub(grads, want)) <= 1e-4 * norm  # sums of 1e5 terms, in another order
    rng = np.random.default_rng(13)
    direction = jax.tree.map(lambda g: g + jnp.asarray(rng.normal(size=g.shape), jnp.float32) * jnp.abs(g).mean(), want)  # noqa: B023
    size = float(optax.tree.norm(direction))
    moved = [float(of(optax.tree.add_scale(params, s / size, direction))) for s in (0.01, -0.01)]
    slope = float(optax.tree.vdot(grads, direction)) / size
    # A central difference errs by the third derivative times the step squared, and float32 by 1e-6 of the loss.
    assert abs((moved[0] - moved[1]) / 0.02 - slope) <= 0.05 * slope
    found[how] = grads
  apart = optax.tree.norm(optax.tree.sub(*found.values()))
  assert apart > 1e-2 * norm  # what went through the memory


def test_gradient_after_a_real_chunk_is_that_of_a_plain_function(student):
  """The first of three is real: later ones read it and learn, it teaches nothing. Nothing real: as without a beginning."""
  params, text = student
  exit_step, latents = 1, real_chunks(1, 1)
  target = jax.random.normal(jax.random.key(12), (1, 3, 3, 4, 6, 3))
  error = lambda x: ((x - target) ** 2).mean()
  frozen = unrolled(params, text, exit_step, None, MEMORY, real=[latents[:, 0]])[1]
  norm, apart = optax.tree.norm, lambda x, y: optax.tree.norm(optax.tree.sub(x, y))
  found = {}
  for how in rollout.CACHE_GRADIENTS:
    of = lambda p, beginning, how=how: error(play(p, text, exit_step, how, beginning=beginning)[0])
    plain = lambda p, how=how: error(unrolled(p, text, exit_step, how, MEMORY, frozen, real=[latents[:, 0]])[0])
    gradient = jax.jit(jax.value_and_grad(of))
    value, grads = gradient(params, rollout.Beginning(latents, jnp.ones((1, 1), bool)))
    want_value, want = jax.value_and_grad(plain)(params)
    np.testing.assert_allclose(value, want_value, rtol=1e-5)
    assert apart(grads, want) <= 1e-4 * norm(want)
    found[how] = grads
  assert apart(*found.values()) > 1e-2 * norm(want)  # what the third learns through the second
  made = gradient(params, rollout.Beginning(latents, jnp.zeros((1, 1), bool)))
  today = gradient(params, None)
  np.testing.assert_allclose(made[0], today[0], rtol=1e-6)
  assert apart(made[1], today[1]) <= 1e-5 * norm(today[1]) and apart(today[1], grads) > 1e-2 * norm(grads)


@pytest.mark.parametrize(
  ("memory", "sampler"),
  [
    (MEMORY, FEW),
    (MemoryConfig(window=2, persistent=5, top_k=0.3, sink_chunks=1, importance="learned", novelty=2.0), FEW),
    (MEMORY, LAST),
  ],
)
def test_a_real_beginning_is_what_the_memory_gets(student, memory, sampler):
  """Of two videos the first begins with three real chunks, one of them before the rollout; the other is made as ever."""
  params, text = student
  text = jnp.concatenate([text, text + 1])
  latents, real = real_chunks(2, 3), jnp.asarray([[True] * 3, [False] * 3])

  silent = jax.jit(
    lambda m, beginning: rollout.rollout_chunk(
      STUDENT, memory, sampler, params, m, jax.random.key(11), jnp.arange(2), in_place=True, beginning=beginning
    )[1]
  )
  played = jax.jit(
    lambda m, beginning: play(params, text, 1, chunks=2, memory=memory, before=m, beginning=beginning, sampler=sampler)
  )
  append = jax.jit(lambda m, x: rollout.append_chunk(STUDENT, memory, params, m, x, in_place=True))

  def go(real):
    beginning = rollout.Beginning(latents, real)
    x, m, looks = played(silent(start(STUDENT, memory, params, text), beginning), beginning)
    return x, m, looks.keys, looks.content, silent(m, beginning)  # after the beginning all is made

  (x, after, *looks, later), (ever, made, *others, made_later) = go(real), go(real & False)
  want = start(STUDENT, memory, params, text)
  for t in range(3):
    want = append(want, latents[:, t])
  np.testing.assert_array_equal(x[0], latents[0, 1:])
  np.testing.assert_allclose(x[1], ever[1], atol=1e-5)
  for name in ("k", "v", "pooled", "score", "origin"):
    for video, got, like in ((0, after, want), (1, after, made), (1, later, made_later)):
      a, b = (np.asarray(getattr(m, name)[:, video], np.float64) for m in (got, like))
      atol = max(1e-4, TOLERANCE.get(name, 0) * np.abs(b).max()) if name in ("pooled", "score") else 1e-4
      np.testing.assert_allclose(a, b, rtol=0, atol=atol, err_msg=name)
  assert np.abs(later.k[:, 0] - made_later.k[:, 0]).max() > 1e-2
  for got, other in zip(looks, others, strict=True):
    np.testing.assert_allclose(got[:, 1], other[:, 1], atol=1e-4)
    assert np.abs(got[:, 0] - other[:, 0]).max() > 1e-2
  nb = STUDENT.layout.blocks
  ring = memory.persistent + (2 % memory.window) * nb
  np.testing.assert_allclose(looks[0][:, 0, -1], want.pooled[:, 0, ring : ring + nb], atol=1e-4)


@pytest.mark.parametrize(
  ("sampler", "how", "line"),
  [
    (SamplerConfig("euler", steps=3), "detached", "sampler: kind euler"),
    (dataclasses.replace(FEW, guidance=2.0), "detached", "guidance 2.0"),
    (dataclasses.replace(FEW, routing="chunk"), "detached", "routing chunk; want .* routing step"),
    (FEW, "none", "cache_gradient: 'none'; want one of straight_through, detached"),
  ],
)
def test_what_cannot_be_rolled_out(student, sampler, how, line):
  params, text = student
  with pytest.raises(ValueError, match=line):
    rollout.self_forcing(STUDENT, MEMORY, sampler, params, None, None, None, 1, 0, how)
