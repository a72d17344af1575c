"""Prompt formats: how an instruction, its input and the answer become one text, and that text tokens.

A format is a template of one turn, or a chat template of transformers (lm/chat.py). What {#input}…{/input} encloses is
left out where the input is empty. The prompt is what stands before {output}; what follows it ends the answer: the first
marker, such as <|im_end|>, if it is a special token of the tokenizer, or else <|endoftext|>. The same characters within
a user's text are never a special token.
"""

import json
import re
from contextlib import suppress
from itertools import pairwise

from lm import chat
from lm.configurator import UserError, require
from lm.tokenizer import settings_of

BLOCKS = '### Instruction:\n{instruction}\n\n{#input}### Input:\n{input}\n\n{/input}### Response:\n{output}'
FORMATS = {
    'default': BLOCKS,
    'alpaca': 'Below is an instruction that describes a task{#input}, paired with an input that provides further '
    'context{/input}. Write a response that appropriately completes the request.\n\n' + BLOCKS,
    'qa': 'Question: {instruction}\n\n{#input}Context: {input}\n\n{/input}Answer:\n{output}',
    'chatml': '{#system}<|im_start|>system\n{system}<|im_end|>\n{/system}'
    '<|im_start|>user\n{instruction}{#input}\n\n{input}{/input}<|im_end|>\n'
    '<|im_start|>assistant\n{output}<|im_end|>\n',
    'llama3': '{#system}<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>{/system}'
    '<|start_header_id|>user<|end_header_id|>\n\n{instruction}{#input}\n\n{input}{/input}<|eot_id|>'
    '<|start_header_id|>assistant<|end_header_id|>\n\n{output}<|eot_id|>',
}
DEFAULT = FORMATS['default']
GAP = re.compile(r'<mask:(\d+)>')


def prompt_of(form, instruction, given='', system=''):
    """Return the prompt as a text, up to where the answer begins; of a chat template only what is said."""
    if chat.is_chat_template(form):
        return '\n\n'.join(filter(None, (system, instruction, given)))
    head, values = head_and_values(form, instruction, given, system)
    return re.sub(r'{(\w+)}', lambda slot: values[slot[1]], head)


def template_of(folder):
    """Return the chat template of a Hugging Face folder, None where there is none."""
    jinja = folder / 'chat_template.jinja'
    if jinja.is_file():
        return jinja.read_text(encoding='utf-8', errors='replace')
    told = settings_of(folder, 'tokenizer_config.json').get('chat_template')
    if isinstance(told, list):  # several, by name
        told = {one.get('name'): one.get('template') for one in told if isinstance(one, dict)}.get('default')
    return told if chat.is_chat_template(told) else None


def head_and_values(form, instruction, given, system):
    """Return the template up to the answer, without its empty sections, and {slot: text}."""
    if system and '{system}' not in form:  # a format without a slot for it
        instruction, system = f'{system}\n\n{instruction}', ''
    values = {'instruction': instruction, 'input': given, 'system': system}
    form = re.sub(r'(?s){#(\w+)}(.*?){/\1}', lambda part: part[2] if values.get(part[1]) else '', form)
    return form.partition('{output}')[0], values


def markers_of(form):
    """Return the lines of a prompt that are not the example's own: '### Instruction:' and so on."""
    if chat.is_chat_template(form):  # 'user', 'assistant': an answer may have such lines
        return []
    lines = '\n'.join(re.split(r'{[#/]?\w+}', form)).split('\n')
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def end_of(form, tokenizer):
    """Return the id of the token that ends an answer, and the format's text between it and the next turn."""
    if chat.is_chat_template(form):
        answer = []
        with suppress(UserError):  # what cannot be followed is said where one asks
            told = zip(*encode_chat(tokenizer, form, [('?', '', '.')]))
            answer = [token for token, in_loss in told if in_loss]
        return [tokenizer.endoftext_id, *answer][-1], ''
    marker, between = re.fullmatch(r'(?s)(<\|\w+\|>)?(.*)', form.partition('{output}')[2]).groups()
    return tokenizer.special_ids.get(marker, tokenizer.endoftext_id), between


