"""Serves an exported model over HTTP: python examples/serve.py MODEL.npz

POST an image to /classify; / is a page to try it. docs/serving.md describes answers, limits and figures.
"""

import argparse
import asyncio
import base64
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
import contextlib
import io
import json
import os
from pathlib import Path
import signal
import socket
import sys
from typing import Any
import zipfile

import jax
from jax import export
import jax.numpy as jnp
import numpy as np
from PIL import Image

from t2t_vit_jax.command_line import Parser, fail, run_tool
from t2t_vit_jax.data.class_names import readable_names
from t2t_vit_jax.data.decoding import ORIENTATIONS, BadImage, EncodedImage
from t2t_vit_jax.data.transforms import ResizeCenterCrop, pixels_of
from t2t_vit_jax.errors import MissingExtraError, UserError, first_line, printable, require

try:
  require('serving', 'starlette', 'uvicorn')
except MissingExtraError as error:
  fail(str(error))

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, JSONResponse, Response
from starlette.routing import Route
import uvicorn

PAGE = Path(__file__).with_suffix('.html')
TOP = 5  # classes of an answer
PAGE_HEADERS = {'Content-Security-Policy': "default-src 'self' 'unsafe-inline'; img-src 'self' blob: data:"}

Results = tuple[np.ndarray, ...]  # of one image: probabilities (TOP,), labels (TOP,) and perhaps attention


class Refused(Exception):  # noqa: N818 (an answer)
  """A request that is answered with a status code and one line."""

  def __init__(self, status: int, reason: str):
    super().__init__(reason)
    self.status = status


class ExportedModel:
  """A file of `t2t-vit export`: prepares images as evaluation does, and classifies batches of them."""

  def __init__(self, path: Path):
    """Reads the file.

    Raises:
      UserError: it is no such file.
    """
    try:
      with path.open('rb') as stream:
        if not zipfile.is_zipfile(stream):  # numpy would take it for a pickle
          raise ValueError('no .npz file')
      with np.load(path) as file:
        arrays = dict(file)
      self.metadata = json.loads(str(arrays.pop('metadata')))
      program = export.deserialize(bytearray(arrays.pop('program')))
      height, width = self.metadata['image_size']
      self.shape = (height, width, len(self.metadata['mean']))
      crop_fraction, interpolation = self.metadata['crop_fraction'], self.metadata['interpolation']
      self._crop = ResizeCenterCrop((height, width), crop_fraction, interpolation, self.shape[2])
      self._upright = ORIENTATIONS[self.metadata.get('orientation', 'upright')]
      self.class_names = readable_names(self.metadata['class_names'], self.metadata['num_classes'])
    except OSError as error:
      raise UserError(f'{path}: cannot be read: {error.strerror or first_line(error)}') from error
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
      advice = 't2t-vit export writes one'
      raise UserError(f'{path}: is no exported model ({first_line(error)}): {advice}') from error
    self.has_attention = 'attention' in self.metadata.get('outputs', ())
    weights, top = jax.device_put(arrays), min(TOP, len(self.class_names))

    @jax.jit
    def classify(weights: Any, images: jax.Array) -> Any:
      logits, *attention = jax.tree.leaves(program.call(weights, images))
      return (*jax.lax.top_k(jax.nn.softmax(logits), top), *attention)

    self._classify = lambda images: jax.device_get(classify(weights, images))

  def prepare(self, encoded: bytes) -> Image.Image:
    """Decodes an image file and cuts it to the model's size, as `t2t_vit_jax.predict` does.

    Raises:
      Refused: it is no image file (415), has too many pixels (413) or is damaged (400).
    """
    try:
      return self._crop(EncodedImage(encoded, upright=self._upright).decode())
    except BadImage as error:
      if isinstance(error.__cause__, Image.DecompressionBombError):
        raise Refused(413, str(error)) from error
      no_image = isinstance(error.__cause__, Image.UnidentifiedImageError)
      raise Refused(415 if no_image else 400, f'the image cannot be read: {error}') from error

  def classify(self, images: list[np.ndarray]) -> list[Results]:
    """Classifies images (height, width, C), in a batch whose size is the next power of two."""
    batch = np.zeros((1 << (len(images) - 1).bit_length(), *self.shape), np.uint8)
    batch[: len(images)] = images
    return list(zip(*self._classify(jnp.asarray(batch)), strict=True))[: len(images)]


