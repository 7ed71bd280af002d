"""Runs the pickle of a PyTorch file without PyTorch, without importing anything, and without building what it names.

A pickle is a program for a stack machine. `Machine` takes the few steps that PyTorch's own restricted unpickler takes.
A name stands for a function of this module, or for an object that is never built (`Opaque`); other names are refused.
What is built is no larger than the file, and no step walks through what earlier steps built: keys of a dict that could
be slow to hash are replaced. Tensors are only described; `Tensor.read` reads their numbers afterwards.
"""

from collections.abc import Callable, Mapping
import dataclasses
from pathlib import Path
import pickletools
import re
import sys
from typing import IO, Any, Literal

from t2t_vit_jax.conversion.torch_tensors import DTYPES, Storage, Tensor, are_sizes, itemsize, view
from t2t_vit_jax.errors import UserError

MAX_STEPS = 5_000_000  # some five seconds; a training checkpoint of the largest model has a fiftieth


@dataclasses.dataclass(eq=False, slots=True)
class Opaque:
  """An object of a class that is not imported; what the file says about it is dropped."""

  name: str  # of the class


@dataclasses.dataclass(eq=False, slots=True)
class _Global:
  """A function or class that a pickle names."""

  name: str
  build: Callable[..., Any] | None  # from what the pickle calls it with; None: it can't be called
  dtype: str = ''  # of a storage type, or a data type itself


def type_name(value: Any) -> str:
  """Name of an object's type, as the program that wrote the file knows it."""
  return value.name if isinstance(value, Opaque | _Global) else type(value).__name__


class Machine:
  """Takes the steps of one pickle, which `pickletools` decodes; keeps the storages that it asks for."""

  def __init__(self) -> None:
    self.storages: dict[str, Storage] = {}
    self._stack: list[Any] = []
    self._marks: list[int] = []

  def run(self, file: IO[bytes]) -> Any:
    """Takes all steps of the pickle at which `file` stands; returns what it builds.

    Raises:
      UserError: it asks for what no checkpoint needs.
      Exception: of any kind, if it is damaged.
    """
    memo: dict[int, Any] = {}
    push, pop = self._stack.append, self._stack.pop
    argument: Any
    for number, (opcode, argument, _) in enumerate(pickletools.genops(file)):
      if number == MAX_STEPS:
        raise UserError(f'refused: its pickle has more than {MAX_STEPS:,} steps')
      step = opcode.name
      if step in ('BINPUT', 'LONG_BINPUT'):
        memo[argument] = self._stack[-1]
      elif step in ('BINGET', 'LONG_BINGET'):
        push(memo[argument])
      elif step in _CONSTANTS:
        push(_CONSTANTS[step]())
      elif step in _NUMBERS_AND_STRINGS:
        push(argument)
      elif step == 'GLOBAL':
        push(_find(argument.replace(' ', '.', 1)))
      elif step in ('REDUCE', 'NEWOBJ'):
        arguments, called = pop(), pop()
        push(_call(called, arguments))
      elif step == 'BINPERSID':
        reference = pop()  # of the old format: to a class with its source, too
        push(reference[1] if reference[0] == 'module' else self._storage(*reference))
      elif step == 'MARK':
        self._marks.append(len(self._stack))
      elif step in _TUPLES:
        push(tuple(self._popped(_TUPLES[step])))
      elif step in _ITEMS:
        items = self._popped(_ITEMS[step])
        _add(self._stack[-1], items, in_pairs=step.startswith('SET'))
      elif step == 'BUILD':
        pop()  # attributes, which neither a dict nor a tensor needs
      elif step not in ('PROTO', 'STOP'):
        raise ValueError(f'unsupported step {step} of its pickle')
    return pop()

  def _popped(self, number: int | None) -> list[Any]:
    """Takes that many items from the stack; None: those after the last mark."""
    start = self._marks.pop() if number is None else len(self._stack) - number
    if start < 0:
      raise ValueError('a step of its pickle takes more than there is')
    items = self._stack[start:]
    del self._stack[start:]
    return items

  def _storage(self, kind: Any, storage_type: Any, key: Any, device: Any, numel: Any, view: Any = None) -> Storage:
    """The storage that a persistent id names; the same one for the same key."""
    if kind != 'storage' or type(key) is not str or not are_sizes(numel) or view is not None:
      raise ValueError('it asks for what is no storage')
    nbytes = numel * itemsize(storage_type.dtype)
    storage = self.storages.setdefault(key, Storage(storage_type.dtype, nbytes))
    if (storage.dtype, storage.nbytes) != (storage_type.dtype, nbytes):
      raise ValueError(f'it declares storage {key} in two ways')
    return storage

  def place(self, places: Mapping[str, tuple[int, int]], path: Path, byte_order: Literal['<', '>']) -> None:
    """Tells all storages where they are in a file: key -> position and length in bytes.

    Raises:
      ValueError: the file does not hold what the pickle has declared.
    """
    size = path.stat().st_size
    for key, storage in self.storages.items():
      storage.path, storage.byte_order = path, byte_order
      storage.position, nbytes = places[key]
      if nbytes != storage.nbytes or storage.position + nbytes > size:
        raise ValueError(f'storage {key} has {nbytes:,} bytes where {storage.nbytes:,} are declared')


