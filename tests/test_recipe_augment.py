"""Device-side augmentation: by hand, and against the published distributions."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from t2t_vit_jax import UserError
from t2t_vit_jax.data.randaugment import RandAugment
from t2t_vit_jax.data.transforms import RandomHorizontalFlip, RandomPaddedCrop, RandomResizedCrop
from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.recipe import augment

MIXING = augment.Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, cutmix_probability=0.5, group_size=4)
ERASING = augment.RandomErasing(probability=0.25, area=(0.02, 1 / 3), aspect_ratio=(0.3, 1 / 0.3))


def random_batch(size, side=16):
  rng = np.random.default_rng(0)
  images = rng.integers(0, 256, (size, side, side, 3), dtype=np.uint8)
  return images, np.eye(10, dtype=np.float32)[rng.integers(0, 10, size)]


def draw_weights(mixing, count, side=32):
  keys = jax.random.split(jax.random.key(0), count)
  return np.asarray(jax.jit(jax.vmap(lambda key: mixing.draw_weights(key, side, side)))(keys))


def test_normalization_by_hand():
  images = np.array([[[[0, 51, 255]]]], np.uint8)
  normalized = Normalization((0.5, 0.2, 0.0), (0.5, 0.1, 2.0))(images)
  np.testing.assert_allclose(normalized, [[[[-1.0, 0.0, 0.5]]]], atol=1e-6)


def test_soft_targets_by_hand():
  targets = augment.soft_targets(np.array([2]), num_classes=4, label_smoothing=0.1)
  np.testing.assert_allclose(targets, [[0.025, 0.025, 0.925, 0.025]], rtol=1e-6)


@pytest.mark.parametrize('kind', ['mixup', 'cutmix'])
def test_images_and_targets_are_mixed_with_their_mirror_in_the_group(kind):
  mixing = augment.Mixing(
    mixup_alpha=0.8 if kind == 'mixup' else 0.0,
    cutmix_alpha=1.0 if kind == 'cutmix' else 0.0,
    cutmix_probability=0.5,
    group_size=4,
  )
  images, targets = random_batch(8)
  rng = jax.random.key(3)
  mixed, mixed_targets = jax.device_get(jax.jit(mixing)(rng, images, targets, np.arange(8)))
  for group in range(2):
    weight = np.asarray(mixing.draw_weights(jax.random.fold_in(rng, 4 * group), 16, 16))[..., None]
    assert 0 < weight.mean() < 1
    if kind == 'cutmix':
      assert set(np.unique(weight)) == {0, 1}
    else:
      assert len(np.unique(weight)) == 1
    for i in range(4):
      own, partner = group * 4 + i, group * 4 + 3 - i
      expected = np.rint(images[own] * weight + images[partner] * (1 - weight))
      assert np.abs(mixed[own] - expected).max() <= (1 if kind == 'mixup' else 0)  # a product may round either way
      assert np.mean(mixed[own] != expected) < 0.01
      share = weight.mean()
      np.testing.assert_allclose(mixed_targets[own], targets[own] * share + targets[partner] * (1 - share), atol=1e-5)
  np.testing.assert_array_equal(mixed, mixed.round())


def test_cutmix_share_is_the_area_that_is_really_left():
  """Boxes are cut off at the border: the share must be that of the pixels, not the one drawn."""
  weights = draw_weights(augment.Mixing(0.0, 1.0, 0.5, 1), 2_000, side=128)
  assert set(np.unique(weights)) == {0, 1}
  for weight in weights[:200]:
    rows, columns = (np.flatnonzero((weight == 0).any(axis=axis)) for axis in (1, 0))
    box = np.ones_like(weight)
    if len(rows):
      box[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1] = 0
    np.testing.assert_array_equal(weight, box)  # one rectangle
  # Uncut boxes cover 1 - lambda, uniform, of the image; a centre near the border cuts some off.
  # By hand: E[side^2 (1 - side/4)^2] with side^2 uniform is 1/2 - 1/5 + 1/48 = 0.3208. Rounding sides down to even
  # pixels, as the reference does, takes 1.5 of 128 px from each, about 0.006 in all.
  assert np.mean(weights == 0) == pytest.approx(0.3208 - 0.006, abs=0.018)


def test_mixup_share_has_the_published_beta_distribution():
  shares = draw_weights(augment.Mixing(0.8, 0.0, 0.5, 1), 20_000, side=1)[:, 0, 0]
  assert shares.mean() == pytest.approx(0.5, abs=0.01)
  assert shares.var() == pytest.approx(1 / (4 * (2 * 0.8 + 1)), rel=0.03)  # of Beta(0.8, 0.8)


def test_cutmix_and_mixup_alternate_with_their_probability():
  weights = draw_weights(augment.Mixing(0.8, 1.0, 0.3, 1), 5_000, side=8)
  mixup = [len(np.unique(weight)) == 1 and 0 < weight[0, 0] < 1 for weight in weights]
  assert np.mean(mixup) == pytest.approx(0.7, abs=0.026)


def test_without_alphas_nothing_is_mixed():
  images, targets = random_batch(4)
  mixed = augment.Mixing(0.0, 0.0, 0.5, 4)(jax.random.key(0), images, targets, np.arange(4))
  assert mixed[0] is images
  assert mixed[1] is targets


def test_erasing_has_the_published_frequency_area_and_aspect_ratio():
  height, width = 64, 48
  keys = jax.random.split(jax.random.key(0), 20_000)
  masks = np.asarray(jax.jit(jax.vmap(lambda key: ERASING.draw_mask(key, height, width)))(keys))
  erased = masks.any(axis=(1, 2))
  assert erased.mean() == pytest.approx(0.25, abs=0.013)
  heights, widths = (masks[erased].any(axis=axis).sum(axis=1) for axis in (2, 1))
  np.testing.assert_array_equal(heights * widths, masks[erased].sum(axis=(1, 2)))  # one full box
  areas = heights * widths / (height * width)
  assert 0.015 < areas.min() < 0.03
  assert 0.30 < areas.max() < 0.35
  ratios = np.log(heights / widths)
  assert np.abs(ratios).max() < np.log(1 / 0.3) + 0.2
  # Boxes up to 6 % fit with any ratio: there the ratio is log-uniform and the area uniform.
  small = areas < 0.06
  assert np.mean(ratios[small] < 0) == pytest.approx(0.5, abs=0.07)
  # Every position is as likely: the mean box lies in the middle.
  top = masks[erased].any(axis=2).argmax(axis=1)
  assert np.mean(top / (height - heights)) == pytest.approx(0.5, abs=0.02)


def test_erased_pixels_are_noise_and_the_others_are_untouched():
  images = np.full((400, 32, 32, 3), 7.0, np.float32)
  erased = np.asarray(jax.jit(ERASING)(jax.random.key(1), images, np.arange(400)))
  changed = erased != 7
  per_image = changed.any(axis=(1, 2, 3))
  assert 0.17 < per_image.mean() < 0.33
  noise = erased[changed]
  assert noise.mean() == pytest.approx(0, abs=0.02)
  assert noise.std() == pytest.approx(1, abs=0.02)


def test_augmentation_does_not_depend_on_the_number_of_devices():
  pipeline = augment.BatchAugmentation(10, 0.1, MIXING, Normalization((0.5, 0.5, 0.5), (0.2, 0.2, 0.2)), ERASING)
  images, _ = random_batch(16)
  labels = np.arange(16, dtype=np.int32) % 10
  results = []
  for devices in (1, 2):
    mesh = jax.make_mesh(
      (devices,), ('data',), axis_types=(jax.sharding.AxisType.Auto,), devices=jax.devices()[:devices]
    )
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec('data'))
    sharded = (jax.device_put(jnp.asarray(x), sharding) for x in (images, labels))
    results.append(jax.device_get(jax.jit(pipeline)(jax.random.key(5), *sharded, np.arange(16))))
  for one, two in zip(*results, strict=True):
    np.testing.assert_allclose(one, two, atol=1e-6)
  np.testing.assert_allclose(results[0][1].sum(axis=1), 1, atol=1e-5)


def test_what_an_image_gets_follows_from_its_position_and_group():
  pipeline = jax.jit(augment.BatchAugmentation(10, 0.1, MIXING, Normalization((0.5,) * 3, (0.2,) * 3), ERASING))
  images, _ = random_batch(16)
  labels, positions = np.arange(16, dtype=np.int32) % 10, np.arange(16)
  whole = jax.device_get(pipeline(jax.random.key(5), images, labels, positions))
  part = np.r_[12:16, 4:8]
  found = jax.device_get(pipeline(jax.random.key(5), images[part], labels[part], positions[part]))
  for everything, some in zip(whole, found, strict=True):
    np.testing.assert_allclose(everything[part], some, atol=1e-6)


@pytest.mark.parametrize(
  ('build', 'message'),
  [
    (lambda: dataclasses.replace(MIXING, mixup_alpha=-1.0), r'^augment\.mixup_alpha must not be negative, not -1\.0$'),
    (lambda: dataclasses.replace(MIXING, cutmix_probability=2.0), r'^augment\.cutmix_probability must lie between'),
    (lambda: dataclasses.replace(MIXING, group_size=0), r'^augment\.mixing_group_size must be positive, not 0$'),
    (
      lambda: dataclasses.replace(ERASING, area=(0.3, 0.1)),
      r'area must hold two numbers above 0 and up to 1, the smaller',
    ),
    (lambda: RandAugment(num_operations=-2), r'^augment\.randaugment_operations must not be negative'),
    (lambda: RandomHorizontalFlip(float('nan')), r'^augment\.horizontal_flip_probability must lie between 0 and 1'),
    (lambda: RandomResizedCrop(8, scale=(0.0, 1.0)), r'^augment\.crop_scale must hold two numbers above 0 and up to 1'),
    (lambda: RandomResizedCrop(8, ratio=(0.5, 1.0, 2.0)), r'^augment\.crop_ratio must hold two numbers above 0, the'),
    (lambda: RandomPaddedCrop(8, -1), r'^augment\.crop_padding must not be negative'),
  ],
)
def test_augmentations_refuse_numbers_out_of_range(build, message):
  with pytest.raises(UserError, match=message):
    build()
