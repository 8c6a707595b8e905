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
from jaxtyping import Array, Bool, Float, Int32, Key

from pallas_kernels.pbsa import BLOCK, top_lists
from sfjax.axes import all_heads, own_heads, sum_of_heads
from sfjax.errors import check
from sfjax.tiles import BlockLayout

IMPORTANCE = ("attention", "learned", "random")
SHARING = ("head", "layer")
SLOTS = ("model", "float8")


@dataclasses.dataclass(frozen=True)
class MemoryConfig:
  """What the memory keeps and reads. Dense, window, sinks and sparse are values of it.

  Attributes:
    window: W, local chunks, the current one included.
    persistent: C, capacity of P in blocks.
    top_k: fraction of the full window's blocks a query tile reads.
    importance: how P is ranked: "attention" (the paper), "learned" (a trained head), "random" (for comparison).
    sharing: "head", each head keeps its own P; "layer", one P for all heads, scores summed.
    novelty: how much a block loses that a newer resident block repeats: its score is multiplied by
      exp(-novelty x `redundancy`) (0: the paper).
    score_decay: how much of the old score stays when a new one comes (0: the paper).
    sink_chunks: first chunks whose blocks enter P with an infinite score.
    rope_cap: largest temporal age of a persistent block, in latent frames; None for no cap.
    route_parts: window blocks are ranked by the attention between patches of tokens, so many along a block's rows and
      columns; 1 is the paper's single mean.
    slots: how K and V lie there: "model", in the model's dtype; "float8", half the bytes of 16 bit, for sampling alone
      (`memory.narrow`). A chunk sees itself unrounded either way.
  """

  window: int
  persistent: int = 0
  top_k: float = 1.0
  importance: str = "attention"
  sharing: str = "head"
  novelty: float = 0.0
  score_decay: float = 0.0
  sink_chunks: int = 0
  rope_cap: int | None = None
  route_parts: int = 1
  slots: str = "model"

  def __post_init__(self):
    check(
      self,
      ("window", self.window >= 1, "at least 1 chunk"),
      ("persistent", self.persistent >= 0, "0 or more blocks"),
      ("top_k", 0 < self.top_k <= 1, "a fraction in (0, 1]"),
      ("importance", self.importance in IMPORTANCE, f"one of {', '.join(IMPORTANCE)}"),
      ("sharing", self.sharing in SHARING, f"one of {', '.join(SHARING)}"),
      ("novelty", self.novelty >= 0, "0 or more"),
      ("score_decay", 0 <= self.score_decay < 1, "in [0, 1)"),
      ("sink_chunks", self.sink_chunks >= 0, "0 or more chunks"),
      (
        "sink_chunks",
        not self.sink_chunks or self.persistent > 0,
        "0 without persistent blocks, among which sinks stay",
      ),
      ("route_parts", self.route_parts >= 1, "1 or more"),
      ("slots", self.slots in SLOTS, f"one of {', '.join(SLOTS)}"),
      ("rope_cap", self.rope_cap is None or self.rope_cap >= 1, "at least 1 latent frame, or None"),
    )

  def of_window(self, chunks: int) -> "MemoryConfig":
    """The plain window of so many chunks: everything in it is read, nothing else is kept."""
    return dataclasses.replace(self, window=chunks, persistent=0, top_k=1.0, sink_chunks=0)

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
    """|P| while chunk is generated: as many as were evicted whole, at most C. chunk: int or int32 scalar."""
    evicted = (jnp.maximum if isinstance(chunk, jax.Array) else max)(chunk - self.window + 1, 0)
    return (jnp.minimum if isinstance(chunk, jax.Array) else min)(self.persistent, evicted * layout.whole_blocks)


