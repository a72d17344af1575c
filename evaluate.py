"""Compare models in one table: likelihood, accuracy, samples, answers and speed, with 95 % intervals.

    python evaluate.py --checkpoint=out/ar-stories-tiny-v1,out/diffusion-stories-tiny-v1 --html=report.html
    torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint=a.pt,b.pt --judge=c.pt --output=results.json

The notes below the table say what the figures mean, lm/likelihood.py and lm/scoring.py how they are computed.
"""

import json
import math
import platform
import statistics
import time
from pathlib import Path

import numpy as np
import torch

from lm import checkpoints, data, files, likelihood, prompts, report, rng, runtime, scoring
from lm.configurator import ROOT, UserError, check_range, configure, require, user_errors
from sampling import generate

# --- what to compare ---
checkpoint = ''  # ckpt.pt files, run folders, Hugging Face folders or hub ids, separated by commas
token = ''  # of the Hugging Face hub, for private models
revision = ''  # a branch, tag or commit of the hub
dataset = ''  # a name under data/, or a path; empty: what the first checkpoint was trained on
architecture = ''  # only to override what the checkpoints say
metrics = 'perplexity,accuracy,generation'  # of perplexity, accuracy, generation, speed, instructions
output = ''  # JSON file with all figures and samples
html = ''  # the same as a page, with loss curves
# --- likelihood ---
mode = ''  # packed or documents; empty: documents for instructions and where all were trained so
block_size = 0  # tokens per row; 0: the smallest of the checkpoints'
max_tokens = 0  # of the validation split; 0: all of it
batch_size = 32
draws = 8  # diffusion: mask ratios per row
k: int = None  # sdd: candidates per masked position; None: the model's own number
bound_steps = 0  # diffusion: the bound of sampling in so many steps as well, slow
exact = False  # diffusion: the exact likelihood from left to right as well, slow
exact_rows = 16  # rows for that
choices = ''  # a JSONL file of question, choices, answer
# --- generation ---
num_samples = 100
sample_tokens = 0  # tokens per sample; 0: to the block's end
judge = ''  # a ckpt.pt or run folder that judges the samples
instructions = 'config/instructions.json'  # prompts with checks, of the metric `instructions`
temperature = 1.0
top_k: int = None
top_p: float = None
steps: int = None  # diffusion: forward passes; None: one per token
sampler = 'ancestral'  # diffusion: ancestral, confidence, blocks, threshold, remdm
block_length = 32  # of sampler=blocks
threshold = 0.9  # of sampler=threshold
eta = 0.1  # of sampler=remdm
seed = 0
# --- the machine ---
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'float32'  # bfloat16 and float16 are faster on a GPU
config = configure(globals())
del config['token']  # no secret goes into the results

METRICS = ('perplexity', 'accuracy', 'generation', 'speed', 'instructions')
OPTIONS = 'temperature top_k top_p steps sampler block_length threshold eta k'.split()
REPEATS = 3  # timings of which the median counts, after one that does not
options = {name: config[name] for name in OPTIONS}  # of generate()
paths, wanted = ([part.strip() for part in text.split(',') if part.strip()] for text in (checkpoint, metrics))


# ---------------------------------------------------------------------------- checks and inputs


def check_settings():
    check_range(config, 1, math.inf, 'batch_size', 'draws', 'exact_rows', 'num_samples')
    check_range(config, 0, math.inf, 'block_size', 'max_tokens', 'sample_tokens', 'bound_steps', 'k')
    require(paths, 'No checkpoint is given; name some: --checkpoint=out/run-a,out/run-b.')
    for name in wanted:
        require(name in METRICS, f'metrics has {name!r}, which is none; choose from {", ".join(METRICS)}.')
    require(not judge or 'generation' in wanted, f'--judge={judge} needs generation in --metrics={metrics}.')
    require(mode in ('', 'packed', 'documents'), f"mode is {mode!r}; choose 'packed' or 'documents'.")
    for path in (output, html):
        is_possible = Path(path).absolute().parent.is_dir()
        require(is_possible, f'{path} lies in a folder that does not exist; make it, or choose another path.')


