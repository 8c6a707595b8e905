"""From scores a video to what is published: estimates with intervals, differences between arms, a markdown table.

Scores are nested: condition ("5 s", "hidden 3 chunks") -> row (an arm, or "real") -> metric -> one value a video.
"""

import numpy as np

from sfjax.evaluation.intervals import Estimate, estimate, paired_difference

REAL = "real"
Scores = dict[str, dict[str, dict[str, np.ndarray]]]


def _plain(e: Estimate) -> dict:
  number = lambda x: round(x, 5) if np.isfinite(x) else None
  return {"value": number(e.value), "low": number(e.low), "high": number(e.high), "videos": e.videos}


def _differences(rows: dict, reference: str) -> dict[str, dict[str, Estimate]]:
  """Row minus reference for every metric that both have; real clips are not compared."""
  base = rows[reference]
  return {
    row: {name: paired_difference(x, base[name]) for name, x in scores.items() if name in base}
    for row, scores in rows.items()
    if row not in (REAL, reference)
  }


def summary(scores: Scores, reference: str) -> list[dict]:
  """Every condition and row with its estimates, and how it differs from the reference arm on the same videos."""
  result = []
  for condition, rows in scores.items():
    differences = _differences(rows, reference)
    for row, metrics in rows.items():
      entry = {"condition": condition, "row": row}
      entry["metrics"] = {name: _plain(estimate(x)) for name, x in metrics.items()}
      if row in differences:
        entry["minus"] = {"row": reference} | {name: _plain(e) for name, e in differences[row].items()}
      result.append(entry)
  return result


def markdown(scores: Scores, reference: str) -> str:
  """A table for each condition; the last column compares the first metric with the reference arm's."""
  tables = []
  for condition, rows in scores.items():
    names = list(dict.fromkeys(name for metrics in rows.values() for name in metrics))
    differences = _differences(rows, reference)
    header = [condition, *names]
    if differences:
      header.append(f"{names[0]}, minus {reference}")
    lines = [header, ["---"] * len(header)]
    for row, metrics in rows.items():
      cells = [str(estimate(metrics[name])) if name in metrics else "-" for name in names]
      if differences:
        cells.append(str(differences[row][names[0]]) if row in differences else "-")
      lines.append([row, *cells])
    tables.append("\n".join("| " + " | ".join(line) + " |" for line in lines))
  return "\n\n".join(tables)
