"""Sample from a checkpoint: a new text, a continuation, an infilling, or answers to instructions.

python sample.py --checkpoint=out/ar-stories-tiny-v1 --prompt="Once upon a time"
python sample.py --checkpoint=out/diffusion-stories-tiny-v1 --infill="The <mask:12> sat"
python sample.py --checkpoint=out/sdd-stories-tiny-v1 --watch --html=watch.html
python sample.py --checkpoint=out/ar-alpaca-base-v1/best.pt --chat --prompt="Name three fruits."
"""

import builtins
import sys
import timeit
from contextlib import suppress
from pathlib import Path

import torch
from tqdm import tqdm

from lm import checkpoints, prompts, run_folder, runtime
from lm.configurator import UserError, check_range, configure, printable, report_idle, require, user_errors
from lm.files import as_sentence, require_file_path, write_json
from lm.tokenizer import Tokenizer
from lm.watch import Frames, Terminal, save_page
from sampling import fill_left_to_right, generate

checkpoint = ''  # a ckpt.pt, run folder, Hugging Face folder or hub id; empty: newest under out/
tokenizer = ''  # of a ckpt.pt of nanoGPT's, unless it is gpt2's: a path
architecture = ''  # of a checkpoint that does not say it; another than it says is refused
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
prompt = ''  # the text to continue, or FILE:path; empty: a new text
infill = ''  # a text with gaps, <mask:12> for 12 tokens, in place of a prompt; with --chat: the answer. ar: see TRIES
chat = False  # the prompt is an instruction, in the checkpoint's format; without one: a conversation
input = ''  # of --chat: what the instruction is about
system = ''  # of --chat: the system message
num_samples = 3  # texts
max_new_tokens = 200  # of a text, at most
temperature = 1.0  # 0: always the likeliest token
top_k: int = None  # draw among the k likeliest tokens
top_p: float = None  # draw among the fewest tokens that have this probability together
seed = 0  # of the draws
stop_at_end = True  # stop at <|endoftext|>
compile = False  # ar: compile the decode step; for long texts on a GPU
steps: int = None  # diffusion: forward passes; None: one per token
sampler = ''  # diffusion: first_hitting, with steps ancestral; confidence blocks threshold entropy remdm speculative ar
block_length: int = None  # of sampler=blocks, 32; of a model trained on blocks: one of its lengths
threshold: float = None  # of sampler=threshold: a probability, 0.9; of entropy: nats, 0.3
eta = 0.1  # of sampler=remdm: the largest probability to mask a token again
k: int = None  # sdd: candidates per masked position, 0: none; None: the model's own number
fresh_beliefs: bool = None  # sdd: from a pass before each step; None: with first_hitting, the default sampler
watch = False  # show the first sample step by step, in place
html = ''  # a page on which it can be watched, with a slider, and the candidates of sdd
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'float32'  # bfloat16 and float16 are faster on a GPU
weights = 'float32'  # or bfloat16, float16 (faster, as good), int8 (a little worse)
config = configure(globals())

OPTIONS = 'temperature top_k top_p compile steps sampler block_length threshold eta k fresh_beliefs'.split()
TRIES = 8  # of ar to fill gaps, each after what stands before it: the likeliest come first


def write(ids, count):
    """Return `count` rows of token ids that begin with `ids`."""
    if infill and model.causal:
        return fill_gaps(ids, count)
    frames = Frames(tokenizer, Terminal() if watch else None, options['stop_tokens'])
    frames.begin(ids)
    num_steps = steps or (ids.count(tokenizer.mask_id) if infill else max_new_tokens)
    is_told = watch or 'stream' in options  # by the text itself
    with tqdm(total=num_steps, unit=' steps', leave=False, disable=is_told or None) as bar:
        shown = frames if watch or html else lambda *_: bar.update()
        with dist.autocast(), user_errors():
            new = 0 if infill else max_new_tokens
            rows = generate(model, [ids] * count, new, seed=seed, watch=shown, **options)
    frames.end(len(rows[0]))
    if html:
        save_page(html, f'{run_folder.name_of(path)}: {state["architecture"]}', frames.steps)
        print(f'{html}: the first text, step by step')
    return rows


def fill_gaps(ids, count):
    """Return the likeliest `count` of several fillings by a causal model."""
    chosen = {name: options[name] for name in ('temperature', 'top_k', 'top_p')}
    with torch.inference_mode(), dist.autocast(), user_errors():
        rows = fill_left_to_right(model, [ids] * max(TRIES, count), seed, **chosen)
        likeliest = model.nll(torch.tensor(rows, device=dist.device)).argsort()
    return [rows[i] for i in likeliest[:count]]


