"""Shows what a model writes: from nothing, after a prompt, into the gaps of a text, or as answers.

python sample.py --checkpoint=out/ar-stories-tiny-v1 --prompt="Once upon a time"
python sample.py --checkpoint=out/diffusion-stories-tiny-v1 --infill="The <mask:12> sat"
python sample.py --checkpoint=out/sdd-stories-tiny-v1 --k=4 --show_candidates --candidate_steps=1,40
python sample.py --checkpoint=out/ar-alpaca-base-v1/best.pt --chat
"""

import re
import sys
from pathlib import Path

from lm import checkpoints, prompts, runtime
from lm.configurator import ROOT, UserError, configure
from lm.data import ENDOFTEXT, IGNORE, Tokenizer
from sampling import generate

checkpoint = ''  # a ckpt.pt, run folder, Hugging Face folder or hub id; empty: newest under out/
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
prompt = ''  # the text to continue, or FILE:path; empty: a new text
infill = ''  # diffusion: a text with gaps, <mask:12> for 12 tokens; instead of a prompt
chat = False  # the prompt is an instruction, asked in the checkpoint's format; without one: a conversation
input = ''  # of --chat: what the instruction is about
system = ''  # of --chat: what the model is told before
num_samples = 3
max_new_tokens = 200
temperature = 1.0  # 0: always the likeliest token
top_k: int = None  # draw among the k likeliest tokens
top_p: float = None  # draw among the fewest tokens that have this probability together
seed = 0
stop_at_end = True  # stop at <|endoftext|>
use_cache = True  # ar: keep keys and values; False: the same text, slower
compile = False  # ar: compile the step that writes a token; for long texts on a GPU
steps: int = None  # diffusion: forward passes; None: one per token
sampler = 'ancestral'  # diffusion: ancestral, confidence, blocks, threshold, remdm
block_length = 32  # of sampler=blocks: tokens per block
cache_blocks = False  # of sampler=blocks: read only the block in each step; faster, an approximation
threshold = 0.9  # of sampler=threshold: the probability at which a token is kept
eta = 0.1  # of sampler=remdm: the largest probability to hide a token again
k: int = None  # sdd: candidates per hidden position, 0: none; None: the model's own number
show_candidates = False  # sdd: print what the first sample's hidden positions may become
candidate_steps = ()  # after these steps; none given: the first, half of them, three quarters
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'float32'  # bfloat16 and float16 are faster on a GPU
configure(globals())


def newest_checkpoint():
    paths = sorted((ROOT / 'out').glob('*/ckpt.pt'), key=lambda path: path.stat().st_mtime)
    if not paths:
        raise UserError(
            'There is no run under out/ yet; train one with `python train.py`, or give --checkpoint=PATH.'
        )
    return paths[-1]


def read_prompt(text):
    """The prompt itself, or the text of the file that FILE:path names."""
    if not text.startswith('FILE:'):
        return text
    path = Path(text.removeprefix('FILE:'))
    try:
        return path.read_text(encoding='utf-8')
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f'The prompt file {path} cannot be read ({error}); give a text file in UTF-8.'
        ) from error


def with_gaps(text, tokenizer):
    """Token ids of a text in which <mask:N> stands for N hidden tokens.

    Where a word's token begins with the space before it, that space is the gap's to fill.
    """
    if tokenizer.joins_spaces:
        text = re.sub(r' <mask:', '<mask:', text)
    ids = []
    for i, part in enumerate(re.split(r'<mask:(\d+)>', text)):
        ids += [tokenizer.mask_id] * int(part) if i % 2 else tokenizer.encode(part)
    if tokenizer.mask_id not in ids:
        raise UserError(f'--infill={text!r} has no gap; write <mask:12> where 12 tokens are missing.')
    return ids


