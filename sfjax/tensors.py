"""Weight files read one tensor at a time: safetensors, and PyTorch's zip files without running what is pickled in them.

`open_tensors` lists what a file or folder holds; a tensor's bytes are read only when asked for, so that models larger than
memory pass through.
"""

import dataclasses
import functools
import json
import math
import pathlib
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Callable

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from sfjax.errors import UserError

_SAFETENSORS = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
_TORCH = {
  "DoubleStorage": np.float64,
  "FloatStorage": np.float32,
  "HalfStorage": np.float16,
  "BFloat16Storage": ml_dtypes.bfloat16,
}


@dataclasses.dataclass(frozen=True)
class Stored:
  """A tensor in a file."""

  shape: tuple[int, ...]
  dtype: np.dtype
  read: Callable[[], np.ndarray]


def of_arrays(arrays: dict[str, np.ndarray]) -> dict[str, Stored]:
  """Arrays in memory as if they were in a file."""
  return {name: Stored(x.shape, x.dtype, lambda x=x: x) for name, x in arrays.items()}


def open_tensors(path) -> dict[str, Stored]:
  """What a weight file, or a folder of safetensors files, holds, by name.

  Nested dicts of a PyTorch file give names joined by "/", as in "generator_ema/model.head.head.bias".

  Raises:
    UserError: absent, truncated or of another format; a name in two files of a folder, or one that its index lists and no
      file holds; a pickle that asks for anything but tensors.
  """
  path = pathlib.Path(path)
  if path.is_dir():
    return _folder(path)
  if not path.is_file():
    raise UserError(f"{path}: no such file or folder")
  if path.suffix == ".safetensors":
    return _safetensors(path)
  if path.suffix in (".pt", ".pth"):
    return _torch(path)
  raise UserError(f"{path}: want a .safetensors, .pt or .pth file, or a folder of .safetensors files")


def _folder(path: pathlib.Path) -> dict[str, Stored]:
  files = sorted(path.glob("*.safetensors"))
  if not files:
    raise UserError(f"{path}: holds no .safetensors file")
  found = {}
  for file in files:
    own = _safetensors(file)
    twice = next((name for name in own if name in found), None)
    if twice:
      raise UserError(f"{file}: {twice} is in another file of the folder, too")
    found |= own
  for index in path.glob("*.safetensors.index.json"):
    try:
      listed = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError) as e:
      raise UserError(f"{index}: damaged") from e
    absent = [name for name in listed if name not in found]
    if absent:
      raise UserError(f"{index}: lists {len(absent)} tensors that no file holds, such as {absent[0]}")
  return found


def _safetensors(path: pathlib.Path) -> dict[str, Stored]:
  def read(name):
    with safe_open(path, "np") as file:  # opened for each tensor: the mapped pages of one that stays open pile up
      return file.get_tensor(name)

  try:
    with safe_open(path, "np") as file:
      parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, it is no dict
      told = {name: (tuple(part.get_shape()), part.get_dtype()) for name, part in parts.items()}
  except (SafetensorError, OSError) as e:
    raise UserError(f"{path}: damaged or truncated; not a readable safetensors file") from e
  found = {}
  for name, (shape, dtype) in told.items():
    if dtype not in _SAFETENSORS:
      raise UserError(f"{path}: {name} has dtype {dtype}; want one of {', '.join(_SAFETENSORS)}")
    found[name] = Stored(shape, np.dtype(_SAFETENSORS[dtype]), functools.partial(read, name))
  return found


@dataclasses.dataclass(frozen=True)
class _Storage:
  dtype: np.dtype
  key: str


@dataclasses.dataclass(frozen=True)
class _Tensor:
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]


class _Reader(pickle.Unpickler):
  """Knows tensors, parameters and dicts; nothing else is ever looked up, let alone called."""

  def __init__(self, file, path):
    super().__init__(file)
    self._path = path

  def find_class(self, module, name):
    known = {
      ("collections", "OrderedDict"): OrderedDict,
      ("torch._utils", "_rebuild_tensor_v2"): lambda storage, offset, shape, stride, *_: _Tensor(
        storage, offset, tuple(shape), tuple(stride)
      ),
      ("torch._utils", "_rebuild_parameter"): lambda data, *_: data,
    }
    if module == "torch" and name in _TORCH:
      return np.dtype(_TORCH[name])
    if (module, name) not in known:
      raise UserError(f"{self._path}: its pickle asks for {module}.{name}; only files that hold tensors alone are read")
    return known[module, name]

  def persistent_load(self, saved):
    kind, dtype, key, *_ = saved
    if kind != "storage" or not isinstance(dtype, np.dtype):
      raise UserError(f"{self._path}: holds something that is no tensor of a known dtype")
    return _Storage(dtype, key)


def _torch(path: pathlib.Path) -> dict[str, Stored]:
  try:
    archive = zipfile.ZipFile(path)
    pickled = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
    with archive.open(pickled) as f:
      tree = _Reader(f, path).load()
  except UserError:
    raise
  except Exception as e:  # whatever a damaged zip or pickle raises
    raise UserError(f"{path}: damaged or truncated; not a zip file as torch.save writes it") from e
  root = pickled.removesuffix("data.pkl")

  def stored(tensor: _Tensor) -> Stored:
    def read():
      dtype = tensor.storage.dtype
      try:
        with archive.open(f"{root}data/{tensor.storage.key}") as f:
          f.seek(tensor.offset * dtype.itemsize)
          last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride, strict=True))
          flat = np.frombuffer(f.read((last + 1) * dtype.itemsize), dtype)
        strides = [s * dtype.itemsize for s in tensor.stride]
        return np.ascontiguousarray(np.lib.stride_tricks.as_strided(flat, tensor.shape, strides, writeable=False))
      except (KeyError, zipfile.BadZipFile, ValueError, EOFError) as e:
        raise UserError(f"{path}: damaged or truncated") from e

    if not math.prod(tensor.shape):
      return Stored(tensor.shape, tensor.storage.dtype, lambda: np.zeros(tensor.shape, tensor.storage.dtype))
    return Stored(tensor.shape, tensor.storage.dtype, read)

  found = {}

  def walk(node, where):
    for name, x in node.items():
      if isinstance(x, _Tensor):
        found[where + name] = stored(x)
      elif isinstance(x, dict) and isinstance(name, str):
        walk(x, f"{where}{name}/")

  if not isinstance(tree, dict):
    raise UserError(f"{path}: holds no dict of tensors")
  walk(tree, "")
  return found
