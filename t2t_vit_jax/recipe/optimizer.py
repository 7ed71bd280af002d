"""The published schedule, and AdamW and SGD as torch computes them."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from t2t_vit_jax.errors import UserError, choose
from t2t_vit_jax.models.blocks import STACK

Array = jax.Array
UNDECAYED = ('cls_token',)


def learning_rate_schedule(
  config: Any, *, steps_per_epoch: int, batch_size: int, peak_factor: float = 1.0
) -> optax.Schedule:
  """Learning rate as a function of the step, in the published form.

  A linear warmup, then a cosine that is *not* shifted by the warmup (it starts at epoch 0, so the
  warmup ends below the peak), then a constant tail. The peak follows the batch linearly.

  Args:
    config: `config.schedule` of a run.
    steps_per_epoch: optimizer steps in one epoch.
    batch_size: images in one step, of all devices.
    peak_factor: multiplies the peak alone; the warmup's start and the final rate are the same for all parameters, as
      in the reference's transfer to CIFAR. With 0 the rate is always 0, for parameters that are not trained.

  Raises:
    UserError: `config.granularity` is neither 'epoch' nor 'step'.
  """
  if config.granularity not in ('epoch', 'step'):
    raise UserError(f"schedule.granularity must be 'epoch' or 'step', not {config.granularity!r}")
  if not peak_factor:
    return optax.constant_schedule(0.0)
  peak = peak_factor * config.base_learning_rate * batch_size / config.base_batch_size
  start, final = config.warmup_learning_rate, config.final_learning_rate
  warmup_epochs, cosine_epochs = config.warmup_epochs, config.epochs

  def schedule(step: Array | int) -> Array:
    epoch = step // steps_per_epoch if config.granularity == 'epoch' else step / steps_per_epoch
    warmup = start + (peak - start) * epoch / max(warmup_epochs, 1)
    cosine = final + (peak - final) * (1 + jnp.cos(jnp.pi * epoch / cosine_epochs)) / 2
    return jnp.where(epoch < warmup_epochs, warmup, jnp.where(epoch < cosine_epochs, cosine, final))

  return schedule


def total_steps(config: Any, steps_per_epoch: int) -> int:
  """Length of the run in steps, from `config.schedule`: its epochs and cool-down, cut at `max_steps` if that is set."""
  steps = (config.epochs + config.cooldown_epochs) * steps_per_epoch
  return min(steps, config.max_steps) if config.max_steps > 0 else steps


def weight_decay_mask(params: Any) -> Any:
  """True for the parameters that decay: all but biases, LayerNorm parameters and the cls token."""

  def decays(path: tuple[Any, ...], leaf: Any) -> bool:
    return leaf.ndim - (path[0].key == STACK) > 1 and path[-1].key not in UNDECAYED

  return jax.tree_util.tree_map_with_path(decays, params)


def adamw(config: Any) -> optax.GradientTransformation:
  """AdamW: weight decay is multiplied by the learning rate, and applied where `weight_decay_mask` is True."""
  return optax.chain(
    optax.scale_by_adam(config.beta1, config.beta2, config.epsilon),
    optax.add_decayed_weights(config.weight_decay, weight_decay_mask),
  )


def sgd(config: Any) -> optax.GradientTransformation:
  """SGD with momentum: weight decay is added to the gradient, before momentum, for every parameter."""
  return optax.chain(optax.add_decayed_weights(config.weight_decay), optax.trace(config.momentum))


# By `config.optimizer.name`: from `config.optimizer` to the transformation that gives an update its direction. The
# learning rate comes after it. docs/extending.md adds an optimizer.
OPTIMIZERS = {'adamw': adamw, 'sgd': sgd}


def make_optimizer(
  config: Any, learning_rate: optax.Schedule, backbone_learning_rate: optax.Schedule
) -> optax.GradientTransformation:
  """The optimizer of `config.optimizer`, with torch's updates. Gradients are clipped first.

  Args:
    config: `config.optimizer` of a run.
    learning_rate: of the head.
    backbone_learning_rate: of all other parameters. The reference's transfer to CIFAR leaves the cls token and the last
      LayerNorm out of its optimizer, apparently by oversight; here they belong to the backbone.

  Raises:
    UserError: unknown `config.name`.
  """
  direction = choose(OPTIMIZERS, 'optimizer.name', config.name)(config)
  rates = {
    'head': optax.scale_by_learning_rate(learning_rate),
    'backbone': optax.scale_by_learning_rate(backbone_learning_rate),
  }
  clip = optax.clip_by_global_norm(config.gradient_clip_norm) if config.gradient_clip_norm else optax.identity()
  return optax.chain(clip, direction, optax.partition(rates, _groups))


def _groups(params: Any) -> dict[str, str]:
  return {name: 'head' if name == 'head' else 'backbone' for name in params}
