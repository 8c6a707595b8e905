"""The Wan VAE against PyTorch (fixtures/make_wan_vae.py), against a second formulation, and against itself in pieces."""

import collections
import dataclasses
import functools
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import keys
from sfjax.errors import UserError
from sfjax.tensors import of_arrays
from sfjax.wan_vae import (
  Residual,
  Up,
  WanVAE,
  WanVAEConfig,
  decoder_plan,
  encoder_plan,
  from_uint8,
  nnx,
  parameter_count,
  to_uint8,
)
from sfjax.wan_vae_keys import arrays, official_name, parameters, table, to_official
from tests.fixtures.seeded import normal, weight

ORACLE = WanVAEConfig(dim=8)
SMALL = WanVAEConfig(dim=8, res_blocks=1)  # every kind of layer and of step, at half the compile time


def quick(fn, **kw):
  """jit without LLVM's optimisations: compiled three times as fast, and as fast to run at these sizes."""
  return jax.jit(fn, compiler_options={"xla_backend_optimization_level": 0}, **kw)


def from_official(cfg, given, source="vae.pth"):
  return parameters(cfg, keys.read(arrays(cfg, of_arrays(given), source, np.dtype(cfg.param_dtype))))


@functools.cache
def weights(cfg):
  """By official name. Read only."""
  return {name: weight(name, w.shape).astype(np.float32) for name, w in table(cfg).items()}


def rel(got, want):
  got, want = (np.asarray(x, np.float64) for x in (got, want))
  assert got.shape == want.shape
  return np.linalg.norm(got - want) / np.linalg.norm(want)


@pytest.fixture(scope="module")
def expected():
  with np.load(pathlib.Path(__file__).parents[1] / "fixtures" / "wan_vae.npz") as f:
    return {name: f[name] for name in f.files}


@pytest.fixture(scope="module")
def oracle():
  return from_official(ORACLE, weights(ORACLE))


@pytest.fixture(scope="module")
def small():
  """(codec, params, jitted whole-clip decode, 5 latents, jitted whole-clip encode, 13 frames)."""
  vae, params = WanVAE(SMALL), from_official(SMALL, weights(SMALL))
  latents = normal("latents", (2, 5, 2, 3, 16))
  pixels = np.clip(normal("pixels", (2, 13, 16, 24, 3)) / 2, -1, 1)
  return vae, params, quick(vae.decode), latents, quick(vae.encode), pixels


# Against PyTorch.


def pixels_and_latents():
  pixels = np.clip(normal("wan_vae.pixels", (2, 9, 24, 40, 3)) / 2, -1, 1)
  return pixels, normal("wan_vae.latents", (2, 3, 3, 5, 16))


def test_encode_and_decode_equal_pytorch(expected, oracle):
  vae = WanVAE(ORACLE)
  pixels, latents = pixels_and_latents()
  assert rel(quick(vae.encode)(oracle, pixels), expected["encoded"]) <= 1e-5
  assert rel(quick(vae.decode)(oracle, latents), expected["decoded"]) <= 1e-5
  assert (
    np.abs(expected["decoded"]).max() == 1 and np.abs(expected["decoded"]).mean() < 0.9
  )  # clipped, yet not everywhere


def test_a_block_of_full_width_equals_pytorch(expected):
  cfg, prefix = WanVAEConfig(), "encoder/blocks/3/"
  graph, state = nnx.split(nnx.eval_shape(lambda r: Residual(cfg, 96, 192, r), nnx.Rngs(0)))
  ours = {w.ours.removeprefix(prefix): (n, w) for n, w in table(cfg).items() if w.ours.startswith(prefix)}
  load = lambda n, w: w.load(weight(n, w.shape).astype(np.float32))
  name = lambda path: jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
  state = jax.tree.map_with_path(lambda path, _: load(*ours[name(path)]), state)
  x = normal("wan_vae.block", (1, 96, 3, 4, 5)).transpose(0, 2, 3, 4, 1)
  assert rel(quick(lambda s, x: nnx.merge(graph, s)(x, None, True)[0])(state, x), expected["block"]) <= 1e-5


def test_bfloat16_rounds_and_no_more(small):
  # A rounding to 8 bits errs, relative to the value and over all mantissas, by 0.0017 (rms). Norms keep sizes, so that these
  # add as independent numbers do. A residual block rounds 11 times: 2 x (norm, silu, kernel, product, bias) and the sum.
  one = 2**-7 * math.sqrt(3 / (8 * 12 * math.log(2)))
  _, params, decode, latents, encode, pixels = small
  vae = WanVAE(dataclasses.replace(SMALL, dtype="bfloat16"))
  for half, full, x, plan in (
    (vae.encode, encode, pixels, encoder_plan(SMALL)),
    (vae.decode, decode, latents, decoder_plan(SMALL)),
  ):
    roundings = sum({"residual": 11, "up": 6, "down": 6}[kind] for kind, *_ in plan) + 2 * 11 + 10 + 14
    got = quick(half)(params, x)
    assert got.dtype == jnp.float32
    assert one < rel(got, full(params, x)) < one * math.sqrt(roundings)


