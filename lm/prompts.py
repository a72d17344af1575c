"""Prompt formats: how an instruction, its input and the answer become one text, and that text tokens.

A format is a template of one turn. What {#input}…{/input} encloses is left out where the input is empty. The prompt is
what stands before {output}; what follows it ends the answer: the first marker, such as <|im_end|>, if it is a special
token of the tokenizer, or else <|endoftext|>. The same characters within a user's text are never a special token.
"""

import json
import re

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
MARKER = r'<\|\w+\|>'


def prompt_of(form, instruction, given='', system=''):
    """Return the prompt as a text, up to where the answer begins."""
    head, values = head_and_values(form, instruction, given, system)
    return re.sub(r'{(\w+)}', lambda slot: values[slot[1]], head)


def head_and_values(form, instruction, given, system):
    """Return the template up to the answer, without its empty sections, and {slot: text}."""
    if system and '{system}' not in form:  # a format without a slot for it
        instruction, system = f'{system}\n\n{instruction}', ''
    values = {'instruction': instruction, 'input': given, 'system': system}
    form = re.sub(r'(?s){#(\w+)}(.*?){/\1}', lambda part: part[2] if values.get(part[1]) else '', form)
    return form.partition('{output}')[0], values


def markers_of(form):
    """Return the lines of a prompt that are not the example's own: '### Instruction:' and so on."""
    lines = '\n'.join(re.split(r'{[#/]?\w+}', form)).split('\n')
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def end_of(form, tokenizer):
    """Return the id of the token that ends an answer, and the format's text between it and the next turn."""
    tail = form.partition('{output}')[2]
    marker = re.match(MARKER, tail)
    end = tokenizer.special_ids.get(marker[0]) if marker else None
    return tokenizer.endoftext_id if end is None else end, tail[marker.end() :] if marker else tail


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
    """Return the token ids of a conversation and its loss mask: 1 for an answer and its end, else 0.

    turns: [(instruction, input, output)]; an output of None is for the model to write, and comes last; False behind
    one keeps it out of the loss. Each answer is encoded on its own, as it is when the model writes it.
    """
    end, between = end_of(form, tokenizer)
    ids, loss_mask = [], []
    for number, (instruction, given, output, *learnt) in enumerate(turns):
        head, values = head_and_values(form, instruction, given, '' if number else system)
        prompt = encode_template(tokenizer, between + head if number else head, values)
        answer = [] if output is None else tokenizer.encode(output) + [end]
        ids += prompt + answer
        loss_mask += [0] * len(prompt) + [int(all(learnt))] * len(answer)
    return ids, loss_mask


def encode_template(tokenizer, template, values):
    """Return the token ids of a template with its slots filled; what stands between two special tokens is encoded
    as one text."""
    ids, text = [], ''
    for piece in re.split(rf'({{\w+}}|{MARKER})', template):
        if piece in tokenizer.special_ids:
            ids += tokenizer.encode(text) + [tokenizer.special_ids[piece]]
            text = ''
        else:
            text += values[piece[1:-1]] if re.fullmatch(r'{\w+}', piece) else piece
    return ids + tokenizer.encode(text)


def windows(loss_mask, limit):
    """Return the (start, end) of each part of an example: one that is all in the loss, a plain text, may have several."""
    length = len(loss_mask)
    size = limit if all(loss_mask) else length
    return [(start, min(start + size, length)) for start in range(0, length, size)]


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
