"""What happens to a batch of uint8 images and labels on the device."""

import dataclasses

import jax
import jax.numpy as jnp
import optax

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Normalization:
  """Scales uint8 images (B, H, W, 3) to [0, 1], subtracts `mean` and divides by `std` per channel: float32."""

  mean: tuple[float, float, float]
  std: tuple[float, float, float]

  def __call__(self, images: Array) -> Array:
    mean, std = (jnp.asarray(values, jnp.float32).reshape(1, 1, 1, 3) for values in (self.mean, self.std))
    return (images.astype(jnp.float32) / 255 - mean) / std


def soft_targets(labels: Array, num_classes: int, label_smoothing: float) -> Array:
  """Labels (B,) as distributions (B, K): 1 - s + s/K for the class, s/K for the others."""
  return optax.smooth_labels(jax.nn.one_hot(labels, num_classes), label_smoothing)
