"""Infers the model to which tensors belong, as far as their names and shapes show it."""

from collections import Counter
from collections.abc import Mapping
import itertools
import math
import re
from typing import Any

from t2t_vit_jax.conversion.names import tokens_type_of
from t2t_vit_jax.errors import UserError
from t2t_vit_jax.models.soft_split import SPLITS
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.models.variants import VARIANTS, get_variant

Shapes = Mapping[str, tuple[int, ...]]

_LEAF = r'\.(bias|weight)'


def infer_arguments(shapes: Shapes, image_size: Any = None) -> dict[str, Any]:
  """Arguments of `T2TViT` that reference names and shapes show; num_heads and qk_scale are not among them.

  Each has the value on which most of the tensors that show it agree. So a damaged tensor does not change the model that
  all are compared with, and the error names that tensor.

  Raises:
    UserError: the tensors are no T2T-ViT's or a part of one's, or images were not square and `image_size` is not given.
  """
  if not any(name.startswith('tokens_to_token.') for name in shapes):
    raise UserError(
      f'holds no T2T-ViT: no tokens_to_token among its {len(shapes)} tensors ({", ".join(sorted(shapes)[:2])} ...)'
    )
  embed_dim = _most_common(
    _sizes(shapes, rf'tokens_to_token\.project{_LEAF}|blocks\.0\.norm\d{_LEAF}', 0)
    + _sizes(shapes, 'cls_token|pos_embed', -1)
  )
  hidden = _most_common(
    _sizes(shapes, rf'blocks\.0\.mlp\.fc1{_LEAF}', 0) + _sizes(shapes, r'blocks\.0\.mlp\.fc2\.weight', 1)
  )
  token_dim = _most_common(
    _sizes(shapes, rf'tokens_to_token\.(attention\d\.(norm2|(attn\.)?proj|mlp\.\w+)|soft_split\d){_LEAF}', 0)
  )
  blocks = _infer_blocks(shapes)
  if not (embed_dim and token_dim and blocks['depth']):
    raise UserError(
      f'holds only a part of a T2T-ViT, {len(shapes)} tensors without '
      f'{"encoder blocks" if not blocks["depth"] else "the tokens-to-token module"}: a shard of a checkpoint must be '
      'joined with the others first: give the .index.json that lies beside them'
    )
  return {
    'num_classes': _most_common(_sizes(shapes, r'head\.bias', 0) + _sizes(shapes, r'head\.weight', 0)),
    **({'token_labeling': True} if _sizes(shapes, rf'aux_head{_LEAF}', 0) else {}),
    'image_size': image_size or _infer_image_size(shapes),
    'tokens_type': tokens_type_of(shapes),
    'embed_dim': embed_dim,
    'mlp_ratio': 3.0 if blocks['block_type'] == 'ghost' else _mlp_ratio(hidden, embed_dim),
    'token_dim': token_dim,
    **blocks,
  }


