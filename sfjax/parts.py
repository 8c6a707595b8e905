"""What stands around the DiT in a model folder: its weights, a text encoder, and a codec that streams pixels out.

A folder of our own digits model holds one params.npz; one that `sfjax.convert` wrote holds Wan2.1's parts. Sampling sees the
same functions in both cases.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import shutil
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from sfjax import checkpoint, cluster, float8, rollout, streamed, wan
from sfjax.codec import DigitsCodec
from sfjax.config import Config, to_dataclass, to_dict
from sfjax.errors import UserError
from sfjax.model import ModelConfig
from sfjax.runlog import write_json_atomic
from sfjax.tensors import open_tensors
from sfjax.text import WordEncoder
from sfjax.text_cache import TextCache
from sfjax.tiny_vae import TinyVAE, TinyVAEConfig, from_official
from sfjax.umt5 import UMT5Config, UMT5Encoder
from sfjax.wan_vae import WanVAE, WanVAEConfig, from_uint8, to_uint8


@dataclasses.dataclass(frozen=True)
class Around:
  """Sizes of what stands around a DiT, with the dtypes it runs in; None where there is no such part.

  Attributes:
    vae: digits have none, their codec has no weights. tiny_decoder: decodes in the VAE's place, which stays.
    text: a `UMT5Config`'s encoder is loaded for new prompts and gone before sampling; a `WordEncoder`'s weights stay.
  """

  vae: WanVAEConfig | None = None
  tiny_decoder: TinyVAEConfig | None = None
  text: WordEncoder | UMT5Config | None = None

  @property
  def codec(self) -> TinyVAE | WanVAE | DigitsCodec:
    """What decodes."""
    if self.tiny_decoder:
      return TinyVAE(self.tiny_decoder)
    return WanVAE(self.vae) if self.vae else DigitsCodec()


@dataclasses.dataclass(frozen=True)
class Parts:
  """A loaded model folder.

  Attributes:
    config: as the folder says, with the dtypes that this machine runs it in. around: sizes of the other parts.
    mesh: the devices that share the tokens of every chunk, see `cluster.tokens_mesh`; the first has the other parts.
    decoder: the device that has the codec instead, see `with_decoder_apart`.
    dit: weights of the DiT. others: weights of the other parts that stay on the device, by the names of `Around`.
    codec: has `time` and `space`, pixels of a latent along each.
    check: (captions, flag) raises UserError at one that the text encoder does not take.
    text: captions -> rows for cross-attention [B,M,E].
    encode: frames uint8 [B,F,H,W,3], F = 1 + 4 n -> latents.
    start: batch -> the codec's state before a video, a pytree.
    decode: (state, latents, first) -> (state, frames uint8); compiled, the state passed in is consumed.
  """

  config: Config
  around: Around
  dit: dict
  others: dict[str, Any]
  codec: Any
  check: Callable[[list[str], str], Any]
  text: Callable[[list[str]], Float[Array, "B M E"]]
  encode: Callable[[UInt8[np.ndarray, "B F H W 3"]], Float[Array, "B T h w C"]]
  start: Callable[[int], Any]
  decode: Callable[[Any, Array, bool], tuple[Any, UInt8[Array, "B F H W 3"]]]
  mesh: Mesh | None = None
  decoder: jax.Device | None = None


def load_parts(directory, devices: int = 1) -> Parts:
  """Reads a model folder, or a training run's newest step, for so many devices.

  Raises:
    UserError: absent, damaged, of another config, without one of its parts, or see `cluster.tokens_mesh`.
  """
  config = to_dataclass(Config, checkpoint.load_config(directory), "--checkpoint: config")
  if jax.devices()[0].platform == "cpu":  # bfloat16 is emulated there
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, dtype="float32"))
  folder, mesh = pathlib.Path(directory), cluster.tokens_mesh(devices, config.model)
  linear, config = config.model.linear, as_stored(config)
  return with_linear((_wan if (folder / "dit").is_dir() else _digits)(folder, config, mesh), linear)


def as_stored(config: Config) -> Config:
  """The config with a model whose parameters are a folder's: none of them rounded."""
  return dataclasses.replace(config, model=dataclasses.replace(config.model, linear=ModelConfig.linear))


