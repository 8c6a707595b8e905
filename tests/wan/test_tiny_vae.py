"""TAEHV's decoder against PyTorch (fixtures/make_tiny_vae.py), in pieces, and its names."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax.errors import UserError
from sfjax.tiny_vae import TinyVAE, TinyVAEConfig, from_official
from tests.fixtures.seeded import normal, weight
from tests.wan.test_vae import quick, rel, stream


@pytest.fixture(scope="module")
def expected():
  with np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "tiny_vae.npz") as f:
    return {name: f[name] for name in f.files}


@pytest.fixture(scope="module")
def weights(expected):
  return {n: weight(n, tuple(map(int, s.split()))).astype(np.float32) for n, s in expected["names"]}


@pytest.fixture(scope="module")
def params(weights):
  return from_official(TinyVAEConfig(), {"encoder.0.weight": np.zeros(1)} | weights)


LATENTS = normal("tiny_vae.latents", (2, 4, 2, 3, 16))


def test_decode_equals_pytorch(expected, params):
  vae = TinyVAE()
  assert (vae.time, vae.space, vae.channels) == (4, 8, 16)
  assert rel(quick(vae.decode)(params, LATENTS), expected["decoded"]) <= 1e-5
  assert np.mean(np.abs(expected["decoded"]) < 1) > 0.3  # not all of it is clipped


def test_a_stream_is_the_whole_clip_and_compiles_twice(expected, params):
  vae, traces = TinyVAE(), []

  def chunk(params, state, x, first):
    traces.append(first)
    return vae.decode_chunk(params, state, x, first)

  run = quick(chunk, static_argnames="first")
  used, got = stream(run, params, vae.init_decoder_state(2, 2, 3), LATENTS, (1, 1, 1, 1))
  assert rel(got, expected["decoded"]) <= 1e-5 and traces == [True, False]
  _, again = stream(run, params, used, LATENTS, (1, 1, 1, 1))  # a new video forgets the old
  np.testing.assert_array_equal(again, got)


def test_a_wider_map_gives_its_last_frame(weights, params):
  wide = weights | {"decoder.7.conv.weight": np.concatenate([0 * (w := weights["decoder.7.conv.weight"]), w])}
  jax.tree.map(np.testing.assert_array_equal, from_official(TinyVAEConfig(), wide), params)


def test_wrong_weights_and_shapes_are_refused(weights, params):
  for change, message in (
    ({"decoder.23.bias": np.zeros(3)}, "^tae.pth holds unexpected 1 tensor: decoder.23.bias$"),
    ({"decoder.1.bias": np.zeros(3)}, "^tae.pth holds wrongly shaped 1 tensor: decoder.1.bias"),
  ):
    with pytest.raises(UserError, match=message):
      from_official(TinyVAEConfig(), weights | change, "tae.pth")
  lacking = {n: x for n, x in weights.items() if n != "decoder.22.bias"}
  with pytest.raises(UserError, match="^tae.pth lacks 1 tensor: decoder.22.bias$"):
    from_official(TinyVAEConfig(), lacking, "tae.pth")
  with pytest.raises(ValueError, match="latents: shape"):
    TinyVAE().decode(params, jnp.zeros((1, 2, 2, 3, 48)))
  with pytest.raises(ValueError, match="time_up: .*; want"):
    TinyVAEConfig(time_up=(True,))
