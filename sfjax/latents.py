"""Videos as Wan2.1's latents: python -m sfjax.latents --checkpoint DIR --videos FOLDER --out P; and reading them as clips.

Its VAE takes longer over a clip than a training step may, so clips are encoded once, as long as the teacher's, and kept.
"""

import pathlib
import sys

import jax
import numpy as np

from sfjax import captions, wan
from sfjax.checkpoint import load_config
from sfjax.config import Config, Stage, to_dataclass
from sfjax.data import records
from sfjax.data.video_folder import VideoFolder
from sfjax.errors import Parser, UserError, command
from sfjax.parts import around, of_wan
from sfjax.runlog import keep_programs
from sfjax.wan_vae import WanVAE, from_uint8

_KIND = "latents"


def fitting(config: Config, stage: Stage, clips: records.Records, shape: tuple[int, ...], spare: int = 0):
  """Clips of latents of that shape [T,h,w,C], as the stage and the model want them; captions and the empty one are prepared.

  Args:
    spare: how many latents may be left over where a clip is cut into chunks.

  Raises:
    UserError: clips of another length than the stage's or of another size than the model's, or no text encoder.
  """
  model, (latents, *size) = config.model, shape
  if not 0 <= latents - stage.chunks * model.chunk_frames <= spare or stage.firsts:
    raise UserError(
      f"config.train.stages: chunks {stage.chunks}, firsts {stage.firsts}; these clips have {latents} latents"
    )
  if size != (want := [*model.latent_size, model.latent_channels]):
    raise UserError(f"config.model: latents of {want}; those at config.data.path are of {size}")
  captions.encoder_of(model).prepare(config, {"config.data.path": [*clips.captions, ""]})
  return clips


def source(config: Config, stage: Stage) -> records.Records:
  """The clips at config.data.path: {"latents": float16 [T,h,w,C], "caption": str}. Raises UserError: `Records`, `fitting`."""
  clips = records.Records(config.data.path, _KIND, "sfjax.latents")
  return fitting(config, stage, clips, clips[0]["latents"].shape, spare=config.model.chunk_frames - 1)


@command
def main(argv: list[str]) -> None:
  """Writes the clips shard by shard; shards that are there already are left as they are."""
  p = Parser(prog="python -m sfjax.latents", description=__doc__.splitlines()[0])
  p.add_argument("--checkpoint", required=True, help="a converted folder of Wan2.1, which has its VAE and sizes")
  p.add_argument("--videos", required=True, help="their folder; captions in captions.jsonl or in a .txt beside each")
  p.add_argument("--out", required=True, help="folder of the shards; rerun to go on")
  p.add_argument("--latents", type=int, default=wan.CLIP, help="of a clip: 1 + 4 (N - 1) frames")
  p.add_argument("--fps", type=float, default=16.0, help="frames a second of a clip")
  p.add_argument("--batch", type=int, default=8, help="clips of a shard")
  p.add_argument("--part", default="0/1", metavar="I/N", help=records.PART)
  a = p.parse_args(argv)
  for flag in ("latents", "fps", "batch"):
    if not getattr(a, flag) > 0:
      raise UserError(f"--{flag}: {getattr(a, flag)}; want more than 0")
  part = records.part(a.part)
  config = to_dataclass(Config, load_config(a.checkpoint), "--checkpoint: config")
  if not of_wan(config.model):
    raise UserError(f"--checkpoint: {a.checkpoint} is no model of Wan2.1's latents; others read videos as they are")
  config, sizes = around(config, pathlib.Path(a.checkpoint))
  codec = WanVAE(sizes.vae)
  size = tuple(n * codec.space for n in config.model.latent_size)
  videos = VideoFolder(a.videos, size, a.fps, 1 + codec.time * (a.latents - 1))
  keep_programs()
  encode = jax.jit(lambda vae, frames: codec.encode(vae, from_uint8(frames)))
  weights = wan.load_vae(a.checkpoint, sizes.vae)

  def latents(index):
    clips = [encode(weights, videos[int(i)]["frames"][None])[0] for i in index]
    return {"latents": np.stack(clips).astype(np.float16)}

  card = {"checkpoint": a.checkpoint, "size": list(size), "fps": a.fps, "latents": a.latents}
  records.write(a.out, _KIND, card, videos.captions, a.batch, part, latents)


if __name__ == "__main__":
  main(sys.argv[1:])