_TUPLES = {'TUPLE': None, 'TUPLE1': 1, 'TUPLE2': 2, 'TUPLE3': 3}
_ITEMS = {'APPEND': 1, 'APPENDS': None, 'SETITEM': 2, 'SETITEMS': None}
_NUMBERS_AND_STRINGS = ('BINUNICODE', 'SHORT_BINSTRING', 'BININT', 'BININT1', 'BININT2', 'LONG1', 'BINFLOAT')
_CONSTANTS: dict[str, Callable[[], Any]] = {
  'NONE': lambda: None, 'NEWTRUE': lambda: True, 'NEWFALSE': lambda: False, 'EMPTY_TUPLE': tuple, 'EMPTY_LIST': list,
  'EMPTY_DICT': dict, 'EMPTY_SET': lambda: Opaque('set'),
}  # fmt: skip


def _call(called: Any, arguments: Any) -> Any:
  build = called.build if isinstance(called, _Global) else None
  if not build:
    raise UserError(f'refused: it wants to call {type_name(called)}, which no file of tensors needs')
  if not isinstance(arguments, tuple) or len(arguments) > 100:
    raise ValueError(f'it calls {type_name(called)} with too much')
  return build(*arguments)


def _add(container: Any, items: list[Any], *, in_pairs: bool) -> None:
  """Appends items to a list, or sets pairs of a dict."""
  if isinstance(container, Opaque):
    return
  if isinstance(container, dict) and in_pairs:
    container.update(zip(map(_key, items[::2]), items[1::2], strict=True))
  elif isinstance(container, list) and not in_pairs:
    container.extend(items)
  else:
    raise ValueError(f'it adds items to a {type_name(container)}')


def _key(key: Any) -> Any:
  """A key of a dict; what could be slow to hash, or have the same hash as a million others, becomes opaque."""
  simple = isinstance(key, str | float | Opaque | None) or (isinstance(key, int) and abs(key) < 1 << 60)
  return key if simple else Opaque(type_name(key))


def _tensor_v3(*arguments: Any) -> Tensor:
  *place, grad, hooks, dtype = arguments[:7]  # the type that a storage of bytes lacks
  return view(*place, grad, hooks, *arguments[7:], dtype=dtype.dtype)


def _subclass(rebuild: Any, new_type: Any, arguments: Any, attributes: Any) -> Any:
  """A tensor with attributes, or of a class of its own, which may give its numbers another meaning."""
  plain = new_type.name in ('torch.Tensor', 'torch._tensor.Tensor', 'torch.nn.parameter.Parameter')
  return _call(rebuild, arguments) if plain else Tensor(defect=f'no plain tensor but a {new_type.name}')


