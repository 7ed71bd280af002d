"""The reader of PyTorch's files against `torch.load(weights_only=True)`, and files that would fill memory or time."""

import collections
import io
import math
import pickle
import struct
import tracemalloc
import zipfile

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
import numpy as np
import pytest
import torch

from t2t_vit_jax import UserError
from t2t_vit_jax.conversion import files, torch_pickle
from t2t_vit_jax.conversion.torch_tensors import DTYPES, Tensor
from tests import checkpoints, golden
from tests.parameters import slow_but

FORMATS = {'zip': {}, 'legacy': {'_use_new_zipfile_serialization': False}}
TYPES = [getattr(torch, name) for name in DTYPES if not name.startswith('q')]


def assert_same(ours, theirs):
  """Containers, numbers and strings of the same types in the same order; tensors with the same bits."""
  if isinstance(theirs, torch.Tensor):
    assert ours.dtype == str(theirs.dtype).removeprefix('torch.')
    assert (ours.shape, ours.strides) == (tuple(theirs.shape), theirs.stride())
    expected = theirs.detach().float() if theirs.dtype == torch.bfloat16 else theirs.detach()
    array = ours.read()
    assert array.dtype == expected.numpy().dtype
    assert array.shape == expected.shape
    assert array.tobytes() == expected.numpy().tobytes()
  elif isinstance(theirs, dict):
    assert type(ours) is dict
    assert list(ours) == list(theirs)
    for key, value in theirs.items():
      assert_same(ours[key], value)
  elif isinstance(theirs, list | tuple):
    assert type(ours) is type(theirs)
    assert len(ours) == len(theirs)
    for our, their in zip(ours, theirs, strict=True):
      assert_same(our, their)
  else:
    assert type(ours) is type(theirs)
    assert ours == theirs or (ours != ours and theirs != theirs)


@st.composite
def views(draw, storages):
  """A view of one of some storages, which several views may share: dense, transposed, with steps, of 0 to 4 axes."""
  base = draw(st.sampled_from(storages))
  shape = draw(st.lists(st.integers(0, 3), max_size=4))
  kind = draw(st.sampled_from(['dense', 'permuted', 'strided', 'expanded', 'offset']))
  offset = draw(st.integers(0, 5)) if kind == 'offset' else 0
  if kind == 'strided':
    view = base[offset :: draw(st.integers(1, 3))][: math.prod(shape)]
    shape = [len(view)]
  else:
    view = base[offset : offset + math.prod(shape)]
  view = view.view(shape)
  if kind == 'permuted':
    view = view.permute(draw(st.permutations(range(len(shape)))))
  if kind == 'expanded':
    view = view[..., None].expand(*shape, 1 if view.numel() else 2)
  floating = view.is_floating_point() or view.is_complex()
  return torch.nn.Parameter(view) if floating and draw(st.booleans()) else view


@st.composite
def saved_objects(draw, types):
  """Nested containers of tensors of these types, numbers and strings."""
  generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
  types = draw(st.lists(st.sampled_from(types), min_size=1, max_size=3, unique=True))
  bits = [torch.randint(0, 256, (90 * dtype.itemsize,), generator=generator, dtype=torch.uint8) for dtype in types]
  storages = [
    (data % 2).bool() if dtype == torch.bool else data.view(dtype) for data, dtype in zip(bits, types, strict=True)
  ]
  scalars = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=5)
  keys = st.text(max_size=9) | st.integers(-(2**59), 2**59)
  return draw(
    st.recursive(
      views(storages) | scalars,
      lambda inner: (
        st.lists(inner, max_size=4)
        | st.lists(inner, max_size=4).map(tuple)
        | st.dictionaries(keys, inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4).map(collections.OrderedDict)
      ),
      max_leaves=12,
    )
  )


@pytest.mark.parametrize('file_format', FORMATS)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_what_torch_writes_is_read_as_torch_reads_it(file_format, tmp_path, data):
  unreadable = (torch.uint16, torch.uint32, torch.uint64) if file_format == 'legacy' else ()  # by torch itself
  saved = data.draw(saved_objects([dtype for dtype in TYPES if dtype not in unreadable]))
  torch.save(saved, tmp_path / 'file', **FORMATS[file_format])
  expected = torch.load(tmp_path / 'file', weights_only=True)
  assert_same(files.read_torch(tmp_path / 'file', file_format), expected)


@pytest.mark.parametrize('path', sorted(golden.DATA.glob('*.pth*')), ids=lambda path: path.name)
def test_golden_files_are_read_as_torch_reads_them(path):
  with torch.serialization.safe_globals(checkpoints.NAMESPACE):
    expected = torch.load(path, weights_only=True)
  ours = files.read_torch(path, files.file_format(path))
  for key in ours.keys() - {'args', 'optimizer'}:
    assert_same(ours[key], expected[key])


