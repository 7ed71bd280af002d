"""Draws what a model sees in an image: t2t-vit visualize WEIGHTS IMAGE --output out.png

The features of the tokens-to-token stages, and the class token's attention in each block and head. docs/predict.md
shows such a picture and says how to read it.
"""

import argparse
from collections.abc import Callable, Sequence
import dataclasses
import functools
from pathlib import Path
import stat
import sys
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from t2t_vit_jax.command_line import Parser, run_tool
from t2t_vit_jax.console import warn
from t2t_vit_jax.conversion import files, parse_image_size, pretrained
from t2t_vit_jax.data.decoding import ORIENTATIONS, BadImage, EncodedImage
from t2t_vit_jax.data.faults import REMARKS
from t2t_vit_jax.data.transforms import MAX_RESIZED_PIXELS, ResizeCenterCrop, pixels_of
from t2t_vit_jax.errors import UserError, printable, require
from t2t_vit_jax.models.layer_outputs import attention_blocks, block_number, layer_outputs
from t2t_vit_jax.models.soft_split import SPLITS
from t2t_vit_jax.models.t2t_vit import T2TViT, classify
from t2t_vit_jax.predict import Classifier, open_classifier

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

Array = jax.Array
Size = tuple[float, float]  # (width, height), inches

MEAN = 'mean'  # of all heads; single heads go by their numbers
# Inches.
STAGE_SIDE, MAP_SIDE = 2.3, 1.4  # the longer sides of pictures
STAGE_COLUMN, MAP_COLUMN = 1.7, 0.6  # least distances between columns, for the words above them
GAP, MARGIN = 0.08, 0.25
HEADING = 0.6  # for a line above a row of pictures, and for their titles
BLOCK_NAME, BAR = 0.75, 0.8  # left and right of a row of attention maps
LEAST_WIDTH = 9.0  # for the longest lines


@dataclasses.dataclass(frozen=True)
class Inside:
  """Results of a model's layers for one image.

  Attributes:
    image: (height, width, 3) uint8, as the model got it; of a grey one all three are alike.
    stages: outputs (H, W, D) of the tokens-to-token module's stages, by name; the last are the encoder's tokens.
    attention: by the name of the encoder block, (num_heads, H, W): the class token's attention to each of the image's
      tokens. The rest, up to a sum of 1, goes to the class token itself.
    guess: the likeliest class and its probability.
  """

  image: np.ndarray
  stages: dict[str, np.ndarray]
  attention: dict[str, np.ndarray]
  guess: tuple[str, float]


def look_inside(classifier: Classifier, image: Image.Image) -> Inside:
  """Runs the model on a prepared image, of any size.

  Raises:
    UserError: the image is too small for the model.
  """
  batch = classifier.normalize(jnp.asarray(pixels_of(image)[None]))
  blocks = attention_blocks(classifier.model, classifier.variables, batch)
  stages = stage_layers(classifier.model)
  outputs = _run(classifier.model, tuple(stages.values()), tuple(blocks), classifier.variables, batch)
  logits, features, attention = jax.device_get(outputs)
  probabilities = np.asarray(jax.nn.softmax(logits[0]))
  if not np.isfinite(probabilities).all():
    raise UserError('the weights give no finite probabilities: they are damaged, or not those of a trained model')
  label = int(probabilities.argmax())
  return Inside(
    image=np.asarray(image.convert('RGB')),
    stages={name: features[layer][0] for name, layer in stages.items()},
    attention={block: attention[block][0] for block in blocks},
    guess=(classifier.class_names[label], float(probabilities[label])),
  )


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(
  model: T2TViT, stages: tuple[str, ...], blocks: tuple[str, ...], variables: dict[str, Any], images: Array
) -> tuple[Array, dict[str, Array], dict[str, Array]]:
  """Logits; outputs of the stages; by block, attention (B, num_heads, H, W) of the class token."""
  layers = {block: f'{block}/attn/attention' for block in blocks}
  features, outputs = layer_outputs(model, variables, images, [*stages, *layers.values()])
  grid = features.tokens.shape[1:3]
  attention = {block: outputs[layer][:, :, 0, 1:] for block, layer in layers.items()}
  attention = {block: rows.reshape(*rows.shape[:2], *grid) for block, rows in attention.items()}
  return classify(model, variables, features), {layer: outputs[layer] for layer in stages}, attention


