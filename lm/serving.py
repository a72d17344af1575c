"""Read the requests of a server, let them wait in a queue, and write those that go together at once."""

import base64
import hashlib
import queue
import random
import re
import threading
import time
import traceback
import uuid
from collections import deque
from contextlib import suppress
from typing import NamedTuple

from lm import checkpoints, prompts, run_folder, runtime
from lm.configurator import UserError, require, user_errors
from lm.files import first_line
from lm.tokenizer import Tokenizer
from lm.watch import PAGE, Frames
from sampling import SAMPLERS, generate

SAMPLING = dict.fromkeys('temperature top_p threshold eta'.split(), float)  # what `generate` takes
SAMPLING |= dict.fromkeys('top_k steps block_length k'.split(), int) | {'sampler': str}
COMMON = SAMPLING | {'model': str, 'n': int, 'seed': int, 'watch': bool}
WRITING = dict(max_tokens=int, max_completion_tokens=int, stop=str | list, stream=bool, stream_options=dict)
FIELDS = {  # of each path, with their types
    '/v1/completions': COMMON | WRITING | {'prompt': str | list},
    '/v1/chat/completions': COMMON | WRITING | {'messages': list},
    '/v1/infill': COMMON | {'text': str},
    '/v1/tokenize': {'model': str, 'text': str},
}
IDLE = 'user metadata store safety_identifier service_tier prompt_cache_key parallel_tool_calls'.split()
NEUTRAL = dict(frequency_penalty=0, presence_penalty=0, logit_bias={}, echo=False, suffix='', best_of=1)
NEUTRAL |= dict(
    logprobs=False, top_logprobs=0, tools=[], tool_choice='none', response_format={'type': 'text'}
)


class Limits(NamedTuple):
    """Bounds what a request may ask for."""

    max_tokens: int
    batch_size: int  # rows
    timeout: float  # seconds to wait and run

    def range_of(self, name):
        """Return the smallest and the largest value of a field, where `generate` does not check it."""
        ranges = dict.fromkeys('max_tokens max_completion_tokens steps'.split(), (1, self.max_tokens))
        ranges |= dict(n=(1, self.batch_size), seed=(0, 2**62), k=(0, 64))
        return (ranges | dict(top_k=(1, 2**31), block_length=(0, 2**31))).get(name)


class Refused(UserError):
    """A request that is answered with another status than 400."""

    def __init__(self, message, status):
        super().__init__(message)
        self.status = status


def as_error(message, status):
    kind = 'server_error' if status >= 500 else 'invalid_request_error'
    return {'error': {'message': message, 'type': kind, 'code': int(status)}}


class Stopped(Exception):
    """Ends `generate` from within, once nobody waits for more of its rows."""


def load_page():
    """Return the page, and the policy by which a browser runs its own script and style and nothing else."""
    text = PAGE.read_text(encoding='utf-8')
    parts = {}  # of the security policy
    for kind in ('script', 'style'):
        digest = hashlib.sha256(re.search(f'(?s)<{kind}>(.*?)</{kind}>', text)[1].encode()).digest()
        parts[kind] = f"{kind}-src 'sha256-{base64.b64encode(digest).decode()}'"
    rest = "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    policy = f"default-src 'none'; {parts['script']}; {parts['style']}; {rest}"
    return text.encode(), policy


# ---------------------------------------------------------------------------- models, and what is asked of them


