"""The objective: who gets a gradient and from what, what a perfect network scores, which frames and words count."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sfjax import objective, rollout
from sfjax.attention import Parallel
from sfjax.captions import Text
from sfjax.config import Config, DataConfig, Stage, TrainConfig
from sfjax.flow import SamplerConfig, add_noise, shift_sigma
from sfjax.optimizer import averaged, optimizer
from sfjax.routing import MemoryConfig
from sfjax.text import WordEncoder
from tests.memory.test_equality import random_params, tiny
from tests.rollout.conftest import cheap_compilation  # noqa: F401, a fixture

B, CHUNKS = 3, 4
MODEL = tiny(latent_size=(4, 6), tile=(1, 2, 3), layers=2, prediction="x0")
STAGE = Stage(1.0, chunks=CHUNKS, batch=B)
INDEX = jnp.arange(B)


def make(model=MODEL, **train):
  memory = MemoryConfig(window=2, persistent=4, top_k=0.4, importance="learned", rope_cap=6)
  train = TrainConfig(1, (STAGE,), **train)
  return Config("test", model, memory, SamplerConfig(), DataConfig(), train)


@pytest.fixture(scope="module")
def inputs():
  latents = np.random.default_rng(0).normal(size=(B, CHUNKS * 3, 4, 6, 3)).astype(np.float32)
  words = WordEncoder(4, 8).tokens(["a red 3", "blue 7", "a digit"])
  return jnp.asarray(latents), Text(jnp.asarray(words), jnp.zeros_like(words))


@pytest.fixture(scope="module")
def params():
  return {"dit": random_params(MODEL, 3), "text": WordEncoder(4, 8).init(0)}


def names(tree):
  return {jax.tree_util.keystr(p, simple=True, separator="/"): x for p, x in jax.tree_util.tree_leaves_with_path(tree)}


def test_gradients_come_from_where_they_should(inputs, params):
  """One compiled program gives the gradients of both parts of the loss."""
  config = make(p_drop_prompt=0.0, importance_weight=0.3)

  @jax.jit
  def gradient(params, of_flow, of_importance):
    def parts(p):
      total, metrics = objective.loss(config, STAGE, p, *inputs, jax.random.key(0), INDEX)
      return (metrics["flow"], metrics["importance"]), total

    values, back, total = jax.vjp(parts, params, has_aux=True)
    return *values, total, back((of_flow, of_importance))[0]

  flow, importance, total, by_flow = gradient(params, 1.0, 0.0)
  by_importance = gradient(params, 0.0, 1.0)[-1]
  assert np.isfinite([flow, importance, total]).all() and flow > 0 and importance > 0
  np.testing.assert_allclose(total, flow + 0.3 * importance, rtol=1e-6)
  for (name, a), b in zip(names(by_flow).items(), names(by_importance).values(), strict=True):
    assert np.isfinite(a).all() and np.isfinite(b).all(), name
    mine, other = (b, a) if "importance" in name else (a, b)
    assert not other.any(), name  # the head learns from its own loss alone, and nothing else from that
    layers = mine if name.startswith("dit/blocks") else mine[None]
    assert all(layer.any() for layer in layers), name
  used = np.unique(inputs[1].prompt)
  assert set(np.flatnonzero(np.abs(by_flow["text"]["word"]).sum(1))) == set(used[used > 0])


class Network:
  """Stands for the DiT: records what it is given and answers what a test wants."""

  def __init__(self, monkeypatch, answer=None):
    self.answer = answer or (lambda net: jnp.zeros_like(net.x))
    monkeypatch.setattr(rollout, "text_kv", self.read)
    monkeypatch.setattr(rollout, "apply", self.apply)

  def read(self, model, params, text):
    self.text = text

  def apply(self, model, params, x, t, chunk, kv, attend, rng):
    self.x, self.t, self.chunk, self.rng = x, t, chunk, rng
    return self.answer(self), None, Parallel(None, None, None, jnp.zeros(model.layers))

  @property
  def noisy(self):
    """Latents and sigmas of the noisy half."""
    return self.x[:, -CHUNKS:], self.t[:, -CHUNKS:] / 1000


def run(config, inputs, key=0):
  encoder = {"text": WordEncoder(4, 8).init(0), "dit": None}
  return objective.loss(config, STAGE, encoder, *inputs, jax.random.key(key), INDEX)


def test_random_importance_is_drawn_by_step_and_place(inputs, monkeypatch):
  net, found = Network(monkeypatch), []
  for key, index in ((0, INDEX), (0, INDEX[::-1]), (1, INDEX)):
    params = {"text": WordEncoder(4, 8).init(0), "dit": None}
    objective.loss(make(), STAGE, params, *inputs, jax.random.key(key), index)
    found.append(np.asarray(net.rng))
  assert found[0].shape == (MODEL.layers, B, 2)
  np.testing.assert_array_equal(found[1], found[0][:, ::-1])
  seen = np.concatenate([found[0], found[2]], 1).reshape(-1, 2)
  assert len(np.unique(seen, axis=0)) == len(seen)


@pytest.mark.parametrize("prediction", ["x0", "flow"])
def test_a_perfect_network_scores_zero_whatever_it_says_of_known_frames(inputs, monkeypatch, prediction):
  x0 = inputs[0].reshape(B, CHUNKS, 3, 4, 6, 3)

  def answer(net):
    x, sigma = net.noisy
    known = (sigma == 0)[..., None, None, None]
    velocity = (x - x0) / jnp.maximum(sigma, 1e-9)[..., None, None, None]
    right = x0 if prediction == "x0" else velocity
    return jnp.concatenate([net.x[:, :-CHUNKS] + 100, jnp.where(known, 1e3, right) + wrong], 1)

  net = Network(monkeypatch, answer)
  config = make(dataclasses.replace(MODEL, prediction=prediction), p_known=0.5, shift=1.0)
  wrong = 0.0
  flow = run(config, inputs)[1]["flow"]
  x, sigma = net.noisy
  known = np.asarray(sigma == 0)
  assert 0.1 < known.mean() < 0.5 and not known[..., 2].any()  # one or two frames of a chunk, at its beginning
  assert (known[..., 0] >= known[..., 1]).all()
  np.testing.assert_array_equal(np.asarray(x)[known], np.asarray(x0)[known])  # they are shown as they are
  # float32 recovers noise from x to 1e-7 / sigma; x0 is handed over exactly.
  assert flow == 0 if prediction == "x0" else flow < 1e-6
  # An error of one everywhere is the mean of its weight over unknown frames only.
  wrong = 1.0
  weight = 1 / np.maximum(np.asarray(sigma), 0.1) ** 2 if prediction == "x0" else np.ones(known.shape)
  of_clips = [weight[i][~known[i]].mean() for i in range(B)]
  np.testing.assert_allclose(run(config, inputs)[1]["flow"], np.mean(of_clips), rtol=1e-3)


def test_of_a_chunk_of_one_frame_none_is_known(inputs, monkeypatch):
  seen = []

  def perfect(config, stage, params, context, level, noisy, sigma, *_):
    seen.append(sigma)
    return inputs[0].reshape(noisy.shape), jnp.zeros(())

  monkeypatch.setattr(objective, "teacher_forced", perfect)
  assert run(make(dataclasses.replace(MODEL, chunk_frames=1), p_known=1.0), inputs)[1]["flow"] == 0
  assert seen[0].shape == (B, 3 * CHUNKS, 1) and (seen[0] > 0).all()


def test_clean_and_noisy_halves(inputs, monkeypatch):
  net, x0 = Network(monkeypatch), inputs[0].reshape(B, CHUNKS, 3, 4, 6, 3)
  run(make(p_known=0.0, context_noise=0.0), inputs)
  assert net.chunk.tolist() == [0, 1, 2, 0, 1, 2, 3]  # the last clean chunk is read by nobody
  np.testing.assert_array_equal(net.x[:, :3], x0[:, :3])
  assert not net.t[:, :3].any()
  sigma = np.asarray(net.noisy[1])
  assert (sigma == sigma[..., :1]).all() and len(np.unique(sigma)) == B * CHUNKS  # a level for each chunk
  noise = (net.noisy[0] - (1 - sigma[..., None, None, None]) * x0) / sigma[..., None, None, None]
  assert abs(noise.std() - 1) < 0.1 and abs(noise.mean()) < 0.1  # 2592 normal numbers: deviations of 0.014 and 0.02

  shares = []
  for key in range(20):
    run(make(p_known=0.0, context_noise=0.3, p_context_noise=0.5), inputs, key)
    level = np.asarray(net.t[:, :3, 0]) / 1000
    assert (level <= 0.3).all() and ((level > 0).all(1) == (level > 0).any(1)).all()  # a whole clip, or none of it
    moved = np.abs(net.x[:, :3] - x0[:, :3]).max((2, 3, 4, 5))
    assert ((moved > 0) == (level > 0)).all()
    shares.append((level > 0).mean())
  assert 0.25 < np.mean(shares) < 0.75  # 60 clips: 4 deviations of 0.065


def test_levels_follow_the_shift(inputs, monkeypatch):
  net = Network(monkeypatch)
  for shift in (1.0, 15.0):
    config = make(p_known=0.0, shift=shift)
    sigma = []
    for key in range(30):
      run(config, inputs, key)
      sigma.append(np.asarray(net.noisy[1])[..., 0].ravel())
    sigma = np.concatenate(sigma)
    # 360 levels against the distribution's quartiles: a share of a quarter has deviation 0.023.
    edges = shift_sigma(np.array([0.25, 0.5, 0.75]), shift)
    assert np.abs(np.histogram(sigma, [0, *edges, 1])[0] / sigma.size - 0.25).max() < 0.1


def test_dropped_prompts_are_zero_tokens(inputs, monkeypatch):
  net = Network(monkeypatch)
  run(make(p_drop_prompt=1.0), inputs)
  assert net.text.shape == (B, 4, 8) and not net.text.any()
  run(make(p_drop_prompt=0.0), inputs)
  np.testing.assert_array_equal(net.text.any(-1), inputs[1].prompt > 0)
  kept = []
  for key in range(20):
    run(make(p_drop_prompt=0.5), inputs, key)
    rows = np.asarray(net.text.any(-1))
    kept.append(rows.any(1))
    whole = np.asarray(inputs[1].prompt > 0)
    np.testing.assert_array_equal(rows, whole & rows.any(1, keepdims=True))  # or nothing
  assert 0.25 < np.mean(kept) < 0.75  # as above


def test_two_steps_draw_differently_and_one_step_twice_the_same(inputs, monkeypatch):
  net, seen = Network(monkeypatch), []
  for key in (0, 0, 1):
    run(make(), inputs, key)
    seen.append(np.asarray(net.x))
  np.testing.assert_array_equal(seen[0], seen[1])
  assert (seen[0] != seen[2]).mean() > 0.4


def test_a_dense_stage_sees_its_whole_clip():
  memory = MemoryConfig(window=2, persistent=4, top_k=0.4, importance="learned", rope_cap=6, sink_chunks=1)
  dense = objective.stage_memory(memory, dataclasses.replace(STAGE, dense=True), CHUNKS)
  assert (dense.window, dense.persistent, dense.top_k, dense.sink_chunks) == (CHUNKS, 0, 1.0, 0)
  assert objective.stage_memory(memory, STAGE, CHUNKS) == memory and not dense.selects


def test_the_average_moves_once_an_update():
  """Where an update is made of two gradients, the average is that of a run whose batches are twice as large."""
  averages = {}
  for accumulate, grads in ((1, [1.5, -2.5]), (2, [1.0, 2.0, -2.0, -3.0])):
    train = TrainConfig(4, (STAGE,), lr=0.1, warmup=1, ema=0.5, accumulate=accumulate)
    params = ema = {"kernel": jnp.ones((2, 2))}
    tx = optimizer(train)
    state = tx.init(params)
    for step, g in enumerate(grads):
      updates, state = tx.update({"kernel": jnp.full((2, 2), g)}, state, params)
      params = optax.apply_updates(params, updates)
      ema = averaged(train.ema, jnp.int32(step), ema, params, state)
    averages[accumulate] = ema["kernel"]
  assert (averages[1] != 1).all()
  np.testing.assert_array_equal(averages[1], averages[2])


def test_noise_levels_mix_data_and_noise():
  x, n = jnp.full((1, 1, 2, 2, 1), 3.0), jnp.full((1, 1, 2, 2, 1), -1.0)
  assert [float(add_noise(x, n, jnp.full((1, 1), s)).mean()) for s in (0.0, 0.25, 1.0)] == [3.0, 2.0, -1.0]


def counted(jaxpr, name):
  """How often a primitive stands in a program, inner ones included."""
  inner = [
    x for e in jaxpr.eqns for x in jax.tree.leaves(list(e.params.values()), is_leaf=lambda x: hasattr(x, "eqns"))
  ]
  inner = [x.jaxpr if hasattr(x, "jaxpr") else x for x in inner if hasattr(x, "eqns") or hasattr(x, "jaxpr")]
  return sum(e.primitive.name == name for e in jaxpr.eqns) + sum(counted(x, name) for x in inner)


@pytest.mark.parametrize("remat", ["none", "full", "dots"])
def test_the_backward_pass_does_not_plan_again(inputs, params, remat):
  config = make(dataclasses.replace(MODEL, remat=remat))
  value = lambda p: objective.loss(config, STAGE, p, *inputs, jax.random.key(0), INDEX)[0]
  there, back = (counted(jax.make_jaxpr(f)(params).jaxpr, "top_k") for f in (value, jax.grad(value)))
  assert there == back > 0