def infer_channels(shapes: Shapes) -> int:
  """Channels of the images that the model takes."""
  patch_sizes = _sizes(shapes, rf'tokens_to_token\.attention1\.norm1{_LEAF}', 0)
  patch_sizes += _sizes(shapes, r'tokens_to_token\.attention1\.(kqv|attn\.qkv)\.weight', 1)
  channels = [size // SPLITS[0].kernel ** 2 for size in patch_sizes]
  return _most_common(channels + _sizes(shapes, r'tokens_to_token\.soft_split0\.weight', 1))


def name_model(
  inferred: Mapping[str, Any], settings: Mapping[str, Any], model_name: str | None
) -> tuple[str | None, dict[str, Any]]:
  """Name (None if no named model fits) and all arguments of the model that has the `inferred` arguments.

  Args:
    inferred: result of `infer_arguments`.
    settings: the user's values of arguments that no tensor shows.
    model_name: the name that the user gives; None to find it.

  Raises:
    UserError: the tensors contradict the name, or fit more than one model, or fit none and num_heads is not given.
  """
  arguments = {'qk_scale': None, **inferred, **settings}
  free = ('num_classes', 'token_labeling', 'image_size')  # in which models of one name may differ
  known = {field: value for field, value in arguments.items() if field not in free}
  variants = VARIANTS if model_name is None else {model_name: get_variant(model_name)}
  models = {name: T2TViT(**variant.arguments) for name, variant in variants.items()}
  fitting = [name for name, model in models.items() if all(getattr(model, field) == known[field] for field in known)]
  if len(fitting) == 1:
    return fitting[0], {**arguments, 'num_heads': models[fitting[0]].num_heads}
  if model_name is not None:
    named = {field: getattr(models[model_name], field) for field in known}
    wrong = [f'{field}={known[field]} instead of {named[field]}' for field in known if known[field] != named[field]]
    raise UserError(f'is not {model_name}: it has {", ".join(wrong)}')
  if fitting:
    raise UserError(f'its tensors fit more than one model: add --model={" or --model=".join(fitting)}')
  if 'num_heads' not in arguments:
    raise UserError(
      'is none of the named models, and tensors do not show the number of attention heads: add '
      '--set=num_heads=N (and ,qk_scale=X if it is not head_width ** -0.5)'
    )
  return None, arguments


def _infer_blocks(shapes: Shapes) -> dict[str, Any]:
  """Arguments that the encoder's blocks show; a single stray tensor makes no block."""
  blocks: dict[int, list[str]] = {}
  for name in shapes:
    if match := re.fullmatch(r'blocks\.(\d{1,6})\.(.+)', name):
      blocks.setdefault(int(match[1]), []).append(match[2])
  blocks = {
    number: inside for number, inside in sorted(blocks.items()) if len(inside) > 1 or inside[0].startswith('linear.')
  }

  def most_blocks_have(pattern: str) -> bool:
    matches = [any(re.fullmatch(pattern, name) for name in inside) for inside in blocks.values()]
    return any(matches) and 2 * sum(matches) >= len(matches)

  arguments = {'depth': len(blocks), 'block_type': 'standard', 'qkv_bias': most_blocks_have(r'attn\.(qkv|q|k|v)\.bias')}
  if most_blocks_have(r'attn\.se_layer\..+'):
    arguments['block_type'] = 'se'
  elif most_blocks_have(r'(attn|mlp)\.cheap_operation.+'):
    arguments['block_type'] = 'ghost'
  elif most_blocks_have(rf'dense_linear{_LEAF}'):
    transitions = [any(name.startswith('linear.') for name in inside) for inside in blocks.values()]
    stages = tuple(len(list(group)) for between, group in itertools.groupby(transitions) if not between)
    growth_rate = _most_common(_sizes(shapes, rf'blocks\.\d+\.dense_linear{_LEAF}', 0))
    arguments.update(block_type='dense', dense_stages=stages, growth_rate=growth_rate, depth=sum(stages))
  return arguments


def _infer_image_size(shapes: Shapes) -> int:
  """Side in pixels of the (square) images that the position table is made for: a multiple of 16."""
  num_tokens = (_most_common(_sizes(shapes, 'pos_embed', 1)) or 1 + 14**2) - 1  # reported later if missing
  side = math.isqrt(num_tokens)
  if side**2 != num_tokens or not side:
    raise UserError(
      f'pos_embed is {shapes["pos_embed"]}: {num_tokens} tokens are no square grid; if the images were not square, add '
      '--set=image_size=HEIGHTxWIDTH'
    )
  return math.prod(split.stride for split in SPLITS) * side


def _mlp_ratio(hidden: int, width: int) -> float:
  """MLP ratio for which int(width * ratio) is `hidden`."""
  ratio = hidden / max(width, 1)
  return ratio if int(width * ratio) == hidden else math.nextafter(ratio, math.inf)


def _sizes(shapes: Shapes, pattern: str, axis: int) -> list[int]:
  """Sizes along `axis` of all tensors whose whole name matches `pattern`."""
  matching = [shape for name, shape in shapes.items() if re.fullmatch(pattern, name)]
  return [shape[axis] for shape in matching if -len(shape) <= axis < len(shape)]


def _most_common(sizes: list[int]) -> int:
  """The most common size, the first one if several are; 0 if there is no size."""
  return Counter(sizes).most_common(1)[0][0] if sizes else 0