def with_linear(parts: Parts, linear: str) -> Parts:
  """The same folder, its layers' weights for products of that kind, see `ModelConfig.linear`.

  Raises:
    UserError: there is no such kind. ValueError: the weights are rounded already.
  """
  if linear == parts.config.model.linear:
    return parts
  if parts.config.model.linear != ModelConfig.linear:
    raise ValueError(f"linear: {linear!r}; the weights are for {parts.config.model.linear!r} alone")
  try:
    model = dataclasses.replace(parts.config.model, linear=linear)
  except ValueError as e:
    raise UserError(f"--{e}") from e
  like = rollout.abstract_params(model)
  where = parts.mesh and cluster.shardings(parts.mesh, like)
  rounded = jax.jit(lambda params: float8.quantised(params, like), out_shardings=where)
  return dataclasses.replace(parts, config=dataclasses.replace(parts.config, model=model), dit=rounded(parts.dit))


def of_wan(model: ModelConfig) -> bool:
  """Whether the model's latents are those of Wan2.1's VAE."""
  return model.latent_channels == WanVAEConfig().z_dim


def load_model(folder, like: dict, flag: str) -> dict:
  """Weights {"dit", ..} of a converted folder, a model folder or a training run, shaped, typed and placed as `like`.

  Raises:
    UserError: absent, damaged or of another config.
  """
  if not (pathlib.Path(folder) / "dit").is_dir():
    return checkpoint.load_params(folder, like, flag)
  try:
    return {"dit": streamed.restore(pathlib.Path(folder) / "dit", like["dit"])}
  except UserError as e:
    raise UserError(f"{flag}: {e}") from e


_AROUND = ("vae", "vae.json", "text", "text.json", "tokenizer.json")  # of a converted folder, beside the DiT


def export_model(directory, params: dict, config: Config, card: dict) -> None:
  """A model folder of trained weights, in bfloat16: one file for digits; for Wan2.1's latents as `sfjax.convert` writes it.

  It appears whole or not at all, in place of what was there.

  There the VAE and the text encoder come from the folders that training began with, as far as these have them: sampling
  needs nothing else.

  Raises:
    UserError: the folder cannot be written.
  """
  if not of_wan(config.model):
    checkpoint.export(directory, params, to_dict(config), card)
    return

  def stream(path, x):
    layers = path[0].key == "blocks"
    half = lambda x: np.asarray(x).astype(jnp.bfloat16)
    pieces = lambda: (half(part) for part in x) if layers else iter([half(x)])
    return streamed.Streamed(x.shape, jnp.dtype(jnp.bfloat16), pieces, whole=not layers)

  with checkpoint.whole_folder(directory) as part:
    streamed.save(part / "dit", jax.tree_util.tree_map_with_path(stream, params["dit"]))
    folders = [pathlib.Path(x) for x in (config.train.init, config.distill.teacher) if x]
    for name in _AROUND:
      found = [folder / name for folder in folders if (folder / name).exists()]
      if found:
        _bring(found[0], part / name)
    write_json_atomic(part / "card.json", card)
    write_json_atomic(part / "config.json", to_dict(config))


def _bring(source: pathlib.Path, target: pathlib.Path) -> None:
  """A file, copied, or a folder, its files linked where that can be, as `target`, which is not there yet."""

  def link(source, target):
    try:
      os.link(source, target)
    except OSError:  # another file system, or one without links
      shutil.copy2(source, target)

  try:
    if source.is_dir():
      shutil.copytree(source, target, copy_function=link)
    else:
      shutil.copyfile(source, target)
  except (OSError, shutil.Error) as e:
    raise UserError(f"{target}: cannot be made from {source} ({getattr(e, 'strerror', None) or e})") from e


