"""Names and shapes of Wan2.1's DiT in its files, and where each weight goes: one table, read in both directions.

Two conventions: the official one (also Self-Forcing's, behind prefixes) and diffusers'. (self_forcing section 1.2)
"""

import dataclasses
import re
from collections.abc import Callable

import numpy as np

from sfjax import keys
from sfjax.checkpoint import named
from sfjax.model import ModelConfig
from sfjax.rollout import abstract_params
from sfjax.tensors import Stored

_LINEAR = {  # ours: official
  "text_in": "text_embedding.0",
  "text_out": "text_embedding.2",
  "time_in": "time_embedding.0",
  "time_out": "time_embedding.2",
  "time_projection": "time_projection.1",
  "head": "head.head",
  **{f"blocks/{a}/{x}": f"blocks.{{}}.{a}.{x}" for a in ("self_attn", "cross_attn") for x in "qkvo"},
  "blocks/ffn_in": "blocks.{}.ffn.0",
  "blocks/ffn_out": "blocks.{}.ffn.2",
}
_VECTOR = {
  **{f"blocks/{a}/norm_{x}": f"blocks.{{}}.{a}.norm_{x}.weight" for a in ("self_attn", "cross_attn") for x in "qk"},
  "blocks/norm3_scale": "blocks.{}.norm3.weight",
  "blocks/norm3_bias": "blocks.{}.norm3.bias",
}
_DIFFUSERS = (  # diffusers' part of a name: the official one
  ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
  ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
  ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
  ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
  ("condition_embedder.time_proj", "time_projection.1"),
  ("proj_out", "head.head"),
  (".attn1.", ".self_attn."),
  (".attn2.", ".cross_attn."),
  (".to_out.0.", ".o."),
  (".to_q.", ".q."),
  (".to_k.", ".k."),
  (".to_v.", ".v."),
  (".norm2.", ".norm3."),
  (".ffn.net.0.proj.", ".ffn.0."),
  (".ffn.net.2.", ".ffn.2."),
)


@dataclasses.dataclass(frozen=True)
class Rule:
  """One of our arrays: the official tensors it is made of (`{}` stands for the layer), and their shape.

  Attributes:
    load: an official tensor as ours, one layer of it. save: its inverse.
  """

  official: str
  shape: tuple[int, ...]
  load: Callable[[np.ndarray], np.ndarray]
  save: Callable[[np.ndarray], np.ndarray]

  @property
  def stacked(self) -> bool:
    return "{}" in self.official

  def names(self, layers: int) -> list[str]:
    return [self.official.format(i) for i in range(layers)] if self.stacked else [self.official]


def rules(cfg: ModelConfig) -> dict[str, Rule]:
  """The table: our array's path -> its rule. Raises ValueError for a config with parts that Wan's weights lack."""
  if cfg.importance_head:
    raise ValueError("importance_head: True; Wan's weights have none")
  same, turned, d = lambda x: x, lambda x: x.T, cfg.dim
  ours = {name: x.shape for name, x in named(abstract_params(cfg)).items()}
  own = lambda name: ours[name][1:] if name.startswith("blocks/") else ours[name]
  patch = (d, cfg.latent_channels, 1, *cfg.patch)
  found = {
    "patch_embedding/kernel": Rule(
      "patch_embedding.weight", patch, lambda x: x.reshape(d, -1).T, lambda x: x.T.reshape(patch)
    ),
    "patch_embedding/bias": Rule("patch_embedding.bias", (d,), same, same),
    "blocks/modulation": Rule("blocks.{}.modulation", (1, 6, d), lambda x: x[0], lambda x: x[None]),
    "head_modulation": Rule("head.modulation", (1, 2, d), lambda x: x[0], lambda x: x[None]),
  }
  for name, official in _LINEAR.items():
    found[f"{name}/kernel"] = Rule(f"{official}.weight", own(f"{name}/kernel")[::-1], turned, turned)
    found[f"{name}/bias"] = Rule(f"{official}.bias", own(f"{name}/bias"), same, same)
  for name, official in _VECTOR.items():
    found[name] = Rule(official, own(name), same, same)
  if found.keys() != ours.keys():  # every weight is declared, and nothing else
    raise AssertionError(found.keys() ^ ours.keys())
  return {name: found[name] for name in ours}


def official_name(name: str) -> str:
  """The official name of a tensor, whatever prefix or convention it comes in."""
  name = name.rsplit("/", 1)[-1].replace("_fsdp_wrapped_module.", "").removeprefix("model.")
  if name == "scale_shift_table":
    return "head.modulation"
  name = re.sub(r"^(blocks\.\d+)\.scale_shift_table$", r"\1.modulation", name)
  for theirs, official in _DIFFUSERS:
    name = name.replace(theirs, official)
  return name


def arrays(cfg: ModelConfig, tensors: dict[str, Stored], source: str, dtype=None) -> dict:
  """Our DiT's arrays as a nested dict of `Streamed`, made of official tensors; dtype None keeps theirs.

  Args:
    tensors: by official name. source: named in errors.

  Raises:
    UserError: see `keys.check`, `keys.stream`.
  """
  table = rules(cfg)
  keys.check({name: rule.shape for rule in table.values() for name in rule.names(cfg.layers)}, tensors, source)
  return keys.nested(
    {
      name: keys.stream(
        [tensors[n] for n in rule.names(cfg.layers)], rule.load, rule.stacked, dtype, f"{source}: {rule.official}"
      )
      for name, rule in table.items()
    }
  )
