"""serve.py as its clients see it: OpenAI's own, and hostile ones."""

import json
import re
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from conftest import letter_tokenizer, write_small_checkpoint
from helpers import ASCII

from lm import runtime, serving
from lm.configurator import ROOT

ARCHITECTURES = ('ar', 'diffusion', 'sdd')
MUCH = {'ar': dict(max_tokens=700, n=16), 'sdd': dict(max_tokens=100, n=16)}
HEAD = '{} {} HTTP/1.1\r\nHost: localhost\r\n{}\r\n'
POST = 'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n{}\r\n\r\n'


class Server:
    """serve.py with a tiny random model of each architecture, in a process of its own."""

    def __init__(self, folder):
        self.log, self.process, self.slow = folder / 'log', None, []
        for name in ARCHITECTURES:
            path, shape = folder / name / 'ckpt.pt', {'block_size': 128}
            write_small_checkpoint(path, name, letter_tokenizer(ASCII), shape=shape)
        paths = ','.join(str(folder / name) for name in ARCHITECTURES)
        self.command = [
            sys.executable,
            ROOT / 'serve.py',
            '--device=cpu',
            '--port=0',
            f'--checkpoint={paths}',
        ]

    def port(self):
        """Return the port; starts the server where it does not run, and clients that never finish a request."""
        if self.process is None or self.process.poll() is not None:
            with open(self.log, 'w') as log:
                self.process = subprocess.Popen(self.command, stdout=log, stderr=log)
            while not (told := re.search(r'http://127.0.0.1:(\d+)\n', self.log.read_text())):
                assert self.process.poll() is None, self.log.read_text()
                time.sleep(0.05)
            self.number = int(told[1])
            starts = [b'', b'GET / HTTP/1.1\r\nHost: loc', POST.format('Content-Length: 9').encode() + b'{']
            self.slow = [(connect(self.number, part), time.monotonic()) for part in starts]
        return self.number


@pytest.fixture(scope='module')
def server(tmp_path_factory):
    server = Server(tmp_path_factory.mktemp('models'))
    yield server
    server.process.kill()
    assert 'Traceback' not in server.log.read_text()


@pytest.fixture
def port(server):
    yield server.port()


def connect(port, sent):
    connection = socket.create_connection(('127.0.0.1', port), timeout=30)
    connection.sendall(sent)
    return connection


def posted(body):
    return POST.format(f'Content-Length: {len(body)}').encode() + body


@pytest.fixture
def client(port):
    openai = pytest.importorskip('openai', reason='the openai package is not installed')
    return openai.OpenAI(base_url=f'http://127.0.0.1:{port}/v1', api_key='none', max_retries=0, timeout=60)


def post(port, path, **body):
    """Return the status and the JSON of a response."""
    headers = {'Content-Type': 'application/json'}
    request = Request(f'http://127.0.0.1:{port}/v1/{path}', json.dumps(body).encode(), headers)
    try:
        with urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except HTTPError as error:
        return error.code, json.load(error)


def test_the_models_are_listed(client):
    assert [model.id for model in client.models.list()] == list(ARCHITECTURES)
    assert client.models.retrieve('sdd').id == 'sdd'


@pytest.mark.parametrize('model', ARCHITECTURES)
def test_a_streamed_text_equals_the_one_that_is_not(model, client):
    asked = dict(model=model, prompt='the cat', max_tokens=150, seed=3)  # past the block
    whole = client.completions.create(**asked)
    usage, told = whole.usage, {'include_usage': True}
    chunks = list(client.completions.create(**asked, stream=True, stream_options=told))
    assert ''.join(one.text for chunk in chunks for one in chunk.choices) == whole.choices[0].text != ''
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].usage == usage and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.completion_tokens == 150 or whole.choices[0].finish_reason == 'stop'


@pytest.mark.parametrize('model', ARCHITECTURES)
def test_a_conversation_is_answered_and_streamed(model, client):
    said = [('system', 'be kind'), ('user', 'hi'), ('assistant', 'hello'), ('user', 'and now? ' * 40)]
    messages = [{'role': role, 'content': text} for role, text in said]
    asked = dict(model=model, messages=messages, max_completion_tokens=20, seed=1)
    whole = client.chat.completions.create(**asked)
    told = {'include_usage': True}
    *parts, last = client.chat.completions.create(**asked, stream=True, stream_options=told)
    assert last.object == parts[0].object == 'chat.completion.chunk' and last.usage == whole.usage
    text = ''.join(part.choices[0].delta.content for part in parts)
    assert text == whole.choices[0].message.content and whole.choices[0].message.role == 'assistant'


