"""The Wan VAE's weights by name: the official file's and diffusers' AutoencoderKLWan onto the parameters of `wan_vae.py`.

One entry of the tables below declares one weight of a layer; `table` lays them out for a config. PyTorch keeps a convolution as
[out, in, *size] and a gain as [C, 1, ...]; here they are [*size, in, out], [in, out] where all sizes are 1, and [C].
(self_forcing section 5)
"""

import dataclasses
import re
from collections.abc import Mapping

import jax
import numpy as np

from sfjax import keys
from sfjax.checkpoint import named
from sfjax.wan_vae import WanVAE, WanVAEConfig, decoder_plan, encoder_plan


def _conv(ours: str, official: str, ndim: int) -> tuple:
  return (f"{ours}/kernel", f"{official}.weight", ndim), (f"{ours}/bias", f"{official}.bias", 1)


_RESIDUAL = (  # ours, official, the official one's number of axes
  ("norm1/gamma", "residual.0.gamma", 4),
  *_conv("conv1", "residual.2", 5),
  ("norm2/gamma", "residual.3.gamma", 4),
  *_conv("conv2", "residual.6", 5),
  *_conv("shortcut", "shortcut", 5),  # where channels differ
)
_ATTENTION = (("norm/gamma", "norm.gamma", 3), *_conv("qkv", "to_qkv", 4), *_conv("out", "proj", 4))
_RESAMPLE = (*_conv("conv", "resample.1", 4), *_conv("time_conv", "time_conv", 5))  # the latter where time is resampled
_BLOCKS = {"residual": _RESIDUAL, "up": _RESAMPLE, "down": _RESAMPLE}
_ENDS = (*_conv("conv_in", "conv1", 5), ("norm_out/gamma", "head.0.gamma", 4), *_conv("conv_out", "head.2", 5))

_DIFFUSERS = (  # a pattern in diffusers' name, and the official text for it
  (r"^quant_conv\.", "conv1."),
  (r"^post_quant_conv\.", "conv2."),
  (r"^(encoder|decoder)\.conv_in\.", r"\1.conv1."),
  (r"^(encoder|decoder)\.norm_out\.", r"\1.head.0."),
  (r"^(encoder|decoder)\.conv_out\.", r"\1.head.2."),
  (r"\.mid_block\.attentions\.0\.", ".middle.1."),
  (r"\.mid_block\.resnets\.0\.", ".middle.0."),
  (r"\.mid_block\.resnets\.1\.", ".middle.2."),
  (r"^encoder\.down_blocks\.", "encoder.downsamples."),
)
_DIFFUSERS_RESIDUAL = {
  "norm1": "residual.0",
  "conv1": "residual.2",
  "norm2": "residual.3",
  "conv2": "residual.6",
  "conv_shortcut": "shortcut",
}


@dataclasses.dataclass(frozen=True)
class Weight:
  """One weight: our path, our shape, and the official shape."""

  ours: str
  ours_shape: tuple[int, ...]
  shape: tuple[int, ...]

  def load(self, x: np.ndarray) -> np.ndarray:
    """The official array as ours."""
    return (x if len(self.ours_shape) == 1 else np.moveaxis(x, (0, 1), (-1, -2))).reshape(self.ours_shape)

  def save(self, x: np.ndarray) -> np.ndarray:
    """Our array as the official one."""
    if x.ndim == 1:
      return x.reshape(self.shape)
    return np.moveaxis(x.reshape(*self.shape[2:], *x.shape[-2:]), (-1, -2), (0, 1))


def _layers(cfg: WanVAEConfig):
  """(our path, official prefix, table) of every layer."""
  for side, blocks, plan, quant in (
    ("encoder", "downsamples", encoder_plan(cfg), "conv1"),
    ("decoder", "upsamples", decoder_plan(cfg), "conv2"),
  ):
    yield side, "", _conv("quant", quant, 5)
    yield side, f"{side}.", _ENDS
    for i, layer in enumerate((_RESIDUAL, _ATTENTION, _RESIDUAL)):
      yield f"{side}/middle/{i}", f"{side}.middle.{i}.", layer
    for i, (kind, *_) in enumerate(plan):
      yield f"{side}/blocks/{i}", f"{side}.{blocks}.{i}.", _BLOCKS[kind]


