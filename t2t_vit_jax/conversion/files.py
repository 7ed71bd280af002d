"""Recognises weight files, which cannot be trusted, and writes new ones whole or not at all.

Errors here do not name the file: `problem` adds its name.
"""

from collections.abc import Callable, Iterator, Mapping
import contextlib
import hashlib
import io
import json
from multiprocessing import util
import os
from pathlib import Path
from typing import IO, Any, Literal
import zipfile

import numpy as np
import safetensors

from t2t_vit_jax.conversion.torch_pickle import Machine, type_name
from t2t_vit_jax.conversion.torch_tensors import Tensor, itemsize
from t2t_vit_jax.errors import UserError, first_line, printable, writing_problem

Format = Literal['zip', 'legacy', 'safetensors', 'index']

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
  with reading():
    if path.is_dir():
      raise UserError('is a directory; give the weight file itself, or the .index.json of its shards')
    if not path.is_file():
      raise UserError('is no regular file' if path.exists() else 'no such file')
    with path.open('rb') as file:
      start = file.read(512)
  if not start:
    raise UserError('is empty')
  if start[257:262] == b'ustar':
    raise UserError('is a real tar archive, which .pth.tar files are not: unpack it first')
  if start.startswith(_ZIP_START):
    return 'zip'
  if start.startswith(_LEGACY_START):
    return 'legacy'
  if start[8:9] == b'{' and int.from_bytes(start[:8], 'little') <= MAX_SAFETENSORS_HEADER:
    return 'safetensors'
  if start.lstrip().startswith(b'{'):
    return 'index'
  raise UserError(f'is neither a PyTorch checkpoint nor a safetensors file: it starts with {start[:12]!r}')


def sha256(*paths: Path) -> str:
  """Hexadecimal digest of a file, or of several one after another."""
  digest = hashlib.sha256()
  with reading():
    for path in paths:
      with path.open('rb') as file:
        hashlib.file_digest(file, lambda: digest)
  return digest.hexdigest()


def read_index(path: Path) -> dict[Path, list[str]]:
  """Reads an index of shards, as Hugging Face's libraries write it: shard, beside the index -> names of its tensors.

  Raises:
    UserError: it is no such index, or a shard is missing or lies elsewhere.
  """
  with reading():
    if path.stat().st_size > MAX_SAFETENSORS_HEADER:
      raise UserError('is too large for an index of shards')
    weight_map = json.loads(path.read_bytes()).get('weight_map')
  if not weight_map or not isinstance(weight_map, dict) or not all(isinstance(x, str) for x in weight_map.values()):
    raise UserError('is JSON, but no index of shards: it has no weight_map of tensors to files')
  shards: dict[Path, list[str]] = {}
  for tensor, name in weight_map.items():
    if name in ('', '.', '..') or Path(name).name != name:
      raise UserError(f'refused: its shard {name!r} does not lie beside it')
    shards.setdefault(path.with_name(name), []).append(tensor)
  for shard in shards:
    if not shard.exists():
      raise UserError(f'its shard {shard.name} is missing: put all {len(shards)} shards beside it')
  return shards


def read_torch(path: Path, file_format: Format) -> Any:
  """Reads a PyTorch file ('zip' or 'legacy') of containers, numbers, strings and tensors; other objects are `Opaque`.

  Raises:
    UserError: the file is damaged, is no checkpoint, declares more than it holds, or asks for what no checkpoint needs.
  """
  with reading(), _BoundedReader(io.FileIO(path)) as file:
    return (_read_zip if file_format == 'zip' else _read_legacy)(file, path)


class _BoundedReader(io.BufferedReader):
  """A file that allocates no more for a read than is left of it, whatever length a pickle declares."""

  def read(self, count: int | None = -1, /) -> bytes:
    if count is not None and count > 1000:
      count = max(0, min(count, os.fstat(self.fileno()).st_size - self.tell()))
    return super().read(count)


def _read_zip(file: IO[bytes], path: Path) -> Any:
  size = os.fstat(file.fileno()).st_size
  with zipfile.ZipFile(file) as archive:
    members = {member.filename: member for member in archive.infolist()}
    if any(name.endswith('/constants.pkl') or '/code/' in name for name in members):
      raise UserError('is a TorchScript archive, which is a program: save its state_dict() instead')
    declared = sum(member.file_size for member in archive.infolist())
    if declared > size or any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
      raise UserError(
        f'refused: unlike PyTorch files it is compressed, or declares {declared:,} bytes in a file of {size:,}'
      )
    root = next(iter(members), '').split('/')[0]
    if f'{root}/data.pkl' not in members:
      raise UserError('is a zip archive but not a PyTorch checkpoint')
    machine = Machine()
    saved = machine.run(io.BytesIO(archive.read(f'{root}/data.pkl')))
    places = {}
    for key in machine.storages:
      member = members[f'{root}/data/{key}']
      file.seek(member.header_offset + 26)  # its own header, of 30 bytes and two fields whose lengths stand here
      lengths = int.from_bytes(file.read(2), 'little') + int.from_bytes(file.read(2), 'little')
      places[key] = (member.header_offset + 30 + lengths, member.file_size)
    big_endian = f'{root}/byteorder' in members and archive.read(f'{root}/byteorder') == b'big'
    machine.place(places, path, '>' if big_endian else '<')
    if damaged := archive.testzip():
      raise UserError(f'is damaged: wrong checksum of {damaged}')
  return saved


