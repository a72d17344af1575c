"""Serve checkpoints to OpenAI's client, and a page on which to write, chat and infill with them.

python serve.py --checkpoint=out/demo-ar,out/demo-diffusion    # then open http://127.0.0.1:8000
"""

import json
import math
import queue
import re
import select
import signal
import socket
import threading
import time
import traceback
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from os import _exit
from urllib.parse import quote

from lm import run_folder, runtime
from lm.configurator import UserError, check_range, configure, require
from lm.files import first_line
from lm.serving import FIELDS, Job, Limits, Model, Refused, Writer, as_error, load_page, read_fields

checkpoint = ''  # ckpt.pt files, run or Hugging Face folders, with commas; empty: newest under out/
host = '127.0.0.1'  # another address or name of this machine: everyone who reaches it can then use the models
port = 8000  # 0: any free one
max_tokens = 1024  # most that a request may ask for
batch_size = 16  # rows that are written at once, and most that a request may ask for
timeout = 120.0  # seconds that a request may wait and run
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'float32'  # bfloat16 and float16 are faster on a GPU
weights = 'float32'  # or bfloat16, float16 (faster, as good), int8 (a little worse)
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
config = configure(globals())

MAX_BODY, READ_SECONDS, CONNECTIONS = 2**20, 10, 64
HEADERS = {'X-Content-Type-Options': 'nosniff', 'Referrer-Policy': 'no-referrer', 'Cache-Control': 'no-store'}


# ---------------------------------------------------------------------------- connections


class Handler(BaseHTTPRequestHandler):
    """One request per connection."""

    protocol_version, server_version, sys_version, timeout = 'HTTP/1.1', 'serve', '', READ_SECONDS
    started = failed = False
    log_message = lambda self, *words: None

    def handle(self):
        with suppress(OSError):  # the client is gone
            self.handle_one_request()

    def finish(self):
        super().finish()
        with suppress(OSError):  # one that was refused still sends, and would never see why
            self.connection.shutdown(socket.SHUT_WR)
            self.connection.settimeout(0.5)
            for _ in range(64 * self.failed):
                if not self.connection.recv(2**16):
                    break

    def end_headers(self):
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.close_connection = True
        super().end_headers()

    def send(self, status, kind, content=None):
        """Send the head of a response, and its content unless that is to follow."""
        self.started, self.failed = True, status >= 400
        self.request_version = self.protocol_version  # or one that says none gets no head
        self.send_response(status)
        self.send_header('Content-Type', kind)
        self.send_header('Connection', 'close')
        if status == 503:
            self.send_header('Retry-After', '5')
        if content is not None:
            self.send_header('Content-Length', str(len(content)))
        self.end_headers()
        self.wfile.write(content or b'')

    def send_error(self, status, message=None, explain=None):
        content = json.dumps(as_error(message or 'This is no request.', status)).encode()
        if self.started:
            self.wfile.write(b'data: ' + content + b'\n\n')
        else:
            self.send(status, 'application/json', content)

    def do_GET(self):
        listed = lambda: self.send_json({'object': 'list', 'data': [one.about for one in models.values()]})
        paths = {'/': lambda: self.send(200, 'text/html; charset=utf-8', page), '/v1/models': listed}
        for name, one in models.items():
            paths[f'/v1/models/{quote(name)}'] = partial(self.send_json, one.about)
        self.route(paths)

    def do_POST(self):
        self.route(dict.fromkeys(FIELDS, self.post))

    def route(self, paths):
        """Answer by one of the paths; whatever goes wrong is a sentence."""
        try:
            self.check_origin()
            path = self.path.partition('?')[0]
            if path not in paths:
                status = 405 if path in (*FIELDS, '/', '/v1/models') else 404
                raise Refused(f'{path[:80]!r} is not here, or not for {self.command}.', status)
            paths[path]()
        except UserError as error:
            self.send_error(getattr(error, 'status', 400), str(error))
        except RecursionError:
            self.send_error(400, 'The body is nested too deeply.')
        except OSError:
            raise
        except Exception as error:
            traceback.print_exc()
            self.send_error(500, f'The server failed: {type(error).__name__}.')

    def check_origin(self):
        """Refuse what a foreign page sends, also under a name that leads here (DNS rebinding)."""
        hosts, origins = self.headers.get_all('Host', []), self.headers.get_all('Origin', [])
        # Any port: a tunnel has its own.
        name = re.sub(r':\d{1,5}$', '', hosts[0].lower()) if len(hosts) == 1 else ''
        if name not in ('127.0.0.1', 'localhost', '[::1]', address.lower()):
            raise Refused('The Host header names another machine; use the address that was printed.', 403)
        if origins not in ([], [f'http://{hosts[0]}']):
            raise Refused('Pages of other sites may not use this server.', 403)

    def read_body(self):
        """Return the JSON of the request's body."""
        if self.headers.get_content_type() != 'application/json':
            raise Refused('The body has to be application/json.', 415)
        lengths = self.headers.get_all('Content-Length', [])
        is_one = len(lengths) == 1 and re.fullmatch('[0-9]{1,12}', lengths[0])
        if not is_one or 'Transfer-Encoding' in self.headers:
            raise Refused('A body needs one Content-Length, and no Transfer-Encoding.', 411)
        if int(lengths[0]) > MAX_BODY:
            raise Refused(f'The body has {lengths[0]} bytes; at most {MAX_BODY} are read.', 413)
        content = self.rfile.read(int(lengths[0]))
        require(len(content) == int(lengths[0]), 'The body is shorter than its Content-Length.')
        self.server.open[self.connection] = float('inf')  # all is read
        try:
            body = json.loads(content)
            json.dumps(body, ensure_ascii=False, allow_nan=False).encode()  # no NaN, no half a character
        except ValueError as error:
            raise UserError(f'The body is no JSON in UTF-8 ({first_line(error)[:100]}).') from error
        return body

    def post(self):
        path = self.path.partition('?')[0]
        fields = read_fields(self.read_body(), FIELDS[path], limits)
        model = models.get(fields.get('model', next(iter(models))))
        if not model:
            raise Refused(f'There is no model {fields["model"][:80]!r}; there is {", ".join(models)}.', 404)
        if path == '/v1/tokenize':
            return self.send_json({'tokens': len(model.encode(fields.get('text', '')))})
        job = Job(path, fields, model, limits)
        writer.submit(job)
        try:
            for index, text, finish in self.events(job):
                self.send_event(job.chunk(index, text, finish))
            if not job.stream:
                return self.send_json(job.answer())
            if job.fields.get('stream_options', {}).get('include_usage'):
                self.send_event(job.envelope([], job.counts(), '.chunk' * job.is_chat))
            self.wfile.write(b'data: [DONE]\n\n')
        finally:
            job.cancelled = True

    def events(self, job):
        """Yield what the writer says of a job; end where the client leaves, or where it takes too long."""
        while True:
            if time.monotonic() > job.deadline:
                raise Refused(f'This took longer than {timeout:g} seconds; ask again later.', 503)
            said = select.select([self.connection], [], [], 0)[0]
            if said and not self.connection.recv(1, socket.MSG_PEEK):
                raise ConnectionResetError
            with suppress(queue.Empty):
                event = job.events.get(timeout=0.2)
                if event is None:
                    return
                if isinstance(event, Exception):
                    raise event
                yield event

    def send_json(self, value):
        self.send(200, 'application/json', json.dumps(value).encode())

    def send_event(self, value):
        if not self.started:
            self.send(200, 'text/event-stream')
        self.wfile.write(b'data: ' + json.dumps(value).encode() + b'\n\n')


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 128
    address_family = socket.AF_INET6 if ':' in host else socket.AF_INET

    def __init__(self):
        self.open = {}  # connection: until when its request has to be read
        super().__init__((host, port), Handler)

    def process_request(self, request, address):
        if len(self.open) < CONNECTIONS:
            self.open[request] = time.monotonic() + READ_SECONDS
            return super().process_request(request, address)
        content = json.dumps(as_error('Too many connections; ask again later.', 503))
        head = 'HTTP/1.1 503 Busy\r\nRetry-After: 5\r\nContent-Type: application/json\r\nConnection: close\r\n\r\n'
        with suppress(OSError):
            request.settimeout(0.05)
            request.recv(2**16)  # or the answer would be lost with what is not read
            request.sendall((head + content).encode())
        self.shutdown_request(request)

    def shutdown_request(self, request):
        self.open.pop(request, None)
        super().shutdown_request(request)

    def service_actions(self):
        """Cut off those that send their request too slowly."""
        for request, until in list(self.open.items()):
            if time.monotonic() > until:
                with suppress(OSError):
                    request.shutdown(socket.SHUT_RDWR)


