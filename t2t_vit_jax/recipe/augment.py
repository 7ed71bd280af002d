"""Augments a batch on the device: mixing, normalisation and random erasing, in the published order.

The reference mixes the uint8 crops and rounds the result to uint8 again, then normalises, then erases.
Random draws follow from the key and an image's position in the step's batch: devices and micro-batches don't matter.
"""

import dataclasses

import jax
import jax.numpy as jnp
import optax

from t2t_vit_jax.errors import check_interval, check_not_negative, check_positive, check_share
from t2t_vit_jax.models.preprocessing import Normalization

Array = jax.Array

ERASING_TRIES = 10


def soft_targets(labels: Array, num_classes: int, label_smoothing: float) -> Array:
  """Labels (B,) as distributions (B, K): 1 - s + s/K for the class, s/K for the others."""
  return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)


def keys_at(rng: Array, positions: Array) -> Array:
  """Keys (B,), one for each image, by its position in the step's batch, whatever device holds it."""
  return jax.vmap(jax.random.fold_in, in_axes=(None, 0))(rng, positions)


@dataclasses.dataclass(frozen=True)
class Mixing:
  """Mixes consecutive images by mixup or cutmix: image i of a group of n is mixed with image n - 1 - i.

  A group shares one draw, as the 64 images of a GPU do in the reference, whatever the number of devices. If both alphas
  are positive, cutmix is drawn with `cutmix_probability`, else mixup. If one is, it is always used; if none, neither.
  """

  mixup_alpha: float
  cutmix_alpha: float
  cutmix_probability: float
  group_size: int

  def __post_init__(self) -> None:
    check_not_negative('augment.mixup_alpha', self.mixup_alpha)
    check_not_negative('augment.cutmix_alpha', self.cutmix_alpha)
    check_share('augment.cutmix_probability', self.cutmix_probability)
    check_positive('augment.mixing_group_size', self.group_size)

  def __call__(self, rng: Array, images: Array, targets: Array, positions: Array) -> tuple[Array, Array]:
    """Mixes uint8 images (B, H, W, C), which become float32 whole numbers, and their targets (B, K)."""
    if not (self.mixup_alpha or self.cutmix_alpha):
      return images, targets
    batch, height, width, channels = images.shape
    num_groups = batch // self.group_size
    keys = keys_at(rng, positions[:: self.group_size])
    weights = jax.vmap(lambda key: self.draw_weights(key, height, width))(keys)  # (groups, H, W)

    x = images.reshape(num_groups, self.group_size, height, width, channels)
    partners = x[:, ::-1]  # still uint8: a transfer from another device is smaller
    weight = weights[:, None, :, :, None]
    x = jnp.round(x.astype(jnp.float32) * weight + partners.astype(jnp.float32) * (1 - weight))
    y = targets.reshape(num_groups, self.group_size, -1)
    share = weights.mean(axis=(1, 2)).reshape(num_groups, 1, 1)
    y = y * share + y[:, ::-1] * (1 - share)
    return x.reshape(images.shape), y.reshape(targets.shape)

  def draw_weights(self, rng: Array, height: int, width: int) -> Array:
    """Weight (H, W) of an image's own pixels: the same everywhere for mixup, 0 inside cutmix's box and 1 outside."""
    choice_rng, mixup_rng, cutmix_rng, box_rng = jax.random.split(rng, 4)
    if self.mixup_alpha and self.cutmix_alpha:
      use_cutmix = jax.random.bernoulli(choice_rng, self.cutmix_probability)
    else:
      use_cutmix = jnp.asarray(bool(self.cutmix_alpha))
    # One vmapped call for both: the sampler of the beta distribution takes long to compile.
    alphas = jnp.array([self.mixup_alpha or 1.0, self.cutmix_alpha or 1.0])
    own_share, cutmix_share = jax.vmap(jax.random.beta)(jnp.stack([mixup_rng, cutmix_rng]), alphas, alphas)
    inside = _cutmix_box(box_rng, jnp.sqrt(1 - cutmix_share), height, width)
    return jnp.where(use_cutmix, 1.0 - inside, own_share)


