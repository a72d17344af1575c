"""Compare models in one table: likelihood, accuracy, samples, answers and speed, with 95 % intervals.

    python evaluate.py --checkpoint=out/ar-stories-tiny-v1,out/diffusion-stories-tiny-v1 --html=report.html
    torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint=a.pt,b.pt --judge=c.pt --output=results.json

The notes below the table say what the figures mean, lm/likelihood.py and lm/scoring.py how they are computed.
"""

import json
import math
import platform
import random
import statistics
from functools import partial
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from lm import checkpoints, data, files, likelihood, prompts, report, rng, run_folder, runtime, scoring
from lm.configurator import ROOT, check_range, configure, note, printable, report_idle, require, user_errors
from lm.folder import Folder
from lm.tokenizer import ENDOFTEXT, Tokenizer
from prepare import grammar, story_tasks
from sampling import fill_left_to_right, generate

# --- what to compare ---
checkpoint = ''  # ckpt.pt files, run folders, Hugging Face folders or hub ids, separated by commas
architecture = ''  # of checkpoints that do not say it; another than they say is refused
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
dataset = ''  # a name under data/, or a path; empty: what the first checkpoint was trained on
metrics = 'perplexity,accuracy,generation'  # also speed; infilling of stories; instructions of their folders
output = ''  # JSON file with all figures and samples
html = ''  # the same as a page
wide = False  # print all columns, and what they mean
# --- likelihood ---
mode = ''  # packed or documents; empty: documents for instructions and where all were trained so
block_size = 0  # tokens per row; 0: the smallest that the checkpoints were trained at
max_tokens = 0  # of the validation split; 0: all of it
batch_size = 32  # rows that are measured or written at once
draws = 8  # diffusion: mask ratios per row
k: int = None  # sdd: candidates per masked position; None: the model's own number
bound_steps = 0  # diffusion: the bound of sampling in so many steps as well, slow
exact = False  # diffusion: the exact likelihood from left to right as well; sdd: with fresh and carried beliefs; slow
exact_rows = 16  # rows for that
# --- generation ---
num_samples = 100  # texts, held-out prompts, or stories with gaps
sample_tokens = 0  # tokens per sample; 0: to the block's end
judge = ''  # a ckpt.pt or run folder of an ar model, which judges the samples
instructions = 'config/instructions.json'  # prompts with checks, of the metric `instructions`
temperature = 1.0  # 0: always the likeliest token
top_k: int = None  # draw among the k likeliest tokens
top_p: float = None  # draw among the fewest tokens that have this probability together
steps: int = None  # diffusion: forward passes; None: one per token
sampler = ''  # first_hitting, with steps ancestral; confidence blocks threshold entropy remdm speculative
block_length: int = None  # of sampler=blocks, 32; of a model trained on blocks: one of its lengths
threshold: float = None  # of sampler=threshold: a probability, 0.9; of entropy: nats, 0.3
eta = 0.1  # of sampler=remdm
fresh_beliefs: bool = None  # sdd: from a pass before each step; None: with first_hitting, the default sampler
seed = 0  # of the draws
# --- the machine ---
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'float32'  # bfloat16 and float16 are faster on a GPU
weights = 'float32'  # or bfloat16, float16 (faster, as good), int8 (a little worse)
config = configure(globals())

METRICS = ('perplexity', 'accuracy', 'generation', 'speed', 'instructions', 'infilling')
MAX_GAPS, TRIES = 4, 8  # of infilling
WRITING = {'generation', 'speed', 'instructions', 'infilling'}  # metrics of texts that are sampled
OF_TEXTS = (
    'num_samples sample_tokens temperature top_k top_p steps sampler block_length threshold eta fresh_beliefs'
)
paths, wanted = ([part.strip() for part in text.split(',') if part.strip()] for text in (checkpoint, metrics))