@pytest.mark.parametrize('model', ['ar', 'diffusion'])
def test_a_text_ends_before_a_stop_text(model, client):
    for seed in range(9):
        asked = dict(model=model, prompt='the cat', max_tokens=60, seed=seed)
        text = client.completions.create(**asked).choices[0].text
        if len(text) > 30:  # it did not end early
            break
    for stop in (text[10:13], ['never seen', text[20:22]]):
        last = stop if isinstance(stop, str) else stop[1]
        (cut,) = client.completions.create(**asked, stop=stop).choices
        assert (cut.text, cut.finish_reason) == (text[: text.index(last)], 'stop')
        parts = list(client.completions.create(**asked, stop=stop, stream=True))
        assert ''.join(part.choices[0].text for part in parts) == cut.text


def test_several_texts_of_several_prompts(client):
    for model in ARCHITECTURES:
        asked = dict(model=model, prompt=['the', 'a dog'], n=3, max_tokens=8, seed=2)
        choices = client.completions.create(**asked).choices
        assert [one.index for one in choices] == list(range(6)) and len({one.text for one in choices}) > 3
        streamed = [''] * 6
        for part in client.completions.create(**asked, stream=True):
            streamed[part.choices[0].index] += part.choices[0].text
        assert streamed == [one.text for one in choices]


def test_fifty_clients_at_once_each_get_their_own_text(client):
    asked = [(('ar', 'diffusion')[i % 2], 'abcdefg'[: 1 + i % 7] + f'{i}', i % 3 == 0) for i in range(50)]

    def ask(one):
        model, prompt, stream = one
        order = {'sampler': 'confidence'} if model == 'diffusion' else {}  # the default's is random
        given = dict(
            model=model, prompt=prompt, max_tokens=12, temperature=0, stream=stream, extra_body=order
        )
        answer = client.completions.create(**given)
        return ''.join(part.choices[0].text for part in (answer if stream else [answer]))

    alone = [ask(one) for one in asked]
    with ThreadPoolExecutor(50) as pool:
        assert list(pool.map(ask, asked)) == alone


@pytest.mark.parametrize('model, stream', [('ar', True), ('sdd', False)])
def test_the_work_of_a_client_that_leaves_is_dropped(model, stream, port):
    sent = posted(json.dumps(dict(model=model, prompt='a', stream=stream, **MUCH[model])).encode())
    began = time.monotonic()
    assert post(port, 'completions', model=model, prompt='a', **MUCH[model])[0] == 200
    whole = time.monotonic() - began
    leaver = connect(port, sent)
    leaver.recv(1) if stream else time.sleep(0.3)
    leaver.close()
    began = time.monotonic()
    assert post(port, 'completions', model=model, prompt='a', max_tokens=1)[0] == 200
    assert time.monotonic() - began < 0.3 + whole / 2


def test_those_that_go_together_are_written_at_once_and_a_failure_is_answered(tmp_path, monkeypatch):
    path = write_small_checkpoint(tmp_path / 'ckpt.pt', 'ar', letter_tokenizer(ASCII))
    model, calls, generate = serving.Model(path, 'cpu'), [], serving.generate
    writer, limits = serving.Writer(runtime.Runtime('cpu', 'float32'), 4), serving.Limits(9, 4, 9.0)

    def counted(module, prompts, *others, **options):
        calls.extend([len(prompts)] * bool(prompts))
        if len(calls) == 1 and prompts:
            raise RuntimeError('the first time')
        return generate(module, prompts, *others, **options)

    monkeypatch.setattr(serving, 'generate', counted)
    asked = [dict(n=2), dict(seed=1), dict(), dict(top_k=3), dict(n=2), dict(top_k=3)]
    fields = [dict(prompt='a' * (1 + i), max_tokens=3) | one for i, one in enumerate(asked)]
    jobs = [serving.Job('/v1/completions', one, model, limits) for one in fields]
    for job in jobs:
        writer.submit(job)
    writer.start()
    events = [job.events.get(timeout=30) for job in jobs]
    assert [getattr(event, 'status', None) for event in events] == [500, None, 500, None, None, None]
    assert calls == [3, 1, 2, 2] and all(len(row.new) for job in jobs[3:] for row in job.rows)