def stage_layers(model: T2TViT) -> dict[str, str]:
  """The layers after each soft split, by a title for them."""
  inner = ('soft_split0', 'soft_split1') if model.tokens_type == 'convolution' else ('attention1', 'attention2')
  first, second = (f'tokens_to_token/{name}' for name in inner)
  return {'stage 1': first, 'stage 2': second, 'tokens': 'tokens_to_token'}


def prepare_whole(classifier: Classifier, image: Image.Image) -> Image.Image:
  """The whole image at the model's scale: its short side as long as the model's, both multiples of a token's stride.

  Less than half a token is cut off where the sides have other proportions.
  """
  stride = int(np.prod([split.stride for split in SPLITS]))
  side = min(np.broadcast_to(classifier.model.image_size, 2))
  scale = side / min(image.size) / stride
  width, height = (stride * max(1, round(length * scale)) for length in image.size)
  if width * height > MAX_RESIZED_PIXELS:
    raise UserError(f'--whole would make {width:,} x {height:,} px of {image.width:,} x {image.height:,}: leave it out')
  channels = len(classifier.normalize.mean)
  return ResizeCenterCrop((height, width), crop_fraction=1.0, channels=channels)(image)


def principal_colors(features: np.ndarray) -> np.ndarray:
  """The first three principal components of (H, W, D) as red, green and blue, (H, W, 3) from 0 to 1.

  Each component's middle 98 % of values are stretched over the colours.
  """
  height, width, dim = features.shape
  points = features.reshape(-1, dim).astype(np.float64)
  points = points - points.mean(axis=0)
  _, _, directions = np.linalg.svd(points, full_matrices=False)
  # A component's sign is arbitrary: its largest coefficient is made positive.
  directions *= np.sign(np.take_along_axis(directions, np.abs(directions).argmax(axis=1)[:, None], axis=1))
  components = np.zeros((len(points), 3))
  components[:, : len(directions[:3])] = points @ directions[:3].T
  low, high = np.percentile(components, [1, 99], axis=0)
  spread = np.maximum(high - low, 1e-6 * max(high - low) + 1e-12)  # rounding errors are no component
  return np.clip((components - low) / spread, 0, 1).reshape(height, width, 3)


def _new_figure(width: float, height: float) -> 'Figure':
  """An empty figure of so many inches; raises MissingExtraError without matplotlib."""
  require('a picture', 'matplotlib')
  from matplotlib.figure import Figure  # late: the rest needs none of it

  return Figure(figsize=(width, height))  # without pyplot: no display, no global state


class _Page:
  """A figure on which axes are placed by inches from the upper left corner."""

  def __init__(self, width: float, height: float):
    self.figure = _new_figure(width, height)
    self._width, self._height = width, height

  def axes(self, left: float, top: float, width: float, height: float) -> 'Axes':
    bottom = self._height - top - height
    rectangle = (left / self._width, bottom / self._height, width / self._width, height / self._height)
    return self.figure.add_axes(rectangle)

  def picture(self, left: float, top: float, size: Size, pixels: np.ndarray) -> 'Axes':
    axes = self.axes(left, top, *size)
    axes.imshow(pixels, cmap='gray', vmin=0, vmax=255, aspect='auto', interpolation='nearest')
    axes.set_xticks([])
    axes.set_yticks([])
    return axes

  def text(self, left: float, top: float, text: str, **style: Any) -> None:
    """Text below `top`, verbatim: names may contain what matplotlib takes for formulas."""
    self.figure.text(
      left / self._width, 1 - top / self._height, text, va=style.pop('va', 'top'), parse_math=False, **style
    )


