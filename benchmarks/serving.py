"""Loads a running server of examples/serve.py with requests: python -m benchmarks.serving PORT IMAGE

Prints requests a second, the time of half and of 99 % of the requests, and the server's memory before and after.
"""

import argparse
import asyncio
from pathlib import Path
import sys
import time

import numpy as np


async def ask(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, request: bytes) -> int:
  """Sends a request on an open connection and returns the status code of the answer."""
  writer.write(request)
  head = (await reader.readuntil(b'\r\n\r\n')).decode('latin-1').lower()
  length = next(line.partition(':')[2] for line in head.splitlines() if line.startswith('content-length:'))
  await reader.readexactly(int(length))
  return int(head.split()[1])


async def load(host: str, port: int, request: bytes, total: int, clients: int) -> tuple[list[float], dict[int, int]]:
  """Seconds of each request that was answered with 200, and the number of answers by status code."""
  seconds: list[float] = []
  statuses: dict[int, int] = {}
  left = iter(range(total))

  async def client() -> None:
    reader, writer = await asyncio.open_connection(host, port)
    for _ in left:
      start = time.perf_counter()
      status = await ask(reader, writer, request)
      statuses[status] = statuses.get(status, 0) + 1
      if status == 200:
        seconds.append(time.perf_counter() - start)
    writer.close()

  await asyncio.gather(*(client() for _ in range(clients)))
  return seconds, statuses


def memory(process: int) -> float:
  """Resident memory of a process, in MB."""
  lines = Path(f'/proc/{process}/status').read_text().splitlines()
  return next(int(line.split()[1]) for line in lines if line.startswith('VmRSS')) / 1e3


def main() -> int:
  """Command line; returns the exit code."""
  parser = argparse.ArgumentParser(description=__doc__.split(':')[0])
  parser.add_argument('port', type=int, help='of the server on this machine')
  parser.add_argument('image', type=Path, help='the image file to send')
  parser.add_argument('--requests', type=int, default=5000, help='number of requests (default: %(default)s)')
  parser.add_argument('--clients', type=int, default=16, help='connections at a time (default: %(default)s)')
  parser.add_argument('--process', type=int, help="the server's process, whose memory is shown")
  options = parser.parse_args()
  body = options.image.read_bytes()
  request = f'POST /classify HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n'.encode() + body
  asyncio.run(load('127.0.0.1', options.port, request, 100, options.clients))  # not measured
  before = memory(options.process) if options.process else 0
  start = time.perf_counter()
  seconds, statuses = asyncio.run(load('127.0.0.1', options.port, request, options.requests, options.clients))
  elapsed = time.perf_counter() - start
  p50, p99 = np.percentile(seconds, [50, 99]) * 1e3
  print(f'{options.requests} requests of {options.clients} clients, {len(body):,} bytes each; answers: {statuses}')
  print(f'{len(seconds) / elapsed:.0f} answers/s; p50 {p50:.0f} ms, p99 {p99:.0f} ms')
  if options.process:
    print(f'memory: {before:.0f} MB before, {memory(options.process):.0f} MB after')
  return 0


if __name__ == '__main__':
  sys.exit(main())
