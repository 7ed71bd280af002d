"""The real server of examples/serve.py on loopback, with a golden model: answers, limits, refusals and the end."""

import base64
from concurrent.futures import ThreadPoolExecutor
import contextlib
import http.client
import io
import json
from pathlib import Path
import re
import signal
import socket
import struct
import sys
import time
import zlib

import numpy as np
from PIL import Image
import pytest

from t2t_vit_jax.export import export_weights
from t2t_vit_jax.predict import open_classifier, predict
from t2t_vit_jax.visualize import look_inside
from tests import golden
from tests.parameters import slow
from tests.processes import ROOT, end_all, start_command, started

pytestmark = [pytest.mark.needs('starlette'), pytest.mark.needs('uvicorn')]
SERVE = ROOT / 'examples' / 'serve.py'
MAX_BYTES, MAX_PIXELS = 200_000, 100_000


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  """A folder with a model, exported with attention, and pictures."""
  folder = tmp_path_factory.mktemp('serve')
  export_weights(golden.converted('performer', folder), folder / 'model.npz', attention=True)
  pixels = np.random.default_rng(0).integers(0, 256, (9, 12, 4), dtype=np.uint8)
  image = Image.fromarray(pixels).resize((120, 90), Image.Resampling.BICUBIC)
  exif = Image.Exif()
  exif[0x0112] = 6  # to be turned by a quarter
  image.convert('RGB').save(folder / 'turned.jpg', exif=exif)
  image.save(folder / 'transparent.png')
  image.convert('L').save(folder / 'grey.png')
  return folder


def start(model, *flags):
  """The server's process and its port."""
  process = start_command(sys.executable, SERVE, model, '--port=0', *flags, PYTHONPATH=str(ROOT))
  line = process.stdout.readline()
  assert line.startswith(f'serving {model} on http://127.0.0.1:'), (line, process.stderr.read())
  return process, int(line.rpartition(':')[2])


@pytest.fixture(scope='module')
def server(folder):
  """A running server."""
  process, port = start(
    folder / 'model.npz', f'--max_bytes={MAX_BYTES}', f'--max_pixels={MAX_PIXELS}', '--max_waiting=4', '--timeout=4'
  )
  started.remove(process)  # it outlives the test that starts it
  yield process, port
  started.append(process)
  end_all()


