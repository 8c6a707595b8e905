"""Handwritten digits, 64x64 at 16 fps: the whole method on one GPU in minutes, and on a laptop's CPU.

Variants: "" (sparse, learned importance: the shipped model), "attention" (the paper's rule), "window" (the same KV bytes,
no P), "dense" (21 latents), "base" (the common dense start of all of them), "tiny" (a smoke test).
"""

import dataclasses

from sfjax.config import Config, DataConfig, Stage, TrainConfig, to_config_dict
from sfjax.flow import SamplerConfig
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig

# rope_cap: acts in training's longest clips (72 frames), so that "as old as can be" is an age seen often
SPARSE = MemoryConfig(
  window=2, persistent=16, top_k=0.25, importance="learned", novelty=5.0, rope_cap=30, route_parts=2
)
SHIFT = 15.0  # large bright shapes, the same in nine frames: they are decided above sigma 0.9 (NOTES.md)
MEMORY = {
  "": SPARSE,
  "base": SPARSE,
  "tiny": SPARSE,
  "attention": dataclasses.replace(SPARSE, importance="attention", novelty=0.0),
  "window": MemoryConfig(window=3),
  "dense": MemoryConfig(window=7),
}


def get_config(variant=""):
  if variant not in MEMORY:
    raise ValueError(f"unknown variant {variant!r}; accepted are {', '.join(repr(v) for v in MEMORY)}")
  stages = (Stage(until=1.0, chunks=25, batch=8, p_memory=0.6, hide=(1, 18), firsts=96),)
  train = TrainConfig(steps=1300, stages=stages, optimizer="muon", lr=2e-3, shift=SHIFT)
  if variant == "base":
    stages = (
      Stage(until=0.6, chunks=1, batch=128, dense=True),
      Stage(until=0.78, chunks=5, batch=24, dense=True, p_memory=0.5, hide=(1, 1)),
      Stage(until=1.0, chunks=9, batch=12, dense=True, p_memory=0.7, hide=(1, 4)),  # reading far back is learnt dense
    )
    train = TrainConfig(steps=12000, stages=stages, optimizer="muon", lr=2e-3, shift=SHIFT, warmup=200, decay=0.2)
  if variant == "tiny":
    stages = (Stage(0.5, chunks=2, batch=2, dense=True), Stage(1.0, chunks=5, batch=2, p_memory=0.5, hide=(1, 1)))
    train = TrainConfig(steps=8, stages=stages, warmup=2, log_every=2, save_every=2)
  model = ModelConfig.digits(remat="dots")
  if variant == "tiny":
    model = ModelConfig.digits(dim=64, layers=2, heads=1, ffn_dim=64, dtype="float32")
  return to_config_dict(
    Config(
      name="digits",
      model=model,
      memory=MEMORY[variant],
      sampler=SamplerConfig(steps=20, shift=SHIFT, guidance=6.0),
      data=DataConfig(),
      train=train,
    )
  )
