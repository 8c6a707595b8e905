"""`python -m sfjax.ledger --training`: what is held is exact, the rest near what XLA said; what it prints and refuses."""

import re

import jax
import numpy as np
import pytest

from sfjax import ledger, self_forcing, training_ledger
from sfjax.config import Config, load_config, read_config, to_dataclass


def predicted(
  spec: str, devices: int, teacher=None, critic=None, tensor=1, offload="none"
) -> training_ledger.Prediction:
  split = {"train.fsdp": str(devices // tensor), "train.tensor": str(tensor), "train.offload": offload}
  config = read_config(spec, split)
  return training_ledger.predict(config, *training_ledger.judges(config, teacher, critic), devices)


# Compiled ahead of time for H100s: arguments and temporary bytes, GB. The estimate was made from the arrays that were alive in
# the first of these at its fullest; XLA leaves 4 GB between them. The second one tells how far it carries: 6 %.
@pytest.mark.parametrize(("devices", "held", "workspace"), [(1, 42.58, 30.23), (8, 5.33, 36.49)])
def test_what_xla_said_of_the_step_at_full_size(devices, held, workspace):
  p = predicted("configs/wan_1_3b.py:student", devices)
  assert round(sum(p.held.values()) / 1e9, 2) == held
  assert p.workspace / 1e9 == pytest.approx(workspace, rel=0.1)


def test_what_an_h200_needed_with_the_optimiser_in_the_hosts_memory():
  p = predicted("configs/wan_1_3b.py:student", 1, offload="optimizer")
  assert round(sum(p.held.values()) / 1e9, 2) == 14.20 and round(sum(p.host.values()) / 1e9, 2) == 28.38
  assert p.workspace / 1e9 == pytest.approx(43.91, rel=0.1)  # benchmarks/results/distill_1_3b_offload_h200.json


@pytest.mark.parametrize("variant", ["student", "student_memory"])
def test_held_are_the_arrays_of_a_run(variant):
  """The digits' student, whose teacher is in a folder and whose words are learnt; shards: in test_wan_student.py."""
  config = to_dataclass(Config, load_config(f"configs/digits.py:{variant}"))
  p = training_ledger.predict(config, *training_ledger.judges(config), 1)
  state, (stage,) = self_forcing.state(config), config.train.stages
  batch = {"caption": ["a red 3"] * stage.batch}
  if stage.known:
    batch |= {"frames": np.zeros((stage.batch, 45, 64, 64, 3), np.uint8), "prefix": np.zeros(stage.batch, np.int32)}
  text, start = self_forcing.inputs(config, batch)
  arrays = {name: state[name] for name in ("params", "ema", "opt", "critic", "critic_opt")}
  arrays["teacher"] = self_forcing.fixed(config)
  arrays["step"] = (state["step"], text.prompt, np.array(text.null), start, np.arange(stage.batch, dtype=np.int32))
  assert p.held == {name: sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree)) for name, tree in arrays.items()}


def test_what_devices_share_and_what_each_has_whole():
  one, eight = (predicted("configs/wan_1_3b.py:student", n) for n in (1, 8))
  large = predicted("configs/wan_1_3b.py:student", 8, "configs/wan_14b.py", "configs/wan_1_3b.py")
  assert one.gradient["gathered"] == one.rollout["gathered"] == 0
  for name in training_ledger.HELD:
    if name != "step":
      assert one.held[name] / 8 == pytest.approx(eight.held[name], rel=1e-3)  # vectors are not split
  whole = one.held["params"] + one.held["critic"] + one.held["teacher"]
  assert eight.gradient["gathered"] == pytest.approx(whole, rel=1e-3)
  for name in ("kept", "inputs", "layer", "gradient"):
    assert one.gradient[name] == eight.gradient[name] == large.gradient[name]
  gathered = large.gradient["gathered"] - eight.gradient["gathered"]
  assert gathered == pytest.approx(8 * (large.held["teacher"] - eight.held["teacher"]), rel=1e-3)
  same = set(training_ledger.HELD) - {"teacher"}
  assert {name: large.held[name] for name in same} == {name: eight.held[name] for name in same}


def test_clips_on_each_device():
  config = to_dataclass(Config, load_config("configs/digits.py:student"))
  judges = training_ledger.judges(config)
  two, four = (training_ledger.predict(config, *judges, n) for n in (2, 4))
  for name in ("memory", "kept"):
    assert two.rollout[name] == pytest.approx(2 * four.rollout[name], rel=1e-3)
  for name in ("kept", "inputs", "layer"):
    assert two.gradient[name] == 2 * four.gradient[name]
  assert two.held["params"] == four.held["params"] and two.held["step"] == 2 * four.held["step"] - 4


def test_what_heads_share():
  """Of 8 devices' state as much lies on each, but for vectors; of what is gathered, found and remembered a part."""
  apart, heads = predicted("configs/wan_1_3b.py:student", 8), predicted("configs/wan_1_3b.py:student", 8, tensor=4)
  for name in training_ledger.HELD:
    assert heads.held[name] == pytest.approx(apart.held[name], rel=0.06), name  # what no head has is split over two
  for whole, part in ((apart.rollout, heads.rollout), (apart.gradient, heads.gradient)):
    for name in whole.keys() - {"inputs", "zeros"}:  # of these, some are not of heads, or of what is held
      assert whole[name] / 4 <= part[name] <= (whole[name] / 4) * 1.1, name
  assert heads.gradient["inputs"] == apart.gradient["inputs"]


