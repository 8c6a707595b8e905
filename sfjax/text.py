"""Text: a small learned word encoder for captions of a closed vocabulary (UMT5 is the same interface at Wan's size)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from sfjax.data.digits import WORDS
from sfjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class WordEncoder:
  """Words to vectors: each row knows its word, the word before it ("red" of "red 3") and its place.

  Rows past a caption's end are zero, so the empty caption is all zeros.
  """

  length: int
  dim: int
  words: tuple[str, ...] = WORDS

  def init(self, seed: int) -> dict:
    """Random embeddings of words (0 pads), of the word before (0 starts) and of positions."""
    word, before, position = jax.random.split(jax.random.key(seed), 3)
    return {
      "word": jax.random.normal(word, (len(self.words) + 1, self.dim)),
      "before": jax.random.normal(before, (len(self.words) + 1, self.dim)),
      "position": jax.random.normal(position, (self.length, self.dim)) * 0.5,
    }

  def tokens(self, captions: list[str], flag: str = "--prompt") -> Int32[np.ndarray, "B M"]:
    """Word ids, 0 past the end. Raises UserError at an unknown word or a caption that is too long."""
    ids = np.zeros((len(captions), self.length), np.int32)
    for i, caption in enumerate(captions):
      words = caption.lower().replace(",", " ").split()
      if len(words) > self.length:
        raise UserError(f"{flag}: {len(words)} words; this model reads at most {self.length}")
      for j, word in enumerate(words):
        if word not in self.words:
          raise UserError(f"{flag}: unknown word {word!r}; this model knows: {' '.join(self.words)}")
        ids[i, j] = 1 + self.words.index(word)
    return ids

  def encode(self, params: dict, ids: Int32[Array, "B M"]) -> Float[Array, "B M E"]:
    """Vectors for the DiT's cross-attention."""
    before = jnp.pad(ids[:, :-1], ((0, 0), (1, 0)))
    rows = params["word"][ids] + params["before"][before] + params["position"]
    return jnp.where((ids > 0)[..., None], rows, 0.0)
