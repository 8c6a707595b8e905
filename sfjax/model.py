"""The causal video DiT: exactly Wan2.1's architecture, written once for every size.

Modules hold parameters only; memory goes in and comes out as an argument. A layer's attention is passed in as a function,
so that the cached rollout and the parallel training form run the same block.

Letters: B batch, G chunks side by side, F latent frames of a chunk, T tokens of a chunk in tile order (a device's rows of them,
where devices share a chunk), N heads, H head dim,
D width, L layers, M text rows, E text width.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from pallas_kernels.add_norm import Term, add, add_norm, norm
from pallas_kernels.few_keys import few_keys
from pallas_kernels.gelu_linear import gelu_linear
from sfjax import float8
from sfjax.axes import all_tokens, heads_of_memory, mean, own_tokens, total
from sfjax.errors import check
from sfjax.rope import phase, rope_angles, rotate
from sfjax.tiles import BlockLayout

LINEAR = ("dtype", "float8")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """Sizes and numerics of the DiT.

  Attributes:
    chunk_frames: latent frames denoised together. tile, block_tokens: how tokens lie in blocks, see `BlockLayout`.
    latent_size: rows and columns of a latent frame (before the 2x2 patch).
    prediction: what the network's output means, "flow" (Wan: noise - x0) or "x0".
    importance_head: one linear map per layer and head on a block's mean values (learned importance); absent from Wan's weights.
    remat: "none", "full", or "dots" (keep matrix products); the attention's plan is kept in any case.
    linear: what the products of every token with a layer's weights take: "dtype", or "float8", see `sfjax.float8`; that model
      has other parameters, `float8.quantised` makes them, and is not trained.
  """

  dim: int
  layers: int
  heads: int
  ffn_dim: int
  text_dim: int
  text_len: int
  latent_channels: int
  latent_size: tuple[int, int]
  tile: tuple[int, int, int]
  block_tokens: int = 0
  chunk_frames: int = 3
  freq_dim: int = 256
  patch: tuple[int, int] = (2, 2)
  eps: float = 1e-6
  prediction: str = "flow"
  importance_head: bool = False
  dtype: str = "bfloat16"
  param_dtype: str = "float32"
  remat: str = "none"
  linear: str = "dtype"

  def __post_init__(self):
    counts = "dim", "layers", "ffn_dim", "text_dim", "text_len", "latent_channels", "chunk_frames"
    sizes = "latent_size", "tile", "patch"
    check(
      self,
      *((name, getattr(self, name) >= 1, "at least 1") for name in counts),
      *((name, all(n >= 1 for n in getattr(self, name)), "numbers of at least 1") for name in sizes),
      (
        "heads",
        self.heads > 0 and self.dim % (2 * self.heads) == 0,
        f"a number that splits {self.dim} into even parts",
      ),
      ("freq_dim", self.freq_dim >= 2 and self.freq_dim % 2 == 0, "an even number, at least 2"),
      ("eps", 0 < self.eps < 1, "a small positive number"),
      ("prediction", self.prediction in ("flow", "x0"), "flow or x0"),
      ("remat", self.remat in ("none", "full", "dots"), "none, full or dots"),
      ("dtype", self.dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
      ("param_dtype", self.param_dtype in ("float32", "bfloat16"), "float32 or bfloat16"),
      ("linear", self.linear in LINEAR, f"one of {', '.join(LINEAR)}"),
    )
    _ = self.layout  # refuses a patch or tile that does not divide

  @property
  def architecture(self) -> dict:
    """What two models of the same weights agree in: all but the dtypes, remat and linear of a run."""
    return {k: v for k, v in dataclasses.asdict(self).items() if k not in ("dtype", "param_dtype", "remat", "linear")}

  @property
  def head_dim(self) -> int:
    return self.dim // self.heads

  @property
  def layout(self) -> BlockLayout:
    (h, w), (ph, pw) = self.latent_size, self.patch
    if h % ph or w % pw:
      raise ValueError(f"latent_size: {self.latent_size} is not a multiple of the patch {self.patch}")
    return BlockLayout((self.chunk_frames, h // ph, w // pw), self.tile, self.block_tokens)

  @classmethod
  def digits(cls, **kw) -> "ModelConfig":
    """3.9M parameters: 64x64 pixels as 32x32x48 latents, 16x16 tokens a frame."""
    defaults = dict(
      dim=192, layers=6, heads=3, ffn_dim=768, text_dim=64, text_len=16, latent_channels=48, latent_size=(32, 32),
      tile=(3, 4, 4), prediction="x0", importance_head=True,
    )  # fmt: skip
    return cls(**{**defaults, **kw})

  @classmethod
  def wan_1_3b(cls, **kw) -> "ModelConfig":
    """Wan2.1-T2V-1.3B at 832x480."""
    defaults = dict(
      dim=1536, layers=30, heads=12, ffn_dim=8960, text_dim=4096, text_len=512, latent_channels=16,
      latent_size=(60, 104), tile=(3, 5, 1), block_tokens=64,
    )  # fmt: skip
    return cls(**{**defaults, **kw})

  @classmethod
  def wan_14b(cls, **kw) -> "ModelConfig":
    """Wan2.1-T2V-14B at 832x480."""
    return cls.wan_1_3b(**{**dict(dim=5120, layers=40, heads=40, ffn_dim=13824), **kw})


_xavier = nnx.initializers.xavier_uniform()
_small = nnx.initializers.normal(0.02)


def wide(x):
  """The same numbers in float32 at least: what lies between two products is reckoned so, and rounded once, where a product or
  the next layer takes it."""
  return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def as_used(param: nnx.Param, dtype):
  """A parameter as it is computed with in that dtype, wide."""
  return wide(param[...].astype(dtype))


class Linear(nnx.Module):
  """y = x W + b: the product in x's dtype, its sum with b wide.

  The product is kept apart from what follows: then XLA reads the layer's W where it lies in the stack. Joined with b, and
  with a GELU, it would copy W first, which pays only where the output is much wider than W is long.
  """

  def __init__(self, cfg: ModelConfig, d_in: int, d_out: int, rngs: nnx.Rngs, init=_xavier):
    self.kernel = nnx.Param(init(rngs.params(), (d_in, d_out), jnp.dtype(cfg.param_dtype)))
    self.bias = nnx.Param(jnp.zeros((d_out,), jnp.dtype(cfg.param_dtype)))

  def _times(self, x):
    """x W; with 8-bit floats it may have some rows more."""
    return x @ self.kernel[...].astype(x.dtype)

  def product(self, x):
    """x W, kept apart, and whatever rows more."""
    return jax.lax.optimization_barrier(self._times(x))

  def gelu(self, x):
    """GELU of y in x's dtype: all in one product's epilogue on a GPU, or one kernel."""
    return gelu_linear(x, self.kernel[...].astype(x.dtype), self.bias[...].astype(x.dtype))

  def finished(self, product):
    return wide(product) + as_used(self.bias, product.dtype)

  def __call__(self, x):
    return self.finished(self.product(x)[..., : x.shape[-2], :])

  def total(self, x):
    """x W, kept apart, where x and W's rows are split over devices as `sfjax.axes` says."""
    return total(self.product(x)[..., : x.shape[-2], :])

  def term(self, product, gate=None) -> Term:
    """What is added to a layer's rows, of x W by `total`."""
    return Term(product, self.bias[...].astype(product.dtype)[None, None], gate)


