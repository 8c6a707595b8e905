"""Weights of others in, ours out, and back: python -m sfjax.convert SRC DST

SRC is a file or folder of Wan2.1's own, of diffusers' or of Self-Forcing's weights, or a Hugging Face id (owner/name); the DiT,
the VAE and the text encoder are recognised by the names of their tensors. DST becomes a model folder: an Orbax checkpoint and a
config of each part, and the tokenizer; parts may come one after the other.
Tensors pass one at a time, so that the 14B model needs a few GB of memory. `--to safetensors` writes the official names.
"""

import functools
import json
import pathlib
import re
import shutil
import sys

import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from sfjax import keys, streamed, umt5_keys, wan_keys, wan_vae_keys
from sfjax.checkpoint import load_config
from sfjax.config import Config, to_dataclass, to_dict
from sfjax.errors import Parser, UserError, command
from sfjax.model import ModelConfig
from sfjax.runlog import make_folder, write_json_atomic
from sfjax.tensors import Stored, open_tensors
from sfjax.umt5 import UMT5Config
from sfjax.wan import wan_config
from sfjax.wan_vae import WanVAEConfig

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


def infer_model(tensors: dict[str, Stored], source: str, heads: int | None = None) -> ModelConfig:
  """The sizes that a DiT's tensors tell; heads are of 128 unless given.

  Raises:
    UserError: these are not Wan2.1's text-to-video weights; says what they are, as far as it can be told.
  """
  for part, what in (("vace", "VACE"), ("img_emb", "image-to-video"), ("cross_attn.k_img", "image-to-video")):
    if any(part in name for name in tensors):
      raise UserError(f"{source}: these are {what} weights; only Wan2.1's text-to-video models are supported")
  shape = functools.partial(_shape, tensors, f"{source}: no Wan2.1 DiT")
  dim, channels = shape("patch_embedding.weight", 5)[:2]
  ffn_dim = shape("blocks.0.ffn.0.weight", 2)[0]
  freq_dim, text_dim = (shape(f"{name}_embedding.0.weight", 2)[1] for name in ("time", "text"))
  layers = _layers(tensors)
  if channels != 16:
    more = " (Wan2.2 5B)" if channels == 48 else " (image-to-video)" if channels == 36 else ""
    raise UserError(f"{source}: latents of {channels} channels{more}; only Wan2.1's text-to-video models have 16")
  sizes = dict(dim=dim, layers=layers, ffn_dim=ffn_dim, freq_dim=freq_dim, text_dim=text_dim)
  try:
    return ModelConfig.wan_1_3b(**sizes, heads=heads or dim // 128)
  except ValueError as e:
    raise UserError(f"{source}: {e}") from e


def infer_text(tensors: dict[str, Stored], source: str) -> UMT5Config:
  """The sizes that a UMT5 encoder's tensors tell, by official name."""
  shape = functools.partial(_shape, tensors, f"{source}: no UMT5 encoder")
  vocab, dim = shape("token_embedding.weight", 2)
  buckets, heads = shape("blocks.0.pos_embedding.embedding.weight", 2)
  width, ffn_dim = (shape(f"blocks.0.{name}.weight", 2)[0] for name in ("attn.q", "ffn.fc1"))
  layers = _layers(tensors)
  return UMT5Config(vocab, dim, heads, width // heads, ffn_dim, layers, buckets)


def _shape(tensors: dict[str, Stored], refusal: str, name: str, axes: int) -> tuple[int, ...]:
  """A tensor's shape. Raises UserError: no such tensor, or not of so many axes."""
  if name not in tensors:
    raise UserError(f"{refusal}; no {name}")
  shape = tensors[name].shape
  if len(shape) != axes:
    raise UserError(f"{refusal}; {name} has shape {list(shape)}, want one of length {axes}")
  return shape


def _layers(tensors) -> int:
  return 1 + max(int(m[1]) for name in tensors if (m := re.match(r"blocks\.(\d+)\.", name)))


def convert(source: pathlib.Path, target: pathlib.Path, group: str | None, dtype) -> str:
  """Writes one file or folder of weights, whatever part of Wan2.1 it is, into a model folder; says what it was.

  Raises:
    UserError: no weights of a known part; or see `choose_group`, `keys.check`.
  """
  tensors, name = choose_group(open_tensors(source), group, str(source)), str(source)
  if any(n.startswith(("token_embedding.", "shared.", "encoder.embed_tokens.")) for n in tensors):
    return _convert_text(tensors, target, name, dtype)
  if any(n.startswith(("decoder.conv1.", "decoder.conv_in.")) for n in tensors):
    return _convert_vae(tensors, target, name, dtype)
  tensors = keys.renamed(tensors, wan_keys.official_name, name)
  model = infer_model(tensors, name, _heads(source))
  streamed.save(target / "dit", wan_keys.arrays(model, tensors, name, dtype))
  write_json_atomic(target / "config.json", to_dict(wan_config(model)))
  return f"{len(tensors)} tensors of a DiT, {model.layers} layers of width {model.dim}"


def _convert_text(tensors, target, name, dtype) -> str:
  if "token_embedding.weight" not in tensors:
    tensors = umt5_keys.official_from_transformers(tensors, name)
  config = infer_text(tensors, name)
  streamed.save(target / "text", umt5_keys.arrays(config, tensors, name, dtype))
  write_json_atomic(target / "text.json", to_dict(config))
  return f"{len(tensors)} tensors of a UMT5 encoder, {config.layers} layers of width {config.dim}"


def _convert_vae(tensors, target, name, dtype) -> str:
  bias = "encoder.conv_in.bias" if "encoder.conv_in.bias" in tensors else "encoder.conv1.bias"
  config = WanVAEConfig(dim=_shape(tensors, f"{name}: no Wan2.1 VAE", bias, 1)[0])
  streamed.save(target / "vae", wan_vae_keys.arrays(config, tensors, name, dtype))
  write_json_atomic(target / "vae.json", to_dict(config))
  return f"{len(tensors)} tensors of a VAE, {config.dim} channels at full resolution"


def parts(source: pathlib.Path) -> list[pathlib.Path]:
  """The files and folders of weights that a file, an official folder or one of diffusers' pipelines holds."""
  if not source.is_dir():
    return [source]
  folders = [f for f in (source, *(source / n for n in ("transformer", "vae", "text_encoder"))) if f.is_dir()]
  found = [f for f in folders if any(f.glob("*.safetensors"))]
  return found + sorted(f for f in source.iterdir() if f.suffix in (".pt", ".pth"))


def write_official(folder: pathlib.Path, out: pathlib.Path) -> int:
  """A converted DiT as safetensors files of at most `SHARD` bytes and their index; the number of tensors.

  Raises:
    UserError: the folder is damaged or of another config.
  """
  cfg = to_dataclass(Config, load_config(folder, "SRC"), "SRC: config").model
  arrays, table = streamed.pieces(folder / "dit"), wan_keys.rules(cfg)
  keys.refuse(str(folder), "lacks", [n for n in table if n not in arrays])
  make_folder(out, "DST")
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


def _heads(source: pathlib.Path) -> int | None:
  """Heads as a config.json beside the weights tells, official or diffusers'. Raises UserError: it is no config."""
  file = (source if source.is_dir() else source.parent) / "config.json"
  try:
    told = json.loads(file.read_text())
  except OSError:
    return None
  except ValueError:
    told = None
  heads = (told.get("num_heads") or told.get("num_attention_heads")) if isinstance(told, dict) else ""
  if not isinstance(heads, int | None):
    raise UserError(f"{file}: want the model's config, an object whose num_heads, if there, is a number")
  return heads


def _locate(source: str) -> pathlib.Path:
  """A path, or what a Hugging Face id names, downloaded."""
  path = pathlib.Path(source)
  if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", source):
    return path
  import huggingface_hub  # only here: it takes a while to load

  try:
    return pathlib.Path(huggingface_hub.snapshot_download(source, allow_patterns=["*.safetensors", "*.pth", "*.json"]))
  except Exception as e:  # a network has many ways to fail
    raise UserError(f"SRC: {source} is no file or folder here, and cannot be downloaded ({type(e).__name__})") from e


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
  found = parts(source)
  if not found:
    raise UserError(f"{source}: holds no .safetensors, .pt or .pth file")
  for part in found:
    print(f"{part}: {convert(part, a.target, a.weights, None if a.dtype == 'keep' else jnp.dtype(a.dtype))}")
  for file in (source / "tokenizer" / "tokenizer.json", source / "google" / "umt5-xxl" / "tokenizer.json"):
    if file.is_file():
      shutil.copyfile(file, a.target / "tokenizer.json")
      print(f"{file}: copied")


if __name__ == "__main__":
  main(sys.argv[1:])
