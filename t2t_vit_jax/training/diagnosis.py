"""Explains steps that are not finite, devices that run out of memory, and runs that wait for their images."""

from collections.abc import Callable
import dataclasses
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from t2t_vit_jax.data.loader import Workers
from t2t_vit_jax.errors import UserError, first_line, plural
from t2t_vit_jax.models.blocks import unstack_blocks
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.recipe.build import Recipe
from t2t_vit_jax.recipe.run import Run
from t2t_vit_jax.recipe.sharding import gathered
from t2t_vit_jax.recipe.state import TrainState

MAX_NAMED = 3  # images of a batch, and batches of a run
MUCH_WAITING = 0.1  # of a run's time


@dataclasses.dataclass
class NonFiniteSteps:
  """Explains steps that were not applied, since the loss or a gradient was not finite; ends a run with too many.

  Args:
    run: the run.
    tolerance: steps in a row that may fail before the run ends.
    warn: shows a line to the user.
  """

  run: Run
  tolerance: int
  warn: Callable[[str], None]
  _in_a_row: int = 0
  _last: int = -1
  _explained: int = 0

  def note(self, steps: list[int], state: TrainState) -> None:
    """Takes the numbers of steps that were not applied since the last call.

    Raises:
      UserError: too many came in a row.
    """
    if not steps:
      return
    explanation = ''
    if self._explained < MAX_NAMED:
      self._explained += 1
      explanation = explain(self.run, state, steps[0])
      self.warn(f'{plural(len(steps), "step")} not applied, the first is {steps[0]}: {explanation}')
    for step in steps:
      self._in_a_row = self._in_a_row + 1 if step == self._last + 1 else 1
      self._last = step
      if self._in_a_row >= self.tolerance:
        reason = explanation or explain(self.run, state, step)
        raise UserError(
          f'{self._in_a_row} steps in a row up to {step} had a loss or gradients that are not finite ({reason}). '
          'None of them was applied and the checkpoints are good. Continue with a lower '
          f'--config.schedule.base_learning_rate{_advice(self.run.recipe.model.dtype)}'
        )


def _advice(dtype: Any) -> str:
  if dtype != jnp.float16:
    return ''
  return ", or with --config.model.dtype=bfloat16: float16 overflows, in the performer's exponentials first"


def explain(run: Run, state: TrainState, step: int) -> str:
  """Rebuilds the batch of a step and names the first layer whose output is not finite, and the images concerned.

  The weights are those in `state`, which may be some steps older or younger.
  """
  batch = run.batch_of(step)
  variables = jax.device_get(gathered(state.variables(), run.recipe.mesh))
  images, rngs = run.augmented(batch, step)
  nonfinite = first_nonfinite_layer(run.recipe.model, variables, images, rngs)
  if nonfinite is None:
    return 'its forward pass is finite now, so the cause was the weights at that step, or a gradient'
  layer, affected = nonfinite
  names = [run.train_source[int(index)].id for index in batch['index'][affected][:MAX_NAMED]]
  more = f' and {affected.sum() - MAX_NAMED} more' if affected.sum() > MAX_NAMED else ''
  return f'the output of {layer} is not finite for {", ".join(names)}{more}'


def first_nonfinite_layer(model: T2TViT, variables: Any, images: jax.Array, rngs: Any) -> tuple[str, np.ndarray] | None:
  """The first layer in order of computation with an output that is not finite; None if there is none.

  A model with `scan_blocks` runs block by block here.

  Returns:
    Its path, or 'the augmented image', and the images for which its output is not finite, (B,) bool.
  """
  model, variables = model.clone(scan_blocks=False), unstack_blocks(variables)
  names: list[str] = []

  def of_each_image(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all(axis=range(1, x.ndim))

  @jax.jit
  def finite() -> jax.Array:
    layers = [('the augmented image', of_each_image(images))]

    def record_outputs(call: Callable[..., Any], args: Any, kwargs: Any, context: Any) -> Any:
      outputs = call(*args, **kwargs)
      if context.method_name == '__call__':
        name = '/'.join(context.module.path) or 'the model'
        # A layer called without arguments returns its parameters, which belong to all images.
        check = of_each_image if args else lambda x: jnp.broadcast_to(jnp.isfinite(x).all(), len(images))
        layers.extend((name, check(x)) for x in jax.tree.leaves(outputs))
      return outputs

    with nn.intercept_methods(record_outputs):
      model.apply(variables, images, train=True, rngs=rngs)
    names[:] = [name for name, _ in layers]
    return jnp.stack([row for _, row in layers])

  for name, row in zip(names, np.asarray(finite()), strict=True):  # a row of B for each layer
    if not row.all():
      return name, ~row
  return None


@dataclasses.dataclass
class SlowInput:
  """Warns once if a run goes on waiting for its images: three reports in a row, and half a minute in all.

  Args:
    workers: of the run.
    processors: number that this process may use.
    warn: shows a line to the user.
  """

  workers: Workers
  processors: int
  warn: Callable[[str], None]
  _in_a_row: int = 0
  _seconds: float = 0.0

  def note(self, share: float, seconds: float) -> None:
    """Takes the share of the time since the last report, and the seconds, for which the run waited."""
    if self._in_a_row < 0:
      return
    self._in_a_row = self._in_a_row + 1 if share > MUCH_WAITING else 0
    self._seconds += seconds
    if self._in_a_row >= 3 and self._seconds > 30:
      self._in_a_row = -1
      number = self.workers.num_workers or self.workers.num_threads
      enough = math.ceil(number / (1 - min(share, 0.99)))
      advice = f'about {enough} would do: --config.data.num_workers={enough}'
      if enough > self.processors:
        advice += (
          f', but this process may use {plural(self.processors, "processor")} only; '
          '--config.data.fast_decode=True and smaller images on disk need fewer'
        )
      kind = 'data workers' if self.workers.num_workers else 'threads'
      self.warn(f'training waits for images {share:.0%} of its time, with {number} {kind}; {advice}')


def out_of_memory(error: Exception, recipe: Recipe) -> UserError | None:
  """The error to raise if `error` says that a device is out of memory; None if it is another, as of a full disk."""
  if not isinstance(error, jax.errors.JaxRuntimeError) or 'RESOURCE_EXHAUSTED' not in str(error):
    return None
  return UserError(
    f'out of memory with a batch of {recipe.order.batch_size} images of {recipe.model.image_size} px '
    f'({first_line(error, kind=False)[:120]}): raise --config.optimizer.accumulate_steps, which computes the same '
    'batch in parts, or lower --config.data.batch_size'
  )