class Float8Linear(Linear):
  """y = x W + b, its factors rounded to 8-bit floats; x is taken as it is."""

  def __init__(self, cfg: ModelConfig, d_in: int, d_out: int, rngs: nnx.Rngs):
    dtype = jnp.dtype(cfg.param_dtype)
    self.kernel_t, self.scale = map(nnx.Param, float8.weights(_xavier(rngs.params(), (d_in, d_out), dtype)))
    self.bias = nnx.Param(jnp.zeros((d_out,), dtype))

  def _times(self, x):
    return float8.product(float8.rounded(x), self.kernel_t[...], self.scale[...], x.dtype)

  def gelu(self, x):
    return jax.nn.gelu(self._times(x) + self.bias[...].astype(x.dtype), approximate=True)


class Float8RowsLinear(Float8Linear):
  """The same for rows of any size: each has a scale."""

  def product(self, x):
    rows, scale = float8.by_rows(x)
    y = jax.lax.optimization_barrier(float8.product(rows, self.kernel_t[...], self.scale[...], x.dtype))
    return (wide(y[..., : x.shape[-2], :]) * scale).astype(x.dtype)


def rms_scale(x, eps: float):
  """What RMSNorm over the full width, all heads', multiplies each row by; x is wide."""
  return jax.lax.rsqrt(mean((x * x).mean(-1, keepdims=True)) + eps)


