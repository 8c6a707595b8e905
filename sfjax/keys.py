"""Matching a file's tensors with a model's weights: every key used exactly once, every shape checked, errors in one line."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import jax
import numpy as np

from sfjax.errors import UserError
from sfjax.streamed import Streamed


def refuse(source: str, what: str, names: Iterable[str]) -> None:
  """Raises UserError that lists the first few names and their count, if there are any."""
  names = list(names)
  if names:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    raise UserError(f"{source} {what} {len(names)} tensor{'s' * (len(names) > 1)}: {', '.join(names[:3])}{more}")


def check(want: Mapping[str, tuple[int, ...]], tensors: Mapping, source: str) -> None:
  """Holds tensors (anything with a shape) against the wanted names and shapes.

  Args:
    source: named in errors.

  Raises:
    UserError: missing, unexpected or wrongly shaped tensors: the first few and how many.
  """
  refuse(source, "lacks", [n for n in want if n not in tensors])
  refuse(source, "holds unexpected", [n for n in tensors if n not in want])
  wrong = [n for n, shape in want.items() if tuple(tensors[n].shape) != tuple(shape)]
  refuse(source, "holds wrongly shaped", [f"{n} {list(tensors[n].shape)} (want {list(want[n])})" for n in wrong])


def renamed(tensors: Mapping, rename: Callable[[str], str], source: str) -> dict:
  """The same tensors under other names. Raises UserError where two get the same one."""
  found = {}
  for name, x in tensors.items():
    new = rename(name)
    if new in found:
      raise UserError(f"{source}: two tensors for {new}")
    found[new] = x
  return found


def stream(
  parts: list, load: Callable[[np.ndarray], np.ndarray], stacked: bool, dtype: np.dtype | None, what: str
) -> Streamed:
  """One of our arrays, made of tensors in files when it is written.

  Args:
    parts: a `Stored` a layer, or one. load: a tensor as a layer of ours. dtype: None keeps theirs. what: named in errors.

  Raises:
    UserError: the layers differ in dtype.
  """
  kinds = sorted({str(p.dtype) for p in parts})
  if dtype is None and len(kinds) > 1:
    raise UserError(f"{what} has dtypes {', '.join(kinds)}; --dtype float32 or bfloat16 makes them one")
  kind = np.dtype(parts[0].dtype if dtype is None else dtype)

  def pieces() -> Iterator[np.ndarray]:
    return (load(part.read()).astype(kind, copy=False) for part in parts)

  one = load(np.empty(parts[0].shape, np.int8)).shape
  return Streamed((len(parts), *one) if stacked else one, kind, pieces, whole=not stacked)


def read(tree) -> dict:
  """A pytree of `Streamed` as arrays in memory."""
  whole = lambda x: next(x.parts()) if x.whole else np.stack(list(x.parts()))
  return jax.tree.map(whole, tree, is_leaf=lambda x: isinstance(x, Streamed))


def nested(flat: Mapping[str, object]) -> dict:
  """{"a/b": x} as nested dicts."""
  tree: dict = {}
  for name, x in flat.items():
    *where, last = name.split("/")
    node = tree
    for step in where:
      node = node.setdefault(step, {})
    node[last] = x
  return tree