@pytest.mark.faults
def test_each_client_gets_the_text_that_was_drafted_for_it(tmp_path):
    shape = dict(block_length=(4,), ar_weight=1.0)
    path = write_small_checkpoint(tmp_path / 'ckpt.pt', 'diffusion', letter_tokenizer(ASCII), shape=shape)
    model = serving.Model(path, 'cpu')
    writer, limits = serving.Writer(runtime.Runtime('cpu', 'float32'), 4), serving.Limits(9, 4, 9.0)
    fields = dict(prompt='ab', max_tokens=9, sampler='speculative', temperature=0.0)
    jobs = [serving.Job('/v1/completions', fields, model, limits) for _ in range(3)]
    writer.write(jobs)
    texts = [row.text for job in jobs for row in job.rows]
    assert texts == 3 * texts[:1] and texts[0]


@pytest.mark.faults
def test_a_text_that_begins_with_a_gap_begins_with_what_fills_it(tmp_path):
    letters = letter_tokenizer(ASCII)
    path = write_small_checkpoint(
        tmp_path / 'ckpt.pt', 'diffusion', letters, start_token=letters.encode('x')[0]
    )
    writer, limits = serving.Writer(runtime.Runtime('cpu', 'float32'), 4), serving.Limits(9, 4, 9.0)
    job = serving.Job('/v1/infill', dict(text='<mask:3> be'), serving.Model(path, 'cpu'), limits)
    writer.write([job])
    (row,) = job.rows
    assert (
        row.ids[:2] == [letters.encode('x')[0], letters.mask_id]
        and row.text.endswith(' be')
        and len(row.text) <= 6
    )


@pytest.mark.faults
def test_gaps_of_two_clients_that_are_filled_together_keep_their_texts(tmp_path):
    letters = letter_tokenizer(ASCII)
    path = write_small_checkpoint(
        tmp_path / 'ckpt.pt', 'diffusion', letters, start_token=letters.encode('x')[0]
    )
    model, limits = serving.Model(path, 'cpu'), serving.Limits(9, 4, 9.0)
    fields = [
        dict(text='<mask:3> be'),
        dict(text='so <mask:4>'),
    ]  # seven tokens each; the first needs a start
    jobs = [serving.Job('/v1/infill', one, model, limits) for one in fields]
    serving.Writer(runtime.Runtime('cpu', 'float32'), 4).write(jobs)
    (one,), (other,) = (job.rows for job in jobs)
    assert len(one.ids) == len(other.ids) and len(one.new) == 6 and len(other.new) == 7
    assert one.text.endswith(' be') and other.text.startswith('so ')


def test_gaps_are_filled_and_watched(port):
    text = 'the <mask:4> sat<mask:2>!'
    for model in ('diffusion', 'sdd'):
        asked = dict(model=model, text=text, sampler='confidence', seed=1)
        status, answer = post(port, 'infill', **asked, watch=True)
        filled, cells = answer['choices'][0]['text'], {}
        assert status == 200 and filled.startswith('the ') and ' sat' in filled and filled.endswith('!')
        for step in answer['frames']:
            cells |= {cell[0]: cell for cell in step}
        assert ''.join(cells[i][1] for i in sorted(cells)) == filled
        kinds = [[cell[2] for cell in step].count('h') for step in answer['frames']]
        assert kinds[0] == 6 and any(len(cell) > 4 for cell in answer['frames'][1]) == (model == 'sdd')
        assert post(port, 'infill', **asked)[1]['choices'] == answer['choices']
    assert post(port, 'tokenize', model='ar', text='cats') == (200, {'tokens': 4})
    assert post(port, 'tokenize?api-version=1', model='ar', text='cats') == (200, {'tokens': 4})