class Batcher:
  """Collects requests and computes them together, in one thread."""

  def __init__(self, compute: Callable[[list[np.ndarray]], list[Results]], max_batch: int, wait: float):
    """Takes the function that computes a batch, its largest size, and the seconds to wait for more images."""
    self._compute, self._max_batch, self._wait = compute, max_batch, wait
    self._queue: asyncio.Queue[tuple[np.ndarray, asyncio.Future[Results]]] = asyncio.Queue()
    self._thread = ThreadPoolExecutor(1)

  async def submit(self, image: np.ndarray) -> Results:
    """The results of one image; what `compute` raises for its batch is raised here."""
    future = asyncio.get_running_loop().create_future()
    await self._queue.put((image, future))
    return await future

  async def run(self) -> None:
    """Computes batch after batch until it is cancelled."""
    while True:
      requests = [await self._queue.get()]
      with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(self._wait):
          while len(requests) < self._max_batch:
            requests.append(await self._queue.get())
      requests = [request for request in requests if not request[1].done()]  # nobody waits for the others
      if not requests:
        continue
      try:
        images = [image for image, _ in requests]
        results = await asyncio.get_running_loop().run_in_executor(self._thread, self._compute, images)
      except Exception as error:
        for _, future in requests:
          if not future.done():
            future.set_exception(error)
        continue
      for (_, future), result in zip(requests, results, strict=True):
        if not future.done():
          future.set_result(result)


class Service:
  """The HTTP application around a model."""

  def __init__(self, model: ExportedModel, limits: argparse.Namespace):
    self._model, self._limits = model, limits
    self._batcher = Batcher(model.classify, limits.batch_size, limits.wait_ms / 1000)
    self._decoders = ThreadPoolExecutor(os.cpu_count())  # as many images are decoded, and in memory, at a time
    self._waiting = 0
    routes = [Route('/', self.page), Route('/health', self.health), Route('/classify', self.classify, methods=['POST'])]
    handlers: Any = {Refused: _answer_refused, HTTPException: _answer_refused}
    self.app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self._lifespan)

  @contextlib.asynccontextmanager
  async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
    task = asyncio.create_task(self._batcher.run())
    yield
    task.cancel()

  async def page(self, request: Request) -> Response:
    """The page to try the model with."""
    return FileResponse(PAGE, headers=PAGE_HEADERS)

  async def health(self, request: Request) -> Response:
    """Answers with the model that is served, and the number of requests at work."""
    metadata = self._model.metadata
    facts = {'model': metadata['model'], 'image_size': metadata['image_size'], 'classes': metadata['num_classes']}
    return JSONResponse({'status': 'ok', **facts, 'attention': self._model.has_attention, 'waiting': self._waiting})

  async def classify(self, request: Request) -> Response:
    """Answers with the likeliest classes of the image that is the request's body."""
    if self._waiting >= self._limits.max_waiting:
      raise Refused(503, f'{self._waiting} requests are waiting already: try again later')
    self._waiting += 1
    try:
      async with asyncio.timeout(self._limits.timeout):
        encoded = await self._read(request)
        prepared = await asyncio.get_running_loop().run_in_executor(self._decoders, self._model.prepare, encoded)
        results = await self._batcher.submit(pixels_of(prepared))
    except TimeoutError as error:
      raise Refused(503, f'no answer within {self._limits.timeout:g} s: try again later') from error
    except ClientDisconnect:
      return Response(status_code=400)  # nobody reads it
    finally:
      self._waiting -= 1
    return JSONResponse(self._answer(results, prepared if 'attention' in request.query_params else None))

  async def _read(self, request: Request) -> bytes:
    """The body.

    Raises:
      Refused: it is too large, empty, or a form.
    """
    if request.headers.get('content-type', '').startswith('multipart/'):
      raise Refused(415, 'the body must be the image file itself, not a form (curl: --data-binary @FILE)')
    most, body = self._limits.max_bytes, bytearray()
    too_large = Refused(413, f'the image file has more than {most:,} bytes')
    if request.headers.get('content-length', '0').isdigit() and int(request.headers.get('content-length', '0')) > most:
      raise too_large
    async for chunk in request.stream():
      body += chunk
      if len(body) > most:
        raise too_large
    if not body:
      raise Refused(400, 'the body is empty: it must be an image file')
    return bytes(body)

  def _answer(self, results: Results, image: Image.Image | None) -> dict[str, Any]:
    """The JSON for one image; with `image`, as prepared, that too, and the attention in each block."""
    probabilities, labels, *attention = results
    if not np.isfinite(probabilities).all():
      raise Refused(500, 'the model gives no finite probabilities: its weights are damaged or not trained')
    pairs = zip(labels.tolist(), probabilities.tolist(), strict=True)
    answer: dict[str, Any] = {
      'predictions': [{'label': x, 'name': self._model.class_names[x], 'probability': y} for x, y in pairs]
    }
    if image is None:
      return answer
    if not attention:
      raise Refused(400, 'this file gives no attention: export it with --attention')
    file = io.BytesIO()
    image.save(file, 'PNG')
    picture = f'data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}'
    return {**answer, 'image': picture, 'attention': np.round(attention[0].astype(float), 6).tolist()}