class Embedder:
  """A converted folder's text encoder: captions -> rows [B,M,E], each embedded once and kept on disk.

  Attributes:
    tokens: see `UMT5Encoder`.
  """

  _BATCH = 8

  def __init__(self, folder: pathlib.Path, length: int, config: UMT5Config):
    self._folder, self._config = folder, config
    self._encoder = UMT5Encoder(str(folder / "tokenizer.json"), length, config)
    self._encode, self.tokens = jax.jit(self._encoder.encode), self._encoder.tokens

  @property
  def _cache(self) -> TextCache:
    weights = f"{self._folder.resolve()} {(self._folder / 'text' / '_METADATA').stat().st_mtime_ns}"
    where = pathlib.Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "sfjax" / "text"
    shape = self._encoder.length, self._config.dim
    return TextCache(where, self._encoder.identity(weights), shape, self._config.dtype)

  def _encoding(self):
    """For `TextCache.embed`; the weights are loaded where a prompt is new, once, and gone with this function."""
    params = functools.cache(lambda: wan.load_text(self._folder, self._config))
    return lambda some: np.asarray(self._encode(params(), self.tokens(some)))

  def __call__(self, captions: list[str], flag: str = "--prompt") -> Float[np.ndarray, "B M E"]:
    return self._cache.embed(captions, self._encoding(), self._BATCH, flag)

  def prepare(self, captions: dict[str, list[str]]) -> None:
    """Embeds those, given by their flags, that are not on disk yet; raises UserError at one that is not valid text."""
    cache, encode = self._cache, self._encoding()
    for flag, some in captions.items():
      new = [caption for caption in some if not cache.path(caption, flag).is_file()]
      for batch in itertools.batched(new, self._BATCH):
        cache.embed(list(batch), encode, self._BATCH, flag)


def embedder(folder, model: ModelConfig, flag: str = "--checkpoint") -> Embedder:
  """The text encoder of a converted folder, in the model's dtype. Raises UserError: there is none."""
  folder = pathlib.Path(folder)
  sizes = dataclasses.replace(_sizes(folder, "text", UMT5Config, flag), dtype=model.dtype, param_dtype=model.dtype)
  return Embedder(folder, model.text_len, sizes)


def around(config: Config, folder: pathlib.Path | None = None) -> tuple[Config, Around]:
  """The config with the dtypes that its weights are held in, and the sizes of what stands around the DiT.

  Args:
    folder: a model folder; without, Wan2.1's parts or those of digits, whichever the config's latents are.

  Raises:
    UserError: the folder lacks a part, or no codec here has such latents.
  """
  model, vae, text = config.model, WanVAEConfig(), UMT5Config()
  codecs = {vae.z_dim: "Wan2.1's VAE", DigitsCodec().channels: "digits"}
  if folder is None and model.latent_channels not in codecs:
    accepted = ", ".join(f"{channels} ({name})" for channels, name in codecs.items())
    raise UserError(f"--config.model.latent_channels: {model.latent_channels}; accepted are {accepted}")
  if not (folder / "dit").is_dir() if folder else not of_wan(model):
    return config, Around(text=WordEncoder(model.text_len, model.text_dim))
  if folder:
    vae, text = _sizes(folder, "vae", WanVAEConfig), _sizes(folder, "text", UMT5Config)
  config, vae = in_compute_dtype(config, vae)
  return config, Around(vae=vae, text=dataclasses.replace(text, dtype=model.dtype, param_dtype=model.dtype))


def _digits(folder: pathlib.Path, config: Config, mesh: Mesh | None) -> Parts:
  config, sizes = around(config, folder)
  model, codec, encoder = config.model, sizes.codec, sizes.text
  like = {
    "dit": cluster.laid_out(mesh, rollout.abstract_params(model)),
    "text": jax.eval_shape(lambda: encoder.init(0)),
  }
  params = checkpoint.load_params(folder, like)
  return Parts(
    config=config,
    around=sizes,
    dit=params["dit"],
    others={"text": params["text"]},
    codec=codec,
    check=encoder.tokens,
    text=lambda captions: encoder.encode(params["text"], encoder.tokens(captions)),
    encode=lambda frames: codec.encode(jnp.asarray(frames)),
    start=lambda batch: (),
    decode=jax.jit(lambda state, latents, first: (state, codec.decode(latents, first)), static_argnums=2),
    mesh=mesh,
  )


def _wan(folder: pathlib.Path, config: Config, mesh: Mesh | None) -> Parts:
  config, sizes = around(config, folder)
  text = Embedder(folder, config.model.text_len, sizes.text)
  where = mesh and cluster.shardings(mesh, rollout.abstract_params(config.model))
  dit, pixels = wan.load_dit(folder, config.model, where), wan.load_vae(folder, sizes.vae)
  return wan_parts(config, sizes, dit, pixels, text.tokens, lambda captions: jnp.asarray(text(captions)), mesh)


