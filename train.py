"""Trains a model: python train.py --config configs/digits.py[:variant] --workdir DIR --config.train.steps=2000."""

import sys

from sfjax.config import Config, apply_overrides, load_config, split_overrides, to_dataclass
from sfjax.errors import Parser, command


@command
def main(argv: list[str]) -> None:
  rest, overrides = split_overrides(argv)
  parser = Parser(description=__doc__, epilog="Rerun the same command to resume. Any config key: --config.key=value.")
  parser.add_argument("--config", required=True, help="configs/NAME.py[:variant]")
  parser.add_argument("--workdir", required=True, help="checkpoints, logs and the exported model go here")
  flags = parser.parse_args(rest)
  config = to_dataclass(Config, apply_overrides(load_config(flags.config), overrides))
  from sfjax.training import train  # after the flags: nothing heavy starts on a typing error

  print(f"model: {train(config, flags.workdir)}")


if __name__ == "__main__":
  main(sys.argv[1:])