def stop(number, frame):
    """Take no more connections, and end when all is answered; the second time at once."""
    if stopping.is_set():
        _exit(128 + number)
    stopping.set()
    print('answering what is asked; once more to quit at once', flush=True)
    threading.Thread(target=server.shutdown).start()


check_range(config, 1, math.inf, 'max_tokens', 'batch_size')
check_range(config, 0.001, math.inf, 'timeout')
check_range(config, 0, 2**16, 'port')
require(host not in ('', '0.0.0.0', '::'), f'host is {host!r}; give the one address or name that others use.')
address = f'[{host}]' if ':' in host else host
dist, stopping = runtime.Runtime(device, dtype), threading.Event()
models, limits = {}, Limits(max_tokens, batch_size, timeout)
for path in filter(None, map(str.strip, (checkpoint or str(run_folder.newest_run())).split(','))):
    model = Model(path, dist.device, token, revision, weights)
    require(model.name not in models, f'Two checkpoints are named {model.name}; rename a folder.')
    models[model.name] = model
    print(f'{model.name}: {model.about["architecture"]}, {model.about["parameters"]:,} parameters')
writer, (page, HEADERS['Content-Security-Policy']) = Writer(dist, batch_size), load_page()
try:
    server = Server()
except OSError as error:
    raise UserError(f'{host}:{port} cannot be used ({error}); choose another --host or --port.') from error
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, stop)
writer.start()
if host not in ('127.0.0.1', 'localhost', '::1'):
    print(f'Everyone who reaches {host} can use these models.')
print(f'http://{address}:{server.server_port}', flush=True)
server.serve_forever(poll_interval=0.1)
server.socket.close()
while server.open:  # what was asked is answered
    server.service_actions()
    time.sleep(0.05)