check_range(config, 1, math.inf, 'batch_size', 'draws', 'exact_rows', 'num_samples')
check_range(config, 0, 2**63, 'seed')
check_range(config, 0, math.inf, 'block_size', 'max_tokens', 'sample_tokens', 'bound_steps', 'k')
report_idle(config, 'without exact', 'exact_rows' * (not exact))
report_idle(config, 'without metrics=instructions', 'instructions' * ('instructions' not in wanted))
report_idle(config, 'without metrics of texts', OF_TEXTS * WRITING.isdisjoint(wanted))
is_measured = bool(exact or bound_steps or {'perplexity', 'accuracy'} & {*wanted})
report_idle(config, 'without perplexity or accuracy', 'max_tokens draws' * (not is_measured))
require(paths, 'No checkpoint is given; name some: --checkpoint=out/run-a,out/run-b.')
for name in wanted:
    require(name in METRICS, f'metrics has {name!r}, which is none; choose from {", ".join(METRICS)}.')
require(not judge or 'generation' in wanted, f'--judge={judge} needs generation in --metrics={metrics}.')
require(mode in ('', 'packed', 'documents'), f"mode is {mode!r}; choose 'packed' or 'documents'.")
for path in (output, html):
    files.require_file_path(path)
require(not output or output != html, f'output and html are both {output}; choose another for one of them.')


# ---------------------------------------------------------------------------- load


def read_exercises():
    """Return [(instruction, input, checks)] of --instructions, or for requests for stories new ones of these."""
    if folder.config.get('source') == story_tasks.SOURCE:
        report_idle(config, 'on requests for stories', 'instructions')
        exercises = enumerate(story_tasks.exercises(num_samples))  # every second one in new words
        return [(asked, '', (wishes, number % 2)) for number, (asked, wishes) in exercises]
    path = Path(instructions) if Path(instructions).exists() else ROOT / instructions
    with files.as_sentence(f'{path} is no list of instructions with checks', 'correct it'):
        entries = json.loads(path.read_bytes())
        exercises = [(one['instruction'], one.get('input', ''), list(one['checks'])) for one in entries]
    for asked, _, checks in exercises:
        require(checks, f'{path} has no checks for {asked!r}; give it some, or leave it out.')
        scoring.check('', checks)  # raises for what is not a check
    return exercises


def load(path, architecture=''):
    """Return a checkpoint without what only training needs, with its Tokenizer, its path and a name."""
    own = dataset and Folder(dataset).tokenizer
    state = checkpoints.load(path, token, revision, tokenizer=own, architecture=architecture)
    state.pop('optimizer_state_dict', None)
    path = Path(path) / 'ckpt.pt' if (Path(path) / 'ckpt.pt').is_file() else Path(path)
    text = Tokenizer(state['tokenizer'], start=state['start_token'])
    return {'train_config': {}, **state, 'tokenizer': text, 'path': path, 'name': run_folder.name_of(path)}


states = []
for path in paths:
    state = load(path, architecture)
    states.append(state)
    if state['model_config'].get('ar_weight'):  # two models in one
        own = {'name': f'{state["name"]}, as ar', 'path': Path(f'{state["path"]}, as ar')}
        states.append({**checkpoints.as_ar(state, state['path']), **own})
dataset_name = dataset or states[0]['train_config'].get('dataset')
require(dataset_name, f'{states[0]["path"]} does not say what it was trained on; give --dataset=NAME.')
folder = Folder(dataset_name)
tokenizer = folder.tokenizer
for state in states:
    problem = f'{state["path"]} has another vocabulary than {folder.path}'
    remedy = f'give its own --dataset, or prepare this one with --tokenizer={state["path"]}'
    require(state['tokenizer'].to_json() == tokenizer.to_json(), f'{problem}; {remedy}.')
exercises = read_exercises() if 'instructions' in wanted else []
has_answers = folder.masks['val'] is not None
remedy = 'leave instructions out of --metrics, or give an instruction folder as --dataset'
require(has_answers or 'instructions' not in wanted, f'{folder.path} has no val_masks.bin; {remedy}.')
is_stories = 'floor' in folder.config
require(is_stories or 'infilling' not in wanted, f'{folder.path} has no stories; leave infilling out.')

smallest = min(state['model_config']['block_size'] for state in states)
trained_at = min(state['train_config'].get('block_size') or smallest for state in states)
lengths = {length for state in states for length in state['model_config'].get('block_length', ()) if length}
fits = all(trained_at % length == 0 for length in lengths)  # rows of whole blocks
block_size = block_size or (min(trained_at, smallest) if fits else smallest)
check_range({'block_size': block_size}, 2, smallest + 1, 'block_size')
if not mode:
    by_documents = all(state['train_config'].get('mode') == 'documents' for state in states)
    mode = 'documents' if by_documents or has_answers else 'packed'