def show_beliefs(step, canvas, belief):
    """Prints the first row after a step: its text, and each hidden position's candidates with probabilities."""
    if step not in shown_steps:
        return
    row = canvas[0].tolist()
    print(
        '-' * 80,
        f'after step {step} of {num_steps}: '
        + ''.join('▁' if token == tokenizer.mask_id else tokenizer.decode([token]) for token in row),
        sep='\n',
    )
    for place in [i for i, token in enumerate(row) if token == tokenizer.mask_id]:
        pairs = list(zip(belief.tokens[0, place].tolist(), belief.probabilities[0, place].tolist()))
        print(
            f'{place:5}  '
            + '  '.join(f'{name_of(token)} {p:.3f}' for token, p in pairs if p > 0)
            + f'  any other {1 - sum(p for _, p in pairs):.3f}'
        )


def name_of(token):
    """A token as it can be told from others: its text in quotes, or a special token's name."""
    special = {tokenizer.endoftext_id: ENDOFTEXT, tokenizer.ignore_id: IGNORE}
    return special.get(token) or repr(tokenizer.decode([token]))


def write(ids, count, stop):
    """`count` continuations of the token ids, or fillings of their gaps."""
    with run.autocast():
        return generate(
            model,
            [ids] * count,
            0 if infill else max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            stop_tokens=[stop] if stop_at_end else [],
            seed=seed,
            use_cache=use_cache,
            compile=compile,
            steps=steps,
            sampler=sampler,
            block_length=block_length,
            cache_blocks=cache_blocks,
            threshold=threshold,
            eta=eta,
            k=k,
            watch=show_beliefs if show_candidates else None,
        )


def answers(turns, count):
    """`count` texts for the last of `turns`, whose output is None; of a long conversation the end is seen."""
    ids, _ = prompts.encode(tokenizer, form, turns, system)
    block_size = model.config.block_size
    ids = [state['start_token']] + ids[1 - max(block_size // 2, block_size - max_new_tokens) :]
    return [
        tokenizer.decode(row[len(ids) :]).strip()
        for row in write(ids, count, prompts.end_of(form, tokenizer)[0])
    ]


def converse():
    """Answers the lines that are typed, until there are no more."""
    print('Type an instruction; an empty line begins anew, Ctrl-D ends.')
    turns = []
    for line in sys.stdin:
        if not line.strip():
            turns = []
            continue
        (answer,) = answers([*turns, (line.strip(), input, None)], 1)
        turns.append((line.strip(), input, answer))
        print(f'> {answer}', flush=True)


if prompt and infill:
    raise UserError('A prompt and an infill are given; an infill is a text of its own: leave one out.')
if (input or system) and not chat or infill and chat:
    raise UserError(
        'input and system belong to --chat, and an infill does not; add --chat, or leave them out.'
    )
if num_samples < 1:
    raise UserError(f'num_samples is {num_samples}; it has to be at least 1.')
run = runtime.Runtime(device, dtype)
path = checkpoint or newest_checkpoint()
state = checkpoints.load(path, token, revision)
tokenizer = Tokenizer(state['tokenizer'])
model = checkpoints.load_model(state, run.device)

form = state.get('prompt_format') or prompts.DEFAULT
ids = [] if chat else with_gaps(infill, tokenizer) if infill else tokenizer.encode(read_prompt(prompt))
num_steps = steps or (ids.count(tokenizer.mask_id) if infill else max_new_tokens)
shown_steps = set(candidate_steps or (1, num_steps // 2, num_steps * 3 // 4))
if show_candidates and not (model.believes and k != 0):
    raise UserError(
        f'{path} keeps no candidates (architecture={state["architecture"]}, k={k}); leave '
        '--show_candidates out, or take an sdd checkpoint and a k above 0.'
    )
print(f'{path}: {state["architecture"]}, {model.num_parameters():,} parameters, step {state["global_step"]}')
if chat and not state.get('prompt_format'):
    print('warning: this checkpoint was not taught to answer; it is asked in the default format.')
if chat and not prompt:
    converse()
    sys.exit()
if chat:
    texts = answers([(read_prompt(prompt), input, None)], num_samples)
else:
    # A text begins after the end of another, or after a token of its own; where the data was one long text, only
    # an empty prompt needs a start.
    is_special = not tokenizer.decode([state['start_token']])
    start = [state['start_token']] if not ids or is_special else []
    texts = [
        tokenizer.decode(row[len(start) :]) for row in write(start + ids, num_samples, tokenizer.endoftext_id)
    ]
for text in texts:
    print('-' * 80)
    print(text)
