"""The published schedule and AdamW with the reference's weight-decay mask."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from t2t_vit_jax.errors import UserError

Array = jax.Array
UNDECAYED = ('cls_token',)


def learning_rate_schedule(config: Any, *, steps_per_epoch: int, batch_size: int) -> optax.Schedule:
  """Learning rate as a function of the step, in the published form.

  A linear warmup, then a cosine that is *not* shifted by the warmup (it starts at epoch 0, so the
  warmup ends below the peak), then a constant tail. The peak follows the batch linearly.

  Args:
    config: `config.schedule` of a run.
    steps_per_epoch: optimizer steps in one epoch.
    batch_size: images in one step, of all devices.

  Raises:
    UserError: `config.granularity` is neither 'epoch' nor 'step'.
  """
  if config.granularity not in ('epoch', 'step'):
    raise UserError(f"schedule.granularity must be 'epoch' or 'step', not {config.granularity!r}")
  peak = config.base_learning_rate * batch_size / config.base_batch_size
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
  """True for the parameters that decay: all but biases, LayerNorm's and the cls token."""

  def decays(path: tuple[Any, ...], leaf: Any) -> bool:
    return leaf.ndim > 1 and path[-1].key not in UNDECAYED

  return jax.tree_util.tree_map_with_path(decays, params)


def make_optimizer(config: Any, learning_rate: optax.Schedule) -> optax.GradientTransformation:
  """AdamW from `config.optimizer`: torch's update, weight decay multiplied by the learning rate."""
  return optax.adamw(
    learning_rate,
    b1=config.beta1,
    b2=config.beta2,
    eps=config.epsilon,
    weight_decay=config.weight_decay,
    mask=weight_decay_mask,
  )
