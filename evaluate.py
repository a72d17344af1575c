"""Compares models: one table of likelihood, accuracy, samples and speed, each figure with how sure it is.

    python evaluate.py --checkpoint=out/ar-stories-tiny-v1,out/diffusion-stories-tiny-v1 --html=report.html
    python evaluate.py --checkpoint=a.pt,b.pt --metrics=perplexity,generation,speed --judge=c.pt --output=results.json
    torchrun --standalone --nproc_per_node=2 evaluate.py --checkpoint=a.pt,b.pt --device=cpu

Likelihood is exact for `ar` and an upper bound for the diffusion architectures (--exact adds their exact one,
of writing from left to right). Figures that cannot be computed are n/a. What each one means stands below the
table, and in likelihood.py and scoring.py.
"""

import json
import math
import platform
import re
import statistics
import time
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from lm import checkpoints, data, files, likelihood, prompts, report, rng, runtime, scoring
from lm.configurator import ROOT, UserError, check_range, configure
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
draws = 8  # diffusion: masking levels per row
k: int = None  # sdd: candidates per hidden position; None: the model's own number
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
cache_blocks = False  # of sampler=blocks: faster, an approximation
threshold = 0.9  # of sampler=threshold
eta = 0.1  # of sampler=remdm
seed = 0
# --- the machine ---
device = 'auto'  # cpu, cuda, cuda:N, mps
dtype = 'float32'  # bfloat16 and float16 are faster on a GPU
config = configure(globals())
del config['token']  # no secret goes into the results

METRICS = ('perplexity', 'accuracy', 'generation', 'speed', 'instructions')
REPEATS = 3  # timings of which the median counts, after one that does not


# ---------------------------------------------------------------------------- what to compare


def parts_of(text):
    return [part.strip() for part in text.split(',') if part.strip()]


def check_settings():
    check_range(config, 1, math.inf, 'batch_size', 'draws', 'exact_rows', 'num_samples')
    check_range(config, 0, math.inf, 'block_size', 'max_tokens', 'sample_tokens', 'bound_steps', 'k')
    if not parts_of(checkpoint):
        raise UserError('No checkpoint is given; name one or several: --checkpoint=out/run-a,out/run-b.')
    for name in parts_of(metrics):
        if name not in METRICS:
            raise UserError(f'metrics has {name!r}, which is none; choose from {", ".join(METRICS)}.')
    if judge and 'generation' not in parts_of(metrics):
        raise UserError(f'--judge={judge} has no samples to judge; add generation to --metrics={metrics}.')
    if mode not in ('', 'packed', 'documents'):
        raise UserError(f"mode is {mode!r}; choose 'packed' or 'documents', or leave it out.")
    for key, path in (('output', output), ('html', html)):
        if path and not Path(path).absolute().parent.is_dir():
            raise UserError(
                f'--{key}={path} lies in a folder that does not exist; make it, or choose another path.'
            )


def read_items(key, path, fields):
    """The objects of a JSON or JSONL file, each of which has to have `fields`, {name: type}."""
    path = Path(path) if Path(path).exists() else ROOT / path
    wanted = 'objects with ' + ', '.join(
        f'{name} ({getattr(kind, "__name__", kind)})' for name, kind in fields.items()
    )
    try:
        text = path.read_text(encoding='utf-8')
        items = (
            json.loads(text)
            if path.suffix == '.json'
            else [json.loads(line) for line in text.split('\n') if line.strip()]
        )
    except (OSError, ValueError) as error:
        raise UserError(f'--{key}={path} cannot be read ({error}); give a file of {wanted}.') from error
    if not isinstance(items, list) or not items:
        raise UserError(f'--{key}={path} is empty or no list; give a file of {wanted}.')
    for number, item in enumerate(items, 1):
        if not isinstance(item, dict) or not all(
            isinstance(item.get(name), kind) for name, kind in fields.items()
        ):
            raise UserError(f'--{key}={path}, entry {number}, is {str(item)[:80]!r}; give {wanted}.')
    return items


def load(path):
    """A checkpoint without what only training needs, and with where it lies."""
    state = checkpoints.load(path, token, revision)
    state.pop('optimizer_state_dict', None)
    state['path'] = Path(path) / 'ckpt.pt' if (Path(path) / 'ckpt.pt').is_file() else Path(path)
    state.setdefault('start_token', data.Tokenizer(state['tokenizer']).endoftext_id)
    state.setdefault('train_config', {})
    return state