def ask(port, method, path, body=None, **headers):
  """Status and JSON of an answer."""
  with contextlib.closing(http.client.HTTPConnection('127.0.0.1', port, timeout=30)) as connection:
    connection.request(method, path, body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def classify(port, body, query='', **headers):
  return ask(port, 'POST', f'/classify{query}', body, **headers)


def test_answers_are_those_of_predict(folder, server):
  images = sorted(map(str, [folder / 'turned.jpg', folder / 'transparent.png', folder / 'grey.png']))
  classifier = open_classifier(folder / 'performer.safetensors')
  for image, prediction in zip(images, predict(classifier, images), strict=True):
    status, answer = classify(server[1], Path(image).read_bytes())
    assert status == 200
    expected = [guess._asdict() for guess in prediction.guesses]
    assert [(x['label'], x['name']) for x in answer['predictions']] == [(x['label'], x['name']) for x in expected]
    got, wanted = ([x['probability'] for x in guesses] for guesses in (answer['predictions'], expected))
    np.testing.assert_allclose(got, wanted, atol=1e-5)


def test_attention_is_that_of_visualize_and_comes_with_the_prepared_image(folder, server):
  status, answer = classify(server[1], (folder / 'transparent.png').read_bytes(), '?attention')
  assert status == 200
  image = Image.open(io.BytesIO(base64.b64decode(answer['image'].partition('base64,')[2])))
  inside = look_inside(open_classifier(folder / 'performer.safetensors'), image)
  assert image.size == (64, 64)
  expected = [heads.mean(axis=0) for heads in inside.attention.values()]
  np.testing.assert_allclose(answer['attention'], expected, atol=1e-5)


def test_requests_at_the_same_time_are_answered_as_one_by_one(folder, server):
  bodies = [(folder / name).read_bytes() for name in ('turned.jpg', 'grey.png', 'transparent.png')]
  expected = [classify(server[1], body)[1]['predictions'][0] for body in bodies]
  with ThreadPoolExecutor(3) as pool:
    answers = list(pool.map(lambda body: classify(server[1], body), bodies))
  for (status, answer), single in zip(answers, expected, strict=True):
    assert (status, answer['predictions'][0]['label']) == (200, single['label'])
    assert answer['predictions'][0]['probability'] == pytest.approx(single['probability'], abs=1e-5)


def png_of(width, height):
  """A small PNG file that declares many pixels."""
  chunks = [(b'IHDR', struct.pack('>IIBBBBB', width, height, 8, 2, 0, 0, 0)), (b'IDAT', zlib.compress(bytes(99)))]
  parts = [struct.pack('>I', len(x)) + kind + x + struct.pack('>I', zlib.crc32(kind + x)) for kind, x in chunks]
  return b'\x89PNG\r\n\x1a\n' + b''.join(parts)


def test_bad_input_is_refused_in_one_line_and_the_server_goes_on(folder, server):
  _, port = server
  jpeg = (folder / 'turned.jpg').read_bytes()
  for body, headers, status, says in [
    (b'', {}, 400, 'the body is empty'),
    (b'no picture at all', {}, 415, 'no image file'),
    (jpeg[: len(jpeg) // 2], {}, 400, 'the image cannot be read'),
    (bytes(MAX_BYTES + 1), {}, 413, 'more than 200,000 bytes'),
    (iter([bytes(MAX_BYTES), b'x']), {}, 413, 'more than 200,000 bytes'),  # sent in chunks, its length unsaid
    (png_of(30_000, 30_000), {}, 413, 'more pixels than 100,000'),
    (jpeg, {'Content-Type': 'multipart/form-data; boundary=x'}, 415, 'not a form'),
  ]:
    got, answer = classify(port, body, **headers)
    assert (got, list(answer)) == (status, ['error'])
    assert says in answer['error']
    assert '\n' not in answer['error']
  assert ask(port, 'GET', '/classify')[0] == 405
  assert ask(port, 'GET', '/other') == (404, {'error': 'Not Found'})
  assert classify(port, jpeg)[0] == 200


@contextlib.contextmanager
def taking_all_places(port):
  """Context in which four clients, which send nothing after their headers, take all places."""
  with contextlib.ExitStack() as stack:
    clients = [stack.enter_context(socket.create_connection(('127.0.0.1', port))) for _ in range(4)]
    for client in clients:
      client.sendall(b'POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n\r\n')
    wait_for(port, 4)
    yield clients


def wait_for(port, waiting):
  while ask(port, 'GET', '/health')[1]['waiting'] != waiting:
    time.sleep(0.05)


def test_health_counts_requests_and_too_many_are_refused(folder, server):
  _, port = server
  picture = (folder / 'grey.png').read_bytes()
  with taking_all_places(port):
    status, answer = classify(port, picture)
  assert (status, answer) == (503, {'error': '4 requests are waiting already: try again later'})
  wait_for(port, 0)  # they are gone
  health = ask(port, 'GET', '/health')[1]
  assert health == {
    'status': 'ok', 'model': None, 'image_size': [64, 64], 'classes': 10, 'attention': True, 'waiting': 0
  }  # fmt: skip
  assert classify(port, picture)[0] == 200


@pytest.mark.slow
def test_a_request_that_never_ends_is_given_up(folder, server):
  with taking_all_places(server[1]) as clients, clients[0].makefile('rb') as reader:
    assert reader.readline() == b'HTTP/1.1 503 Service Unavailable\r\n'
    assert any(b'no answer within 4 s' in line for line in reader)
  wait_for(server[1], 0)
  assert classify(server[1], (folder / 'grey.png').read_bytes())[0] == 200


def test_the_page_needs_nothing_from_elsewhere(server):
  with contextlib.closing(http.client.HTTPConnection('127.0.0.1', server[1], timeout=30)) as connection:
    connection.request('GET', '/')
    response = connection.getresponse()
    page = response.read().decode()
  assert response.getheader('content-type').startswith('text/html')
  assert page == (SERVE.with_suffix('.html')).read_text()
  assert not re.search(r'https?://|src=|href="(?!data:)', page)


def test_what_cannot_be_served_is_refused_in_one_line(folder, server):
  np.savez(folder / 'other.npz', x=np.ones(3))
  for arguments, says in [
    (['missing.npz'], 'missing.npz: cannot be read: No such file or directory'),
    (['performer.safetensors'], 'performer.safetensors: is no exported model'),
    (['other.npz'], 'other.npz: is no exported model'),
    ([SERVE], 'serve.py: is no exported model (ValueError: no .npz file)'),
    (['model.npz', f'--port={server[1]}'], 'Address already in use'),
  ]:
    process = start_command(sys.executable, SERVE, *arguments, cwd=folder, PYTHONPATH=str(ROOT))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert re.fullmatch(r'error: [^\n]*\n', errors), errors
    assert says in errors


def test_it_says_what_is_missing_without_the_extra(tmp_path):
  hide = "import importlib.util as u; f = u.find_spec; u.find_spec = lambda n, *p: None if n == 'uvicorn' else f(n, *p)"
  (tmp_path / 'sitecustomize.py').write_text(hide)
  process = start_command(sys.executable, SERVE, 'x.npz', PYTHONPATH=f'{tmp_path}:{ROOT}')
  _, errors = process.communicate(timeout=60)
  assert process.returncode == 2
  assert re.fullmatch(r"error: serving needs uvicorn: pip install .*\[serve\]'\n", errors)


@pytest.mark.parametrize('number', [signal.SIGINT, slow(signal.SIGTERM)])
def test_a_signal_ends_it_when_it_has_finished_what_it_began(number, folder):
  process, port = start(folder / 'model.npz', '--batch_size=1')
  body = (folder / 'grey.png').read_bytes()
  with socket.create_connection(('127.0.0.1', port)) as client:
    client.sendall(f'POST /classify HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body[:10])
    wait_for(port, 1)
    process.send_signal(number)
    client.sendall(body[10:])
    with client.makefile('rb') as reader:
      assert reader.readline() == b'HTTP/1.1 200 OK\r\n'
  printed, errors = process.communicate(timeout=30)
  assert (process.returncode, printed, errors) == (0, 'stopped\n', '')
