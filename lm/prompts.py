"""Prompt formats: how an instruction, its input and the answer become one text, and that text tokens.

A format is a template of one turn; it stands in a prepared folder's config.json and in the checkpoint. What
{#input}…{/input} encloses is left out where the input is empty. The prompt is what stands before {output}.
What follows it ends the answer: the first marker, such as <|im_end|>, if it is a special token of the
tokenizer, or else <|endoftext|>. The markers become special tokens where the tokenizer has them; the same
characters within a user's text never do.
"""

import re

from lm.configurator import UserError

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


def named(name):
    """The template that a name stands for."""
    if name not in FORMATS:
        raise UserError(f'prompt_format is {name!r}; choose {", ".join(FORMATS)}.')
    return FORMATS[name]


# ---------------------------------------------------------------------------- as text


def without_empty(form, values):
    """The template without the sections whose value is empty."""
    return re.sub(
        r'{#(\w+)}(.*?){/\1}', lambda part: part[2] if values.get(part[1]) else '', form, flags=re.S
    )


def values_of(form, instruction, given, system):
    """What goes into the slots; a format that has no place for a system message says it first."""
    if system and '{system}' not in form:
        instruction, system = f'{system}\n\n{instruction}', ''
    return {'instruction': instruction, 'input': given, 'system': system}


def prompt_of(form, instruction, given='', system=''):
    """The prompt as a text, up to where the answer begins."""
    values = values_of(form, instruction, given, system)
    head = without_empty(form, values).partition('{output}')[0]
    return re.sub(r'{(\w+)}', lambda slot: values[slot[1]], head)


def markers_of(form):
    """What a prompt says besides the example's own words: '### Instruction:' and so on, line by line."""
    lines = '\n'.join(re.split(r'{[#/]?\w+}', form)).split('\n')
    return list(dict.fromkeys(line.strip() for line in lines if line.strip()))


def instruction_in(prompt, form):
    """The instruction of a prompt, special tokens spelled out."""
    lead = markers_of(form.partition('{instruction}')[0])[-1:]
    text = prompt.partition(lead[0])[2] if lead else prompt
    for marker in markers_of(form):
        text = text.partition(marker)[0]
    return text.strip()


# ---------------------------------------------------------------------------- as tokens


def end_of(form, tokenizer):
    """The id of the token that ends an answer, and what the format says between it and the next turn."""
    tail = form.partition('{output}')[2]
    marker = re.match(MARKER, tail)
    end = tokenizer.special_ids.get(marker[0]) if marker else None
    return tokenizer.endoftext_id if end is None else end, tail[marker.end() :] if marker else tail


def control_tokens(form, tokenizer):
    """{name: id} of the special tokens that a format uses, the end of the answer included."""
    names = re.findall(MARKER, form)
    return {
        tokenizer.name_of(i): i
        for i in (
            *(tokenizer.special_ids[name] for name in names if name in tokenizer.special_ids),
            end_of(form, tokenizer)[0],
        )
    }


def encode(tokenizer, form, turns, system=''):
    """Token ids of a conversation, and 1 where they are an answer or its end: two lists.

    turns: [(instruction, input, output)]; an output of None is for the model to write, and comes last. The
    mask is made here, piece by piece: each answer is encoded on its own, as it is when the model writes it.
    """
    end, between = end_of(form, tokenizer)
    ids, trained = [], []
    for number, (instruction, given, output) in enumerate(turns):
        values = values_of(form, instruction, given, '' if number else system)
        head = without_empty(form, values).partition('{output}')[0]
        prompt = fill(tokenizer, between * (number > 0) + head, values)
        answer = [] if output is None else tokenizer.encode(output) + [end]
        ids += prompt + answer
        trained += [0] * len(prompt) + [1] * len(answer)
    return ids, trained


def fill(tokenizer, template, values):
    """Token ids of a template with its slots filled: one text between two special tokens."""
    ids, text = [], ''
    for piece in re.split(rf'({{\w+}}|{MARKER})', template):
        if piece in tokenizer.special_ids:
            ids += tokenizer.encode(text) + [tokenizer.special_ids[piece]]
            text = ''
        else:
            text += values[piece[1:-1]] if re.fullmatch(r'{\w+}', piece) else piece
    return ids + tokenizer.encode(text)


def fit(ids, trained, limit):
    """The last `limit` tokens of an example, so that what is lost is of the prompt.

    An earlier answer that is cut is no longer trained on; None where the last one does not fit.
    """
    cut = len(ids) - limit
    if cut <= 0:
        return ids, trained
    ids, rest = ids[cut:], list(trained[cut:])
    if trained[cut - 1] and rest[0]:
        if 0 not in rest:
            return None
        whole = rest.index(0)
        rest[:whole] = [0] * whole
    return (ids, rest) if 1 in rest else None
