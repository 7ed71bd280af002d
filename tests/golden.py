"""Reads the golden files in `tests/data`: numbers that the PyTorch reference produced (see tests/data/README.md)."""

import argparse
from pathlib import Path
import re

import numpy as np
import torch

DATA = Path(__file__).parent / 'data'

# The golden models' arguments; heads and qk_scale leave no trace in the tensors.
TINY = dict(image_size=64, num_classes=10, embed_dim=64, depth=2, num_heads=4, mlp_ratio=2.0, token_dim=16)
TINY_MODELS = {
  'performer': dict(TINY, tokens_type='performer'),
  'transformer': dict(TINY, tokens_type='transformer'),
  'performer_qkbias_qkscale': dict(TINY, tokens_type='performer', qkv_bias=True, qk_scale=0.17),
  'performer_own_pos_embed': dict(TINY, tokens_type='performer'),
  'se': dict(TINY, tokens_type='performer', token_dim=64, block_type='se'),
  'ghost': dict(TINY, tokens_type='performer', token_dim=64, mlp_ratio=3.0, block_type='ghost'),
  'dense': dict(
    TINY,
    tokens_type='performer',
    token_dim=64,
    embed_dim=32,
    block_type='dense',
    dense_stages=(1, 2),
    growth_rate=16,
  ),
}

# torch name -> path here, applied in turn.
_RENAMES = (
  (r'^blocks\.(\d+)\.', r'blocks_\1.'),
  (r'\.se_layer\.fc\.0\.', '.se.fc1.'),
  (r'\.se_layer\.fc\.2\.', '.se.fc2.'),
  (r'\.mlp\.0\.', '.mlp.fc1.'),
  (r'\.mlp\.2\.', '.mlp.fc2.'),
  (r'(attention\d)\.attn\.', r'\1.'),
  (r'\.w$', '.random_projection'),
  (r'norm(\d?)\.weight$', r'norm\1.scale'),
  (r'\.weight$', '.kernel'),
)

# By their number of axes: linear (out, in), depthwise (channels, 1, 1), convolution (out, in, height, width).
_KERNEL_AXES = {2: (1, 0), 3: (1, 2, 0), 4: (2, 3, 1, 0)}


def load_numbers(name):
  """The arrays of `tests/data/official_<name>.npz`."""
  with np.load(DATA / f'official_{name}.npz') as file:
    return dict(file)


def load_state_dict(name):
  """Torch tensors of the golden model `official_tiny_<name>.pth.tar` (its EMA weights) by their names."""
  with torch.serialization.safe_globals([argparse.Namespace]):
    return torch.load(DATA / f'official_tiny_{name}.pth.tar', weights_only=True)['state_dict_ema']


def load_variables(name):
  """The same as variables `{'params': ..., 'frozen': ...}` of `T2TViT`."""
  return to_variables({key: tensor.numpy() for key, tensor in load_state_dict(name).items()})


def to_variables(tensors):
  """Nests arrays under torch names as the variables of `T2TViT`; the output axis of kernels becomes the last."""
  variables = {}
  for torch_name, array in tensors.items():
    name = torch_name
    for pattern, replacement in _RENAMES:
      name = re.sub(pattern, replacement, name)
    *parents, leaf = name.split('.')
    node = variables.setdefault('frozen' if leaf in ('pos_embed', 'random_projection') else 'params', {})
    for parent in parents:
      node = node.setdefault(parent, {})
    node[leaf] = array.transpose(_KERNEL_AXES[array.ndim]) if leaf == 'kernel' else array
  return variables
