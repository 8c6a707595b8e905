"""The mesh's axes, and what is split along "tensor" (heads of attention, their memory, the feed-forward's width), "context"
(the chunks of a clip) and, where a video is sampled, "tokens" (the rows of a chunk, and of the memory the heads).

A program that runs on a mesh is each device's own (`jax.shard_map`): it sees a part of the batch ("data", "fsdp") and of every
layer ("tensor"), whole arrays to it and to its kernels, and the functions below join what devices along "tensor", "context"
or "tokens" have. Outside of such a program, and where that axis is one device, they do nothing.

A device's loss counts once on each device along "tensor" and "context", and so does its gradient: means over all are the true
ones.
"""

import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, PartitionSpec

from sfjax.checkpoint import named

AXES = ("data", "fsdp", "context", "tensor")  # of training; sampling's only axis is "tokens"
BATCH = PartitionSpec(AXES[:2])  # how a batch is split
# How parameters are split along "tensor", by the end of their path; so are their averages and the optimiser's states.
RULES = (
  (r"_attn/[qkv]/kernel", PartitionSpec(None, None, "tensor")),
  (r"(_attn/[qkv]|blocks/ffn_in)/kernel_t", PartitionSpec(None, "tensor")),
  (r"(_attn/o|blocks/ffn_out)/kernel_t", PartitionSpec(None, None, "tensor")),
  (r"_attn/([qkv]/bias|norm_[qk])", PartitionSpec(None, "tensor")),
  (r"_attn/o/kernel", PartitionSpec(None, "tensor")),
  (r"blocks/ffn_in/kernel", PartitionSpec(None, None, "tensor")),
  (r"blocks/ffn_in/bias", PartitionSpec(None, "tensor")),
  (r"blocks/ffn_out/kernel", PartitionSpec(None, "tensor")),
  (r"blocks/importance_(kernel|bias)", PartitionSpec(None, "tensor")),
)


def rule(name: str) -> PartitionSpec:
  """How an array of that path ("a/b") is split along "tensor"."""
  return next((spec for pattern, spec in RULES if re.search(f"{pattern}$", name)), PartitionSpec())


def by_name(fn: Callable, tree):
  """fn(path, array) of every array."""
  return jax.tree.unflatten(jax.tree.structure(tree), [fn(name, x) for name, x in named(tree).items()])


def split(tree):
  """`rule` of every array."""
  return by_name(lambda name, _: rule(name), tree)


def on_devices(fn: Callable, mesh: Mesh, in_specs, out_specs) -> Callable:
  """fn as each device's own program."""
  return jax.shard_map(fn, mesh=mesh, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _parts(axis: str) -> int:
  """Devices along an axis, in a program that is each device's own."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.shape[axis] if axis in mesh.manual_axes else 1


def total(x: jax.Array) -> jax.Array:
  """The sum of what the devices have of a sum over a layer's heads, or over the feed-forward's width."""
  return jax.lax.psum(x, "tensor") if _parts("tensor") > 1 else x


def mean(x: jax.Array) -> jax.Array:
  """The mean of what they have."""
  return jax.lax.pmean(x, "tensor") if _parts("tensor") > 1 else x


def _of_heads() -> str:
  """The axis along which the memory's heads are split."""
  return "tokens" if shares_tokens() else "tensor"


def splits_heads() -> bool:
  """Whether the memory here has a device's own heads alone."""
  return _parts(_of_heads()) > 1


def count_of_heads(heads: int) -> int:
  """How many of a chunk's heads a device's memory has."""
  return heads // _parts("tokens")


def sum_of_heads(x: jax.Array) -> jax.Array:
  """The sum of what the devices have of a sum over the memory's heads."""
  return jax.lax.psum(x, _of_heads()) if splits_heads() else x


def all_heads(x: jax.Array, axis: int) -> jax.Array:
  """An array with the heads of all devices' memories along that axis."""
  return jax.lax.all_gather(x, _of_heads(), axis=axis, tiled=True) if splits_heads() else x


def own_heads(fn: Callable[[int], jax.Array], heads: int, axis: int) -> jax.Array:
  """A device's heads of fn(all heads), where its memory has so many along that axis."""
  return _part(fn(heads * _parts(_of_heads())), heads, axis) if splits_heads() else fn(heads)


def heads_of_memory(x: jax.Array, axis: int) -> jax.Array:
  """Of a layer's heads along that axis those that the device's memory has: along "tensor" its layer has no others."""
  return _part(x, count_of_heads(x.shape[axis]), axis) if shares_tokens() else x


def _part(x: jax.Array, heads: int, axis: int) -> jax.Array:
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index(_of_heads()) * heads, heads, axis)


