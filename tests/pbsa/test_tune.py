"""Tuning of the Hopper kernels: what fits is what lowers, winners are found again, and bad flags are named."""

import dataclasses
import itertools
import json

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels.pbsa import mosaic_sm90_config as configs
from pallas_kernels.pbsa import tune
from pallas_kernels.pbsa.mosaic_sm90_backward import backward_kv, backward_q
from pallas_kernels.pbsa.mosaic_sm90_forward import forward
from pallas_kernels.pbsa.mosaic_sm90_parts import Call


def lowers(kernel: str, config: configs.Config, head_dim: int, kv_valid: int) -> bool:
  """Whether Mosaic finds room for a kernel."""
  of = lambda *s, dtype=jnp.bfloat16: jax.ShapeDtypeStruct(s, dtype)
  call = Call(0.1, kv_valid, None, config)
  q, kv, row = of(1, 256, 1, head_dim), of(1, 256, 1, head_dim), of(1, 1, 256, dtype=jnp.float32)
  lists, counts, one = of(1, 1, 2, 3, dtype=jnp.int32), of(1, 1, 2, dtype=jnp.int32), of(1, dtype=jnp.int32)
  by_block = of(1, 1, 4, 2, dtype=jnp.int32), of(1, 1, 4, dtype=jnp.int32)
  run, args = {
    "forward": (lambda *x: forward(call, *x), (q, kv, kv, None, lists, counts, one)),
    "dq": (lambda *x: backward_q(call, *x), (q, kv, kv, None, lists, counts, one, q, row, row)),
    "dkv": (lambda *x: backward_kv(call, 0, *x), (q, kv, kv, None, *by_block, one, q, row, row)),
  }[kernel]
  try:
    jax.jit(run).trace(*args).lower(lowering_platforms=("cuda",))
  except ValueError as e:
    assert "shared memory" in str(e).lower() or "smem" in str(e).lower(), e
    return False
  return True


@pytest.mark.parametrize("kernel", configs.KERNELS)
def test_what_fits_is_what_lowers(kernel):
  names = configs.KERNELS[kernel]
  fit = []
  for values in itertools.product(*names.values()):
    config = dataclasses.replace(configs.heuristic(128, 60), **dict(zip(names, values, strict=True)))
    fit.append(configs.fits(config, 128, 60, kernel))
    assert fit[-1] == lowers(kernel, config, 128, 60), (values, configs.shared_memory(config, 128, 60))
  assert any(fit) and not all(fit)
  assert len(tune.candidates(kernel, 128, 60)) == sum(fit)


@pytest.mark.parametrize("head_dim, kv_valid", [(128, 60), (128, 64), (64, 48), (64, 60)])
def test_heuristics_fit(head_dim, kv_valid):
  for kernel in configs.KERNELS:
    assert configs.fits(configs.heuristic(head_dim, kv_valid), head_dim, kv_valid, kernel)


def test_shipped_winners_fit():
  for path in configs.TUNED.glob("*.json"):
    record = json.loads(path.read_text())
    assert path == configs.tuned_file(record["device"])
    for e in record["entries"]:
      config = configs.choose_config(e["head_dim"], e["kv_valid"], record["device"])
      assert dataclasses.asdict(config) == e["config"]
      assert all(configs.fits(config, e["head_dim"], e["kv_valid"], kernel) for kernel in configs.KERNELS)


def test_the_fastest_wins_and_is_found_again(tmp_path, monkeypatch):
  monkeypatch.setattr(configs, "TUNED", tmp_path)
  made = lambda c: c  # a "function to time" that is the Call itself
  monkeypatch.setattr(tune, "kernels", lambda *_: dict.fromkeys(configs.KERNELS, made))

  def fake(call, wait, runs):
    c = call.config
    if c.dq_width == 4:
      raise RuntimeError("spills")
    return {"ms": abs(c.forward_stages - 3) + c.forward_width + c.dq_stages + c.dq_width + 1 / c.dkv_blocks}

  monkeypatch.setattr(tune, "timed", fake)
  entry = tune.tune(64, 48, 1)
  want = dict(forward_stages=3, forward_width=1, dq_stages=3, dq_width=1, dkv_blocks=4)
  assert entry["config"].items() >= want.items()
  assert "spills" in entry["ms"]["dq"]["dq_stages 3, dq_width 4"]
  path = configs.tuned_file("Some GPU-7 80GB")
  assert path == tmp_path / "some_gpu_7_80gb.json"
  tune.write(path, "Some GPU-7 80GB", [{"head_dim": 64, "kv_valid": 60, "config": entry["config"]}, entry])
  tune.write(path, "Some GPU-7 80GB", [entry])
  assert len(json.loads(path.read_text())["entries"]) == 2
  assert dataclasses.asdict(configs.choose_config(64, 48, "Some GPU-7 80GB")) == entry["config"]
  assert configs.choose_config(64, 49, "Some GPU-7 80GB") == configs.heuristic(64, 49)


def test_a_ring_in_which_dq_would_wait_for_ever_is_refused():
  with pytest.raises(ValueError, match="dq_stages: 2; want 3 or more"):
    configs.Config(dq_stages=2)


@pytest.mark.parametrize(
  "argv, line",
  [
    (["--kv_valid", "65"], "--kv_valid: 65; want 1..64"),
    (["--runs", "0"], "--runs: 0; want 1 or more"),
    ([], "wants a Hopper GPU"),
  ],
)
def test_bad_calls_end_in_one_line(argv, line, capsys):
  with pytest.raises(SystemExit) as e:
    tune.main(argv)
  assert e.value.code == 2 and line in capsys.readouterr().err
