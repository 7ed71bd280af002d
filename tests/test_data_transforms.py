"""Host transforms against timm's pixels and the published distributions."""

import math

import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax.data import transforms
from tests.golden import DATA


@pytest.mark.parametrize('name', ['wide', 'tall', 'square'])
@pytest.mark.parametrize('size', [32, 48])
def test_evaluation_crop_equals_timms_pixel_for_pixel(name, size):
  with np.load(DATA / 'timm_eval_transform.npz') as file:
    image, expected = Image.fromarray(file[name]), file[f'{name}_eval{size}']
  crop = transforms.ResizeCenterCrop(size, crop_fraction=0.9, interpolation='bicubic')(image)
  np.testing.assert_array_equal(np.asarray(crop), expected)


def test_random_resized_crop_has_the_published_distribution():
  crop = transforms.RandomResizedCrop(32)
  rng = np.random.default_rng(0)
  width, height, draws = 500, 375, 10_000
  boxes = np.array([crop.draw_box(width, height, rng) for _ in range(draws)])
  left, top, right, bottom = boxes.T
  assert left.min() >= 0
  assert top.min() >= 0
  assert right.max() <= width
  assert bottom.max() <= height
  areas = (right - left) * (bottom - top) / (width * height)
  ratios = np.log((right - left) / (bottom - top))
  assert areas.min() == pytest.approx(0.08, abs=0.002)
  assert np.abs(ratios).max() <= math.log(4 / 3) + 0.02
  # Boxes that don't fit are drawn again, so large areas are rarer; below 0.7 every ratio fits and areas are uniform.
  low = areas[areas < 0.7]
  assert np.mean(low < 0.39) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(low)))
  small = ratios[areas < 0.5]
  assert np.mean(small < 0) == pytest.approx(0.5, abs=4 * 0.5 / math.sqrt(len(small)))


def test_random_resized_crop_falls_back_to_the_centre():
  # 10 x 1000: no box of 8 % of the area fits with a ratio above 3/4.
  box = transforms.RandomResizedCrop(32).draw_box(10, 1000, np.random.default_rng(0))
  assert box == (0, 493, 10, 506)


def test_random_padded_crop_shifts_by_up_to_the_padding_and_fills_with_black():
  image = Image.fromarray(np.arange(1, 4 * 4 * 3 + 1, dtype=np.uint8).reshape(4, 4, 3))
  crop = transforms.RandomPaddedCrop(4, padding=1)
  padded = np.pad(np.asarray(image), ((1, 1), (1, 1), (0, 0)))
  windows = {padded[i : i + 4, j : j + 4].tobytes() for i in range(3) for j in range(3)}
  rng = np.random.default_rng(0)
  assert {np.asarray(crop(image, rng)).tobytes() for _ in range(200)} == windows


def test_flip_has_its_probability_and_mirrors():
  image = Image.fromarray(np.arange(12, dtype=np.uint8).reshape(2, 2, 3))
  rng = np.random.default_rng(0)
  flipped = [np.asarray(transforms.RandomHorizontalFlip(0.3)(image, rng))[0, 0, 0] == 3 for _ in range(2_000)]
  assert np.mean(flipped) == pytest.approx(0.3, abs=0.04)


def test_the_same_generator_gives_the_same_image():
  image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (60, 80, 3), dtype=np.uint8))
  chain = transforms.Chain((transforms.RandomResizedCrop(24), transforms.RandomHorizontalFlip(0.5)))
  first, second, other = (np.asarray(chain(image, np.random.default_rng(seed))) for seed in (7, 7, 8))
  np.testing.assert_array_equal(first, second)
  assert (first != other).any()
