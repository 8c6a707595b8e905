"""Checkpoints: Orbax steps for training (resume bit for bit), and one small folder for inference and for shipping.

`load_config` and `load_params` read either: a model folder, or the newest step of a training run.
"""

import contextlib
import json
import os
import pathlib
import shutil
import zipfile
import zlib
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sfjax.errors import UserError
from sfjax.runlog import replacing, write_json_atomic


def named(tree) -> dict:
  """Leaves by their path, "a/b"; the same names for a tree and for what Orbax tells of it."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {jax.tree_util.keystr(path, simple=True, separator="/"): x for path, x in leaves}


def _stored(x) -> str:
  """Dtype and shape under which Orbax stores an array; of typed keys it stores the words."""
  if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
    x = jax.eval_shape(jax.random.key_data, x)
  return f"{np.dtype(x.dtype).name}{list(x.shape)}"


def first_difference(found: dict[str, str], want: dict[str, str]) -> str | None:
  """What tells two tables of named arrays apart, in words; None if nothing does."""
  for name in [*want, *found]:
    if found.get(name) != want.get(name):
      return f"{name} is {found.get(name, 'absent')}, this config wants {want.get(name, 'no such array')}"
  return None


# What reading files may fail by that says nothing of them: a full device, a host that is gone.
NOT_THE_FILES = jax.errors.JaxRuntimeError, MemoryError


def _cause(e: Exception) -> str:
  """What an error says first, in a few words."""
  return f"{type(e).__name__}: {str(e).strip()}".splitlines()[0][:120].rstrip(": ")


class Checkpoints:
  """A training run's steps, saved asynchronously; each holds `params` (inference weights) apart from `state`.

  Args:
    directory: of the steps. keep_last: newest steps that stay. keep_every: steps divisible by it stay too (0: none).
  """

  def __init__(self, directory, keep_last: int = 2, keep_every: int = 0):
    self._directory = pathlib.Path(directory).absolute()
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every or None),
      item_handlers={
        "params": ocp.StandardCheckpointHandler(),
        "state": ocp.StandardCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
      },
    )

  def latest(self) -> int | None:
    """Newest complete step."""
    return self._manager.latest_step()

  def save(self, step: int, params, state, meta: dict) -> None:
    """Starts saving; `meta` is JSON-able (config, loader state)."""
    args = ocp.args.Composite(
      params=ocp.args.StandardSave(params), state=ocp.args.StandardSave(state), meta=ocp.args.JsonSave(meta)
    )
    self._manager.save(step, args=args, force=True)

  def restore(self, like) -> tuple:
    """(state shaped and placed like `like`, meta) of the newest step.

    Raises:
      UserError: no step, a damaged one, or one of another config (names the first array that differs).
    """
    return self._restore("state", like)

  def restore_params(self, like) -> tuple:
    """(inference weights like `like`, meta) of the newest step. Raises UserError as `restore` does."""
    return self._restore("params", like)

  def meta(self) -> dict:
    """What was saved as `meta` with the newest step. Raises UserError as `restore` does."""
    return self._read(meta=ocp.args.JsonRestore())["meta"]

  def _restore(self, item: str, like) -> tuple:
    want = {name: _stored(x) for name, x in named(like).items()}
    step = self._newest()
    with self._told_damaged():
      tree = self._manager.item_metadata(step)[item].tree
    wrong = first_difference({name: _stored(x) for name, x in named(tree).items()}, want)
    if wrong:
      raise UserError(f"{self._directory / str(step)} is of another config: {wrong}")
    found = self._read(**{item: ocp.args.StandardRestore(like), "meta": ocp.args.JsonRestore()})
    return found[item], found["meta"]

  def _newest(self) -> int:
    if self.latest() is None:
      raise UserError(f"{self._directory} holds no complete checkpoint")
    return self.latest()

  @contextlib.contextmanager
  def _told_damaged(self):
    try:
      yield
    except NOT_THE_FILES:
      raise
    except Exception as e:  # whatever a damaged file makes Orbax and TensorStore raise
      raise UserError(
        f"{self._directory / str(self.latest())} is damaged ({_cause(e)}); remove this folder to go on from the step before"
      ) from e

  def _read(self, **items):
    step = self._newest()
    with self._told_damaged():
      return self._manager.restore(step, args=ocp.args.Composite(**items))

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self.close()

  def wait(self) -> None:
    """Waits for what is being saved."""
    self._manager.wait_until_finished()

  def close(self) -> None:
    """Waits for what is being saved, then ends the threads."""
    self.wait()
    self._manager.close()


def placed(x: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
  """A host's array, the same on all hosts, as a global one: no device gets more than its shard."""
  return jnp.asarray(x) if sharding is None else jax.make_array_from_callback(x.shape, sharding, lambda at: x[at])


def flatten(tree: dict) -> dict[str, np.ndarray]:
  """Nested dicts of arrays as {"a/b": array}."""
  return {name: np.asarray(x) for name, x in named(tree).items()}


