"""Weights of others in, ours out, and back: python -m sfjax.convert SRC DST

SRC is a file or folder of Wan2.1's own, of diffusers' or of Self-Forcing's weights, or a Hugging Face id (owner/name); it is
recognised by the names of its tensors. DST becomes a model folder: config.json, and an Orbax checkpoint of each part.
Tensors pass one at a time, so that the 14B model needs a few GB of memory. `--to safetensors` writes the official names.
"""

import json
import pathlib
import re
import sys

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from sfjax import streamed, wan_keys
from sfjax.config import Config, to_dataclass, to_dict
from sfjax.errors import Parser, UserError, command
from sfjax.model import ModelConfig
from sfjax.runlog import write_json_atomic
from sfjax.tensors import Stored, open_tensors
from sfjax.wan import wan_config

GROUPS = ("generator_ema", "generator", "model")  # of a Self-Forcing file, the first that is there
SHARD = 2 << 30  # bytes of a safetensors file


def choose_group(tensors: dict[str, Stored], group: str | None, source: str) -> dict[str, Stored]:
  """The tensors of one of the models that a file holds side by side, under their own names.

  Raises:
    UserError: no such group; names those there are.
  """
  groups = {name.split("/", 1)[0] for name in tensors if "/" in name}
  if not groups:
    if group:
      raise UserError(f"--weights: {group}; {source} holds one model only")
    return tensors
  chosen = group or next((g for g in GROUPS if g in groups), None)
  if chosen not in groups:
    raise UserError(f"--weights: {chosen or 'none chosen'}; {source} holds {', '.join(sorted(groups))}")
  return {name.split("/", 1)[1]: x for name, x in tensors.items() if name.startswith(chosen + "/")}


def official_names(tensors: dict[str, Stored], source: str) -> dict[str, Stored]:
  """The same tensors by official name. Raises UserError where two have the same one."""
  found = {}
  for name, x in tensors.items():
    official = wan_keys.official_name(name)
    if official in found:
      raise UserError(f"{source}: two tensors for {official}")
    found[official] = x
  return found


