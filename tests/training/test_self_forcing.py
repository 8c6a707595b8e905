"""A step of self-forcing: who moves, by what, and on which part of a rollout; and teachers that do not fit."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfjax import checkpoint, cluster, rollout, self_forcing, teacher_forcing, training
from sfjax.codec import DigitsCodec
from sfjax.config import (
  Config,
  DataConfig,
  DistillConfig,
  Stage,
  TrainConfig,
  apply_overrides,
  load_config,
  to_dataclass,
  to_dict,
)
from sfjax.data.loader import make_loader
from sfjax.errors import UserError
from sfjax.flow import SamplerConfig
from sfjax.routing import MemoryConfig
from sfjax.text import WordEncoder
from tests.memory.test_equality import random_params, tiny

B, JUDGED, SILENT = 2, 3, 2
MODEL = tiny(
  latent_size=(4, 6), tile=(1, 2, 3), layers=2, prediction="x0", text_len=16, latent_channels=DigitsCodec().channels
)
STAGE = Stage(1.0, chunks=JUDGED + SILENT, batch=B)
CAPTIONS = ["a red 3", "a blue 7 and a green 1"]


def test_random_importance_is_drawn_by_step_and_place(monkeypatch):
  class Enough(Exception):
    pass

  def record(model, cfg, text_kv, keys):
    found.append(np.asarray(jax.random.key_data(keys)))
    raise Enough

  monkeypatch.setattr(self_forcing, "init_memory", record)
  monkeypatch.setattr(self_forcing.captions, "kv", lambda *_: None)
  found = []
  for key, samples in ((0, [0, 1]), (0, [1]), (1, [0, 1])):
    with pytest.raises(Enough):
      self_forcing.student_rollout(make(""), {}, None, jax.random.key(key), jnp.array(samples), 0, 0)
  np.testing.assert_array_equal(found[1][0], found[0][1])
  assert len(np.unique(np.concatenate(found), axis=0)) == 4


def make(folder, **distill):
  memory = MemoryConfig(window=1, persistent=3, top_k=0.5, importance="learned", rope_cap=4)
  sampler = SamplerConfig("few_step", steps=2, shift=5.0)
  train = TrainConfig(4, (STAGE,), betas=(0.0, 0.999), warmup=1)
  distill = DistillConfig(teacher=str(folder), critic_updates=2, **distill)
  return Config("test", MODEL, memory, sampler, DataConfig(), train, distill)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
  """A folder of a bidirectional model."""
  folder = tmp_path_factory.mktemp("teacher") / "model"
  model = dataclasses.replace(MODEL, chunk_frames=JUDGED * MODEL.chunk_frames, tile=(3, 2, 3))
  config = dataclasses.replace(make(""), model=model, memory=MemoryConfig(window=1))
  params = {"dit": random_params(model, 5), "text": teacher_forcing.init_model(config)["text"]}
  checkpoint.export(folder, jax.device_get(params), to_dict(config), {})
  return folder


@pytest.fixture(scope="module")
def text():
  return jax.tree.map(jnp.asarray, self_forcing.inputs(make(""), {"caption": CAPTIONS})[0])


def begin(config):
  params = {"dit": random_params(MODEL, 6), "text": teacher_forcing.init_model(config)["text"]}
  return self_forcing.state(config) | {
    "params": params,
    "ema": params,
    "opt": self_forcing.optimizer(config.train).init(params),
  }


def on_mesh(mesh, config, stage, state, fixed, batches):
  """The program that train.py runs there, and what it is given: (step, state, fixed, batches)."""
  where = training.where_kept(config, mesh, state)
  step = training.jitted_step(config, stage, mesh, where)
  state, fixed = (cluster.place(x, cluster.shardings(mesh, x)) for x in (state, fixed))
  return step, jax.device_put(state, where), fixed, cluster.share(mesh, batches)


def moved(old, new):
  """Names of the arrays that differ."""
  old, new = checkpoint.named(old), checkpoint.named(new)
  return {name for name in old if np.any(old[name] != new[name])}


def test_a_step_moves_the_student_and_then_the_critic(teacher):
  config = make(teacher)
  batches = [(self_forcing.inputs(config, {"caption": CAPTIONS}), cluster.places(B))]
  given = config, STAGE, begin(config), self_forcing.fixed(config), batches
  step, state, fixed, batches = on_mesh(cluster.make_mesh(), *given)
  copy = lambda state: jax.tree.map(jnp.copy, state)  # a step consumes its own
  once, metrics = step(copy(state), fixed, batches)
  twice, more = step(copy(once), fixed, batches)
  assert int(twice["step"]) == 2 and all(np.isfinite(x) for x in (*metrics.values(), *more.values()))
  assert metrics["not_finite"] == 0 and metrics["importance"] > 0 and metrics["grad_norm"] > 0
  for part in ("params", "critic"):
    still = set(checkpoint.named(state[part])) - moved(state[part], twice[part])
    # Only the student has an importance head that learns; one word's row and what no layer reads may stand still.
    assert not {name for name in still if name.startswith("dit") and "importance" not in name}, part
  assert {n for n in moved(state["params"], twice["params"]) if "importance" in n}
  assert not moved(fixed, self_forcing.fixed(config))
  again, _ = step(state, fixed, batches)
  assert not moved(once, again)


def test_what_lies_in_the_hosts_memory_between_steps(teacher):
  plain, found = make(teacher), {}
  for offload, away in (("none", ()), ("optimizer", ("ema", "opt", "critic_opt"))):
    config = dataclasses.replace(plain, train=dataclasses.replace(plain.train, offload=offload))
    batches = [(self_forcing.inputs(config, {"caption": CAPTIONS}), cluster.places(B))]
    given = config, STAGE, begin(config), self_forcing.fixed(config), batches
    step, state, fixed, batches = on_mesh(cluster.make_mesh(), *given)
    for _ in range(2):
      state, _ = step(state, fixed, batches)
    for name, part in state.items():
      kinds = {x.sharding.memory_kind for x in jax.tree.leaves(part) if x.ndim > 1}
      assert kinds <= {"pinned_host" if name in away else "device"}, (offload, name)
    found[offload] = jax.device_get(state)
  jax.tree.map(np.testing.assert_array_equal, *found.values())


def test_two_scores_alike_leave_the_student_alone(teacher, text):
  """Without guidance, a critic that is the teacher has nothing to say: only the importance head learns."""
  config = make(teacher, guidance=1.0)
  params, fixed = begin(config)["params"], self_forcing.fixed(config)

  @jax.jit
  @jax.grad
  def gradient(params, critic):
    keys = jax.random.split(jax.random.key(0))
    return self_forcing.student_loss(config, params, critic, fixed, text, keys, jnp.arange(B), 0, 1)[0]

  alike, apart = gradient(params, fixed), gradient(params, jax.tree.map(lambda x: 1.1 * x, fixed))
  of = lambda grads, head: {n for n, x in checkpoint.named(grads).items() if np.any(x) and ("importance" in n) == head}
  assert not of(alike, False) and of(alike, True) == of(apart, True) != set()
  assert len(of(apart, False)) > 20


def test_only_the_last_chunks_of_a_longer_rollout_are_judged(teacher, text):
  config = make(teacher)
  params, key, samples = begin(config)["params"], jax.random.key(3), jnp.arange(B)
  last = config.sampler.steps - 1
  played = jax.jit(lambda n: self_forcing.student_rollout(config, params, text.prompt, key, samples, n, last))
  got, looks = played(SILENT)

  @jax.jit
  def whole():
    rows = WordEncoder(MODEL.text_len, MODEL.text_dim).encode(params["text"], text.prompt)
    memory = rollout.start(MODEL, config.memory, params["dit"], rows, config.train.seed)
    return rollout.rollout(MODEL, config.memory, config.sampler, params["dit"], memory, key, samples, JUDGED + SILENT)[
      0
    ]

  want = whole()[:, SILENT:].reshape(got.shape)
  assert looks.content.shape[2] == JUDGED
  np.testing.assert_allclose(got, want, atol=1e-4 * float(jnp.abs(want).max()))


@pytest.fixture(scope="module")
def beginning():
  """One real chunk, of the first of two clips: a `Start`, and its latents."""
  frames = np.random.default_rng(0).integers(0, 256, (B, 9, 8, 12, 3), np.uint8)
  return self_forcing.Start(frames, np.array([1, 0], np.int32)), DigitsCodec().encode(frames)


def test_the_critic_sees_real_beginnings(teacher, text, beginning, monkeypatch):
  """Its loss stands for what it sees: how far the first clip's first chunk is from the real one; the other's is its own."""
  config, (start, latents) = make(teacher), beginning

  def loss(config, critic, prompt, keys, x):
    first, other = jnp.abs(x[:, :3] - latents).max((1, 2, 3, 4))
    return jnp.where(other > 0.1, first, jnp.nan) + 0 * sum(leaf.sum() for leaf in jax.tree.leaves(critic))

  monkeypatch.setattr(self_forcing, "critic_loss", loss)
  go = jax.jit(lambda s, f, b: self_forcing.step(config, STAGE, cluster.make_mesh(), s, f, b))
  silent, _, _ = jax.vmap(lambda step: self_forcing.drawn(config, STAGE, step))(jnp.arange(20))
  told = []
  for step in (np.argmax(silent == 0), np.argmax(silent > 0)):
    state = begin(config) | {"step": jnp.asarray(step, jnp.int32)}
    _, metrics = go(state, self_forcing.fixed(config), [((text, start), jnp.arange(B))])
    assert all(np.isfinite(x) for x in metrics.values()) and metrics["grad_norm"] > 0 and metrics["not_finite"] == 0
    told.append(metrics["critic_loss"])
  assert told[0] < 1e-5 and told[1] > 0.1  # in a longer rollout real chunks come before what is judged


def test_a_longer_rollout_begins_with_them_too(teacher, text, beginning):
  """They are its first chunks, without gradient or not: what comes later differs in that clip, and in no other."""
  config, (start, _) = make(teacher), beginning
  params, key, samples = begin(config)["params"], jax.random.key(3), jnp.arange(B)

  @jax.jit
  def play(silent, chunks):
    given = start._replace(chunks=chunks)
    return self_forcing.student_rollout(config, params, text.prompt, key, samples, silent, 1, given)[0]

  nothing, one = play(SILENT, np.zeros(B, np.int32)), play(SILENT, start.chunks)
  assert np.abs(one[0] - nothing[0]).max() > 1e-2
  np.testing.assert_allclose(one[1], nothing[1], atol=1e-5)


@pytest.mark.parametrize("variant", ["student", "student_memory"])
def test_a_sampler_that_commits_its_last_step_is_a_students(variant):
  config = load_config(f"configs/digits.py:{variant}")
  config = to_dataclass(Config, apply_overrides(config, {"sampler.commit": "last"}))
  assert config.sampler.passes == config.sampler.steps == 4
  assert len(self_forcing.source(config, config.train.stages[0])) > 0


def test_what_real_beginnings_show():
  """Of the digits' config: up to the chunk that covers the digit, within the clips that the teacher judges."""
  config = to_dataclass(Config, load_config("configs/digits.py:student_memory"))
  (stage,) = config.train.stages
  source = self_forcing.source(config, stage)
  batch = next(make_loader(source, 48, seed=0))
  _, start = self_forcing.inputs(config, batch)
  begun = start.encoded(config.model)
  assert begun.latents.shape == (48, 4, 3, 32, 32, 48) and set(start.chunks.tolist()) == {0, 2, 3, 4}
  np.testing.assert_array_equal(begun.real.sum(1), start.chunks)
  assert abs((start.chunks > 0).mean() - stage.p_memory) < 0.25
  for clip in np.flatnonzero(start.chunks):
    last = start.frames[clip, 12 * start.chunks[clip] - 4]  # the cover is at rest, the countdown has begun
    assert last[60:, :4].min() > 230 and (batch["caption"][clip] == "" or "digit" in batch["caption"][clip])


