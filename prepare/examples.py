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


# ---------------------------------------------------------------------------- records to conversations


def conversation(record, where, field=''):
    """Return a record as JSON text: {"system": "...", "turns": [[instruction, input, output], ...]} or {"text": "..."}.

    Alpaca's, Dolly's, prompt and completion, `messages`, ShareGPT's `conversations`, or the plain text in
    `field`, if one is named. Raises UserError, which names `where`, for a record of any other shape.
    """
    if field:
        return dump({'text': text_of(field, record, where)})
    if not isinstance(record, dict):
        raise UserError(
            f'{where}: {kind_of(record)} instead of a record; write {{"instruction": "...", '
            '"input": "...", "output": "..."}.'
        )
    for name in ('messages', 'conversations'):
        if name in record:
            return dump(from_messages(record[name], f'{where}, {name}'))
    for asked, answered, given in SHAPES:
        if asked in record and answered in record:
            if isinstance(record[asked], list) and isinstance(record[answered], list):  # TRL's conversations
                return dump(from_messages(record[asked] + record[answered], where))
            context = text_of(given, record, where) if record.get(given) else ''
            return dump(
                {'turns': [[text_of(asked, record, where), context, text_of(answered, record, where)]]}
            )
    raise UserError(
        f'{where}: the fields {", ".join(map(repr, record)) or "of an empty record"} are of no known '
        'example; give instruction and output, instruction and response, prompt and completion, messages '
        'or conversations, or name the field of a plain text with --field.'
    )


def dump(example):
    return json.dumps(example, ensure_ascii=False)


def from_messages(messages, where):
    """Return a conversation made of [{"role", "content"}] or ShareGPT's [{"from", "value"}].

    Consecutive user messages are one instruction; what follows the last answer is left out.
    """
    if not isinstance(messages, list):
        raise UserError(
            f'{where}: {kind_of(messages)} instead of a list of messages; '
            'write [{"role": "user", "content": "..."}, ...].'
        )
    system, asked, turns = [], [], []
    for number, message in enumerate(messages, 1):
        here = f'{where}, message {number}'
        keys = ('from', 'value') if isinstance(message, dict) and 'from' in message else ('role', 'content')
        role, text = (text_of(key, message, here) for key in keys)
        require(
            role in ROLES,
            f'{here}: the role {role!r} is not known; choose from {", ".join(ROLES)}, or leave such records out.',
        )
        if role in ASSISTANT:
            turns.append(['\n\n'.join(asked), '', text])
            asked = []
        else:
            (system if role == 'system' else asked).append(text)
    require(turns, f'{where}: nobody answers; one message has to be of the role "assistant".')
    return {'system': '\n\n'.join(system), 'turns': turns}


# ---------------------------------------------------------------------------- conversations to tokens


class Examples:
    """Encode the documents that `conversation` makes; each worker of the writer gets a copy."""

    def __init__(self, form, max_seq_len, start_token=None):
        self.form, self.max_seq_len = form, max_seq_len
        self.settings = {'prompt_format': form}  # entries of the folder's config.json
        if start_token is not None:
            self.settings['start_token'] = start_token

    def text(self, document):
        """Return the whole example as a text, from which a tokenizer learns."""
        example = json.loads(document)
        if 'text' in example:
            return example['text']
        system = example.get('system', '')
        return '\n\n'.join(
            prompts.prompt_of(self.form, instruction, given, '' if number else system) + output
            for number, (instruction, given, output) in enumerate(example['turns'])
        )

    def encode(self, tokenizer, document):
        """Return (ids, loss mask, outcome); an example that is left out has no ids."""
        example = json.loads(document)
        answer = example['text'] if 'text' in example else example['turns'][-1][2]
        if not answer.strip():
            return [], [], 'empty'
        if 'text' in example:
            ids = tokenizer.encode(answer) + [tokenizer.endoftext_id]
            loss_mask = [1] * len(ids)
        else:
            ids, loss_mask = prompts.encode(tokenizer, self.form, example['turns'], example.get('system', ''))
        fitted = prompts.fit(ids, loss_mask, self.max_seq_len - 1)  # a row begins with a start token
        if not fitted:
            return [], [], 'too long'
        return *fitted, 'whole' if len(fitted[0]) == len(ids) else 'cut'

    def report(self, counts):
        """Return the counts of OUTCOMES, and print them; raise UserError where no example is left."""
        left_out = f'{counts["too long"]:,} whose answer is longer than that, {counts["empty"]:,} with an empty answer'
        problem = f'No example of max_seq_len={self.max_seq_len} is left: {left_out}'
        require(counts['documents'], f'{problem}; allow more tokens, or repair the data.')
        print(
            f'{counts["whole"]:,} examples as they are; {counts["cut"]:,} whose prompt was cut on the left to '
            f'{self.max_seq_len} tokens; left out: {left_out}'
        )
        return {outcome: counts[outcome] for outcome in OUTCOMES}
