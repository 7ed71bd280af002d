"""Checkpoints in every form that goes around, good and bad, made from the golden performer and transformer."""

import argparse
import os
import pathlib
import re
import tarfile
import warnings
import zipfile

import torch

from t2t_vit_jax import conversion
from tests import golden


def state_dict(name='performer'):
  """A fresh dict of fresh tensors."""
  return {key: tensor.clone() for key, tensor in golden.load_state_dict(name).items()}


def mmpretrain_names(state):
  """The transformer's tensors under the names that mmpretrain gives them."""
  renames = (
    (r'^blocks\.', 'encoder.'),
    (r'norm([12])', r'ln\1'),
    (r'mlp\.fc1', 'ffn.layers.0.0'),
    (r'mlp\.fc2', 'ffn.layers.1'),
    (r'^', 'backbone.'),
    (r'^backbone\.head\.', 'head.layers.head.'),
  )
  renamed = {}
  for name, tensor in state.items():
    for pattern, replacement in renames:
      name = re.sub(pattern, replacement, name)
    renamed[name] = tensor
  return renamed


def shifted(state):
  """Other weights: everything but the position table moved a little."""
  return {name: tensor if name.endswith('pos_embed') else tensor + 0.01 for name, tensor in state.items()}


def without(state, name):
  return {key: tensor for key, tensor in state.items() if key != name}


def with_prefix(state, prefix='module.'):
  return {prefix + name: tensor for name, tensor in state.items()}


def mmpretrain_flat(state):
  """The older form of mmpretrain: raw weights as buffers beside the average."""
  average = mmpretrain_names(state)
  raw = {f'ema_{name.replace(".", "_")}': tensor for name, tensor in shifted(average).items()}
  del raw['ema_backbone_pos_embed']
  return {**average, **raw}


# form -> (golden model, what is saved, options of torch.save)
FORMS = {
  'bare': ('performer', lambda state: state, {}),
  'non-zip': ('performer', lambda state: state, dict(_use_new_zipfile_serialization=False)),
  'ema alone': ('performer', lambda state: {'state_dict_ema': state}, {}),
  'timm': (
    'performer',
    lambda state: {
      'epoch': 309,
      'arch': 't2t_vit_tiny',
      'state_dict': shifted(state),
      'optimizer': {'state': {0: {'exp_avg': torch.zeros(3)}}, 'param_groups': [{'lr': 1e-5, 'params': [0]}]},
      'args': argparse.Namespace(model='t2t_vit_tiny', lr=5e-4),
      'version': 2,
      'state_dict_ema': state,
      'metric': 81.5,
    },
    {},
  ),
  'module prefix': ('performer', lambda state: {'state_dict_ema': with_prefix(state)}, {}),
  'double precision': ('performer', lambda state: {name: tensor.double() for name, tensor in state.items()}, {}),
  'compiled': ('performer', lambda state: with_prefix(state, '_orig_mod.'), {}),
  'compiled and parallel': ('performer', lambda state: {'state_dict': with_prefix(state, 'module._orig_mod.')}, {}),
  'lightning': (
    'performer',
    lambda state: {'state_dict': with_prefix(state, 'model.'), 'pytorch-lightning_version': '2.5.0', 'callbacks': {}},
    {},
  ),
  'net of a module': ('performer', lambda state: {'state_dict': with_prefix(state, 'net.')}, {}),
  'model and average': ('performer', lambda state: {'model': shifted(state), 'model_ema': state, 'epoch': 3}, {}),
  'model_state_dict': ('performer', lambda state: {'model_state_dict': state, 'loss': 1.5}, {}),
  'the name of a model': ('performer', lambda state: {'model': 't2t_vit_tiny', 'net': state}, {}),
  'averaged model': ('performer', lambda state: {**with_prefix(state), 'n_averaged': torch.tensor(7)}, {}),
  'cifar': ('performer', lambda state: {'net': with_prefix(state), 'acc': 98.3, 'epoch': 59}, {}),
  'token labeling': (
    'performer',
    lambda state: {
      'state_dict': {**state, 'aux_head.weight': torch.ones(10, 64), 'aux_head.bias': torch.ones(10)},
    },
    {},
  ),
  'parameters': ('performer', lambda state: {key: torch.nn.Parameter(value) for key, value in state.items()}, {}),
  'mmpretrain': (
    'transformer',
    lambda state: {
      'meta': {'CLASSES': [f'class {i}' for i in range(10)], 'epoch': 310},
      'state_dict': mmpretrain_names(state),
      'ema_state_dict': {**with_prefix(mmpretrain_names(shifted(state))), 'steps': torch.tensor(775620)},
    },
    {},
  ),
  'mmpretrain flat': (
    'transformer',
    lambda state: {'meta': {}, 'state_dict': mmpretrain_flat(state)},
    dict(_use_new_zipfile_serialization=False),
  ),
}