def _cutmix_box(rng: Array, side_ratio: Array, height: int, width: int) -> Array:
  """Mask (H, W) float32: 1 in a box of `side_ratio` of each side around a random centre, cut off at the borders."""

  def inside(size: int, key: Array) -> Array:
    half = jnp.floor(size * side_ratio).astype(jnp.int32) // 2
    centre = jax.random.randint(key, (), 0, size)
    position = jnp.arange(size)
    return (position >= centre - half) & (position < centre + half)

  rows, columns = (inside(size, key) for size, key in zip((height, width), jax.random.split(rng), strict=True))
  return (rows[:, None] & columns[None, :]).astype(jnp.float32)


@dataclasses.dataclass(frozen=True)
class RandomErasing:
  """Replaces a box by noise from N(0, 1), drawn for each pixel and channel, in a share of the images."""

  probability: float
  area: tuple[float, float]  # share of the image, drawn uniformly
  aspect_ratio: tuple[float, float]  # height / width, drawn log-uniformly

  def __post_init__(self) -> None:
    check_share('augment.random_erasing_probability', self.probability)
    if self.probability:
      check_interval('augment.random_erasing_area', self.area, most=1)
      check_interval('augment.random_erasing_aspect_ratio', self.aspect_ratio)

  def __call__(self, rng: Array, images: Array, positions: Array) -> Array:
    """Erases in normalised images (B, H, W, C)."""
    if not self.probability:
      return images
    return jax.vmap(self.erase)(keys_at(rng, positions), images)

  def erase(self, rng: Array, image: Array) -> Array:
    """Erases in one image (H, W, C)."""
    box_rng, noise_rng = jax.random.split(rng)
    erased = self.draw_mask(box_rng, image.shape[0], image.shape[1])
    return jnp.where(erased[..., None], jax.random.normal(noise_rng, image.shape, image.dtype), image)

  def draw_mask(self, rng: Array, height: int, width: int) -> Array:
    """Mask (H, W): True inside the first of ten boxes that is smaller than the image; all False to erase nothing."""
    apply_rng, area_rng, ratio_rng, top_rng, left_rng = jax.random.split(rng, 5)
    tries = (ERASING_TRIES,)
    area = height * width * jax.random.uniform(area_rng, tries, minval=self.area[0], maxval=self.area[1])
    low, high = (jnp.log(ratio) for ratio in self.aspect_ratio)
    ratio = jnp.exp(jax.random.uniform(ratio_rng, tries, minval=low, maxval=high))
    box_heights, box_widths = jnp.round(jnp.sqrt(area * ratio)), jnp.round(jnp.sqrt(area / ratio))
    fits = (box_heights < height) & (box_widths < width)
    first = jnp.argmax(fits)
    box_height, box_width = box_heights[first], box_widths[first]
    top = jnp.floor(jax.random.uniform(top_rng) * (height - box_height + 1))
    left = jnp.floor(jax.random.uniform(left_rng) * (width - box_width + 1))
    rows, columns = jnp.arange(height), jnp.arange(width)
    inside_rows = (rows >= top) & (rows < top + box_height)
    inside_columns = (columns >= left) & (columns < left + box_width)
    apply = jax.random.bernoulli(apply_rng, self.probability) & fits.any()
    return inside_rows[:, None] & inside_columns[None, :] & apply


@dataclasses.dataclass(frozen=True)
class BatchAugmentation:
  """The device's part of augmentation: from uint8 images and labels to the model's images and the loss's targets."""

  num_classes: int
  label_smoothing: float
  mixing: Mixing
  normalization: Normalization
  erasing: RandomErasing

  def __post_init__(self) -> None:
    check_share('augment.label_smoothing', self.label_smoothing)

  def __call__(self, rng: Array, images: Array, labels: Array, positions: Array) -> tuple[Array, Array]:
    """Augments images (B, H, W, C) uint8 with labels (B,): images (B, H, W, C) float32 and targets (B, K).

    `positions` (B,) are the images' positions in the batch of the whole step. Mixing groups must be complete.
    """
    mixing_rng, erasing_rng = jax.random.split(rng)
    targets = soft_targets(labels, self.num_classes, self.label_smoothing)
    images, targets = self.mixing(mixing_rng, images, targets, positions)
    return self.erasing(erasing_rng, self.normalization(images), positions), targets