# Against a second formulation.


class WholeClip:
  """Section 5 of self_forcing on the whole clip at once: official names, PyTorch's layout [B,C,F,H,W], no cache, float64."""

  def __init__(self, weights):
    self.w = {name: x.astype(np.float64) for name, x in weights.items()}

  def conv(self, name, x, stride=(1, 1, 1), pad=((2, 0), (1, 1), (1, 1))):
    w = self.w[f"{name}.weight"]
    w = w[:, :, None] if w.ndim == 4 else w
    pad = ((0, 0),) * 3 if w.shape[2:] == (1, 1, 1) else pad
    y = jax.lax.conv_general_dilated(x, w, stride, pad, dimension_numbers=("NCDHW", "OIDHW", "NCDHW"))
    return y + self.w[f"{name}.bias"][:, None, None, None]

  def norm(self, name, x):
    x = x / jnp.maximum(jnp.linalg.norm(x, axis=1, keepdims=True), 1e-12)
    return x * math.sqrt(x.shape[1]) * self.w[f"{name}.gamma"].reshape(-1, 1, 1, 1)

  def block(self, name, x, up):
    if f"{name}.residual.0.gamma" in self.w:
      y = self.conv(f"{name}.residual.2", jax.nn.silu(self.norm(f"{name}.residual.0", x)))
      y = self.conv(f"{name}.residual.6", jax.nn.silu(self.norm(f"{name}.residual.3", y)))
      return y + (self.conv(f"{name}.shortcut", x) if f"{name}.shortcut.bias" in self.w else x)
    in_time, flat = f"{name}.time_conv.bias" in self.w, ((0, 0), (0, 0), (0, 0))
    if not up:
      x = self.conv(f"{name}.resample.1", x, (1, 2, 2), ((0, 0), (0, 1), (0, 1)))
      return jnp.concatenate([x[:, :, :1], self.conv(f"{name}.time_conv", x, (2, 1, 1), flat)], 2) if in_time else x
    if in_time:
      y = self.conv(f"{name}.time_conv", x[:, :, 1:], pad=((2, 0), (0, 0), (0, 0)))
      even, odd = jnp.split(y, 2, 1)
      y = jnp.stack([even, odd], 3).reshape(*even.shape[:2], -1, *even.shape[3:])
      x = jnp.concatenate([x[:, :, :1], y], 2)
    x = x.repeat(2, 3).repeat(2, 4)
    return self.conv(f"{name}.resample.1", x, pad=((0, 0), (1, 1), (1, 1)))

  def attention(self, name, x):
    b, c, f, h, w = x.shape
    q, k, v = self.conv(f"{name}.to_qkv", self.norm(f"{name}.norm", x)).reshape(b, 3, c, f, h * w).swapaxes(0, 1)
    p = jax.nn.softmax(jnp.einsum("bcfq,bcfk->bfqk", q, k) / math.sqrt(c), -1)
    return x + self.conv(f"{name}.proj", jnp.einsum("bfqk,bcfk->bcfq", p, v).reshape(x.shape))

  def side(self, side, blocks, x):
    count = 1 + max(int(n.split(".")[2]) for n in self.w if n.startswith(f"{side}.{blocks}."))
    run = lambda x: [x := self.block(f"{side}.{blocks}.{i}", x, side == "decoder") for i in range(count)][-1]
    x = self.conv(f"{side}.conv1", x)
    x = run(x) if side == "encoder" else x
    x = self.attention(f"{side}.middle.1", self.block(f"{side}.middle.0", x, False))
    x = self.block(f"{side}.middle.2", x, False)
    x = run(x) if side == "decoder" else x
    return self.conv(f"{side}.head.2", jax.nn.silu(self.norm(f"{side}.head.0", x)))

  def encode(self, pixels):
    mu = self.conv("conv1", self.side("encoder", "downsamples", jnp.moveaxis(pixels, -1, 1)))[:, :16]
    return (jnp.moveaxis(mu, 1, -1) - np.asarray(SMALL.mean)) / np.asarray(SMALL.std)

  def decode(self, latents):
    z = jnp.moveaxis(latents * np.asarray(SMALL.std) + np.asarray(SMALL.mean), -1, 1)
    return jnp.clip(jnp.moveaxis(self.side("decoder", "upsamples", self.conv("conv2", z)), 1, -1), -1, 1)