def open_folder(states):
    name = dataset or states[0]['train_config'].get('dataset')
    if not name:
        raise UserError(f'{states[0]["path"]} does not say what it was trained on; give --dataset=NAME.')
    folder = data.Folder(name)
    for state in states:
        if data.Tokenizer(state['tokenizer']).to_json() != folder.tokenizer.to_json():
            raise UserError(
                f'{state["path"]} has another vocabulary ({state["model_config"]["vocab_size"]} tokens) '
                f'than {folder.path} ({folder.tokenizer.vocab_size}); give the --dataset that it was '
                f'trained on, or prepare this one with --tokenizer={state["path"].parent}.'
            )
    if 'instructions' in wanted and folder.masks['val'] is None:
        raise UserError(
            f'{folder.path} has no val_masks.bin, so it says nothing about instructions; leave them out '
            f'of --metrics={metrics}, or give an instruction folder as --dataset.'
        )
    return folder


def names_of(states):
    """Each checkpoint's run folder, or its path where that is not the run's ckpt.pt or not unique."""
    names = [state['path'].resolve().parent.name for state in states]
    return [
        name if state['path'].name == 'ckpt.pt' and names.count(name) == 1 else str(state['path'])
        for name, state in zip(names, states)
    ]


def build(state):
    try:
        return checkpoints.load_model(state, run.device)
    except RuntimeError as error:
        raise UserError(
            f'{state["path"]} does not hold the weights of a model of architecture='
            f'{state["architecture"]!r} ({str(error).splitlines()[-1].strip()}); leave --architecture out, '
            'or correct it.'
        ) from error


def choose_block_size(states):
    smallest = min(state['model_config']['block_size'] for state in states)
    if block_size > smallest:
        raise UserError(
            f'block_size is {block_size}, but a checkpoint sees at most {smallest} tokens; choose no more.'
        )
    if (block_size or smallest) < 2:
        raise UserError('block_size is 1, which leaves nothing to predict; choose at least 2.')
    return block_size or smallest


# ---------------------------------------------------------------------------- likelihood


def evaluate_likelihood(model, folder):
    """Figures of the validation split, and the sums that they come from, by the key that tells their bound."""
    rows = likelihood.open_rows(folder, 'val', model, block_size, mode)
    ratio = folder.counted_tokens_per_byte('val')

    def measure(tokens=max_tokens, **settings):
        return likelihood.measure(model, rows, run, batch_size, draws, tokens, **settings)

    sums, figures = {'': measure(k=k)}, {}
    if 'perplexity' in wanted:
        figures.update(likelihood.perplexity_figures(sums[''], ratio))
    if 'accuracy' in wanted:
        figures.update(likelihood.accuracy_figures(sums[''], by_level=not model.causal))
    if model.causal:
        return figures, sums
    if model.believes and k != 0 and 'perplexity' in wanted:
        sums['k0'] = measure(k=0)
    if bound_steps:
        sums['steps'] = measure(k=k, steps=bound_steps)
    figures.update({name: likelihood.perplexity_figures(of, ratio) for name, of in sums.items() if name})
    if exact:
        few = exact_rows * (block_size - 1)
        figures['exact'] = likelihood.perplexity_figures(measure(few, exact=True, k=k), ratio)
        bound = likelihood.perplexity_figures(measure(few, k=k), None)
        figures['exact']['upper_nats_per_token'] = bound['nats_per_token']
    return figures, sums


def read_questions():
    questions = read_items('choices', choices, {'question': str, 'choices': list, 'answer': int | str})
    for question in questions:
        options, answer = question['choices'], question['answer']
        if (
            not isinstance(options, list)
            or len(options) < 2
            or not all(isinstance(one, str) for one in options)
        ):
            raise UserError(
                f'--choices={choices}: the choices of {question["question"]!r} are {options!r}; they have '
                'to be a list of two texts or more.'
            )
        if answer in options:
            question['answer'] = options.index(answer)
        elif type(answer) is not int or not 0 <= answer < len(options):
            raise UserError(
                f'--choices={choices}: the answer {answer!r} is neither one of {options} nor the number of '
                'one, counted from 0.'
            )
    return questions


# ---------------------------------------------------------------------------- generation


def settings():
    """How samples are drawn: the keys that generate() takes."""
    return dict(
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        steps=steps,
        sampler=sampler,
        block_length=block_length,
        cache_blocks=cache_blocks,
        threshold=threshold,
        eta=eta,
        k=k,
    )