def draw(inside: Inside, title: str, blocks: Sequence[str], heads: Sequence[int | str]) -> 'Figure':
  """The stages in a row, and below them a row of attention maps for each block.

  Args:
    inside: from `look_inside`.
    title: of the page, up to two lines.
    blocks: names, keys of `inside.attention`.
    heads: numbers of heads, and `MEAN`.
  """
  height, width = inside.image.shape[:2]
  stage_size, map_size = (
    (side * width / max(width, height), side * height / max(width, height)) for side in (STAGE_SIDE, MAP_SIDE)
  )
  stage_column, map_column = max(stage_size[0] + 2 * GAP, STAGE_COLUMN), max(map_size[0] + GAP, MAP_COLUMN)
  stages_top = MARGIN + 0.6 + HEADING
  maps_top = stages_top + stage_size[1] + 0.35 + HEADING
  stages_width = (1 + len(inside.stages)) * stage_column
  maps_width = BLOCK_NAME + len(heads) * map_column + BAR
  page = _Page(
    max(stages_width, maps_width, LEAST_WIDTH) + 2 * MARGIN, maps_top + len(blocks) * (map_size[1] + GAP) + MARGIN
  )
  page.text(MARGIN, MARGIN, title, size=13)
  page.text(MARGIN, stages_top - HEADING, 'Features: first three principal components as red, green, blue')
  _draw_stages(page, inside, stages_top, stage_size, stage_column)
  explanation = "Attention of the class token: its share for each token, on a scale of each block's own"
  page.text(MARGIN, maps_top - HEADING, explanation)
  for column, head in enumerate(heads):
    middle = MARGIN + BLOCK_NAME + column * map_column + map_size[0] / 2
    page.text(middle, maps_top - 0.04, head if head == MEAN else f'head {head}', va='bottom', ha='center', size=9)
  for row, block in enumerate(blocks):
    weights = inside.attention[block]
    maps = [weights.mean(axis=0) if head == MEAN else weights[int(head)] for head in heads]
    top = maps_top + row * (map_size[1] + GAP)
    page.text(MARGIN + BLOCK_NAME - GAP, top + map_size[1] / 2, block, va='center', ha='right', size=9)
    _draw_maps(page, inside.image, maps, top, map_size, map_column)
  return page.figure


def _draw_stages(page: _Page, inside: Inside, top: float, size: Size, column_width: float) -> None:
  """The image and the stages' principal components."""
  height, width = inside.image.shape[:2]
  pictures = {f'image, {height} x {width} px': inside.image}
  pictures |= {f'{name}, {x.shape[0]} x {x.shape[1]}': principal_colors(x) for name, x in inside.stages.items()}
  for column, (name, pixels) in enumerate(pictures.items()):
    left = MARGIN + column * column_width
    page.picture(left, top, size, pixels)
    page.text(left, top - 0.04, name, va='bottom', size=9)


def _draw_maps(
  page: _Page, image: np.ndarray, maps: Sequence[np.ndarray], top: float, size: Size, column_width: float
) -> None:
  """One block's attention maps (H, W) over the image, and their scale."""
  backdrop = np.asarray(Image.fromarray(image).convert('L')) * 0.6 + 50  # so that only attention is very light or dark
  height, width = image.shape[:2]
  largest = max(x.max() for x in maps) or 1.0

  def overlay(axes: 'Axes', shares: np.ndarray, **more: Any) -> None:
    """Draws shares over a picture, which shows through where they are small."""
    alpha = 0.2 + 0.6 * shares / largest
    axes.imshow(shares, cmap='inferno', vmin=0, vmax=largest, alpha=alpha, aspect='auto', **more)

  for column, shares in enumerate(maps):
    axes = page.picture(MARGIN + BLOCK_NAME + column * column_width, top, size, backdrop)
    overlay(axes, shares, extent=(-0.5, width - 0.5, height - 0.5, -0.5), interpolation='nearest')
  bar = page.axes(MARGIN + BLOCK_NAME + len(maps) * column_width, top, 0.1, size[1])
  bar.set_facecolor('0.5')  # as the backdrop, on average
  overlay(bar, np.linspace(0, largest, 256)[:, None], extent=(0, 1, 0, largest), origin='lower')
  bar.yaxis.tick_right()
  digits = '.0f' if largest >= 0.1 else '.2g'
  bar.set(xticks=[], yticks=[0, largest], yticklabels=['0 %', f'{100 * largest:{digits}} %'])
  for tick, align in zip(bar.get_yticklabels(), ('bottom', 'top'), strict=True):  # not into the next row
    tick.set(va=align, size=8)