class Attention(nnx.Module):
  """Projections shared by self- and cross-attention: q, k, v, o with bias, RMSNorm on the whole q and k vectors."""

  def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs, key_value=Linear):
    self.cfg, self.dtype = cfg, jnp.dtype(cfg.dtype)
    query, out = (Float8Linear, Float8RowsLinear) if cfg.linear == "float8" else (Linear, Linear)
    kinds = query, key_value, key_value, out
    self.q, self.k, self.v, self.o = (kind(cfg, cfg.dim, cfg.dim, rngs) for kind in kinds)
    self.norm_q, self.norm_k = (nnx.Param(jnp.ones((cfg.dim,), jnp.dtype(cfg.param_dtype))) for _ in range(2))

  def _heads(self, x):
    return x.reshape(*x.shape[:-1], -1, self.cfg.head_dim)

  def _normed(self, linear: Linear, norm, x):
    """Heads of a product, normed over the whole width, wide."""
    y = linear(x)
    return self._heads(y * rms_scale(y, self.cfg.eps) * as_used(norm, self.dtype))

  def query(self, x: Float[Array, "B T D"]):
    """The product q [B,T,N,H], and what finishes it, as `few_keys` takes them."""
    product = self.q.product(x)[:, : x.shape[1]]
    y = self.q.finished(product)
    vectors = jnp.stack([self.q.bias[...], self.norm_q[...]]).astype(x.dtype)
    return self._heads(product), self._heads(vectors), total((y * y).sum(-1))

  def key_value(self, x: Float[Array, "*B T D"]):
    k, v = self._normed(self.k, self.norm_k, x), self._heads(self.v(x))
    return k.astype(self.dtype), v.astype(self.dtype)

  def turned(self, x: Float[Array, "*B T D"], turn):
    """Queries, keys and values [*B,T,N,H] of positions whose (cos, sin) are given."""
    q, k = self._normed(self.q, self.norm_q, x), self._normed(self.k, self.norm_k, x)
    q, k, v = rotate(q, *turn), rotate(k, *turn), self._heads(self.v(x))
    return q.astype(self.dtype), k.astype(self.dtype), v.astype(self.dtype)

  def unfinished(self, x: Float[Array, "*B T D"]):
    """The products q, k, v [*B,R,D], R >= T, and, [5,D], what finishes them: their biases and the norms' weights of q and k."""
    parts = self.q, self.k, self.v
    vectors = [*(p.bias for p in parts), self.norm_q, self.norm_k]
    return [p.product(x) for p in parts], jnp.stack([a[...] for a in vectors]).astype(x.dtype)

  def out(self, x: Float[Array, "*B T N H"]) -> Float[Array, "*B T D"]:
    """The output projection but for its bias, which `add_norm` adds."""
    return self.o.total(x.reshape(*x.shape[:-2], -1))