def _read_legacy(file: IO[bytes], path: Path) -> Any:
  """Reads the format of PyTorch before 1.6: five pickles one after another, then each storage after its length."""
  if [Machine().run(file) for _ in range(3)][1] != 1001:
    raise UserError('is of a version of the old PyTorch format that is not known')
  machine, places = Machine(), {}
  saved = machine.run(file)
  for key in Machine().run(file):
    if type(key) is not str:
      raise ValueError('a storage has no name')
    nbytes = int.from_bytes(file.read(8), 'little') * itemsize(machine.storages[key].dtype)
    places[key] = (file.tell(), nbytes)
    file.seek(nbytes, os.SEEK_CUR)
  machine.place(places, path, '<')
  return saved


def tensors_to_arrays(tensors: Mapping[Any, Any], max_bytes: int) -> dict[str, np.ndarray]:
  """Float32 arrays of a state dict's tensors; float16 and bfloat16 are widened, which is exact, and float64 is rounded.

  Arrays, which a safetensors file has in their place, stay as they are.

  Raises:
    UserError: entries are no ordinary floating-point tensors (the message lists them), or together exceed `max_bytes`.
  """
  defects = [f'{name} is {defect}' for name, tensor in tensors.items() if (defect := _defect(name, tensor))]
  if defects:
    raise UserError('; '.join(defects))
  if sum(tensor.nbytes for tensor in tensors.values()) > max_bytes:
    raise UserError('refused: its tensors share their numbers, and together declare far more than the file holds')
  with reading():
    return {
      name: (tensor.read() if isinstance(tensor, Tensor) else tensor).astype(np.float32, copy=False)
      for name, tensor in tensors.items()
    }


def _defect(name: Any, tensor: Any) -> str | None:
  """Reason why an entry is not a name with a plain tensor of floating-point numbers; None if it is, or is an array."""
  if not isinstance(name, str):
    return f'a {type_name(name)}, not a name'
  if isinstance(tensor, np.ndarray):
    return None
  if not isinstance(tensor, Tensor):
    return f'of type {type_name(tensor)}, not a tensor'
  if tensor.defect:
    return tensor.defect
  if tensor.dtype not in ('float64', 'float32', 'float16', 'bfloat16'):
    return f'of type {tensor.dtype}, not float32'
  if tensor.nbytes > tensor.storage.nbytes:  # strides of 0 repeat numbers
    return f'{tensor.shape}, which is more than its storage holds'
  return None


def read_metadata(path: Path) -> dict[str, str]:
  """The metadata of a safetensors file."""
  with reading(), safetensors.safe_open(path, framework='np') as file:
    return file.metadata() or {}


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
  """Float32 arrays of a safetensors file; float16 and bfloat16 are widened.

  Raises:
    UserError: the file is damaged, or has tensors of other types (the message lists them).
  """
  with reading(), safetensors.safe_open(path, framework='np') as file:
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


def write_file(path: Path, write: Callable[[Path], object], needed: int = 0) -> None:
  """Calls `write` with a temporary name beside `path`, then renames: nobody ever sees half a file at `path`.

  Args:
    path: the file.
    write: writes it at the path that it is called with.
    needed: its size in bytes, at least; 0 if nobody knows.

  Raises:
    UserError: `path` can't be written.
  """
  temporary = path.with_name(f'.{os.getpid()}.tmp')  # short: the name itself may be as long as names can be
  delete = util.Finalize(None, _delete, (temporary,), exitpriority=0)  # also if Ctrl-C ends a write that waits for JAX
  try:
    temporary.touch()
    mode = temporary.stat().st_mode
    write(temporary)
    temporary.chmod(mode)  # safetensors lets only the owner read its files
    with temporary.open('rb') as file:
      os.fsync(file.fileno())
    temporary.replace(path)
  except (OSError, safetensors.SafetensorError) as error:
    delete()  # first: the free space that is named is without it
    raise problem(path, f'cannot be written: {writing_problem(error, path, needed)}') from error
  finally:
    delete()


def _delete(temporary: Path) -> None:
  with contextlib.suppress(OSError):  # on a read-only disk another error says more
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def reading() -> Iterator[None]:
  """Turns every error of the libraries that parse a file into a UserError of one line."""
  try:
    yield
  except UserError:
    raise
  except OSError as error:
    raise UserError(f'cannot be read: {first_line(error)}') from error
  except Exception as error:
    raise UserError(f'damaged or not a weight file: {first_line(error)}') from error
