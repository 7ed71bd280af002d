"""Finds weights by name: published ones, fetched once and converted, those of a run, those of a hub's repository."""

from collections.abc import Iterator
import contextlib
import dataclasses
import os
from pathlib import Path
import re
import sys
import time
from typing import Any

import filelock
import pooch
import requests

from t2t_vit_jax.console import note, warn
from t2t_vit_jax.conversion import files
from t2t_vit_jax.conversion.convert import Options, PathLike, load, log_notes
from t2t_vit_jax.conversion.weight_format import ImageSize, Weights, write_weights
from t2t_vit_jax.errors import UserError, did_you_mean, first_line, printable, require, writing_problem
from t2t_vit_jax.models.published import PUBLISHED, Published
from t2t_vit_jax.models.t2t_vit import T2TViT
from t2t_vit_jax.models.variants import VARIANTS

# Environment variables.
CACHE = 'T2T_VIT_JAX_CACHE'  # folder for published weights; default: the platform's cache folder
MIRROR = 'T2T_VIT_JAX_MIRROR'  # URL of a folder with the published files, in place of the publishers' servers

FOLDER, MODEL = 'weights', 'model.safetensors'  # in a run's workdir; a repository of the hub has the file alone
HUB = 'hf://'
HELP = 'weight file, run folder, name of published weights (t2t-vit weights lists them) or hf://USER/REPO'
_TIMEOUTS = (10, 60)  # seconds to connect, and between two pieces of a file
_PAUSES = (1, 4, 16)  # seconds before a download that broke off goes on


def load_pretrained(
  source: PathLike, num_classes: int | None = None, image_size: ImageSize | None = None, **options: Any
) -> tuple[T2TViT, dict[str, Any]]:
  """Model and variables of published weights, of a run, of a repository on a hub, or of a file.

  >>> model, variables = load_pretrained('t2t_vit_14')
  >>> logits = model.apply(variables, images)  # (B, H, W, 3) -> (B, num_classes)

  Args:
    source: see `find_weights`. A PyTorch checkpoint is converted in memory.
    num_classes: another number than the weights' gives a fresh head, to be trained; 0 gives none.
    image_size: pixels, a side or (height, width); another than the weights' resizes the stored position table.
    **options: further fields of `Options`.

  Returns:
    The model, float32, and its variables as JAX arrays.

  Raises:
    UserError: one line that names the file and every tensor at fault.
  """
  try:
    weights, notes = load(find_weights(source), Options(num_classes=num_classes, image_size=image_size, **options))
  except UserError as error:
    raise UserError(_advice_for_python(str(error))) from error
  log_notes(source, notes)
  return weights.build()


def load_classifier(source: PathLike, image_size: ImageSize | None = None) -> tuple[Weights, list[str]]:
  """Reads weights of a model that classifies RGB or grey images: it has a head, and their mean and deviation.

  Args:
    source: see `find_weights`; a PyTorch checkpoint is refused, since it may lack facts that only `Options` can give.
    image_size: px; None for the image size of the weights.

  Returns:
    The weights, and notes for the user on what was changed.

  Raises:
    UserError: the weights can't be read, or are of a model that cannot classify such images.
  """
  path = find_weights(source)
  weights, notes = load(path, Options(image_size=image_size), only_converted=True)
  lengths = {len(weights.data[field]) for field in ('mean', 'std')}
  if weights.channels not in (1, 3) or lengths != {weights.channels} or not weights.arguments['num_classes']:
    raise files.problem(path, 'holds no model with a head, and the mean and deviation of RGB or grey images')
  return weights, notes


def _advice_for_python(message: str) -> str:
  """A message that names arguments of `load_pretrained` in place of flags of convert_torch_weights.py."""
  message = re.sub(r'--set=(\w+)=(\w+)', r"settings={'\1': \2}", message).replace('HEIGHTxWIDTH', '(HEIGHT, WIDTH)')
  return re.sub(r'--weights=(\w+)', r"weights='\1'", re.sub(r'--model=(\w+)', r"model_name='\1'", message))


def is_name(source: str) -> bool:
  """Whether `find_weights` takes `source` for a name, whatever files and folders there are."""
  return source in PUBLISHED or source.startswith(HUB)


