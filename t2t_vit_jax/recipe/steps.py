"""The training step and the evaluation step: pure functions, to be jitted."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from t2t_vit_jax.models.preprocessing import Normalization
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.recipe.augment import BatchAugmentation
from t2t_vit_jax.recipe.state import TrainState, Tree

Array = jax.Array
Batch = dict[str, Array]


def make_train_step(
  model: T2TViT,
  optimizer: optax.GradientTransformation,
  learning_rate: optax.Schedule,
  *,
  augmentation: BatchAugmentation,
  ema_decay: float,
  accumulate_steps: int = 1,
  head_only: bool = False,
) -> Callable[[TrainState, Batch, Array], tuple[TrainState, dict[str, Array]]]:
  """Returns `step(state, batch, rng) -> (state, metrics)`: one update by the optimizer and the moving average.

  Where the loss or a gradient is not finite, `applied` is False in the metrics and only the step's number changes.
  `rng` is the run's: each step derives its keys from it by number, so a resumed run draws the same. The batch goes
  through the model in `accumulate_steps` parts, one after the other; with `head_only` only the head gets a gradient. In
  profiles loss, augmentation, optimizer and moving_average are scopes beside the model's modules.
  """

  def train_step(state: TrainState, batch: Batch, rng: Array) -> tuple[TrainState, dict[str, Array]]:
    augmentation_rng, dropout_rng = step_keys(rng, state.step)

    def loss_of(params: Tree, images: Array, targets: Array, dropout_rng: Array) -> Array:
      if head_only:
        params = {**jax.lax.stop_gradient(params), 'head': params['head']}
      logits: Any = model.apply(state.variables(params), images, train=True, rngs={'dropout': dropout_rng})
      with jax.named_scope('loss'):
        return optax.softmax_cross_entropy(logits, targets).mean()

    def add_micro_batch(sums: Tree, numbered: tuple[Array, Batch]) -> tuple[Tree, None]:
      number, part = numbered
      with jax.named_scope('augmentation'):
        images, targets = augmentation(augmentation_rng, part['image'], part['label'], part['position'])
      part_rng = jax.random.fold_in(dropout_rng, number)
      loss_and_gradients = jax.value_and_grad(loss_of)(state.params, images, targets, part_rng)
      return jax.tree.map(jnp.add, sums, loss_and_gradients), None

    batch = {'image': batch['image'], 'label': batch['label'], 'position': jnp.arange(len(batch['label']))}
    zeros = jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.params)
    if accumulate_steps == 1:  # a loop of one round would stay a loop, in which XLA:CPU takes 2.5 times as long
      sums, _ = add_micro_batch(zeros, (jnp.int32(0), batch))
    else:
      parts = micro_batches(batch, accumulate_steps, augmentation.mixing.group_size)
      sums, _ = jax.lax.scan(add_micro_batch, zeros, (jnp.arange(accumulate_steps), parts))
    loss, gradients = jax.tree.map(lambda x: x / accumulate_steps, sums)

    with jax.named_scope('optimizer'):
      updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
      params = optax.apply_updates(state.params, updates)
    with jax.named_scope('moving_average'):
      ema = optax.incremental_update(params, state.ema, 1 - ema_decay) if ema_decay else state.ema
    updated = state.replace(params=params, ema=ema, opt_state=opt_state)
    gradient_norm = optax.tree.norm(gradients)
    applied = jnp.isfinite(loss) & jnp.isfinite(gradient_norm)
    state = jax.tree.map(lambda new, old: jnp.where(applied, new, old), updated, state).replace(step=state.step + 1)
    learning_rate_now = learning_rate(state.step - 1)
    metrics = {'loss': loss, 'learning_rate': learning_rate_now, 'gradient_norm': gradient_norm, 'applied': applied}
    return state, metrics

  return train_step


def step_keys(rng: Array, step: Array | int) -> tuple[Array, Array]:
  """The keys of augmentation and dropout when `step` steps are done; `rng` is the run's."""
  augmentation_rng, dropout_rng = jax.random.split(jax.random.fold_in(rng, step))
  return augmentation_rng, dropout_rng


def micro_batches(batch: Batch, count: int, group_size: int) -> Batch:
  """Divides a batch, (B, ...) -> (count, B / count, ...): groups of neighbours are dealt in turn, like cards.

  A device holds neighbouring images, so each part takes equally many from every device, and no image has to move.
  """

  def deal(x: Array) -> Array:
    x = x.reshape(-1, count, group_size, *x.shape[1:])
    return jnp.moveaxis(x, 1, 0).reshape(count, -1, *x.shape[3:])

  return jax.tree.map(deal, batch)


def make_eval_step(
  model: T2TViT, *, normalization: Normalization, classes: Sequence[int] | None = None
) -> Callable[[dict[str, Tree], Batch], dict[str, Array]]:
  """Returns `step(variables, batch) -> outcome`, what the model says of each image of a batch.

  Args:
    model: with a head.
    normalization: of the images, which are uint8.
    classes: labels of the classes that the model chooses among; None for all of them.

  Returns:
    A function whose batch has an image and a label each, or several labels, (B, K), of which any is right; negative
    ones stand for none. Its outcome is `best` (B, 5), labels of the likeliest classes, the likeliest first;
    `confidence` (B,), the probability of the first; and `loss` (B,), the cross entropy: -log of the probability of the
    image's labels, or of a uniform guess if it has none.
  """
  chosen = np.ones(model.num_classes, bool) if classes is None else np.isin(np.arange(model.num_classes), classes)

  def eval_step(variables: dict[str, Tree], batch: Batch) -> dict[str, Array]:
    logits: Any = model.apply(variables, normalization(batch['image']))
    if classes is not None:
      logits = jnp.where(chosen[None], logits, -jnp.inf)
    log_probabilities = jax.nn.log_softmax(logits)
    # Not the first of top_k's values: XLA:CPU would sort all classes, which takes half as long as a small model.
    _, best = jax.lax.top_k(logits, min(5, model.num_classes))
    labels = batch['label'].reshape(len(logits), -1)  # (B, K)
    of_labels = jnp.take_along_axis(log_probabilities, jnp.maximum(labels, 0), axis=1)
    losses = -jax.nn.logsumexp(jnp.where(labels < 0, -jnp.inf, of_labels), axis=1)
    uniform = jnp.log(float(chosen.sum()))
    return {
      'best': best,
      'confidence': jnp.exp(log_probabilities.max(axis=1)),
      'loss': jnp.where((labels < 0).all(axis=1), uniform, losses),
    }

  return eval_step
