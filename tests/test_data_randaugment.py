"""RandAugment against timm's pixels and the published distribution."""

import collections

import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax.data import randaugment
from tests.golden import DATA

FILL = (124, 116, 104)
RESAMPLINGS = {'bilinear': Image.Resampling.BILINEAR, 'bicubic': Image.Resampling.BICUBIC}


@pytest.fixture(name='golden', scope='module')
def fixture_golden():
  with np.load(DATA / 'timm_randaugment_ops.npz') as file:
    results = {str(key): file['pixels'][which] for key, which in zip(file['keys'], file['which'], strict=True)}
    return Image.fromarray(file['image']), results


@pytest.mark.parametrize('name', randaugment.OPERATIONS)
def test_operation_equals_timms_pixel_for_pixel(golden, name):
  image, results = golden
  compared = 0
  for key, expected in results.items():
    operation, magnitude, sign, resampling = key.split('|')
    if operation == name:
      level = int(magnitude.removeprefix('m')) / randaugment.MAX_MAGNITUDE
      draw = randaugment.Draw(level, {'pos': 1, 'neg': -1}[sign], RESAMPLINGS[resampling], FILL)
      np.testing.assert_array_equal(np.asarray(randaugment.OPERATIONS[name](image, draw)), expected, err_msg=key)
      compared += 1
  assert compared == 12


def test_draws_follow_the_published_distribution():
  policy, rng, count = randaugment.RandAugment(), np.random.default_rng(0), 20_000
  draws = [policy.draw(rng) for _ in range(count)]
  magnitudes = 10 * np.array([draw.level for draw in draws])
  assert magnitudes.max() <= 10
  # N(9, 0.5) clipped at 10 lies below its mean half of the time, and at 10 in 2.3 % of the draws.
  assert np.mean(magnitudes < 9) == pytest.approx(0.5, abs=0.015)
  assert np.mean(magnitudes == 10) == pytest.approx(0.0228, abs=0.005)
  assert np.mean(magnitudes < 8.5) == pytest.approx(0.1587, abs=0.011)
  assert np.mean([draw.sign for draw in draws]) == pytest.approx(0, abs=0.03)
  assert np.mean([draw.resampling == RESAMPLINGS['bicubic'] for draw in draws]) == pytest.approx(0.5, abs=0.015)


def test_operations_are_drawn_equally_often_and_applied_half_of_the_time(monkeypatch):
  applied = collections.Counter()

  def counting(name):
    def operation(image, draw):
      del draw
      applied[name] += 1
      return image

    return operation

  monkeypatch.setattr(randaugment, 'OPERATIONS', {name: counting(name) for name in randaugment.OPERATIONS})
  image, rng, count = Image.new('RGB', (8, 8)), np.random.default_rng(0), 15_000
  for _ in range(count):
    randaugment.RandAugment()(image, rng)
  assert len(applied) == 15
  # Two draws an image, each one of 15, each applied with probability 1/2: 1,000 of each, deviation 31.
  assert sum(applied.values()) == pytest.approx(count, abs=4 * 87)
  assert max(abs(number - 1_000) for number in applied.values()) < 4 * 31


def test_no_operations_leave_the_image_alone():
  image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8))
  assert randaugment.RandAugment(num_operations=0)(image, np.random.default_rng(0)) is image
