"""Checkpoints: Orbax steps for training (resume bit for bit), and one small folder for inference and for shipping."""

import json
import os
import pathlib
import shutil
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from sfjax.errors import UserError
from sfjax.runlog import write_json_atomic


class Checkpoints:
  """A training run's steps, saved asynchronously; each holds `params` (inference weights) apart from `state`.

  Args:
    directory: of the steps. keep_last: newest steps that stay. keep_every: steps divisible by it stay too (0: none).
  """

  def __init__(self, directory, keep_last: int = 2, keep_every: int = 0):
    self._manager = ocp.CheckpointManager(
      pathlib.Path(directory).absolute(),
      options=ocp.CheckpointManagerOptions(max_to_keep=keep_last, keep_period=keep_every or None),
      item_names=("params", "state", "meta"),
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
    """(state shaped and placed like `like`, meta) of the newest step."""
    args = ocp.args.Composite(state=ocp.args.StandardRestore(like), meta=ocp.args.JsonRestore())
    found = self._manager.restore(self.latest(), args=args)
    return found["state"], found["meta"]

  def close(self) -> None:
    """Waits for what is being saved."""
    self._manager.wait_until_finished()
    self._manager.close()


def flatten(tree: dict) -> dict[str, np.ndarray]:
  """Nested dicts of arrays as {"a/b": array}."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {"/".join(str(getattr(k, "key", getattr(k, "name", k))) for k in path): np.asarray(x) for path, x in leaves}


def save_arrays(path, arrays: dict[str, np.ndarray]) -> None:
  """A compressed npz, renamed into place; bfloat16 is stored as its bits, under the name `key:bfloat16`."""
  path = pathlib.Path(path)
  part = path.with_name(f".{path.name}.part")
  bits = {f"{k}:bfloat16" if v.dtype == jnp.bfloat16 else k: v.view(np.uint16) if v.dtype == jnp.bfloat16 else v
          for k, v in arrays.items()}  # fmt: skip
  with part.open("wb") as f:
    np.savez_compressed(f, **bits)
  os.replace(part, path)


def load_arrays(path) -> dict[str, np.ndarray]:
  """Inverse of `save_arrays`. Raises UserError if the file is absent or damaged."""
  try:
    with np.load(path) as z:
      found = {k: z[k] for k in z.files}
  except FileNotFoundError as e:
    raise UserError(f"{path}: no such file") from e
  except (zipfile.BadZipFile, ValueError, EOFError, OSError) as e:
    raise UserError(f"{path}: damaged or truncated; not a readable npz file") from e
  return {k.removesuffix(":bfloat16"): v.view(jnp.bfloat16) if k.endswith(":bfloat16") else v for k, v in found.items()}


def export(directory, params: dict, config: dict, card: dict) -> None:
  """A folder for inference: params.npz (bfloat16), config.json, card.json; it appears whole or not at all."""
  directory = pathlib.Path(directory)
  part = directory.with_name(f".{directory.name}.part")
  shutil.rmtree(part, ignore_errors=True)
  part.mkdir(parents=True)
  half = lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x
  save_arrays(part / "params.npz", {k: half(v) for k, v in flatten(params).items()})
  write_json_atomic(part / "config.json", config)
  write_json_atomic(part / "card.json", card)
  shutil.rmtree(directory, ignore_errors=True)
  os.replace(part, directory)


def load_config(directory) -> dict:
  """The config that an inference folder carries. Raises UserError if it is absent or damaged."""
  directory = pathlib.Path(directory)
  if not directory.is_dir():
    raise UserError(f"--checkpoint: {directory} is not a folder")
  file = directory / "config.json"
  if not file.is_file():
    raise UserError(f"--checkpoint: {directory} holds no config.json; want an exported model folder")
  try:
    return json.loads(file.read_text())
  except ValueError as e:
    raise UserError(f"--checkpoint: {file} is damaged: {e}") from e


def load_params(directory, like: dict) -> dict:
  """Weights of an inference folder as float32 arrays in the structure of `like` (shapes suffice).

  Raises:
    UserError: absent or damaged, or of another config (names the first array that differs).
  """
  arrays = load_arrays(pathlib.Path(directory) / "params.npz")
  leaves, tree = jax.tree_util.tree_flatten_with_path(like)
  names = ["/".join(str(k.key) for k in path) for path, _ in leaves]
  for name, (_, leaf) in zip(names, leaves, strict=True):
    found = arrays[name].shape if name in arrays else "nothing"
    if found != tuple(leaf.shape):
      raise UserError(f"--checkpoint: {directory}: {name} is {found}, this config wants {tuple(leaf.shape)}")
  extra = set(arrays) - set(names)
  if extra:
    raise UserError(f"--checkpoint: {directory}: {sorted(extra)[0]} is not part of this config's model")
  values = [jnp.asarray(arrays[n].astype(x.dtype)) for n, (_, x) in zip(names, leaves, strict=True)]
  return jax.tree_util.tree_unflatten(tree, values)
