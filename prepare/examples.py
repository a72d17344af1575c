"""Instruction examples: records of the usual shapes, made into conversations and then into tokens and masks."""

import json

from lm import prompts
from lm.configurator import UserError, require
from lm.records import kind_of, text_of

SHAPES = (  # fields that have to be there, and one that may: of the instruction, the answer, the input
    ('instruction', 'output', 'input'),  # Alpaca
    ('instruction', 'response', 'context'),  # Dolly
    ('prompt', 'completion', ''),
)
ASSISTANT = ('assistant', 'gpt', 'chatgpt', 'bot', 'model')
ROLES = ('system', 'user', 'human', *ASSISTANT)
OUTCOMES = ('whole', 'cut', 'too long', 'empty', 'refused')  # of encoding; the last three are left out


class Document(str):
    """A conversation as JSON text."""

    unread = ()  # names of fields of its record that were not read
    part = None  # the split that it belongs to, where its hash does not decide that


def conversation(record, where, field=''):
    """Return a record as {'system': '...', 'turns': [[instruction, input, output], ...]} or, with `field`,
    {'text': ...}, and the names of the fields that were read. A turn that ends with False is not learnt. UserError: a
    record of none of the known shapes."""
    if field:
        return {'text': text_of(field, record, where)}, [*record]
    system = text_of('system', record, where) if record.get('system') else ''
    for name in ('messages', 'conversations'):
        if name in record:
            return from_messages(record[name], f'{where}, {name}', system), ['system', name]
    for asked, answered, given in SHAPES:
        if asked in record and answered in record:
            read = ['system', asked, answered, given]
            if isinstance(record[asked], list) and isinstance(record[answered], list):  # TRL's conversations
                return from_messages(record[asked] + record[answered], where, system), read
            instruction, output = text_of(asked, record, where), text_of(answered, record, where)
            given = text_of(given, record, where) if record.get(given) else ''
            return {'turns': [[instruction, given, output]]} | ({'system': system} if system else {}), read
    shapes = ', '.join(f'{asked} and {answered}' for asked, answered, _ in SHAPES)
    problem = f'{where}: the fields {", ".join(map(repr, record))} are of no known example'
    raise UserError(f'{problem}; give {shapes}, messages, conversations, or --field.')


def unread_of(record, read):
    """Return the names of the fields that hold something, but for those that were read."""
    return [name for name, value in record.items() if name not in read and value not in (None, '', [], {})]


def from_messages(messages, where, system=''):
    """Return a conversation made of [{"role", "content"}] or ShareGPT's [{"from", "value"}]: consecutive user
    messages are one instruction, what follows the last answer is left out, an answer of `weight` 0 or `train`
    false is not learnt."""
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    require(is_list, f'{where}: {kind_of(messages)} instead of a list; write [{{"role": "user", ...}}, ...].')
    systems, asked, turns, unread = [system] if system else [], [], [], {}
    for number, message in enumerate(messages, 1):
        here = f'{where}, message {number}'
        keys = ('from', 'value') if 'from' in message else ('role', 'content')
        role, text = (text_of(key, message, here) for key in keys)
        require(role in ROLES, f'{here}: the role {role!r:.40} is not known; choose from {", ".join(ROLES)}.')
        known = (0, 1) if role in ASSISTANT else (0,)  # only answers are learnt
        switches = [key for key in ('weight', 'train') if message.get(key) in known]
        unread |= {f'{key} of a message': True for key in unread_of(message, [*keys, *switches])}
        if role in ASSISTANT:
            turns.append(['\n\n'.join(asked), '', text] + [False] * any(not message[key] for key in switches))
            asked = []
        else:
            (systems if role == 'system' else asked).append(text)
    require(turns, f'{where}: nobody answers; one message has to be of the role "assistant".')
    return {'system': '\n\n'.join(systems), 'turns': turns, 'unread': [*unread]}


class Examples:
    """Encode conversations, as JSON text; each worker of the writer gets a copy."""

    def __init__(self, form, max_seq_len, on_error):
        self.form, self.max_seq_len, self.on_error = form, max_seq_len, on_error

    def read(self, document):
        """Return (format, turns, system message) of a document."""
        example = json.loads(document)
        if 'text' in example:  # learnt as a whole
            return '{output}', [('', '', example['text'])], ''
        return self.form, example['turns'], example.get('system', '')

    def text(self, document):
        """Return the whole example as a text, from which a tokenizer learns."""
        form, turns, system = self.read(document)
        texts = []
        for instruction, given, output, *_ in turns:
            texts.append(prompts.prompt_of(form, instruction, given, system) + output)
            system = ''  # said once
        return '\n\n'.join(texts)

    def encode(self, tokenizer, document):
        """Return [(ids, loss mask)], several of a long plain text, and the outcome; [] where it is left out."""
        form, turns, system = self.read(document)
        try:
            ids, loss_mask = prompts.encode(tokenizer, form, turns, system)
        except UserError as error:  # by a chat template
            problem = f'{error} It begins {document[:80]!r}'
            require(self.on_error == 'skip', f'{problem}; --on_error=skip leaves it out.')
            return [], 'refused'
        if not turns[-1][2].strip() or 1 not in loss_mask:
            return [], 'empty'
        limit = self.max_seq_len - 1  # a row begins with a start token
        windows = prompts.windows(loss_mask, limit)
        parts = [prompts.fit(ids[start:end], loss_mask[start:end], limit) for start, end in windows]
        if None in parts:
            return [], 'too long'
        return parts, 'whole' if sum(len(part) for part, _ in parts) == len(ids) else 'cut'
