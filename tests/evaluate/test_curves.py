"""The stages' loss curves can be drawn from the record that is kept; a run can be added to it."""

import json

import numpy as np
import pytest
from matplotlib.colors import to_rgb
from PIL import Image

from benchmarks import curves


def test_every_stage_has_its_curves(tmp_path):
  stages = json.loads((curves.DOCS / "training.json").read_text())
  assert set(stages) == set(curves.STAGES) and all(stages.values())
  curves.draw(stages, tmp_path / "training.png")
  image = np.asarray(Image.open(tmp_path / "training.png").convert("RGB"))
  pixels = {tuple(x) for x in np.unique(image.reshape(-1, 3), axis=0).tolist()}
  most = max(map(len, stages.values()))
  assert {tuple(round(255 * c) for c in to_rgb(colour)) for colour in curves.COLOURS[:most]} <= pixels
  stages["ode"] *= len(curves.COLOURS) + 1  # more than there are colours
  curves.draw(stages, tmp_path / "more.png")


def test_a_run_is_added_once(tmp_path, monkeypatch):
  monkeypatch.setattr(curves, "DOCS", tmp_path)
  (tmp_path / "training.json").write_text(json.dumps({stage: [] for stage in curves.STAGES}))
  lines = [{"step": s, "x0_error": 1 / (s + 0.777), "importance": 0.5, "grad_norm": 1.0} for s in (10, 20)]
  (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(m) + "\n" for m in lines))
  for _ in range(2):
    curves.main(["--add", f"ode=a=run={tmp_path}"])
  kept = json.loads((tmp_path / "training.json").read_text())
  want = [{"step": 10, "x0_error": 0.09279, "importance": 0.5}, {"step": 20, "x0_error": 0.04813, "importance": 0.5}]
  assert kept["ode"] == [{"run": "a=run", "metrics": want}] and not kept["self_forcing"]
  assert (tmp_path / "training.png").stat().st_size > 0


@pytest.mark.parametrize("text", ["ode=a run", "none=a run=.", "ode==.", "ode=a run=/nowhere"])
def test_a_run_that_is_not_there(text, capsys):
  with pytest.raises(SystemExit):
    curves.main(["--add", text])
  assert f"--add: {text!r}; want STAGE=NAME=WORKDIR" in capsys.readouterr().err