def test_what_lies_in_the_hosts_memory():
  here, away = (predicted("configs/wan_1_3b.py:student", 8, offload=x) for x in ("none", "optimizer"))
  assert not here.host and set(away.host) == {"ema", "opt", "critic_opt"}
  for name in training_ledger.HELD:
    assert away.held[name] + away.host.get(name, 0) == here.held[name]
  vectors = sum(away.held[name] for name in away.host)
  assert 0 < vectors < 0.001 * sum(away.host.values())
  assert away.workspace == here.workspace + max(away.host.values())


def test_a_split_of_heads_that_fits_is_told(capsys):
  ledger.main("--training --config configs/wan_14b.py:student --devices 64 --config.train.fsdp=64".split())
  told = capsys.readouterr().out.splitlines()[-1]
  assert told.startswith("does not fit in 80 GB; --config.train.tensor=8 --config.train.fsdp=8 takes ")
  p = predicted("configs/wan_14b.py:student", 64, tensor=8)
  assert told.endswith(f" takes {p.total / 1e9:.1f} GB") and p.total < 80e9
  flags = "--training --config configs/wan_14b.py:student --devices 64 --config.train.fsdp=8 --config.train.tensor=8"
  ledger.main(flags.split())
  out = capsys.readouterr().out
  assert "1 clip(s) on each of 8 groups of 8 devices, the state split over 64" in out
  assert out.splitlines()[-1] == "fits in 80 GB by this estimate"


def test_what_is_printed(capsys):
  ledger.main("--training --config configs/wan_14b.py:student --devices 8 --config.train.fsdp=8".split())
  out = capsys.readouterr().out
  assert out.startswith("configs/wan_14b.py:student: 1 clip(s) on each of 8 device(s), the state split over 8")
  rows = {what: int(n.replace(",", "")) for what, n in re.findall(r"\| (.+?) \| [\d.]+ \| ([\d,]+) \|", out)}
  p = predicted("configs/wan_14b.py:student", 8)
  assert rows["**held**"] == sum(p.held.values()) and rows["**together, about**"] == p.total
  assert p.total == rows["**held**"] + rows["**workspace of the gradient, about**"]
  last = out.splitlines()[-1]
  offload = predicted("configs/wan_14b.py:student", 8, tensor=8, offload="optimizer")
  flags = "--config.train.tensor=8 --config.train.fsdp=1 --config.train.offload=optimizer"
  assert last == f"does not fit in 80 GB; {flags} takes {offload.total / 1e9:.1f} GB"
  ledger.main("--training --config configs/wan_14b.py:student --devices 4 --config.train.fsdp=4".split())
  last = capsys.readouterr().out.splitlines()[-1]
  assert last.startswith(
    "does not fit in 80 GB; what would help and is not written yet: weights gathered a layer at a time, "
  )
  helped = [float(x) for x in re.findall(r"([\d.]+) GB(?:;|$)", last.split(": ")[1])]
  assert helped == sorted(helped, reverse=True) and len(helped) == 4
  assert 80 < helped[-1] and helped[0] < predicted("configs/wan_14b.py:student", 4).total / 1e9
  ledger.main("--training --config configs/wan_1_3b.py:student".split())
  assert capsys.readouterr().out.splitlines()[-1] == "fits in 80 GB by this estimate"
  ledger.main("--training --config configs/digits.py:student".split())
  assert capsys.readouterr().out.splitlines()[-1].startswith("estimated for remat full; config.model.remat is dots")


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ("--training --devices 0", "--devices: 0; want 1 or more"),
    ("--training --devices 8 --config.train.fsdp=3", "config.train.fsdp: 3 does not divide 8 devices"),
    ("--training --devices 8 --config.train.tensor=3", "config.train.tensor: 3 does not divide 8 devices"),
    (
      "--training --devices 8 --config.train.tensor=8",
      "config.train.tensor: 8 does not divide the student's 12 heads and ffn_dim 8960",
    ),
    ("--training --batch 2", "--batch: 2; wanted without --training alone"),
    ("--training --decode_apart", "--decode_apart: True; wanted without --training alone"),
    ("--devices 5", "--devices: 5 does not divide the model's 12 heads"),
    ("--teacher configs/wan_14b.py", "--teacher: configs/wan_14b.py; wanted with --training alone"),
    ("--training --teacher absent.py", "--teacher: absent.py is not a python file"),
    ("--training --critic configs/digits.py", "--critic: its latent_size is (32, 32); want the student's, (60, 104)"),
    ("--training --config.distill.teacher=absent", "config.distill.teacher: absent is not a folder"),
    (
      "--training --config.distill.latents=22",
      "config.distill.teacher: its clips have 22 latents; want a multiple of 3",
    ),
  ],
)
def test_what_is_refused(refused, flags, says):
  assert says in refused(ledger.main, "--config", "configs/wan_1_3b.py:student", *flags.split())


def test_a_batch_that_does_not_divide_is_refused(refused):
  flags = "--training --config configs/digits.py:student --devices 3".split()
  assert "config.train.stages: batch 32 does not divide over 3 devices" in refused(ledger.main, *flags)
