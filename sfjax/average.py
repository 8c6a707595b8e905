"""A model between two: python -m sfjax.average MODEL OTHER --weight 0.25 --out DIR

What a model forgets while it is trained further often comes back where its weights move a part of the way to those it began
as, before what it learnt is gone (Wortsman et al. 2022, "Robust fine-tuning of zero-shot models"). MODEL's config is kept.
"""

import pathlib
import sys

import jax

from sfjax import checkpoint, teacher_forcing
from sfjax.config import Config, to_dataclass
from sfjax.errors import Parser, UserError, command
from sfjax.parts import export_model, load_model
from sfjax.runlog import run_record


def between(a: dict, b: dict, weight: float) -> dict:
  """(1 - weight) a + weight b, array by array, in a's dtypes."""
  return jax.tree.map(lambda x, y: ((1 - weight) * x + weight * y).astype(x.dtype), a, b)


@command
def main(argv: list[str]) -> None:
  """The command. Raises UserError: a folder that holds no model, or another one's; a weight outside 0..1; DIR is there."""
  p = Parser(prog="python -m sfjax.average", description=__doc__.splitlines()[0])
  p.add_argument("model", help="a model folder or a training run; its config is kept")
  p.add_argument("other", help="another, of the same architecture")
  p.add_argument("--weight", type=float, default=0.5, help="of OTHER, 0 to 1")
  p.add_argument("--out", required=True, help="the folder to be written")
  a = p.parse_args(argv)
  if not 0 <= a.weight <= 1:
    raise UserError(f"--weight: {a.weight:g}; want 0 to 1")
  if pathlib.Path(a.out).exists():
    raise UserError(f"--out: {a.out} is there already; want a new folder")
  config = to_dataclass(Config, checkpoint.load_config(a.model, "MODEL"), "MODEL")
  other = to_dataclass(Config, checkpoint.load_config(a.other, "OTHER"), "OTHER")
  for name, one in config.model.architecture.items():
    if one != (two := getattr(other.model, name)):
      raise UserError(f"OTHER: {a.other} has model.{name} = {two!r}; want MODEL's, {one!r}")
  like = teacher_forcing.abstract_model(config)
  models = [load_model(folder, like, flag) for folder, flag in ((a.model, "MODEL"), (a.other, "OTHER"))]
  card = run_record({"model": a.model, "other": a.other, "weight": a.weight})
  export_model(a.out, between(*models, a.weight), config, card)
  print(f"model: {a.out}")


if __name__ == "__main__":
  main(sys.argv[1:])
