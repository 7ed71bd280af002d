"""Table of the PyTorch reference's tensors and the variables here that hold them, read in both directions."""

from collections.abc import Iterable
import re
from typing import NamedTuple

import numpy as np


class Transform(NamedTuple):
  """Change of a tensor's axes: `axes` lists torch's axes in our order, None leaves them alone."""

  name: str
  axes: tuple[int, ...] | None = None

  def to_here(self, array: np.ndarray) -> np.ndarray:
    return array if self.axes is None else array.transpose(self.axes)

  def to_torch(self, array: np.ndarray) -> np.ndarray:
    return array if self.axes is None else array.transpose(np.argsort(self.axes))

  def torch_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape in torch of a tensor that has `shape` here."""
    return shape if self.axes is None else tuple(shape[axis] for axis in np.argsort(self.axes))


VERBATIM = Transform('verbatim')
_BIAS = ('bias', 'bias', VERBATIM)
_LAYERS: dict[str, tuple[tuple[str, str, Transform], ...]] = {  # torch's name of a tensor, ours, transform
  'linear': (('weight', 'kernel', Transform('(out, in) -> (in, out)', (1, 0))), _BIAS),
  'convolution': (('weight', 'kernel', Transform('OIHW -> HWIO', (2, 3, 1, 0))), _BIAS),
  'depthwise': (('weight', 'kernel', Transform('(C, 1, 1) -> (1, 1, C)', (2, 1, 0))),),
  'norm': (('weight', 'scale', VERBATIM), _BIAS),
}


class Row(NamedTuple):
  """Row of the table; each `#` stands for a number, the same on both sides."""

  torch: str
  here: str
  transform: Transform


def _rows(*layers: tuple[str, str, str]) -> tuple[Row, ...]:
  return tuple(
    Row(f'{torch}.{leaf}', f'params/{here}/{our_leaf}', transform)
    for torch, here, kind in layers
    for leaf, our_leaf, transform in _LAYERS[kind]
  )


_ENCODER = (
  Row('cls_token', 'params/cls_token', VERBATIM),
  Row('pos_embed', 'frozen/pos_embed', VERBATIM),
  *_rows(
    ('blocks.#.norm#', 'blocks_#/norm#', 'norm'),
    ('blocks.#.attn.qkv', 'blocks_#/attn/qkv', 'linear'),
    ('blocks.#.attn.q', 'blocks_#/attn/q', 'linear'),
    ('blocks.#.attn.k', 'blocks_#/attn/k', 'linear'),
    ('blocks.#.attn.v', 'blocks_#/attn/v', 'linear'),
    ('blocks.#.attn.cheap_operation_q', 'blocks_#/attn/cheap_operation_q', 'depthwise'),
    ('blocks.#.attn.cheap_operation_k', 'blocks_#/attn/cheap_operation_k', 'depthwise'),
    ('blocks.#.attn.cheap_operation_v', 'blocks_#/attn/cheap_operation_v', 'depthwise'),
    ('blocks.#.attn.proj', 'blocks_#/attn/proj', 'linear'),
    ('blocks.#.attn.se_layer.fc.0', 'blocks_#/attn/se/fc1', 'linear'),
    ('blocks.#.attn.se_layer.fc.2', 'blocks_#/attn/se/fc2', 'linear'),
    ('blocks.#.mlp.fc#', 'blocks_#/mlp/fc#', 'linear'),
    ('blocks.#.mlp.cheap_operation#', 'blocks_#/mlp/cheap_operation#', 'depthwise'),
    ('blocks.#.dense_linear', 'blocks_#/dense_linear', 'linear'),
    ('blocks.#.linear', 'blocks_#/linear', 'linear'),
    ('norm', 'norm', 'norm'),
    ('head', 'head', 'linear'),
    ('aux_head', 'aux_head', 'linear'),
  ),
)
TABLE: dict[str, tuple[Row, ...]] = {  # by tokens_type: performer and transformer name the same layers differently
  'performer': (
    *_ENCODER,
    Row('tokens_to_token.attention#.w', 'frozen/tokens_to_token/attention#/random_projection', VERBATIM),
    *_rows(
      ('tokens_to_token.attention#.norm#', 'tokens_to_token/attention#/norm#', 'norm'),
      ('tokens_to_token.attention#.kqv', 'tokens_to_token/attention#/kqv', 'linear'),
      ('tokens_to_token.attention#.proj', 'tokens_to_token/attention#/proj', 'linear'),
      ('tokens_to_token.attention#.mlp.0', 'tokens_to_token/attention#/mlp/fc1', 'linear'),
      ('tokens_to_token.attention#.mlp.2', 'tokens_to_token/attention#/mlp/fc2', 'linear'),
      ('tokens_to_token.project', 'tokens_to_token/project', 'linear'),
    ),
  ),
  'transformer': (
    *_ENCODER,
    *_rows(
      ('tokens_to_token.attention#.norm#', 'tokens_to_token/attention#/norm#', 'norm'),
      ('tokens_to_token.attention#.attn.qkv', 'tokens_to_token/attention#/qkv', 'linear'),
      ('tokens_to_token.attention#.attn.proj', 'tokens_to_token/attention#/proj', 'linear'),
      ('tokens_to_token.attention#.mlp.fc#', 'tokens_to_token/attention#/mlp/fc#', 'linear'),
      ('tokens_to_token.project', 'tokens_to_token/project', 'linear'),
    ),
  ),
  'convolution': (
    *_ENCODER,
    *_rows(
      ('tokens_to_token.soft_split#', 'tokens_to_token/soft_split#', 'convolution'),
      ('tokens_to_token.project', 'tokens_to_token/project', 'convolution'),
    ),
  ),
}
_EVIDENCE = {  # names that only one tokens_type has
  'performer': r'tokens_to_token\.attention\d\.(w|(kqv|proj|mlp\.[02])\.\w+)',
  'transformer': r'tokens_to_token\.attention\d\.(attn\.\w+|mlp\.fc\d)\.\w+',
  'convolution': r'tokens_to_token\.soft_split\d\.\w+',
}
_MMPRETRAIN = (  # mmpretrain's names -> the reference's, applied in turn
  (r'^backbone\.', ''),
  (r'^head\.layers\.head\.', 'head.'),
  (r'^encoder\.', 'blocks.'),
  (r'\.ln([12])\.', r'.norm\1.'),
  (r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'),
  (r'\.ffn\.layers\.1\.', '.mlp.fc2.'),
)


def from_torch(name: str, tokens_type: str) -> tuple[str, Transform]:
  """Path of a reference tensor's variable, 'params/...' or 'frozen/...', and transform; KeyError if it has none."""
  for row in TABLE[tokens_type]:
    if path := _rewrite(name, row.torch, row.here):
      return path, row.transform
  raise KeyError(name)


def to_torch(path: str, tokens_type: str) -> tuple[str, Transform]:
  """The reference's name of the variable at `path`, and transform; KeyError if no model has this path."""
  for row in TABLE[tokens_type]:
    if name := _rewrite(path, row.here, row.torch):
      return name, row.transform
  raise KeyError(path)


def _rewrite(text: str, source: str, target: str) -> str | None:
  match = re.fullmatch(re.escape(source).replace(r'\#', '(0|[1-9][0-9]*)'), text)
  if match is None:
    return None
  numbers = iter(match.groups())
  return re.sub('#', lambda _: next(numbers), target)


def from_mmpretrain(name: str) -> str:
  """The reference's name of mmpretrain's tensor `name`."""
  for pattern, replacement in _MMPRETRAIN:
    name = re.sub(pattern, replacement, name)
  return name


def tokens_type_of(names: Iterable[str]) -> str:
  """The tokens type to which most of a checkpoint's reference names point."""
  text = '\n'.join(names)
  return max(_EVIDENCE, key=lambda kind: len(re.findall(_EVIDENCE[kind], text)))