def test_the_critic_learns_what_the_student_makes(teacher, text):
  """Steps on one batch of latents lower the critic's loss on new noise."""
  config = make(teacher)
  critic = self_forcing.fixed(config)
  x = jax.random.normal(jax.random.key(1), (B, JUDGED * 3, *MODEL.latent_size, MODEL.latent_channels)) * 0.2 + 1.0
  loss = lambda c, key: self_forcing.critic_loss(config, c, text.prompt, jax.random.split(key, B), x)
  value, gradient = jax.jit(loss), jax.jit(jax.grad(loss))
  mean = lambda c: np.mean([value(c, jax.random.key(100 + i)) for i in range(8)])
  tx, before = optax.adam(1e-2), mean(critic)
  opt = tx.init(critic)
  for i in range(60):
    updates, opt = tx.update(gradient(critic, jax.random.key(i)), opt)
    critic = optax.apply_updates(critic, updates)
  assert mean(critic) < 0.5 * before


@pytest.mark.parametrize(
  ("change", "line"),
  [
    (lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, chunk_frames=2, tile=(1, 2, 3))), "9 latents"),
    (lambda c: dataclasses.replace(c, model=dataclasses.replace(c.model, text_len=8)), "its text_len is 16"),
    (lambda c: dataclasses.replace(c, distill=DistillConfig(teacher="/nowhere")), "/nowhere is not a folder"),
  ],
)
def test_a_teacher_that_does_not_fit(teacher, change, line):
  with pytest.raises(UserError, match=f"config.distill.teacher.*{line}"):
    self_forcing.teacher_model(change(make(teacher)))