def test_attributes_of_tensors_are_left_out(tmp_path):
  tensor, parameter = torch.arange(3.0), torch.nn.Parameter(torch.arange(4.0))
  tensor.tag, parameter.tag = 'x', {'y': 1}
  torch.save([tensor, parameter], tmp_path / 'file')
  assert_same(files.read_torch(tmp_path / 'file', 'zip'), torch.load(tmp_path / 'file', weights_only=True))


def test_numbers_of_a_machine_with_another_byte_order(tmp_path):
  saved = [torch.arange(6).to(dtype) for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.uint8)]
  torch.save(saved, tmp_path / 'file')
  checkpoints.edit_zip(tmp_path / 'file', '/byteorder', lambda _: b'big')
  expected = torch.load(tmp_path / 'file', weights_only=True)
  assert expected[2][1] == 1 << 56
  assert_same(files.read_torch(tmp_path / 'file', 'zip'), expected)


@pytest.mark.parametrize('file_format', FORMATS)
def test_metadata_stands_for_objects_that_are_never_built(file_format, tmp_path):
  torch.save(checkpoints.metadata(), tmp_path / 'file', **FORMATS[file_format])
  saved = files.read_torch(tmp_path / 'file', file_format)
  scalars = saved['message_hub']['log_scalars']
  assert scalars.keys() == {'loss', 'lr'}
  for value, name in (
    (saved['metric'], 'numpy._core.multiarray.scalar'),
    (saved['args'], 'argparse.Namespace'),
    (scalars['loss'], 'tests.checkpoints.History'),
    (saved['model'], 'torch.nn.modules.container.Sequential'),
  ):
    assert type(value) is torch_pickle.Opaque
    assert value.name == name
  with pytest.raises(UserError, match=r'loss is of type tests\.checkpoints\.History, not a tensor'):
    files.tensors_to_arrays(scalars, 1000)


# ------------------------------------------------------------------ hostile pickles


def text(value):
  return b'X' + struct.pack('<I', len(value)) + value


def number(value):
  data = pickle.encode_long(value)
  return b'\x8a' + bytes([len(data)]) + data


def call(name, *arguments):
  return b'c' + name.replace(' ', '\n').encode() + b'\n(' + b''.join(arguments) + b'tR'