@pytest.fixture(scope="module")
def exact(small):
  """(pixels, latents): what `small` decodes and encodes to."""
  clip = WholeClip(weights(SMALL))
  with jax.enable_x64(True):
    return [np.asarray(quick(fn)(x.astype(np.float64))) for fn, x in ((clip.decode, small[3]), (clip.encode, small[5]))]


def test_the_whole_clip_at_once_is_the_same(small, exact):
  vae, params, decode, latents, encode, pixels = small
  assert rel(decode(params, latents), exact[0]) <= 1e-6
  assert rel(encode(params, pixels), exact[1]) <= 1e-6


# In pieces.


def test_decode_is_a_scan_of_the_step_bit_for_bit(small):
  vae, params, decode, latents, *_ = small

  @quick
  def scanned(params, latents):
    state = vae.init_decoder_state(2, 2, 3)
    state, y0 = vae.decode_chunk(params, state, latents[:, :1], first=True)
    step = lambda state, z: vae.decode_chunk(params, state, z[:, None])
    _, y = jax.lax.scan(step, state, jnp.moveaxis(latents[:, 1:], 1, 0))
    return jnp.concatenate([y0, *y], 1)

  whole = decode(params, latents)
  assert whole.shape == (2, 17, 16, 24, 3)
  np.testing.assert_array_equal(whole, scanned(params, latents))


def stream(run, params, state, x, sizes):
  out, at = [], 0
  for size in sizes:
    state, y = run(params, state, x[:, at : at + size], first=at == 0)
    out.append(y)
    at += size
  assert at == x.shape[1]
  return state, np.concatenate(out, 1)


def test_streams_are_the_whole_clip_and_compile_twice(small, exact):
  _, params, _, latents, _, pixels = small
  vae = WanVAE(dataclasses.replace(SMALL, dtype="float64"))  # so that nothing hides behind rounding
  traces = []

  def decode_chunk(params, state, x, first):
    traces.append(first)
    return vae.decode_chunk(params, state, x, first)

  def encode_chunk(params, state, x, first):
    traces.append(first)
    return vae.encode_chunk(params, state, x, first)

  with jax.enable_x64(True):
    run, state = quick(decode_chunk, static_argnames="first"), vae.init_decoder_state(2, 2, 3)
    used, got = stream(run, params, state, latents, (1, 1, 1, 1, 1))
    assert rel(got, exact[0]) <= 1e-12
    assert traces == [True, False]  # one program for the first latent, one for all others
    _, got = stream(run, params, used, latents, (1, 2, 2))  # a new video forgets the old
    assert rel(got, exact[0]) <= 1e-12
    traces.clear()
    run, state = quick(encode_chunk, static_argnames="first"), vae.init_encoder_state(2, 16, 24)
    _, got = stream(run, params, state, pixels, (1, 4, 4, 4))
    assert rel(got, exact[1]) <= 1e-12
    assert traces == [True, False]


def test_nothing_reaches_back_in_time(small):
  _, params, decode, latents, *_ = small
  other = latents.copy()
  other[:, 3] += 1
  a, b = decode(params, latents), decode(params, other)
  np.testing.assert_array_equal(a[:, :9], b[:, :9])
  assert (np.abs(a - b).max((0, 2, 3, 4))[9:] > 1e-3).all()


def test_the_first_latent_knows_no_time_conv(small):
  _, params, decode, latents, *_ = small
  changed = to_official(SMALL, params)
  changed = {n: 2 * x if n.startswith("decoder") and "time_conv" in n else x for n, x in changed.items()}
  a, b = decode(params, latents), decode(from_official(SMALL, changed), latents)
  np.testing.assert_array_equal(a[:, 0], b[:, 0])
  assert (np.abs(a - b).max((0, 2, 3, 4))[1:] > 1e-3).all()


def test_the_second_latent_sees_no_history_in_up_and_the_third_sees_it():
  graph, layer = nnx.split(Up(SMALL, 8, True, nnx.Rngs(0)))
  up = quick(lambda *args: nnx.merge(graph, layer)(*args), static_argnums=2)
  x = jnp.asarray(normal("up", (3, 1, 1, 2, 3, 8)))
  y0, past = up(x[0], None, True)
  y1, past1 = up(x[1], past, False)
  y2, _ = up(x[2], past1, False)
  assert y0.shape == (1, 1, 4, 6, 4) and y1.shape == (1, 2, 4, 6, 4)
  np.testing.assert_array_equal(y1, up(x[1], None, False)[0])
  np.testing.assert_array_equal(past1, jnp.concatenate([0 * x[1], x[1]], 1))
  assert rel(up(x[2], None, False)[0], y2) > 0.1


