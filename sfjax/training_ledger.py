"""What a step of distillation takes on each device, in bytes, from shapes alone: `python -m sfjax.ledger --training`.

What is held from step to step is exact: weights, their average, the optimisers' states and the teacher, each device's shards.
What a step needs beside it is an estimate, for remat "full": the arrays that XLA was seen to hold at once where a step was
compiled ahead of time (NOTES.md). A step gathers all weights along "fsdp" before it uses them, and each device finds the
gradient of all that it gathered; so these two shrink along "tensor" alone.
"""

import dataclasses
import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from sfjax import cluster, rollout, self_forcing, teacher_forcing
from sfjax.axes import AXES
from sfjax.codec import DigitsCodec
from sfjax.config import OFFLOAD, Config, load_config, to_dataclass
from sfjax.data.digits import frames_of_chunks
from sfjax.errors import UserError
from sfjax.ledger import abstract_memory, total, tree_bytes
from sfjax.model import ModelConfig
from sfjax.parts import of_wan


def shard_bytes(mesh: AbstractMesh, tree) -> int:
  """A device's part of parameters' or a training state's shapes."""
  of = lambda x, s: math.prod(s.shard_shape(x.shape)) * x.dtype.itemsize
  return sum(jax.tree.leaves(jax.tree.map(of, tree, cluster.shardings(mesh, tree))))


HELD = {
  "params": "student: weights",
  "ema": "student: their average",
  "opt": "student: optimiser",
  "critic": "critic: weights",
  "critic_opt": "critic: optimiser",
  "teacher": "teacher: weights",
  "step": "captions, known frames, counter",
}
ROLLOUT = {
  "gathered": "student's weights, gathered",
  "quiet": "student's weights, as they are computed with",
  "memory": "the rollout's memory",
  "kept": "kept keys and values, as made and by layer",
}
GRADIENT = {
  "gathered": "all weights, gathered",
  "kept": "kept keys and values, by layer",
  "inputs": "what each layer was given",
  "layer": "one layer's backward pass",
  "gradient": "student's gradient, of what was gathered",
  "zeros": "zeros, made early: the critic's gradient, skipped updates",
  "fetched": "an optimiser's state, fetched",
}


@dataclasses.dataclass(frozen=True)
class Prediction:
  """Bytes of a device. held: by the names of `HELD`, exact. rollout, gradient: by `ROLLOUT` and `GRADIENT`, estimates.

  host: what of `HELD` lies in the host's memory instead, exact.
  """

  held: dict[str, int]
  rollout: dict[str, int]
  gradient: dict[str, int]
  host: dict[str, int]

  @property
  def workspace(self) -> int:
    """The estimate of what a step needs beside what is held: its larger phase."""
    return max(sum(self.rollout.values()), sum(self.gradient.values()))

  @property
  def total(self) -> int:
    return sum(self.held.values()) + self.workspace


def gathered_bytes(mesh: AbstractMesh, tree) -> int:
  """Those arrays of it that are split along "fsdp", as a step gathers them."""
  alone = _of_tensor(mesh)
  of = lambda x, s, t: math.prod(t.shard_shape(x.shape)) * x.dtype.itemsize * ("fsdp" in s.spec)
  return sum(jax.tree.leaves(jax.tree.map(of, tree, cluster.shardings(mesh, tree), cluster.shardings(alone, tree))))