N = 100_000
# name -> (steps that push one value, what the error must say; None: it is read, and does no harm)
STEPS = {
  'bytearray': (call('__builtin__ bytearray', number(8 << 30)), 'asks for 8,589,934,592 bytes'),
  'method of a list': (
    call('__builtin__ getattr', b'c__builtin__\nlist\n', text(b'__mul__')) + b'(' + number(8 << 30) + b'tR',
    'wants to call builtins.getattr',
  ),
  'tensor type': (call('torch FloatTensor', number(8 << 30)), 'wants to call torch.FloatTensor'),
  'function of another package': (call('pip main', text(b'install')), 'wants to call pip.main'),
  'eval': (call('__builtin__ eval', text(b'1')), 'import builtins.eval'),
  'import': (call('__builtin__ __import__', text(b'os')), 'import builtins.__import__'),
  'place in the memo': (b'Nr' + struct.pack('<I', 1 << 31), None),
  'string': (b'X' + struct.pack('<I', (1 << 32) - 1), 'expected 4294967295 bytes'),
  'bytes': (b'\x8e' + struct.pack('<Q', 1 << 33), 'expected 8589934592 bytes'),
  'bytearray of protocol 5': (b'\x96' + struct.pack('<Q', 1 << 33), 'expected 8589934592 bytes'),
  'long number': (b'\x8b' + struct.pack('<i', (1 << 31) - 1), 'not enough data'),
  'frame': (b'\x95' + struct.pack('<Q', 1 << 40), 'unsupported step FRAME'),
  'deep tuples': (b')' + N // 5 * b'\x85', None),
  'deep lists': (N // 5 * b']' + b']' + N // 5 * b'a', None),
  'deep dicts': (N // 5 * b'}N' + b'}' + N // 5 * b's', None),
  'deep key': (b'})' + 2 * N * b'\x85' + b'Ns', None),  # hashing it ends Python with a segmentation fault
  'key of 2 ** 100 parts': (b'})' + 100 * b'q\x00h\x00\x86' + b'Ns', None),
  'keys with the same hash': (b'}(' + b''.join(number(i * (2**61 - 1)) + b'N' for i in range(1, N // 5)) + b'u', None),
  'many arguments': (b'ccollections\nCounter\n(' + N * b'N' + b'tR', 'calls collections.Counter with too much'),
  'dict of a list': (b'ccollections\nOrderedDict\n](' + N // 5 * b']' + b'e\x85R', 'positional arguments'),
  'storage of a list': (b'](' + N * b'N' + b'eQ', 'positional arguments'),
  'calls in calls': (
    5000 * b'ctorch._tensor\n_rebuild_from_type_v2\nctorch\nTensor\n' + b')' + 5000 * b'N\x87R', 'damaged'
  ),
  'name without an end': (b'c' + N * b'x', 'no newline'),
  'too many steps': (b'(' + (N + 5) * b'N' + b't', 'more than 100,000 steps'),
  'stack too short': (b'\x87', 'takes more than there is'),
}  # fmt: skip


def write_pickle(path, file_format, steps):
  """A file of {'a': what the steps push}, and no storage."""
  steps = b'\x80\x02}' + text(b'a') + steps + b's.'
  if file_format == 'zip':
    with zipfile.ZipFile(path, 'w') as archive:
      archive.writestr('archive/data.pkl', steps)
  else:
    stream, empty = io.BytesIO(), pickle.dumps({}, protocol=2)
    torch.save({}, stream, _use_new_zipfile_serialization=False)
    start, _, end = stream.getvalue().partition(empty)
    path.write_bytes(start + steps + end)


@pytest.mark.parametrize('file_format', slow_but(('zip',), FORMATS))
@pytest.mark.parametrize('name', STEPS)
def test_no_pickle_fills_memory_or_ends_python(name, file_format, tmp_path, monkeypatch):
  steps, says = STEPS[name]
  write_pickle(tmp_path / 'file', file_format, steps)
  if name == 'too many steps':
    monkeypatch.setattr(torch_pickle, 'MAX_STEPS', N)
  tracemalloc.start()
  try:
    if says is None:
      assert list(files.read_torch(tmp_path / 'file', file_format)) == ['a']
    else:
      with pytest.raises(UserError) as caught:
        files.read_torch(tmp_path / 'file', file_format)
      assert says in str(caught.value)
    assert tracemalloc.get_traced_memory()[1] < 40_000_000
  finally:
    tracemalloc.stop()


@pytest.mark.parametrize(
  'view',
  [
    dict(offset=91), dict(size=(91,)), dict(size=(2, 2), stride=(90, 1)), dict(offset=-1), dict(size=(-1,)),
    dict(stride=(-1,)), dict(size=(1, 1)), dict(size=(2**40,)), dict(size=(2,) * 65, stride=(0,) * 65),
    dict(offset=1.0),
  ],
)  # fmt: skip
def test_views_that_leave_their_storage_are_refused(view, tmp_path):
  """Most of them by torch too."""
  arguments = {'offset': 0, 'size': (90,), 'stride': (1,), **view}

  class View:
    def __reduce__(self):
      return torch._utils._rebuild_tensor_v2, (
        torch.zeros(90)._typed_storage(), *arguments.values(), False, collections.OrderedDict()
      )  # fmt: skip

  torch.save([View()], tmp_path / 'file')
  with pytest.raises(UserError, match=r'beyond the 360 bytes|impossible shape'):
    files.read_torch(tmp_path / 'file', 'zip')


def test_names_of_storages_are_strings(tmp_path):
  """Else this one's would be a text of 2 ** 100 parts."""
  write_pickle(tmp_path / 'file', 'legacy', b'N')
  start, end, _ = (tmp_path / 'file').read_bytes().rpartition(pickle.dumps([], protocol=2))
  assert end
  (tmp_path / 'file').write_bytes(start + b'\x80\x02])' + 100 * b'q\x00h\x00\x86' + b'a.')
  with pytest.raises(UserError, match='a storage has no name'):
    files.read_torch(tmp_path / 'file', 'legacy')


def test_storages_are_as_large_as_declared(tmp_path):
  torch.save([torch.zeros(90)], tmp_path / 'file')
  for change, says in (
    (lambda data: data[:-4], '356 bytes where 360 are declared'),
    (lambda data: data + bytes(4), '364 bytes where 360 are declared'),
  ):
    (tmp_path / 'changed').write_bytes((tmp_path / 'file').read_bytes())
    checkpoints.edit_zip(tmp_path / 'changed', '/data/0', change)
    with pytest.raises(UserError, match=says):
      files.read_torch(tmp_path / 'changed', 'zip')


def test_a_file_that_shrinks_while_it_is_read_is_refused(tmp_path):
  torch.save([torch.zeros(90)], tmp_path / 'file')
  (tensor,) = files.read_torch(tmp_path / 'file', 'zip')
  (tmp_path / 'file').write_bytes(b'')
  with pytest.raises(UserError, match='became shorter'):
    files.tensors_to_arrays({'a': tensor}, 1000)


def test_what_cannot_be_an_array_says_why():
  with pytest.raises(UserError, match='a is quantised; 3 is a int, not a name'):
    files.tensors_to_arrays({'a': Tensor(defect='quantised'), 3: np.zeros(2)}, 1000)
