"""Orbax checkpoints written a layer at a time, so that a model larger than memory passes through, and read onto any mesh."""

import dataclasses
import pathlib
import shutil
from collections.abc import Callable, Iterator

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
from orbax.checkpoint import type_handlers

from sfjax.checkpoint import NOT_THE_FILES, first_difference, named
from sfjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Streamed:
  """An array that is made piece by piece along its first axis.

  Attributes:
    parts: yields the pieces of that axis, one index each; of an array that is `whole`, the array.
  """

  shape: tuple[int, ...]
  dtype: np.dtype
  parts: Callable[[], Iterator[np.ndarray]]
  whole: bool = False

  @property
  def size(self) -> int:
    return int(np.prod(self.shape))

  @property
  def nbytes(self) -> int:
    return self.size * np.dtype(self.dtype).itemsize


class _Handler(type_handlers.NumpyHandler):
  """Writes a `Streamed` as Orbax writes an array, in chunks of one piece."""

  async def _background_serialize(self, values, infos, args=None):
    for x in zip(values, infos, args, strict=True):  # one after the other: a few pieces in memory at a time
      await super()._background_serialize(*([a] for a in x))

  async def serialize(self, values, infos, args=None):
    args = args or [ocp.SaveArgs()] * len(values)
    await self._background_serialize(values, infos, args)
    return []

  async def _open_and_write(self, value, tspec, ts_context):
    tspec["metadata"]["chunks"] = list(value.shape) if value.whole else [1, *value.shape[1:]]
    store = await ts.open(ts.Spec(tspec), create=True, open=True, context=ts_context)
    for i, part in enumerate(value.parts()):
      await (store if value.whole else store[i]).write(np.ascontiguousarray(part))


def _alone() -> ocp.options.MultiprocessingOptions:
  """For one host's own doing: Orbax else waits for all hosts of a run."""
  i = jax.process_index()
  return ocp.options.MultiprocessingOptions(primary_host=i, active_processes={i}, barrier_sync_key_prefix=f"host{i}")


_REGISTRY = type_handlers.create_type_handler_registry((Streamed, _Handler()))


def save(path, tree) -> None:
  """Writes a pytree of `Streamed`, on this host alone; it appears whole or not at all, in place of what was there.

  Raises:
    UserError: the folder cannot be written.
  """
  path = pathlib.Path(path).absolute()
  part = path.with_name(f".{path.name}.part")
  shutil.rmtree(part, ignore_errors=True)
  try:
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = ocp.PyTreeCheckpointHandler(
      use_ocdbt=False, use_zarr3=False, type_handler_registry=_REGISTRY, multiprocessing_options=_alone()
    )
    with ocp.Checkpointer(handler, multiprocessing_options=_alone()) as checkpointer:
      checkpointer.save(part, args=ocp.args.PyTreeSave(tree))
  except OSError as e:
    shutil.rmtree(part, ignore_errors=True)
    raise UserError(f"{path}: cannot be written ({e.strerror})") from e
  except BaseException:
    shutil.rmtree(part, ignore_errors=True)
    raise
  shutil.rmtree(path, ignore_errors=True)
  part.rename(path)


def pieces(path) -> dict[str, Streamed]:
  """The arrays of a checkpoint that `save` wrote, by path ("a/b"), to be read piece by piece.

  Raises:
    UserError: absent or damaged.
  """
  path = pathlib.Path(path).absolute()
  found = {}
  for file in sorted(path.glob("*/.zarray")):
    spec = {"driver": "zarr", "kvstore": {"driver": "file", "path": str(file.parent)}}
    try:
      store = ts.open(spec, open=True).result()
    except ValueError as e:
      raise UserError(f"{file.parent}: damaged") from e
    whole = store.chunk_layout.read_chunk.shape == store.shape

    def parts(store=store, whole=whole):
      return iter([store.read().result()]) if whole else (store[i].read().result() for i in range(store.shape[0]))

    found[file.parent.name.replace(".", "/")] = Streamed(store.shape, store.dtype.numpy_dtype, parts, whole)
  if not found:
    raise UserError(f"{path}: absent or damaged")
  return found


def restore(path, like):
  """A saved pytree, its arrays with the dtypes and shardings of `like` (shapes with a sharding, or none for one device).

  Where `like` has shardings all hosts of a run must call this, else each may alone.

  Raises:
    UserError: absent, damaged, or of other shapes (names the first).
  """
  path = pathlib.Path(path).absolute()
  here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  shared = any(x.sharding for x in jax.tree.leaves(like))
  hosts = ocp.options.MultiprocessingOptions() if shared else _alone()
  want = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), like)
  try:
    with ocp.StandardCheckpointer(multiprocessing_options=hosts) as checkpointer:
      found = checkpointer.metadata(path).item_metadata.tree
      shapes = ({name: str(list(x.shape)) for name, x in named(tree).items()} for tree in (found, want))
      wrong = first_difference(*shapes)
      if wrong:
        raise UserError(f"{path} is of another config: {wrong}")
      return checkpointer.restore(path, want)
  except (UserError, *NOT_THE_FILES):
    raise
  except Exception as e:  # whatever a damaged file makes Orbax and TensorStore raise
    raise UserError(f"{path}: absent or damaged") from e