def answer(turns, count, system=system):
    """Return `count` outputs for the last of `turns`; a long conversation is cut on the left."""
    ids, _ = prompts.encode(tokenizer, form, turns, system)
    block_size = model.config.block_size
    room = max(block_size // 2, block_size - max_new_tokens)
    if prompt and len(ids) >= room:
        print(f'note: the prompt has {len(ids):,} tokens, of which the model reads the last {room - 1:,}.')
    ids = [prompts.start_of(form, tokenizer, start)] + ids[1 - room :]
    given = prompts.encode_infill(tokenizer, infill) if infill else []
    return [tokenizer.decode(row[len(ids) :]).strip() for row in write(ids + given, count)]


class Printer:
    """Prints the text of new tokens as they come, whole characters only, and keeps it."""

    def __init__(self):
        self.ids, self.text, self.start = [], '', timeit.default_timer()

    def __call__(self, new):
        self.ids += new[0]
        ends = [i for i, token in enumerate(self.ids, 1) if token in options['stop_tokens']]
        self.ids = self.ids[: ends[0]] if ends else self.ids  # behind an end nothing is written
        text = tokenizer.decode(self.ids).lstrip().rstrip('\ufffd')
        print(printable(text[len(self.text) :]), end='', flush=True)
        self.text = text

    def end(self):
        seconds = timeit.default_timer() - self.start
        print(f'\n[{len(self.ids)} tokens, {len(self.ids) / seconds:.1f} tokens/s]', flush=True)
        return self.text.strip()


def converse(system):
    """Answer what is typed, as the words come, until Ctrl-D; Ctrl-C stops an answer."""
    with suppress(ImportError):
        import readline  # noqa: F401  (arrow keys, history)
    if hasattr(sys.stdin, 'reconfigure'):
        sys.stdin.reconfigure(errors='replace')  # what is typed may be no UTF-8
    print('/reset starts over, /system TEXT says what the model is, /save FILE; Ctrl-C stops, Ctrl-D leaves.')
    turns = []
    while True:
        try:
            line = builtins.input('You: ').strip()
            command, _, rest = line.partition(' ')
            if command in ('/reset', '/system'):
                turns, system = [], rest if command == '/system' else system
            elif command == '/save':
                save_conversation(Path(rest or 'conversation.json').expanduser(), turns, system)
            elif line.startswith('/'):
                print(f'There is no {command}; there are /reset, /system, /save.')
            elif line:
                turns.append((line, input, reply([*turns, (line, input, None)], system)))
        except KeyboardInterrupt:
            print()
        except UserError as error:
            print(error)
        except EOFError:
            return print()


def reply(turns, system):
    """Print an answer while it is written, and return it; Ctrl-C ends it early."""
    print('Model: ', end='', flush=True)
    options['stream'] = printer = Printer()
    with suppress(KeyboardInterrupt):
        answer(turns, 1, system)
    return printer.end()


def save_conversation(path, turns, system):
    """Write a conversation as messages, which prepare/instruct.py reads."""
    require(not path.exists(), f'{path} is there already; choose another name.')
    messages = [{'role': 'system', 'content': system}] * bool(system)
    for asked, given, output in turns:
        asked = f'{asked}\n\n{given}' if given else asked
        messages += [{'role': 'user', 'content': asked}, {'role': 'assistant', 'content': output}]
    write_json(path, [{'messages': messages}])
    print(f'{path}: {len(turns)} turns')


require(chat or not (prompt and infill), 'A prompt and an infill are given; leave one out.')
require(chat or not (input or system), 'input and system belong to --chat; add it, or leave them out.')
one_answer = chat and (infill or watch or html)
require(prompt or not one_answer, 'A conversation is not watched and has no gaps; give the --prompt.')
require_file_path(html)
require(num_samples >= 1, f'num_samples is {num_samples}; it has to be at least 1.')
check_range(config, 0, 2**63, 'seed')
if prompt.startswith('FILE:'):
    path = Path(prompt.removeprefix('FILE:')).expanduser()
    with as_sentence(f'The prompt file {path} cannot be read', 'give a text in UTF-8'):
        prompt = path.read_text(encoding='utf-8-sig')
for key, text in {'prompt': prompt, 'infill': infill, 'input': input, 'system': system}.items():
    is_text = text.encode(errors='ignore').decode() == text  # bytes that are none come as half characters
    require(is_text, f'--{key} is no valid UTF-8; convert it as by iconv.')

dist = runtime.Runtime(device, dtype)
path = checkpoint or run_folder.newest_run()
own = tokenizer and Tokenizer.load(tokenizer)
state = checkpoints.load(path, token, revision, tokenizer=own, architecture=architecture)
is_other = own and own.to_json() != state['tokenizer']
report_idle(config, 'on a checkpoint that has one', 'tokenizer' * bool(is_other))
tokenizer = Tokenizer(state['tokenizer'], start=state['start_token'])
if sampler == 'ar':
    state, sampler = checkpoints.as_ar(state, path), ''
    config.given.discard('sampler')
model = checkpoints.load_model(state, dist.device, weights)
fills_as_ar = infill and model.causal
is_watched = fills_as_ar and (watch or html)
require(not is_watched, 'Gaps that an ar model fills are not watched; leave --watch and --html out.')
fills = not infill or model.causal or 0 in model.config.block_length
remedy = 'choose --sampler=ar, the likeliest of several, or a model of whole rows (0 in block_length)'
require(fills, f'{path} writes in blocks and sees nothing behind a gap; {remedy}.')
runtime.report_idle_settings(config, model)
idle = 'max_new_tokens compile stop_at_end' if fills_as_ar else 'max_new_tokens'
report_idle(config, 'with infill', idle * bool(infill))
report_idle(config, 'in a conversation', 'num_samples' * (chat and not prompt))
report_idle(config, f'on {state["architecture"]}', '' if model.causal else 'compile')
print(f'{path}: {state["architecture"]}, {model.num_parameters():,} parameters, step {state["global_step"]}')

form = state.get('prompt_format') or prompts.DEFAULT
options = {name: globals()[name] for name in OPTIONS}
options['stop_tokens'] = prompts.stop_tokens(state, tokenizer) if stop_at_end else []
start = state['start_token']

if chat and not state.get('prompt_format'):
    print('warning: this checkpoint was not fine-tuned on instructions; it gets the default format.')
texts = []
if chat and not prompt:
    converse(system)
elif chat:
    texts = answer([(prompt, input, None)], num_samples)
else:
    ids = prompts.encode_infill(tokenizer, infill) if infill else tokenizer.encode(prompt)
    begin = prompts.before(ids, tokenizer, start)
    texts = [tokenizer.decode(row[len(begin) :]) for row in write(begin + ids, num_samples)]
for text in texts:
    print(printable(f'{"-" * 80}\n{text}'))
