"""Wan2.1's settings in this package, the sparse memory and those it is compared with; and its parts from a converted folder."""

import dataclasses
import pathlib

import jax

from sfjax import rollout, streamed, wan_vae_keys
from sfjax.config import Config, DataConfig, Stage, TrainConfig
from sfjax.flow import SamplerConfig
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig
from sfjax.umt5 import UMT5Config, abstract_umt5
from sfjax.wan_vae import WanVAEConfig

MEMORY = {
  "sparse": MemoryConfig(window=3, persistent=60, top_k=0.25, rope_cap=21),
  "window": MemoryConfig(window=4),  # about the same bytes
  "dense": MemoryConfig(window=7),  # 21 latents, Self-Forcing's cache
  "bidirectional": MemoryConfig(window=1),  # one chunk of 21 latents
}
FEW_STEPS = SamplerConfig(kind="few_step", steps=4, shift=5.0)  # Self-Forcing's students
MANY_STEPS = SamplerConfig(kind="euler", steps=50, shift=5.0, guidance=5.0)  # Wan2.1 as it was published


def wan_config(model: ModelConfig, variant: str = "sparse") -> Config:
  """A whole config for a Wan2.1 model.

  Raises:
    ValueError: an unknown variant.
  """
  if variant not in MEMORY:
    raise ValueError(f"unknown variant {variant!r}; accepted are {', '.join(repr(v) for v in MEMORY)}")
  whole = variant == "bidirectional"
  if whole:
    model = dataclasses.replace(model, chunk_frames=21)
  stage = Stage(until=1.0, chunks=1 if whole else 7, batch=1)
  return Config(
    name="wan",
    model=model,
    memory=MEMORY[variant],
    sampler=MANY_STEPS if whole else FEW_STEPS,
    data=DataConfig(source="folder", fps=16.0),
    train=TrainConfig(steps=1000, stages=(stage,), lr=1e-5),
  )


def load_dit(folder, model: ModelConfig, shardings=None) -> dict:
  """The DiT's weights of a converted folder, in the model's parameter dtype.

  Args:
    shardings: a pytree like the weights; None puts them on one device.

  Raises:
    UserError: absent, damaged or of another config.
  """
  like = rollout.abstract_params(model)
  if shardings is not None:
    like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), like, shardings)
  return streamed.restore(pathlib.Path(folder) / "dit", like)


def load_vae(folder, config: WanVAEConfig) -> dict:
  """The VAE's weights of a converted folder. Raises UserError: absent, damaged or of another config."""
  nested = streamed.restore(pathlib.Path(folder) / "vae", wan_vae_keys.abstract(config))
  return wan_vae_keys.parameters(config, nested)


def load_text(folder, config: UMT5Config) -> dict:
  """The text encoder's weights of a converted folder. Raises UserError: absent, damaged or of another config."""
  return streamed.restore(pathlib.Path(folder) / "text", abstract_umt5(config))
