"""The DiT against Wan2.1's forward pass written again in float64 NumPy, its sizes, and its bfloat16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sfjax import rollout
from sfjax.model import ModelConfig, parameter_count
from tests.memory.test_equality import random_params, tiny

MODEL = tiny(latent_size=(8, 12), tile=(1, 2, 3), importance_head=False)
CHUNKS = np.array([0, 5])  # two chunks side by side, the second one late


@pytest.mark.parametrize(
  ("model", "count"), [(ModelConfig.wan_1_3b(), 1_418_996_800), (ModelConfig.wan_14b(), 14_288_491_584)]
)
def test_wan_has_exactly_its_parameters(model, count):
  assert parameter_count(model) == count
  names = [
    jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(rollout.abstract_params(model))
  ]
  assert not any("importance" in name for name in names)


def test_digits_is_small_and_has_an_importance_head():
  model = ModelConfig.digits()
  assert 3_000_000 < parameter_count(model) <= 6_000_000
  assert set(rollout.abstract_params(model)["blocks"]) >= {"importance_kernel", "importance_bias"}


def test_fresh_weights_follow_wan():
  params = jax.tree.map(np.asarray, rollout.init_params(tiny(latent_size=(8, 8), tile=(3, 2, 4))))
  assert not params["head"]["kernel"].any() and not params["blocks"]["ffn_in"]["bias"].any()
  assert (params["blocks"]["cross_attn"]["norm_q"] == 1).all()
  kernel = params["blocks"]["self_attn"]["q"]["kernel"]
  assert abs(np.abs(kernel).max() / np.sqrt(6 / 64) - 1) < 0.02  # xavier: uniform up to sqrt(6 / (in + out))
  assert abs(params["text_in"]["kernel"].std() / 0.02 - 1) < 0.2
  assert len({k.tobytes() for k in kernel}) == 3  # every layer its own


# The reference: one video's chunk at a time, tokens in raster order, every array float64, names as in self_forcing.md.


def linear(p, x):
  return x @ p["kernel"] + p["bias"]


def silu(x):
  return x / (1 + np.exp(-x))


def gelu_tanh(x):
  return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def ln(x):
  return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-6)


def rms(x, weight):
  return x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * weight


def softmax_attention(q, k, v):
  s = np.einsum("qnh,knh->nqk", q, k) / np.sqrt(q.shape[-1])
  p = np.exp(s - s.max(-1, keepdims=True))
  return np.einsum("nqk,knh->qnh", p / p.sum(-1, keepdims=True), v)


def rope(x, positions):
  """x [T,N,H]; positions [T,3]; complex channels split c - 2(c//3), c//3, c//3."""
  c = x.shape[-1] // 2
  turns = []
  for axis, n in enumerate((c - 2 * (c // 3), c // 3, c // 3)):
    turns.append(positions[:, axis, None] * 10000.0 ** (-2 * np.arange(n) / (2 * n)))
  z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * np.concatenate(turns, -1))[:, None]
  return np.stack([z.real, z.imag], -1).reshape(x.shape)


def wan_forward(p, x, t, first_frame, text, heads, freq_dim):
  """x [F,h,w,C], t [F], text [M,E] -> [F,h,w,C]."""
  f, h, w, c = x.shape
  d = p["patch_embedding"]["bias"].shape[0]
  kernel = p["patch_embedding"]["kernel"].reshape(c, 2, 2, d)  # a Conv3d's: channel, row, column
  y = np.einsum("firjsc,crsd->fijd", x.reshape(f, h // 2, 2, w // 2, 2, c), kernel) + p["patch_embedding"]["bias"]
  per_frame = h * w // 4
  y = y.reshape(f * per_frame, d)
  positions = np.stack(np.meshgrid(np.arange(f), np.arange(h // 2), np.arange(w // 2), indexing="ij"), -1)
  positions = positions.reshape(-1, 3) + [first_frame, 0, 0]

  freqs = 10000.0 ** (-np.arange(freq_dim // 2) / (freq_dim // 2))
  e = np.concatenate([np.cos(t[:, None] * freqs), np.sin(t[:, None] * freqs)], -1)
  e = linear(p["time_out"], silu(linear(p["time_in"], e)))
  e0 = linear(p["time_projection"], silu(e)).reshape(f, 6, d)
  text = linear(p["text_out"], gelu_tanh(linear(p["text_in"], text)))

  split = lambda z: z.reshape(*z.shape[:-1], heads, -1)
  for i in range(len(p["blocks"]["modulation"])):
    b = jax.tree.map(lambda a, i=i: a[i], p["blocks"])
    m = np.repeat(b["modulation"] + e0, per_frame, 0)  # [T,6,D]
    z, a = ln(y) * (1 + m[:, 1]) + m[:, 0], b["self_attn"]
    q = rope(split(rms(linear(a["q"], z), a["norm_q"])), positions)
    k = rope(split(rms(linear(a["k"], z), a["norm_k"])), positions)
    z = softmax_attention(q, k, split(linear(a["v"], z)))
    y = y + linear(a["o"], z.reshape(y.shape)) * m[:, 2]
    z, a = ln(y) * b["norm3_scale"] + b["norm3_bias"], b["cross_attn"]
    q, k = split(rms(linear(a["q"], z), a["norm_q"])), split(rms(linear(a["k"], text), a["norm_k"]))
    y = y + linear(a["o"], softmax_attention(q, k, split(linear(a["v"], text))).reshape(y.shape))
    z = ln(y) * (1 + m[:, 4]) + m[:, 3]
    y = y + linear(b["ffn_out"], gelu_tanh(linear(b["ffn_in"], z))) * m[:, 5]

  m = np.repeat(p["head_modulation"] + e[:, None], per_frame, 0)
  out = linear(p["head"], ln(y) * (1 + m[:, 1]) + m[:, 0]).reshape(f, h // 2, w // 2, 2, 2, c)  # channel fastest
  return np.einsum("fijrsc->firjsc", out).reshape(x.shape)


def whole_chunk(block, carry, extra, h, turn):
  """Every token of a chunk attends to all of its chunk."""
  q, k, v = block.self_attn.turned(h, turn)
  s = jnp.einsum("bgqnh,bgknh->bgnqk", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
  out = jnp.einsum("bgnqk,bgknh->bgqnh", jax.nn.softmax(s, -1).astype(v.dtype), v)
  return block.self_attn.out(out), carry, None


@pytest.fixture(scope="module")
def inputs():
  rng = np.random.default_rng(3)
  x = rng.normal(size=(2, len(CHUNKS), 3, *MODEL.latent_size, MODEL.latent_channels)).astype(np.float32)
  t = rng.uniform(0, 1000, (2, len(CHUNKS), 3)).astype(np.float32)
  t[0, 0, 1], t[1, 1, 2] = 0, 937.5
  text = rng.normal(size=(2, MODEL.text_len, MODEL.text_dim)).astype(np.float32)
  text[1, 2:] = 0  # rows past the end are attended to, all the same
  return x, t, text


def forward(model, params, x, t, text):
  def f(x, t, text):
    return rollout.apply(model, params, x, t, jnp.asarray(CHUNKS), rollout.text_kv(model, params, text), whole_chunk)[0]

  return np.asarray(jax.jit(f)(x, t, text))


def distance(a, b):
  return np.linalg.norm(a - b) / np.linalg.norm(b)


def test_forward_equals_wan_in_float64(inputs):
  x, t, text = inputs
  params = random_params(MODEL, 4)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  want = np.empty(x.shape)
  for b, g in np.ndindex(2, len(CHUNKS)):
    chunk, times, words = (a.astype(np.float64) for a in (x[b, g], t[b, g], text[b]))
    want[b, g] = wan_forward(p, chunk, times, 3 * CHUNKS[g], words, MODEL.heads, MODEL.freq_dim)
  # Some 60 roundings in a row, each of 6e-8 relative, grow like a random walk times the network's gain of a few.
  assert distance(forward(MODEL, params, x, t, text), want) <= 1e-5


def test_bfloat16_errs_no_more_than_a_few_of_its_own_roundings(inputs):
  x, t, text = inputs
  half = tiny(latent_size=(8, 12), tile=(1, 2, 3), importance_head=False, dtype="bfloat16")
  params = random_params(MODEL, 5)
  exact = forward(MODEL, params, x, t, text)
  rounded = jax.tree.map(lambda a: a.astype(jnp.bfloat16).astype(jnp.float32), params)
  own = distance(forward(MODEL, rounded, jnp.asarray(x).astype(jnp.bfloat16).astype(jnp.float32), t, text), exact)
  out = forward(half, params, x, t, text)
  assert out.dtype == np.float32
  # Weights and input are rounded once; the activations of 3 layers some 30 times more, at most that often in a row.
  assert own / 2 < distance(out, exact) < 4 * own


def test_rows_past_the_text_are_alike():
  """Which `few_keys` is told, of every layer."""
  text = jax.random.normal(jax.random.key(3), (4, MODEL.text_len, MODEL.text_dim))
  rows = jnp.array([0, 3, MODEL.text_len - 1, MODEL.text_len])
  text = jnp.where(jnp.arange(MODEL.text_len)[:, None] < rows[:, None, None], text, 0)
  k, v, distinct = rollout.text_kv(MODEL, rollout.init_params(MODEL), text)
  np.testing.assert_array_equal(distinct, [[1, 4, MODEL.text_len, MODEL.text_len]] * MODEL.layers)
  for x in (k, v):
    assert not np.array_equal(x[:, 1, 2], x[:, 1, 3])
    for layer, video in np.ndindex(*distinct.shape):
      like = x[layer, video, int(distinct[layer, video]) - 1 :]
      np.testing.assert_allclose(like, jnp.broadcast_to(like[:1], like.shape), rtol=1e-5, atol=1e-6)