def write_texts(model, prompts, stop_tokens):
    """A continuation per prompt, without it. Each batch has a seed of its own, so that ranks share the work."""
    rows = {}
    for start in range(run.rank * batch_size, len(prompts), run.world_size * batch_size):
        batch, number = prompts[start : start + batch_size], start // batch_size
        with run.autocast():
            written = generate(
                model,
                batch,
                sample_tokens or block_size - max(map(len, batch)),
                stop_tokens=stop_tokens,
                seed=int(rng.random_bits(seed, number)) >> 1,
                **settings(),
            )
        rows.update({start + i: row[len(prompt) :] for i, (row, prompt) in enumerate(zip(written, batch))})
    if run.world_size > 1:
        parts = [None] * run.world_size
        dist.all_gather_object(parts, rows)
        rows = {i: row for part in parts for i, row in part.items()}
    return [rows[i] for i in range(len(prompts))]


def diversity(samples):
    """Figures of lists of ids; None is for too few or too short ones."""
    return {
        **{f'self_bleu_{n}': scoring.self_bleu(samples, n) for n in range(1, 5)},
        **{f'distinct_{n}': scoring.distinct(samples, n) for n in range(1, 5)},
        'rep_4': scoring.rep(samples, 4),
        'entropy': scoring.entropy(samples),
    }


def heldout_texts(folder, rows):
    """As many held-out texts as `rows`, as long as these, spread over the split; None if it is too short for that.

    In documents mode the special tokens among them are not counted. A text begins with a document and runs on
    into the next ones; where there are too few documents, it begins anywhere.
    """
    tokens, tokenizer = folder.tokens['val'], folder.tokenizer
    kept, lengths = np.ones(len(tokens), bool), np.array([len(row) for row in rows])
    if mode == 'documents':
        kept = ~np.isin(tokens, (tokenizer.endoftext_id, tokenizer.mask_id, tokenizer.ignore_id))
        lengths = np.array([len(likelihood.plain(row, tokenizer)) for row in rows])
    places, before = np.flatnonzero(kept), np.concatenate([[0], np.cumsum(kept)])
    beginnings = before[np.asarray(folder.index['val'][:-1], dtype=np.int64)]
    spread = np.arange(len(rows)) / len(rows)  # (N,)
    for starts in (beginnings[(spread * len(beginnings)).astype(int)], (spread * len(places)).astype(int)):
        ends = starts + lengths
        if (ends <= np.append(starts[1:], len(places))).all():  # no token twice
            return [
                tokens[places[start] : places[end - 1] + 1].tolist() if end > start else []
                for start, end in zip(starts, ends)
            ]
    return None


def evaluate_generation(model, state, folder, judging):
    tokenizer, end = folder.tokenizer, folder.tokenizer.endoftext_id
    rows = write_texts(model, [[state['start_token']]] * num_samples, [end] if mode == 'documents' else [])
    samples = [likelihood.plain(row, tokenizer) for row in rows]
    heldout = heldout_texts(folder, rows)
    figures = {
        **diversity(samples),
        'samples_empty': sum(not sample for sample in samples),
        'heldout': diversity([likelihood.plain(row, tokenizer) for row in heldout or []]),
    }
    if judging:
        figures.update(likelihood.judge(judging, rows, tokenizer, run, batch_size, draws))
        figures['heldout'].update(likelihood.judge(judging, heldout or [], tokenizer, run, batch_size, draws))
    if 'floor' in folder.config:
        figures.update(grammar_verdict(rows, tokenizer))
    documents = [map(tokenizer.decode, likelihood.split_at(row, end)) for row in rows]
    return {**figures, 'samples': [f'\n{data.ENDOFTEXT}\n'.join(texts) for texts in documents]}


def grammar_verdict(rows, tokenizer):
    """How many samples begin with a story that the grammar can tell, whole, and the exact nats of these.

    An unfinished story is none: with too few sample_tokens none is valid.
    """
    from prepare import grammar  # builds its tables: only for its own stories

    valid, nats, size = [], 0.0, 0
    for row in rows:
        text = tokenizer.decode(likelihood.split_at(row, tokenizer.endoftext_id)[0])
        log_p = grammar.log_prob(text) if tokenizer.endoftext_id in row else -math.inf
        valid.append(log_p > -math.inf)
        nats, size = (nats - log_p, size + len(text.encode())) if valid[-1] else (nats, size)
    share, interval = likelihood.share(valid)
    return {
        'valid_stories': share,
        'valid_stories_ci95': interval,
        'finished_stories': sum(tokenizer.endoftext_id in row for row in rows) / len(rows),
        'story_nats_per_byte': nats / size if size else None,
    }