def _patch_means(
  x: Float[Array, "*B S N H"], layout: BlockLayout, parts: int, kept: int = 0
) -> Float[Array, "*B K A N H"]:
  """Means of each block's A = parts x parts patches of tokens, float32; zero where a block holds none."""
  f, rows, columns = layout.tile
  if parts > 1 and layout.block_tokens:
    raise ValueError(f"route_parts: {parts}; want 1 where blocks are not tiles (block_tokens {layout.block_tokens})")
  if rows % parts or columns % parts:
    raise ValueError(f"route_parts: {parts} does not divide the rows and columns of tile {layout.tile}")
  *b, slots, n, h = x.shape
  x = x.reshape(-1, BLOCK, n * h)
  # Which patch each slot belongs to. As a product, because sums down columns read memory at half the speed; eight rows at
  # least, because fewer would be turned into such sums.
  patch = (np.arange(rows)[:, None] * parts // rows) * parts + np.arange(columns) * parts // columns
  member = np.zeros((max(8, parts * parts), BLOCK), np.float32)
  member[np.resize(np.broadcast_to(patch, layout.tile), layout.valid), np.arange(layout.valid)] = 1
  member = jnp.broadcast_to(jnp.asarray(member, x.dtype), (x.shape[0], *member.shape))
  sums = jnp.einsum("kas,ksd->kad", member, x, precision="highest", preferred_element_type=jnp.float32)
  sums = sums[:, : parts * parts].reshape(*b, slots // BLOCK, parts * parts, n, h)
  sizes = np.where(layout.sizes, layout.sizes, layout.valid)
  sizes = np.append(np.full(kept, layout.valid), np.tile(sizes, (slots // BLOCK - kept) // layout.blocks))
  return sums / (sizes // parts**2).astype(np.float32)[:, None, None, None]


def _weights(layout: BlockLayout, parts: int) -> Float[np.ndarray, "Q I"]:
  """Tokens of the patches of each query tile's two blocks over a whole block's patch; 0 for those of an empty last block."""
  weights = (layout.sizes / layout.valid).astype(np.float32)
  return np.repeat(weights, parts * parts).reshape(-1, 2 * parts * parts)


def pool_keys(
  k: Float[Array, "*B S N H"], layout: BlockLayout, parts: int = 1, kept: int = 0
) -> Float[Array, "*B K A N H"]:
  """Means of each block's patches: float32 sums, rounded to bfloat16.

  Args:
    k: the blocks of chunks, behind so many that were kept, all whole.

  Raises:
    ValueError: parts does not divide the tile, or blocks are not tiles.
  """
  return pooled_keys(_patch_means(k, layout, parts, kept))


def pooled_keys(means: Float[Array, "*B K A N H"]) -> Float[Array, "*B K A N H"]:
  """`pool_keys` of blocks whose patches' means are known, float32."""
  return jax.lax.stop_gradient(means.astype(jnp.bfloat16))


def pool_queries(q: Float[Array, "*B T N H"], layout: BlockLayout, parts: int = 1) -> Float[Array, "*B Q I N H"]:
  """Of each query tile's two blocks: the mean over their tokens (parts = 1, I = 1), or their patches' means (I = 2 A)."""
  return pooled_queries(_patch_means(q, layout, parts), layout)


def pooled_queries(means: Float[Array, "*B K A N H"], layout: BlockLayout) -> Float[Array, "*B Q I N H"]:
  """`pool_queries` of blocks whose patches' means are known, float32."""
  x = means.reshape(*means.shape[:-4], -1, 2 * means.shape[-3], *means.shape[-2:])
  x = tile_means(layout, x)[..., None, :, :] if means.shape[-3] == 1 else x.astype(jnp.bfloat16)
  return jax.lax.stop_gradient(x)


def block_content(v: Float[Array, "*B S N H"], layout: BlockLayout, kept: int = 0) -> Float[Array, "*B K N H"]:
  """Mean value of each block, pooled as keys are: what it says, wherever and whenever it lies."""
  return pool_keys(v, layout, kept=kept)[..., 0, :, :]


def block_means(k_pooled: Float[Array, "*B A N H"]) -> Float[Array, "*B N H"]:
  """One vector a block, of its patches' means."""
  return k_pooled.astype(jnp.float32).mean(-3).astype(jnp.bfloat16)


def tile_means(layout: BlockLayout, q_pooled: Float[Array, "*B Q I N H"]) -> Float[Array, "*B Q N H"]:
  """One vector a query tile, of its patches' means."""
  if q_pooled.shape[-3] == 1:
    return q_pooled[..., 0, :, :]
  weights = _weights(layout, math.isqrt(q_pooled.shape[-3] // 2))[..., None, None]
  x = q_pooled.astype(jnp.float32)
  if layout.short:  # else all that hold tokens weigh the same, and what holds none is zero
    x = x * weights
  return (x.sum(-3) / weights.sum(-3)).astype(jnp.bfloat16)


def block_scores(q_pooled: Float[Array, "B Q N H"], k_pooled: Float[Array, "B R N H"]) -> Float[Array, "B N Q R"]:
  """Pooled scores, scaled by 1/sqrt(H), float32."""
  s = jnp.einsum("bqnh,brnh->bnqr", q_pooled, k_pooled, precision="highest", preferred_element_type=jnp.float32)
  return s * q_pooled.shape[-1] ** -0.5


def patch_mass(
  layout: BlockLayout,
  q_pooled: Float[Array, "B Q I N H"],
  k_pooled: Float[Array, "B X A N H"],
  valid: Bool[Array, " X"],
) -> Float[Array, "B N Q I X"]:
  """Log of the attention that each patch of a tile gives to a block's patches together; -inf for a patch without tokens."""
  b, tiles, i, n, h = q_pooled.shape
  a = k_pooled.shape[2]
  s = block_scores(q_pooled.reshape(b, tiles * i, n, h), k_pooled.reshape(b, -1, n, h))
  s = jax.nn.log_softmax(jnp.where(jnp.repeat(valid, a), s, -jnp.inf), -1)
  s = jax.nn.logsumexp(s.reshape(b, n, tiles, i, -1, a), -1)
  holds = _weights(layout, math.isqrt(a))[..., None] > 0 if i > 1 else True
  return jnp.where(holds, s, -jnp.inf)


def block_mass(
  layout: BlockLayout,
  q_pooled: Float[Array, "B Q I N H"],
  k_pooled: Float[Array, "B X A N H"],
  valid: Bool[Array, " X"],
) -> Float[Array, "B N Q X"]:
  """Log of the attention that a tile's patches give to a block's patches, summed over both.

  With one vector each this ranks blocks as `block_scores` does, whose values it then returns.
  """
  if q_pooled.shape[2] == k_pooled.shape[2] == 1:
    return block_scores(q_pooled[:, :, 0], k_pooled[:, :, 0])
  return jax.nn.logsumexp(patch_mass(layout, q_pooled, k_pooled, valid), 3)


def importance(
  cfg: MemoryConfig,
  layout: BlockLayout,
  head,
  own: Float[Array, "B nb N H"],
  q_pooled: Float[Array, "B Q N H"],
  k_pooled: Float[Array, "B R N H"],
  valid: Bool[Array, "B N R"],
  old: Float[Array, "B N R"],
  chunk: Int32[Array, ""],
  rng: Key[Array, " B"],
) -> Float[Array, "B N R"]:
  """New scores of the resident blocks, taken in a chunk's commit pass.

  Args:
    head: contents [B,nb,N,H] -> log importance [B,N,nb]; used by "learned" only, which scores a block once, when it is
      committed. own: contents of the chunk's blocks.
    rng: a key of the layer for each row; used by "random" only.
  """
  if cfg.importance == "learned":
    return jnp.concatenate([old[..., : -layout.blocks], jnp.exp(head(own))], -1)
  if cfg.importance == "random":
    _, heads, resident = valid.shape
    draw = lambda n: jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, chunk), (n, resident)))(rng)
    return own_heads(draw, heads, 1)
  current = jnp.arange(valid.shape[-1]) >= valid.shape[-1] - layout.blocks
  s = jnp.where(valid[:, :, None], block_scores(q_pooled, k_pooled), -jnp.inf)
  new = jax.nn.softmax(s, axis=-1).sum(2)
  return jnp.where(current, new, cfg.score_decay * old + new)


def redundancy(
  layout: BlockLayout, content: Float[Array, "B R N H"], origin: Int32[Array, "B N R"], candidates: int
) -> Float[Array, "B N E"]:
  """How much the first E blocks are repeated by a resident block of a later chunk: the largest cosine, at least 0.

  What is still in view is repeated by its next view; the last view of what went out of sight is not. Contents are taken
  from the mean of all residents, which they share.
  """
  there = origin >= 0
  x = jnp.where(there[..., None], jnp.moveaxis(content, 2, 1).astype(jnp.float32), 0)
  x = jnp.where(there[..., None], x - x.sum(2, keepdims=True) / jnp.maximum(there.sum(-1), 1)[..., None, None], 0)
  x = x * jax.lax.rsqrt((x * x).sum(-1, keepdims=True) + 1e-12)
  cosine = jnp.einsum("bneh,bnrh->bner", x[:, :, :candidates], x, precision="highest")
  chunk = origin // layout.blocks
  later = there[:, :, None] & (chunk[:, :, None] > chunk[:, :, :candidates, None])
  return jnp.where(later, cosine, 0).max(-1, initial=0)


def eviction_scores(
  cfg: MemoryConfig,
  layout: BlockLayout,
  score: Float[Array, "B N R"],
  origin: Int32[Array, "B N R"],
  content: Float[Array, "B R N H"],
) -> Float[Array, "B N E"]:
  """Scores of the first E = C + nb residents, P and the chunk to be evicted, with what `novelty` takes off.

  Args:
    origin: chunk * nb + tile, -1 where empty. content: from `block_content`.
  """
  size = cfg.persistent + layout.blocks
  score = score[..., :size]
  if not cfg.novelty:
    return score
  if cfg.sharing == "layer":  # heads that keep the same blocks compare them as a whole
    content, origin = all_heads(content, 2).reshape(*content.shape[:2], 1, -1), origin[:, :1]
  return score * jnp.exp(-cfg.novelty * redundancy(layout, content, origin, size))


def select_persistent(
  cfg: MemoryConfig, layout: BlockLayout, score: Float[Array, "B N E"], origin: Int32[Array, "B N E"]
) -> Int32[Array, "B N C"]:
  """P <- the C best of P and the evicted blocks.

  Args:
    score, origin: of the candidates, in ascending order of origin (chunk * nb + tile); origin -1 is an empty slot.

  Returns:
    Positions among the candidates, ascending; E where nothing is kept. A short block never is.
  """
  size = origin.shape[-1]
  if cfg.sharing == "layer":
    score = jnp.broadcast_to(sum_of_heads(score.sum(1, keepdims=True)), score.shape)
  score = jnp.where(origin < cfg.sink_chunks * layout.blocks, jnp.inf, score)
  may_stay = origin >= 0
  if layout.short:
    may_stay &= origin % layout.blocks < layout.whole_blocks
  best, index = jax.lax.top_k(jnp.where(may_stay, score, -jnp.inf), cfg.persistent)
  return jnp.sort(jnp.where(best > -jnp.inf, index, size), axis=-1).astype(jnp.int32)


def route_window(
  cfg: MemoryConfig,
  layout: BlockLayout,
  q_pooled: Float[Array, "B Q I N H"],
  k_pooled: Float[Array, "B X A N H"],
  valid: Bool[Array, " X"],
  chunk: Int32[Array, ""],
  own: int | Int32[Array, ""],
  begin: int = 0,
) -> tuple[Int32[Array, "B N Q K"], Int32[Array, "B N Q"]]:
  """The window blocks each query tile reads: its own two, then the best; of equals, the oldest.

  Args:
    k_pooled, valid: the window's blocks, chunks in a ring: the chunk's own begin at `own`, behind them come the oldest.
    begin: id of the first of them.

  Returns:
    Their ids, ascending (begin + X past the end), and how many count.
  """
  x, nb = k_pooled.shape[1], layout.blocks
  s = block_mass(layout, q_pooled, k_pooled, valid)
  mine = jnp.arange(x) - own
  s = jnp.where(mine // 2 == jnp.arange(nb // 2)[:, None], jnp.inf, s)
  budget = cfg.full_k(layout) + cfg.persistent - cfg.persistent_count(layout, chunk)
  return top_lists(jnp.where(valid, s, -jnp.inf), budget, cfg.max_k(layout), (own + nb) % x, begin)


def capped_turn(cfg: MemoryConfig, age: Int32[Array, "*A"]) -> Int32[Array, "*A"]:
  """How many frames a key of that age is moved forward so that it never looks older than rope_cap."""
  return jnp.zeros_like(age) if cfg.rope_cap is None else jnp.maximum(age - cfg.rope_cap, 0)