def stop_tokens(state, tokenizer):
    """Return the ids after which a model of a checkpoint `state` has said all: its format's end comes first."""
    others = (state.get('came_with') or {}).get('end_tokens', [])
    ends = [end_of(state.get('prompt_format') or '', tokenizer)[0], tokenizer.endoftext_id, *others]
    return [end for end in dict.fromkeys(ends) if 0 <= end < tokenizer.vocab_size]


JINJA = {'{instruction}': '{{ message.content }}', '{system}': '{{ ns.system }}'}
JINJA |= {'{#system}': '{% if ns.system %}', '{/system}': '{% endif %}'}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% set ns = namespace(system='', turn=0) %}{% for message in messages %}"
    "{% if message.role == 'system' %}{% set ns.system = message.content %}"
    "{% elif message.role == 'assistant' %}{{ message.content }}<end>"
    '{% else %}{% if ns.turn %}<between>{% endif %}<head>'
    "{% set ns.system = '' %}{% set ns.turn = 1 %}{% endif %}{% endfor %}"
)


def chat_template(form, tokenizer):
    """Return a format as a chat template of transformers, which makes of a conversation the ids of `encode`."""
    if chat.is_chat_template(form):
        return form
    end, between = end_of(form, tokenizer)
    if '{system}' not in form:
        form = form.replace('{instruction}', '{#system}{system}\n\n{/system}{instruction}')
    head = re.sub(r'(?s){#input}.*?{/input}', '', form).partition('{output}')[0]
    parts = {'end': [tokenizer.inner.id_to_token(end)], 'between': [between]}
    parts['head'] = re.split(r'({[#/]?\w+})', head)
    as_jinja = lambda x: JINJA.get(x) or '{{' + json.dumps(x) + '}}'
    parts = {name: [as_jinja(x) for x in part] for name, part in parts.items()}
    return re.sub('<(end|between|head)>', lambda name: ''.join(parts[name[1]]), CHAT_TEMPLATE)


def encode(tokenizer, form, turns, system=''):
    """Return the token ids of a conversation, what `start_of` says before them, and its loss mask: 1 for an answer and
    its end, else 0.

    turns: [(instruction, input, output)]; an output of None is for the model to write, and comes last; False behind
    one keeps it out of the loss. Each answer is encoded on its own, behind its prompt, as when the model writes it.
    """
    if chat.is_chat_template(form):
        if turns[-1][2] is not None:
            chat.check_prefix(form, tokenizer, turns, system)
        ids, loss_mask = encode_chat(tokenizer, form, turns, system)
        first = len(ids) > 0 and ids[0] in tokenizer.special_ids.values()
        return ids[first:], loss_mask[first:]
    end, between = end_of(form, tokenizer)
    ids, loss_mask = [], []
    for number, (instruction, given, output, *learnt) in enumerate(turns):
        head, values = head_and_values(form, instruction, given, '' if number else system)
        parts = re.split(r'{(\w+)}', between + head if number else head)  # text, slot, text, ...
        parts = [(values[part], False) if i % 2 else (part, True) for i, part in enumerate(parts)]
        prompt = encode_parts(tokenizer, parts, bool(ids))
        encode_output = tokenizer.encode_behind if ids or prompt else tokenizer.encode
        answer = [] if output is None else encode_output(output) + [end]
        ids += prompt + answer
        loss_mask += [0] * len(prompt) + [int(all(learnt))] * len(answer)
    return ids, loss_mask


def encode_chat(tokenizer, template, turns, system=''):
    """Return what `encode` does for a chat template, the template's first token included."""
    parts = chat.pieces(template, tokenizer, turns, system)
    learnt = iter([int(all(turn[3:])) for turn in turns])
    ids, loss_mask, prompt, answering = [], [], [], False
    for text, role in parts:
        if answering:  # until the first marker after it
            end = markers(tokenizer).search(text)
            before, text = (text[: end.end()], text[end.end() :]) if end else ('', text)
            ids += encode_parts(tokenizer, [(before, True)], True) or [tokenizer.endoftext_id]
            loss_mask += [next(learnt)] * (len(ids) - len(loss_mask))
        answering = role == 'assistant'
        if answering:
            if prompt and prompt[-1][0].endswith(' ') and chat.begins_with_space(template, tokenizer):
                prompt[-1], text = (prompt[-1][0][:-1], prompt[-1][1]), f' {text}'
            ids, prompt = ids + encode_parts(tokenizer, prompt, bool(ids)), []
            loss_mask += [0] * (len(ids) - len(loss_mask))
            ids += tokenizer.encode_behind(text)
        else:
            prompt.append((text, role == 'template'))
    is_header = any(markers(tokenizer).search(text) for text, _ in prompt)
    if turns[-1][2] is None or not is_header:  # some templates always write that of one more answer
        ids += encode_parts(tokenizer, prompt, bool(ids))
    return ids, loss_mask + [0] * (len(ids) - len(loss_mask))