def run(arguments: argparse.Namespace) -> int:
  """Does what the command line asks for; returns the exit code."""
  output: Path = arguments.output
  files.check_output(output, force=arguments.force)
  formats = _new_figure(1, 1).canvas.get_supported_filetypes()
  if (form := output.suffix[1:].lower()) not in formats:
    raise UserError(f'{output}: the ending must say the format, one of {", ".join(sorted(formats))}')
  size = None if arguments.image_size is None else parse_image_size(arguments.image_size)
  classifier = open_classifier(arguments.weights, size, arguments.orientation)
  image = _read_image(arguments.image, classifier)
  prepare: Callable[[Image.Image], Image.Image] = classifier.prepare
  if arguments.whole:
    prepare = functools.partial(prepare_whole, classifier)
  inside = look_inside(classifier, prepare(image))

  numbers = [block_number(block) for block in inside.attention]
  num_heads = len(next(iter(inside.attention.values())))
  blocks = [f'blocks_{number}' for number in _chosen(arguments, 'blocks', numbers)]
  heads = _chosen(arguments, 'heads', [MEAN, *range(num_heads)])
  name, probability = inside.guess
  guess = f'{100 * probability:.2f} % {_short(name)}'
  figure = draw(inside, f'{_short(arguments.image.name)}\n{guess}', blocks, heads)
  files.write_file(output, lambda temporary: figure.savefig(temporary, format=form, dpi=100))
  print(f'wrote {output}: {guess}; blocks: {len(blocks)}, attention maps of each: {len(heads)}')
  return 0


def _read_image(path: Path, classifier: Classifier) -> Image.Image:
  try:
    if not path.is_dir() and not stat.S_ISREG(path.stat().st_mode):  # it may never end
      raise files.problem(path, 'is no regular file')
    file = EncodedImage(path.read_bytes(), upright=classifier.upright)
    for remark, text in REMARKS.items():
      if remark in file.remarks & ~classifier.chosen:
        warn(f'{path} {text}')
    return file.decode()
  except OSError as error:
    raise files.problem(path, f'cannot be read: {error.strerror}') from error
  except BadImage as error:
    raise files.problem(path, f'cannot be read: {error}') from error


def _short(text: str) -> str:
  """Text of at most 40 printable characters, for a title."""
  text = printable(text)
  return text if len(text) <= 40 else f'{text[:39]}…'


def _chosen(arguments: argparse.Namespace, option: str, known: list[Any]) -> list[Any]:
  """The items of `known` that an option such as '0,3' picks, in the order given; all without the option."""
  text = getattr(arguments, option)
  if text is None:
    return known
  by_name = {str(value): value for value in known}
  chosen = text.split(',')
  if not set(chosen) <= by_name.keys():
    raise UserError(f'--{option}={text}: choose from {",".join(by_name)}')
  return [by_name[name] for name in chosen]


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  parser = Parser(
    'visualize',
    example='t2t-vit visualize t2t_vit_14 cat.jpg --output=cat.png',
    description='Draws the features of the tokens-to-token stages and the attention of the class token for an image.',
  )
  parser.add_argument('weights', metavar='WEIGHTS', help=pretrained.HELP)
  parser.add_argument('image', metavar='IMAGE', type=Path, help='any picture that Pillow reads')
  parser.add_argument(
    '--output', required=True, metavar='FILE', type=Path, help='the picture to write: .png, .pdf, .svg ...'
  )
  parser.add_argument('--blocks', metavar='N,N', help='encoder blocks to show, such as 0,6,13 (default: all)')
  parser.add_argument('--heads', metavar='N,N', help='heads to show, numbers and "mean" (default: mean and all heads)')
  parser.add_argument(
    '--whole', action='store_true', help='show the whole image, not the middle that predict classifies'
  )
  parser.add_argument(
    '--image_size', metavar='SIZE', help="image size in px, SIDE or HEIGHTxWIDTH (default: the weights')"
  )
  parser.add_argument(
    '--orientation', choices=ORIENTATIONS, help="treatment of EXIF's orientation (default: as the weights say)"
  )
  parser.add_argument('--force', action='store_true', help='overwrite the output')
  return run_tool(lambda: run(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
