"""UMT5's weights by name: Wan's .pth and transformers' UMT5EncoderModel onto the parameters of `sfjax.umt5`.

One line of `WEIGHTS` declares one weight. Torch keeps a Linear as [out, in], and layers apart; here it is [in, out], stacked.
"""

import dataclasses
import re
from collections.abc import Mapping

import numpy as np

from sfjax import keys
from sfjax.errors import UserError
from sfjax.umt5 import UMT5Config


@dataclasses.dataclass(frozen=True)
class Weight:
  """A weight under its three names; `{}` stands for the layer.

  Attributes:
    param: path in the pure dict. official: in Wan's .pth (self_forcing section 6). transformers: in UMT5EncoderModel.
    shape: torch's, in letters: V vocab, D dim, A heads x head_dim, F ffn_dim, R buckets, N heads.
    linear: it is transposed.
  """

  param: tuple[str, ...]
  official: str
  transformers: str
  shape: str
  linear: bool = False

  @property
  def stacked(self) -> bool:
    return "{}" in self.official

  def load(self, x) -> np.ndarray:
    """Torch's array, or a tensor still in its file (one with `read()`, as `sfjax.tensors` gives), as one layer of ours."""
    x = np.asarray(x.read() if hasattr(x, "read") else x)
    return x.T if self.linear else x


def _layer(param: str, official: str, transformers: str, shape: str, linear: bool = False) -> Weight:
  return Weight(
    ("layers", param),
    f"blocks.{{}}.{official}.weight",
    f"encoder.block.{{}}.layer.{transformers}.weight",
    shape,
    linear,
  )


WEIGHTS = (
  Weight(("embedding",), "token_embedding.weight", "shared.weight", "VD"),
  _layer("norm1", "norm1", "0.layer_norm", "D"),
  _layer("q", "attn.q", "0.SelfAttention.q", "AD", True),
  _layer("k", "attn.k", "0.SelfAttention.k", "AD", True),
  _layer("v", "attn.v", "0.SelfAttention.v", "AD", True),
  _layer("o", "attn.o", "0.SelfAttention.o", "DA", True),
  _layer("position", "pos_embedding.embedding", "0.SelfAttention.relative_attention_bias", "RN"),
  _layer("norm2", "norm2", "1.layer_norm", "D"),
  _layer("gate", "ffn.gate.0", "1.DenseReluDense.wi_0", "FD", True),
  _layer("fc1", "ffn.fc1", "1.DenseReluDense.wi_1", "FD", True),
  _layer("fc2", "ffn.fc2", "1.DenseReluDense.wo", "DF", True),
  Weight(("norm",), "norm.weight", "encoder.final_layer_norm.weight", "D"),
)
_TWIN = "encoder.embed_tokens.weight"  # transformers' second name of shared.weight


def shapes(cfg: UMT5Config) -> dict[str, tuple[int, ...]]:
  """Every official name with torch's shape, in the order of `WEIGHTS`."""
  sizes = dict(V=cfg.vocab, D=cfg.dim, A=cfg.heads * cfg.head_dim, F=cfg.ffn_dim, R=cfg.buckets, N=cfg.heads)
  return {
    weight.official.format(i): tuple(sizes[letter] for letter in weight.shape)
    for weight in WEIGHTS
    for i in (range(cfg.layers) if weight.stacked else [0])
  }


def arrays(cfg: UMT5Config, tensors: Mapping, source: str, dtype=None) -> dict:
  """The parameters as a nested dict of `Streamed`, made of tensors under Wan's names; dtype None keeps theirs.

  Raises:
    UserError: see `keys.check`, `keys.stream`.
  """
  keys.check(shapes(cfg), tensors, source)
  found = {}
  for weight in WEIGHTS:
    parts = [tensors[weight.official.format(i)] for i in range(cfg.layers if weight.stacked else 1)]
    found["/".join(weight.param)] = keys.stream(
      parts, weight.load, weight.stacked, dtype, f"{source}: {weight.official}"
    )
  return keys.nested(found)


def official_from_transformers(tensors: Mapping, source: str) -> dict:
  """The same tensors under Wan's names, from transformers' UMT5EncoderModel; names that it has not stay as they are.

  The embedding may be under `shared.weight`, under `encoder.embed_tokens.weight`, or equal under both.

  Raises:
    UserError: the two embeddings differ.
  """
  tensors = dict(tensors)
  if _TWIN in tensors:
    twin = tensors.pop(_TWIN)
    kept = tensors.setdefault("shared.weight", twin)
    embedding = WEIGHTS[0]
    if kept is not twin and not np.array_equal(embedding.load(kept), embedding.load(twin)):
      raise UserError(f"{source}: shared.weight and {_TWIN} differ; this encoder has one embedding")
  known = {weight.transformers: weight.official for weight in WEIGHTS}

  def official(name: str) -> str:
    pattern = re.sub(r"block\.\d+", "block.{}", name)
    layer = re.search(r"block\.(\d+)", name)
    return known[pattern].format(layer and layer[1]) if pattern in known else name

  return {official(name): x for name, x in tensors.items()}
