"""The ablation's figure can be drawn from the record that is kept, and shows every memory at every length."""

import json

import numpy as np
from matplotlib.colors import to_rgb
from PIL import Image

from benchmarks import ablation


def test_the_figure_of_the_record(tmp_path):
  results = json.loads((ablation.DOCS / "ablation.json").read_text())["results"]
  told = {(r["arm"], r["condition"]) for r in results}
  assert {(arm, c) for arm in ablation.ARMS for _, _, conditions in ablation.PANELS for c in conditions} <= told
  ablation.draw(results, tmp_path / "ablation.png")
  image = Image.open(tmp_path / "ablation.png")
  pixels = {tuple(x) for x in np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0).tolist()}
  drawn = {tuple(round(255 * c) for c in to_rgb(colour)) for colour in ablation.ARMS.values()}
  assert image.size == (1300, 468) and drawn <= pixels
