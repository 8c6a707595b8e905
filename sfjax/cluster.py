"""Devices of one or several hosts: joining them, one mesh over all, and where arrays lie on it.

A batch is split over "data" and "fsdp", a clip's chunks over "context", a layer over "tensor" (`sfjax.axes`); sampling's mesh
has "tokens" alone. The training state is split over "fsdp" and "tensor" and repeated along the others: a step gathers weights
along "fsdp" before it uses them, and every device updates its own part of them and of the optimiser's state.
"""

import atexit
import contextlib
import os
import subprocess
import sys

import jax
import numpy as np
from jax.extend.core import Literal
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sfjax.axes import AXES, BATCH, by_name, rule
from sfjax.checkpoint import placed
from sfjax.errors import UserError
from sfjax.model import ModelConfig

_SILENCE = 30  # seconds without a sign of life after which a host is taken for dead, and the others end
_EXPORT = 24 * 3600  # seconds that hosts that are done wait for the one that writes the model


def join(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> None:
  """Joins the hosts of a run, before any device is used: as told, or as SLURM's environment tells; else does nothing.

  Where a host dies the others end within half a minute, with an error, not at a save: rerun, they go on from the last one.

  Args:
    coordinator: host:port of process 0, the same everywhere. processes: how many. process: which one this is.

  Raises:
    UserError: some are given and others not, or out of range.
  """
  given = coordinator, processes, process
  if all(x is None for x in given):
    if int(os.environ.get("SLURM_NTASKS", 1)) > 1 and "SLURM_PROCID" in os.environ:
      _initialize()
    return
  if any(x is None for x in given) or not 0 <= process < processes:
    told = f"--coordinator {coordinator} --processes {processes} --process {process}"
    raise UserError(f"{told}; want all three or none, and a process of 0 .. processes - 1")
  _initialize(coordinator, processes, process)


_WITNESS = """
import sys
if not sys.stdin.read():
  print("error: process", sys.argv[1], "ended without a word, as it does where another host has died; rerun on all to go on "
    "from the last save", file=sys.stderr)
"""


def _witnessed() -> None:
  """Where a library aborts this process, as XLA's, Gloo's and NCCL's do when another host is gone, one beside it tells so."""
  line = [sys.executable, "-S", "-c", _WITNESS, str(os.getpid())]
  beside = subprocess.Popen(line, stdin=subprocess.PIPE, start_new_session=True, text=True)  # Ctrl-C is not for it
  atexit.register(beside.communicate, "ended by itself")


def _initialize(*who) -> None:
  _witnessed()  # before JAX, whose own last act may abort
  jax.config.update("jax_cpu_enable_async_dispatch", False)  # Gloo may mix up what two programs at once send
  jax.distributed.initialize(*who, heartbeat_timeout_seconds=_SILENCE, shutdown_timeout_seconds=_EXPORT)


@contextlib.contextmanager
def explained():
  """Where hosts work together, an error of a program is told as what it mostly means.

  Raises:
    UserError: a program failed within, as it does where another host is gone.
  """
  try:
    yield
  except jax.errors.JaxRuntimeError as e:
    if jax.process_count() == 1:
      raise
    told = str(e).strip().splitlines()[0]
    raise UserError(
      f"another host has died, or this one failed ({told}); rerun on all to go on from the last save"
    ) from e


def mesh_shape(devices: int, fsdp: int = 1, tensor: int = 1, context: int = 1) -> tuple[int, int, int, int]:
  """Sizes of `AXES`. Raises UserError: they do not divide."""
  if tensor < 1 or devices % tensor:
    raise UserError(f"config.train.tensor: {tensor} does not divide {devices} devices")
  if context < 1 or devices % (context * tensor):
    raise UserError(f"config.train.context: {context} does not divide {told(devices, tensor)}")
  if fsdp < 1 or devices % (fsdp * context * tensor):
    raise UserError(f"config.train.fsdp: {fsdp} does not divide {told(devices, context * tensor)}")
  return devices // (fsdp * context * tensor), fsdp, context, tensor


def told(devices: int, together: int) -> str:
  """So many devices, in words, of which so many work on the same clips."""
  return f"{devices // together} groups of {together} devices" if together > 1 else f"{devices} devices"


def make_mesh(fsdp: int = 1, tensor: int = 1, context: int = 1, devices: list[jax.Device] | None = None) -> Mesh:
  """All devices of all hosts, or those given, so many of them along the axes of these names.

  Devices along "context" and "tensor" are of one host, which so has whole clips.

  Raises:
    UserError: they do not divide.
  """
  shape = mesh_shape(len(devices or jax.devices()), fsdp, tensor, context)
  if (here := jax.local_device_count()) % (context * tensor):
    raise UserError(
      f"config.train.context, tensor: {context} times {tensor} does not divide the {here} devices of a host"
    )
  return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def tokens_mesh(devices: int, model: ModelConfig) -> Mesh | None:
  """This host's first devices, which share the tokens of every chunk and the heads of its memory; None for one device.

  Raises:
    UserError: there are fewer, or see `check_tokens`.
  """
  here = jax.local_devices()
  if not 1 <= devices <= len(here):
    raise UserError(f"--devices: {devices}; this machine has {len(here)}")
  check_tokens(devices, model)
  return Mesh(np.array(here[:devices]), ("tokens",)) if devices > 1 else None  # the first one also decodes


def check_tokens(devices: int, model: ModelConfig) -> None:
  """Raises UserError: the model's heads do not divide, or a tile does not span a chunk's frames."""
  if model.heads % devices:
    raise UserError(f"--devices: {devices} does not divide the model's {model.heads} heads")
  if devices > 1 and model.tile[0] != model.chunk_frames:
    spans = f"the model's tiles span {model.tile[0]} of a chunk's {model.chunk_frames} frames"
    raise UserError(f"--devices: {devices}; {spans}, which wants 1")


def device_beside(taken: int) -> jax.Device:
  """This host's device behind those that share a chunk's tokens. Raises UserError: there is none."""
  here = jax.local_devices()
  if len(here) <= taken:
    raise UserError(f"--decode_apart: wants a device beside the {taken} of --devices; this machine has {len(here)}")
  return here[taken]


def splits(model: ModelConfig, tensor: int) -> bool:
  """Whether a model's layers can be split over so many devices."""
  return not model.heads % tensor and not model.ffn_dim % tensor


def check_tensor(tensor: int, models: dict[str, ModelConfig]) -> None:
  """Raises UserError where one of the models, by their names, cannot be split over so many devices."""
  for name, model in models.items():
    if not splits(model, tensor):
      raise UserError(
        f"config.train.tensor: {tensor} does not divide {name}'s {model.heads} heads and ffn_dim {model.ffn_dim}"
      )


def shardings(mesh: Mesh, tree):
  """Where the training state lies: an array is split along "tensor" as `axes.RULES` say, and along "fsdp" at the longest other
  axis that it divides; vectors not at all. Sampling's mesh has neither axis, and each of its devices all of an array.
  """
  parts, tensor = (mesh.shape.get(axis, 1) for axis in ("fsdp", "tensor"))

  def of(name, x):
    spec = [axis if tensor > 1 else None for axis in rule(name)]
    spec += [None] * (x.ndim - len(spec))
    fit = [i for i in range(x.ndim) if x.ndim > 1 and spec[i] is None and x.shape[i] % parts == 0]
    if fit and parts > 1:
      spec[max(fit, key=lambda i: x.shape[i])] = "fsdp"
    return NamedSharding(mesh, PartitionSpec(*spec))

  return by_name(of, tree)


def kept_by_host(where, like):
  """The same shardings, but matrices lie in the memory of the device's host; a step fetches them with `fetched`."""
  return jax.tree.map(lambda s, x: s.with_memory_kind("pinned_host") if x.ndim > 1 else s, where, like)


def fetched(after, tree):
  """`after` as it is, and a tree's arrays in the device's own memory, from that of its host where they lie there.

  For use inside a program. They are fetched when `after` is there, not before: go on with the one returned, or XLA may
  forget that.
  """
  if all(jax.typeof(x).memory_space != jax.memory.Space.Host for x in jax.tree.leaves(tree)):
    return after, tree
  after, tree = jax.lax.optimization_barrier((after, tree))
  return after, jax.device_put(tree, jax.memory.Space.Device)


def whole(mesh: Mesh, tree):
  """The same shardings, but every device has all of each array."""
  return jax.tree.map(lambda _: NamedSharding(mesh, PartitionSpec()), tree)


def laid_out(mesh: Mesh | None, like):
  """Shapes with the shardings that their arrays are to have; as they are where there is no mesh."""
  if mesh is None:
    return like
  of = lambda x, where: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)
  return jax.tree.map(of, like, shardings(mesh, like))