def test_state_has_the_official_caches_at_480p():
  vae = WanVAE(WanVAEConfig(dtype="bfloat16"))
  state = jax.eval_shape(lambda: vae.init_decoder_state(1, 60, 104))
  assert {x.dtype for x in jax.tree.leaves(state)} == {jnp.dtype(jnp.bfloat16)}
  assert collections.Counter(x.shape for x in jax.tree.leaves(state)) == {
    (1, 2, 60, 104, 16): 1,
    (1, 2, 60, 104, 384): 11,
    (1, 2, 120, 208, 192): 1,
    (1, 2, 120, 208, 384): 6,
    (1, 2, 240, 416, 192): 6,
    (1, 2, 480, 832, 96): 7,
  }


# Names.


def test_names_and_shapes_are_those_of_the_modules(expected):
  for theirs, official, _ in expected["names"]:
    assert official_name(theirs) == official == official_name(official)
  assert {o: tuple(map(int, s.split())) for _, o, s in expected["names"]} == {
    name: w.shape for name, w in table(ORACLE).items()
  }
  assert table(WanVAEConfig()).keys() == table(ORACLE).keys()


def test_round_trip(expected, oracle):
  given = weights(ORACLE)
  back = to_official(ORACLE, oracle)
  assert back.keys() == given.keys()
  for name, x in given.items():
    np.testing.assert_array_equal(back[name], x)
  theirs = from_official(ORACLE, {n: given[official] for n, official, _ in expected["names"]})
  jax.tree.map(np.testing.assert_array_equal, theirs, oracle)
  half = from_official(WanVAEConfig(dim=8, param_dtype="bfloat16"), given)
  assert {x.dtype for x in jax.tree.leaves(half)} == {jnp.dtype(jnp.bfloat16)}


def test_parameters():
  assert parameter_count(WanVAEConfig()) == 126_892_531
  assert parameter_count(ORACLE) == sum(math.prod(w.shape) for w in table(ORACLE).values())


@pytest.mark.parametrize(
  "change, message",
  [
    (lambda w: [w.pop(n) for n in list(w)[:4]], "lacks 4 tensors: conv1.weight, conv1.bias, encoder.conv1.weight and 1 more$"),
    (lambda w: w.update({"decoder.extra": np.zeros(3)}), "holds unexpected 1 tensor: decoder.extra$"),
    (lambda w: w.update({"conv2.bias": np.zeros(17)}), r"wrongly shaped 1 tensor: conv2.bias \[17\] \(want \[16\]\)$"),
    (lambda w: w.update({"conv2.weight": np.zeros((16, 16))}), r"conv2.weight \[16, 16\] \(want \[16, 16, 1, 1, 1\]\)$"),
    (lambda w: w.update({"quant_conv.bias": w["conv1.bias"]}), "two tensors for conv1.bias$"),
  ],
)  # fmt: skip
def test_wrong_weights_are_refused_in_one_line(change, message):
  given = dict(weights(ORACLE))
  change(given)
  with pytest.raises(UserError, match=f"^vae.pth.* {message}") as e:
    from_official(ORACLE, given, "vae.pth")
  assert "\n" not in str(e.value)


# The interface.


def test_interface():
  vae = WanVAE(WanVAEConfig())
  assert (vae.time, vae.space, vae.channels) == (4, 8, 16)
  frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
  np.testing.assert_array_equal(to_uint8(from_uint8(frames)), frames)
  assert from_uint8(frames).min() == -1 and from_uint8(frames).max() == 1


@pytest.mark.parametrize("shape", [(1, 4, 16, 24, 3), (1, 5, 12, 24, 3), (1, 5, 16, 20, 3), (1, 5, 16, 24, 4)])
def test_encode_refuses_shapes(shape, small):
  with pytest.raises(ValueError, match="pixels: shape"):
    jax.eval_shape(small[0].encode, small[1], jnp.zeros(shape))


def test_chunks_refuse_shapes(small):
  vae, params = small[:2]
  with pytest.raises(ValueError, match="want 4 n frames"):
    vae.encode_chunk(params, None, jnp.zeros((1, 5, 16, 24, 3)))
  with pytest.raises(ValueError, match="latents: shape"):
    vae.decode_chunk(params, None, jnp.zeros((1, 1, 2, 3, 8)))


@pytest.mark.parametrize("bad", [dict(dtype="float16"), dict(time_down=(True,)), dict(z_dim=4)])
def test_config_refuses(bad):
  with pytest.raises(ValueError, match="; want"):
    WanVAEConfig(**bad)