def read_items(path, fields):
    """Return the objects of a JSON or JSONL file, each of which has to have `fields`, {name: type}."""
    path = Path(path) if Path(path).exists() else ROOT / path
    remedy = f'give a file of objects with {", ".join(fields)}'
    try:
        text = path.read_text(encoding='utf-8')
        lines = [line for line in text.split('\n') if line.strip()]
        items = json.loads(text) if path.suffix == '.json' else [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f'{path} cannot be read ({error}); {remedy}.') from error
    require(isinstance(items, list) and items, f'{path} is empty or no list; {remedy}.')
    for item in items:
        fits = isinstance(item, dict) and all(isinstance(item.get(name), fields[name]) for name in fields)
        require(fits, f'{path} has the entry {str(item)[:80]}; {remedy}.')
    return items


def read_questions():
    questions = read_items(choices, {'question': str, 'choices': list, 'answer': int | str})
    remedy = 'give two texts or more as choices, and as the answer one of them, or its number from 0'
    for question in questions:
        texts, answer = question['choices'], question['answer']
        question['answer'] = texts.index(answer) if answer in texts else answer
        valid = len(texts) > 1 and all(isinstance(text, str) for text in texts)
        require(valid and question['answer'] in range(len(texts)), f'{choices} has {question}; {remedy}.')
    return questions


def load(path):
    """Return a checkpoint without what only training needs, and with its path and a name."""
    state = checkpoints.load(path, token, revision)
    state.pop('optimizer_state_dict', None)
    path = Path(path) / 'ckpt.pt' if (Path(path) / 'ckpt.pt').is_file() else Path(path)
    name = path.resolve().parent.name if path.name == 'ckpt.pt' else str(path)
    start_token = data.Tokenizer(state['tokenizer']).endoftext_id
    return {'start_token': start_token, 'train_config': {}, **state, 'path': path, 'name': name}


def build(state):
    try:
        return checkpoints.load_model(state, dist.device)
    except RuntimeError as error:  # of load_state_dict
        raise UserError(
            f'{state["path"]} has no weights for architecture={state["architecture"]!r} '
            f'({str(error).splitlines()[-1].strip()}); leave --architecture out, or correct it.'
        ) from error


def open_folder(states):
    name = dataset or states[0]['train_config'].get('dataset')
    require(name, f'{states[0]["path"]} does not say what it was trained on; give --dataset=NAME.')
    folder = data.Folder(name)
    for state in states:
        require(
            data.Tokenizer(state['tokenizer']).to_json() == folder.tokenizer.to_json(),
            f'{state["path"]} has another vocabulary than {folder.path}; give the --dataset that it was trained '
            f'on, or prepare this one with --tokenizer={state["path"].parent}.',
        )
    has_answers = folder.masks['val'] is not None
    remedy = f'leave instructions out of --metrics={metrics}, or give an instruction folder as --dataset'
    require(has_answers or 'instructions' not in wanted, f'{folder.path} has no val_masks.bin; {remedy}.')
    return folder


# ---------------------------------------------------------------------------- metrics


def evaluate_likelihood(model, first):
    """Return figures of the validation split, and the sums behind them by bound; '' is the model's own loss.

    first: these sums of the first model, with which each bound is compared; None for itself.
    """
    rows = likelihood.open_rows(folder, 'val', model, block_size, mode)
    tokens_per_byte = folder.counted_tokens_per_byte('val')

    def measure(tokens=max_tokens, **bound):
        return likelihood.measure(model, rows, dist, batch_size, draws, tokens, **bound)

    sums = {'': measure(k=k)}
    if model.has_beliefs and k != 0 and 'perplexity' in wanted:
        sums['k0'] = measure(k=0)
    if bound_steps and model.needs_noise:
        sums['steps'] = measure(k=k, steps=bound_steps)
    figures = {name: likelihood.perplexity_figures(part, tokens_per_byte) for name, part in sums.items()}
    for name, part in sums.items() if first else ():
        figures[name].update(likelihood.difference(part, first.get(name, first[''])))
    if exact and not model.causal:
        few = exact_rows * (block_size - 1)
        figures['exact'] = likelihood.perplexity_figures(measure(few, k=k, exact=True), tokens_per_byte)
        upper = likelihood.perplexity_figures(measure(few, k=k), None)
        figures['exact']['upper_nats_per_token'] = upper['nats_per_token']

    own = figures.pop('')
    figures.update(own if 'perplexity' in wanted else {})
    if 'accuracy' in wanted:
        figures.update(likelihood.accuracy_figures(sums[''], by_ratio=model.needs_noise))
    return figures, sums