_BITS = {"bfloat16": np.uint16, "float8_e4m3fn": np.uint8}  # dtypes that npz does not know


def save_arrays(path, arrays: dict[str, np.ndarray]) -> None:
  """A compressed npz, renamed into place; bfloat16 and float8 are stored as their bits, under the name `key:dtype`.

  Raises:
    UserError: the file cannot be written.
  """
  strange = {k: v.dtype.name for k, v in arrays.items() if v.dtype.name in _BITS}
  bits = {f"{k}:{strange[k]}" if k in strange else k: v.view(_BITS[strange[k]]) if k in strange else v
          for k, v in arrays.items()}  # fmt: skip
  with replacing(path) as part, part.open("wb") as f:
    np.savez_compressed(f, **bits)


def load_arrays(path) -> dict[str, np.ndarray]:
  """Inverse of `save_arrays`. Raises UserError if the file is absent or damaged."""
  try:
    with open(path, "rb") as f, np.lib.npyio.NpzFile(f) as z:
      found = {k: z[k] for k in z.files}
  except FileNotFoundError as e:
    raise UserError(f"{path}: no such file") from e
  except (zipfile.BadZipFile, zlib.error, ValueError, EOFError, OSError, NotImplementedError, RuntimeError) as e:
    raise UserError(f"{path}: damaged or truncated; not a readable npz file") from e
  dtypes = {k: k.rpartition(":")[2] for k in found}
  return {
    k.removesuffix(f":{dtypes[k]}"): v.view(jnp.dtype(dtypes[k])) if dtypes[k] in _BITS else v for k, v in found.items()
  }


@contextlib.contextmanager
def whole_folder(directory) -> Iterator[pathlib.Path]:
  """A hidden folder beside `directory` to write to: at the end it takes that one's place, whole or not at all.

  Raises:
    UserError: the folder cannot be written.
  """
  directory = pathlib.Path(directory)
  part, old = (directory.with_name(f".{directory.name}.{end}") for end in ("part", "old"))
  shutil.rmtree(part, ignore_errors=True)
  shutil.rmtree(old, ignore_errors=True)
  try:
    part.mkdir(parents=True)
  except OSError as e:
    raise UserError(f"{directory}: cannot be written ({e.strerror})") from e
  yield part
  if directory.exists():
    os.replace(directory, old)
  os.replace(part, directory)
  shutil.rmtree(old, ignore_errors=True)


def export(directory, params: dict, config: dict, card: dict) -> None:
  """A folder for inference: params.npz (bfloat16), config.json, card.json; it appears whole or not at all."""
  half = lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
  with whole_folder(directory) as part:
    save_arrays(part / "params.npz", {k: half(v) for k, v in flatten(params).items()})
    write_json_atomic(part / "config.json", config)
    write_json_atomic(part / "card.json", card)


def _steps(directory, flag: str) -> pathlib.Path | None:
  """The folder of a training run's steps, if `directory` is one or holds one, and is no model folder."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(f"{flag}: {directory} is not a folder")
  if (directory / "config.json").is_file():
    return None
  for folder in (directory, directory / "checkpoints"):
    if folder.is_dir() and any(step.name.isdigit() for step in folder.iterdir()):
      return folder
  raise UserError(
    f"{flag}: {directory} holds no model; want a folder with config.json and params.npz, or a training run's"
  )


def load_config(directory, flag: str = "--checkpoint") -> dict:
  """The config that a model folder or a training run carries. Raises UserError if it is absent or damaged."""
  steps = _steps(directory, flag)
  if steps:
    with Checkpoints(steps) as checkpoints:
      return checkpoints.meta()["config"]
  file = pathlib.Path(directory) / "config.json"
  try:
    config = json.loads(file.read_text())
  except ValueError as e:
    raise UserError(f"{flag}: {file} is damaged: {e}") from e
  if not isinstance(config, dict):
    raise UserError(f"{flag}: {file} is damaged: not a JSON object")
  return config


def load_params(directory, like: dict, flag: str = "--checkpoint") -> dict:
  """Weights of a model folder or a training run in the structure and dtypes of `like` (shapes suffice), where it says.

  Raises:
    UserError: absent or damaged, or of another config (names the first array that differs).
  """
  steps = _steps(directory, flag)
  if steps:
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    with Checkpoints(steps) as checkpoints:
      return checkpoints.restore_params(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding or here), like)
      )[0]
  arrays = load_arrays(pathlib.Path(directory) / "params.npz")
  want = named(like)
  shapes = lambda leaves: {name: str(list(x.shape)) for name, x in leaves.items()}
  wrong = first_difference(shapes(arrays), shapes(want))
  if wrong:
    raise UserError(f"{flag}: {directory}: {wrong}")
  values = [placed(arrays[name].astype(x.dtype), x.sharding) for name, x in want.items()]
  return jax.tree.unflatten(jax.tree.structure(like), values)
