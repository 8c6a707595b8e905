"""Programs for a mesh of GPUs, lowered without one: kernels are each device's own, and devices send each other little."""

import dataclasses
import re
import types

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from pallas_kernels.add_norm import mosaic_sm90 as add_norm
from pallas_kernels.few_keys import mosaic_sm90 as few_keys
from pallas_kernels.gelu_linear import mosaic_sm90 as gelu_linear
from pallas_kernels.pbsa import api
from pallas_kernels.slots import mosaic_sm90 as slots
from sfjax import axes, objective, rollout
from sfjax.config import Config, Stage, load_config, to_dataclass
from sfjax.memory import split
from sfjax.parts import in_compute_dtype
from sfjax.wan_vae import WanVAEConfig

HOPPER = types.SimpleNamespace(compute_capability="9.0", device_kind="NVIDIA H100 80GB HBM3", core_count=132)


@pytest.fixture(autouse=True)
def on_hopper(monkeypatch):
  for module in (add_norm, api, few_keys, gelu_linear, slots):
    monkeypatch.setattr(module, "current_device", lambda: HOPPER)


@pytest.fixture(scope="module")
def config():
  """1.3B, but one layer."""
  config, _ = in_compute_dtype(to_dataclass(Config, load_config("configs/wan_1_3b.py")), WanVAEConfig())
  return dataclasses.replace(config, model=dataclasses.replace(config.model, layers=1))


def lowered(mesh, fn, *args):
  """Text of a program for GPUs. args: of (shapes, specs)."""
  of = lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))
  args = [jax.tree.map(lambda spec, x: jax.tree.map(lambda x: of(x, spec), x), specs, x) for x, specs in args]
  return fn.trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def sent(text, how="all_reduce") -> list[str]:
  """Shapes of what devices sum, or send each other otherwise, in no order."""
  return sorted(re.findall(rf'"stablehlo.{how}".*?\}}>?(?: \(\{{.*?\}}\))? : \(tensor<([^>]+)>\)', text, re.S))


@pytest.mark.parametrize("slots", ["model", "float8"])
def test_sampling_a_chunk(config, slots):
  config = dataclasses.replace(config, memory=dataclasses.replace(config.memory, slots=slots))
  mesh, model = AbstractMesh((4,), ("tokens",)), config.model
  params, whole = rollout.abstract_params(model), PartitionSpec()
  text = jax.ShapeDtypeStruct((1, model.text_len, model.text_dim), jnp.float32)
  memory = jax.eval_shape(lambda p, t: rollout.start(model, config.memory, p, t), params, text)
  known = jax.ShapeDtypeStruct((1, 3, *model.latent_size, model.latent_channels), jnp.float32)
  rest = jax.eval_shape(lambda: (jax.random.key(0), jnp.zeros(1, jnp.int32)))
  program = rollout.Compiled(model, config.memory, config.sampler, mesh).chunk
  args = [(x, whole) for x in (*rest, known, jax.ShapeDtypeStruct((3,), bool))]
  text = lowered(mesh, program, (params, whole), (memory, split("tokens")), *args)
  # Attention to the memory and to the prompt, of a denoising pass and of the commit, and four norms and a GELU of each.
  assert text.count("@mosaic_gpu_v2") == 4 + 8 + 2 and not sent(text)
  there, back = "4x3x1x1200x3x128xbf16", "4x1x1200x3x128xbf16"  # q, k and v, and what attention found
  assert sent(text, "all_to_all") == sorted([there, back] * 2 + [there])  # of the commit's last layer, for the memory
  assert sent(text, "all_gather") == ["1x1x1200x64xf32"]  # the prediction


def test_the_gradient_of_a_clip(config):
  """Two chunks under teacher forcing: their clean and noisy tokens side by side, three chunks' of them."""
  mesh, model, stage = AbstractMesh((1, 2, 1, 2), axes.AXES), config.model, Stage(1.0, chunks=2, batch=2)
  weights, keys = axes.split(rollout.abstract_params(model)), jax.random.split(jax.random.key(0), 1)

  def gradient(params, x, text):
    def loss(params):
      level = jnp.full(x.shape[:3], 0.5)
      clip = config, stage, {"dit": params}, x[:, :1], 0 * level[:, :1], x, level, text, keys
      return (objective.teacher_forced(*clip)[0] ** 2).mean()

    return axes.mean_gradient(jax.grad(loss)(params))

  x = jax.ShapeDtypeStruct((2, 2, 3, *model.latent_size, model.latent_channels), jnp.float32)
  text = jax.ShapeDtypeStruct((2, model.text_len, model.text_dim), jnp.float32)
  program = jax.jit(axes.on_devices(gradient, mesh, (weights, axes.BATCH, axes.BATCH), weights))
  text = lowered(mesh, program, (rollout.abstract_params(model), weights), (x, axes.BATCH), (text, axes.BATCH))
  # pbsa and dq, each with the kernel that joins its pieces; dk and dv; attention to the prompt.
  assert text.count("@mosaic_gpu_v2") == 6 and "all_gather" not in text
  # After each product that ends in the model's width, and as often on the way back.
  assert sum(re.fullmatch(r"(1x3x4680|1x14040|14040)x1536xbf16", shape) is not None for shape in sent(text)) == 2 * 3
