"""Feature maps at several strides, for heads that detect or segment."""

import itertools
import operator
from typing import Any, NamedTuple, cast

from flax import linen as nn
import jax

from t2t_vit_jax.models.soft_split import SPLITS
from t2t_vit_jax.models.t2t_vit import Features, T2TViT
from t2t_vit_jax.models.tokens_to_token import TokenLayer

Array = jax.Array

STRIDES = tuple(itertools.accumulate((split.stride for split in SPLITS), operator.mul))  # px, (4, 8, 16)


class FeaturePyramid(NamedTuple):
  """Feature maps of a batch, one after each soft split; `token_grid` counts the rows and columns of the last."""

  stride4: Array  #: (B, height / 4, width / 4, token_dim), the first stage of the tokens-to-token module
  stride8: Array  #: (B, height / 8, width / 8, token_dim), its second stage
  stride16: Array  #: (B, height / 16, width / 16, D), the encoder's tokens after its last LayerNorm

  @property
  def strides(self) -> tuple[int, ...]:
    """Distance in px between neighbours of each map."""
    return STRIDES

  @property
  def channels(self) -> tuple[int, ...]:
    """Channels of each map."""
    return tuple(level.shape[-1] for level in self)


def feature_pyramid(
  model: T2TViT, variables: Any, images: Array, *, train: bool = False, rngs: Any = None
) -> FeaturePyramid:
  """Feature maps at strides 4, 8 and 16, in one pass that computes what `features=True` does and no more.

  May be jitted, with `model` static, and differentiated with respect to variables and images.

  >>> pyramid = feature_pyramid(model, variables, images)
  >>> pyramid.stride4.shape, pyramid.channels  # of t2t_vit_14 at 224 px: (B, 56, 56, 64), (64, 64, 384)

  Args:
    model: any `T2TViT`.
    variables: the model's.
    images: (B, height, width, C), normalised; any size.
    train: whether dropout and stochastic depth are on.
    rngs: {'dropout': key} where `train` is set.

  Raises:
    UserError: `images` is no batch of images, or they are too small for the splits.
  """
  stages = []

  def keep_stages(layer: Any, arguments: Any, options: Any, context: nn.module.InterceptorContext) -> Any:
    output = layer(*arguments, **options)
    if isinstance(context.module, TokenLayer) and context.method_name == '__call__':
      stages.append(output)
    return output

  with nn.intercept_methods(keep_stages):
    features = model.apply(variables, images, features=True, train=train, rngs=rngs)
  first, second, _ = stages  # the last makes the encoder's tokens
  return FeaturePyramid(first, second, cast(Features, features).tokens)
