"""Reads weight files that cannot be trusted, and writes new ones whole or not at all.

A PyTorch checkpoint is an archive around a pickle, which is a program. So its first bytes decide its format, the sizes
that it declares may not exceed the file's before anything is unpacked, and torch reads it with the restricted unpickler
only, from version 2.10 on (older ones could be made to run code or corrupt memory: CVE-2025-32434, CVE-2026-24747).
A file that needs more is refused; there is no second way. Errors here do not name the file: `problem` adds its name.
"""

import argparse
from collections.abc import Callable, Iterator, Mapping
import contextlib
import hashlib
import os
from pathlib import Path
import re
import tarfile
from typing import IO, Any, Literal
import warnings
import zipfile

import numpy as np
import safetensors

from t2t_vit_jax.errors import UserError, printable

Format = Literal['zip', 'legacy', 'safetensors']

_ZIP_START = b'PK\x03\x04'
_LEGACY_START = bytes.fromhex('80028a0a6cfc9c46f9206aa850192e')  # the pickled number that torch wrote first until 1.5
MAX_SAFETENSORS_HEADER = 100_000_000  # bytes; the format's own limit
_SAFETENSORS_FLOATS = ('F32', 'F16', 'BF16')


def problem(path: Path, text: str) -> UserError:
  """UserError about a file, on one line whatever characters its names contain."""
  return UserError(printable(f'{path}: {text}'))


def file_format(path: Path) -> Format:
  """Format of a weight file, decided by its first bytes, never by its name.

  Raises:
    UserError: the file is of no format that can be read safely; the message says what it is.
  """
  with _reading():
    if path.is_dir():
      raise UserError('is a directory; give the weight file itself')
    if not path.is_file():
      raise UserError('no such file')
    with path.open('rb') as file:
      start = file.read(512)
  if not start:
    raise UserError('is empty')
  if start.startswith(_ZIP_START):
    return 'zip'
  if start.startswith(_LEGACY_START):
    return 'legacy'
  if start[8:9] == b'{' and int.from_bytes(start[:8], 'little') <= MAX_SAFETENSORS_HEADER:
    return 'safetensors'
  if start[257:262] == b'ustar':
    raise UserError('is a real tar archive, which .pth.tar files are not: unpack it first')
  raise UserError(f'is neither a PyTorch checkpoint nor a safetensors file: it starts with {start[:12]!r}')


def sha256(path: Path) -> str:
  """Hexadecimal digest of a file."""
  with _reading(), path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def import_torch() -> Any:
  """The module torch, imported on demand; UserError if it is missing or too old to be safe."""
  try:
    import torch
  except ImportError as error:
    raise UserError("PyTorch files need torch: pip install 't2t-vit-jax[torch]'") from error
  if torch.torch_version.TorchVersion(torch.__version__) < '2.10':
    raise UserError(f'torch {torch.__version__} is not safe for reading checkpoints: install 2.10 or newer')
  return torch


def read_torch(path: Path, file_format: Format) -> Any:
  """Reads a PyTorch file ('zip' or 'legacy') of containers, numbers, strings and tensors only.

  Raises:
    UserError: the file is damaged, is no checkpoint, declares more than it holds, or asks for anything but tensors
      and an `argparse.Namespace`, which timm's training script saves.
  """
  torch = import_torch()
  with _reading(), path.open('rb') as file:
    if file_format == 'zip':
      _check_zip(file)
    elif tarfile.is_tarfile(file):
      raise UserError('is a tar archive')
    file.seek(0)
    with warnings.catch_warnings(), _only_namespace(torch.serialization):
      warnings.simplefilter('ignore')
      return torch.load(file, map_location='cpu', weights_only=True, mmap=False)


@contextlib.contextmanager
def _only_namespace(serialization: Any) -> Iterator[None]:
  """Lets torch build an `argparse.Namespace`, but nothing that other libraries have allowed in this process."""
  allowed = serialization.get_safe_globals()
  serialization.clear_safe_globals()
  try:
    with serialization.safe_globals([argparse.Namespace]):
      yield
  finally:
    serialization.add_safe_globals(allowed)


def _check_zip(file: IO[bytes]) -> None:
  """Raises UserError unless the directory of a zip file is that of a plain PyTorch checkpoint."""
  size = os.fstat(file.fileno()).st_size
  with zipfile.ZipFile(file) as archive:
    members = archive.infolist()
    if any(member.filename.endswith('/constants.pkl') or '/code/' in member.filename for member in members):
      raise UserError('is a TorchScript archive, which is a program: save its state_dict() instead')
    declared = sum(member.file_size for member in members)
    if declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
      raise UserError(
        f'refused: unlike PyTorch files it is compressed, or declares {declared:,} bytes in a file of {size:,}'
      )
    if not any(member.filename.endswith('/data.pkl') for member in members):
      raise UserError('is a zip archive but not a PyTorch checkpoint')
    if damaged := archive.testzip():
      raise UserError(f'is damaged: wrong checksum of {damaged}')