class Model:
    """A checkpoint, and how a request becomes its token ids."""

    encoding = threading.Lock()  # a word takes a hundred times its length in memory: one text at a time

    def __init__(self, path, device, token=None, revision=None, weights='float32'):
        state = checkpoints.load(path, token, revision)
        self.name = run_folder.name_of(path)
        self.tokenizer = Tokenizer(state['tokenizer'], start=state['start_token'])
        self.start = state['start_token']
        self.form, self.stops = state.get('prompt_format'), set(prompts.stop_tokens(state, self.tokenizer))
        self.module = checkpoints.load_model(state, device, weights)
        own, self.block_size = self.module.config.block_length, self.module.config.block_size
        self.infills = not self.module.causal and (0 in own or not any(own))  # sees what stands behind a gap
        samplers = [] if self.module.causal else [name for name in SAMPLERS if name != 'speculative']
        samplers += ['speculative'] * bool(self.module.config.ar_weight)
        about = dict(architecture=state['architecture'], block_size=self.block_size, infills=self.infills)
        about |= dict(samplers=samplers, chats=bool(self.form), parameters=self.module.num_parameters())
        self.about = {'id': self.name, 'object': 'model', 'created': 0, 'owned_by': 'you', **about}

    def encode(self, text):
        with self.encoding:
            return self.tokenizer.encode(text)

    def ids_of_prompt(self, text):
        """Return the ids of a text to continue, after a start token as in sample.py."""
        ids = self.encode(text)
        ids = prompts.before(ids, self.tokenizer, self.start) + ids
        self.check_length(len(ids), self.block_size - 1)
        return ids

    def check_length(self, size, limit):
        require(size <= limit, f'The text has {size} tokens; {self.name} reads {limit}: shorten it.')

    def ids_of_chat(self, messages, new):
        """Return the ids of a conversation, cut on the left where it is too long with `new` tokens."""
        form, (turns, system) = self.form or prompts.DEFAULT, turns_of(messages)
        with self.encoding:
            ids, _ = prompts.encode(self.tokenizer, form, turns, system)
            start = prompts.start_of(form, self.tokenizer, self.start)
        return [start, *ids[1 - max(self.block_size // 2, self.block_size - new) :]]

    def ids_of_infill(self, text):
        """Return the ids of a text with gaps, <mask:N>, and how many stand before the text."""
        problem = f'{self.name} writes from left to right and sees nothing behind a gap'
        require(self.infills, f'{problem}; choose a diffusion model of whole rows.')
        gaps = prompts.GAP.findall(text)
        self.check_length(sum(int(gap.lstrip('0')[:9] or 0) for gap in gaps), self.block_size)
        with self.encoding:
            ids = prompts.encode_infill(self.tokenizer, text)
        before = prompts.before(ids, self.tokenizer, self.start)
        self.check_length(len(before + ids), self.block_size)
        return before + ids, len(before)


def turns_of(messages):
    """Return the turns of a conversation, as `prompts.encode` takes them, and its system message."""
    said = []
    for message in messages:
        message = message if isinstance(message, dict) else {}
        role, content = message.get('role'), message.get('content')
        if isinstance(content, list):  # of parts
            parts = [part.get('text') if isinstance(part, dict) else None for part in content]
            content = ''.join(parts) if all(isinstance(part, str) for part in parts) else content
        is_text = isinstance(content, str)
        require(is_text, f'A message has no text as its content, but {content!r:.50}; give one.')
        said.append((role, content))
    system = said.pop(0)[1] if said and said[0][0] in ('system', 'developer') else ''
    roles = [role for role, _ in said]
    fits = len(said) % 2 == 1 and roles == [('user', 'assistant')[i % 2] for i in range(len(said))]
    remedy = 'begin with system or user, let user and assistant take turns, and end with user'
    require(fits, f'messages are of {", ".join(map(str, roles)) or "nobody":.100}; {remedy}.')
    texts = [text for _, text in said] + [None]
    return [(texts[i], '', texts[i + 1]) for i in range(0, len(said), 2)], system


def read_fields(body, known, limits):
    """Return the fields of a request that are not null; UserError for those that are unknown or no good."""
    require(isinstance(body, dict), 'The body is no JSON object; write {"model": ...}.')
    fields = {name: value for name, value in body.items() if value is not None}
    for name, value in list(fields.items()):
        if name not in known:
            is_idle = name in IDLE or name in NEUTRAL and value == NEUTRAL[name]
            require(is_idle, f'{name[:50]!r} is not supported here; leave it out.')
            continue
        kind = known[name]
        if kind is float and type(value) is int and abs(value) < 1e9:
            fields[name] = value = float(value)
        fits = type(value) is kind or kind == str | list and isinstance(value, kind)
        require(fits, f'{name} is {value!r:.50}; give {getattr(kind, "__name__", kind)}.')
        low, high = limits.range_of(name) or (None, None)
        fits = low is None or low <= value <= high
        require(fits, f'{name} is {value}; it must be between {low} and {high}.')
    return fields


def texts_of(name, given, most):
    """Return the list of texts that a field gives, one or several."""
    texts = [given] if isinstance(given, str) else given
    is_list = 1 <= len(texts) <= most and all(isinstance(text, str) for text in texts)
    require(is_list, f'{name} is {given!r:.50}; give a text, or a list of 1 to {most} texts.')
    return texts


class Job:
    """A request in the queue: its rows, and the events that its connection waits for.

    events: (index, new text, finish_reason or None) of a row that is streamed; None: all is written; an Exception.
    """

    def __init__(self, path, fields, model, limits):
        self.model, self.path, self.fields, self.id = model, path, fields, f'request-{uuid.uuid4().hex}'
        self.stream, self.watch = fields.get('stream', False), fields.get('watch', False)
        self.is_chat, self.is_infill = path == '/v1/chat/completions', path == '/v1/infill'
        asked = fields.get('max_completion_tokens', fields.get('max_tokens', min(200, limits.max_tokens)))
        self.new, self.seed = 0 if self.is_infill else asked, fields.get('seed')
        self.stop = [text for text in texts_of('stop', fields.get('stop') or [''], 16) if text]
        self.options = {name: fields[name] for name in SAMPLING if name in fields}
        sampler = fields.get('sampler') or 'first_hitting'
        idle = {name for name, samplers in runtime.WITHOUT.items() if sampler in samplers.split()}
        idle |= set() if model.module.has_beliefs else {'k'}
        how = f'with sampler={sampler!r}'
        if model.module.causal:
            idle, how = SAMPLING.keys() - {'temperature', 'top_p', 'top_k'}, 'from left to right'
        idle = ', '.join(sorted(idle & self.options.keys()))
        require(not idle, f'{idle} has no effect on {model.name}, which writes {how}; leave it out.')
        with user_errors():
            generate(model.module, [], 0, **self.options)  # of no prompt: only to refuse wrong options
        prompts, n = self.prompts(limits.batch_size), fields.get('n', 1)
        self.rows = [Row(self, i * n + j, ids) for i, ids in enumerate(prompts) for j in range(n)]
        self.prompt_tokens = sum(map(len, prompts))
        self.check(limits)
        self.frames = Frames(model.tokenizer, stops=model.stops) if self.watch else None
        self.events, self.cancelled, self.closed = queue.SimpleQueue(), False, False
        self.deadline = time.monotonic() + limits.timeout
        # Of diffusion only rows of one length run together.
        length = 0 if model.module.causal else len(prompts[0])
        alone = self.watch or self.seed is not None
        options = tuple(sorted(self.options.items()))
        self.key = object() if alone else (model.name, path, options, self.new, length)

    def prompts(self, most):
        """Return the ids of each prompt."""
        name = {'/v1/chat/completions': 'messages', '/v1/infill': 'text'}.get(self.path, 'prompt')
        require(name in self.fields, f'{name} is missing; give it.')
        given = self.fields[name]
        if self.is_chat:
            return [self.model.ids_of_chat(given, self.new)]
        if self.is_infill:
            ids, self.added = self.model.ids_of_infill(given)
            return [ids]
        return [self.model.ids_of_prompt(text) for text in texts_of(name, given, most)]

    def check(self, limits):
        """Raise a UserError for what each field allows, but not all of them together."""
        rows, most = len(self.rows), limits.batch_size
        require(rows <= most, f'{rows} texts are asked for at once; ask for at most {most}.')
        fits = rows == 1 and self.new <= 512 and not self.stream
        problem = 'watch shows one text, of at most 512 tokens, as a whole'
        require(fits or not self.watch, f'{problem}; leave out stream and n, or watch.')
        fits = max(map(len, self.stop), default=0) <= 100
        require(fits, 'A stop text is longer than 100 characters; shorten it.')
        fills = not (self.is_infill and self.options.get('sampler') == 'speculative')
        require(fills, "sampler='speculative' fills no gap; choose another.")

    def close(self):
        """Say that all is written, if it is."""
        if not self.closed and all(row.finish for row in self.rows):
            self.closed = True
            self.events.put(None)

    def answer(self):
        """Return the response to a request that was not streamed."""
        choices = [self.choice(row.index, row.text, row.finish) for row in self.rows]
        if not self.watch:
            return self.envelope(choices, self.counts())
        if not self.is_infill:
            self.frames.end(len(self.rows[0].ids) + len(self.rows[0].new))
        return self.envelope(choices, self.counts()) | {'frames': self.frames.steps}

    def chunk(self, index, text, finish):
        """Return a part of a response that is streamed."""
        return self.envelope([self.choice(index, text, finish, 'delta')], suffix='.chunk' * self.is_chat)

    def choice(self, index, text, finish, said='message'):
        content = {said: {'role': 'assistant', 'content': text}} if self.is_chat else {'text': text}
        return {'index': index, 'finish_reason': finish, 'logprobs': None, **content}

    def counts(self):
        mask_id = self.model.tokenizer.mask_id
        new = sum(row.ids.count(mask_id) if self.is_infill else len(row.new) for row in self.rows)
        parts = {'prompt_tokens': self.prompt_tokens, 'completion_tokens': new}
        return parts | {'total_tokens': self.prompt_tokens + new}

    def envelope(self, choices, usage=None, suffix=''):
        kind = 'chat.completion' if self.is_chat else 'infill' if self.is_infill else 'text_completion'
        about = dict(id=self.id, object=kind + suffix, created=int(time.time()), model=self.model.name)
        return about | dict(choices=choices, usage=usage)


class Row:
    """One text of a job: the tokens so far, and of their text what no further token changes."""

    def __init__(self, job, index, ids):
        self.job, self.index, self.ids = job, index, ids
        self.new, self.text, self.finish = [], '', None

    def add(self, new):
        """Take new tokens, up to a stop token or as many as were asked for."""
        if self.finish:
            return
        new = new[: self.job.new - len(self.new)]
        ends = [i + 1 for i, one in enumerate(new) if one in self.job.model.stops]
        self.new += new[: ends[0]] if ends else new
        is_full = len(self.new) == self.job.new
        if ends or is_full or self.job.stop or self.job.stream:
            self.tell('stop' if ends else 'length' if is_full else None)

    def tell(self, finish):
        """Hand on what is new in the text, and whether nothing more comes; a stop text ends it as well."""
        if self.finish:
            return
        job, decode = self.job, self.job.model.tokenizer.decode
        before = [] if job.is_infill else self.ids[-1:]  # without it a word may lose its space
        text = decode(before + self.new)[len(decode(before)) :]
        text = text.lstrip() if job.is_chat else text
        stops = [i for i in map(text.find, job.stop) if i >= 0]
        if stops:
            text, finish = text[: min(stops)], 'stop'
        elif not finish:  # half a character, and what may become a stop text, wait
            text = text.rstrip('\ufffd')
            held = [n for stop in job.stop for n in range(len(stop)) if text.endswith(stop[:n])]
            text = text[: len(text) - max(held, default=0)]
        text = text.rstrip() if job.is_chat else text
        more, self.text, self.finish = text[len(self.text) :], text, finish
        if job.stream and (more or finish):
            job.events.put((self.index, more, finish))


# ---------------------------------------------------------------------------- the one thread that runs the models


class Writer(threading.Thread):
    """Writes the jobs that wait: those of one key together."""

    def __init__(self, dist, batch_size):
        super().__init__(daemon=True)
        self.dist, self.batch_size = dist, batch_size
        self.waiting, self.changed = deque(), threading.Condition()

    def submit(self, job):
        with self.changed:
            self.waiting = deque(one for one in self.waiting if not one.cancelled)
            self.waiting.append(job)
            self.changed.notify()

    def take(self):
        """Wait for a job; return it with those that can be written along with it."""
        with self.changed:
            self.changed.wait_for(lambda: self.waiting)
            jobs = [self.waiting.popleft()]
            for job in [job for job in self.waiting if job.key == jobs[0].key]:
                if sum(len(one.rows) for one in (*jobs, job)) <= self.batch_size:
                    self.waiting.remove(job)
                    jobs.append(job)
        return [job for job in jobs if not job.cancelled]

    def run(self):
        while True:
            jobs = self.take()
            try:
                if jobs:
                    self.write(jobs)
            except Exception as error:  # whatever it is, the next jobs are to be answered
                traceback.print_exc()
                for job in jobs:
                    job.events.put(Refused(f'The model failed: {first_line(error)[:200]}.', 500))

    def write(self, jobs):
        """Write the rows of jobs of one key; of diffusion those of one length at once: its stream has no gaps."""
        job, rows = jobs[0], [row for job in jobs for row in job.rows]
        seed = random.getrandbits(62) if job.seed is None else job.seed
        one_by_one = job.options.get('sampler') == 'speculative'
        parts = {}
        for number, row in enumerate(rows):
            part = number if one_by_one else 0 if job.model.module.causal else len(row.ids)
            parts.setdefault(part, []).append(row)
        for i, part in enumerate(sorted(parts)):
            self.write_part(job, parts[part], seed + i)

    def write_part(self, job, rows, seed):
        """Write rows by one call of `generate`, which ends early when nobody waits for them any more."""

        def stream(new):
            for row, tokens in zip(rows, new):
                row.add(tokens)
            if not job.frames:  # which see a step after the stream
                check()

        def check(*step):
            if job.frames:
                job.frames(*step)
            for one in {row.job for row in rows}:
                one.close()
            if all(row.finish or row.job.cancelled for row in rows):
                raise Stopped

        if job.frames:
            job.frames.begin(rows[0].ids)
        check.shows_beliefs = job.watch
        options = {**job.options, 'seed': seed, 'stream': stream if job.new else None}
        if job.frames or not job.model.module.causal:  # which a stream tells of its windows only
            options['watch'] = check
        ids = [row.ids for row in rows]
        with suppress(Stopped), self.dist.autocast():
            written = generate(job.model.module, ids, job.new, stop_tokens=job.model.stops, **options)
            for row, tokens in zip(rows, written):
                row.new = tokens[row.job.added :] if job.is_infill else row.new
        for row in rows:
            row.tell('stop' if job.is_infill else 'length')
            row.job.close()