def shares_tokens() -> bool:
  """Whether the devices share the rows of a chunk: a layer's work is a row's own, but for attention to the memory, for which
  they exchange rows for heads (Ulysses: Jacobs et al. 2023, arXiv 2309.14509).
  """
  return _parts("tokens") > 1


def own_tokens(x: jax.Array, rows: int) -> jax.Array:
  """A device's rows along the last axis but one; each gets whole groups of so many, and the last devices zeros to fill up."""
  if not shares_tokens():
    return x
  own = rows * -(-x.shape[-2] // (rows * _parts("tokens")))
  x = _padded(x, x.ndim - 2, own * _parts("tokens"))
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tokens") * own, own, x.ndim - 2)


def all_tokens(x: jax.Array, tokens: int) -> jax.Array:
  """The so many rows of all devices along the last axis but one."""
  axis = x.ndim - 2
  if not shares_tokens():
    return x
  return jax.lax.slice_in_dim(jax.lax.all_gather(x, "tokens", axis=axis, tiled=True), 0, tokens, axis=axis)


def by_heads(arrays: list[jax.Array], tokens: int) -> list[jax.Array]:
  """[B,own rows,all heads,H] of each array as [B,tokens,own heads,H]."""
  if not shares_tokens():
    return arrays
  parts, x = _parts("tokens"), jnp.stack(arrays)
  x = x.reshape(*x.shape[:-2], parts, -1, x.shape[-1])
  x = jax.lax.all_to_all(jnp.moveaxis(x, -3, 0), "tokens", 0, 0)
  x = jnp.moveaxis(x, 0, 2)
  return [*x.reshape(*x.shape[:2], -1, *x.shape[-2:])[:, :, :tokens]]


def by_tokens(x: jax.Array, own: int) -> jax.Array:
  """[B,tokens,own heads,H] as [B,own rows,all heads,H], of so many rows."""
  if not shares_tokens():
    return x
  x = _padded(x, 1, own * _parts("tokens"))
  x = jnp.moveaxis(x.reshape(x.shape[0], -1, own, *x.shape[2:]), 1, 0)
  x = jnp.moveaxis(jax.lax.all_to_all(x, "tokens", 0, 0), 0, 2)
  return x.reshape(*x.shape[:2], -1, x.shape[-1])


def _padded(x: jax.Array, axis: int, length: int) -> jax.Array:
  """The array, that long along an axis, with zeros behind it."""
  return jnp.pad(x, [(0, length - n if i == axis else 0) for i, n in enumerate(x.shape)])


def splits_chunks(chunks: int) -> bool:
  """Whether the devices along "context" share the chunks of a clip of so many; else each of them has all."""
  return chunks % _parts("context") == 0 and _parts("context") > 1


def all_chunks(x: jax.Array, axis: int) -> jax.Array:
  """An array with the chunks of all devices along that axis; to be called where `splits_chunks`."""
  return jax.lax.all_gather(x, "context", axis=axis, tiled=True)


def own_chunks(x: jax.Array, axis: int) -> jax.Array:
  """A device's part of the chunks along that axis; to be called where `splits_chunks`."""
  own = x.shape[axis] // _parts("context")
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("context") * own, own, axis)


def mean_gradient(grads):
  """The gradient of the mean loss of all devices, from each device's own; where parameters are split, its part."""

  def of(name, g):
    return jax.lax.pmean(g, AXES[:-1]) / _parts("tensor") if "tensor" in rule(name) else jax.lax.pmean(g, AXES)

  return by_name(of, grads)
