"""The command at toy size: both tasks, every file it promises, and one line for a bad flag."""

import json

import pytest

from sfjax import checkpoint, evaluate, teacher_forcing
from sfjax.config import Config, load_config, to_dataclass, to_dict


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("models") / "tiny"
  config = to_dataclass(Config, load_config("configs/digits.py:tiny"))
  checkpoint.export(folder, teacher_forcing.init_model(config), to_dict(config), {})
  return folder


def evaluated(argv, out, capsys):
  evaluate.main([*argv, "--steps", "1", "--guidance", "1", "--out", str(out)])
  return json.loads((out / "evaluation.json").read_text()), capsys.readouterr().out


def test_prompts(model, tmp_path, capsys):
  arms = ["--arm", f"sparse={model}", "--arm", f"same={model},importance=learned,routing=chunk"]
  record, table = evaluated([*arms, "--seconds", "0.5", "0.6", "--videos", "3", "--batch", "2"], tmp_path, capsys)
  rows = {(r["condition"], r["row"]): r for r in record["results"]}
  assert list(rows) == [(s, row) for s in ("0.5 s", "0.6 s") for row in ("real", "sparse", "same")]
  assert rows["0.6 s", "real"]["metrics"]["accuracy, whole"]["value"] > 0.8  # of 5 digits
  assert rows["0.6 s", "sparse"]["metrics"] == rows["0.6 s", "same"]["metrics"]
  assert rows["0.6 s", "same"]["minus"]["accuracy, whole"]["value"] == 0
  assert rows["0.6 s", "sparse"]["metrics"]["accuracy, whole"]["videos"] == 3
  assert (
    record["config"]["arms"]["same"]["sampler"]["routing"] == "chunk"
  )  # which one step does not tell from the usual
  assert record["config"]["arms"]["sparse"]["sampler"]["steps"] == 1 and record["instrument"]["accuracy"] > 0.9
  assert {p.name for p in tmp_path.glob("*.png")} >= {"0.6_s_real_2.png", "0.6_s_sparse_0.png", "0.6_s_same_1.png"}
  assert table.count("| sparse | ") == 2 and "accuracy, last second, minus sparse" in table


def test_memory_with_interventions(model, tmp_path, capsys):
  argv = ["--task", "memory", "--hide", "1", "--intervene", "empty", "swap", "--videos", "2"]
  record, table = evaluated([*argv, "--arm", f"sparse={model}"], tmp_path, capsys)
  rows = {r["row"]: r["metrics"] for r in record["results"]}
  assert list(rows) == ["real", "sparse", "sparse, P emptied", "sparse, P swapped"]
  assert rows["real"]["accuracy"]["value"] == 1 and rows["sparse"]["none"]["videos"] == 2
  assert 0 <= rows["sparse"]["P holds it"]["value"] <= 1 and rows["sparse"]["by chance"]["value"] > 0
  assert "the other's digit" in rows["sparse, P swapped"] and "hidden 1 chunks" in table
  assert (tmp_path / "hidden_1_chunks_sparse_P_swapped_1.png").is_file()


@pytest.mark.parametrize(
  ("argv", "line"),
  [
    (["--videos", "0"], "--videos: 0; want 1 or more"),
    (["--task", "memory", "--videos", "3"], "--videos: 3; want an even number, 2 or more"),
    (["--task", "memory", "--hide", "20"], "--hide: 20; want 1..19"),
    (["--seconds", "0"], "--seconds: 0; want 0.1 to 3600"),
    (["--task", "memory", "--hide", "0"], "--hide: 0; want 1..19"),
    (["--hide", "3"], "--hide: only with --task memory"),
    (["--guidance", "inf"], "--guidance: inf; want 0 or more"),
    (["--guidance", "nan"], "--guidance: nan; want 0 or more"),
    (
      ["--task", "memory", "--arm", "a=checkpoints/digits_teacher"],
      "--arm a: chunks of 21 latents; --task memory wants",
    ),
    (["--intervene", "swap"], "--intervene: only with --task memory"),
    (["--task", "other"], "argument --task: invalid choice"),
    (["--classifier", "absent.npz"], "absent.npz: no such file"),
    (["--arm", "nameless"], "--arm: 'nameless'; want NAME=DIR"),
    (["--arm", "a=absent"], "--arm a: --checkpoint: absent is not a folder"),
    (["--arm", "a=MODEL,attention=full"], "--arm a: attention=full; want one of sparse, window, dense"),
    (["--arm", "a=MODEL,routing=never"], "--arm a: --routing: 'never'; want one of step, chunk"),
    (["--arm", "a=MODEL,linear=int4"], "--arm a: --linear: 'int4'; want one of dtype, float8"),
    (["--arm", "a=MODEL,importanse=random"], "--arm a: importanse: no such key; did you mean importance?"),
    (["--arm", "a=MODEL,top_k=2"], "top_k: 2.0; want a fraction"),
    (["--arm", "a=MODEL,slots=fp8"], "slots: 'fp8'; want one of model, float8"),
    (["--arm", "a=MODEL", "--arm", "a=MODEL"], "--arm: the names a, a must differ"),
  ],
)
def test_a_bad_flag_is_one_line(argv, line, model, capsys):
  with pytest.raises(SystemExit) as ended:
    evaluate.main([word.replace("MODEL", str(model)) for word in argv])
  error = capsys.readouterr().err
  assert ended.value.code == 2 and error.count("\n") == 1 and error.startswith("error: ") and line in error