def find_weights(source: PathLike) -> Path:
  """Path of the weight file that `source` names.

  Args:
    source: the file itself; a run's folder, or its folder `weights`; a name of `list_models(pretrained=True)`, whose
      file is fetched into the cache folder and converted, once; or hf://USER/REPO[@REVISION], a repository on Hugging
      Face's hub that holds such a folder `weights`.

  Raises:
    UserError: there are no such weights, or they can't be fetched.
  """
  name = os.path.expanduser(source)
  path = Path(name)
  if name.startswith(HUB):
    return _from_hub(name)
  if name in PUBLISHED:
    if os.path.lexists(path):
      warn(f'{name} are the published weights; for the file or folder of this name write .{os.sep}{name}')
    return fetch(name)
  if path.is_dir():
    return _in_folder(path)
  if name in VARIANTS and not path.exists():
    raise UserError(f'weights of {name} were never published; there are: {", ".join(PUBLISHED)}')
  if not path.exists():
    if path.name == name and not path.suffix:
      advice = f'nor are weights of this name published: {did_you_mean(name, PUBLISHED)}'
    else:
      advice = 'weights are a file, the folder of a run, a name that t2t-vit weights lists, or hf://USER/REPO'
    raise files.problem(path, f'no such file or folder; {advice}')
  return path


def _in_folder(folder: Path) -> Path:
  for path in (folder / FOLDER / MODEL, folder / MODEL):
    if path.is_file():
      return path
  if (folder / 'checkpoints').is_dir():
    raise files.problem(folder, f'is a run without weight files so far: python train.py --export={folder} writes them')
  raise files.problem(folder, f'is a folder without {MODEL}: give the weight file itself')


def _from_hub(source: str) -> Path:
  """Fetches the weight file of a repository with the hub's own client, which keeps it in its own cache."""
  match = re.fullmatch(HUB + r'([\w.-]+/[\w.-]+)(?:@([\w./-]+))?', source)
  if match is None:
    raise UserError(printable(f'{source}: must be {HUB}USER/REPO or {HUB}USER/REPO@REVISION'))
  require(source, 'huggingface_hub')
  import huggingface_hub

  try:
    return Path(huggingface_hub.hf_hub_download(match[1], MODEL, revision=match[2], library_name='t2t_vit_jax'))
  except Exception as error:  # of the client, of the HTTP library below it, of the disk
    text = ' '.join(str(error).split())[:300]  # of several lines, of which the first may say little
    raise UserError(printable(f'{source}: {MODEL} cannot be fetched ({type(error).__name__}: {text})')) from error


def cache_folder() -> Path:
  """Folder of the published weights that were fetched."""
  return Path(os.environ.get(CACHE) or pooch.os_cache('t2t_vit_jax')).expanduser()


def cached_file(name: str) -> Path:
  """Path that the published weights `name` have in the cache folder, whether they are there or not."""
  return cache_folder() / f'{name}.safetensors'


def fetch(name: str) -> Path:
  """Path of the published weights `name` in the cache folder, where they are put first if they are not there.

  Of several processes that call this, on one or on several hosts that share the folder, one fetches the file.

  Raises:
    UserError: the file can't be fetched, is not the published one, or the folder can't be written.
  """
  target = cached_file(name)
  if _is_whole(target):
    return target
  folder = target.parent
  try:
    folder.mkdir(parents=True, exist_ok=True)
    with _locked(target):
      if not _is_whole(target):
        if target.exists():
          warn(f'{target} was damaged or changed since it was fetched: it is replaced')
        _put(PUBLISHED[name], target)
  except (OSError, NotImplementedError) as error:  # the latter of a file system without locks
    reason = writing_problem(error, folder)
    raise UserError(f'{name}: {folder} cannot be written ({reason}): set {CACHE} to another folder') from error
  return target


@contextlib.contextmanager
def _locked(target: Path) -> Iterator[None]:
  """Holds the lock of a file in the cache, which the operating system frees if this process ends."""
  lock = filelock.FileLock(target.with_suffix('.lock'))
  try:
    lock.acquire(timeout=1)
  except filelock.Timeout:
    note(f'another process fetches {target.name}: waiting for it')
    lock.acquire()
  try:
    yield
  finally:
    lock.release()


def _checksum_file(target: Path) -> Path:
  return target.with_name(f'{target.name}.sha256')  # in the form that `sha256sum --check` reads


def _is_whole(target: Path) -> bool:
  """Whether a file of the cache has the checksum that was kept when it was put there."""
  try:
    expected = _checksum_file(target).read_text('utf-8').split()[:1]
  except (OSError, UnicodeDecodeError):
    return False
  try:
    return target.is_file() and expected == [files.sha256(target)]
  except UserError as error:
    raise files.problem(target, str(error)) from error


