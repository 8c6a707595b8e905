"""Errors that a user caused: one line on stderr and exit code 2, never a traceback."""

import argparse
import functools
import sys


class UserError(Exception):
  """A bad flag, key, path or file; the message is one line that names it and says what is accepted."""


def check(config, *rules: tuple[str, bool, str]) -> None:
  """Raises ValueError for the first of (name of an attribute, whether it is right, what is wanted) that is not."""
  for name, ok, want in rules:
    if not ok:
      raise ValueError(f"{name}: {getattr(config, name)!r}; want {want}")


def check_flags(flags: argparse.Namespace, *bounds: tuple[str, int, int]) -> None:
  """Raises UserError for the first of (name of a flag, lowest, highest) whose value is not between."""
  for name, low, high in bounds:
    value = getattr(flags, name)
    if not low <= value <= high:
      raise UserError(f"--{name}: {value}; want {low}..{high}")


def check_seed(seed: int) -> None:
  """Raises UserError: not one that all of JAX, NumPy and a config take."""
  if not 0 <= seed < 2**31:
    raise UserError(f"--seed: {seed}; want 0..2147483647")


class Parser(argparse.ArgumentParser):
  """An ArgumentParser that raises UserError."""

  def error(self, message):
    raise UserError(message)


def command(fn):
  """Wraps a command's main: UserError and bad data end with one line and exit code 2, Ctrl-C with 130."""

  @functools.wraps(fn)
  def main(*args):
    try:
      return fn(*args)
    except KeyboardInterrupt:
      print("interrupted", file=sys.stderr)
      sys.exit(130)
    except Exception as e:
      from sfjax.data.video_folder import DataError  # only here: it loads FFmpeg

      if not isinstance(e, UserError | DataError):
        raise
      print("error: " + " ".join(str(e).split()), file=sys.stderr)
      sys.exit(2)

  return main
