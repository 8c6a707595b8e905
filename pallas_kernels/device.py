"""The device that a kernel is chosen for."""

import jax


def current_device() -> jax.Device:
  """Where arrays go that nobody has placed."""
  device = jax.config.jax_default_device
  return device if isinstance(device, jax.Device) else jax.devices(device)[0]


def multiprocessors(device) -> int:
  """How many it has; of one that does not tell, an H100's or H200's."""
  return getattr(device, "core_count", 132)