def place(tree, where):
  """Values, the same on all hosts, as global arrays: one after the other, through the host."""
  return jax.tree.map(lambda x, s: placed(np.asarray(x), s), tree, where)


def made(fn, where):
  """`fn()`, a pytree of arrays made from nothing, each moved to its sharding as soon as it is there.

  It runs operation by operation, with the bits of a plain call; a device holds its parts of what is done, and one array in
  the making.

  Args:
    fn: uses none of its results further.
  """
  closed, like = jax.make_jaxpr(fn, return_shape=True)()
  where = dict(zip(closed.jaxpr.outvars, jax.tree.leaves(where), strict=True))
  last = {v: eqn for eqn in closed.jaxpr.eqns for v in eqn.invars if not isinstance(v, Literal)}
  values = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
  for eqn in closed.jaxpr.eqns:
    given = [v.val if isinstance(v, Literal) else values[v] for v in eqn.invars]
    found = eqn.primitive.bind(*given, **eqn.primitive.get_bind_params(eqn.params))
    del given
    for v in eqn.invars:
      if not isinstance(v, Literal) and last[v] is eqn:
        values.pop(v, None)
    for v, x in zip(eqn.outvars, found if eqn.primitive.multiple_results else [found], strict=True):
      values[v] = place(x, where[v]) if v in where else x
    del found
  return jax.tree.unflatten(jax.tree.structure(like), [values[v] for v in where])


