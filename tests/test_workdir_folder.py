"""A workdir in a bucket, served by an emulator of Google Cloud Storage on this machine."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from t2t_vit_jax.conversion.weight_format import read_header
from tests.processes import finish, free_port, run, start, start_process

BUCKET = 'somewhere'

pytestmark = [pytest.mark.needs('gcsfs'), pytest.mark.needs('gcp_storage_emulator')]


@pytest.fixture
def bucket():
  """Starts the emulator; gives what a program needs in its environment to take it for Google's."""
  port = free_port()
  command = 'from gcp_storage_emulator.__main__ import main; main()'
  flags = ['start', '--host=localhost', f'--port={port}', '--in-memory', f'--default-bucket={BUCKET}']
  with subprocess.Popen(
    [sys.executable, '-c', command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  ) as server:
    try:
      wait_for(port)
      address = f'http://localhost:{port}'
      yield {
        'STORAGE_EMULATOR_HOST': address,
        'TENSORSTORE_GCS_HTTP_URL': address,
        'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
        'GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT': 'false',  # of which the emulator knows nothing
      }
    finally:
      server.kill()


def wait_for(port, seconds=60):
  deadline = time.monotonic() + seconds
  while True:
    try:
      socket.create_connection(('localhost', port)).close()
      return
    except OSError:
      assert time.monotonic() < deadline
      time.sleep(0.1)


def objects(environment):
  with urllib.request.urlopen(f'{environment["STORAGE_EMULATOR_HOST"]}/storage/v1/b/{BUCKET}/o') as answer:
    return {item['name']: item['mediaLink'] for item in json.load(answer)['items']}


def damage(environment, name):
  address = f'{environment["STORAGE_EMULATOR_HOST"]}/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={name}'
  urllib.request.urlopen(urllib.request.Request(address, data=b'damaged', method='POST')).close()


@pytest.mark.slow
def test_a_run_in_a_bucket(bucket, data_dir):
  """One process is stopped, its last checkpoint damaged; two go on from the one before. Then it is evaluated."""
  fields = {
    'model.depth': 1,
    'model.tokens_type': 'convolution',
    'data.image_size': 16,
    'data.data_dir': data_dir,
    'schedule.max_steps': 33,
  }
  fields |= {'logging.every_steps': 1, 'checkpoint.every_steps': 5}
  flags = [f'--config.{name}={value}' for name, value in fields.items()]
  workdir = f'gs://{BUCKET}/runs/digits'
  first = start_process(*flags, f'--workdir={workdir}', **bucket)
  for line in first.stdout:
    if line.startswith('step 12/'):
      break
  first.send_signal(signal.SIGTERM)
  ((code, _, error),) = finish([first])
  assert code == 128 + signal.SIGTERM, error
  stopped = int(re.search(r'stopped at step (\d+) and saved', error)[1])
  with urllib.request.urlopen(objects(bucket)['runs/digits/metrics.jsonl']) as file:
    assert json.loads(file.read().splitlines()[-1])['step'] == stopped

  for name in objects(bucket):
    if name.startswith(f'runs/digits/checkpoints/{stopped}/state/d/'):
      damage(bucket, name)
  results = finish(start(2, *flags, f'--workdir={workdir}', **bucket))
  assert [code for code, _, _ in results] == [0, 0], results
  assert not any('Traceback' in error for _, _, error in results)  # of each array that could not be read
  output = results[0][1]
  assert f'The checkpoint {workdir}/checkpoints/{stopped} is damaged (ValueError: OUT_OF_RANGE: ' in output
  assert f'and was moved to {workdir}/damaged/{stopped}' in output
  begun = int(re.search(r'continuing from the checkpoint of step (\d+)', output)[1])
  assert begun == (stopped - 1) // 5 * 5
  assert f'curves and sample images: {workdir}/report.png' in output
  found = objects(bucket)
  assert any(name.startswith(f'runs/digits/damaged/{stopped}/state/') for name in found)
  with urllib.request.urlopen(found['runs/digits/metrics.jsonl']) as file:
    rows = [json.loads(line) for line in file]
  assert [row['step'] for row in rows if row['kind'] == 'train'] == list(range(1, 34))

  for name in ('model', 'model_raw'):
    with urllib.request.urlopen(found[f'runs/digits/weights/{name}.safetensors']) as file:
      header = read_header(file)
    assert (header['source']['run'], header['source']['step']) == ('digits', 33)
  assert 'runs/digits/weights/README.md' in found

  evaluated = run(1, *flags, f'--evaluate={workdir}', **bucket)
  assert evaluated.splitlines()[-1] == output.splitlines()[-1]


@pytest.mark.slow
def test_a_bucket_that_is_not_there_gets_one_line(bucket, data_dir):
  process = start_process('--workdir=gs://another/run', f'--config.data.data_dir={data_dir}', **bucket)
  ((code, _, error),) = finish([process])
  assert code == 2
  assert error.strip().splitlines()[-1].startswith('error: cannot write to workdir gs://another/run (')