def write_texts(model, prompts, stop_tokens):
    """Return a continuation per prompt. Each batch has a seed of its own, so that ranks share the work."""
    rows = {}
    for start in range(dist.rank * batch_size, len(prompts), dist.world_size * batch_size):
        batch = prompts[start : start + batch_size]
        length = sample_tokens or block_size - max(map(len, batch))
        batch_seed = rng.torch_seed(seed, start // batch_size)
        with dist.autocast(), user_errors():
            texts = generate(model, batch, length, stop_tokens=stop_tokens, seed=batch_seed, **options)
        rows.update({start + i: text[len(prompt) :] for i, (text, prompt) in enumerate(zip(texts, batch))})
    if dist.world_size > 1:
        shares = [None] * dist.world_size
        torch.distributed.all_gather_object(shares, rows)
        rows = {i: row for share in shares for i, row in share.items()}
    return [rows[i] for i in range(len(prompts))]


def evaluate_generation(model, state):
    """Return the figures of samples, and those of held-out text of the same lengths."""
    end = tokenizer.endoftext_id
    rows = write_texts(model, [[state['start_token']]] * num_samples, [end] if mode == 'documents' else [])
    figures = diversity(rows)
    figures['samples_empty'] = sum(not likelihood.plain(row, tokenizer) for row in rows)
    heldout = heldout_texts(rows)
    figures['heldout'] = diversity(heldout)
    if judging:
        for part, texts in ((figures, rows), (figures['heldout'], heldout)):
            part.update(likelihood.judge(judging, texts, tokenizer, dist, batch_size, draws))
    if 'floor' in folder.config:
        figures.update(grammar_figures(rows))
    documents = [map(tokenizer.decode, likelihood.split_at(row, end)) for row in rows]
    return {**figures, 'samples': [f'\n{data.ENDOFTEXT}\n'.join(texts) for texts in documents]}


def diversity(rows):
    samples = [likelihood.plain(row, tokenizer) for row in rows]
    return {
        **{f'self_bleu_{n}': scoring.self_bleu(samples, n) for n in range(1, 5)},
        **{f'distinct_{n}': scoring.distinct(samples, n) for n in range(1, 5)},
        'rep_4': scoring.rep(samples, 4),
        'entropy': scoring.entropy(samples),
    }


def heldout_texts(rows):
    """Return as many held-out texts as `rows`, of the same lengths, spread over the split; [] if it is too short.

    In documents mode special tokens are not counted. A text begins with a document and runs on into the
    next ones; where there are too few documents, it begins anywhere.
    """
    tokens = folder.tokens['val']
    positions = np.arange(len(tokens))  # of the tokens that count
    if mode == 'documents':
        special = (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id)
        positions = np.flatnonzero(~np.isin(tokens, special))
        rows = [likelihood.plain(row, tokenizer) for row in rows]
    lengths = np.array([len(row) for row in rows])
    documents = np.searchsorted(positions, np.asarray(folder.index['val'][:-1], dtype=np.int64))

    spread = np.arange(len(rows)) / len(rows)  # (N,)
    for starts in (documents[(spread * len(documents)).astype(int)], (spread * len(positions)).astype(int)):
        ends = starts + lengths
        if (ends <= np.append(starts[1:], len(positions))).all():  # no token twice
            bounds = zip(starts, ends)
            return [tokens[positions[a] : positions[b - 1] + 1].tolist() if b > a else [] for a, b in bounds]
    return []


def grammar_figures(rows):
    """Return how many samples begin with a whole story of prepare/grammar.py, and these stories' exact nll."""
    from prepare import grammar  # builds its tables: only for its own stories

    end = tokenizer.endoftext_id
    texts = [tokenizer.decode(likelihood.split_at(row, end)[0]) if end in row else None for row in rows]
    log_p = [-math.inf if text is None else grammar.log_prob(text) for text in texts]
    is_valid = [p > -math.inf for p in log_p]
    size = sum(len(text.encode()) for text, valid in zip(texts, is_valid) if valid)
    share, interval = scoring.share_ci(is_valid)
    return {
        'valid_stories': share,
        'valid_stories_ci95': interval,
        'finished_stories': sum(text is not None for text in texts) / len(rows),
        'story_nats_per_byte': -sum(p for p in log_p if p > -math.inf) / size if size else None,
    }


def evaluate_instructions(model, state):
    """Return overlap with the reference and form of answers to held-out prompts; how many pass their checks."""
    form = state.get('prompt_format') or folder.config['prompt_format'] or prompts.DEFAULT
    end, _ = prompts.end_of(form, tokenizer)
    examples = heldout_examples()
    rows = write_texts(model, [prompt for prompt, _ in examples], [end])
    texts = [tokenizer.decode(prompt[1:], show_special=True) for prompt, _ in examples]
    answers = [tokenizer.decode(row).strip() for row in rows]
    references = [tokenizer.decode(reference).strip() for _, reference in examples]
    figures = {'examples': len(examples), 'answers': [list(one) for one in zip(texts, answers, references)]}

    for name, ci in (('rouge_l', 'mean_ci'), ('token_f1', 'mean_ci'), ('exact_match', 'share_ci')):
        values = map(getattr(scoring, name), answers, references)
        values = [value for value in values if value is not None]
        figures[name], figures[name + '_ci95'] = getattr(scoring, ci)(values)

    ended, markers = [end in row for row in rows], prompts.markers_of(form)
    kept = [scoring.format_compliance(*one, markers) for one in zip(answers, references, ended)]
    for name in kept[0] if kept else ():
        figures[name] = statistics.mean(one[name] for one in kept)

    passed = pass_checks(model, state, form, end)
    figures['followed'], figures['followed_ci95'] = scoring.share_ci(passed)
    return {**figures, 'followed_of': len(passed)}


def heldout_examples():
    """Return [(prompt ids, reference ids)] of num_samples held-out examples that fit the block, by length."""
    index, examples = folder.index['val'].astype(np.int64), []
    count = min(num_samples, len(index) - 1)
    for document in np.arange(count) * (len(index) - 1) // count:
        part = slice(index[document], index[document + 1])
        ids, loss_mask = folder.tokens['val'][part].tolist(), folder.masks['val'][part].tolist() + [0]
        if 1 in loss_mask:
            first = loss_mask.index(1)
            end = loss_mask.index(0, first)
            if 1 + end < block_size:
                examples.append(([folder.config['start_token']] + ids[:first], ids[first:end]))
    return sorted(examples, key=lambda example: len(example[0]))  # so that batches have room for answers


def pass_checks(model, state, form, end):
    """Return a bool for each prompt of --instructions that leaves half the block for an answer."""
    asked = []
    for exercise in exercises:
        turn = (exercise['instruction'], exercise.get('input', ''), None)
        ids = [state['start_token']] + prompts.encode(tokenizer, form, [turn])[0]
        if len(ids) <= block_size // 2:
            asked.append((ids, exercise['checks']))
    asked.sort(key=lambda one: len(one[0]))
    rows = write_texts(model, [ids for ids, _ in asked], [end])
    return [
        all(scoring.check(tokenizer.decode(row).strip(), checks)) for row, (_, checks) in zip(rows, asked)
    ]


def evaluate_speed(model, start_token):
    """Return tokens per second alone and in a batch, seconds to the first token, passes per token, GPU memory.

    The first token is there when it can be read and will not change: for a causal model after one pass, else with
    the whole window, or with sampler=blocks the first block (its share of the passes).
    """
    length = sample_tokens or block_size - 1
    if dist.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(dist.device)
    passes = []
    hook = model.blocks[0].register_forward_pre_hook(lambda *_: passes.append(1))
    single = median_seconds(model, start_token, 1, length)
    hook.remove()
    batch = median_seconds(model, start_token, batch_size, length)
    first = median_seconds(model, start_token, 1, 1) if model.causal else single
    if sampler == 'blocks' and not model.causal:
        first *= min(1, block_length / length)
    return {
        'tokens_per_sec': length / single,
        'tokens_per_sec_batch': batch_size * length / batch,
        'batch_rows': batch_size,
        'seconds_to_first_token': first,
        'passes_per_token': len(passes) / (1 + REPEATS) / length,
        'peak_memory_mb': torch.cuda.max_memory_allocated() / 2**20 if dist.device.type == 'cuda' else None,
    }


def median_seconds(model, start_token, rows, length):
    """Return the median time to generate `rows` texts of so many tokens."""
    seconds = []
    for _ in range(1 + REPEATS):
        runtime.synchronize(dist.device)
        start = time.perf_counter()
        with dist.autocast(), user_errors():
            generate(model, [[start_token]] * rows, length, seed=seed, **options)
        runtime.synchronize(dist.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


# ---------------------------------------------------------------------------- the table

check_settings()
questions = read_questions() if choices else []
exercises = []
if 'instructions' in wanted:
    exercises = read_items(instructions, {'instruction': str, 'checks': list})
for exercise in exercises:
    scoring.check('', exercise['checks'])  # raises for what is not a check
states = [load(path) for path in paths]
folder = open_folder(states)
tokenizer = folder.tokenizer
smallest = min(state['model_config']['block_size'] for state in states)
block_size = block_size or smallest
require(
    2 <= block_size <= smallest,
    f"block_size is {block_size}; choose from 2 to the smallest model's {smallest}.",
)
if not mode:
    by_documents = all(state['train_config'].get('mode') == 'documents' for state in states)
    mode = 'documents' if by_documents or folder.masks['val'] is not None else 'packed'
dist = runtime.Runtime(device, dtype)
judging = None
if judge:
    state = load(judge)
    judging = likelihood.Judge(build(state), data.Tokenizer(state['tokenizer']), state['start_token'])

names = [state['name'] for state in states]
models, first = [], None
for state in states:
    state['architecture'] = architecture or state['architecture']
    model = build(state)
    figures = {
        'name': state['name'] if names.count(state['name']) == 1 else str(state['path']),
        'path': str(state['path']),
        'architecture': state['architecture'],
        'parameters': model.num_parameters(),
        'step': state.get('global_step'),
        'bound': model.bound,
    }
    if dist.is_main:
        print(f'{figures["name"]} …', flush=True)
    if exact or bound_steps or {'perplexity', 'accuracy'} & set(wanted):
        more, sums = evaluate_likelihood(model, first)
        figures.update(more)
        first = first or sums
    if questions:
        texts = (tokenizer, state['start_token'], questions)
        figures.update(likelihood.choose(model, *texts, dist, batch_size, draws, k))
    if 'generation' in wanted:
        figures.update(evaluate_generation(model, state))
    if 'instructions' in wanted:
        figures.update(evaluate_instructions(model, state))
    if 'speed' in wanted and dist.is_main:
        figures.update(evaluate_speed(model, state['start_token']))
    models.append(figures)

results = {
    'dataset': folder.config['name'],
    'mode': mode,
    'block_size': block_size,
    'models': models,
    'heldout': models[0].get('heldout'),
    'floor': report.entropy_row(folder.config.get('floor')),
    'settings': dict(config),
    'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__},
}
if dist.is_main:
    print(report.table(results))
    if output:
        files.write_json(output, results)
    if html:
        runs = [checkpoints.run_of(state['path']) for state in states]
        curves = {
            model['name']: report.read_loss_curves(run / 'metrics.csv') for model, run in zip(models, runs)
        }
        files.save_atomically(html, lambda file: file.write(report.page(results, curves).encode()))
dist.close()
