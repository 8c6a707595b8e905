"""UMT5's weights by name: Wan's .pth and transformers' UMT5EncoderModel onto the parameters of `sfjax.umt5`.

One line of `WEIGHTS` declares one weight. Torch keeps a Linear as [out, in], and layers apart; here it is [in, out], stacked.
"""

import dataclasses
from collections.abc import Mapping

import numpy as np

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


def shapes(cfg: UMT5Config, names: str = "official") -> dict[str, tuple[int, ...]]:
  """Every key of a checkpoint with torch's shape, in the order of `WEIGHTS`; `names` is "official" or "transformers"."""
  sizes = dict(V=cfg.vocab, D=cfg.dim, A=cfg.heads * cfg.head_dim, F=cfg.ffn_dim, R=cfg.buckets, N=cfg.heads)
  return {
    getattr(weight, names).format(i): tuple(sizes[letter] for letter in weight.shape)
    for weight in WEIGHTS
    for i in (range(cfg.layers) if weight.stacked else [0])
  }


def _check(arrays: Mapping, want: dict[str, tuple[int, ...]], source: str) -> None:
  """Raises UserError unless `arrays` holds exactly the keys and shapes wanted."""
  wrong = [name for name in want if name in arrays and tuple(arrays[name].shape) != want[name]]
  found = (
    ("missing", [name for name in want if name not in arrays]),
    ("unexpected", [name for name in arrays if name not in want]),
    ("wrongly shaped", [f"{name} {list(arrays[name].shape)} for {list(want[name])}" for name in wrong]),
  )
  problems = [
    f"{len(names)} {what}: {', '.join(names[:3])}{', ...' if len(names) > 3 else ''}" for what, names in found if names
  ]
  if problems:
    raise UserError(f"{source}: not the weights of this UMT5 encoder; {'; '.join(problems)}")


def from_official(cfg: UMT5Config, arrays: Mapping[str, np.ndarray], source: str = "UMT5 weights") -> dict:
  """Parameters (a pure dict of NumPy arrays in cfg.param_dtype) from arrays under Wan's names.

  Args:
    arrays: exactly the official keys; tensors still in their file are read one at a time. source: what an error names.

  Raises:
    UserError: a key is missing, unexpected or wrongly shaped.
  """
  _check(arrays, shapes(cfg), source)
  params: dict = {}
  for weight in WEIGHTS:
    count = cfg.layers if weight.stacked else 1
    for i in range(count):  # one at a time into place: a stack of layers is gigabytes
      x = weight.load(arrays[weight.official.format(i)])
      if i == 0:
        stack = np.empty((count, *x.shape), np.dtype(cfg.param_dtype))
      stack[i] = x
    node = params
    for name in weight.param[:-1]:
      node = node.setdefault(name, {})
    node[weight.param[-1]] = stack if weight.stacked else stack[0]
  return params


def official_from_transformers(
  cfg: UMT5Config, arrays: Mapping[str, np.ndarray], source: str = "UMT5 weights"
) -> dict[str, np.ndarray]:
  """The same arrays under Wan's names, from transformers' UMT5EncoderModel.

  The embedding may be under `shared.weight`, under `encoder.embed_tokens.weight`, or equal under both.

  Raises:
    UserError: a key is missing, unexpected or wrongly shaped, or the two embeddings differ.
  """
  arrays = dict(arrays)
  if _TWIN in arrays:
    twin = arrays.pop(_TWIN)
    kept = arrays.setdefault("shared.weight", twin)
    embedding = WEIGHTS[0]
    if kept is not twin and not np.array_equal(embedding.load(kept), embedding.load(twin)):
      raise UserError(f"{source}: shared.weight and {_TWIN} differ; this encoder has one embedding")
  _check(arrays, shapes(cfg, "transformers"), source)
  return dict(zip(shapes(cfg), (arrays[name] for name in shapes(cfg, "transformers")), strict=True))