dist = runtime.Runtime(device, dtype)
if judge:
    judge_state = load(judge)
    judge_model = checkpoints.load_model(judge_state, dist.device)
    can_judge = judge_model.causal and judge_model.bound == 'exact'
    require(can_judge, f'--judge={judge} has no exact likelihood; give the checkpoint of an ar model.')


# ---------------------------------------------------------------------------- metrics


def evaluate_likelihood(model, first):
    """Return figures of the validation split, and the sums behind them by bound; '' is the model's own loss.

    first: the first model's sums, which each bound is compared with; None for that model itself.
    """
    padding = model.trains_on_padding
    if mode == 'documents' and has_answers:
        rows = data.ExampleRows(folder, 'val', block_size, padding, False, training=False, by_answer=True)
    elif mode == 'documents':
        rows = data.DocumentRows(folder, 'val', block_size, padding)
    else:  # the same for all models
        rows = data.PackedRows(folder, 'val', block_size, block_size, training=False)
    tokens_per_byte = folder.counted_tokens_per_byte('val')
    measure = partial(likelihood.measure, model, rows, dist, batch_size, draws)

    sums = {'': measure(max_tokens, k=k)}
    if model.has_beliefs and k != 0 and 'perplexity' in wanted:
        sums['k0'] = measure(max_tokens, k=0)
    if bound_steps and model.needs_noise:
        sums['steps'] = measure(max_tokens, k=k, steps=bound_steps)
    figures = {name: likelihood.perplexity_figures(part, tokens_per_byte) for name, part in sums.items()}
    if 'steps' in sums:
        length = model.config.block_length[0] or block_size
        figures['steps']['steps'] = bound_steps * math.ceil(block_size / length)  # sample.py's, of all blocks
    for name, part in sums.items() if first else ():
        value, ci, _ = likelihood.interval(part, 'nll', 'count', first.get(name, first['']))
        figures[name] |= {'difference': value, 'difference_ci95': ci}

    if exact and not model.causal:
        few = exact_rows * (block_size - 1)
        for name in ('exact', 'carried')[: 1 + model.has_beliefs]:
            figures[name] = likelihood.perplexity_figures(measure(few, k=k, exact=name), tokens_per_byte)
        upper = likelihood.perplexity_figures(measure(few, k=k), tokens_per_byte)
        figures['exact']['upper_nats_per_token'] = upper['nats_per_token']
    own = figures.pop('')
    figures |= own if 'perplexity' in wanted else {}
    if 'accuracy' in wanted:
        accuracy, ci, unit = likelihood.interval(sums[''], 'correct', 'predicted')
        figures |= {'accuracy': accuracy, 'accuracy_ci95': ci, 'ci_over': unit}
    return figures, sums


def write_texts(model, heads, stop_tokens):
    """Return a continuation per head (token ids); each batch has its own seed, so that ranks can share them."""
    rows, batches = {}, likelihood.batches_of(model, range(len(heads)), lambda i: len(heads[i]), batch_size)
    mine = range(dist.rank, len(batches), dist.world_size)
    for number in tqdm(mine, 'texts', leave=False, disable=dist.rank > 0 or None):
        batch = [heads[i] for i in batches[number]]
        length = sample_tokens or block_size - len(batch[0])  # the shortest; of the others less is kept
        texts = write_batch(model, batch, length, rng.torch_seed(seed, number), stop_tokens)
        end = None if sample_tokens else block_size
        rows |= {i: text[len(heads[i]) : end] for i, text in zip(batches[number], texts)}
    if dist.world_size > 1:
        parts = [None] * dist.world_size
        torch.distributed.all_gather_object(parts, rows)
        rows = {i: row for part in parts for i, row in part.items()}
    return [rows[i] for i in range(len(heads))]


def write_batch(model, heads, length, seed, stop_tokens=()):
    with dist.autocast(), user_errors():
        return generate(model, heads, length, stop_tokens=stop_tokens, seed=seed, **options(model))