@pytest.mark.parametrize(
  ("change", "stage", "line"),
  [
    ({}, Stage(1.0, chunks=2, batch=2), r"stages: chunks 2, .*; with a teacher want chunks of at least 3, firsts 0"),
    ({}, Stage(1.0, chunks=3, batch=2, firsts=2), "stages: chunks 3, firsts 2"),
    ({}, Stage(1.0, chunks=3, batch=2, dense=True), "dense True; with a teacher want .*dense False"),
    (dict(sampler=SamplerConfig("few_step", 2, guidance=6.0)), STAGE, "config.sampler: kind few_step, guidance 6.0"),
    (dict(sampler=SamplerConfig("few_step", 2, routing="chunk")), STAGE, "config.sampler: .*chunk; want .*step; that"),
    (
      {},
      dataclasses.replace(STAGE, known=1),
      "known 1, p_memory 0.0, of source digits; want known below 3, p_memory above 0",
    ),
    (
      {},
      dataclasses.replace(STAGE, known=3, p_memory=0.5),
      "known 3, p_memory 0.5, of source digits; want known below 3",
    ),
    (
      dict(data=DataConfig("prompts", "prompts.txt")),
      dataclasses.replace(STAGE, known=1, p_memory=0.5),
      "known 1, p_memory 0.5, of source prompts; want .*source digits",
    ),
    (dict(train=TrainConfig(4, (STAGE,), accumulate=2)), STAGE, "config.train.accumulate: 2; with a teacher want 1"),
  ],
)
def test_what_does_not_fit_a_teacher(teacher, change, stage, line):
  with pytest.raises(UserError, match=line):
    self_forcing.source(dataclasses.replace(make(teacher), **change), stage)
