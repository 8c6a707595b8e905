"""Trains a model: python train.py --config configs/digits.py[:variant] --workdir DIR --config.train.steps=2000."""

import sys

from sfjax.config import read_config, split_overrides
from sfjax.errors import Parser, command


@command
def main(argv: list[str]) -> None:
  rest, overrides = split_overrides(argv)
  parser = Parser(description=__doc__, epilog="Rerun the same command to resume. Any config key: --config.key=value.")
  parser.add_argument("--config", required=True, help="configs/NAME.py[:variant]")
  parser.add_argument("--workdir", required=True, help="checkpoints, logs and the exported model go here")
  parser.add_argument(
    "--coordinator", metavar="HOST:PORT", help="of process 0, for a run on several hosts (SLURM tells by itself)"
  )
  parser.add_argument("--processes", type=int, help="of such a run")
  parser.add_argument("--process", type=int, help="which of them this is")
  flags = parser.parse_args(rest)
  config = read_config(flags.config, overrides)
  from sfjax.cluster import join  # after the flags: nothing heavy starts on a typing error
  from sfjax.training import train

  join(flags.coordinator, flags.processes, flags.process)
  print(f"model: {train(config, flags.workdir)}")


if __name__ == "__main__":
  main(sys.argv[1:])
