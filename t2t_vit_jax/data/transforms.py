"""Image transforms on the host: pure functions of an RGB image and, where random, a generator.

Where a model takes grey images, evaluation begins and training ends with the conversion to grey.
"""

from collections.abc import Callable
import dataclasses
import functools
import math
from typing import Any

import numpy as np
from PIL import Image

from t2t_vit_jax.data.decoding import Box, EncodedImage
from t2t_vit_jax.errors import check_interval, check_not_negative, check_share, require

MAX_RESIZED_PIXELS = 2**24  # of an image before its middle is cut out
INTERPOLATIONS = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}
MODES = {1: 'L', 3: 'RGB'}  # Pillow's, by number of channels

EvalTransform = Callable[[Image.Image], Image.Image]
TrainTransform = Callable[[EncodedImage, np.random.Generator], Image.Image]  # begins with a crop
Augmentation = Callable[[Image.Image, np.random.Generator], Image.Image]


def in_mode(image: Image.Image, channels: int) -> Image.Image:
  """The image in grey or in RGB."""
  mode = MODES[channels]
  return image if image.mode == mode else image.convert(mode)  # `convert` would copy it


def pixels_of(image: Image.Image) -> np.ndarray:
  """Pixels (H, W, C) uint8 of a grey or RGB image."""
  pixels = np.asarray(image)
  return pixels if pixels.ndim == 3 else pixels[..., None]


def covering_size(image: Image.Image, size: tuple[int, int]) -> tuple[int, int]:
  """(width, height) of at least (height, width) px: one side exactly, the other by the aspect ratio, rounded down."""
  height, width = size
  if width * image.height >= height * image.width:
    return width, int(width * image.height / image.width)
  return int(height * image.width / image.height), height


def center_crop(image: Image.Image, size: tuple[int, int]) -> Image.Image:
  """Cuts (height, width) px from the middle."""
  height, width = size
  left, top = round((image.width - width) / 2), round((image.height - height) / 2)
  return image.crop((left, top, left + width, top + height))


@dataclasses.dataclass(frozen=True)
class ResizeCenterCrop:
  """timm's evaluation transform: the crop keeps `crop_fraction` of the resized short side."""

  size: int | tuple[int, int]  # px, one side or (height, width)
  crop_fraction: float
  interpolation: str = 'bicubic'
  channels: int = 3

  def __call__(self, image: Image.Image) -> Image.Image:
    image = in_mode(image, self.channels)
    height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
    larger = math.floor(height / self.crop_fraction), math.floor(width / self.crop_fraction)
    resized, interpolation = covering_size(image, larger), INTERPOLATIONS[self.interpolation]
    if math.prod(resized) <= MAX_RESIZED_PIXELS:
      return center_crop(image.resize(resized, interpolation), (height, width))
    # Of a very long image only the middle is computed: the same but for rounding.
    x, y = image.width / resized[0], image.height / resized[1]  # px of the image for each resized one
    left, top = round((resized[0] - width) / 2), round((resized[1] - height) / 2)
    box = (x * left, y * top, min(x * (left + width), image.width), min(y * (top + height), image.height))
    return image.resize((width, height), interpolation, box=box)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """Inception's crop as in timm: a random area and aspect ratio, resized to `size` x `size` px.

  Ten tries to fit a box with area share uniform in `scale` and aspect ratio log-uniform in `ratio` into the image, then
  the largest centred box that keeps the ratio. The interpolation is drawn for each image.
  """

  size: int
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  interpolations: tuple[str, ...] = ('bilinear', 'bicubic')
  fast: bool = False  # decodes by simplejpeg, resizes by `fast_resize`

  def __post_init__(self) -> None:
    check_interval('augment.crop_scale', self.scale, most=1)
    check_interval('augment.crop_ratio', self.ratio)
    if self.fast:
      require('data.fast_decode', 'cykooz_resizer', 'simplejpeg')

  def __call__(self, image: EncodedImage, rng: np.random.Generator) -> Image.Image:
    box = self.draw_box(image.width, image.height, rng)
    interpolation = self.interpolations[rng.integers(len(self.interpolations))]
    crop = image.crop(box, fast=self.fast)
    if self.fast:
      return fast_resize(crop, self.size, interpolation)
    return crop.resize((self.size, self.size), INTERPOLATIONS[interpolation])

  def draw_box(self, width: int, height: int, rng: np.random.Generator) -> Box:
    """Draws the box to crop."""
    log_ratio = math.log(self.ratio[0]), math.log(self.ratio[1])
    for _ in range(10):
      area = width * height * rng.uniform(*self.scale)
      aspect = math.exp(rng.uniform(*log_ratio))
      box_width, box_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
      if 0 < box_width <= width and 0 < box_height <= height:
        left, top = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
        return left, top, left + box_width, top + box_height
    aspect = min(max(width / height, self.ratio[0]), self.ratio[1])
    box_width, box_height = min(width, round(height * aspect)), min(height, round(width / aspect))
    left, top = (width - box_width) // 2, (height - box_height) // 2
    return left, top, left + box_width, top + box_height


def fast_resize(image: Image.Image, size: int, interpolation: str) -> Image.Image:
  """Resizes an RGB image to `size` x `size` px with vector instructions: Pillow's filters, but other rounding."""
  resized = Image.new('RGB', (size, size))
  resizer, options = _fast_resizer(interpolation)
  resizer.resize_pil(image, resized, options)
  return resized


@functools.cache
def _fast_resizer(interpolation: str) -> tuple[Any, Any]:
  from cykooz_resizer import FilterType, ResizeAlg, ResizeOptions, Resizer

  filters = {'bilinear': FilterType.bilinear, 'bicubic': FilterType.catmull_rom}  # Pillow's bicubic is Catmull-Rom
  return Resizer(), ResizeOptions(resize_alg=ResizeAlg.convolution(filters[interpolation]))


@dataclasses.dataclass(frozen=True)
class RandomPaddedCrop:
  """Resizes to `size` x `size` px, pads with black and cuts `size` x `size` px anywhere: a random shift."""

  size: int
  padding: int  # px on each side
  interpolation: str = 'bilinear'

  def __post_init__(self) -> None:
    check_not_negative('augment.crop_padding', self.padding)

  def __call__(self, image: EncodedImage, rng: np.random.Generator) -> Image.Image:
    whole = image.crop((0, 0, image.width, image.height))
    resized = whole.resize((self.size, self.size), INTERPOLATIONS[self.interpolation])
    left, top = (int(offset) for offset in rng.integers(-self.padding, self.padding + 1, size=2))
    # Pillow fills the part of a box outside the image with black.
    return resized.crop((left, top, left + self.size, top + self.size))


@dataclasses.dataclass(frozen=True)
class RandomHorizontalFlip:
  """Mirrors left and right with the given probability."""

  probability: float

  def __post_init__(self) -> None:
    check_share('augment.horizontal_flip_probability', self.probability)

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < self.probability:
      return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


@dataclasses.dataclass(frozen=True)
class Chain:
  """A crop, then augmentations, which all draw from one generator."""

  crop: TrainTransform
  augmentations: tuple[Augmentation, ...] = ()
  channels: int = 3

  def __call__(self, image: EncodedImage, rng: np.random.Generator) -> Image.Image:
    augmented = self.crop(image, rng)
    for augmentation in self.augmentations:
      augmented = augmentation(augmented, rng)
    return in_mode(augmented, self.channels)
