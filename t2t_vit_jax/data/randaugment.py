"""RandAugment as timm defines `rand-m9-mstd0.5-inc1`, the policy of the published recipe.

Every operation is a function of an RGB image and its magnitude, from 0 to 10. "Increasing" means that the effect grows
with the magnitude in every operation (in RandAugment's first version it fell in some). Pixels equal timm's.
"""

from collections.abc import Callable
import dataclasses
from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

from t2t_vit_jax.errors import check_not_negative, check_share

MAX_MAGNITUDE = 10
SIGNS = (-1, 1)
RESAMPLINGS = (Image.Resampling.BILINEAR, Image.Resampling.BICUBIC)


@dataclasses.dataclass(frozen=True)
class Draw:
  """Random numbers of one application of an operation."""

  level: float  # magnitude / 10, in [0, 1]
  sign: int  # 1 or -1, for the operations that have a direction
  resampling: Image.Resampling  # of the geometric operations
  fill: tuple[int, int, int]  # RGB where geometric operations move the image away


Operation = Callable[[Image.Image, Draw], Image.Image]


def _affine(image: Image.Image, draw: Draw, matrix: tuple[float, ...]) -> Image.Image:
  return image.transform(image.size, Image.Transform.AFFINE, matrix, resample=draw.resampling, fillcolor=draw.fill)


def rotate(image: Image.Image, draw: Draw) -> Image.Image:
  return image.rotate(draw.sign * 30 * draw.level, resample=draw.resampling, fillcolor=draw.fill)


def shear_x(image: Image.Image, draw: Draw) -> Image.Image:
  return _affine(image, draw, (1, draw.sign * 0.3 * draw.level, 0, 0, 1, 0))


def shear_y(image: Image.Image, draw: Draw) -> Image.Image:
  return _affine(image, draw, (1, 0, 0, draw.sign * 0.3 * draw.level, 1, 0))


def translate_x(image: Image.Image, draw: Draw) -> Image.Image:
  return _affine(image, draw, (1, 0, draw.sign * 0.45 * draw.level * image.width, 0, 1, 0))


def translate_y(image: Image.Image, draw: Draw) -> Image.Image:
  return _affine(image, draw, (1, 0, 0, 0, 1, draw.sign * 0.45 * draw.level * image.height))


def auto_contrast(image: Image.Image, draw: Draw) -> Image.Image:
  del draw
  return ImageOps.autocontrast(image)


def equalize(image: Image.Image, draw: Draw) -> Image.Image:
  del draw
  return ImageOps.equalize(image)


def invert(image: Image.Image, draw: Draw) -> Image.Image:
  del draw
  return ImageOps.invert(image)


def posterize(image: Image.Image, draw: Draw) -> Image.Image:
  """Keeps the upper 4 to 0 bits. With 0 bits, which Pillow refuses, the image is black."""
  bits = 4 - int(4 * draw.level)
  return ImageOps.posterize(image, bits) if bits else Image.new('RGB', image.size)


def solarize(image: Image.Image, draw: Draw) -> Image.Image:
  return ImageOps.solarize(image, 256 - min(256, int(256 * draw.level)))


def solarize_add(image: Image.Image, draw: Draw) -> Image.Image:
  """Adds up to 110 to every value below 128."""
  added = min(128, int(110 * draw.level))
  return image.point([min(255, value + added) if value < 128 else value for value in range(256)] * 3)


def _enhance(enhancer: Callable[[Image.Image], Any]) -> Operation:
  def operation(image: Image.Image, draw: Draw) -> Image.Image:
    return enhancer(image).enhance(max(0.1, 1 + draw.sign * 0.9 * draw.level))

  return operation


OPERATIONS: dict[str, Operation] = {
  'AutoContrast': auto_contrast,
  'Equalize': equalize,
  'Invert': invert,
  'Rotate': rotate,
  'PosterizeIncreasing': posterize,
  'SolarizeIncreasing': solarize,
  'SolarizeAdd': solarize_add,
  'ColorIncreasing': _enhance(ImageEnhance.Color),
  'ContrastIncreasing': _enhance(ImageEnhance.Contrast),
  'BrightnessIncreasing': _enhance(ImageEnhance.Brightness),
  'SharpnessIncreasing': _enhance(ImageEnhance.Sharpness),
  'ShearX': shear_x,
  'ShearY': shear_y,
  'TranslateXRel': translate_x,
  'TranslateYRel': translate_y,
}


@dataclasses.dataclass(frozen=True)
class RandAugment:
  """Draws operations with replacement and applies each with a probability.

  Attributes:
    num_operations: number of operations drawn for each image.
    magnitude: mean of the normal distribution from which each application draws its magnitude, clipped to [0, 10].
    magnitude_std: standard deviation of that distribution.
    probability: probability of applying a drawn operation.
    fill: RGB from 0 to 255 where geometric operations move the image away.
  """

  num_operations: int = 2
  magnitude: float = 9.0
  magnitude_std: float = 0.5
  probability: float = 0.5
  fill: tuple[int, int, int] = (124, 116, 104)  # ImageNet's mean

  def __post_init__(self) -> None:
    check_not_negative('augment.randaugment_operations', self.num_operations)
    check_not_negative('augment.randaugment_magnitude', self.magnitude)
    check_not_negative('augment.randaugment_magnitude_std', self.magnitude_std)
    check_share('augment.randaugment_probability', self.probability)

  def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    names = list(OPERATIONS)
    for index in rng.integers(len(names), size=self.num_operations):
      if rng.random() < self.probability:
        image = OPERATIONS[names[index]](image, self.draw(rng))
    return image

  def draw(self, rng: np.random.Generator) -> Draw:
    """Draws the random numbers of one application."""
    magnitude = min(max(rng.normal(self.magnitude, self.magnitude_std), 0.0), MAX_MAGNITUDE)
    return Draw(
      level=magnitude / MAX_MAGNITUDE,
      sign=SIGNS[rng.integers(len(SIGNS))],
      resampling=RESAMPLINGS[rng.integers(len(RESAMPLINGS))],
      fill=self.fill,
    )
