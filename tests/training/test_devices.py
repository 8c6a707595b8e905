"""Two devices share a batch: a step equals the mean of the two halves' gradients, put together by hand."""

import os
import subprocess
import sys

SCRIPT = """
import dataclasses
import jax, jax.numpy as jnp, numpy as np, optax
from sfjax import teacher_forcing, training
from sfjax.codec import DigitsCodec
from sfjax.config import Config, Stage, load_config, to_dataclass
from sfjax.objective import loss
from sfjax.optimizer import optimizer

assert jax.device_count() == 2
config = to_dataclass(Config, load_config("configs/digits.py:tiny"))
stage = Stage(1.0, chunks=2, batch=2, firsts=2)
params = teacher_forcing.init_model(config)
tx = optimizer(config.train)
state = {"step": jnp.int32(7), "params": params, "ema": jax.tree.map(jnp.copy, params), "opt": tx.init(params)}
rng = np.random.default_rng(0)
frames = lambda n: rng.integers(0, 255, (2, n, 64, 64, 3), np.uint8)
batches = [(frames(21), np.full((2, 16), 3, np.int32)), (frames(9), np.full((2, 16), 5, np.int32))]
new, metrics = jax.jit(lambda s, b: teacher_forcing.step(config, stage, training.data_mesh(), s, (), b))(state, batches)

@jax.jit
@jax.value_and_grad
def half(p, i, batches):
  key = jax.random.fold_in(jax.random.fold_in(jax.random.key(config.train.seed), 7), i)
  value = 0.0
  for j, (part, (f, w)) in enumerate(zip(stage.parts, batches)):
    value += loss(config, part, p, DigitsCodec().encode(f), w, jax.random.fold_in(key, j))[0]
  return value

values, grads = zip(*(half(params, i, [(f[i : i + 1], w[i : i + 1]) for f, w in batches]) for i in range(2)))
mean = jax.tree.map(lambda a, b: (a + b) / 2, *grads)
np.testing.assert_allclose(metrics["loss"], sum(values) / 2, rtol=1e-5)
np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(mean), rtol=1e-4)
assert abs(values[0] - values[1]) > 1e-3 * abs(values[0])  # clips and noise differ
want = optax.apply_updates(params, tx.update(mean, state["opt"], params)[0])
for a, b, old in zip(*(jax.tree.leaves(x) for x in (new["params"], want, params))):
  # fp32 sums in another order; Adam divides by the gradient's size, so tiny gradients move by up to the rate
  assert np.linalg.norm(a - b) <= 1e-2 * np.linalg.norm(b - old) + 1e-7
print("equal")
"""


def test_a_step_on_two_devices_is_the_mean_of_both_halves():
  env = dict(os.environ, JAX_NUM_CPU_DEVICES="2", JAX_PLATFORMS="cpu")
  done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True)
  assert done.returncode == 0 and done.stdout.strip() == "equal", done.stderr[-2000:]
