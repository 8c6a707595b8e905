"""Every mistake: one line that names it, code 2, and nothing half-written (see `refused` in conftest.py)."""

import io
import json
import math
import os

import numpy as np
import pytest
from PIL import Image

import sfjax
from sfjax import checkpoint, ode
from sfjax.errors import UserError
from sfjax.sampling import Sampler
from sfjax.video import VideoWriter


@pytest.fixture
def broken(model_folder, tmp_path):
  """A copy of the model folder to spoil."""
  folder = tmp_path / "model"
  folder.mkdir()
  for file in model_folder.iterdir():
    (folder / file.name).write_bytes(file.read_bytes())
  return folder


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ("--seconds 0", "--seconds: 0; want more than 0"),
    ("--seconds -1", "--seconds: -1; want more than 0"),
    ("--seconds nan", "--seconds: nan"),
    ("--seconds 1e9", "--seconds: 1e+09; want more than 0 and at most 86400"),
    ("--seed -1", "--seed: -1; want 0..2147483647"),
    ("--seed x", "--seed: invalid int value: 'x'"),
    ("--steps 0", "--steps: 0; want at least 1"),
    ("--guidance -1", "--guidance: -1; want 0 or more"),
    ("--guidance inf", "--guidance: inf"),
    ("--attention some", "--attention: invalid choice: 'some' (choose from"),
    ("--routing never", "--routing: invalid choice: 'never' (choose from"),
    ("--commit none", "--commit: invalid choice: 'none' (choose from"),
    ("--slots fp8", "--slots: invalid choice: 'fp8' (choose from"),
    ("--linear int4", "--linear: invalid choice: 'int4' (choose from"),
    ("--sparse", "unrecognized arguments: --sparse"),
    ("--image a.png --video a.mp4", "--image: not together with --video"),
    ("--image a.png --continue_state s", "--continue_state: not together with --image"),
    ("--prompt red --prompt blue --save_state s", "--save_state, --continue_state: one prompt"),
    ("--prompt red --prompt_schedule 0:red", "--prompt_schedule: not together with --prompt"),
    ("--prompt_schedule 1:red", "--prompt_schedule: want times of 0 seconds or more, the first prompt at 0"),
    ("--prompt_schedule 0:red;inf:blue", "--prompt_schedule: want times"),
    ("--prompt_schedule 0:red;nan:blue", "--prompt_schedule: want times"),
    ("--prompt_schedule red", "--prompt_schedule: 'red'; want"),
    ("--prompt_schedule=", "--prompt_schedule: want times"),
    ("--prompt_schedule 0:red;0:blue", "--prompt_schedule: 0 is there twice; want one prompt for each time"),
    (
      "--prompt_schedule 0:red;0.01:blue",
      "--prompt_schedule: 0 and 0.01 fall into the same chunk; want one prompt for",
    ),
    ("--prompt_schedule 0:red;1:bar;1.2:blue", "--prompt_schedule: 1 and 1.2 fall into the same chunk"),
    ("--prompt_schedule 0:red;2:blue --seconds 2", "--prompt_schedule: 2 is not before the video's end, --seconds 2"),
    ("--prompt dog", "--prompt: unknown word 'dog'; this model knows: a and bar digit"),
    ("--prompt_schedule 0:red;1:dog", "--prompt_schedule: unknown word 'dog'"),
    ("--save_state absent/s", "--save_state: absent/s is not a file in a folder"),
    ("--save_state .", "--save_state: . is not a file"),
    ("--save_state /dev/null", "--save_state: /dev/null is not a file"),
    ("--save_state /proc/x", "--save_state: /proc/x cannot be written ("),
    ("--save_state=", "--save_state: ''; want a name"),
    ("--continue_state=", "--continue_state: ''; want a name"),
    ("--prompt_file=", "--prompt_file: ''; want a name"),
    ("--image=", "--image: ''; want a name"),
    ("--video=", "--video: ''; want a name"),
    ("--tiny_decoder=", "--tiny_decoder: ''; want a name"),
    ("--out=", "--out: ''; want a name"),
    ("--checkpoint absent", "--checkpoint: absent is not a folder"),
    ("--checkpoint tests", "--checkpoint: tests holds no model"),
    ("--continue_state absent", "--continue_state: absent: no such file"),
    ("--prompt_file absent", "--prompt_file: absent cannot be read"),
    ("--image absent", "--image: absent cannot be read"),
    ("--video absent", "--video: absent is not a file"),
  ],
)
def test_flags_of_sample(refused_sample, flags, says):
  assert says in refused_sample(*flags.split())


def test_no_gpu_on_a_machine_without(refused_sample):
  import jax

  if jax.default_backend() == "gpu":
    pytest.skip("this machine has one")
  assert "--device: no gpu here; this machine has cpu" in refused_sample("--device", "gpu")


