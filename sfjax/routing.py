"""Who reads and who stays: every decision of the sparse memory, taken on pooled vectors.

The cached rollout and the parallel training form both look at a chunk through the same *resident view*: the C persistent
blocks in ascending order of origin, then the window's W chunks, oldest first. Everything here works on that view and carries
no gradient, so the two forms agree to the last index.

Letters: B batch, N heads, H head dim, Q query tiles, R = C + W nb resident blocks, X window blocks, K list length.
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
  """

  window: int
  persistent: int = 0
  top_k: float = 1.0
  importance: str = "attention"
  sharing: str = "head"
  score_decay: float = 0.0
  sink_chunks: int = 0
  rope_cap: int | None = None

  def __post_init__(self):
    for name, ok, want in (
      ("window", self.window >= 1, "at least 1 chunk"),
      ("persistent", self.persistent >= 0, "0 or more blocks"),
      ("top_k", 0 < self.top_k <= 1, "a fraction in (0, 1]"),
      ("importance", self.importance in IMPORTANCE, f"one of {', '.join(IMPORTANCE)}"),
      ("sharing", self.sharing in SHARING, f"one of {', '.join(SHARING)}"),
      ("score_decay", 0 <= self.score_decay < 1, "in [0, 1)"),
      ("sink_chunks", self.sink_chunks >= 0, "0 or more chunks"),
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


def pool_keys(k: Float[Array, "*B S N H"], layout: BlockLayout) -> Float[Array, "*B K N H"]:
  """Mean of each block's valid keys: float32 sums, rounded to bfloat16. Padding slots of k are zero."""
  *b, _, n, h = k.shape
  total = k.astype(jnp.float32).reshape(*b, -1, BLOCK, n, h).sum(-3)
  return jax.lax.stop_gradient((total / layout.valid).astype(jnp.bfloat16))


def pool_queries(q: Float[Array, "*B T N H"], layout: BlockLayout) -> Float[Array, "*B Q N H"]:
  """Mean over the valid rows of each query tile's two blocks, one chunk's rows at a time."""
  *b, _, n, h = q.shape
  total = q.astype(jnp.float32).reshape(*b, -1, 2 * BLOCK, n, h).sum(-3)
  rows = np.full(layout.blocks // 2, 2 * layout.valid, np.float32)
  if layout.blocks > layout.full_blocks:
    rows[-1] = layout.valid
  return jax.lax.stop_gradient((total / rows[:, None, None]).astype(jnp.bfloat16))


def block_scores(q_pooled: Float[Array, "B Q N H"], k_pooled: Float[Array, "B R N H"]) -> Float[Array, "B N Q R"]:
  """Pooled scores, scaled by 1/sqrt(H), float32."""
  s = jnp.einsum("bqnh,brnh->bnqr", q_pooled.astype(jnp.float32), k_pooled.astype(jnp.float32), precision="highest")
  return s * q_pooled.shape[-1] ** -0.5


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
  q_pooled: Float[Array, "B Q N H"],
  k_pooled: Float[Array, "B X N H"],
  valid: Bool[Array, "*X"],
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
  s = jnp.where(own, jnp.inf, block_scores(q_pooled, k_pooled))
  best, index = jax.lax.top_k(jnp.where(valid, s, -jnp.inf), cfg.max_k(layout))
  budget = cfg.full_k(layout) + cfg.persistent - cfg.persistent_count(layout, chunk)
  chosen = (best > -jnp.inf) & (jnp.arange(best.shape[-1]) < budget)
  return jnp.sort(jnp.where(chosen, index, x), -1).astype(jnp.int32), chosen.sum(-1, dtype=jnp.int32)


def capped_turn(cfg: MemoryConfig, age: Int32[Array, "*A"]) -> Int32[Array, "*A"]:
  """How many frames a key of that age is moved forward so that it never looks older than rope_cap."""
  return jnp.zeros_like(age) if cfg.rope_cap is None else jnp.maximum(age - cfg.rope_cap, 0)
