"""A server on this machine that has a few files, breaks off where a test says so, and remembers what it was asked."""

import contextlib
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import threading
import time


class FileServer:
  """Files by their names; each is sent from the byte on that a request asks for."""

  def __init__(self, ranges=True):
    self.files, self.requests = {}, []  # name -> bytes; (method, name, first byte asked for)
    self.paths = []  # of the requests
    self.breaks = []  # bytes after which the next answers break off
    self.ranges, self.status, self.pause = ranges, 200, 0.0
    self.headers = {}  # added to each answer
    outer = self

    class Handler(BaseHTTPRequestHandler):
      def do_GET(self):
        outer.answer(self)

      do_HEAD = do_GET  # noqa: N815 (the standard library's name)

      def log_message(self, *unused):
        pass

    self.server = ThreadingHTTPServer(('localhost', 0), Handler)
    self.url = f'http://localhost:{self.server.server_port}'

  def answer(self, handler):
    name = handler.path.split('?')[0].rpartition('/')[2]
    content = self.files.get(name)
    asked = handler.headers.get('Range', '').removeprefix('bytes=').rstrip('-')
    self.paths.append(handler.path)
    self.requests.append((handler.command, name, asked))
    time.sleep(self.pause)
    if content is None or self.status != 200:
      handler.send_error(404 if self.status == 200 else self.status)
      return
    tag = f'"{hashlib.md5(content).hexdigest()}"'
    start = int(asked) if asked and self.ranges and handler.headers.get('If-Range') in (None, tag) else 0
    handler.send_response(206 if start else 200)
    handler.send_header('ETag', tag)
    handler.send_header('Content-Length', str(len(content) - start))
    if start:
      handler.send_header('Content-Range', f'bytes {start}-{len(content) - 1}/{len(content)}')
    for header, value in self.headers.items():
      handler.send_header(header, value)
    handler.end_headers()
    if handler.command == 'GET':
      end = start + self.breaks.pop(0) if self.breaks else len(content)
      handler.wfile.write(content[start:end])


@contextlib.contextmanager
def file_server(**options):
  """Runs a `FileServer` while the context lasts."""
  running = FileServer(**options)
  thread = threading.Thread(target=running.server.serve_forever, args=(0.02,))
  thread.start()
  try:
    yield running
  finally:
    running.server.shutdown()
    running.server.server_close()
    thread.join()