def save_form(form, path):
  """Saves the golden model in a form of `FORMS` and returns the model's name."""
  name, wrap, options = FORMS[form]
  torch.save(wrap(state_dict(name)), path, **options)
  return name


class Command:
  """Unpickling it runs a shell command that leaves a file behind."""

  def __init__(self, witness):
    self.witness = witness

  def __reduce__(self):
    return os.system, (f'touch {self.witness}',)


def edit_zip(path, name, change):
  """Rewrites a zip file with one member's bytes changed."""
  with zipfile.ZipFile(path) as archive:
    members = {info.filename: archive.read(info) for info in archive.infolist()}
  with zipfile.ZipFile(path, 'w') as archive:
    for member, data in members.items():
      archive.writestr(member, change(data) if member.endswith(name) else data)


def _saved(path, change, **options):
  state = state_dict()
  changed = change(state)
  torch.save(state if changed is None else changed, path, **options)


def _edited(change, **options):
  return lambda path: _saved(path, change, **options)


def _tar(path):
  pathlib.Path(f'{path}.data').write_bytes(b'1')
  with tarfile.open(path, 'w') as archive:
    archive.add(f'{path}.data')


def _tar_that_starts_like_torch(path):
  """A tar whose first member's name is the start of a PyTorch file of old."""
  name = bytes.fromhex('80028a0a6cfc9c46f9206aa850192e').decode('latin1')
  with tarfile.open(path, 'w', format=tarfile.USTAR_FORMAT, encoding='latin1') as archive:
    archive.addfile(tarfile.TarInfo(name))


def _zip_bomb(path):
  _saved(path, lambda state: None)
  with zipfile.ZipFile(path, 'a', zipfile.ZIP_DEFLATED) as archive:
    archive.writestr('archive/data/9999', bytes(50_000_000))


def _script(path):
  torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)


