"""Tensors of a PyTorch file: where their numbers are, whether they are there, and their numbers as arrays."""

import dataclasses
import math
from pathlib import Path
from typing import Any, Literal

import numpy as np

from t2t_vit_jax.errors import UserError

_MAX_AXES = 64  # NumPy's limit
DTYPES = {  # PyTorch's name -> its storage's, and NumPy's code; a bfloat16 is the upper half of a float32
  'float64': ('Double', 'f8'), 'float32': ('Float', 'f4'), 'float16': ('Half', 'f2'), 'bfloat16': ('BFloat16', 'u2'),
  'int64': ('Long', 'i8'), 'int32': ('Int', 'i4'), 'int16': ('Short', 'i2'), 'int8': ('Char', 'i1'),
  'uint64': ('', 'u8'), 'uint32': ('', 'u4'), 'uint16': ('', 'u2'), 'uint8': ('Byte', 'u1'), 'bool': ('Bool', '?'),
  'complex64': ('ComplexFloat', 'c8'), 'complex128': ('ComplexDouble', 'c16'),
  'qint8': ('QInt8', 'i1'), 'quint8': ('QUInt8', 'u1'), 'qint32': ('QInt32', 'i4'),
}  # fmt: skip


def itemsize(dtype: str) -> int:
  """Bytes of a number of PyTorch's type `dtype`."""
  return np.dtype(DTYPES[dtype][1]).itemsize


@dataclasses.dataclass(eq=False, slots=True)
class Storage:
  """Numbers in a file, to which tensors refer."""

  dtype: str
  nbytes: int
  path: Path | None = None  # known when the pickle has run, as is the rest
  position: int = 0
  byte_order: Literal['<', '>'] = '<'


@dataclasses.dataclass(eq=False, slots=True)
class Tensor:
  """Where the numbers of a tensor are; offset and strides count numbers, not bytes."""

  dtype: str = ''
  shape: tuple[int, ...] = ()
  strides: tuple[int, ...] = ()
  offset: int = 0
  storage: Storage = dataclasses.field(default_factory=lambda: Storage('', 0))
  defect: str | None = None  # reason why it can't be read

  @property
  def nbytes(self) -> int:
    return math.prod(self.shape) * itemsize(self.dtype)

  @property
  def span(self) -> int:
    """Numbers of the storage from the tensor's first to its last."""
    return 1 + sum((size - 1) * stride for size, stride in zip(self.shape, self.strides, strict=True))

  def read(self) -> np.ndarray:
    """Reads the numbers in their own type; bfloat16, which NumPy lacks, as float32."""
    code = np.dtype(DTYPES[self.dtype][1])
    numbers = np.zeros(0, code)
    if 0 not in self.shape:
      start = self.storage.position + self.offset * code.itemsize
      stored = code.newbyteorder(self.storage.byte_order)
      numbers = np.fromfile(str(self.storage.path), stored, self.span, offset=start).astype(code, copy=False)
      if numbers.size < self.span:
        raise UserError('became shorter while it was read')
    if self.dtype == 'bfloat16':
      numbers = (numbers.astype(np.uint32) << 16).view(np.float32)
    strides = [stride * numbers.itemsize for stride in self.strides]
    return np.lib.stride_tricks.as_strided(numbers, self.shape, strides)


def are_sizes(*sizes: Any) -> bool:
  """Whether all are whole numbers that a size or an offset can be."""
  return all(type(size) is int and 0 <= size < 1 << 63 for size in sizes)


def view(storage: Any, offset: Any, shape: Any, strides: Any, *rest: Any, dtype: str = '') -> Tensor:
  """A view of a storage, as PyTorch rebuilds it; `rest` is requires_grad, hooks and perhaps bits of complex numbers."""
  if not isinstance(storage, Storage) or type(shape) is not tuple or type(strides) is not tuple:
    raise ValueError('a tensor lacks its storage, shape or strides')
  if len(shape) != len(strides) or len(shape) > _MAX_AXES or not are_sizes(offset, *shape, *strides):
    raise ValueError('a tensor has an impossible shape, offset or strides')
  tensor = Tensor(dtype or storage.dtype, shape, strides, offset, storage)
  if any(rest[2:]):
    tensor.defect = 'negated or conjugated'
  elif tensor.dtype not in DTYPES:
    tensor.defect = f'of type {tensor.dtype}, not float32'
  elif 0 not in shape and (offset + tensor.span) * itemsize(tensor.dtype) > storage.nbytes:
    raise UserError(f'refused: a tensor of shape {shape} reaches beyond the {storage.nbytes:,} bytes of its storage')
  return tensor