@pytest.mark.parametrize(
    'path, body, said',
    [
        ('infill', dict(model='ar', text='a <mask:1>'), 'sees nothing behind a gap'),
        ('infill', dict(model='sdd', text='a'), '<mask:12>'),
        ('infill', dict(model='sdd', text='<mask:999999999999>'), 'shorten it'),
        ('infill', dict(model='sdd', text='<mask:' + '0' * 900_000), '<mask:12>'),  # at once
        ('infill', dict(model='sdd', text=f'<mask:{"0" * 6000}>'), '<mask:12>'),
        ('completions', dict(model='ar', prompt='a', sampler='confidence'), 'sampler has no effect on ar'),
        ('completions', dict(model='sdd', prompt='a', eta=0.5), "which writes with sampler='first_hitting'"),
        ('completions', dict(model='sdd', prompt='a', threshold=0.5), 'threshold has no effect'),
        ('completions', dict(model='ar', prompt='a' * 128), 'reads 127: shorten it'),
        ('completions', dict(model='ar', prompt='Zürich'), "'ü'"),
        ('completions', dict(model='ar', prompt=[1, 2]), 'give a text, or a list of'),
        ('completions', dict(model='ar'), 'prompt is missing'),
        ('completions', dict(model='ar', prompt='a', max_tokens=1025), 'between 1 and 1024'),
        ('completions', dict(model='ar', prompt='a', max_tokens=True), 'max_tokens is True'),
        ('completions', dict(model='ar', prompt='a', temperature=-1), 'temperature is -1'),
        ('completions', dict(model='ar', prompt='a', n=17), 'n is 17'),
        ('completions', dict(model='ar', prompt='a', stop='a' * 101), 'shorten it'),
        ('completions', dict(model='ar', prompt=['a'] * 9, n=2), 'at most 16'),
        ('completions', dict(model='sdd', prompt='a', sampler='best'), "sampler is 'best'"),
        ('completions', dict(model='sdd', prompt='a', watch=True, stream=True), 'leave out stream'),
        ('completions', dict(model='ar', prompt='a', logprobs=2), "'logprobs' is not supported"),
        ('completions', dict(model='ar', prompt='a', presence_penalty=1), "'presence_penalty'"),
        ('chat/completions', dict(model='ar', messages=[]), 'end with user'),
        ('chat/completions', dict(model='ar', messages=[{'role': 'user'}]), 'no text'),
        ('chat/completions', dict(model='ar', messages='hi'), 'messages is'),
        ('chat/completions', dict(model='ar', messages=[], tools=[{}]), "'tools' is not supported"),
    ],
)
def test_a_bad_request_is_answered_by_a_sentence(path, body, said, port):
    status, answer = post(port, path, **body)
    assert status == 400 and said in answer['error']['message'] and answer['error']['message'].endswith('.')