def test_files_of_sample(refused_sample, tmp_path):
  rng = np.random.default_rng(0)
  path = tmp_path / "file"
  for data in (b"", b"\n  \n"):
    path.write_bytes(data)
    assert f"--prompt_file: {path} is empty" in refused_sample("--prompt_file", path)
  path.write_bytes(bytes(rng.integers(128, 256, 999, np.uint8)))
  assert f"--prompt_file: {path} cannot be read as text" in refused_sample("--prompt_file", path)
  path.write_text("a red 3\na red dog\n")
  assert "--prompt_file: unknown word 'dog'" in refused_sample("--prompt_file", path)
  path.write_text("red " * 17)
  assert "--prompt_file: 17 words; this model reads at most 16" in refused_sample("--prompt_file", path)
  Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(tmp_path / "whole.png")
  for data in (b"", (tmp_path / "whole.png").read_bytes()[:200], b"a text"):
    path.write_bytes(data)
    assert f"--image: {path} cannot be read as an image" in refused_sample("--image", path)
    assert f"--video: {path} " in refused_sample("--video", path)


def test_a_video_without_a_frame(refused_sample, tmp_path):
  import wave

  with wave.open(str(tmp_path / "sound.wav"), "wb") as sound:
    sound.setparams((1, 2, 8000, 0, "NONE", ""))
    sound.writeframes(bytes(8000))
  assert f"--video: {tmp_path / 'sound.wav'} " in refused_sample("--video", tmp_path / "sound.wav")


def test_a_video_that_leaves_nothing_to_make(refused_sample, tmp_path):
  with VideoWriter(tmp_path / "a.mp4", 16) as writer:
    writer.write(np.zeros((12, 64, 64, 3), np.uint8))
  line = refused_sample("--video", tmp_path / "a.mp4", "--seconds", 0.5)
  assert f"--video: {tmp_path / 'a.mp4'} lasts 0.75 s; want less than --seconds 0.5" in line


def test_arguments_of_the_library(model_folder):
  with pytest.raises(UserError, match="--attention: 'sprase'; want one of sparse, window, dense"):
    Sampler(model_folder, attention="sprase")
  for seconds in (0, -1, math.nan, math.inf):
    with pytest.raises(UserError, match=f"seconds: {seconds:g}; want more than 0"):
      sfjax.sample(seconds=seconds, checkpoint_dir=model_folder)
  with pytest.raises(TypeError, match="stepz"):
    sfjax.sample(checkpoint_dir=model_folder, stepz=4)


@pytest.mark.parametrize(
  ("flags", "says"),
  [
    ("--steps 0", "--steps: 0; want at least 1"),
    ("--seed -1", "--seed: -1; want 0..2147483647"),
    ("--seed 2147483648", "--seed: 2147483648; want 0..2147483647"),
  ],
)
def test_flags_of_ode(refused, model_folder, tmp_path, flags, says):
  assert says in refused(ode.main, "--checkpoint", model_folder, "--out", tmp_path / "pairs", *flags.split())


def test_checkpoints_that_are_damaged_or_of_another_config(refused_sample, broken):
  params, config = (broken / "params.npz").read_bytes(), json.loads((broken / "config.json").read_text())
  for part in (0, 0.5, 0.999):
    (broken / "params.npz").write_bytes(params[: math.floor(part * len(params))])
    assert f"{broken / 'params.npz'}: damaged or truncated" in refused_sample("--checkpoint", broken)
  (broken / "params.npz").unlink()
  assert f"{broken / 'params.npz'}: no such file" in refused_sample("--checkpoint", broken)
  (broken / "params.npz").write_bytes(params)

  def spoil(section, key, value):
    changed = json.loads(json.dumps(config))
    changed[section][key] = value
    (broken / "config.json").write_text(json.dumps(changed))
    return refused_sample("--checkpoint", broken)

  assert f"--checkpoint: {broken}: dit/" in spoil("model", "ffn_dim", 96)
  assert "--checkpoint: config.memory.top_k: 2.0; want a fraction in (0, 1]" in spoil("memory", "top_k", 2.0)
  assert "--checkpoint: config.memory.topk: unknown key; did you mean top_k?" in spoil("memory", "topk", 0.5)
  (broken / "config.json").write_text("{")
  assert f"--checkpoint: {broken / 'config.json'} is damaged" in refused_sample("--checkpoint", broken)