def _ours(cfg: WanVAEConfig):
  """Our paths and shapes in the tree's order, and the tree's structure; no array is made."""
  shapes = jax.eval_shape(lambda: WanVAE(cfg).init())
  return {name.removesuffix("/value"): x.shape for name, x in named(shapes).items()}, jax.tree.structure(shapes)


def table(cfg: WanVAEConfig) -> dict[str, Weight]:
  """Every official name and its weight."""
  ours, _ = _ours(cfg)
  found = {}
  for where, prefix, layer in _layers(cfg):
    for name, official, ndim in layer:
      shape = ours.get(f"{where}/{name}")
      if shape is None and name.split("/")[0] in ("shortcut", "time_conv"):
        continue
      size = shape[:-2] or (1,) * (ndim - 2)
      theirs = (shape[0], *(1,) * (ndim - 1)) if len(shape) == 1 else (shape[-1], shape[-2], *size)
      found[prefix + official] = Weight(f"{where}/{name}", shape, theirs)
  if sorted(w.ours for w in found.values()) != sorted(
    ours
  ):  # each of ours has one official weight, and nothing else has
    raise AssertionError({w.ours for w in found.values()} ^ ours.keys())
  return found


def official_name(name: str, res_blocks: int = 2) -> str:
  """The official name of a weight that has diffusers' name; any other name stays. `res_blocks` as in the config."""
  if re.search(r"\.(mid_block\.resnets|down_blocks|up_blocks\.\d+\.resnets)\.\d+\.", name):
    *head, part, leaf = name.split(".")
    name = ".".join([*head, _DIFFUSERS_RESIDUAL.get(part, part), leaf])
  for pattern, official in _DIFFUSERS:
    name = re.sub(pattern, official, name)
  if up := re.match(r"decoder\.up_blocks\.(\d+)\.(?:resnets\.(\d+)|upsamplers\.0)\.(.*)", name):
    stage, block, rest = up.groups()
    block = res_blocks + 1 if block is None else int(block)
    name = f"decoder.upsamples.{int(stage) * (res_blocks + 2) + block}.{rest}"
  return name


def arrays(cfg: WanVAEConfig, tensors: Mapping, source: str, dtype=None) -> dict:
  """`WanVAE`'s arrays by path, as nested dicts of `Streamed`; dtype None keeps that of the file.

  Args:
    tensors: by official name or by diffusers'; all of them and no others. source: named in errors.

  Raises:
    UserError: see `keys.check`; or a weight is there under two names.
  """
  want = table(cfg)
  tensors = keys.renamed(tensors, lambda name: official_name(name, cfg.res_blocks), source)
  keys.check({n: w.shape for n, w in want.items()}, tensors, source)
  return keys.nested({w.ours: keys.stream([tensors[n]], w.load, False, dtype, source) for n, w in want.items()})


def abstract(cfg: WanVAEConfig) -> dict:
  """Shapes and dtypes of the arrays as `arrays` nests them."""
  ours, _ = _ours(cfg)
  return keys.nested({name: jax.ShapeDtypeStruct(shape, np.dtype(cfg.param_dtype)) for name, shape in ours.items()})


def parameters(cfg: WanVAEConfig, nested: dict) -> dict:
  """`WanVAE`'s params from arrays nested by path."""
  ours, tree = _ours(cfg)
  flat = named(nested)
  return jax.tree.unflatten(tree, [flat[name] for name in ours])


def to_official(cfg: WanVAEConfig, params: dict) -> dict[str, np.ndarray]:
  """The inverse: arrays by official name, in PyTorch's shapes."""
  ours, _ = _ours(cfg)
  arrays = dict(zip(ours, jax.tree.leaves(params), strict=True))
  return {name: np.ascontiguousarray(w.save(np.asarray(arrays[w.ours]))) for name, w in table(cfg).items()}