async def _answer_refused(request: Request, error: Exception) -> Response:
  """The answer to what is refused, by us or by the framework: {"error": one line}."""
  if isinstance(error, HTTPException):
    return JSONResponse({'error': error.detail}, error.status_code, headers=error.headers)
  assert isinstance(error, Refused)
  headers = {'Retry-After': '1'} if error.status == 503 else None
  return JSONResponse({'error': printable(str(error))}, error.status, headers=headers)


class Server(uvicorn.Server):
  """Uvicorn's server: prints a line when it listens, and ends after SIGINT or SIGTERM without raising it again."""

  def __init__(self, config: uvicorn.Config, line: str):
    super().__init__(config)
    self._line = line

  async def startup(self, sockets: list[socket.socket] | None = None) -> None:
    await super().startup(sockets)
    print(self._line, flush=True)

  @contextlib.contextmanager
  def capture_signals(self) -> Iterator[None]:
    for number in (signal.SIGINT, signal.SIGTERM):
      signal.signal(number, self.handle_exit)
    yield


def listener(host: str, port: int) -> socket.socket:
  """A socket at an address, on which nobody listens yet.

  Raises:
    UserError: the address is taken or not this machine's.
  """
  try:
    family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    found.bind((host, port))
  except (OSError, OverflowError) as error:
    raise UserError(f'--host={host} --port={port}: {first_line(error, kind=False)}') from error
  return found


def serve(arguments: argparse.Namespace) -> int:
  """Serves until SIGINT or SIGTERM; returns the exit code."""
  Image.MAX_IMAGE_PIXELS = arguments.max_pixels // 2  # Pillow refuses images of more than twice as many
  model = ExportedModel(arguments.model)
  place = listener(arguments.host, arguments.port)
  size = 1
  while size < 2 * arguments.batch_size:  # compiles each size of batch before the first request
    model.classify([np.zeros(model.shape, np.uint8)] * min(size, arguments.batch_size))
    size *= 2
  config = uvicorn.Config(
    Service(model, arguments).app, log_level='warning', timeout_graceful_shutdown=int(arguments.timeout) + 1
  )
  host, port = place.getsockname()[:2]
  line = f'serving {arguments.model} on http://{f"[{host}]" if ":" in host else host}:{port}'
  Server(config, line).run(sockets=[place])
  print('stopped')
  return 0


def _number(kind: type, least: float) -> Callable[[str], Any]:
  """Type of a flag: a number from `least` on."""

  def number(text: str) -> Any:
    value = kind(text)
    if not least <= value < float('inf'):
      raise ValueError
    return value

  return number


def main(argv: list[str] | None = None) -> int:
  """Command line; returns the exit code."""
  program = 'python examples/serve.py'
  parser = Parser('serve', prog=program, example=f'{program} model.npz', description=__doc__.split(':')[0])
  whole, seconds = _number(int, 1), _number(float, 0)
  parser.add_argument('model', metavar='MODEL', type=Path, help='a file that t2t-vit export wrote')
  parser.add_argument('--host', default='127.0.0.1', help='address to listen on (default: %(default)s, this machine)')
  parser.add_argument('--port', type=_number(int, 0), default=8000, help='0 for any (default: %(default)s)')
  limits: list[tuple[str, Any, Any, str]] = [
    ('batch_size', whole, 8, 'images computed at a time, at most'),
    ('wait_ms', seconds, 5.0, 'milliseconds to wait for more images before a batch is computed'),
    ('max_bytes', whole, 20_000_000, 'size of an image file, at most'),
    ('max_pixels', _number(int, 2), 50_000_000, 'pixels of an image, at most'),
    ('max_waiting', whole, 64, 'requests at work or waiting; further ones are refused'),
    ('timeout', _number(float, 0.001), 30.0, 'seconds until a request is given up'),
  ]
  for name, kind, default, text in limits:
    parser.add_argument(f'--{name}', metavar='N', type=kind, default=default, help=f'{text} (default: %(default)s)')
  return run_tool(lambda: serve(parser.parse_args(argv)))


if __name__ == '__main__':
  sys.exit(main())