HOSTILE = {  # name: the statuses that may answer it, and what is sent
    'a path out of here': (404, HEAD.format('GET', '/../../etc/passwd', '')),
    'the same, encoded': (404, HEAD.format('GET', '/%2e%2e/%2e%2e/etc/passwd', '')),
    'two slashes': (404, HEAD.format('GET', '//etc/passwd', '')),
    'a file of ours': (404, HEAD.format('GET', '/lm/page.html', '')),
    'another site by proxy': (404, HEAD.format('GET', 'http://example.com/', '')),
    'a null byte': (404, HEAD.format('GET', '/\0', '')),
    'a wrong method': (405, HEAD.format('GET', '/v1/completions', '')),
    'a wrong method of the page': (405, HEAD.format('POST', '/', '')),
    'an unknown method': (501, HEAD.format('BREW', '/', '')),
    'options': (501, HEAD.format('OPTIONS', '/v1/completions', 'Origin: http://evil.example\r\n')),
    'no HTTP': (400, b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n'),
    'a future HTTP': (505, 'GET / HTTP/9.0\r\n\r\n'),
    'no host': (403, 'GET / HTTP/1.1\r\n\r\n'),
    'a foreign host': (403, 'GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n'),
    'two hosts': (403, 'GET / HTTP/1.1\r\nHost: localhost\r\nHost: evil.example\r\n\r\n'),
    'a host that begins like ours': (403, 'GET / HTTP/1.1\r\nHost: localhost.evil.example:80\r\n\r\n'),
    'a foreign page': (403, HEAD.format('GET', '/v1/models', 'Origin: http://evil.example\r\n')),
    'a page of a file': (403, HEAD.format('GET', '/v1/models', 'Origin: null\r\n')),
    'a form': (415, 'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 2\r\n\r\n{}'),
    'a long line': (414, 'GET /' + 'a' * 70_000 + ' HTTP/1.1\r\n\r\n'),
    'a long header': (431, HEAD.format('GET', '/', 'X: ' + 'a' * 70_000 + '\r\n')),
    'many headers': (431, HEAD.format('GET', '/', 'X: a\r\n' * 5000)),
    'no length': (411, POST.format('X: a')),
    'a negative length': (411, POST.format('Content-Length: -1')),
    'a length that is none': (411, POST.format('Content-Length: 1e3')),
    'two lengths': (411, POST.format('Content-Length: 2\r\nContent-Length: 3') + '{}'),
    'a chunked body': (411, POST.format('Transfer-Encoding: chunked') + '2\r\n{}\r\n0\r\n\r\n'),
    'a huge body': (413, POST.format('Content-Length: 3000000') + ' ' * 3_000_000),
    'a promised terabyte': (413, POST.format('Content-Length: 999999999999')),
    'no UTF-8': (400, posted(b'{"model": "ar", "prompt": "\xff"}')),
    'half a character': (400, posted(b'{"model": "ar", "prompt": "\\ud800"}')),
    'deep JSON': (400, posted(b'[' * 200_000)),
    'no number': (400, posted(b'{"model": "ar", "prompt": "a", "temperature": NaN}')),
    'a number without end': (400, posted(b'{"model": "ar", "prompt": "a", "top_p": 1e999}')),
    'a long number': (400, posted(b'{"model": "ar", "prompt": "a", "n": ' + b'9' * 9000 + b'}')),
    'no object': (400, posted(b'"model"')),
    'an unknown model': (404, posted(b'{"model": "/etc/passwd", "prompt": "a"}')),
    'a model that is a list': (400, posted(b'{"model": ["ar"], "prompt": "a"}')),
    'a script': (404, posted(b'{"model": "<script>alert(1)</script>", "prompt": "a"}')),
}


@pytest.mark.parametrize('name', HOSTILE)
def test_what_is_hostile_gets_a_sentence_and_nothing_else(name, port):
    status, sent = HOSTILE[name]
    with connect(port, sent if isinstance(sent, bytes) else sent.encode('latin-1')) as connection:
        answer = b''.join(iter(lambda: connection.recv(2**16), b''))
    head, _, content = answer.partition(b'\r\n\r\n')
    assert int(head.split()[1]) == status and b'Content-Type: application/json' in head, answer[:300]
    assert b'X-Content-Type-Options: nosniff' in head and b"default-src 'none'" in head
    assert b'Access-Control' not in head
    message = json.loads(content)['error']['message']
    assert 'Traceback' not in message and 'root:' not in message
    assert post(port, 'tokenize', model='ar', text='cat') == (200, {'tokens': 3})


def test_more_connections_than_it_takes_are_told_so(port):
    idle = [connect(port, b'GET') for _ in range(70)]
    refused = b''
    for one in idle[-6:]:
        one.settimeout(20)
        with one:
            refused += one.recv(2**16)
    assert refused.count(b'503') >= 3 and b'Retry-After' in refused
    for one in idle:
        one.close()
    for _ in range(50):
        with socket.create_connection(('127.0.0.1', port)) as one:
            one.sendall(HEAD.format('GET', '/v1/models', '').encode())
            if b'200 OK' in one.recv(2**16):
                return
        time.sleep(0.1)
    raise AssertionError('it takes no connection any more')


def test_slow_clients_are_cut_off(server, port):
    for connection, began in server.slow:
        with connection:
            connection.settimeout(max(1, began + 20 - time.monotonic()))
            answer = connection.recv(2**16)
            assert answer == b'' or b' 400 ' in answer


def test_sigterm_lets_it_answer_what_is_asked(server, port):
    sent = posted(json.dumps(dict(model='ar', prompt='a', stream=True, n=16, max_tokens=250)).encode())
    with ThreadPoolExecutor(1) as pool, connect(port, sent) as connection:
        answer = connection.recv(100)
        waiting = pool.submit(post, port, 'completions', model='sdd', prompt='a', max_tokens=20)
        time.sleep(0.2)
        server.process.terminate()
        answer += b''.join(iter(lambda: connection.recv(2**16), b''))
        assert answer.endswith(b'data: [DONE]\n\n') and waiting.result()[0] == 200
    assert server.process.wait(30) == 0
    with pytest.raises(OSError):
        socket.create_connection(('127.0.0.1', port))
