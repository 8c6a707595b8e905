"""The UMT5-XXL text encoder of Wan2.1: prompts to token ids, ids to the rows that the DiT's cross-attention reads.

Numerics are those of self_forcing section 6. Weights live in a pure dict; `sfjax.umt5_keys` fills it from a checkpoint.

Letters: B batch, M text rows, D width, N heads, H head dim, F feed-forward width, L layers, R buckets.
"""

import dataclasses
import functools
import hashlib
import html
import pathlib
import re

import ftfy
import jax
import jax.numpy as jnp
import numpy as np
import tokenizers
from flax import nnx
from jaxtyping import Array, Float, Int, Int32

from sfjax.errors import UserError, check
from sfjax.model import rms_scale, wide


def rms_norm(x, weight, eps: float):
  """RMSNorm, wide inside, cast back before the weight."""
  y = wide(x)
  return (y * rms_scale(y, eps)).astype(x.dtype) * weight.astype(x.dtype)


@dataclasses.dataclass(frozen=True)
class UMT5Config:
  """Sizes and numerics of the encoder; the defaults are UMT5-XXL (5.68B parameters, 11.4 GB in bfloat16).

  Attributes:
    buckets: rows of a layer's table of relative biases, half for keys before the query. max_distance: where they end.
    dtype: of the computation; statistics of norms, logits and softmax are float32 in any case.
    param_dtype: of the weights as they are stored; Wan ships bfloat16.
  """

  vocab: int = 256384
  dim: int = 4096
  heads: int = 64
  head_dim: int = 64
  ffn_dim: int = 10240
  layers: int = 24
  buckets: int = 32
  max_distance: int = 128
  eps: float = 1e-6
  dtype: str = "bfloat16"
  param_dtype: str = "bfloat16"

  def __post_init__(self):
    check(
      self,
      ("buckets", self.buckets >= 4 and self.buckets % 4 == 0, "a positive multiple of 4"),
      ("max_distance", self.max_distance > self.buckets // 4, f"more than {self.buckets // 4}"),
      ("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
      ("param_dtype", self.param_dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
    )


@functools.cache
def relative_buckets(length: int, buckets: int = 32, max_distance: int = 128) -> Int[np.ndarray, "M M"]:
  """Bucket of the bias that query row i and key column j share (self_forcing section 6).

  Half of the buckets are for keys after the query. In each half, the first half holds one distance each, the rest grow
  as a geometric series that would reach `max_distance` one bucket past the last; the last takes whatever is farther.
  """
  half = buckets // 2
  exact = half // 2
  steps = half - exact
  # Step j begins at the first d with exact (max_distance / exact)^(j / steps) <= d; powers of integers cannot round.
  begins = lambda d, j: d**steps * exact**j >= exact**steps * max_distance**j
  firsts = [next(d for d in range(exact, max_distance + 1) if begins(d, j)) for j in range(1, steps)]
  ahead = np.arange(length) - np.arange(length)[:, None]
  distance = np.abs(ahead)
  table = np.where(distance < exact, distance, exact + np.searchsorted(firsts, distance, side="right"))
  table = (table + half * (ahead > 0)).astype(np.int32)
  table.flags.writeable = False  # it is shared by every caller
  return table


def _matrix(cfg: UMT5Config, rngs: nnx.Rngs, d_in: int, d_out: int) -> nnx.Param:
  kernel = jax.random.normal(rngs.params(), (d_in, d_out), jnp.float32) * d_in**-0.5
  return nnx.Param(kernel.astype(cfg.param_dtype))


class UMT5Layer(nnx.Module):
  """Self-attention with a relative bias of its own, then a gated feed-forward; both normed before, neither with biases."""

  def __init__(self, cfg: UMT5Config, rngs: nnx.Rngs):
    self.cfg = cfg
    width, ones = cfg.heads * cfg.head_dim, jnp.ones((cfg.dim,), cfg.param_dtype)
    self.norm1, self.norm2 = nnx.Param(ones), nnx.Param(ones)
    self.q, self.k, self.v = (_matrix(cfg, rngs, cfg.dim, width) for _ in range(3))
    self.o = _matrix(cfg, rngs, width, cfg.dim)
    self.position = _matrix(cfg, rngs, cfg.buckets, cfg.heads)
    self.gate, self.fc1 = (_matrix(cfg, rngs, cfg.dim, cfg.ffn_dim) for _ in range(2))
    self.fc2 = _matrix(cfg, rngs, cfg.ffn_dim, cfg.dim)

  def attention(self, x: Float[Array, "B M D"], lengths: Int32[Array, "B"]) -> Float[Array, "B M D"]:
    """Every row reads the rows before its prompt's length; the logits are not scaled by 1/sqrt(H)."""
    cfg = self.cfg
    q, k, v = (
      (x @ w[...].astype(x.dtype)).reshape(*x.shape[:-1], cfg.heads, cfg.head_dim) for w in (self.q, self.k, self.v)
    )
    buckets = relative_buckets(x.shape[1], cfg.buckets, cfg.max_distance)
    bias = jnp.moveaxis(self.position[...].astype(x.dtype)[buckets], -1, 0)  # [N,M,M]
    logits = jnp.einsum("bqnh,bknh->bnqk", q, k, preferred_element_type=jnp.float32) + bias.astype(jnp.float32)
    real = jnp.arange(x.shape[1]) < lengths[:, None]
    logits = jnp.where(real[:, None, None], logits, jnp.finfo(jnp.float32).min)
    out = jnp.einsum("bnqk,bknh->bqnh", jax.nn.softmax(logits, -1).astype(x.dtype), v)
    return out.reshape(*x.shape[:-1], -1) @ self.o[...].astype(x.dtype)

  def feed_forward(self, x: Float[Array, "B M D"]) -> Float[Array, "B M D"]:
    gate, fc1, fc2 = (w[...].astype(x.dtype) for w in (self.gate, self.fc1, self.fc2))
    return ((x @ fc1) * jax.nn.gelu(x @ gate, approximate=True)) @ fc2

  def __call__(self, x: Float[Array, "B M D"], lengths: Int32[Array, "B"]) -> Float[Array, "B M D"]:
    x = x + self.attention(rms_norm(x, self.norm1[...], self.cfg.eps), lengths)
    return x + self.feed_forward(rms_norm(x, self.norm2[...], self.cfg.eps))


class UMT5(nnx.Module):
  """Embedding, `layers` layers stacked on a leading axis and scanned, a last norm."""

  def __init__(self, cfg: UMT5Config, rngs: nnx.Rngs):
    self.cfg = cfg
    table = jax.random.normal(rngs.params(), (cfg.vocab, cfg.dim), jnp.dtype(cfg.param_dtype))
    self.embedding = nnx.Param(table)
    stack = nnx.vmap(lambda r: UMT5Layer(cfg, r), transform_metadata={nnx.PARTITION_NAME: None})
    self.layers = stack(rngs.split(cfg.layers))
    self.norm = nnx.Param(jnp.ones((cfg.dim,), cfg.param_dtype))

  def __call__(self, ids: Int32[Array, "B M"], lengths: Int32[Array, "B"]) -> Float[Array, "B M D"]:
    """Rows at or past a prompt's length are zero, and what `ids` holds there changes nothing."""
    x = self.embedding[...][ids].astype(self.cfg.dtype)
    graph, stacked = nnx.split(self.layers)
    x, _ = jax.lax.scan(lambda x, params: (nnx.merge(graph, params)(x, lengths), None), x, stacked)
    x = rms_norm(x, self.norm[...], self.cfg.eps)
    return jnp.where((jnp.arange(ids.shape[1]) < lengths[:, None])[..., None], x, 0)


@functools.cache
def _abstract(cfg: UMT5Config):
  return nnx.split(nnx.eval_shape(lambda: UMT5(cfg, nnx.Rngs(params=0))))


def abstract_umt5(cfg: UMT5Config) -> dict:
  """Shapes and dtypes of the parameters as a pure dict; no array is made."""
  return nnx.to_pure_dict(_abstract(cfg)[1])


def init_umt5(cfg: UMT5Config, seed: int = 0) -> dict:
  """Random weights as a pure dict."""
  return nnx.to_pure_dict(nnx.state(UMT5(cfg, nnx.Rngs(params=jax.random.key(seed, impl="rbg")))))


def apply_umt5(
  cfg: UMT5Config, params: dict, ids: Int32[Array, "B M"], lengths: Int32[Array, "B"]
) -> Float[Array, "B M D"]:
  """`UMT5.__call__` as a function of its parameters (a pure dict)."""
  graph, state = _abstract(cfg)
  state = jax.tree.map(lambda x: x, state)  # a fresh container: the cached one stays abstract
  nnx.replace_by_pure_dict(state, params)
  return nnx.merge(graph, state)(ids, lengths)


def clean_prompt(prompt: str, flag: str = "--prompt") -> str:
  """Mends mojibake and entities, and leaves single spaces: what Wan's tokenizer does first (self_forcing section 6).

  Not idempotent: entities that were escaped more than twice lose two levels each time.

  Raises:
    UserError: not a string, or one with a lone surrogate (bytes of a shell that were no UTF-8).
  """
  try:
    prompt.encode()
  except (AttributeError, UnicodeEncodeError) as e:
    raise UserError(f"{flag}: {prompt!r} is not valid text; want Unicode, in UTF-8") from e
  return re.sub(r"\s+", " ", html.unescape(html.unescape(ftfy.fix_text(prompt)))).strip()


@dataclasses.dataclass(frozen=True)
class UMT5Encoder:
  """Prompts to vectors, the interface of `sfjax.text.WordEncoder`.

  Attributes:
    tokenizer: path of google/umt5-xxl's tokenizer.json. length: rows M of a prompt, end-of-sequence included.
  """

  tokenizer: str
  length: int = 512
  cfg: UMT5Config = UMT5Config()

  @property
  def dim(self) -> int:
    return self.cfg.dim

  @functools.cached_property
  def _file(self) -> bytes:
    try:
      return pathlib.Path(self.tokenizer).read_bytes()
    except OSError as e:
      raise UserError(f"{self.tokenizer}: the tokenizer cannot be read ({e.strerror})") from e

  @functools.cached_property
  def _pieces(self) -> tokenizers.Tokenizer:
    try:
      pieces = tokenizers.Tokenizer.from_str(self._file.decode())
    except Exception as e:  # the library raises plain Exception
      raise UserError(f"{self.tokenizer}: not a tokenizer.json ({' '.join(str(e).split())})") from e
    pieces.no_padding()
    pieces.enable_truncation(self.length)
    highest = max(pieces.get_vocab().values(), default=0)
    if highest >= self.cfg.vocab:
      raise UserError(f"{self.tokenizer}: has an id {highest}; this model's vocabulary ends at {self.cfg.vocab - 1}")
    end = pieces.encode("").ids
    if len(end) != 1 or end[0] == 0:
      raise UserError(f"{self.tokenizer}: an empty prompt gives ids {end}; want the end-of-sequence token alone")
    return pieces

  def identity(self, weights: str) -> str:
    """Names all that an embedding depends on besides its prompt, for `TextCache`; `weights` names the checkpoint.

    Raises:
      UserError: the tokenizer file is missing.
    """
    digest = hashlib.sha256(self._file).hexdigest()
    return f"umt5 weights={weights} tokenizer={digest} length={self.length} dtype={self.cfg.dtype}"

  def tokens(self, captions: list[str], flag: str = "--prompt") -> Int32[np.ndarray, "B M"]:
    """Ids of the cleaned captions with end-of-sequence last, cut to `length` before it, 0 past the end.

    Raises:
      UserError: the tokenizer file is missing, broken or another model's; a caption is not valid text.
    """
    ids = np.zeros((len(captions), self.length), np.int32)
    for i, caption in enumerate(captions):
      row = self._pieces.encode(clean_prompt(caption, flag)).ids
      ids[i, : len(row)] = row
    return ids

  def encode(self, params: dict, ids: Int32[Array, "B M"]) -> Float[Array, "B M E"]:
    """Vectors for the DiT's cross-attention, in the compute dtype; zero past a prompt's end."""
    places = jnp.arange(1, ids.shape[1] + 1, dtype=jnp.int32)
    lengths = jnp.where(ids != 0, places, 0).max(1)  # not the count: a prompt may spell the padding token
    return apply_umt5(self.cfg, params, ids, lengths)