def in_compute_dtype(config: Config, vae: WanVAEConfig) -> tuple[Config, WanVAEConfig]:
  """Both with weights held in the dtype that the DiT computes in."""
  dtype = config.model.dtype
  model = dataclasses.replace(config.model, param_dtype=dtype)
  return dataclasses.replace(config, model=model), dataclasses.replace(vae, dtype=dtype, param_dtype=dtype)


def wan_parts(config: Config, sizes: Around, dit: dict, pixels: dict, check, text, mesh: Mesh | None = None) -> Parts:
  """Parts around Wan2.1's DiT. pixels: the VAE's weights. check, text, mesh: see `Parts`."""
  codec = WanVAE(sizes.vae)
  return Parts(
    config=config,
    around=sizes,
    dit=dit,
    others={"vae": pixels},
    codec=codec,
    check=check,
    text=text,
    encode=_encoding(codec, pixels),
    mesh=mesh,
    **_streaming(config, codec, pixels),
  )


def _encoding(codec: WanVAE, pixels, device: jax.Device | None = None) -> Callable:
  """`encode` of `Parts` by that device, which has the weights."""
  encode = jax.jit(lambda frames: codec.encode(pixels, from_uint8(frames)))
  return lambda frames: encode(jax.device_put(frames, device))


def _streaming(config: Config, codec, pixels, device: jax.Device | None = None) -> dict[str, Callable]:
  """`start` and `decode` of `Parts` for a streaming decoder and its weights, on the device that has these."""

  def decode(state, latents, first):
    state, out = codec.decode_chunk(pixels, state, latents, first)
    return state, to_uint8(out)

  def start(batch):
    empty = functools.partial(codec.init_decoder_state, batch, *config.model.latent_size)
    if device is None:
      return empty()
    with jax.default_device(device):  # it is large: nowhere else first
      return jax.device_put(empty(), device)

  return {
    "start": start,
    # The first chunk forgets the state, but writes the next one into its place.
    "decode": jax.jit(decode, static_argnums=2, donate_argnums=0, keep_unused=True),
  }


def with_tiny_decoder(parts: Parts, file) -> Parts:
  """The same folder, its latents decoded by TAEHV's small decoder (taew2_1): several times faster, less faithful.

  Raises:
    UserError: the folder's latents are not Wan2.1's, or the file is no such decoder.
  """
  if not isinstance(parts.codec, WanVAE):
    raise UserError("--tiny_decoder: it decodes Wan2.1's latents; this model folder has others")
  dtype = parts.config.model.dtype
  sizes = dataclasses.replace(parts.around, tiny_decoder=TinyVAEConfig(dtype=dtype, param_dtype=dtype))
  codec = sizes.codec
  try:
    weights = {name: stored.read() for name, stored in open_tensors(file).items()}
    params = jax.device_put(from_official(codec.config, weights, str(file)), parts.decoder)
  except UserError as e:
    raise UserError(f"--tiny_decoder: {e}") from e
  others = parts.others | {"tiny_decoder": params}
  return dataclasses.replace(
    parts, around=sizes, others=others, **_streaming(parts.config, codec, params, parts.decoder)
  )


def with_decoder_apart(parts: Parts) -> Parts:
  """The same folder, its codec on the device behind the DiT's: it decodes a chunk while these denoise the next.

  Raises:
    UserError: this machine has no further device.
  """
  device = cluster.device_beside(parts.mesh.size if parts.mesh else 1)
  codec, config = parts.codec, parts.config
  if isinstance(codec, DigitsCodec):  # no weights, no state
    return dataclasses.replace(parts, decoder=device)
  others = {name: jax.device_put(x, device) for name, x in parts.others.items()}
  pixels = others["tiny_decoder" if parts.around.tiny_decoder else "vae"]
  moved = _streaming(config, codec, pixels, device)
  encode = _encoding(WanVAE(parts.around.vae), others["vae"], device)
  return dataclasses.replace(parts, others=others, encode=encode, decoder=device, **moved)


def _sizes(folder: pathlib.Path, part: str, config, flag: str = "--checkpoint"):
  """A part's config. Raises UserError where the part or its config is absent or damaged."""
  file = folder / f"{part}.json"
  if not file.is_file():
    raise UserError(f"{flag}: {folder} holds no {part}; convert one into it: python -m sfjax.convert SRC {folder}")
  try:
    return to_dataclass(config, json.loads(file.read_text()), f"{flag}: {file}")
  except ValueError as e:
    raise UserError(f"{flag}: {file} is damaged: {e}") from e
