"""Image transforms on the host: pure functions of an RGB image and, where random, a generator."""

from collections.abc import Callable
import dataclasses
import io
import math

import numpy as np
from PIL import Image, UnidentifiedImageError

INTERPOLATIONS = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}

TrainTransform = Callable[[Image.Image, np.random.Generator], Image.Image]
EvalTransform = Callable[[Image.Image], Image.Image]


class BadImage(ValueError):  # noqa: N818 (a condition of the data that is dealt with)
  """An image file that cannot be decoded."""


def decode(encoded: bytes) -> Image.Image:
  """Decodes an image file of any mode to RGB as Pillow converts it.

  EXIF orientation is ignored, as it was when the published models were trained.

  Raises:
    BadImage: the file is empty, damaged, cut off, or no image.
  """
  try:
    return Image.open(io.BytesIO(encoded)).convert('RGB')
  except MemoryError:
    raise
  except UnidentifiedImageError as error:
    raise BadImage('no image file') from error
  except Exception as error:  # Pillow's readers raise whatever a damaged file makes them stumble over
    raise BadImage(f'{type(error).__name__}: {error}') from error


def resize_short_side(image: Image.Image, size: int, interpolation: str) -> Image.Image:
  """Resizes to `size` px on the short side; the long side is rounded down."""
  width, height = image.size
  short = min(width, height)
  return image.resize((int(size * width / short), int(size * height / short)), INTERPOLATIONS[interpolation])


def center_crop(image: Image.Image, size: int) -> Image.Image:
  """Cuts the middle `size` x `size` px."""
  left, top = round((image.width - size) / 2), round((image.height - size) / 2)
  return image.crop((left, top, left + size, top + size))


@dataclasses.dataclass(frozen=True)
class ResizeCenterCrop:
  """timm's evaluation transform: the crop keeps `crop_fraction` of the resized short side."""

  size: int  # px
  crop_fraction: float
  interpolation: str = 'bicubic'

  def __call__(self, image: Image.Image) -> Image.Image:
    resized = resize_short_side(image, math.floor(self.size / self.crop_fraction), self.interpolation)
    return center_crop(resized, self.size)


@dataclasses.dataclass(frozen=True)
class RandomResizedCrop:
  """Inception's crop as in timm: a random area and aspect ratio, resized to `size` x `size` px.

  Ten tries to fit a box with area share uniform in `scale` and aspect ratio log-uniform in `ratio`
  into the image, then the largest centred box that keeps the ratio. The interpolation is drawn anew
  for each image.
  """

  size: int
  scale: tuple[float, float] = (0.08, 1.0)
  ratio: tuple[float, float] = (3 / 4, 4 / 3)
  interpolations: tuple[str, ...] = ('bilinear', 'bicubic')

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    box = self.draw_box(image.width, image.height, rng)
    interpolation = self.interpolations[rng.integers(len(self.interpolations))]
    return image.crop(box).resize((self.size, self.size), INTERPOLATIONS[interpolation])

  def draw_box(self, width: int, height: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """(left, top, right, bottom) of the crop in px."""
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


@dataclasses.dataclass(frozen=True)
class RandomPaddedCrop:
  """Resizes to `size` x `size` px, pads with black and cuts `size` x `size` px anywhere: a random shift."""

  size: int
  padding: int  # px on each side
  interpolation: str = 'bilinear'

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    resized = image.resize((self.size, self.size), INTERPOLATIONS[self.interpolation])
    left, top = (int(offset) for offset in rng.integers(-self.padding, self.padding + 1, size=2))
    # PIL fills with black what a box takes from outside the image.
    return resized.crop((left, top, left + self.size, top + self.size))


@dataclasses.dataclass(frozen=True)
class RandomHorizontalFlip:
  """Mirrors left and right with the given probability."""

  probability: float

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    if rng.random() < self.probability:
      return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


@dataclasses.dataclass(frozen=True)
class Chain:
  """Random transforms one after the other, drawing from one generator."""

  transforms: tuple[TrainTransform, ...]

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    for transform in self.transforms:
      image = transform(image, rng)
    return image
