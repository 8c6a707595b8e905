"""Schedules and samplers against oracles that know the clean latents."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax.flow import SamplerConfig, add_noise, denoise, flow_loss, to_velocity, to_x0
from tests.memory.test_equality import tiny

MODELS = {name: tiny(latent_size=(4, 6), tile=(1, 2, 3), prediction=name) for name in ("flow", "x0")}
SHAPE = (2, 3, 4, 6, 3)


@pytest.fixture(scope="module")
def drawn():
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=SHAPE), jnp.float32) for _ in range(3))


@pytest.fixture(scope="module")
def keys():
  return jax.random.split(jax.random.key(1), SHAPE[0])


def test_schedule_is_self_forcings():
  sigmas = SamplerConfig("few_step", steps=4, shift=5).sigmas
  np.testing.assert_allclose(1000 * sigmas, [1000, 937.5, 2500 / 3, 625, 0], rtol=1e-6)
  for steps, shift in ((1, 5), (20, 15), (60, 1)):
    sigmas = SamplerConfig(steps=steps, shift=shift).sigmas
    assert (sigmas[0], sigmas[-1], len(sigmas)) == (1, 0, steps + 1) and (np.diff(sigmas) < 0).all()


@pytest.mark.parametrize("name", MODELS)
def test_one_few_step_returns_the_prediction(name, drawn, keys):
  out, noise, _ = drawn
  x0 = denoise(MODELS[name], SamplerConfig("few_step", steps=1), lambda x, s, _: (out, None), noise, keys)[0]
  np.testing.assert_array_equal(x0, out if name == "x0" else noise - out)


@pytest.mark.parametrize(("steps", "shift"), [(1, 5), (20, 5), (20, 15), (60, 5), (20, 1)])
@pytest.mark.parametrize("name", MODELS)
def test_euler_with_an_oracle_arrives(name, steps, shift, drawn, keys):
  x0, noise, _ = drawn
  oracle = lambda x, s, n: (x0 if name == "x0" else noise - x0, n + 1)
  got, passes = denoise(MODELS[name], SamplerConfig("euler", steps, shift), oracle, noise, keys, state=0)
  assert passes == steps
  np.testing.assert_allclose(got, x0, atol=1e-6 * steps**0.5 + 2e-6)  # |x| < 6; every step rounds once, 4e-7


@pytest.mark.parametrize("kind", ["euler", "few_step"])
def test_what_the_network_sees_on_the_way(kind, drawn, keys):
  """The levels of the schedule, the clean part of x, fresh noise in every step of few_step; known frames clean at 0."""
  x0, noise, known = drawn
  sampler, given, seen = SamplerConfig(kind, steps=3, shift=5), jnp.array([True, False, False]), []
  model = MODELS["x0"]

  def predict(x, sigma, state):
    seen.append((np.asarray(x), np.asarray(sigma)))
    return x0, state

  with jax.disable_jit():
    out, _ = denoise(model, sampler, predict, noise, keys, known, given)
  assert len(seen) == 3
  noises = []
  for (x, sigma), level in zip(seen, sampler.sigmas, strict=False):
    np.testing.assert_array_equal(sigma, np.broadcast_to([0, level, level], sigma.shape))
    np.testing.assert_array_equal(x[:, 0], known[:, 0])
    noises.append((x[:, 1:] - (1 - level) * np.asarray(x0)[:, 1:]) / level)
  np.testing.assert_array_equal(noises[0], noise[:, 1:])
  np.testing.assert_array_equal(out[:, 0], known[:, 0])
  np.testing.assert_allclose(out[:, 1:], x0[:, 1:], atol=4e-6)  # as above
  if kind == "euler":
    np.testing.assert_allclose(noises[2], noises[0], atol=1e-5)  # roundings of 4e-7, divided by 0.7 and 0.6
  else:
    draws = np.stack(noises).reshape(6, -1)  # three steps of two videos, 144 numbers each
    assert np.abs(np.corrcoef(draws) - np.eye(6)).max() < 0.35  # 4 deviations of 1/12
    assert np.abs(draws.std(1) - 1).max() < 0.25 and np.abs(draws.mean(1)).max() < 0.35


@pytest.mark.parametrize("name", MODELS)
def test_loss_of_an_oracle_is_zero_and_of_an_error_its_square(name, drawn):
  x0, noise, error = drawn
  model, sigma = MODELS[name], jnp.asarray([[0.0, 0.04, 0.1], [0.3, 0.9, 1.0]])
  x = add_noise(x0, noise, sigma)
  right = x0 if name == "x0" else noise - x0
  assert not flow_loss(model, right, x, x0, noise, sigma).any()
  got = flow_loss(model, right + error, x, x0, noise, sigma)
  square = (np.asarray(error, np.float64) ** 2).mean((2, 3, 4))
  bounded = np.maximum(sigma, 0.1) if name == "x0" else 1
  np.testing.assert_allclose(got, square / bounded**2, rtol=1e-4)  # error is lost in right + error to 4e-7 / 0.1


@pytest.mark.parametrize("name", MODELS)
def test_conversions_agree(name, drawn):
  x0, noise, _ = drawn
  sigma = jnp.asarray([[0.1, 0.2, 0.3], [0.5, 0.9, 1.0]])
  x, model = add_noise(x0, noise, sigma), MODELS[name]
  right = x0 if name == "x0" else noise - x0
  np.testing.assert_allclose(to_x0(model, right, x, sigma), x0, atol=2e-6)  # |x| < 6
  np.testing.assert_allclose(to_velocity(model, right, x, sigma), noise - x0, atol=2e-5)  # divided by 0.1


@pytest.mark.parametrize(
  ("field", "value"),
  [
    ("kind", "heun"),
    ("steps", 0),
    ("shift", 0.0),
    ("guidance", -1.0),
    ("guidance", float("nan")),
    ("routing", "never"),
    ("commit", "none"),
    ("last_sigma", 0.99),
    ("last_sigma", -0.1),
  ],
)
def test_a_bad_sampler_is_refused(field, value):
  with pytest.raises(ValueError, match=f"^{field}: "):
    SamplerConfig(**{field: value})


def test_the_last_step_may_have_a_noise_of_its_own():
  usual, own = (SamplerConfig("few_step", 4, 15.0, last_sigma=sigma) for sigma in (0.0, 0.4))
  np.testing.assert_array_equal(own.sigmas, np.float32([*usual.sigmas[:3], 0.4, 0.0]))
  with pytest.raises(ValueError, match="last_sigma: 0.4; want more than one step"):
    SamplerConfig(steps=1, last_sigma=0.4)
