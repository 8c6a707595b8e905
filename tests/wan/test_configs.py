"""Wan2.1's configs: what their docstrings say of bytes, and the saving that the method promises."""

import re

import pytest

from sfjax.config import Config, load_config, to_dataclass
from sfjax.memory import memory_bytes


def kv_bytes(file: str, variant: str) -> int:
  config = to_dataclass(Config, load_config(f"configs/{file}.py:{variant}"))
  return memory_bytes(config.model, config.memory)["kv"]


@pytest.mark.parametrize("file", ["wan_1_3b", "wan_14b"])
def test_docstrings_tell_the_bytes(file):
  with open(f"configs/{file}.py") as f:
    told = [float(x) for x in re.findall(r"([\d.]+) GB", f.read())]
  sizes = [kv_bytes(file, variant) for variant in ("sparse", "window", "dense")]
  model = to_dataclass(Config, load_config(f"configs/{file}.py")).model
  unpadded = 2 * model.layers * model.dim * 21 * 1560 * 2  # keys and values of 21 frames, bfloat16
  assert told[:3] == [round(x / 1e9, 2) for x in sizes]
  assert told[3] == round(unpadded / 1e9, 2)
  assert sizes[0] <= 0.55 * unpadded  # 45 % below 21 dense frames


def test_variants():
  config = to_dataclass(Config, load_config("configs/wan_1_3b.py:bidirectional"))
  assert config.model.chunk_frames == 21 and config.memory.window == 1 and not config.memory.selects
  steps = lambda variant: to_dataclass(Config, load_config(f"configs/wan_1_3b.py:{variant}")).sampler.steps
  assert [steps(v) for v in ("bidirectional", "teacher_forcing", "ode", "student")] == [50, 50, 4, 4]
  with pytest.raises(Exception, match="unknown variant 'spars'"):
    load_config("configs/wan_1_3b.py:spars")