def options(model):
    """Return those settings of `generate` that a model has."""
    names = 'temperature top_k top_p' + ' steps sampler block_length threshold eta' * (not model.causal)
    names += ' fresh_beliefs' * model.has_beliefs
    names += ' k' * (model.has_beliefs and sampler != 'speculative')  # k is then of the bound alone
    return {name: config[name] for name in names.split()}


def evaluate_generation(model, state):
    """Return the figures of samples, and those of held-out text of the same lengths."""
    end = tokenizer.endoftext_id
    rows = write_texts(model, [[state['start_token']]] * num_samples, [end] if mode == 'documents' else [])
    heldout = heldout_texts(rows)
    figures = {**diversity(rows), 'heldout': diversity(heldout)}
    figures['samples_empty'] = sum(not likelihood.plain(row, tokenizer) for row in rows)
    if judge:
        reader = (judge_model, judge_state['tokenizer'], judge_state['start_token'], dist, batch_size)
        figures |= likelihood.judge(rows, tokenizer, *reader)
        figures['heldout'] |= likelihood.judge(heldout, tokenizer, *reader)
    if is_stories:
        figures |= grammar_figures(rows)
    documents = [map(tokenizer.decode, likelihood.split_at(row, end)) for row in rows]
    return {**figures, 'samples': [f'\n{ENDOFTEXT}\n'.join(texts) for texts in documents]}


def diversity(rows):
    samples = [likelihood.plain(row, tokenizer) for row in rows]
    figures = {f'distinct_{n}': scoring.distinct(samples, n) for n in range(1, 5)}
    return {**figures, 'rep_4': scoring.rep(samples, 4), 'entropy': scoring.entropy(samples)}


def heldout_texts(rows):
    """Return as many held-out texts as `rows`, of the same lengths, spread over the split; [] if it is too short.

    In documents mode special tokens are not counted. A text begins with a document and runs on into the
    next ones; where there are too few documents, it begins anywhere.
    """
    tokens = folder.tokens['val']
    special = (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id) if mode == 'documents' else ()
    positions = np.flatnonzero(np.isin(tokens, special, invert=True))  # of the tokens that count
    lengths = np.array([np.isin(row, special, invert=True).sum() for row in rows])
    documents = np.searchsorted(positions, np.asarray(folder.index['val'][:-1], dtype=np.int64))

    spread = np.arange(len(rows)) / len(rows)  # (N,)
    for starts in (documents[(spread * len(documents)).astype(int)], (spread * len(positions)).astype(int)):
        ends = starts + lengths
        if (ends <= np.append(starts[1:], len(positions))).all():  # no token twice
            bounds = zip(starts, ends)
            return [tokens[positions[a] : positions[b - 1] + 1].tolist() if b > a else [] for a, b in bounds]
    return []


def grammar_figures(rows):
    """Return the share of samples that begin with a whole story of prepare/grammar.py, and that end; the mean share of
    their text that is right, up to the first fault; wrong words per sample by kind; and what is wrong with each."""
    end = tokenizer.endoftext_id
    finished = [end in row for row in rows]
    texts = [tokenizer.decode(likelihood.split_at(row, end)[0]) for row in rows]
    faults = [grammar.faults(text) for text in texts]
    valid = [ends and not found for ends, found in zip(finished, faults)]
    right = [found[0].position / max(1, len(text)) if found else 1.0 for text, found in zip(texts, faults)]
    kinds = [fault.kind for found in faults for fault in found]
    figures = {'wrong_words': {kind: kinds.count(kind) / len(rows) for kind in (*grammar.KINDS, 'thing')}}
    figures |= {'finished_stories': statistics.mean(finished), 'right_share': statistics.mean(right)}
    figures |= shares(valid_stories=valid)
    return {**figures, 'faults': [[fault._asdict() for fault in found] for found in faults]}


def shares(**lists):
    """Return the share of true values in each list, by its name, and its 95 % interval."""
    figures = {}
    for name, passed in lists.items():
        figures[name], figures[f'{name}_ci95'] = scoring.share_ci(passed)
    return figures


