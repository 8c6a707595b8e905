"""Wan2.1's settings in this package, the sparse memory and those it is compared with; and its parts from a converted folder."""

import dataclasses
import pathlib

import jax

from sfjax import rollout, streamed, wan_vae_keys
from sfjax.config import Config, DataConfig, DistillConfig, Stage, TrainConfig
from sfjax.flow import SamplerConfig
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig
from sfjax.umt5 import UMT5Config, abstract_umt5
from sfjax.wan_vae import WanVAEConfig

MEMORY = {
  "sparse": MemoryConfig(window=3, persistent=56, top_k=0.25, rope_cap=21),
  "window": MemoryConfig(window=4),  # about the same bytes
  "dense": MemoryConfig(window=7),  # 21 latents, Self-Forcing's cache
  "bidirectional": MemoryConfig(window=1),  # one chunk of 21 latents
}
SAMPLING = ("sparse", "window", "dense")  # the other variants are to be trained
MEMORY |= dict.fromkeys(("teacher_forcing", "ode", "student"), MEMORY["sparse"]) | {"student_dense": MEMORY["dense"]}
CLIP = 21  # latents of a clip, 81 frames
# What Wan2.1's guidance leads away from, as it was published with the weights.
NEGATIVE = (
  "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
  "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)
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
    model = dataclasses.replace(model, chunk_frames=CLIP)
  stage = Stage(until=1.0, chunks=1 if whole else 7, batch=1)
  if variant not in SAMPLING:
    model, stage = dataclasses.replace(model, remat="full"), dataclasses.replace(stage, batch=0)
  source, train, distill = "latents", TrainConfig(steps=1000, stages=(stage,), lr=1e-5), DistillConfig()
  if variant == "ode":  # as self_forcing section 4.1, where steps and rates are not told
    source = "ode"
    train = TrainConfig(steps=3000, stages=(stage,), lr=2e-6, betas=(0.9, 0.999), clip=10.0, ema=0.99, log_every=10)
  if variant.startswith("student"):  # as Self-Forcing (section 4.5), but for five critic steps on each of the student's
    source = "prompts"
    train = TrainConfig(
      steps=120,
      stages=(stage,),
      lr=2e-6,
      betas=(0.0, 0.999),
      warmup=0,
      decay=0.001,
      clip=10.0,
      ema=0.99,
      log_every=1,
      save_every=20,
    )  # fmt: skip
    distill = DistillConfig(latents=CLIP, guidance=4.0, negative=NEGATIVE, critic_lr=4e-7)  # its 3.0 counts from 1
  return Config(
    name="wan",
    model=model,
    memory=MEMORY[variant],
    sampler=MANY_STEPS if variant in ("bidirectional", "teacher_forcing") else FEW_STEPS,
    data=DataConfig(source=source, fps=16.0),
    train=train,
    distill=distill,
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
