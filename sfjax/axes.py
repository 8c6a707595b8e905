"""The mesh's axes, and what is split along "tensor" (heads of attention, their memory, the feed-forward's width) and "context"
(the chunks of a clip).

A program that runs on a mesh is each device's own (`jax.shard_map`): it sees a part of the batch ("data", "fsdp") and of every
layer ("tensor"), whole arrays to it and to its kernels, and the functions below join what devices along "tensor" or "context"
have. Outside of such a program, and where that axis is one device, they do nothing.

A device's loss counts once on each device along these two axes, and so does its gradient: means over all are the true ones.
"""

import re
from collections.abc import Callable

import jax
from jax.sharding import Mesh, PartitionSpec

from sfjax.checkpoint import named

AXES = ("data", "fsdp", "context", "tensor")
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


def splits_heads() -> bool:
  """Whether arrays here have a device's own heads alone."""
  return _parts("tensor") > 1


def total(x: jax.Array) -> jax.Array:
  """The sum of what the devices have of a sum over heads, or over the feed-forward's width."""
  return jax.lax.psum(x, "tensor") if splits_heads() else x


def mean(x: jax.Array) -> jax.Array:
  """The mean of what they have."""
  return jax.lax.pmean(x, "tensor") if splits_heads() else x


def all_heads(x: jax.Array, axis: int) -> jax.Array:
  """An array with the heads of all devices along that axis."""
  return jax.lax.all_gather(x, "tensor", axis=axis, tiled=True) if splits_heads() else x


def own_heads(fn: Callable[[int], jax.Array], heads: int, axis: int) -> jax.Array:
  """A device's heads of fn(all heads), where it has so many along that axis."""
  x = fn(heads * _parts("tensor"))
  return jax.lax.dynamic_slice_in_dim(x, jax.lax.axis_index("tensor") * heads, heads, axis) if splits_heads() else x


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
