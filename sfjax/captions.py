"""What the clips of a batch are told: captions as arrays for a step, and in it as keys and values of cross-attention.

Digits train their word encoder together with the DiT, so that a caption is word ids; Wan2.1's UMT5 stays as it is, so that a
caption is its embedding. `encoder_of` says which of the two a model has; tasks know no more than these functions.

Letters: B clips, M text rows, E text width.
"""

import dataclasses
import functools
import pathlib
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int32

from sfjax import parts, rollout
from sfjax.config import Config
from sfjax.errors import UserError
from sfjax.model import ModelConfig
from sfjax.text import WordEncoder

Rows = Int32[Array, "B M"] | Float[Array, "B M E"]


class Text(NamedTuple):
  """Captions of a batch, and beside each the null prompt: what is said where nothing is to be said."""

  prompt: Rows
  null: Rows

  def dropped(self, where: Bool[Array, " B"]) -> "Text":
    """The same, but those clips are told the null prompt."""
    return self._replace(prompt=jnp.where(where.reshape(-1, *[1] * (self.null.ndim - 1)), self.null, self.prompt))


@dataclasses.dataclass(frozen=True)
class Words:
  """A word encoder that learns with the DiT: its weights are trained, as "text"."""

  encoder: WordEncoder

  def abstract(self) -> dict:
    """Shapes of what is trained beside the DiT."""
    return jax.eval_shape(lambda: self.init(0))

  def init(self, seed: int) -> dict:
    return {"text": self.encoder.init(seed)}

  def prepare(self, config: Config, captions: dict[str, list[str]]) -> None:
    """Before training, of captions that are known by then, by their flags. Raises UserError at a word it does not know."""
    for flag, some in captions.items():
      self.encoder.tokens(some, flag)

  def arrays(self, config: Config, captions: list[str]) -> Int32[np.ndarray, "B M"]:
    return self.encoder.tokens(captions, "caption")

  def rows(self, params: dict, text: Int32[Array, "B M"]) -> Float[Array, "B M E"]:
    return self.encoder.encode(params["text"], text)


@dataclasses.dataclass(frozen=True)
class Embeddings:
  """A frozen encoder's embeddings: nothing is trained beside the DiT."""

  model: ModelConfig

  def abstract(self) -> dict:
    return {}

  def init(self, seed: int) -> dict:
    return {}

  def _embedder(self, config: Config) -> "parts.Embedder":
    folders = {"config.distill.teacher": config.distill.teacher, "config.train.init": config.train.init}
    for flag, folder in folders.items():
      if folder and (pathlib.Path(folder) / "text.json").is_file():
        return _embedder(folder, self.model, flag)
    told = ", ".join(f"{flag} {folder!r}" for flag, folder in folders.items())
    raise UserError(
      f"{told}: neither holds a text encoder for the prompts; convert one into it: python -m sfjax.convert"
    )

  def prepare(self, config: Config, captions: dict[str, list[str]]) -> None:
    """Embeds what no run has embedded before; the encoder, 11 GB, is loaded once, and gone when training begins."""
    self._embedder(config).prepare(captions)

  def arrays(self, config: Config, captions: list[str]) -> Float[np.ndarray, "B M E"]:
    return self._embedder(config)(captions, "caption")

  def rows(self, params: dict, text: Float[Array, "B M E"]) -> Float[Array, "B M E"]:
    return text


@functools.cache
def _embedder(folder: str, model: ModelConfig, flag: str) -> "parts.Embedder":
  return parts.embedder(folder, model, flag)


@functools.cache
def encoder_of(model: ModelConfig) -> Words | Embeddings:
  """What the model's captions are encoded by."""
  return Embeddings(model) if parts.of_wan(model) else Words(WordEncoder(model.text_len, model.text_dim))


def text(config: Config, captions: list[str], null: str = "") -> Text:
  """A batch's captions as arrays.

  Args:
    null: the null prompt.

  Raises:
    UserError: a caption that the encoder does not take, or no encoder.
  """
  found = encoder_of(config.model).arrays(config, [*captions, null])
  return Text(found[:-1], np.broadcast_to(found[-1:], found[:-1].shape))


def kv(model: ModelConfig, params: dict, text: Rows):
  """`DiT.text_kv` of a batch's captions; params: "dit" and whatever is trained beside it."""
  return rollout.text_kv(model, params["dit"], encoder_of(model).rows(params, text))
