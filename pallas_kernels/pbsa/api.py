"""The public call: checks arguments, picks an implementation, falls back where one does not support the shapes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels.device import current_device, multiprocessors
from pallas_kernels.implementations import always, chosen
from pallas_kernels.pbsa import cudnn, mosaic_sm90
from pallas_kernels.pbsa.lists import BLOCK, TILE
from pallas_kernels.pbsa.mosaic_sm90_config import choose_config
from pallas_kernels.pbsa.reference import pbsa_xla

_DTYPES = (jnp.float32, jnp.bfloat16, jnp.float16)


def _check(q, k, v, ids, counts, prefix_blocks, prefix_k, kv_valid, kv_short, layer, kv_grad_range):
  if q.ndim != 4:
    raise ValueError(f"q: shape {q.shape}; want [B,T,N,H]")
  b, t, n, h = q.shape
  want = "[L,B,S,N,H] with layer" if layer is not None else "[B,S,N,H]"
  if k.ndim != (4 if layer is None else 5):
    raise ValueError(f"k: shape {k.shape}; want {want}")
  if k.shape[-4] != b or k.shape[-2:] != (n, h):
    raise ValueError(f"k: shape {k.shape} does not fit q {q.shape}; want {want}")
  if v.shape != k.shape:
    raise ValueError(f"v: shape {v.shape}; want k's shape {k.shape}")
  if t % TILE:
    raise ValueError(f"q: T = {t} rows; want a multiple of {TILE}")
  if k.shape[-3] % BLOCK:
    raise ValueError(f"k: S = {k.shape[-3]} slots; want a multiple of {BLOCK}")
  if q.dtype not in _DTYPES:
    raise ValueError(f"q: dtype {q.dtype}; want float32, bfloat16 or float16")
  for name, x in (("k", k), ("v", v), ("prefix_k", prefix_k)):
    if x is not None and x.dtype != q.dtype:
      raise ValueError(f"{name}: dtype {x.dtype}; want q's dtype {q.dtype}")
  if prefix_k is not None:
    own = prefix_k.shape
    if (*own[:-3], *own[-2:]) != (*k.shape[:-3], n, h) or own[-3] % BLOCK:
      layers = "L," * (layer is not None)
      raise ValueError(f"prefix_k: shape {own}; want [{layers}B,{BLOCK} x blocks,N,H] = [{layers}{b},..,{n},{h}]")
    if own[-3] > k.shape[-3]:
      raise ValueError(f"prefix_k: {own[-3]} slots; want at most S = {k.shape[-3]}")
  if ids.ndim != 4 or ids.shape[:3] != (b, n, t // TILE):
    raise ValueError(f"block_ids: shape {ids.shape}; want [B,N,Q,Kmax] = [{b},{n},{t // TILE},Kmax]")
  if counts.shape != ids.shape[:3]:
    raise ValueError(f"block_counts: shape {counts.shape}; want [B,N,Q] = {ids.shape[:3]}")
  for name, x in (("block_ids", ids), ("block_counts", counts)):
    if x.dtype != jnp.int32:
      raise ValueError(f"{name}: dtype {x.dtype}; want int32")
  if not 1 <= kv_valid <= BLOCK:
    raise ValueError(f"kv_valid: {kv_valid}; want 1..{BLOCK}")
  blocks = k.shape[-3] // BLOCK
  if kv_short is not None:
    short, few = kv_short
    if short.step < 1 or not all(0 <= block < blocks for block in (*short[:1], *short[-1:])):
      raise ValueError(f"kv_short: {short}; want an ascending range in 0..{blocks - 1}, the blocks of k")
    if not 1 <= few <= kv_valid:
      raise ValueError(f"kv_short: {few} slots; want 1..{kv_valid}, kv_valid")
  most = blocks if prefix_k is None else min(blocks, prefix_k.shape[-3] // BLOCK)
  if isinstance(prefix_blocks, int) and not 0 <= prefix_blocks <= most:
    raise ValueError(f"prefix_blocks: {prefix_blocks}; want 0..{most}, the blocks of k (and of prefix_k)")
  if kv_grad_range is not None and not 0 <= kv_grad_range[0] <= kv_grad_range[1] < blocks:
    raise ValueError(f"kv_grad_range: {kv_grad_range}; want (first, last) with 0 <= first <= last <= {blocks - 1}")


def pbsa(
  q: Float[Array, "B T N H"],
  k: Float[Array, "*L B S N H"],
  v: Float[Array, "*L B S N H"],
  block_ids: Int32[Array, "B N Q Kmax"],
  block_counts: Int32[Array, "B N Q"],
  *,
  prefix_blocks: int | Int32[Array, ""] = 0,
  prefix_k: Float[Array, "*L B P N H"] | None = None,
  kv_valid: int = BLOCK,
  kv_short: tuple[range, int] | None = None,
  layer: Int32[Array, ""] | None = None,
  scale: float | None = None,
  kv_grad_range: tuple[int, int] | None = None,
  return_lse: bool = False,
  implementation: str | None = None,
):
  """Persistent block-sparse attention (Sparse Forcing): dense over P, block-sparse over the window.

  Args:
    q: queries; T = 128 Q rows, one tile of 128 rows per entry of the lists.
    k, v: key and value slots, 64 to a block; or one array stacked over layers, with `layer` choosing.
    block_ids: blocks a tile reads besides the prefix, ascending and unique in the first `block_counts` entries.
    block_counts: how many entries of each list count; the rest are ignored.
    prefix_blocks: blocks 0..prefix_blocks-1 are read by every tile and are not listed.
    prefix_k: keys used for the prefix instead of k's own; stacked over layers where k is.
    kv_valid: slots of every block that hold a token; the others never count, but must hold finite numbers, say zeros.
    kv_short: blocks, of k and of prefix_k alike, of which only so many slots hold one.
    scale: multiplies the logits; 1/sqrt(H) by default.
    kv_grad_range: first and last block (inclusive) that receive dk and dv; the others get zero.
    return_lse: also return the log of the softmax denominator.
    implementation: "mosaic_sm90" (Hopper, 16 bit, head dim 64 or 128), "cudnn" (NVIDIA, 16 bit), "xla" (anywhere), or None
      for the first of these that supports the arguments.

  Returns:
    out [B,T,N,H] in q's dtype, and lse float32 [B,N,T] (natural log) if asked. A tile that reads nothing gives zeros
    and -inf. Differentiable in q, k, v and prefix_k, also through lse. Under jax.checkpoint a policy that saves the name
    "pbsa" spares "mosaic_sm90" a second forward pass.

  Raises:
    ValueError: a wrong shape or dtype, naming the argument. NotImplementedError: the implementation cannot do this.
  """
  _check(q, k, v, block_ids, block_counts, prefix_blocks, prefix_k, kv_valid, kv_short, layer, kv_grad_range)
  scale = q.shape[-1] ** -0.5 if scale is None else scale
  device = current_device()
  how = chosen(
    implementation,
    {
      "mosaic_sm90": lambda: mosaic_sm90.unsupported(device, q, scale),
      "cudnn": lambda: cudnn.unsupported(device, q, block_ids, prefix_blocks, prefix_k, kv_grad_range, return_lse),
      "xla": always,
    },
  )
  if how == "mosaic_sm90":
    config = choose_config(q.shape[-1], kv_valid, device.device_kind)
    call = mosaic_sm90.Call(
      scale, kv_valid, kv_grad_range, config, multiprocessors=multiprocessors(device), kv_short=kv_short
    )
    if layer is not None:
      q, k, v = (_forward_only(x) for x in (q, k, v))
    out, lse = mosaic_sm90.pbsa_mosaic(call, q, k, v, prefix_k, block_ids, block_counts, prefix_blocks, layer)
    return (out, lse) if return_lse else out
  if layer is not None:
    one = lambda x: None if x is None else _forward_only(jax.lax.dynamic_index_in_dim(x, layer, 0, keepdims=False))
    k, v, prefix_k = map(one, (k, v, prefix_k))
  if how == "cudnn":
    return cudnn.pbsa_cudnn(q, k, v, block_ids, block_counts, prefix_blocks, prefix_k, kv_valid, kv_short, scale)
  holes = kv_valid, kv_short
  out, lse = pbsa_xla(q, k, v, block_ids, block_counts, prefix_blocks, prefix_k, *holes, scale, kv_grad_range)
  return (out, lse) if return_lse else out


@jax.custom_jvp
def _forward_only(x):
  return x


@_forward_only.defjvp
def _forward_only_jvp(primals, tangents):
  raise NotImplementedError("layer: the stacked form is forward only; differentiate one layer's [B,S,N,H] arrays")