def _put(row: Published, target: Path) -> None:
  """Fetches and converts a published file; its download is deleted, but not a file that somebody else put there."""
  download = target.with_name(row.file)
  fetched = not download.exists()
  if fetched:
    _download(row, download)
  try:
    weights = _read(row, download)
  except UserError as error:
    if fetched:
      download.unlink()
    advice = 'the same command fetches it again' if fetched else f'delete it, or put the file of {row.url} there'
    raise UserError(f'{error}: this is not the published file; {advice}') from error
  write_weights(weights, target)
  files.write_file(
    _checksum_file(target), lambda temporary: temporary.write_text(f'{files.sha256(target)}  {target.name}\n')
  )
  if fetched:
    download.unlink()


def _read(row: Published, path: Path) -> Weights:
  """Reads a published file.

  Raises:
    UserError: it is not what the table says of it.
  """
  size = path.stat().st_size
  if row.size not in (None, size):
    raise files.problem(path, f'is of {size:,} bytes instead of {row.size:,}')
  weights, _ = load(path, Options(model_name=row.model))
  digest = weights.source['sha256']
  if not digest.startswith(row.sha256):
    raise files.problem(path, f'has the SHA-256 {digest}, which does not begin with {row.sha256}')
  wrong = [
    f'{field}={weights.arguments[field]} instead of {getattr(row, field)}'
    for field in ('num_classes', 'image_size')
    if weights.arguments[field] != getattr(row, field)
  ]
  if wrong:
    raise files.problem(path, f'has {", ".join(wrong)}')
  return dataclasses.replace(weights, source={**weights.source, 'url': row.url})


def _download(row: Published, path: Path) -> None:
  """Fetches a published file, going on where an earlier call broke off; it appears at `path` when it is complete.

  Raises:
    UserError: it can't be fetched; the message says where to put it by hand.
  """
  mirror = os.environ.get(MIRROR)
  url = f'{mirror.rstrip("/")}/{row.file}' if mirror else row.url
  part = path.with_name(f'{path.name}.part')
  note(f'fetching {url} ({row.download_size}) into {path.parent}')
  for pause in (*_PAUSES, None):
    before = _size(part)
    try:
      _go_on(url, part)
      break
    except requests.RequestException as error:
      if pause is None or not (_size(part) > before or _may_go_on(error)):
        advice = f'try later, or fetch it elsewhere and put it into {path.parent}'
        raise UserError(printable(f'{url} cannot be fetched ({_reason(error)}): {advice}')) from error
      note(f'the download broke off ({_reason(error)}): it goes on in {pause} s')
      time.sleep(pause)
  part.replace(path)
  _version_file(part).unlink(missing_ok=True)


def _size(path: Path) -> int:
  return path.stat().st_size if path.exists() else 0


def _may_go_on(error: requests.RequestException) -> bool:
  """Whether an answer broke off, or says that the server is overloaded or that more is here than the file has."""
  if error.response is None:
    return isinstance(error, requests.exceptions.ChunkedEncodingError)
  return error.response.status_code in (408, 416, 429, 500, 502, 503, 504)


def _reason(error: BaseException) -> str:
  """A line of the innermost error, where requests wraps that of urllib3, which wraps that of the system."""
  while error.__context__ is not None:
    error = error.__context__
  return first_line(error)


def _version_file(part: Path) -> Path:
  return part.with_name(f'{part.name}.etag')  # the server's name of the version of the file that `part` begins


def _go_on(url: str, part: Path) -> None:
  """Appends what `part` lacks of the file at `url`; begins anew if the server has another version by now."""
  version = _version_file(part)
  known = version.read_text('utf-8') if version.exists() and part.exists() else ''
  headers = {'Accept-Encoding': 'identity'}
  if known:
    headers |= {'Range': f'bytes={_size(part)}-', 'If-Range': known}

  with part.open('ab') as file:

    def begin(response: requests.Response, **unused: Any) -> None:
      if response.status_code in (200, 416):  # the whole file comes, or `part` is longer than it
        file.truncate(0)
        version.write_text(response.headers.get('ETag') or response.headers.get('Last-Modified') or '', 'utf-8')

    options: dict[str, Any] = dict(timeout=_TIMEOUTS, headers=headers, hooks={'response': begin})
    pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=2**16, **options)(url, file, None)
