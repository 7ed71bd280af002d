"""Checkpoints in every form that goes around, good and bad, made from the golden performer and transformer."""

import argparse
import collections
import datetime
import enum
import importlib
import operator
import os
import pathlib
import re
import tarfile
import warnings
import zipfile

import numpy as np

from tests import golden


class LazyTorch:
  """The module torch, imported by the first test that makes a file with it; the others run without it."""

  def __getattr__(self, name):
    return getattr(importlib.import_module('torch'), name)


torch = LazyTorch()


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


def with_second_head(state):
  numbers = golden.load_numbers('tiny_performer_token_labeling')
  return {**state, **{name: torch.from_numpy(numbers[name]) for name in ('aux_head.weight', 'aux_head.bias')}}


def with_prefix(state, prefix='module.'):
  return {prefix + name: tensor for name, tensor in state.items()}


def mmpretrain_flat(state):
  """The older form of mmpretrain: raw weights as buffers beside the average."""
  average = mmpretrain_names(state)
  raw = {f'ema_{name.replace(".", "_")}': tensor for name, tensor in shifted(average).items()}
  del raw['ema_backbone_pos_embed']
  return {**average, **raw}


NAMESPACE = [argparse.Namespace]  # what torch must be told to read timm's checkpoints


class Phase(enum.Enum):
  TRAINING = 1


class Settings(dict):
  """A dict with attributes, as libraries for configs have it."""


class History:
  """A record of a training loop, with methods among its attributes, as mmengine saves it; rebuilding it fails."""

  def __init__(self):
    self.values, self.methods = np.arange(3.0), {'mean': History.mean}

  def mean(self):
    return self.values.mean()

  def __setstate__(self, state):
    raise AssertionError('was built')


def metadata():
  """Objects that training scripts save beside the weights."""
  return {
    'metric': np.float64(81.5),
    'best': [np.float32(1), np.int64(3), np.bool_(True), np.str_('x'), np.arange(3), np.array(['a', 'bc'])],
    'random': [np.random.default_rng(3), np.random.RandomState(3).get_state(), np.random.RandomState(3)],
    'args': argparse.Namespace(output=pathlib.Path('runs/x'), function=without, dtype=torch.float16),
    'message_hub': {'log_scalars': collections.OrderedDict(loss=History(), lr=History())},
    'config': Settings(model=Settings(name='x'), phase=Phase.TRAINING),
    'time': [datetime.datetime(2024, 1, 2, tzinfo=datetime.UTC), datetime.timedelta(1)],
    'containers': [collections.defaultdict(list, a=[1]), collections.Counter('aab'), {1, 2}, frozenset({1}), 1j],
    'more': [range(3), slice(1, 2), b'abc', b'', bytearray(b'abc'), bytearray(), 2**70, -1, float('nan'), (1, (2,))],
    'keys': {(1, 2): 3, None: 4, True: 5, 1.5: 6, Phase.TRAINING: 7, 2**70: 8, b'x': 9},
    'tensors': [torch.ones(3).to_sparse(), torch.ones(3, device='meta'), torch.ones(2, dtype=torch.float8_e4m3fn)],
    'torch': [
      torch.device('cpu'),
      torch.Size([1, 2]),
      torch.get_rng_state(),
      torch.ones(2, dtype=torch.complex64).conj(),
    ],
    'model': torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.GELU()),
  }


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
    lambda state: {'state_dict': with_second_head(state)},
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
  'metadata': ('performer', lambda state: {**metadata(), 'state_dict': state}, {}),
  'metadata non-zip': (
    'performer',
    lambda state: {**metadata(), 'state_dict': state},
    dict(_use_new_zipfile_serialization=False),
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


class Call:
  """Unpickling it calls a function."""

  def __init__(self, function, *arguments):
    self.function, self.arguments = function, arguments

  def __reduce__(self):
    return self.function, self.arguments


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


def _calls(function, *arguments, **options):
  return lambda path: _saved(path, lambda state: {'state_dict': state, 'x': Call(function(), *arguments)}, **options)


def _command(**options):
  """Unpickling it runs a shell command that leaves a file behind."""
  return lambda path: _calls(lambda: os.system, f'touch {path}.executed', **options)(path)


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
    _edited(lambda state: {'state_dict': {**state, 'x': pathlib.PurePosixPath('a')}}),
    'x is of type pathlib.PurePosixPath, not a tensor',
  ),
  'whole model': (
    lambda path: torch.save(torch.nn.GELU(), path),
    'holds a torch.nn.modules.activation.GELU, not a state',
  ),
  'function that makes a tensor': (_calls(lambda: torch.zeros, 1 << 40), 'wants to call builtins.getattr'),
  'storage that is made': (_calls(lambda: torch.FloatStorage, 1 << 40), 'wants to call torch.FloatStorage'),
  'repetition': (_calls(lambda: operator.mul, 'x', 1 << 40), 'wants to import _operator.mul'),
  'bytes of 1 TB': (_calls(lambda: bytes, 1 << 40), 'refused: it asks for 1,099,511,627,776 bytes of memory'),
  'bytearray of 1 TB': (_calls(lambda: bytearray, 1 << 40), 'refused: it asks for 1,099,511,627,776 bytes of memory'),
  'bytearray of 1 TB, non-zip': (
    _calls(lambda: bytearray, 1 << 40, _use_new_zipfile_serialization=False),
    'refused: it asks for 1,099,511,627,776 bytes of memory',
  ),
  'negated view': (_replace('head.weight', lambda x: torch._neg_view(x)), 'head.weight is negated'),
}


def save_bad(damage, path):
  """Makes a file of `BAD` and returns what the error must say."""
  make, says = BAD[damage]
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # sparse, quantised and scripted tensors are beta or deprecated
    make(path)
  return says
