"""Errors: a user's mistake is one line on stderr and exit code 2, a bug keeps its traceback."""

import subprocess
import sys

import pytest

PROGRAM = """
import sys
from sfjax.errors import UserError, command

@command
def main():
  {body}

main()
"""


def run(body):
  return subprocess.run([sys.executable, "-c", PROGRAM.format(body=body)], capture_output=True, text=True)


@pytest.mark.parametrize(
  ("body", "code", "line"),
  [
    (r"raise UserError('--seed: -1;\n  want 0 or more')", 2, "error: --seed: -1; want 0 or more\n"),
    (
      "from sfjax.data.video_folder import DataError; raise DataError('clips: no videos')",
      2,
      "error: clips: no videos\n",
    ),
    ("raise KeyboardInterrupt", 130, "interrupted\n"),
  ],
)
def test_one_line(body, code, line):
  done = run(body)
  assert (done.returncode, done.stderr, done.stdout) == (code, line, "")


def test_bug_keeps_traceback():
  done = run("raise ValueError('a bug')")
  assert done.returncode == 1 and "Traceback" in done.stderr and "ValueError: a bug" in done.stderr


def test_success_loads_no_ffmpeg():
  done = run("print('av' in sys.modules)")
  assert (done.returncode, done.stdout, done.stderr) == (0, "False\n", "")


def test_train_with_a_bad_key(tmp_path):
  args = [sys.executable, "train.py", "--config", "configs/digits.py:tiny", "--workdir", str(tmp_path)]
  done = subprocess.run([*args, "--config.train.step=3"], capture_output=True, text=True)
  assert done.returncode == 2 and done.stderr.count("\n") == 1
  assert done.stderr == "error: --config.train.step: no such key; did you mean --config.train.steps?\n"
