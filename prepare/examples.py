"""Instruction examples: records of the usual shapes, made into conversations and then into tokens and masks."""

import json

from lm import prompts
from lm.configurator import UserError, require
from lm.records import kind_of
from prepare.readers import text_of

SHAPES = (  # fields that have to be there, and one that may: of the instruction, the answer, the input
    ('instruction', 'output', 'input'),  # Alpaca
    ('instruction', 'response', 'context'),  # Dolly
    ('prompt', 'completion', ''),
)
ASSISTANT = ('assistant', 'gpt', 'chatgpt', 'bot', 'model')
ROLES = ('system', 'user', 'human', *ASSISTANT)
OUTCOMES = ('whole', 'cut', 'too long', 'empty')  # of encoding an example; the last two are left out


def conversation(record, where, field=''):
    """Return a record as {'system': '...', 'turns': [[instruction, input, output], ...]} or, with `field`, {'text': ...}.

    Raises UserError, which names `where`, for a record of none of the known shapes.
    """
    if field:
        return {'text': text_of(field, record, where)}
    for name in ('messages', 'conversations'):
        if name in record:
            return from_messages(record[name], f'{where}, {name}')
    for asked, answered, given in SHAPES:
        if asked in record and answered in record:
            if isinstance(record[asked], list):  # TRL's conversations
                return from_messages([*record[asked], *record[answered]], where)
            instruction, output = text_of(asked, record, where), text_of(answered, record, where)
            given = text_of(given, record, where) if record.get(given) else ''
            return {'turns': [[instruction, given, output]]}
    shapes = ', '.join(f'{asked} and {answered}' for asked, answered, _ in SHAPES)
    problem = f'{where}: the fields {", ".join(map(repr, record)) or "(none)"} are of no known example'
    raise UserError(f'{problem}; give {shapes}, messages, conversations, or --field.')


def from_messages(messages, where):
    """Return a conversation made of [{"role", "content"}] or ShareGPT's [{"from", "value"}].

    Consecutive user messages are one instruction; what follows the last answer is left out.
    """
    is_list = isinstance(messages, list) and all(isinstance(message, dict) for message in messages)
    problem = f'{where}: {kind_of(messages)} instead of a list of messages'
    require(is_list, f'{problem}; write [{{"role": "user", "content": "..."}}, ...].')
    system, asked, turns = [], [], []
    for number, message in enumerate(messages, 1):
        here = f'{where}, message {number}'
        keys = ('from', 'value') if 'from' in message else ('role', 'content')
        role, text = (text_of(key, message, here) for key in keys)
        require(role in ROLES, f'{here}: the role {role!r} is not known; choose from {", ".join(ROLES)}.')
        if role in ASSISTANT:
            turns.append(['\n\n'.join(asked), '', text])
            asked = []
        else:
            (system if role == 'system' else asked).append(text)
    require(turns, f'{where}: nobody answers; one message has to be of the role "assistant".')
    return {'system': '\n\n'.join(system), 'turns': turns}


class Examples:
    """Encode conversations, as JSON text; each worker of the writer gets a copy."""

    def __init__(self, form, max_seq_len):
        self.form, self.max_seq_len = form, max_seq_len

    def read(self, document):
        """Return (format, turns, system message) of a document."""
        example = json.loads(document)
        if 'text' in example:  # learnt as a whole
            return '{output}', [('', '', example['text'])], ''
        return self.form, example['turns'], example.get('system', '')

    def text(self, document):
        """Return the whole example as a text, from which a tokenizer learns."""
        form, turns, system = self.read(document)
        return '\n\n'.join(
            prompts.prompt_of(form, instruction, given, '' if number else system) + output
            for number, (instruction, given, output) in enumerate(turns)
        )

    def encode(self, tokenizer, document):
        """Return (ids, loss mask, outcome); an example that is left out has no ids."""
        form, turns, system = self.read(document)
        if not turns[-1][2].strip():
            return [], [], 'empty'
        ids, loss_mask = prompts.encode(tokenizer, form, turns, system)
        fitted = prompts.fit(ids, loss_mask, self.max_seq_len - 1)  # a row begins with a start token
        if not fitted:
            return [], [], 'too long'
        return *fitted, 'whole' if len(fitted[0]) == len(ids) else 'cut'

    def describe(self, counts):
        """Return what config.json says of them."""
        return {'prompt_format': self.form, 'examples': {name: counts[name] for name in OUTCOMES}}