def evaluate_instructions(model, state):
    """Return overlap with the reference and form of answers to held-out prompts; how many pass their checks."""
    form = state.get('prompt_format') or folder.config['prompt_format'] or prompts.DEFAULT
    ends = prompts.stop_tokens({**state, 'prompt_format': form}, tokenizer)
    examples = heldout_examples()
    rows = write_texts(model, [head for head, _ in examples], ends)
    texts = [tokenizer.decode(head[1:], show_special=True) for head, _ in examples]
    answers = [tokenizer.decode(row).strip() for row in rows]
    references = [tokenizer.decode(reference).strip() for _, reference in examples]
    figures = {'examples': len(examples), 'answers': [list(one) for one in zip(texts, answers, references)]}

    overlaps = [scoring.rouge_l(*pair) for pair in zip(answers, references)]
    ci = scoring.mean_ci([overlap for overlap in overlaps if overlap is not None])
    figures['rouge_l'], figures['rouge_l_ci95'] = ci
    ended, markers = [not {*ends}.isdisjoint(row) for row in rows], prompts.markers_of(form)
    kept = [scoring.format_compliance(*one, markers) for one in zip(answers, references, ended)]
    for name in kept[0] if kept else ():
        figures[name] = statistics.mean(one[name] for one in kept)

    answers = answer_exercises(model, state, form, ends)
    figures['followed_of'] = len(answers)
    if folder.config.get('source') == story_tasks.SOURCE:
        return figures | request_figures(answers)
    return figures | shares(followed=[all(scoring.check(answer, checks)) for answer, checks in answers])


def request_figures(answers):
    """Return the share of [(answer, (wishes, whether in new words))] that are stories, and that are those asked for."""
    judged = [(*story_tasks.follows(wishes, answer), is_new) for answer, (wishes, is_new) in answers]
    return shares(
        valid_stories=[valid for valid, _, _ in judged],
        followed=[met for _, met, is_new in judged if not is_new],
        followed_new_words=[met for _, met, is_new in judged if is_new],
    )


def heldout_documents():
    """Return the numbers of num_samples held-out documents, spread over the split, and where their tokens are."""
    index, count = folder.index['val'].astype(np.int64), min(num_samples, folder.splits['val']['documents'])
    numbers = np.arange(count) * (len(index) - 1) // count
    return [(int(number), slice(index[number], index[number + 1])) for number in numbers]


def heldout_examples():
    """Return [(prompt ids, reference ids)] of num_samples held-out examples that fit the block."""
    examples = []
    for _, part in heldout_documents():
        ids, loss_mask = folder.tokens['val'][part].tolist(), folder.masks['val'][part].tolist() + [0]
        if 1 in loss_mask:
            first = loss_mask.index(1)
            end = loss_mask.index(0, first)
            if 1 + end < block_size:
                examples.append(([folder.config['start_token']] + ids[:first], ids[first:end]))
    return examples


def evaluate_infilling(model, state):
    """Return the share of held-out stories that are stories again once gaps in them are filled: one gap, or several.

    A model that cannot look ahead writes each gap after what stands before it; best: of TRIES fillings the likeliest.
    """
    masked, fill = hide_parts(state['start_token']), fill_left_to_right
    require(masked, f'No held-out story fits into block_size={block_size}; give a larger one.')
    if not model.causal:  # padded as in training
        masked = [row + [tokenizer.ignore_id] * (block_size - len(row)) for row in masked]
        fill = partial(generate, max_new_tokens=0)
    tries = [[] for _ in range(TRIES if model.causal else 1)]
    for start in range(0, len(masked), batch_size):
        batch = masked[start : start + batch_size]
        with dist.autocast(), user_errors():
            for i, filled in enumerate(tries):
                filled += fill(model, batch, seed=rng.torch_seed(seed, start, i), **options(model))
    filled = {'': tries[0]}
    if model.causal:
        filled['best_'] = [tried[likelihood.nll_of(model, tried, dist).argmin()] for tried in zip(*tries)]
    figures = {}
    for name, rows in filled.items():
        valid = [not grammar.faults(tokenizer.decode(row)) for row in rows]
        several = [whole for i, whole in enumerate(valid) if i % MAX_GAPS]
        figures |= shares(**{f'{name}one': valid[::MAX_GAPS], f'{name}several': several})
    texts = [tokenizer.decode(row) for row in filled['']]
    return {'infilled': figures, 'infilled_texts': texts}


