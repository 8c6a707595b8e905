"""Wan2.1-T2V-14B at 832x480, 16 fps: python -m sfjax.convert SRC DIR makes a folder with such a config.

Variants: "sparse" (the default: a window of 3 chunks read at 25 %, 56 persistent blocks; 14.69 GB of keys, values and pooled
keys), "window" (4 chunks, 15.64 GB), "dense" (21 latents, 27.37 GB, Self-Forcing's cache; 26.84 GB without the padding of
blocks and pooled keys), "bidirectional" (one chunk of 21 latents, 50 steps: plain Wan2.1).

For training, from converted folders (--config.train.init=DIR): "bidirectional" and "teacher_forcing" (the sparse memory) on
clips (--config.data.path=P: what python -m sfjax.latents --checkpoint DIR --videos FOLDER --out P made); "ode" on trajectories
(--config.data.path=P: of python -m sfjax.ode --checkpoint DIR --prompts FILE --out P); "student" and "student_dense", 4 steps
with that memory, distilled (--config.distill.teacher=DIR, --config.data.path=FILE: prompts, one a line).
"""

from sfjax.config import to_config_dict
from sfjax.model import ModelConfig
from sfjax.wan import wan_config


def get_config(variant=""):
  return to_config_dict(wan_config(ModelConfig.wan_14b(), variant or "sparse"))
