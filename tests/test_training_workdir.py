"""A workdir in a bucket, served by an emulator of Google Cloud Storage on this machine."""

import json
import socket
import subprocess
import sys
import time
import urllib.request

import pytest

from tests.processes import finish, free_port, start_process

BUCKET = 'somewhere'


@pytest.fixture
def bucket():
  """Starts the emulator; gives what a program needs in its environment to take it for Google's."""
  port = free_port()
  command = 'from gcp_storage_emulator.__main__ import main; main()'
  flags = ['start', '--host=localhost', f'--port={port}', '--in-memory', f'--default-bucket={BUCKET}']
  with subprocess.Popen(
    [sys.executable, '-c', command, *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  ) as server:
    wait_for(port)
    address = f'http://localhost:{port}'
    yield {
      'STORAGE_EMULATOR_HOST': address,
      'TENSORSTORE_GCS_HTTP_URL': address,
      'GOOGLE_AUTH_TOKEN_FOR_TESTING': 'none',
    }
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


@pytest.mark.slow
def test_a_run_in_a_bucket_continues_and_is_evaluated(bucket, data_dir):
  small = ['--config.model.depth=1', '--config.data.image_size=16', f'--config.data.data_dir={data_dir}']
  workdir = f'--workdir=gs://{BUCKET}/runs/digits'
  for steps in (11, 22):
    ((code, output, error),) = finish(
      [start_process(*small, workdir, f'--config.schedule.max_steps={steps}', **bucket)]
    )
    assert code == 0, error
  assert 'continuing from the checkpoint of step 11' in output
  assert f'curves and sample images: gs://{BUCKET}/runs/digits/report.png' in output
  found = objects(bucket)
  with urllib.request.urlopen(found['runs/digits/metrics.jsonl']) as file:
    rows = [json.loads(line) for line in file]
  assert [(row['step'], row['kind']) for row in rows] == [
    (step, kind) for step in (11, 22) for kind in ('train', 'test', 'test')
  ]
  ((code, evaluated, error),) = finish([start_process(*small, f'--evaluate=gs://{BUCKET}/runs/digits', **bucket)])
  assert code == 0, error
  assert evaluated.splitlines()[-1] == output.splitlines()[-1]


@pytest.mark.slow
def test_a_bucket_that_is_not_there_gets_one_line(bucket, data_dir):
  process = start_process('--workdir=gs://another/run', f'--config.data.data_dir={data_dir}', **bucket)
  ((code, _, error),) = finish([process])
  assert code == 2
  assert error.strip().splitlines()[-1].startswith('error: cannot write to workdir gs://another/run (')