def test_states_that_do_not_fit(refused_sample, run_sample, model_folder, tmp_path):
  state = tmp_path / "state"
  run_sample("--seconds", 0.1, "--save_state", state, out="begun")
  for flags in (("--guidance", 1), ("--attention", "dense"), ("--slots", "float8")):
    line = refused_sample("--continue_state", state, *flags)
    assert f"--continue_state: {state} does not fit this model, --attention, --slots and --guidance" in line
  line = refused_sample("--continue_state", state, "--attention", "window")  # of the same shapes
  assert f"--continue_state: {state} was made with --attention sparse, another memory: window is " in line
  whole = state.read_bytes()
  state.write_bytes(whole[: len(whole) // 2])
  assert f"--continue_state: {state}: damaged" in refused_sample("--continue_state", state)
  assert "does not fit" in refused_sample("--continue_state", model_folder / "params.npz")
  arrays = {name: x for name, x in np.load(io.BytesIO(whole)).items() if name != "cross_distinct"}
  with open(state, "wb") as file:
    np.savez(file, **arrays)
  assert f"--continue_state: {state} was saved by an earlier version" in refused_sample("--continue_state", state)


def test_states_of_another_model(refused_sample, run_sample, broken, tmp_path):
  """Of the same shapes; a copy of its folder is the same one, and a state that does not tell is taken as it is."""
  state, params, on = tmp_path / "state", broken / "params.npz", ("--seconds", 0.1, "--checkpoint", broken)
  run_sample("--seconds", 0.1, "--save_state", state, out="begun")
  run_sample(*on, "--continue_state", state, "--linear", "float8")
  arrays = checkpoint.load_arrays(params)
  checkpoint.save_arrays(params, arrays | {"dit/head/bias": -arrays["dit/head/bias"]})
  line = refused_sample("--continue_state", state, "--checkpoint", broken)
  assert f"--continue_state: {state} was made by another model; want the --checkpoint" in line
  untold = checkpoint.load_arrays(state)
  untold.pop("made")
  checkpoint.save_arrays(state, untold)
  assert run_sample(*on, "--continue_state", state).record["seed"] == 0


def test_out_that_cannot_be_written(refused_sample, tmp_path):
  (tmp_path / "file").write_text("in the way")
  for out in (tmp_path / "file", tmp_path / "file" / "below"):
    assert f"--out: {out} is not a writable folder" in refused_sample("--out", out)
  (tmp_path / "locked").mkdir(mode=0o555)
  if os.geteuid():  # root may write anywhere
    assert "--out: " in refused_sample("--out", tmp_path / "locked")


def test_a_failure_on_the_way_leaves_no_part_of_a_video(run_sample, tmp_path, monkeypatch):
  stream = Sampler.stream

  def torn(self, *args):
    yield next(iter(stream(self, *args)))
    raise KeyboardInterrupt

  monkeypatch.setattr(Sampler, "stream", torn)
  with pytest.raises(SystemExit) as exit:
    run_sample("--seconds", 1)
  assert exit.value.code == 130 and not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
  ("key", "says"),
  [
    ("train.step=3", "--config.train.step: no such key; did you mean --config.train.steps?"),
    ("train.steps=0", "config.train.steps: 0; want at least 1"),
    ("train.steps=some", "--config.train.steps: 'some' is not accepted; want int"),
    ("train.init=absent", "absent is not a folder"),
    ("memory.top_k=2", "config.memory.top_k: 2.0; want a fraction"),
    ("memory.slots=fp8", "config.memory.slots: 'fp8'; want one of model, float8"),
    ("memory.slots=float8", "config.memory.slots: float8; want model in training"),
    ("data.source=web", "config.data.source: 'web'; accepted are digits, folder"),
    ("model.latent_size=34,34", "(3, 17, 17)"),  # no tile of the config divides it; the line names some that fit
    ("model.latent_size=31,32", "latent_size: (31, 32)"),
    ("model.tile=3,5,5", "(3, 5, 5) does not divide the chunk's grid (3, 16, 16)"),
  ],
)
def test_keys_of_train(refused_train, key, says):
  assert says in refused_train(f"--config.{key}")


def test_configs_of_train(refused_train, tmp_path):
  assert "unknown variant 'tinny'; accepted are '', 'base', 'tiny'" in refused_train(config="configs/digits.py:tinny")
  assert "--config: configs/absent.py is not a python file" in refused_train(config="configs/absent.py")
  (tmp_path / "bad.py").write_text("def get_config(")
  assert f"--config: {tmp_path / 'bad.py'} is not readable Python" in refused_train(config=tmp_path / "bad.py")
  (tmp_path / "file").write_text("in the way")
  assert f"--workdir: {tmp_path / 'file'} is not a writable folder" in refused_train("--workdir", tmp_path / "file")


def test_the_model_folder_is_as_it_was(model_folder):
  assert sorted(p.name for p in model_folder.iterdir()) == ["card.json", "config.json", "params.npz"]
  assert checkpoint.load_config(model_folder)["name"] == "digits"
