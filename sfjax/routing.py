"""Who reads and who stays: every decision of the sparse memory, taken on pooled vectors.

The cached rollout and the parallel training form both look at a chunk through the same *resident view*: the C persistent
blocks in ascending order of origin, then the window's W chunks, oldest first. Everything here works on that view and carries
no gradient, so the two forms agree to the last index.

Letters: B batch, N heads, H head dim, Q query tiles, R = C + W nb resident blocks, X window blocks, K list length; blocks and
tiles are pooled into one vector, or into those of A patches of a block and I of a query tile.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.pbsa import BLOCK
from sfjax.tiles import BlockLayout

IMPORTANCE = ("attention", "learned", "random")
SHARING = ("head", "layer")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """What the memory keeps and reads. Dense, window, sinks and sparse are values of it.

  Attributes:
    window: W, local chunks, the current one included.
    persistent: C, capacity of P in blocks.
    top_k: fraction of the full window's blocks a query tile reads.
    importance: how P is ranked: "attention" (the paper), "learned" (a trained head), "random" (for comparison).
    sharing: "head", each head keeps its own P; "layer", one P for all heads, scores summed.
    score_decay: how much of the old score stays when a new one comes (0: the paper).
    sink_chunks: first chunks whose blocks enter P with an infinite score.
    rope_cap: largest temporal age of a persistent block, in latent frames; None for no cap.
    route_parts: window blocks are ranked by the attention between patches of tokens, so many along a block's rows and
      columns; 1 is the paper's single mean.
  """

  window: int
  persistent: int = 0
  top_k: float = 1.0
  importance: str = "attention"
  sharing: str = "head"
  score_decay: float = 0.0
  sink_chunks: int = 0
  rope_cap: int | None = None
  route_parts: int = 1

  def __post_init__(self):
    for name, ok, want in (
      ("window", self.window >= 1, "at least 1 chunk"),
      ("persistent", self.persistent >= 0, "0 or more blocks"),
      ("top_k", 0 < self.top_k <= 1, "a fraction in (0, 1]"),
      ("importance", self.importance in IMPORTANCE, f"one of {', '.join(IMPORTANCE)}"),
      ("sharing", self.sharing in SHARING, f"one of {', '.join(SHARING)}"),
      ("score_decay", 0 <= self.score_decay < 1, "in [0, 1)"),
      ("sink_chunks", self.sink_chunks >= 0, "0 or more chunks"),
      ("route_parts", self.route_parts >= 1, "1 or more"),
      ("rope_cap", self.rope_cap is None or self.rope_cap >= 1, "at least 1 latent frame, or None"),
    ):
      if not ok:
        raise ValueError(f"{name}: {getattr(self, name)!r}; want {want}")

  @property
  def selects(self) -> bool:
    """Whether a query tile reads less than the whole window, or more (P); else attention needs no lists."""
    return self.persistent > 0 or self.top_k < 1

  def resident_blocks(self, layout: BlockLayout) -> int:
    """R: blocks a layer stores."""
    return self.persistent + self.window * layout.blocks

  def full_k(self, layout: BlockLayout) -> int:
    """Window blocks a tile reads once P is full."""
    return max(2, math.ceil(self.top_k * self.window * layout.full_blocks - 1e-9))

  def max_k(self, layout: BlockLayout) -> int:
    """Longest list: before P is full, its unused budget goes to the window."""
    return min(self.window * layout.full_blocks, self.full_k(layout) + self.persistent)

  def persistent_count(self, layout: BlockLayout, chunk):
    """|P| while chunk is generated: as many as were evicted, at most C. chunk: int or int32 scalar."""
    evicted = (jnp.maximum if isinstance(chunk, jax.Array) else max)(chunk - self.window + 1, 0)
    return (jnp.minimum if isinstance(chunk, jax.Array) else min)(self.persistent, evicted * layout.full_blocks)


def _patch_means(x: Float[Array, "*B S N H"], layout: BlockLayout, parts: int) -> Float[Array, "*B K A N H"]:
  """Means of each block's A = parts x parts patches of tokens, float32; zero where a block holds none."""
  f, rows, columns = layout.tile
  if rows % parts or columns % parts:
    raise ValueError(f"route_parts: {parts} does not divide the rows and columns of tile {layout.tile}")
  *b, _, n, h = x.shape
  x = x.astype(jnp.float32).reshape(*b, -1, BLOCK, n, h)[..., : layout.valid, :, :]
  x = x.reshape(*x.shape[:-3], f, parts, rows // parts, parts, columns // parts, n, h).mean((-7, -5, -3))
  return x.reshape(*b, -1, parts * parts, n, h)


def _holds_tokens(layout: BlockLayout, parts: int) -> Bool[np.ndarray, "Q I"]:
  """Which patches of each query tile's two blocks hold tokens; all do, but those of an empty last block."""
  full = np.arange(layout.blocks) < layout.full_blocks
  return np.repeat(full, parts * parts).reshape(-1, 2 * parts * parts)


def pool_keys(k: Float[Array, "*B S N H"], layout: BlockLayout, parts: int = 1) -> Float[Array, "*B K A N H"]:
  """Means of each block's patches: float32 sums, rounded to bfloat16.

  Raises:
    ValueError: parts does not divide the tile.
  """
  return jax.lax.stop_gradient(_patch_means(k, layout, parts).astype(jnp.bfloat16))


def pool_queries(q: Float[Array, "*B T N H"], layout: BlockLayout, parts: int = 1) -> Float[Array, "*B Q I N H"]:
  """Of each query tile's two blocks: the mean over their tokens (parts = 1, I = 1), or their patches' means (I = 2 A)."""
  x = _patch_means(q, layout, parts)
  x = x.reshape(*x.shape[:-4], -1, 2 * x.shape[-3], *x.shape[-2:])
  x = tile_means(layout, x)[..., None, :, :] if parts == 1 else x.astype(jnp.bfloat16)
  return jax.lax.stop_gradient(x)


def block_means(k_pooled: Float[Array, "*B A N H"]) -> Float[Array, "*B N H"]:
  """One vector a block, of its patches' means."""
  return k_pooled.astype(jnp.float32).mean(-3).astype(jnp.bfloat16)


def tile_means(layout: BlockLayout, q_pooled: Float[Array, "*B Q I N H"]) -> Float[Array, "*B Q N H"]:
  """One vector a query tile, of its patches' means."""
  if q_pooled.shape[-3] == 1:
    return q_pooled[..., 0, :, :]
  count = _holds_tokens(layout, math.isqrt(q_pooled.shape[-3] // 2)).sum(-1)[:, None, None]
  return (q_pooled.astype(jnp.float32).sum(-3) / count).astype(jnp.bfloat16)


def block_scores(q_pooled: Float[Array, "B Q N H"], k_pooled: Float[Array, "B R N H"]) -> Float[Array, "B N Q R"]:
  """Pooled scores, scaled by 1/sqrt(H), float32."""
  s = jnp.einsum("bqnh,brnh->bnqr", q_pooled.astype(jnp.float32), k_pooled.astype(jnp.float32), precision="highest")
  return s * q_pooled.shape[-1] ** -0.5


def block_mass(
  layout: BlockLayout,
  q_pooled: Float[Array, "B Q I N H"],
  k_pooled: Float[Array, "B X A N H"],
  valid: Bool[Array, " X"],
) -> Float[Array, "B N Q X"]:
  """Log of the attention that a tile's patches give to a block's patches, summed over both.

  With one vector each this ranks blocks as `block_scores` does, whose values it then returns.
  """
  b, tiles, i, n, h = q_pooled.shape
  a = k_pooled.shape[2]
  flat = block_scores(q_pooled.reshape(b, tiles * i, n, h), k_pooled.reshape(b, -1, n, h))
  if i == a == 1:
    return flat
  s = jnp.where(jnp.repeat(valid, a), flat, -jnp.inf).reshape(b, n, tiles, i, -1)
  s = jax.nn.log_softmax(s, -1).reshape(b, n, tiles, i, -1, a)
  s = jnp.where(_holds_tokens(layout, math.isqrt(a))[..., None, None], s, -jnp.inf)
  return jax.nn.logsumexp(s, (3, 5))


def importance(
  cfg: MemoryConfig,
  layout: BlockLayout,
  head,
  q_pooled: Float[Array, "B Q N H"],
  k_pooled: Float[Array, "B R N H"],
  valid: Bool[Array, "B N R"],
  old: Float[Array, "B N R"],
  chunk: Int32[Array, ""],
  rng: Array,
) -> Float[Array, "B N R"]:
  """New scores of the resident blocks, taken in a chunk's commit pass.

  Args:
    head: pooled keys [B,R,N,H] -> log importance [B,N,R]; used by "learned" only.
    rng: key of the layer; used by "random" only.
  """
  current = jnp.arange(valid.shape[-1]) >= valid.shape[-1] - layout.blocks
  if cfg.importance == "learned":  # a block is scored once, when it is committed
    return jnp.where(current, jnp.exp(head(k_pooled)), old)
  if cfg.importance == "random":
    return jax.random.uniform(jax.random.fold_in(rng, chunk), valid.shape)
  s = jnp.where(valid[:, :, None], block_scores(q_pooled, k_pooled), -jnp.inf)
  new = jax.nn.softmax(s, axis=-1).sum(2)
  return jnp.where(current, new, cfg.score_decay * old + new)


def select_persistent(
  cfg: MemoryConfig, layout: BlockLayout, score: Float[Array, "B N E"], origin: Int32[Array, "B N E"]
) -> Int32[Array, "B N C"]:
  """P <- the C best of P and the evicted blocks.

  Args:
    score, origin: of the candidates, in ascending order of origin (chunk * nb + tile); origin -1 is an empty slot.

  Returns:
    Positions among the candidates, ascending; E where nothing is kept.
  """
  size = origin.shape[-1]
  valid = origin >= 0
  if cfg.sharing == "layer":
    score = jnp.broadcast_to(score.sum(1, keepdims=True), score.shape)
  score = jnp.where(origin < cfg.sink_chunks * layout.blocks, jnp.inf, score)
  best, index = jax.lax.top_k(jnp.where(valid, score, -jnp.inf), cfg.persistent)
  return jnp.sort(jnp.where(best > -jnp.inf, index, size), axis=-1).astype(jnp.int32)


def route_window(
  cfg: MemoryConfig,
  layout: BlockLayout,
  q_pooled: Float[Array, "B Q I N H"],
  k_pooled: Float[Array, "B X A N H"],
  valid: Bool[Array, " X"],
  chunk: Int32[Array, ""],
) -> tuple[Int32[Array, "B N Q K"], Int32[Array, "B N Q"]]:
  """The window blocks each query tile reads: its own two first, then the best.

  Args:
    k_pooled, valid: the window's blocks, oldest chunk first; the last nb are the chunk's own.

  Returns:
    Positions in the window, ascending (X past the end), and how many count.
  """
  x, nb = k_pooled.shape[1], layout.blocks
  own = (x - nb) + 2 * jnp.arange(nb // 2)[:, None] + jnp.arange(2)
  own = (jnp.arange(x) == own[..., None]).any(1)  # [Q,X]
  s = jnp.where(own, jnp.inf, block_mass(layout, q_pooled, k_pooled, valid))
  best, index = jax.lax.top_k(jnp.where(valid, s, -jnp.inf), cfg.max_k(layout))
  budget = cfg.full_k(layout) + cfg.persistent - cfg.persistent_count(layout, chunk)
  chosen = (best > -jnp.inf) & (jnp.arange(best.shape[-1]) < budget)
  return jnp.sort(jnp.where(chosen, index, x), -1).astype(jnp.int32), chosen.sum(-1, dtype=jnp.int32)


def capped_turn(cfg: MemoryConfig, age: Int32[Array, "*A"]) -> Int32[Array, "*A"]:
  """How many frames a key of that age is moved forward so that it never looks older than rope_cap."""
  return jnp.zeros_like(age) if cfg.rope_cap is None else jnp.maximum(age - cfg.rope_cap, 0)
