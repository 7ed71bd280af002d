"""Writes the generated part of docs/models.md: `python docs/model_table.py`.

Parameters and multiply-adds are counted on the models themselves, traced without computing anything;
accuracies and files are those of `t2t_vit_jax/models/published.py`, and of the paper.
"""

from collections.abc import Iterator
import functools
import math
from pathlib import Path
from typing import Any, NamedTuple

import jax
from jax.extend import core
import jax.numpy as jnp

import t2t_vit_jax
from t2t_vit_jax.models.published import PUBLISHED

PAGE = Path(__file__).parent / 'models.md'
START, END = '<!-- written by docs/model_table.py -->\n', '<!-- end of the written part -->\n'

# Top-1 of the paper's variants whose weights were never published.
PAPER_ONLY = {
  't2t_vit_14_resnext': 81.5,
  't2t_vit_14_wide': 77.9,
  't2t_vit_14_se': 81.6,
  't2t_vit_16_ghost': 79.5,
  't2t_vit_dense': 80.6,
}


class MultiplyAdds(NamedTuple):
  """Multiply-adds of one image."""

  layers: int  # of Dense and convolution layers
  attention: int  # of everything between activations: scores, weighted values, random features

  @property
  def total(self) -> int:
    """Every matrix product."""
    return self.layers + self.attention


def count_parameters(name: str) -> tuple[int, int]:
  """Entries of a named model's variables, all (with the frozen ones) and trained."""
  variables = _abstract_variables(t2t_vit_jax.create_model(name))
  sizes = {collection: sum(leaf.size for leaf in jax.tree.leaves(tree)) for collection, tree in variables.items()}
  return sum(sizes.values()), sizes['params']


def count_multiply_adds(name: str) -> MultiplyAdds:
  """Counts the products in the computation that a named model traces for one image of 224 px."""
  # As the definition has it; faster forms count differently.
  model = t2t_vit_jax.create_model(name, soft_split_form='patches', token_attention_form='full')
  variables = _abstract_variables(model)
  # Without the head the last block computes all tokens, as in the reference.
  encode = functools.partial(model.apply, features=True)
  layers, attention = variables['params']['head']['kernel'].size, 0
  for equation in _equations(jax.make_jaxpr(encode)(variables, _IMAGE).jaxpr):
    if equation.primitive.name == 'dot_general':
      (left, right), (batch, _) = equation.params['dimension_numbers']
      products = equation.outvars[0].aval.size * math.prod(equation.invars[0].aval.shape[axis] for axis in left)
      # A Dense layer contracts the first axes of its kernel; random features have no batch axis, but contract the last.
      if not batch and 0 in right:
        layers += products
      else:
        attention += products
    elif equation.primitive.name == 'conv_general_dilated' and equation.params['feature_group_count'] == 1:
      # Grouped convolutions are left out: they are soft splits, which copy pixels.
      kernel = equation.invars[1].aval.shape
      out_features = kernel[equation.params['dimension_numbers'].rhs_spec[0]]
      layers += equation.outvars[0].aval.size * math.prod(kernel) // out_features
  if model.tokens_type == 'performer':
    # Its output layer is multiplied with 32 rows an image; in the reference, and in published counts, with all tokens.
    layers += sum((side**2 - 32) * model.token_dim**2 for side in (56, 28))
  return MultiplyAdds(layers, attention)


_IMAGE = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)


def _abstract_variables(model: t2t_vit_jax.T2TViT) -> Any:
  return jax.eval_shape(model.init, jax.random.key(0), _IMAGE)


def _equations(jaxpr: Any) -> Iterator[Any]:
  """Yields the equations of a computation and of all that it calls."""
  for equation in jaxpr.eqns:
    yield equation
    for inner in core.jaxprs_in_params(equation.params):
      yield from _equations(inner)


def model_table() -> str:
  """One row for each named model."""
  rows = [
    '| model | parameters, all | trained | GMACs at 224 px (layers) | top-1, % | width / depth / heads |',
    '|---|---|---|---|---|---|',
  ]
  for name in t2t_vit_jax.list_models():
    everything, trained = count_parameters(name)
    products = count_multiply_adds(name)
    file = PUBLISHED.get(name)
    top1 = f'{file.top1} (reference)' if file else f'{PAPER_ONLY[name]} (paper)'
    rows.append(
      f'| `{name}` | {everything:,} | {trained:,} | {products.total / 1e9:.2f} ({products.layers / 1e9:.2f}) '
      f'| {top1} | {_shape(name)} |'
    )
  return '\n'.join(rows) + '\n'


def _shape(name: str) -> str:
  model = t2t_vit_jax.create_model(name)
  if model.block_type == 'dense':
    stages = '+'.join(map(str, model.dense_stages))
    return f'{model.embed_dim}, +{model.growth_rate} a block / {stages} / {model.num_heads}'
  return f'{model.embed_dim} / {model.depth} / {model.num_heads}'


def file_table() -> str:
  """One row for each published weight file."""
  rows = [
    '| name | model | trained on | px | top-1, % | measured top-1 / top-5, % | file |',
    '|---|---|---|---|---|---|---|',
  ]
  for name, row in PUBLISHED.items():
    measured = '{:.3f} / {:.3f}'.format(*row.measured) if row.measured else ''
    rows.append(
      f'| `{name}` | `{row.model}` | {row.data} | {row.image_size} | {row.top1} ({row.publisher}) | {measured} '
      f'| [`{row.file}`]({row.url}), {row.download_size} |'
    )
  return '\n'.join(rows) + '\n'


def render(page: str) -> str:
  """Returns the page with its generated part replaced.

  Raises:
    ValueError: the page lacks one of the two marks.
  """
  before, rest = page.split(START)
  _, after = rest.split(END)
  return f'{before}{START}\n{model_table()}\n{file_table()}\n{END}{after}'


if __name__ == '__main__':
  PAGE.write_text(render(PAGE.read_text()))
