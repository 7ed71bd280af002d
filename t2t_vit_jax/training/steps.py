"""The training step and the evaluation step: pure functions, to be jitted."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.training.augment import BatchAugmentation, Normalization
from t2t_vit_jax.training.state import TrainState, Tree

Array = jax.Array
Batch = dict[str, Array]


def make_train_step(
  model: T2TViT,
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  *,
  augmentation: BatchAugmentation,
  ema_decay: float,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]:
  """Returns `step(state, batch, rng) -> (state, metrics)`: one update by AdamW and the moving average.

  `rng` is the run's: each step derives its own from its number, so a resumed run draws the same.
  """

  def train_step(state: TrainState, batch: Batch, rng: Array) -> tuple[TrainState, dict[str, Array]]:
    augmentation_rng, dropout_rng = jax.random.split(jax.random.fold_in(rng, state.step))
    images, targets = augmentation(augmentation_rng, batch['image'], batch['label'])

    def loss_of(params: Tree) -> Array:
      logits: Any = model.apply(state.variables(params), images, train=True, rngs={'dropout': dropout_rng})
      return optax.softmax_cross_entropy(logits, targets).mean()

    loss, gradients = jax.value_and_grad(loss_of)(state.params)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    metrics = {
      'loss': loss,
      'learning_rate': learning_rate(state.step),
      'gradient_norm': optax.tree.norm(gradients),
    }
    state = state.replace(
      step=state.step + 1,
      params=params,
      ema=optax.incremental_update(params, state.ema, 1 - ema_decay) if ema_decay else state.ema,
      opt_state=opt_state,
    )
    return state, metrics

  return train_step


def make_eval_step(
  model: T2TViT, *, normalization: Normalization
) -> Callable[[dict[str, Tree], Batch], dict[str, Array]]:
  """Returns `step(variables, batch) -> sums` over the images whose mask is 1: loss, top-1, top-5 and count.

  A negative label stands for an image that could not be read: no guess is right, and it has the loss of an even guess.
  """

  def eval_step(variables: dict[str, Tree], batch: Batch) -> dict[str, Array]:
    logits: Any = model.apply(variables, normalization(batch['image']))
    unreadable = batch['label'] < 0
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch['label'])
    losses = jnp.where(unreadable, jnp.log(model.num_classes), losses)
    _, best = jax.lax.top_k(logits, min(5, model.num_classes))
    hits = best == batch['label'][:, None]  # (B, 5), best guess first
    mask = batch['mask']
    return {
      'loss': jnp.sum(mask * losses),
      'top1': jnp.sum(mask * hits[:, 0]),
      'top5': jnp.sum(mask * hits.any(axis=1)),
      'count': jnp.sum(mask),
      'unreadable': jnp.sum(mask * unreadable),
    }

  return eval_step