def _of_tensor(mesh: AbstractMesh) -> AbstractMesh:
  """The mesh without "fsdp": where a step's weights lie while it uses them."""
  tensor = mesh.shape["tensor"]
  return AbstractMesh((mesh.size // tensor, 1, 1, tensor), AXES)


def judges(config: Config, teacher: str | None = None, critic: str | None = None) -> tuple[ModelConfig, ModelConfig]:
  """The teacher and the critic: of a config file each, else of the config's folders, else as large as student and teacher.

  Raises:
    UserError: no such file or folder, or see `self_forcing.as_teacher`.
  """

  def found(spec, name, otherwise):
    key = f"config.distill.{name}"
    if spec:
      return to_dataclass(Config, load_config(spec, f"--{name}"), f"--{name}").model, f"--{name}"
    folder = getattr(config.distill, name)
    return (self_forcing.model_of(folder, key), key) if folder else (otherwise, key)

  real, flag = found(teacher, "teacher", config.model)
  fake, flag_of_critic = found(critic, "critic", real)
  return self_forcing.as_teacher(config, real, flag), self_forcing.as_critic(config, fake, flag_of_critic)


def clips(config: Config, devices: int) -> int:
  """The most clips of a step on each device. Raises UserError: a batch does not divide over the devices."""
  tensor = config.train.tensor
  for stage in config.train.stages:
    if stage.batch % (devices // tensor):
      over = cluster.told(devices, tensor)
      raise UserError(f"config.train.stages: batch {stage.batch} does not divide over {over}")
  return max(stage.batch // (devices // tensor) or 1 for stage in config.train.stages)


def predict(config: Config, teacher: ModelConfig, critic: ModelConfig, devices: int) -> Prediction:
  """What a device holds, and about what a step needs there.

  Args:
    teacher, critic: see `self_forcing.as_teacher`, `as_critic`. devices: over config.train.fsdp of which the state is split,
      and over config.train.tensor of which layers are.

  Raises:
    UserError: the devices, the batch, the heads or the feed-forward do not divide.
  """
  model, tensor = config.model, config.train.tensor
  mesh = AbstractMesh(cluster.mesh_shape(devices, config.train.fsdp, tensor), AXES)
  cluster.check_tensor(tensor, {"the student": model, "the teacher": teacher, "the critic": critic})
  used, batch = _of_tensor(mesh), clips(config, devices)
  shapes = {name: self_forcing.abstract_judge(m) for name, m in (("teacher", teacher), ("critic", critic))}
  shapes["params"] = teacher_forcing.abstract_model(config)
  state = jax.eval_shape(lambda p, c: self_forcing.state_of(config, p, c), shapes["params"], shapes["critic"])
  held = {name: shard_bytes(mesh, x) for name, x in (state | {"teacher": shapes["teacher"]}).items()}
  host = {x: shard_bytes(mesh, _matrices(state[x])) for x in OFFLOAD[config.train.offload]}
  held |= {name: held[name] - n for name, n in host.items()}
  row = model.text_dim * jnp.dtype(model.dtype).itemsize if of_wan(model) else 4  # an embedding's, or a word's
  held["step"] += batch * (2 * model.text_len * row + 4)
  known = max(stage.known for stage in config.train.stages)
  if known:  # frames, and how many chunks of them count
    codec = DigitsCodec()
    pixels = frames_of_chunks(known) * math.prod(model.latent_size) * codec.space**2
    held["step"] += batch * (3 * pixels + 4)

  chunks, size = teacher.chunk_frames // model.chunk_frames, jnp.dtype(model.dtype).itemsize * batch
  tokens, slots = chunks * model.layout.tokens, chunks * model.layout.slots
  kept = 2 * model.layers * slots * (model.dim // tensor) * size
  # A layer reads its clip's keys twice, kept and noisy, what was there before them, and P once more for each chunk.
  memory = config.memory
  blocks = memory.resident_blocks(model.layout) + 2 * chunks * model.layout.blocks
  if memory.rope_cap is not None:
    blocks += chunks * memory.persistent
  keys = blocks * model.layout.slots // model.layout.blocks
  gathered = {name: gathered_bytes(mesh, x) for name, x in shapes.items()}
  quiet = rollout.abstract_params(dataclasses.replace(model, param_dtype=model.dtype))
  zeros = max(shard_bytes(mesh, shapes[name]) for name in ("params", "critic"))
  return Prediction(
    {name: held[name] for name in HELD},
    {
      "gathered": gathered["params"],
      "quiet": shard_bytes(used, quiet),
      "memory": tree_bytes(abstract_memory(config, batch, tensor, "tensor")),
      "kept": 2 * kept,
    },
    {
      "gathered": sum(gathered.values()),
      "kept": kept,
      "inputs": model.layers * tokens * model.dim * size,
      "layer": (4 * tokens * model.ffn_dim + 2 * keys * model.dim) // tensor * size,  # around the GELU; keys and values
      "gradient": shard_bytes(used, shapes["params"]),
      "zeros": shard_bytes(used, shapes["critic"]) + zeros,
      "fetched": max(host.get(name, 0) for name in ("opt", "critic_opt")),
    },
    host,
  )


def _matrices(tree):
  """The same shapes, but for vectors and numbers, of which nothing is left."""
  return jax.tree.map(lambda x: x if x.ndim > 1 else jax.ShapeDtypeStruct((0,), x.dtype), tree)


def table(p: Prediction) -> str:
  """Markdown: what is held, then both phases of a step."""
  lines = ["| | GB | bytes |", "|---|---|---|"]
  for rows, names, end in (
    (p.held, HELD, "held"),
    (p.host, HELD, "in the host's memory"),
    (p.rollout, ROLLOUT, "workspace of the rollout, about"),
    (p.gradient, GRADIENT, "workspace of the gradient, about"),
  ):
    cells = {names.get(name, f"**{end}**"): n for name, n in total(rows).items()}
    lines += [f"| {what} | {n / 1e9:.3f} | {n:,} |" for what, n in cells.items() if n]
  return "\n".join([*lines, f"| **together, about** | {p.total / 1e9:.3f} | {p.total:,} |"])


def _of_heads(config: Config, models: list[ModelConfig], devices: int) -> Iterator[Config]:
  """The config with larger tensor and, where there is no room beside it, a smaller fsdp, for those models."""
  for tensor in range(config.train.tensor + 1, devices + 1):
    batches = [s.batch % (devices // tensor) for s in config.train.stages]
    if not any([devices % tensor, *batches]) and all(cluster.splits(m, tensor) for m in models):
      fsdp = math.gcd(config.train.fsdp, devices // tensor)
      yield dataclasses.replace(config, train=dataclasses.replace(config.train, tensor=tensor, fsdp=fsdp))


def verdict(
  p: Prediction, config: Config, teacher: ModelConfig, critic: ModelConfig, devices: int, device: float = 80e9
) -> str:
  """Whether a step fits on a device; if not, the split of heads, or what the host keeps, or both, with which it does; else what
  would help that is not written yet, each beside those before it. p: `predict` of the rest.
  """
  if p.total <= device:
    return f"fits in {device / 1e9:.0f} GB by this estimate"
  for offload in dict.fromkeys((config.train.offload, "optimizer")):
    kept = dataclasses.replace(config, train=dataclasses.replace(config.train, offload=offload))
    for split in (kept, *_of_heads(kept, [config.model, teacher, critic], devices)):
      takes = predict(split, teacher, critic, devices).total
      if takes <= device:
        changed = [x for x in ("tensor", "fsdp", "offload") if getattr(split.train, x) != getattr(config.train, x)]
        flags = " ".join(f"--config.train.{x}={getattr(split.train, x)}" for x in changed)
        return f"does not fit in {device / 1e9:.0f} GB; {flags} takes {takes / 1e9:.1f} GB"
  found = []
  for what, names, share in (
    ("weights gathered a layer at a time", ("gathered", "quiet"), config.model.layers),
    ("gradients summed into shards", ("gradient", "zeros"), config.train.fsdp),
    ("a clip split over 2 devices", ("memory", "kept", "inputs", "layer"), 2),
    ("over 4", ("memory", "kept", "inputs", "layer"), 2),
  ):
    smaller = lambda rows, names=names, share=share: {k: n // share if k in names else n for k, n in rows.items()}
    p = Prediction(p.held, smaller(p.rollout), smaller(p.gradient), p.host)
    found.append(f"{what}, {p.total / 1e9:.1f} GB")
    if p.total <= device:
      break
  return f"does not fit in {device / 1e9:.0f} GB; what would help and is not written yet: {'; '.join(found)}"
