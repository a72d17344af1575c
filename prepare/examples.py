"""Instruction examples: records of the usual shapes, made into conversations and then into tokens and masks."""

import json

from lm import prompts
from lm.configurator import UserError
from prepare.readers import kind_of, text_of

SHAPES = (  # fields that have to be there, and one that may: of the instruction, the answer, the input
    ('instruction', 'output', 'input'),  # Alpaca
    ('instruction', 'response', 'context'),  # Dolly
    ('prompt', 'completion', ''),
)
ROLES = {
    'system': 'system',
    'user': 'user',
    'human': 'user',
    'assistant': 'assistant',
    'gpt': 'assistant',
    'chatgpt': 'assistant',
    'bot': 'assistant',
    'model': 'assistant',
}


# ---------------------------------------------------------------------------- records to conversations


def conversation(record, where, field=''):
    """
    A record as JSON text {"system": "...", "turns": [[instruction, input, output], ...]}, or {"text": "..."}.

    Alpaca's, Dolly's, prompt and completion, `messages`, ShareGPT's `conversations`, or the plain text that stands
    in `field`, if one is named. Raises UserError, which names `where`, for a record of any other shape.
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
    for instruction, output, given in SHAPES:
        if instruction in record and output in record:
            if isinstance(record[instruction], list) and isinstance(
                record[output], list
            ):  # TRL's conversations
                return dump(from_messages(record[instruction] + record[output], where))
            given = text_of(given, record, where) if record.get(given) else ''
            return dump(
                {'turns': [[text_of(instruction, record, where), given, text_of(output, record, where)]]}
            )
    raise UserError(
        f'{where}: the fields {", ".join(map(repr, record)) or "of an empty record"} are of no known '
        'example; give instruction and output, instruction and response, prompt and completion, messages '
        'or conversations, or name the field of a plain text with --field.'
    )


def dump(example):
    return json.dumps(example, ensure_ascii=False)


def from_messages(messages, where):
    """
    A conversation from [{"role", "content"}] or ShareGPT's [{"from", "value"}].

    What users say one after the other is one instruction; what follows the last answer is left out.
    """
    if not isinstance(messages, list):
        raise UserError(
            f'{where}: {kind_of(messages)} instead of a list of messages; '
            'write [{"role": "user", "content": "..."}, ...].'
        )
    system, asked, turns = [], [], []
    for number, message in enumerate(messages, 1):
        place = f'{where}, message {number}'
        names = ('from', 'value') if isinstance(message, dict) and 'from' in message else ('role', 'content')
        role, text = (text_of(name, message, place) for name in names)
        if role not in ROLES:
            raise UserError(
                f'{place}: the role {role!r} is not known; choose from {", ".join(ROLES)}, '
                'or leave such records out.'
            )
        if ROLES[role] == 'assistant':
            turns.append(['\n\n'.join(asked), '', text])
            asked = []
        else:
            (system if ROLES[role] == 'system' else asked).append(text)
    if not turns:
        raise UserError(f'{where}: nobody answers; one message has to be of the role "assistant".')
    return {'system': '\n\n'.join(system), 'turns': turns}


# ---------------------------------------------------------------------------- conversations to tokens


class Examples:
    """What the writer needs to make tokens of the documents of `conversation`; its workers get a copy."""

    def __init__(self, form, max_seq_len, start_token=None):
        self.form, self.max_seq_len = form, max_seq_len
        self.settings = {'prompt_format': form}  # entries of the folder's config.json
        if start_token is not None:
            self.settings['start_token'] = start_token

    def text(self, document):
        """The whole example as a text: what a tokenizer learns from."""
        example = json.loads(document)
        if 'text' in example:
            return example['text']
        system = example.get('system', '')
        return '\n\n'.join(
            prompts.prompt_of(self.form, instruction, given, '' if number else system) + output
            for number, (instruction, given, output) in enumerate(example['turns'])
        )

    def encode(self, tokenizer, document):
        """(ids, trained, what became of it): 'whole', 'cut', or without ids 'empty' or 'too long'."""
        example = json.loads(document)
        if not (example.get('text') or example['turns'][-1][2]).strip():
            return [], [], 'empty'
        if 'text' in example:
            ids = tokenizer.encode(example['text']) + [tokenizer.endoftext_id]
            trained = [1] * len(ids)
        else:
            ids, trained = prompts.encode(tokenizer, self.form, example['turns'], example.get('system', ''))
        kept = prompts.fit(ids, trained, self.max_seq_len - 1)  # a row begins with a start token
        return (*kept, 'whole' if len(kept[0]) == len(ids) else 'cut') if kept else ([], [], 'too long')

    def describe(self, splits):
        """Counts of what became of the examples; says so as well."""
        fates = self.fates(splits)
        print(
            f'{fates["whole"]:,} examples as they are; {fates["cut"]:,} whose prompt was cut on the left to '
            f'{self.max_seq_len} tokens; left out: {fates["too long"]:,} whose answer is longer than that, '
            f'{fates["empty"]:,} with an empty answer'
        )
        return fates

    def nothing_left(self, splits):
        fates = self.fates(splits)
        return (
            f'No example is left: {fates["too long"]} answers are longer than --max_seq_len={self.max_seq_len}, '
            f'{fates["empty"]} are empty; allow more tokens, or repair the data.'
        )

    def fates(self, splits):
        return {
            fate: sum(split.fates[fate] for split in splits) for fate in ('whole', 'cut', 'too long', 'empty')
        }