class Block(nnx.Module):
  """One layer: self-attention, text cross-attention, feed-forward (self_forcing section 1.3)."""

  def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
    self.cfg = cfg
    dtype = jnp.dtype(cfg.param_dtype)
    linear = Float8Linear if cfg.linear == "float8" else Linear
    self.self_attn = Attention(cfg, rngs, linear)
    self.cross_attn = Attention(cfg, rngs)  # its keys and values are the text's, found once a prompt
    self.norm3_scale = nnx.Param(jnp.ones((cfg.dim,), dtype))
    self.norm3_bias = nnx.Param(jnp.zeros((cfg.dim,), dtype))
    self.ffn_in = linear(cfg, cfg.dim, cfg.ffn_dim, rngs)
    self.ffn_out = linear(cfg, cfg.ffn_dim, cfg.dim, rngs)
    self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, cfg.dim), dtype) * cfg.dim**-0.5)
    if cfg.importance_head:
      self.importance_kernel = nnx.Param(jnp.zeros((cfg.heads, cfg.head_dim), jnp.float32))
      self.importance_bias = nnx.Param(jnp.full((cfg.heads,), -4.0, jnp.float32))  # the log of a typical attention

  def log_importance(self, content: Float[Array, "B K N H"]) -> Float[Array, "B N K"]:
    """Predicted log of the largest attention a block will get later; its mean values are constants to it."""
    x = jax.lax.stop_gradient(content).astype(jnp.float32)
    kernel, bias = (heads_of_memory(a[...], 0) for a in (self.importance_kernel, self.importance_bias))
    return jnp.einsum("bknh,nh->bnk", x, kernel, precision="highest") + bias[:, None]

  def __call__(self, x, e0, turn, text_kv, attend):
    """x [B,G,T,D]; e0 [B,G,F,6,D]; turn (cos, sin) [G,T,H/2]; text_kv: a layer's; attend(block, x, turn) -> (what `out`
    gives, ...)."""
    cfg, layout = self.cfg, self.cfg.layout
    lie = dict(run=layout.run, frames=layout.tile[0])
    # XLA's norm rounds to 8 bit itself, for products of such factors.
    how = dict(**lie, eps=cfg.eps, implementation="xla" if cfg.linear == "float8" else None)
    around = np.array([0, 1, 0, 0, 1, 0], np.float32)[:, None]  # scales are given as what 1 lacks
    m = as_used(self.modulation, x.dtype) + e0 + around
    shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = map(layout.frame_vectors, jnp.moveaxis(m, -2, 0))
    whole = lambda a: a.reshape(x.shape)
    framed = lambda a: layout.framed(whole(a))
    y = framed(x)

    product, *rest = attend(self, whole(norm(y, scale, shift, **how)), turn)
    affine = (a[...].astype(x.dtype)[None, None] for a in (self.norm3_scale, self.norm3_bias))
    y, h = add_norm(y, self.self_attn.o.term(framed(product), gate), *affine, **how)

    out = few_keys(*self.cross_attn.query(h.reshape(x.shape[0], -1, cfg.dim)), *text_kv, width=cfg.dim, eps=cfg.eps)
    term = self.cross_attn.o.term(framed(self.cross_attn.out(out)))
    y, h = add_norm(y, term, scale_ffn, shift_ffn, **how)

    # As rows alone: so GELU, and a rounding to 8 bit, join the product.
    h = h.reshape(-1, cfg.dim)
    product = self.ffn_out.total(self.ffn_in.gelu(h))[: h.shape[0]]
    return whole(add(y, self.ffn_out.term(framed(product), gate_ffn), **lie)), *rest