def infer_model(tensors: dict[str, Stored], source: str, heads: int | None = None) -> ModelConfig:
  """The sizes that a DiT's tensors tell; heads are of 128 unless given.

  Raises:
    UserError: these are not Wan2.1's text-to-video weights; says what they are, as far as it can be told.
  """
  for part, what in (("vace", "VACE"), ("img_emb", "image-to-video"), ("cross_attn.k_img", "image-to-video")):
    if any(part in name for name in tensors):
      raise UserError(f"{source}: these are {what} weights; only Wan2.1's text-to-video models are supported")
  try:
    dim, channels = tensors["patch_embedding.weight"].shape[:2]
    ffn_dim = tensors["blocks.0.ffn.0.weight"].shape[0]
    freq_dim, text_dim = (tensors[f"{name}_embedding.0.weight"].shape[1] for name in ("time", "text"))
    layers = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name)))
  except (KeyError, ValueError) as e:
    raise UserError(f"{source}: no Wan2.1 DiT; no {e.args[0]}") from e
  if channels != 16:
    more = " (Wan2.2 5B)" if channels == 48 else " (image-to-video)" if channels == 36 else ""
    raise UserError(f"{source}: latents of {channels} channels{more}; only Wan2.1's text-to-video models have 16")
  sizes = dict(dim=dim, layers=layers, ffn_dim=ffn_dim, freq_dim=freq_dim, text_dim=text_dim)
  return ModelConfig.wan_1_3b(**sizes, heads=heads or dim // 128)


def dit_arrays(cfg: ModelConfig, tensors: dict[str, Stored], source: str, dtype=None) -> dict:
  """Our DiT's arrays as a nested dict of `Streamed`, made of official tensors; dtype None keeps theirs.

  Raises:
    UserError: see `wan_keys.matched`; also where the layers of an array differ in dtype.
  """
  tree: dict = {}
  for name, parts in wan_keys.matched(cfg, tensors, source).items():
    rule = wan_keys.rules(cfg)[name]
    kinds = sorted({str(p.dtype) for p in parts})
    if len(kinds) > 1:
      raise UserError(f"{source}: {rule.official} has dtypes {', '.join(kinds)}")
    shape = rule.load(np.empty(rule.shape, np.int8)).shape
    kind = np.dtype(dtype or parts[0].dtype)
    make = lambda parts=parts, rule=rule, kind=kind: (rule.load(p.read()).astype(kind, copy=False) for p in parts)
    whole = "{}" not in rule.official
    array = streamed.Streamed(shape if whole else (len(parts), *shape), kind, make, whole)
    *where, last = name.split("/")
    node = tree
    for step in where:
      node = node.setdefault(step, {})
    node[last] = array
  return tree


def write_official(folder: pathlib.Path, out: pathlib.Path) -> int:
  """A converted DiT as safetensors files of at most `SHARD` bytes and their index; the number of tensors.

  Raises:
    UserError: the folder is damaged or of another config.
  """
  cfg = to_dataclass(Config, _read_config(folder), "config").model
  arrays, table = streamed.pieces(folder / "dit"), wan_keys.rules(cfg)
  wan_keys.refuse(str(folder), "lacks", [n for n in table if n not in arrays])
  out.mkdir(parents=True, exist_ok=True)
  shard, size, files, where = {}, 0, [], {}

  def flush():
    nonlocal shard, size
    files.append(out / f"diffusion_pytorch_model-{len(files) + 1:05d}.part")
    save_file(shard, files[-1])
    where.update(dict.fromkeys(shard, len(files) - 1))
    shard, size = {}, 0

  for name, rule in table.items():
    for official, part in zip(rule.names(cfg.layers), arrays[name].parts(), strict=True):
      shard[official] = np.ascontiguousarray(rule.save(part))
      size += shard[official].nbytes
      if size >= SHARD:
        flush()
  if shard:
    flush()
  final = [f"diffusion_pytorch_model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))]
  for part, name in zip(files, final, strict=True):
    part.replace(out / name)
  total = sum((out / name).stat().st_size for name in final)
  index = {"metadata": {"total_size": total}, "weight_map": {name: final[i] for name, i in where.items()}}
  write_json_atomic(out / "diffusion_pytorch_model.safetensors.index.json", index)
  return len(where)


def _read_config(folder: pathlib.Path) -> dict:
  try:
    return json.loads((folder / "config.json").read_text())
  except (OSError, ValueError) as e:
    raise UserError(f"{folder}: no readable config.json; want a folder that this command wrote") from e


def _heads(source: pathlib.Path) -> int | None:
  """Heads as a config.json beside the weights tells, official or diffusers'."""
  file = (source if source.is_dir() else source.parent) / "config.json"
  try:
    told = json.loads(file.read_text())
  except (OSError, ValueError):
    return None
  return told.get("num_heads") or told.get("num_attention_heads")


def _locate(source: str) -> pathlib.Path:
  """A path, or what a Hugging Face id names, downloaded."""
  path = pathlib.Path(source)
  if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
    return path
  from huggingface_hub import snapshot_download
  from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

  try:
    return pathlib.Path(snapshot_download(source, allow_patterns=["*.safetensors", "*.json"]))
  except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as e:
    raise UserError(f"SRC: {source} is no file or folder here, and could not be downloaded") from e


@command
def main(argv: list[str]) -> None:
  """Converts, and says what came out."""
  p = Parser(prog="python -m sfjax.convert", description=__doc__.splitlines()[0])
  p.add_argument("source", metavar="SRC")
  p.add_argument("target", metavar="DST", type=pathlib.Path)
  p.add_argument("--weights", metavar="NAME", help=f"of a Self-Forcing file; default: the first of {', '.join(GROUPS)}")
  p.add_argument("--dtype", choices=("keep", "bfloat16", "float32"), default="keep")
  p.add_argument("--to", choices=("orbax", "safetensors"), default="orbax")
  a = p.parse_args(argv)
  source = _locate(a.source)
  if a.to == "safetensors":
    print(f"{a.target}: {write_official(source, a.target)} tensors")
    return
  if (source / "transformer").is_dir():  # diffusers' folder of a whole pipeline
    source = source / "transformer"
  tensors = official_names(choose_group(open_tensors(source), a.weights, str(source)), str(source))
  model = infer_model(tensors, str(source), _heads(source))
  arrays = dit_arrays(model, tensors, str(source), None if a.dtype == "keep" else jnp.dtype(a.dtype))
  streamed.save(a.target / "dit", arrays)
  write_json_atomic(a.target / "config.json", to_dict(wan_config(model)))
  print(f"{a.target}: {len(tensors)} tensors, {model.layers} layers of width {model.dim}")


if __name__ == "__main__":
  main(sys.argv[1:])