def tensors_to_arrays(tensors: Mapping[Any, Any], max_bytes: int) -> dict[str, np.ndarray]:
  """Float32 arrays of a state dict's tensors; float16 and bfloat16 are widened, which is exact, and float64 is rounded.

  Raises:
    UserError: entries are no ordinary floating-point tensors (the message lists them), or together exceed `max_bytes`.
  """
  torch = import_torch()
  defects = [f'{name} is {defect}' for name, tensor in tensors.items() if (defect := _defect(name, tensor, torch))]
  if defects:
    raise UserError('; '.join(defects))
  if sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) > max_bytes:
    raise UserError('refused: its tensors share their numbers, and together declare far more than the file holds')
  return {name: tensor.float().numpy(force=True) for name, tensor in tensors.items()}


def _defect(name: Any, tensor: Any, torch: Any) -> str | None:
  """Reason why an entry is not a name with a plain CPU tensor of floating-point numbers; None if it is."""
  if not isinstance(name, str):
    return f'a {type(name).__name__}, not a name'
  if not isinstance(tensor, torch.Tensor):
    return f'of type {type(tensor).__name__}, not a tensor'
  if tensor.is_quantized:
    return 'quantised'
  if tensor.layout != torch.strided or tensor.is_nested:
    return 'sparse or nested'
  if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.device.type != 'cpu':
    return f'no plain tensor with data but a {type(tensor).__name__} on {tensor.device.type}'
  if tensor.dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
    return f'of type {str(tensor.dtype).removeprefix("torch.")}, not float32'
  if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():  # strides of 0 repeat numbers
    return f'{tuple(tensor.shape)}, which is more than its storage holds'
  return None


def read_metadata(path: Path) -> dict[str, str]:
  """The metadata of a safetensors file."""
  with _reading(), safetensors.safe_open(path, framework='np') as file:
    return file.metadata() or {}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
  """Float32 arrays of a safetensors file; float16 and bfloat16 are widened.

  Raises:
    UserError: the file is damaged, or has tensors of other types (the message lists them).
  """
  with _reading(), safetensors.safe_open(path, framework='np') as file:
    dtypes = {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118 (not a mapping)
    defects = [f'{name} is of type {x}, not F32' for name, x in dtypes.items() if x not in _SAFETENSORS_FLOATS]
    if defects:
      raise UserError('; '.join(defects))
    return {name: file.get_tensor(name).astype(np.float32, copy=False) for name in dtypes}


def check_output(path: Path, *, force: bool) -> None:
  """Raises UserError unless a file may be written at `path`; to be called before the work, not after it."""
  try:
    if path.is_dir() or not path.absolute().parent.is_dir():
      raise problem(path, 'cannot be written: it is a folder, or its folder does not exist')
    if path.exists() and not force:
      raise problem(path, 'exists already; --force overwrites it')
  except OSError as error:
    raise problem(path, f'cannot be written: {error.strerror}') from error


def write_file(path: Path, write: Callable[[Path], object]) -> None:
  """Calls `write` with a temporary name beside `path`, then renames: nobody ever sees half a file at `path`.

  Raises:
    UserError: `path` can't be written.
  """
  temporary = path.with_name(f'.{os.getpid()}.tmp')  # short: the name itself may be as long as names can be
  try:
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)  # safetensors lets only the owner read its files
    with temporary.open('rb') as file:
      os.fsync(file.fileno())
    temporary.replace(path)
  except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch raises RuntimeError for a full disk
    raise problem(path, f'cannot be written: {_first_line(error)}') from error
  finally:
    with contextlib.suppress(OSError):  # on a read-only disk the error above says more
      temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _reading() -> Iterator[None]:
  """Turns every error of the libraries that parse a file into a UserError of one line."""
  try:
    yield
  except UserError:
    raise
  except OSError as error:
    raise UserError(f'cannot be read: {_first_line(error)}') from error
  except Exception as error:
    if wanted := re.search(r'GLOBAL ([\w.]+)', str(error)):
      raise UserError(f'refused: it wants to import {wanted[1]}, which no file of tensors needs') from error
    raise UserError(f'damaged or not a weight file: {_first_line(error)}') from error


def _first_line(error: Exception) -> str:
  """The line of an exception that names the cause: torch puts paragraphs of advice before it."""
  text = re.sub(r'.*WeightsUnpickler error: ', '', str(error), flags=re.DOTALL).strip()
  return f'{type(error).__name__}: {text}'.splitlines()[0][:300]
