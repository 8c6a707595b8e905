"""Which implementation serves a call: the one that is asked for, or the first that can."""

from collections.abc import Callable


def chosen(implementation: str | None, reasons: dict[str, Callable[[], str | None]]) -> str:
  """An implementation's name.

  Args:
    implementation: the one that is asked for, if one is.
    reasons: of each, the best first, what tells why it cannot serve the call, or None; the last one can.

  Raises:
    NotImplementedError: there is none of that name, or it cannot serve the call.
  """
  if implementation is None:
    return next(name for name, reason in reasons.items() if reason() is None)
  if implementation not in reasons:
    raise NotImplementedError(f"implementation: {implementation!r}; this build has {', '.join(reasons)}")
  if reason := reasons[implementation]():
    raise NotImplementedError(reason)
  return implementation


def always() -> None:
  """The reason of one that serves every call."""
