"""Samples videos: python sample.py --prompt "a red 3" --seconds 5 --out DIR; without flags, from the shipped model."""

import sys

from sfjax.errors import command


@command
def main(argv: list[str]) -> None:
  from sfjax.sample_command import run

  run(argv)


if __name__ == "__main__":
  main(sys.argv[1:])
