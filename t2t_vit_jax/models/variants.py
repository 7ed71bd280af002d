"""The named models: one table, and the two functions that read it."""

import dataclasses
from typing import Any

from t2t_vit_jax.errors import UserError, did_you_mean
from t2t_vit_jax.models.published import PUBLISHED
from t2t_vit_jax.models.t2t_vit import T2TViT


@dataclasses.dataclass(frozen=True)
class DataDefaults:
  """Preparation of images for a model that was trained by the published recipe."""

  image_size: int = 224  # px, height and width
  crop_fraction: float = 0.9  # evaluation: share of the resized short side that the centre crop keeps
  interpolation: str = 'bicubic'
  mean: tuple[float, float, float] = (0.485, 0.456, 0.406)  # of RGB in [0, 1]
  std: tuple[float, float, float] = (0.229, 0.224, 0.225)
  num_classes: int = 1000


@dataclasses.dataclass(frozen=True)
class Variant:
  """A named model: the arguments in which it differs from `T2TViT`'s defaults."""

  arguments: dict[str, Any]
  data: DataDefaults = DataDefaults()
  public: bool = True  # listed by `list_models`


def _variant(tokens_type: str, embed_dim: int, depth: int, num_heads: int, mlp_ratio: float, **more: Any) -> Variant:
  widths = dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads, mlp_ratio=mlp_ratio)
  return Variant(dict(tokens_type=tokens_type, **widths, **more))


# Paper tables 1, 3 and 5; the reference's constructors.
VARIANTS: dict[str, Variant] = {
  't2t_vit_7': _variant('performer', 256, 7, 4, 2.0),
  't2t_vit_10': _variant('performer', 256, 10, 4, 2.0),
  't2t_vit_12': _variant('performer', 256, 12, 4, 2.0),
  't2t_vit_14': _variant('performer', 384, 14, 6, 3.0),
  't2t_vit_19': _variant('performer', 448, 19, 7, 3.0),
  't2t_vit_24': _variant('performer', 512, 24, 8, 3.0),
  't2t_vit_t_14': _variant('transformer', 384, 14, 6, 3.0),
  't2t_vit_t_19': _variant('transformer', 448, 19, 7, 3.0),
  't2t_vit_t_24': _variant('transformer', 512, 24, 8, 3.0),
  't2t_vit_14_resnext': _variant('performer', 384, 14, 32, 3.0),
  't2t_vit_14_wide': _variant('performer', 768, 4, 12, 3.0),
  't2t_vit_14_se': _variant('performer', 384, 14, 6, 3.0, block_type='se'),
  # The paper counts 14 layers for the ghost model; the reference's code, and the published size, have 16.
  't2t_vit_16_ghost': _variant('performer', 384, 16, 6, 3.0, block_type='ghost'),
  't2t_vit_dense': _variant(
    'performer', 128, 19, 8, 2.0, block_type='dense', dense_stages=(3, 6, 6, 4), growth_rate=64
  ),
  # Not from the paper: small enough to train on a laptop's CPU and for tests.
  't2t_vit_tiny': Variant(
    dict(tokens_type='performer', embed_dim=96, depth=4, num_heads=4, mlp_ratio=2.0, token_dim=32),
    DataDefaults(image_size=32),
    public=False,
  ),
}


def list_models(*, pretrained: bool = False) -> list[str]:
  """Names of the paper's models, for `create_model`; with `pretrained` of the published weights, for `load_pretrained`.

  A name of a model is that of its weights too, if there are any.
  """
  return list(PUBLISHED) if pretrained else [name for name, variant in VARIANTS.items() if variant.public]


def get_variant(name: str) -> Variant:
  """The row of `name` in `VARIANTS`.

  Raises:
    UserError: there is no such model; the message names the nearest.
  """
  if name not in VARIANTS and name in PUBLISHED:
    raise UserError(f'{name} are weights of the model {PUBLISHED[name].model}: load_pretrained({name!r}) returns both')
  if name not in VARIANTS:
    raise UserError(f'unknown model {name!r}: {did_you_mean(name, VARIANTS)}')
  return VARIANTS[name]


def create_model(name: str, *, pretrained: bool = False, **overrides: Any) -> T2TViT:
  """Builds a named model; keyword arguments replace the variant's, under `T2TViT`'s field names.

  >>> model = create_model('t2t_vit_14', num_classes=10, stochastic_depth_rate=0.1)

  Args:
    name: one of `list_models`.
    pretrained: must be False, since a linen model holds no weights; `load_pretrained` returns both.
    **overrides: fields of `T2TViT`.

  Raises:
    UserError: unknown model or argument, arguments that don't fit together, or `pretrained` is set.
  """
  if pretrained:
    raise UserError(
      f'create_model builds a model without weights; for both: model, variables = t2t_vit_jax.load_pretrained({name!r})'
    )
  variant = get_variant(name)
  fields = {field.name for field in dataclasses.fields(T2TViT)} - {'parent', 'name'}
  for argument in overrides:
    if argument not in fields:
      raise UserError(f'{name} has no argument {argument!r}: {did_you_mean(argument, fields)}')
  defaults = dict(image_size=variant.data.image_size, num_classes=variant.data.num_classes)
  return T2TViT(**{**defaults, **variant.arguments, **overrides})