def _bytes(*contents: Any) -> Opaque:
  if any(isinstance(content, int) for content in contents):
    raise UserError(f'refused: it asks for {contents[0]:,} bytes of memory')
  return Opaque('bytes')


def _first(tensor: Any, *rest: Any) -> Any:
  return tensor


def _defective(defect: str) -> Callable[..., Tensor]:
  return lambda *arguments: Tensor(defect=defect)


_BUILT: dict[str, Callable[..., Any]] = {
  'builtins.bytearray': _bytes,
  'builtins.bytes': _bytes,
  'collections.OrderedDict': lambda: {},  # noqa: PIE807 (dict would copy what it is given)
  'torch.Size': lambda sizes: sizes,
  'torch.nn.parameter.Parameter': _first,
  'torch._tensor._rebuild_from_type_v2': _subclass,
  'torch._utils._rebuild_tensor': view,
  'torch._utils._rebuild_tensor_v2': view,
  'torch._utils._rebuild_tensor_v3': _tensor_v3,
  'torch._utils._rebuild_parameter': _first,
  'torch._utils._rebuild_parameter_with_state': _first,
  'torch._utils._rebuild_device_tensor_from_cpu_tensor': _first,
  'torch._utils._rebuild_device_tensor_from_numpy': _defective('no plain tensor with data but an array'),
  'torch._utils._rebuild_meta_tensor_no_storage': _defective('no plain tensor with data but a Tensor on meta'),
  'torch._utils._rebuild_nested_tensor': _defective('sparse or nested'),
  'torch._utils._rebuild_sparse_tensor': _defective('sparse or nested'),
  'torch._utils._rebuild_qtensor': _defective('quantised'),
  'torch._utils._rebuild_wrapper_subclass': _defective('no plain tensor'),
}
_STORAGES = {f'torch.{storage}Storage': dtype for dtype, (storage, _) in DTYPES.items() if storage}
_STORAGES['torch.storage.UntypedStorage'] = 'uint8'
# What metadata has of Python's own library, of NumPy and of PyTorch besides classes: all of it becomes opaque.
_OPAQUE = re.compile(
  r"""(argparse|collections|datetime|decimal|fractions|pathlib|pathlib\._local|typing|uuid)\.\w+
  | builtins\.(bool|complex|dict|float|frozenset|getattr|int|list|long|object|range|set|slice|str|tuple|unicode|xrange)
  | _codecs\.encode | copyreg\._reconstructor | functools\.partial | types\.SimpleNamespace
  | numpy\.(_?core\.multiarray\.(_reconstruct|scalar) | dtype | ndarray | random\.(_pickle|bit_generator)\.__\w+)
  | torch\.(device | per_\w+ | serialization\._get_layout)""",
  re.VERBOSE,
)


def _find(name: str) -> _Global:
  """Finds what a name in a pickle stands for; functions of other packages can be named, but not called.

  Raises:
    UserError: it is a part of Python's own library that no checkpoint needs.
  """
  name = re.sub(r'^__builtin__\b', 'builtins', re.sub(r'^copy_reg\b', 'copyreg', name))  # as Python 2 called them
  module, _, attribute = name.rpartition('.')
  if name in _BUILT:
    return _Global(name, _BUILT[name])
  if name in _STORAGES or re.fullmatch(r'torch\.(b?float|complex|bits|bool|q?u?int|\w*Tensor)\w*', name):
    return _Global(name, None, _STORAGES.get(name, attribute))
  if _OPAQUE.fullmatch(name):
    return _Global(name, lambda *arguments: Opaque(name))
  if module.split('.')[0] in sys.stdlib_module_names:
    raise UserError(f'refused: it wants to import {name}, which no file of tensors needs')
  is_class = attribute.lstrip('_')[:1].isupper()
  return _Global(name, (lambda *arguments: Opaque(name)) if is_class else None)