# ---------------------------------------------------------------------------- speed


@contextmanager
def counting_passes(model):
    """A list of one number, the forward passes that the trunk makes while the context lasts."""
    count, hidden = [0], model.hidden

    def counted(*arguments, **settings):
        count[0] += 1
        return hidden(*arguments, **settings)

    model.hidden = counted
    try:
        yield count
    finally:
        del model.hidden  # the class's own is there again


def median_seconds(call):
    seconds = []
    for _ in range(1 + REPEATS):
        runtime.synchronize(run.device)
        start = time.perf_counter()
        call()
        runtime.synchronize(run.device)
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[1:])


def evaluate_speed(model, start):
    """Tokens per second alone and in a batch, time to the first token, forward passes per token, peak memory.

    The first token is there when it can be read and will not change: for `ar` after one pass; for diffusion
    when all of the window is written, or with sampler=blocks the first block (its share of the passes).
    """
    length = sample_tokens or block_size - 1

    def write(rows, tokens):
        with run.autocast():
            generate(model, [[start]] * rows, tokens, seed=seed, **settings())

    peak_is_ours = reset_peak_memory()
    single, batch = (median_seconds(lambda: write(rows, length)) for rows in (1, batch_size))
    with counting_passes(model) as passes:
        write(1, length)
    first = median_seconds(lambda: write(1, 1)) if model.causal else single
    if sampler == 'blocks' and not model.causal:
        first *= min(1, block_length / length)
    return {
        'tokens_per_sec': length / single,
        'tokens_per_sec_batch': batch_size * length / batch,
        'batch_rows': batch_size,
        'seconds_to_first_token': first,
        'passes_per_token': passes[0] / length,
        'peak_memory_mb': peak_memory_mb() if peak_is_ours else None,
    }


def reset_peak_memory():
    """Whether the peak begins anew: of tensors on a GPU, of the whole process on a CPU under Linux."""
    if run.device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats(run.device)
    with suppress(OSError):
        return run.device.type == 'cuda' or (
            run.device.type == 'cpu' and Path('/proc/self/clear_refs').write_text('5') > 0
        )
    return False


def peak_memory_mb():
    if run.device.type == 'cuda':
        return torch.cuda.max_memory_allocated(run.device) / 2**20
    return int(re.search(r'VmHWM:\s+(\d+) kB', Path('/proc/self/status').read_text())[1]) / 1024


# ---------------------------------------------------------------------------- instructions


def heldout_examples(folder):
    """[(prompt ids, reference ids)] of num_samples held-out examples, spread over the split, that fit the block."""
    index, examples = folder.index['val'], []
    count = min(num_samples, len(index) - 1)
    for document in np.arange(count) * (len(index) - 1) // count:
        part = slice(int(index[document]), int(index[document + 1]))
        ids, trained = folder.tokens['val'][part].tolist(), folder.masks['val'][part].tolist() + [0]
        if 1 in trained:
            first = trained.index(1)
            end = trained.index(0, first)
            if 1 + end < block_size:
                examples.append(([folder.config['start_token']] + ids[:first], ids[first:end]))
    return sorted(examples, key=lambda example: len(example[0]))  # batches of like length have the most room


def evaluate_instructions(model, state, folder, exercises):
    """Overlap with the reference and form of the answers to held-out prompts; how many checks answers pass."""
    tokenizer = folder.tokenizer
    form = state.get('prompt_format') or folder.config['prompt_format'] or prompts.DEFAULT
    examples, (end, _) = heldout_examples(folder), prompts.end_of(form, tokenizer)
    rows = write_texts(model, [prompt for prompt, _ in examples], [end])
    answers, references = (
        [tokenizer.decode(ids).strip() for ids in texts]
        for texts in (rows, [reference for _, reference in examples])
    )
    figures = {'examples': len(examples)}
    for name in ('rouge_l', 'token_f1', 'exact_match'):
        values = [getattr(scoring, name)(answer, reference) for answer, reference in zip(answers, references)]
        values = [value for value in values if value is not None]
        figures[name], figures[f'{name}_ci95'] = (
            likelihood.share(values)
            if name == 'exact_match'
            else likelihood.scaled(scoring.mean_ci(values), float)
        )
    kept = [
        scoring.format_compliance(answer, reference, end in row, prompts.markers_of(form))
        for answer, reference, row in zip(answers, references, rows)
    ]
    for name in ('all', 'ended', 'no_markers', 'length'):
        figures['format_' + name] = statistics.mean(one[name] for one in kept) if kept else None
    figures['format_compliance'] = figures.pop('format_all')

    texts = [tokenizer.decode(prompt[1:], show_special=True) for prompt, _ in examples]
    asked = [
        (text, answer, scoring.checks_stated_in(prompts.instruction_in(text, form)))
        for text, answer in zip(texts, answers)
    ]
    asked = [one for one in asked if one[2]] + answer_exercises(model, state, tokenizer, form, exercises)
    followed = [scoring.check(answer, checks) for _, answer, checks in asked]
    share, interval = likelihood.share([all(passed) for passed in followed])
    return {
        **figures,
        'followed': share,
        'followed_ci95': interval,
        'followed_of': len(followed),
        'answers': [list(example) for example in zip(texts, answers, references)],
    }


