"""Handwritten digits, 64x64 at 16 fps: the whole method on one GPU in minutes, and on a laptop's CPU.

Variants: "" (sparse, learned importance: the shipped model), "attention" (the paper's rule), "window" (the same KV bytes,
no P), "dense" (21 latents), "base" (the common dense start of all of them), "teacher" (bidirectional, 21 latents at once: what
distillation learns from), "student" (4 steps, distilled against the teacher), "ode" (4 steps, from trajectories that
`python -m sfjax.ode` wrote: --config.data.path=DIR), "tiny" (a smoke test).

"student_memory": the student goes on; rollouts begin with real digits that are then hidden. The same with other memories is
the ablation, 8 minutes of one H100 each (python train.py --config configs/digits.py:VARIANT --workdir DIR):
"student_attention" (the paper's importance), "student_no_persistent", "student_all_blocks" (nothing of the window left
out), "student_window" (the same KV bytes, no P), "student_dense" (21 latents).
"""

import dataclasses

from sfjax.config import Config, DataConfig, DistillConfig, Stage, TrainConfig, to_config_dict
from sfjax.flow import SamplerConfig
from sfjax.model import ModelConfig
from sfjax.routing import MemoryConfig

# rope_cap: acts in training's longest clips (72 frames), so that "as old as can be" is an age seen often
SPARSE = MemoryConfig(
  window=2, persistent=16, top_k=0.25, importance="learned", novelty=5.0, rope_cap=30, route_parts=2
)
SHIFT = 15.0  # large bright shapes, the same in nine frames: they are decided above sigma 0.9 (NOTES.md)
CLIP_SHIFT = 40.0  # 21 latents say the same seven times as often as 3: sqrt(7) times the noise decides the same
MEMORY = {
  "": SPARSE,
  "base": SPARSE,
  "tiny": SPARSE,
  "teacher": MemoryConfig(window=1),
  "attention": dataclasses.replace(SPARSE, importance="attention", novelty=0.0),
  "window": MemoryConfig(window=3),
  "dense": MemoryConfig(window=7),
}
MEMORY |= {
  "student": SPARSE,
  "student_memory": SPARSE,
  "student_attention": MEMORY["attention"],
  "student_no_persistent": dataclasses.replace(SPARSE, persistent=0),
  "student_all_blocks": dataclasses.replace(SPARSE, top_k=1.0),
  "student_window": MEMORY["window"],
  "student_dense": MEMORY["dense"],
  "ode": SPARSE,
}
FEW_STEPS = SamplerConfig(kind="few_step", steps=4, shift=SHIFT)


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
  if variant == "teacher":  # from a causal model's weights: clips of 24 latents, of which it sees the first or last 21
    stages = (Stage(until=1.0, chunks=8, batch=32, p_memory=0.4, hide=(1, 3)),)
    train = TrainConfig(
      steps=4500, stages=stages, optimizer="muon", lr=1e-3, shift=CLIP_SHIFT, p_known=0.0, init="checkpoints/digits"
    )
  shift = CLIP_SHIFT if variant == "teacher" else SHIFT
  distill, sampler = DistillConfig(), SamplerConfig(steps=20, shift=shift, guidance=6.0)
  data = DataConfig()
  if variant == "ode":
    stages = (Stage(until=1.0, chunks=7, batch=32),)
    train = TrainConfig(steps=1500, stages=stages, optimizer="muon", lr=5e-4, shift=SHIFT, init="checkpoints/digits")
    data, sampler = DataConfig(source="ode"), FEW_STEPS
  if variant.startswith("student"):  # rollouts of up to 28 chunks, the last 7 judged
    stages = (Stage(until=1.0, chunks=28, batch=32, p_memory=0.3, hide=(1, 2)),)
    train = TrainConfig(
      steps=620, stages=stages, lr=1e-4, betas=(0.0, 0.999), warmup=30, decay=0.3, ema=0.99, log_every=10, save_every=100,
      init="checkpoints/digits",
    )  # fmt: skip
    distill = DistillConfig(
      teacher="checkpoints/digits_teacher",
      guidance=5.0,
      shift=30.0,
      levels=(0.02, 0.995),
      critic_updates=4,
      critic_lr=3e-4,
    )
    sampler = FEW_STEPS
  if variant.startswith("student_"):  # 2 to 4 of 7 chunks are real, till the cover rests; 1 to 3 hide, 2 or more show
    stages = (dataclasses.replace(stages[0], known=4, p_memory=0.5, hide=(1, 3)),)
    train = dataclasses.replace(train, steps=440, stages=stages, init="checkpoints/digits_student")
  model = ModelConfig.digits(remat="dots", chunk_frames=21 if variant == "teacher" else 3)
  if variant == "tiny":
    model = ModelConfig.digits(dim=64, layers=2, heads=1, ffn_dim=64, dtype="float32")
    stages = (Stage(0.5, chunks=2, batch=2, dense=True), Stage(1.0, chunks=5, batch=2, p_memory=0.5, hide=(1, 1)))
    train = TrainConfig(steps=8, stages=stages, warmup=2, log_every=2, save_every=2)
  return to_config_dict(
    Config(
      name="digits",
      model=model,
      memory=MEMORY[variant],
      sampler=sampler,
      data=data,
      train=train,
      distill=distill,
    )
  )
