"""`python -m sfjax.ledger`: predicted bytes are those of the arrays, and what it prints and refuses."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest

from sfjax import ledger, sampling
from sfjax.memory import memory_bytes
from sfjax.sampling import Sampler


def nbytes(tree) -> int:
  return sum(np.asarray(x).nbytes for x in jax.tree.leaves(tree))


def without_flight(rows: dict) -> dict:
  return {name: n for name, n in rows.items() if name not in ("in_flight", "total")}


@pytest.mark.parametrize("attention", sampling.ATTENTION)
@pytest.mark.parametrize(("guidance", "slots"), [(1, "float8"), (6, "model")])
def test_predicted_are_the_arrays_of_a_run(model_folder, attention, guidance, slots):
  sampler = Sampler(model_folder, attention, slots=slots, guidance=guidance)
  memory = sampler.start(["a red 3", "a blue 7"])
  predicted = ledger.predict(sampler.config, sampler.parts.around, batch=2)
  measured = ledger.measure(sampler.parts, sampler.config.memory, memory, sampler.parts.start(2))
  assert without_flight(predicted) == without_flight(measured)
  assert measured["total"] == nbytes((memory, sampler.parts.dit, sampler.parts.others))
  assert predicted["total"] == measured["total"] + predicted["in_flight"]
  kv = memory_bytes(sampler.config.model, sampler.config.memory, 2 * (1 + (guidance != 1)))
  assert predicted["persistent"] + predicted["window"] + predicted["pooled"] == kv["kv"]
  assert (predicted["bookkeeping"], predicted["cross"]) == (kv["bookkeeping"], kv["cross"])
  assert (predicted["persistent"] > 0) == (attention == "sparse")


def test_chunks_in_flight_and_what_run_json_tells(run_sample, config, monkeypatch):
  made, begin = [], sampling.Stream._begin

  def spy(self, *args):
    found = begin(self, *args)
    made.append(2 * found[1].nbytes + found[2].nbytes)  # the latents given are as large as those made
    return found

  monkeypatch.setattr(sampling.Stream, "_begin", spy)
  told = run_sample("--prompt", "a red 3", "--seconds", 1.2).record["device_bytes"]
  assert told["predicted"]["in_flight"] == 2 * made[1] > 2 * made[0]  # the first chunk has 9 frames of pixels
  assert without_flight(told["predicted"]) == without_flight(told["measured"])
  assert told["measured"]["total"] == sum(without_flight(told["measured"]).values())
  assert told["workspace"].keys() == {"chunk", "decode", "decode first"} and told["workspace"]["chunk"] > 0


@pytest.mark.parametrize("frames", [9, 21])
def test_the_workspace_is_told_without_compiling(model_folder, frames, caplog):
  sampler = Sampler(model_folder, guidance=1)
  dit = jax.device_put(sampler.parts.dit, jax.devices()[0])  # as Orbax restores it
  sampler.parts = dataclasses.replace(sampler.parts, dit=dit)
  stream = sampler.stream(sampler.start(["a red 3"]), frames, 0, [0])
  jax.config.update("jax_log_compiles", True)  # of all threads, the stream's too
  try:
    list(stream)
    assert "Compiling jit" in caplog.text
    caplog.clear()
    assert stream.workspace()["chunk"] > 0
    assert "Compiling jit" not in caplog.text
  finally:
    jax.config.update("jax_log_compiles", False)


def printed(capsys, *flags) -> list[dict[str, int]]:
  """The tables that the command prints."""
  ledger.main(list(map(str, flags)))
  tables = capsys.readouterr().out.split("|---|---|---|")[1:]
  return [
    {what: int(n.replace(",", "")) for what, n in re.findall(r"\| (.+?) \| [\d.]+ \| ([\d,]+) \|", t)} for t in tables
  ]


def slots(rows: dict[str, int]) -> int:
  return sum(n for what, n in rows.items() if "slots" in what or what == "pooled keys")


def test_wan_variants(capsys):
  sizes = {}
  for file, parameters in (("wan_1_3b", 1_418_996_800), ("wan_14b", 14_288_491_584)):
    for variant in ("", ":window", ":dense"):
      sampling_rows, embedding = printed(capsys, "--config", f"configs/{file}.py{variant}")
      assert sampling_rows["DiT"] == embedding["DiT"] == 2 * parameters
      assert ("K/V slots of P" in sampling_rows) == (variant == "")
      for rows in (sampling_rows, embedding):
        assert rows["**total**"] == sum(n for what, n in rows.items() if what != "**total**")
      sizes[file + variant] = slots(sampling_rows)
  assert {name: round(n / 1e9, 2) for name, n in sizes.items()} == {
    "wan_1_3b": 3.31, "wan_1_3b:window": 3.52, "wan_1_3b:dense": 6.16,
    "wan_14b": 14.69, "wan_14b:window": 15.64, "wan_14b:dense": 27.37,
  }  # fmt: skip


def test_a_whole_history_a_batch_and_keys(capsys):
  flags = ("--config", "configs/digits.py")
  one, *rest = printed(capsys, *flags)
  assert not rest  # the words' encoder is no matter of its own
  (two,) = printed(capsys, *flags, "--batch", 2)
  assert slots(two) == 2 * slots(one) and two["DiT"] == one["DiT"]
  (alone,) = printed(capsys, *flags, "--config.sampler.guidance=1")
  assert 2 * slots(alone) == slots(one)
  (dense,) = printed(capsys, *flags, "--attention", "dense")  # 7 chunks: 81 frames
  (five,), (ten,) = (printed(capsys, *flags, "--attention", "full", "--seconds", s) for s in (5, 10))
  assert slots(five) == slots(dense) and slots(ten) == 2 * slots(dense)  # 80 frames; 160 are 14 chunks


def test_several_devices(capsys):
  flags = ("--config", "configs/wan_1_3b.py")
  one, _ = printed(capsys, *flags)
  first, decodes, _ = printed(capsys, *flags, "--devices", 3, "--decode_apart")
  assert 3 * slots(first) == slots(one) and first["DiT"] == one["DiT"]
  assert decodes["the decoder's state"] == one["the decoder's state"] and first.keys() & decodes.keys() == {
    "latents and pixels of two chunks",
    "**total**",
  }


def test_a_model_folder(capsys, model_folder):
  (rows,) = printed(capsys, "--checkpoint", model_folder)
  sampler = Sampler(model_folder)
  assert rows["**total**"] == ledger.predict(sampler.config, sampler.parts.around)["total"]
  (halved,) = printed(capsys, "--checkpoint", model_folder, "--config.model.dtype=bfloat16")
  assert halved["K/V slots of P"] * 2 == rows["K/V slots of P"] and halved["DiT"] == rows["DiT"]


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ("", "one of the arguments --config --checkpoint is required"),
    ("--config configs/digits.py --checkpoint checkpoints/digits", "--checkpoint: not allowed with argument --config"),
    ("--config absent.py", "--config: absent.py is not a python file"),
    ("--config configs/wan_1_3b.py:spars", "unknown variant 'spars'; accepted are 'sparse'"),
    ("--config configs/digits.py --config.memory.windw=3", "did you mean --config.memory.window?"),
    ("--config configs/digits.py --config.memory.window=0", "config.memory.window: 0; want at least 1 chunk"),
    ("--config configs/digits.py --config.model.latent_channels=5", "5; accepted are 16 (Wan2.1's VAE), 48 (digits)"),
    ("--config configs/digits.py --attention some", "--attention: invalid choice: 'some' (choose from"),
    ("--config configs/digits.py --attention full", "--seconds: wanted with --attention full, and only there"),
    ("--config configs/digits.py --seconds 5", "--seconds: wanted with --attention full, and only there"),
    ("--config configs/digits.py --attention full --seconds nan", "--seconds: nan; want more than 0"),
    ("--config configs/digits.py --batch 0", "--batch: 0; want 1 or more"),
    ("--config configs/digits.py --batch x", "--batch: invalid int value: 'x'"),
    ("--checkpoint absent", "--checkpoint: absent is not a folder"),
    ("--checkpoint tests", "--checkpoint: tests holds no model"),
  ],
)
def test_what_is_refused(refused, flags, says):
  assert says in refused(ledger.main, *flags.split())


def test_a_damaged_folder_is_refused(refused, tmp_path):
  (tmp_path / "config.json").write_text("{")
  assert f"--checkpoint: {tmp_path / 'config.json'} is damaged" in refused(ledger.main, "--checkpoint", tmp_path)
  (tmp_path / "config.json").write_text(json.dumps({"name": "x"}))
  assert "--checkpoint: config: missing key 'model'" in refused(ledger.main, "--checkpoint", tmp_path)