def _truncated(path, **options):
  _saved(path, lambda state: None, **options)
  data = path.read_bytes()
  path.write_bytes(data[: len(data) * 2 // 3])


def _flipped_bit(path):
  _saved(path, lambda state: None)
  data = bytearray(path.read_bytes())
  start = data.find(state_dict()['head.weight'].numpy().tobytes())
  data[start + 100] ^= 1
  path.write_bytes(data)


def _declared_too_large(path):
  """The pickle says of the first storage that it has 2 ** 40 numbers."""
  _saved(path, lambda state: {'head.weight': torch.ones(300, 300)}, _use_new_zipfile_serialization=False)
  number = b'J' + (90_000).to_bytes(4, 'little')
  data = path.read_bytes()
  assert number in data
  path.write_bytes(data.replace(number, b'\x8a\x06' + (2**40).to_bytes(6, 'little'), 1))


def _overlapping(path):
  state = state_dict()
  state['head.weight'] = torch.zeros(1).as_strided((1 << 20, 1 << 20), (0, 0))
  torch.save(state, path)


def _aliased(path):
  state = state_dict()
  torch.save({**state, **{f'blocks.{i}.mlp.fc1.weight': state['blocks.0.mlp.fc1.weight'] for i in range(999)}}, path)


def _replace(name, value):
  return _edited(lambda state: state.update({name: value(state[name])}))


def _command(**options):
  return lambda path: torch.save({'state_dict': state_dict(), 'x': Command(f'{path}.executed')}, path, **options)


def _quantised(tensor):
  return torch.quantize_per_tensor(tensor, 0.1, 0, torch.qint8)


# damage -> (makes the file, what the error must say)
BAD = {
  'missing key': (_edited(lambda state: without(state, 'blocks.1.norm2.bias')), 'blocks.1.norm2.bias is missing'),
  'extra key': (_edited(lambda state: state.update({'blocks.0.attn.gate': torch.ones(2)})), 'blocks.0.attn.gate'),
  'transposed matrix': (
    _replace('blocks.1.mlp.fc2.weight', lambda x: x.T.clone()),
    'blocks.1.mlp.fc2.weight is (128, 64), not (64, 128)',
  ),
  'wrong width': (
    _replace('blocks.0.mlp.fc1.bias', lambda x: x[:-1].clone()),
    'blocks.0.mlp.fc1.bias is (127,), not (128,)',
  ),
  'NaN': (_replace('norm.weight', lambda x: x * float('nan')), 'norm.weight holds NaN'),
  'infinity': (_replace('pos_embed', lambda x: x / 0), 'pos_embed holds NaN or infinity'),
  'position table of no grid': (_replace('pos_embed', lambda x: x[:, :-1].clone()), 'pos_embed is (1, 16, 64)'),
  'integers': (_replace('head.bias', lambda x: x.int()), 'head.bias is of type int32'),
  'sparse tensor': (_replace('head.weight', lambda x: x.to_sparse()), 'head.weight is sparse'),
  'sparse rows': (_replace('head.weight', lambda x: x.to_sparse_csr()), 'head.weight is sparse'),
  'quantised tensor': (_replace('head.weight', _quantised), 'head.weight is quantised'),
  'tensor without data': (_replace('head.weight', lambda x: x.to('meta')), 'head.weight is no plain tensor'),
  'number for a tensor': (_replace('head.weight', lambda x: 3), 'head.weight is of type int'),
  'strides of zero': (_overlapping, 'head.weight is (1048576, 1048576), which is more than its storage'),
  'many names for the same numbers': (_aliased, 'share their numbers'),
  'two names for the same numbers': (_edited(lambda state: {**state, 'copy': state['pos_embed']}), 'copy (1, 17, 64)'),
  'number for a name': (_edited(lambda state: state.update({7: torch.ones(1)})), '7 is a int'),
  'name of two lines': (_edited(lambda state: state.update({'a\nb\x1b[1m': torch.ones(1)})), r'a\nb\x1b[1m'),
  'key twice': (_edited(lambda state: state.update({'module.norm.bias': state['norm.bias']})), 'norm.bias twice'),
  'other model': (_edited(lambda state: {'conv1.weight': torch.ones(3), 'fc.bias': torch.ones(3)}), 'conv1.weight'),
  'empty state dict': (_edited(lambda state: {'state_dict': {}}), 'empty'),
  'no dict': (_edited(lambda state: list(state.values())), 'list'),
  'empty file': (lambda path: path.write_bytes(b''), 'is empty'),
  'text file': (lambda path: path.write_text('<!DOCTYPE html> this is a page about weights\n' * 9), 'neither'),
  'directory': (lambda path: path.mkdir(), 'directory'),
  'no file': (lambda path: None, 'no such file'),
  'truncated file': (_truncated, 'damaged'),
  'truncated non-zip file': (lambda path: _truncated(path, _use_new_zipfile_serialization=False), 'damaged'),
  'flipped bit': (_flipped_bit, 'checksum'),
  'zip bomb': (_zip_bomb, 'refused'),
  'zip of something else': (lambda path: zipfile.ZipFile(path, 'w').writestr('a.txt', 'b'), 'not a PyTorch'),
  'declared too large': (_declared_too_large, 'damaged'),
  'TorchScript archive': (_script, 'TorchScript'),
  'real tar': (_tar, 'tar archive'),
  'tar that starts like torch': (_tar_that_starts_like_torch, 'tar archive'),
  'pickle that runs a command': (_command(), 'wants to import'),
  'non-zip pickle that runs a command': (_command(_use_new_zipfile_serialization=False), 'wants to import'),
  'class of its own': (
    _edited(lambda state: {'state_dict': state, 'x': pathlib.PurePosixPath('a')}),
    'pathlib.PurePosixPath',
  ),
}


def save_bad(damage, path):
  """Makes a file of `BAD` and returns what the error must say."""
  make, says = BAD[damage]
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # sparse, quantised and scripted tensors are beta or deprecated
    make(path)
  return says


def converted(name, folder, **options):
  """A golden model as a file of this package; `options` are those of `conversion.Options`."""
  settings = {
    key: golden.TINY_MODELS[name][key] for key in ('num_heads', 'qk_scale') if key in golden.TINY_MODELS[name]
  }
  path = folder / f'{name}.safetensors'
  conversion.convert(
    golden.DATA / f'official_tiny_{name}.pth.tar', path, conversion.Options(settings=settings, **options)
  )
  return path