def answer_exercises(model, state, tokenizer, form, exercises):
    """[(prompt, answer, checks)] of the prompts of --instructions that leave half the block for an answer."""
    asked = []
    for one in exercises:
        turn = one['instruction'], one.get('input', ''), None
        ids = [state['start_token']] + prompts.encode(tokenizer, form, [turn])[0]
        if len(ids) <= block_size // 2:
            asked.append((ids, prompts.prompt_of(form, *turn[:2]), one['checks']))
    asked.sort(key=lambda one: len(one[0]))
    rows = write_texts(model, [ids for ids, _, _ in asked], [prompts.end_of(form, tokenizer)[0]])
    return [(text, tokenizer.decode(row).strip(), checks) for (_, text, checks), row in zip(asked, rows)]


# ---------------------------------------------------------------------------- the table

check_settings()
wanted = parts_of(metrics)
questions = read_questions() if choices else []
exercises = []
if 'instructions' in wanted:
    exercises = read_items('instructions', instructions, {'instruction': str, 'checks': list})
for one in exercises:
    scoring.check('', one['checks'])  # what is no check is said now
states = [load(path) for path in parts_of(checkpoint)]
for state, name in zip(states, names_of(states)):
    state.update(name=name, architecture=architecture or state['architecture'])
folder = open_folder(states)
block_size = choose_block_size(states)
by_documents = all(state['train_config'].get('mode') == 'documents' for state in states)
mode = mode or ('documents' if by_documents or folder.masks['val'] is not None else 'packed')
run = runtime.Runtime(device, dtype)
judging = None
if judge:
    state = load(judge)
    judging = likelihood.Judge(build(state), data.Tokenizer(state['tokenizer']), state['start_token'])

models, first_sums = [], None
for state in states:
    model = build(state)
    figures = {
        'name': state['name'],
        'path': str(state['path']),
        'architecture': state['architecture'],
        'parameters': model.num_parameters(),
        'step': state.get('global_step'),
        'bound': 'exact' if model.causal else 'upper',
    }
    if run.is_main:
        print(f'{state["name"]} …', flush=True)
    if exact or bound_steps or {'perplexity', 'accuracy'} & set(wanted):
        more, sums = evaluate_likelihood(model, folder)
        figures.update(more)
        first_sums = first_sums or sums
        if models and 'perplexity' in wanted:
            for kind, of in sums.items():  # a bound is compared with the first one's of its kind
                part = figures[kind] if kind else figures
                part.update(likelihood.difference(of, first_sums.get(kind, first_sums[''])))
    if questions:
        figures.update(
            likelihood.choose(
                model, folder.tokenizer, state['start_token'], questions, run, batch_size, draws, k
            )
        )
    if 'generation' in wanted:
        figures.update(evaluate_generation(model, state, folder, judging))
    if 'instructions' in wanted:
        figures.update(evaluate_instructions(model, state, folder, exercises))
    if 'speed' in wanted and run.is_main:
        figures.update(evaluate_speed(model, state['start_token']))
    models.append(figures)

results = {
    'dataset': folder.config['name'],
    'mode': mode,
    'block_size': block_size,
    'models': models,
    'heldout': models[0].get('heldout'),
    'floor': report.floor_row(folder.config.get('floor')),
    'settings': dict(config),
    'versions': {'python': platform.python_version(), 'torch': torch.__version__, 'numpy': np.__version__},
}
if run.is_main:
    print(report.table(results))
    if output:
        files.write_json(output, results)
    if html:
        curves = {
            state['name']: report.read_curves(checkpoints.run_of(state['path']) / 'metrics.csv')
            for state in states
        }
        files.save_atomically(html, lambda file: file.write(report.page(results, curves).encode()))
run.close()