def encode_infill(tokenizer, text):
    """Return the token ids of a text in which <mask:N> stands for N masked tokens; where a word's token begins with
    the space before it, that space belongs to the gap."""
    if tokenizer.joins_spaces:
        text = re.sub(r' <mask:', '<mask:', text)
    first, *others = GAP.split(text)  # text, size, text, ...
    ids = tokenizer.encode(first)
    for size, behind in zip(others[::2], others[1::2]):
        digits = size.lstrip('0')
        require(len(digits) < 8, f'<mask:{digits:.20}> is longer than any row; write a smaller number.')
        ids += [tokenizer.mask_id] * int(digits or 0) + tokenizer.encode_behind(behind)
    require(tokenizer.mask_id in ids, f'{text!r:.80} has no gap; write <mask:12> for 12 missing tokens.')
    return ids


def before(ids, tokenizer, start_token):
    """Return the ids that stand before a text: a start token, as the first token of a row is never predicted. One that
    is text itself, of data that was one long text, stands only before a text that is empty or begins with a gap."""
    given = ids and ids[0] != tokenizer.mask_id and tokenizer.decode([start_token])
    return [] if given else [start_token]


def start_of(form, tokenizer, start_token):
    """Return the id of the token that stands before a conversation: a chat template's own, or start_token."""
    if not chat.is_chat_template(form):
        return start_token
    first = encode_chat(tokenizer, form, [('?', '', None)])[0][:1]
    return first[0] if first and first[0] in tokenizer.special_ids.values() else start_token


def encode_parts(tokenizer, parts, is_behind=False):
    """Return the token ids of [(text, whether special tokens count)]; all between two of these is one text.

    is_behind: they stand behind others, the last of which is a special token.
    """
    ids, text = [], ''

    def encoded():
        return tokenizer.encode_behind(text, is_text=False) if ids or is_behind else tokenizer.encode(text)

    for part, has_markers in parts:
        for piece in markers(tokenizer).split(part) if has_markers else [part]:
            if has_markers and piece in tokenizer.special_ids:
                ids += encoded() + [tokenizer.special_ids[piece]]
                text = ''
            else:
                text += piece
    return ids + encoded()


def markers(tokenizer):
    """Return a pattern of the names of special tokens."""
    names = sorted(tokenizer.special_ids, key=len, reverse=True)
    return re.compile(f'({"|".join(map(re.escape, names))})')


def windows(loss_mask, limit, by_answer=False):
    """Return the (start, end) of each part of an example: a plain text, all in the loss, may have several.

    by_answer: one for each answer that is in the loss, from the start of the conversation to the answer's end.
    """
    length = len(loss_mask)
    if by_answer and not all(loss_mask):
        return [(0, i) for i, pair in enumerate(pairwise([*loss_mask, 0]), 1) if pair[0] > pair[1]]
    size = limit if all(loss_mask) else length
    return [(start, min(start + size, length)) for start in range(0, length, size)]


def last_answer(loss_mask):
    """Return the loss mask of an example with its last answer alone in the loss."""
    before = len(loss_mask) - next((i for i, x in enumerate(reversed(loss_mask)) if not x), len(loss_mask))
    return [0] * before + loss_mask[before:]


def fit(ids, loss_mask, limit):
    """Return the last `limit` tokens of an example, so that what is lost is of the prompt, or None where the
    last answer does not fit. An earlier answer that is cut has no loss any more."""
    cut = len(ids) - limit
    if cut <= 0:
        return ids, loss_mask
    ids, kept = ids[cut:], list(loss_mask[cut:])
    if loss_mask[cut - 1] and kept[0]:  # within an answer
        rest = kept.index(0) if 0 in kept else len(kept)
        kept[:rest] = [0] * rest
    return (ids, kept) if 1 in kept else None
