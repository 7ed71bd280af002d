"""Values inside a model, by name: the outputs of its layers, and the attention weights.

A layer's name is its path in the parameters, such as 'blocks_3', 'blocks_3/mlp/fc1' or 'tokens_to_token/attention1'.
Attention weights are called after the layer that forms them: 'blocks_3/attn/attention', (B, num_heads, T, T) with
T = 1 + H * W tokens, the class token first, and 'tokens_to_token/attention1/attention', (B, T, T) for the T tokens of
that stage row by row. Each row of weights is a query's and sums to 1; a performer's sums to less where its kernel is so
small that the 1e-8 in the denominator counts.
"""

from collections.abc import Sequence
import functools
from typing import Any, cast

from flax.traverse_util import flatten_dict
import jax

from t2t_vit_jax.errors import UserError, did_you_mean
from t2t_vit_jax.models.t2t_vit import Features, T2TViT

Array = jax.Array


def layer_outputs(
  model: T2TViT, variables: Any, images: Array, layers: Sequence[str]
) -> tuple[Features, dict[str, Array]]:
  """Features of a batch, and the outputs of the named layers on the way to them, in one pass.

  Nothing else is computed or kept. A model with `scan_blocks` runs block by block here.

  >>> features, outputs = layer_outputs(model, variables, images, ['blocks_3', 'blocks_3/attn/attention'])

  Args:
    model: any `T2TViT`.
    variables: the model's.
    images: (B, height, width, C), normalised; any size.
    layers: names, as `layer_shapes` lists them.

  Returns:
    `Features`, and outputs by name: (B, 1 + H * W, D) for encoder blocks, the class token first, and (B, H', W', D) for
    stages of the tokens-to-token module.

  Raises:
    UserError: the model has no such layer; the message names the nearest.
  """
  return _layer_outputs(model, tuple(layers), variables, images)


def layer_shapes(model: T2TViT, variables: Any, images: Any) -> dict[str, tuple[int, ...]]:
  """Name and output shape of every layer that `layer_outputs` knows; computes nothing.

  Parameters without an output of their own, such as 'qkv', are used by their parent and not listed.

  Args:
    model: any `T2TViT`.
    variables: the model's, or their shapes.
    images: (B, height, width, C), or a `jax.ShapeDtypeStruct` of them.
  """
  _, outputs = jax.eval_shape(functools.partial(_all_outputs, model), variables, images)
  return {name: output.shape for name, output in outputs.items()}


def attention_blocks(model: T2TViT, variables: Any, images: Any) -> list[str]:
  """Names of the encoder's blocks that attend, in order; a dense encoder also has transitions, which do not."""
  suffix = '/attn/attention'
  names = [name.removesuffix(suffix) for name in layer_shapes(model, variables, images) if name.endswith(suffix)]
  return sorted(names, key=block_number)


def block_number(block: str) -> int:
  """Number of a block: 3 for 'blocks_3'."""
  return int(block.rpartition('_')[2])


@functools.partial(jax.jit, static_argnums=(0, 1))
def _layer_outputs(
  model: T2TViT, layers: tuple[str, ...], variables: Any, images: Array
) -> tuple[Features, dict[str, Array]]:
  features, outputs = _all_outputs(model, variables, images)
  for layer in layers:
    if layer not in outputs:
      raise UserError(f'the model has no layer {layer!r} with an output of its own: {did_you_mean(layer, outputs)}')
  return features, {layer: outputs[layer] for layer in layers}  # jit drops the computation of the others


def _all_outputs(model: T2TViT, variables: Any, images: Array) -> tuple[Features, dict[str, Array]]:
  """Features, and every output by name: to be traced only, since attention weights alone may take gigabytes."""
  features, state = model.apply(variables, images, features=True, capture_intermediates=True, mutable=['intermediates'])
  outputs = {
    name.removesuffix('/__call__'): output
    for name, (output, *_) in flatten_dict(dict(state['intermediates']), sep='/').items()
    # Leaves out parameters that the parent uses, features, and dropout layers, whose names have capitals.
    if isinstance(output, jax.Array) and name == name.lower()
  }
  return cast(Features, features), outputs