def gathered(mesh: Mesh, tree):
  """Global arrays as values of the first host, None on the others; no device holds more than one array whole at a time."""
  join = jax.jit(lambda x: fetched((), x)[1], out_shardings=NamedSharding(mesh, PartitionSpec()))

  def value(x):
    x = jax.block_until_ready(join(x))
    return jax.device_get(x) if jax.process_index() == 0 else None

  return jax.tree.map(value, tree)


def step_bytes(program: jax.stages.Compiled) -> dict[str, int]:
  """What a compiled training step takes on each device: its arguments and what it returns beside them, and its workspace; and
  "host", what of it lies in the host's memory instead, if anything does.

  Raises:
    UserError: a device has less; names what helps.
  """
  m = program.memory_analysis()
  held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
  found = {"held": held, "workspace": m.temp_size_in_bytes}
  limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
  if limit is not None and sum(found.values()) > limit:
    raise UserError(
      f"config.train: a step takes {sum(found.values()) / 1e9:.1f} GB on each device, which has {limit / 1e9:.1f}; want a "
      "smaller batch in its stages, config.model.remat=full, a larger config.train.fsdp, config.train.offload=optimizer, or "
      "more of the device for JAX: XLA_PYTHON_CLIENT_MEM_FRACTION=0.93, say"
    )
  return found | ({"host": m.host_argument_size_in_bytes} if m.host_argument_size_in_bytes else {})


def share(mesh: Mesh, batch):
  """This host's rows of a batch as part of global arrays."""
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(NamedSharding(mesh, BATCH), np.asarray(x)), batch
  )


def places(rows: int) -> np.ndarray:
  """Places of this host's rows in the whole batch: a loader deals them out in turn."""
  return (jax.process_index() + jax.process_count() * np.arange(rows)).astype(np.int32)
