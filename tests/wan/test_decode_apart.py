"""The VAE on a device of its own: the same pixels, and nothing of it on the others."""

import json
import os
import subprocess
import sys

CODE = """
import dataclasses, json
import jax, numpy as np
from benchmarks import realtime
from sfjax import ledger
from sfjax.config import read_config, split_overrides
from sfjax.parts import with_decoder_apart
from sfjax.sampling import Sampler
from sfjax.wan_vae import WanVAEConfig
from tests.wan.test_realtime import TINY

config = read_config("configs/wan_1_3b.py", split_overrides([f"--config.model.{x}" for x in TINY])[1])
config = dataclasses.replace(config, memory=config.memory.of_window(2))
video = np.random.default_rng(0).integers(0, 256, (1, 16, 64, 96, 3), np.uint8)
on = lambda tree: sorted({d.id for x in jax.tree.leaves(tree) for d in x.devices()})

def made(devices, apart):
  parts = realtime.random_parts(config, WanVAEConfig(dim=8), devices=devices)
  parts = with_decoder_apart(parts) if apart else parts
  sampler = Sampler(parts, steps=1)
  stream = sampler.stream(sampler.start(["x"], 0), 40, 0, [0], prefix=video)
  pixels = np.concatenate(list(stream), 1).astype(int)
  devices = {"codec": on((stream.decoded, parts.others)), "model": on((stream.memory, parts.dit))}
  return pixels, ledger.told(parts, sampler.config, stream) | devices | {"chunks": len(stream.seconds)}

want, _ = made(1, False)
got, told = made(2, True)
told |= {"error": int(abs(got - want).max()), "shape": want.shape, "spread": int(np.ptp(want))}
print(json.dumps(told))
"""


def test_a_device_of_its_own_decodes():
  env = os.environ | dict(JAX_NUM_CPU_DEVICES="4", JAX_PLATFORMS="cpu", JAX_DISABLE_MOST_OPTIMIZATIONS="1")
  run = subprocess.run([sys.executable, "-c", CODE], env=env, capture_output=True, text=True)
  assert run.returncode == 0, run.stderr[-2000:]
  told = json.loads(run.stdout.splitlines()[-1])
  assert told["shape"] == [1, 40, 64, 96, 3] and told["spread"] > 50
  assert told["chunks"] == 3  # 13 of 16 frames were given: a chunk and a latent
  assert told["error"] <= 1  # devices share the tokens: another order of sums
  assert told["codec"] == [2] and told["model"] == [0, 1]
  latents, pixels = 3 * 8 * 12 * 16 * 4, 12 * 64 * 96 * 3
  for of, rows, more in (
    (told, {"dit", "window"}, 4 * latents),
    (told["decoder"], {"vae", "codec_state"}, 2 * (latents + pixels)),
  ):
    predicted, measured = of["predicted"], of["measured"]
    assert predicted["in_flight"] == more == predicted["total"] - measured["total"]
    assert all(measured[name] > 0 for name in rows)
  assert (
    not {"vae", "codec_state"} & {*told["predicted"], *told["measured"]} and "dit" not in told["decoder"]["measured"]
  )
  assert told["workspace"].keys() == {"chunk"} and told["decoder"]["workspace"].keys() == {"decode"}
