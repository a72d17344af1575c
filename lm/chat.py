"""Chat templates of transformers: programs in Jinja that make one text of a conversation.

What is said is rendered between characters that no text has, so that it is told from what the template says: only the
template's own markers are special tokens.
"""

import json
import re
from contextlib import suppress
from datetime import datetime
from functools import cache, partial

from jinja2.sandbox import ImmutableSandboxedEnvironment

from lm.configurator import UserError, require
from lm.files import as_sentence

SAID = re.compile('\ue000(\\d+)\ue001(.*?)\ue002', re.S)  # the number of a message, and its content
GENERATION = re.compile(r'{%(-?)\s*(end)?generation\s*(-?)%}')  # transformers' own: what the assistant says


def is_chat_template(form):
    return isinstance(form, str) and ('{%' in form or '{{' in form)


@cache
def compiled(template):
    def refuse(message):
        raise ValueError(message)

    options = {'trim_blocks': True, 'lstrip_blocks': True, 'extensions': ['jinja2.ext.loopcontrols']}
    environment = ImmutableSandboxedEnvironment(**options)
    environment.filters['tojson'] = partial(json.dumps, ensure_ascii=False)
    environment.globals['raise_exception'] = refuse
    environment.globals['strftime_now'] = lambda form: datetime.now().strftime(form)  # when it is rendered
    # Another tag in its place strips the same spaces.
    tag = lambda found: f'{{%{found[1]} {"endif" if found[2] else "if true"} {found[3]}%}}'
    return environment.from_string(GENERATION.sub(tag, template))


def render(template, tokenizer, messages, add_generation_prompt):
    """Return what a template makes of messages, [{'role': 'user', 'content': ...}, ...]."""
    name_of = tokenizer.inner.id_to_token
    options = {'bos_token': name_of(tokenizer.start_id), 'eos_token': name_of(tokenizer.endoftext_id)}
    options |= {'tools': None, 'documents': None, 'add_generation_prompt': add_generation_prompt}
    with as_sentence('The chat template refuses this conversation', 'leave out what it does not know'):
        return compiled(template).render(messages=messages, **options)


def pieces(template, tokenizer, turns, system=''):
    """Return [(text, role)] of a conversation, role 'template' for what the template says itself.

    turns: as in `prompts.encode`. UserError: the template refuses the conversation, or changes what is said.
    """
    said = [('system', system)] if system else []
    for asked, given, output, *_ in turns:
        said += [('user', f'{asked}\n\n{given}' if given else asked)]
        said += [('assistant', output)] if output is not None else []

    def rendered(texts):
        messages = [{'role': role, 'content': text} for (role, _), text in zip(said, texts)]
        return render(template, tokenizer, messages, said[-1][0] != 'assistant')

    texts = [re.sub('[\ue000-\ue002]', '', text) for _, text in said]
    plain = rendered(texts)
    # Many templates strip; those of models that think leave out the thoughts of earlier answers.
    spoken = [x.rpartition('</think>')[2] if role == 'assistant' else x for (role, _), x in zip(said, texts)]
    joined = [x.lstrip('\n') if x != text else x for text, x in zip(texts, spoken)]
    stripped = [[x.strip() for x in part] for part in (texts, spoken)]
    for part in (texts, spoken, joined, *stripped):
        marked = rendered([f'\ue000{i}\ue001{text}\ue002' for i, text in enumerate(part)])
        if SAID.sub(r'\2', marked) == plain:
            first, *others = SAID.split(marked)  # template, number, content, template, ...
            numbers = [*map(int, others[::3])]
            lost = [role for i, (role, text) in enumerate(said) if text and i not in numbers]
            if lost and numbers:
                problem = f'The chat template leaves out what the {lost[0]} says; leave it out'
                raise UserError(f'{problem}, or prepare data with --prompt_format=chatml.')
            found = [(first, 'template')]
            for number, content, text in zip(numbers, others[1::3], others[2::3]):
                found += [(content, said[number][0]), (text, 'template')]
            return found
    raise UserError('The chat template changes what is said; take another, such as --prompt_format=chatml.')


def check_prefix(template, tokenizer, turns, system):
    """Raise a UserError if a prompt is not what stands before its answer, whose loss would be of another text."""
    parts = pieces(template, tokenizer, turns, system)
    answers = [i for i, (_, role) in enumerate(parts) if role == 'assistant']
    for number, end in enumerate(answers):
        asked = [*turns[:number], (*turns[number][:2], None)]
        prompt = ''.join(text for text, _ in pieces(template, tokenizer, asked, system))
        before = ''.join(text for text, _ in parts[:end])
        ends, writes = prompt[-40:], before[-40:]
        problem = f'The chat template ends a prompt with {ends!r}, but writes {writes!r} before its answer'
        require(before in (prompt, f'{prompt} '), f'{problem}; take another --prompt_format.')


@cache
def begins_with_space(template, tokenizer):
    """Say whether an answer begins with a space, which a template writes before it but not at the end of a prompt."""
    with suppress(UserError):  # a template that wants more than a question
        both = [pieces(template, tokenizer, [('?', '', answer)]) for answer in (None, '.')]
        prompt, whole = (''.join(text for text, role in parts if role == 'template') for parts in both)
        return whole.startswith(f'{prompt} ')
    return False