class DiT(nnx.Module):
  """Patches in, patches out, `layers` blocks between, stacked on a leading axis and scanned."""

  def __init__(self, cfg: ModelConfig, rngs: nnx.Rngs):
    self.cfg = cfg
    patch_dim = cfg.latent_channels * cfg.patch[0] * cfg.patch[1]
    self.patch_embedding = Linear(cfg, patch_dim, cfg.dim, rngs)
    self.text_in = Linear(cfg, cfg.text_dim, cfg.dim, rngs, _small)
    self.text_out = Linear(cfg, cfg.dim, cfg.dim, rngs, _small)
    self.time_in = Linear(cfg, cfg.freq_dim, cfg.dim, rngs, _small)
    self.time_out = Linear(cfg, cfg.dim, cfg.dim, rngs, _small)
    self.time_projection = Linear(cfg, cfg.dim, 6 * cfg.dim, rngs)
    self.blocks = nnx.vmap(lambda r: Block(cfg, r), transform_metadata={nnx.PARTITION_NAME: None})(
      rngs.split(cfg.layers)
    )
    self.head_modulation = nnx.Param(
      jax.random.normal(rngs.params(), (2, cfg.dim), jnp.dtype(cfg.param_dtype)) * cfg.dim**-0.5
    )
    self.head = Linear(cfg, cfg.dim, patch_dim, rngs, nnx.initializers.zeros)

  def text_kv(self, text: Float[Array, "B M E"]):
    """What cross-attention reads: keys and values of every layer [L,B,M,N,H], and how many rows of a prompt differ [L,B].

    Rows past the text are zeros, never masked: the first of them is one that differs, the others are like it.
    """
    dtype = jnp.dtype(self.cfg.dtype)
    h = jax.nn.gelu(self.text_in(text.astype(dtype)), approximate=True)
    h = self.text_out(h.astype(dtype)).astype(dtype)
    graph, stacked = nnx.split(self.blocks)
    k, v = jax.lax.map(lambda p: nnx.merge(graph, p).cross_attn.key_value(h), stacked)
    row = jnp.arange(text.shape[1])
    last = jnp.where((text != 0).any(-1), row, -1).max(-1)
    distinct = jnp.minimum(last + 2, text.shape[1]).astype(jnp.int32)
    return k, v, jnp.broadcast_to(distinct, (self.cfg.layers, *distinct.shape))

  def log_importance(self, content: Float[Array, "L B K N H"]) -> Float[Array, "L B N K"]:
    """`Block.log_importance` of every layer."""
    graph, stacked = nnx.split(self.blocks)
    return jax.vmap(lambda p, c: nnx.merge(graph, p).log_importance(c))(stacked, content)

  def __call__(
    self,
    x: Float[Array, "B G F h w C"],
    t: Float[Array, "B G F"],
    chunk: Float[Array, "G"],
    text_kv: tuple[Array, Array, Array],
    attend: Callable[..., tuple[Array, Any, Any]],
    layer_inputs: Any = None,
    carry: Any = None,
  ):
    """One pass over G chunks.

    Args:
      x: noisy or clean latents. t: timestep of every latent frame, 0..1000. chunk: index of each chunk in its video.
      text_kv: from `text_kv`.
      attend: (block, carry, layer_input, h [B,G,T,D], turn) -> (product [B,G,T,D], carry, aux), called in each layer. It
        applies `block.self_attn`'s projections and norms itself: a kernel may join them, and `out`, whose product it
        returns, may see its rows in another order.
      layer_inputs: a pytree with a leading layer axis, handed to `attend` layer by layer. carry: one handed from layer to
        layer.

    Returns:
      The prediction [B,G,F,h,w,C] in float32, the carry after the last layer, and aux stacked over layers.
    """
    h, e, layer, inputs = self._entered(x, t, chunk, text_kv, attend, layer_inputs)
    (h, carry), aux = jax.lax.scan(layer, (h, carry), inputs)

    cfg, layout = self.cfg, self.cfg.layout
    shift, scale = (
      layout.frame_vectors(a)
      for a in jnp.moveaxis(as_used(self.head_modulation, jnp.dtype(cfg.dtype)) + e[..., None, :], -2, 0)
    )
    h = norm(layout.framed(h), 1 + scale, shift, run=layout.run, frames=layout.tile[0], eps=cfg.eps).reshape(h.shape)
    h = all_tokens(self.head(h), layout.tokens)
    out = unpatchify(layout.from_tiles(h), cfg.patch, x.shape)
    return out, carry, aux

  def attended(self, x, t, chunk, text_kv, attend, layer_inputs=None, carry=None):
    """The carry and aux of `__call__` for a pass whose prediction nobody wants: it ends with the last layer's attention.

    Forward only.
    """
    h, _, layer, inputs = self._entered(x, t, chunk, text_kv, attend, layer_inputs)
    last = self.cfg.layers - 1
    at = lambda i: jax.tree.map(
      lambda x: jax.lax.dynamic_index_in_dim(x, i, 0, False, allow_negative_indices=False), inputs
    )
    put = lambda all, own, i: jax.tree.map(lambda x, y: jax.lax.dynamic_update_index_in_dim(x, y, i, 0), all, own)

    def step(state):  # a loop's own counter: of slices at another number XLA makes copies
      i, h, carry, aux = state
      (h, carry), own = layer((h, carry), at(i))
      return i + 1, h, carry, put(aux, own, i)

    one = jax.eval_shape(lambda: layer((h, carry), at(0))[1])
    aux = jax.tree.map(lambda x: jnp.zeros((last + 1, *x.shape), x.dtype), one)
    _, h, carry, aux = jax.lax.while_loop(lambda state: state[0] < last, step, (jnp.int32(0), h, carry, aux))
    (_, carry), own = layer((h, carry), at(last))  # what of it nobody reads is not compiled
    return carry, put(aux, own, last)

  def _entered(self, x, t, chunk, text_kv, attend, layer_inputs):
    """A pass up to its layers: rows h [B,G,T,D], the time e [B,G,F,D], the function of a layer for a scan, and its inputs."""
    cfg, layout = self.cfg, self.cfg.layout
    dtype = jnp.dtype(cfg.dtype)
    freqs = 10000.0 ** (-np.arange(cfg.freq_dim // 2) / (cfg.freq_dim // 2))
    angle = phase(t, freqs)
    e = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1).astype(dtype)
    e = self.time_out(jax.nn.silu(self.time_in(e)).astype(dtype))
    e0 = self.time_projection(jax.nn.silu(e).astype(dtype)).reshape(*e.shape[:-1], 6, cfg.dim)

    f, row, col = layout.positions.T
    frame = jnp.asarray(chunk)[:, None] * cfg.chunk_frames + f
    angles = rope_angles(frame, row, col, cfg.head_dim)
    turn = own_tokens(jnp.cos(angles), layout.shared_rows), own_tokens(jnp.sin(angles), layout.shared_rows)

    rows = own_tokens(layout.to_tiles(patchify(x.astype(dtype), cfg.patch)), layout.shared_rows)
    h = self.patch_embedding(rows).astype(dtype)
    graph, stacked = nnx.split(self.blocks)
    stacked, unpack = _pack_vectors(stacked, jnp.dtype(cfg.param_dtype), cfg.dim)
    *cross, distinct = text_kv
    distinct = distinct[0]  # of no layer alone

    def layer(state, inputs):
      h, carry = state
      params, kv, extra = inputs
      block = nnx.merge(graph, unpack(params))
      with jax.named_scope("layers"):
        h, carry, aux = block(h, e0, turn, (*kv, distinct), lambda b, *x: attend(b, carry, extra, *x))
      return (h, carry), aux

    return h, e, _remat(layer, cfg.remat), (stacked, cross, layer_inputs)


def _pack_vectors(stacked, dtype, widest: int):
  """A stack of layers with its vectors and numbers of that dtype in one array, and the way back for a layer's slice of it.

  A loop slices every array of the stack in a kernel of its own, which for a vector takes longer to start than to run. Those
  wider than the model stay as they are: they join a product, for which they would have to be cut out again.
  """
  leaves, tree = jax.tree.flatten(stacked)
  vectors = {i: x.shape[1] for i, x in enumerate(leaves) if x.ndim == 2 and x.dtype == dtype and x.shape[1] <= widest}
  numbers = [i for i, x in enumerate(leaves) if x.ndim == 1 and x.dtype == dtype]
  packed = jnp.concatenate([*(leaves[i] for i in vectors), *(leaves[i][:, None] for i in numbers)], 1)

  def unpack(packed_and_rest):
    row, rest = packed_and_rest
    # The barrier keeps XLA from slicing the stack once for each vector after all.
    *parts, last = jnp.split(jax.lax.optimization_barrier(row), np.cumsum([*vectors.values()]))
    parts, rest = dict(zip(vectors, parts, strict=True)), iter(rest)
    # Numbers are float32 where products use them; the barrier keeps them in one kernel.
    parts |= dict(zip(numbers, jax.lax.optimization_barrier([*wide(last)]), strict=True))
    return jax.tree.unflatten(tree, [parts[i] if i in parts else next(rest) for i in range(len(leaves))])

  return (packed, [x for i, x in enumerate(leaves) if i not in {*vectors, *numbers}]), unpack


def _remat(fn, policy: str):
  if policy == "none":
    return fn
  keep = jax.checkpoint_policies
  plan = keep.save_only_these_names("plan")  # small, and long to find again
  products = keep.save_only_these_names("plan", "pbsa")
  dots = keep.save_from_both_policies(keep.dots_with_no_batch_dims_saveable, products)
  return jax.checkpoint(fn, policy={"full": plan, "dots": dots}[policy])


def patchify(x: Float[Array, "B G F h w C"], patch: tuple[int, int]) -> Float[Array, "B G tokens P"]:
  """2x2 patches in raster order, channel slowest within a patch (a Conv3d kernel's order)."""
  b, g, f, h, w, c = x.shape
  ph, pw = patch
  x = x.reshape(b, g, f, h // ph, ph, w // pw, pw, c).transpose(0, 1, 2, 3, 5, 7, 4, 6)
  return x.reshape(b, g, -1, c * ph * pw)


def unpatchify(x: Float[Array, "B G tokens P"], patch: tuple[int, int], shape) -> Float[Array, "B G F h w C"]:
  """Inverse of patchify's geometry, but channel fastest within a patch, as Wan's head writes it."""
  b, g, f, h, w, c = shape
  ph, pw = patch
  x = x.reshape(b, g, f, h // ph, w // pw, ph, pw, c).transpose(0, 1, 2, 3, 5, 4, 6, 7)
  return x.reshape(shape)


def init_dit(cfg: ModelConfig, seed: int = 0) -> tuple[nnx.GraphDef, nnx.State]:
  """Random weights (self_forcing section 1.6): (graphdef, params)."""
  return nnx.split(DiT(cfg, nnx.Rngs(params=jax.random.key(seed, impl="rbg"))))


def parameter_count(cfg: ModelConfig) -> int:
  """Counted on shapes; no array is made."""
  params = jax.eval_shape(lambda: init_dit(cfg)[1])
  return sum(int(np.prod(p.shape)) for p in jax.tree.leaves(params))