def hide_parts(start_token):
    """Return up to num_samples held-out stories as token ids, with <|mask|> in 1 to MAX_GAPS gaps, in turn."""
    rows = []
    for number, part in heldout_documents():
        ids = folder.tokens['val'][part]
        text = tokenizer.decode(ids)
        offsets = tokenizer.inner.encode(text, add_special_tokens=False).offsets
        spans = story_tasks.gaps(text, random.Random(number), 1 + len(rows) % MAX_GAPS)
        if len(offsets) == len(ids) - 1 < block_size - 1:
            starts, ends = np.array(offsets).T
            row = np.array([start_token, *ids])
            for start, end in spans:
                row[1:-1][(starts < end) & (start < ends)] = tokenizer.mask_id
            rows.append(row.tolist())
    return rows


def answer_exercises(model, state, form, ends):
    """Return [(answer, checks)] for each exercise that leaves half the block for an answer, in their order."""
    asked, start = [], prompts.start_of(form, tokenizer, state['start_token'])
    for instruction, given, checks in exercises:
        ids = [start] + prompts.encode(tokenizer, form, [(instruction, given, None)])[0]
        if len(ids) <= block_size // 2:
            asked.append((ids, checks))
    if len(asked) < len(exercises):
        left = f'{len(exercises) - len(asked)} of {len(exercises)} requests do not fit into half'
        note(f'{left} of block_size={block_size}; give a larger one.')
    rows = write_texts(model, [ids for ids, _ in asked], ends)
    return [(tokenizer.decode(row).strip(), checks) for row, (_, checks) in zip(rows, asked)]


def evaluate_speed(model, start_token):
    """Return tokens per second of one text and of a batch, medians, and forward passes per token."""
    length, passes, rates = sample_tokens or block_size - 1, [], []
    hook = model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    for rows in (1, batch_size):
        write = partial(write_batch, model, [[start_token]] * rows, length, seed)
        _, *times = [runtime.seconds(write, dist.device) for _ in range(4)]  # the first warms up
        rates.append(rows * length / statistics.median(times))
        hook.remove()
    one, many = rates
    return dict(tokens_per_sec=one, tokens_per_sec_batch=many, passes_per_token=len(passes) / 4 / length)


# ---------------------------------------------------------------------------- the table

with torch.device('meta'):
    shapes = [checkpoints.make_model(state['architecture'], **state['model_config']) for state in states]
runtime.report_idle_settings(config, *shapes)
for model in shapes:  # wrong options are refused before anything is measured
    if is_measured:
        runtime.check_blocks(model.config, block_size)
    with user_errors():
        generate(model, [], 0, **options(model))
names = [state['name'] for state in states]
models, first = [], None
for state in states:
    model = None  # not two at a time
    model = checkpoints.load_model(state, dist.device, weights)
    name = state['name'] if names.count(state['name']) == 1 else str(state['path'])
    if dist.is_main:
        print(f'{name} …', flush=True)
    figures = {'name': name, 'path': str(state['path']), 'architecture': state['architecture']}
    figures |= {'parameters': model.num_parameters(), 'step': state.get('global_step')}
    figures |= {'bound': model.bound, 'order': model.order.removesuffix(', two passes per token' * (k == 0))}
    given = [f'{name}={value}' for name, value in options(model).items() if name in config.given]
    if given and WRITING & {*wanted}:
        figures['sampled_with'] = ', '.join(given)  # the others are sample.py's own
    if is_measured:
        more, sums = evaluate_likelihood(model, first)
        figures |= more
        first = first or sums
    if 'generation' in wanted:
        figures |= evaluate_generation(model, state)
    if 'instructions' in wanted:
        figures |= evaluate_instructions(model, state)
    if 'infilling' in wanted and dist.is_main:
        figures |= evaluate_infilling(model, state)
    if 'speed' in wanted and dist.is_main:
        figures |= evaluate_speed(model, state['start_token'])
    models.append(figures)

floor = folder.config.get('floor')
versions = {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__}
results = {'dataset': folder.config['name'], 'mode': mode, 'block_size': block_size, 'models': models}
results |= {'heldout': models[0].get('heldout'), 'floor': floor and report.entropy_row(floor)}
results |= {'settings': dict(config), 'versions': versions}
if dist.is_main:
    print(printable(report.table(results, wide)))
    if output:
        files.write_json(output, results)
    if html:
        files.save_atomically(html, lambda file: file.write(report.page(results).encode()))
dist.close()
