"""How fast models write, side by side: beside nanoGPT, beside aaholmes/diffusion-llm, and at equal quality.

    python benchmarks/sample.py
    python benchmarks/sample.py --what=ar --peer=nanoGPT                           # five minutes on two idle cores
    python benchmarks/sample.py --what=diffusion --peer=diffusion-llm
    python benchmarks/sample.py --what=quality --checkpoint=out/stories-diffusion-0 --judge=out/stories-ar-0
    python benchmarks/sample.py --what=gpu

    speed      ours alone, by architecture, sampler and batch: tokens/s and the time to the first token
    ar         nanoGPT's sampling loop, which reads the whole text for each token, and ours with the peer's very
               weights, in pairs; then ours by batch
    diffusion  the peer's samplers and ours, masked diffusion and SDD, the same shapes, steps and rows
    quality    each sampler of a checkpoint at several numbers of steps: tokens/s, what a judge thinks, entropy; then
               for each the fastest setting that is as good as the ancestral sampler with a step per token
    gpu        decoding beside what reading the weights once per token takes, eager and as a compiled CUDA graph

A missed target makes the exit status 1. Other programs on the machine disturb the figures, ratios of pairs the least.
"""

import contextlib
import importlib.util
import io
import math
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
import sampling
from benchmarks.timing import Target, describe_machine, say, spread
from lm import checkpoints, data, likelihood, pretrained, runtime, scoring
from lm.configurator import UserError, check_choice, check_range, configure
from sampling import generate

what = 'speed'  # speed, ar, diffusion, quality, gpu
peer = ''  # ar: path of a clone of nanoGPT; diffusion: of diffusion-llm; they are only read
runs = 5  # pairs of runs
new_tokens = 512  # ar and gpu: tokens written
block_size = 1024  # ar and gpu
vocab_size = 65  # ar: as Shakespeare by characters
batches = (1, 8, 32)  # speed and ar: texts at once of ours alone
rows = 8  # diffusion: texts at once
length = 128  # speed and diffusion: tokens of each
steps = 50  # speed and diffusion: forward passes
checkpoint = ''  # quality: a ckpt.pt or run folder of diffusion or sdd
judge = ''  # quality: the same of what judges, better an ar
num_samples = 128  # quality: texts of each setting
batch_size = 64  # quality: texts at once
settings = ''  # quality: 'sampler steps [threshold]', with commas between them; empty: GRID
seed = 0
device = 'cpu'  # of quality
dtype = 'float32'  # of quality
config = configure(globals(), None if __name__ == '__main__' else [])

VOCABULARY = 8192  # of diffusion-llm
SHAPES = {'char': (4, 4, 128), '10M': (6, 6, 384)}  # n_layer, n_head, n_embd
GPT2 = dict(norm='layer', position='learned', mlp='gelu', bias=True, qk_norm=False, logit_softcap=0.0)
LLAMA = dict(n_kv_head=8, mlp='swiglu', mlp_width=8192, norm='rms_gain', qk_norm=False, logit_softcap=0.0)
GPU_SHAPES = {  # of GPT-2 and of Llama 3.2 1B
    '124M': dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50304, **GPT2),
    '1B': dict(n_layer=16, n_head=32, n_embd=2048, vocab_size=128256, **LLAMA),
}
PEER_OPTIONS = dict(temperature=0.8, top_k=200)  # what nanoGPT's sample.py starts with
GRID = (
    'ancestral 1, ancestral 1/2, ancestral 1/4, ancestral 1/8, remdm 1, remdm 1/2, remdm 1/4, remdm 1/8, '
    'confidence 1/2, confidence 1/4, confidence 1/8, blocks 1/2, blocks 1/4, blocks 1/8, '
    'cached 1, cached 1/2, cached 1/4, cached 1/8, '  # blocks with cache_blocks
    'threshold 1 0.9, threshold 1 0.7, threshold 1 0.5, threshold 1 0.3'
)


def timed(call):
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def peer_module(folder, name):
    """A module of the peer's clone, by its dotted name from there."""
    path = Path(folder) / (name.replace('.', '/') + '.py')
    if not folder or not path.is_file():
        raise UserError(
            f'--peer={folder} has no {name.replace(".", "/")}.py; give the path of a clone of '
            + (
                'https://github.com/karpathy/nanoGPT'
                if what == 'ar'
                else 'https://github.com/aaholmes/diffusion-llm'
            )
            + '.'
        )
    if name == 'model':  # our own has that name as well
        spec = importlib.util.spec_from_file_location('peer_model', path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def quietly(call):
    with contextlib.redirect_stdout(io.StringIO()):  # a peer's model announces its size
        return call()


# ---------------------------------------------------------------------------- speed


def speed():
    describe_machine()
    say(
        f'speed: 4/4/256, {length} tokens, diffusion in {steps} steps, vocabulary {VOCABULARY}, float32; untrained '
        'models, which are never sure, so threshold takes a step per token'
    )
    for architecture in ('ar', 'diffusion', 'sdd'):
        model = our_model(architecture, 4, 4, 256)
        for sampler in ('',) if architecture == 'ar' else (*sampling.SAMPLERS, 'cached'):
            for count in batches:
                figures = [rate_and_wait(model, sampler, count) for _ in range(3)]
                rate, wait = (statistics.median(column) for column in zip(*figures))
                say(
                    f'  {architecture:9} {sampler:10} batch {count:3}: {rate:9,.0f} tokens/s, '
                    f'first token after {1000 * wait:,.1f} ms'
                )
    return []


def rate_and_wait(model, sampler, count):
    """Tokens per second, and seconds until the first token can be read and will not change: with `blocks` that of
    the first block, with other samplers of diffusion the last of all."""
    arrived = []

    def look(step, canvas, belief):
        if not (canvas[:, 1:33] == model.config.mask_id).any():
            arrived.append(time.perf_counter())

    options = (
        {}
        if model.causal
        else dict(
            steps=None if sampler == 'threshold' else steps,
            watch=look,
            sampler='blocks' if sampler == 'cached' else sampler,
            block_length=32,
            cache_blocks=sampler == 'cached',
        )
    )
    prompts, start = [[0]] * count, time.perf_counter()
    if model.causal:
        wait = timed(lambda: generate(model, prompts, 1))[0]
    seconds, _ = timed(lambda: generate(model, prompts, length - 1, **options))
    if not model.causal:
        wait = arrived[0] - start if options['sampler'] == 'blocks' else seconds
    return count * (length - 1) / seconds, wait


# ---------------------------------------------------------------------------- ar


def ar():
    module = peer_module(peer, 'model')
    describe_machine()
    say(
        f'ar: {new_tokens} tokens after one, block {block_size}, vocabulary {vocab_size}, float32, {PEER_OPTIONS}'
    )
    targets = []
    for name, (n_layer, n_head, n_embd) in SHAPES.items():
        shape = dict(
            n_layer=n_layer, n_head=n_head, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size
        )
        torch.manual_seed(0)
        theirs = quietly(lambda: module.GPT(module.GPTConfig(**shape, dropout=0.0))).eval()
        ours = with_weights_of(theirs, shape)
        same = share_equal(greedy(theirs), generate(ours, [[0]], 64, temperature=0)[0])
        ratios, rates = [], []
        for pair in range(1, runs + 1):
            seconds, _ = timed(lambda: peer_writes(theirs, new_tokens))
            our_seconds, _ = timed(lambda: generate(ours, [[0]], new_tokens, seed=pair, **PEER_OPTIONS))
            ratios.append(seconds / our_seconds)
            rates.append(new_tokens / our_seconds)
            say(
                f'  {name} pair {pair}: nanoGPT {new_tokens / seconds:,.0f} tokens/s, ours {rates[-1]:,.0f}, '
                f'ratio {ratios[-1]:.2f}'
            )
        say(f'  {name} ratio: median {spread(ratios)}; ours {spread(rates, "{:,.0f}")} tokens/s')
        by_batch(name, ours)
        targets += [
            Target(f"{name}: share of greedy tokens equal to the peer's", same, '>=', 1.0),
            Target(
                f"{name}: our tokens/s / nanoGPT's, median of {runs}", statistics.median(ratios), '>=', 8.0
            ),
        ]
    return targets


def with_weights_of(theirs, shape):
    """Our model with the peer's weights; its padding rows are never drawn."""
    ours = checkpoints.make_model('ar', **shape, **GPT2).eval()
    ours.config.pretrained_rows = len(theirs.transformer.wte.weight)
    tensors = pretrained.gpt2_layout(theirs.state_dict())
    ours.load_state_dict(pretrained.load_state_dict(tensors, 'gpt2', type(ours), ours.config, 'the peer'))
    return ours


@torch.no_grad()
def peer_writes(model, count):
    """As its sample.py does."""
    return model.generate(torch.zeros(1, 1, dtype=torch.long), count, **PEER_OPTIONS)


@torch.no_grad()
def greedy(model):
    return model.generate(torch.zeros(1, 1, dtype=torch.long), 64, top_k=1)[0].tolist()


def share_equal(one, other):
    return sum(a == b for a, b in zip(one, other, strict=True)) / len(one)


def by_batch(name, model):
    for count in batches:
        prompts = [[i % vocab_size for i in range(start, start + 64)] for start in range(count)]
        first, rate = [], []
        for _ in range(3):
            first.append(1000 * timed(lambda: generate(model, prompts, 1, **PEER_OPTIONS))[0])
            seconds, _ = timed(lambda: generate(model, prompts, new_tokens - 64, **PEER_OPTIONS))
            rate.append(count * (new_tokens - 64) / seconds)
        say(
            f'  {name}, batch {count}, after 64 tokens: {spread(rate, "{:,.0f}")} tokens/s, '
            f'first token after {spread(first, "{:.1f}")} ms'
        )


# ---------------------------------------------------------------------------- diffusion


def diffusion():
    sides = {'diffusion': masked_sides(), 'sdd': sdd_sides()}
    describe_machine()
    say(f'diffusion: {rows} texts of {length} tokens in {steps} steps, vocabulary {VOCABULARY}, float32')
    targets = []
    for name, (theirs, model, shape) in sides.items():
        ratios = []
        for pair in range(runs + 1):
            seconds, _ = timed(theirs)
            our_seconds, _ = timed(lambda: generate(model, [[0]] * rows, length - 1, steps=steps, seed=pair))
            if pair:  # the first warms up
                ratios.append(seconds / our_seconds)
                say(
                    f'  {name} {shape} pair {pair}: diffusion-llm {rows * length / seconds:,.0f} tokens/s, '
                    f'ours {rows * length / our_seconds:,.0f}, ratio {ratios[-1]:.2f}'
                )
        say(f'  {name} ratio: median {spread(ratios)}')
        targets.append(
            Target(
                f"{name}: our tokens/s / diffusion-llm's, median of {runs}",
                statistics.median(ratios),
                '>=',
                2.0,
            )
        )
    return targets


def our_model(architecture, n_layer, n_head, n_embd, **changes):
    """A model of the peer's blocks: LayerNorm, learned positions, GELU, biases."""
    torch.manual_seed(0)
    return checkpoints.make_model(
        architecture,
        vocab_size=VOCABULARY,
        block_size=length,
        n_layer=n_layer,
        n_head=n_head,
        n_embd=n_embd,
        mask_id=3,
        **GPT2,
        **changes,
    ).eval()


def masked_sides():
    """A call that runs the peer's DiscreteDiffusion.sample, our model, and the shape of both."""
    models, process = peer_module(peer, 'src.core.model'), peer_module(peer, 'src.core.diffusion')
    shape = models.MODEL_CONFIGS['tiny']
    torch.manual_seed(0)
    theirs = quietly(lambda: models.create_model('tiny', vocab_size=VOCABULARY, max_seq_len=length)).eval()
    sampler = process.DiscreteDiffusion(vocab_size=VOCABULARY, mask_token_id=3)
    model = our_model('diffusion', shape.n_layers, shape.n_heads, shape.d_model)
    return (
        lambda: sampler.sample(theirs, rows, length, num_steps=steps, device='cpu'),
        model,
        f'{shape.n_layers}/{shape.n_heads}/{shape.d_model}',
    )


def sdd_sides():
    """The same of the peer's SparseDiffusion, with 8 candidates on both sides."""
    models, process = (
        peer_module(peer, 'src.core.sparse_model'),
        peer_module(peer, 'src.core.sparse_diffusion'),
    )
    torch.manual_seed(0)
    theirs = models.SparseDenoiser(
        models.SparseModelConfig(
            vocab_size=VOCABULARY,
            k=8,
            d_model=256,
            n_heads=4,
            n_layers=4,
            d_ff=1024,
            max_seq_len=length,
            encoder_dim=None,
        )
    ).eval()
    sampler = process.SparseDiffusion(
        process.SDDConfig(vocab_size=VOCABULARY, k=8), theirs.get_embedding_table()
    )
    return (
        lambda: sampler.sample(theirs, rows, length, num_steps=steps, device='cpu'),
        our_model('sdd', 4, 4, 256, k=8),
        '4/4/256',
    )


# ---------------------------------------------------------------------------- quality


def quality():
    if not checkpoint or not judge:
        raise UserError('quality needs --checkpoint=PATH of a diffusion or sdd model, and --judge=PATH.')
    run = runtime.Runtime(device, dtype)
    state, judging = checkpoints.load(checkpoint), checkpoints.load(judge)
    model, tokenizer = checkpoints.load_model(state, run.device), data.Tokenizer(state['tokenizer'])
    judging = likelihood.Judge(
        checkpoints.load_model(judging, run.device),
        data.Tokenizer(judging['tokenizer']),
        judging['start_token'],
    )
    if model.causal:
        raise UserError(
            f'{checkpoint} is autoregressive, which has no samplers to compare; give a diffusion model.'
        )
    stop = [tokenizer.endoftext_id] if state.get('train_config', {}).get('mode') == 'documents' else []
    describe_machine(run.device)
    total = model.config.block_size - 1
    say(
        f'quality: {checkpoint}, {num_samples} texts of {total} tokens, {batch_size} at once, {dtype}; judge {judge}'
    )
    table = []
    for name, options in parsed_settings(total):
        seconds, texts, passes = write_texts(model, run, state['start_token'], total, stop, options)
        nats = likelihood.judge(judging, texts, tokenizer, run, batch_size, 1)['judge_nats']
        entropy = scoring.entropy([likelihood.plain(text, tokenizer) for text in texts])
        table.append((name, num_samples * total / seconds, nats, entropy))
        say(
            f'  {name:22} {table[-1][1]:9,.0f} tokens/s, {passes / num_samples:6.1f} passes per text, '
            f'judge {nats:.3f} nats, entropy {entropy:.3f}'
        )
    say_fastest(table)
    return []


def parsed_settings(total):
    """[(name, options of generate)] of what --settings asks for; steps below 1 are a share of the tokens."""
    chosen = []
    for text in (settings or GRID).split(','):
        try:
            sampler, count, *more = text.split()
            count = (
                round(total / int(count.split('/')[1]))
                if '/' in count
                else total
                if count == '1'
                else int(count)
            )
            options = {'steps': count, **({'threshold': float(more[0])} if more else {})}
        except (ValueError, IndexError, ZeroDivisionError) as error:
            raise UserError(
                f"settings has {text.strip()!r}; write 'sampler steps', as in 'confidence 1/4' or "
                "'threshold 1 0.9'."
            ) from error
        options['sampler'] = 'blocks' if sampler == 'cached' else sampler
        if sampler == 'cached':
            options['cache_blocks'] = True
        chosen.append((f'{sampler} {count}' + ''.join(f' {value}' for value in more), options))
    return chosen


def write_texts(model, run, start, total, stop, options):
    """Seconds, the texts, and how many rows went through the network for them (a block counts as its share)."""
    texts, passes, hidden = [], [0.0], model.hidden

    def counted(tokens, *others, **more):
        passes[0] += tokens.numel() / (total + 1)
        return hidden(tokens, *others, **more)

    def write():
        for first in range(0, num_samples, batch_size):
            count = min(batch_size, num_samples - first)
            with run.autocast():
                texts.extend(
                    generate(model, [[start]] * count, total, stop_tokens=stop, seed=seed + first, **options)
                )
        runtime.synchronize(run.device)

    model.hidden = counted
    try:
        return timed(write)[0], [text[1:] for text in texts], passes[0]
    finally:
        del model.hidden


def say_fastest(table):
    """For each sampler the fastest setting that is as good as the table's first, by the judge alone, and in the
    entropy of its tokens as well: a sampler that writes the same sure words over and over pleases a judge."""
    first, rate, nats, entropy = table[0]
    say(
        f'  as good as {first}: at most {nats + 0.05:.3f} nats; as varied: entropy at least {0.97 * entropy:.3f}'
    )
    for sampler in dict.fromkeys(row[0].split()[0] for row in table):
        good = [row for row in table if row[0].split()[0] == sampler and row[2] <= nats + 0.05]
        varied = [row for row in good if row[3] >= 0.97 * entropy]
        say(
            f'  {sampler:12} '
            + '; as varied: '.join(
                f'{best[0]}, {best[1]:,.0f} tokens/s, {best[1] / rate:.2f} times' if best else 'none'
                for best in (max(rows, key=lambda row: row[1], default=None) for rows in (good, varied))
            )
        )


# ---------------------------------------------------------------------------- gpu


def gpu():
    if not torch.cuda.is_available():
        say('gpu: no GPU here, nothing measured.')
        return []
    run, targets = runtime.Runtime('cuda', 'bfloat16'), []
    describe_machine(run.device)
    speed = copy_speed(run.device)
    say(
        f'gpu: batch 1, {new_tokens} tokens, block {block_size}, bfloat16; memory is copied at {speed / 1e12:.2f} TB/s'
    )
    for name, shape in GPU_SHAPES.items():
        torch._dynamo.reset()
        with torch.device(run.device):
            model = checkpoints.make_model('ar', block_size=block_size, **shape).to(torch.bfloat16).eval()
        shares = []
        for compile in (False, True):
            rate = statistics.median(decode_rate(model, new_tokens, compile) for _ in range(runs))
            shares.append(rate * bytes_per_token(model, new_tokens) / speed)
            say(
                f'  {name} {"compiled" if compile else "eager"}: {rate:,.0f} tokens/s, {shares[-1]:.0%} of the bound'
            )
        if name == '1B':
            targets.append(Target('1B: decoding / memory-bandwidth bound, batch 1', shares[-1], '>=', 0.6))
    return targets


def copy_speed(device):
    """Bytes per second, read and written, of a copy within the device's memory."""
    source = torch.empty(2 << 30, dtype=torch.uint8, device=device)
    target, seconds = torch.empty_like(source), []
    for _ in range(10):
        runtime.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        runtime.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * source.numel() / statistics.median(seconds)


def bytes_per_token(model, count):
    """What a decoded token has to read at least: all weights but rows of the embedding that are no head's, and, on
    average over `count` tokens, the keys and values so far."""
    shape = model.config
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    for table in (model.positions, None if shape.tied else model.embedding):
        weights -= 0 if table is None else table.weight.numel() * table.weight.element_size()
    per_place = 2 * shape.n_layer * shape.n_kv_head * shape.head_dim * model.embedding.weight.element_size()
    return weights + per_place * count / 2


@torch.inference_mode()
def decode_rate(model, count, compile):
    """Tokens per second while decoding one text, after the prompt is read and the step is compiled."""
    device, options = model.embedding.weight.device, (1.0, None, None)
    uniform = sampling.uniform_numbers((count, 1), torch.Generator().manual_seed(0), device)
    cache, step = sampling.KVCache(1, count, device), sampling.one_more
    tokens = sampling.next_tokens(model, sampling.read(model, [[0]], cache), uniform[0], options)
    if compile:
        cache.fixed = True
        step = sampling.compiled_step(model, cache, tokens, uniform[1], options)
    warm = min(8, count - 2)
    for i in range(1, count):
        if i == 1 + warm:
            runtime.synchronize(device)
            start = time.perf_counter()
        tokens = step(model, cache, tokens, uniform[i], options)
    runtime.synchronize(device)
    return (count - 1 - warm) / (time.perf_counter() - start)


# ---------------------------------------------------------------------------- all

PARTS = {'speed': speed, 'ar': ar, 'diffusion': diffusion, 'quality': quality, 'gpu': gpu}


def measure(given=None, **changes):
    """Runs the part that `what` names, with settings changed by name. Returns its targets.

    given: the settings of bench.py, whose --what=sample this is: with a peer `ar`, else `speed`.
    """
    if given:
        config.update(what='ar' if given['peer'] else 'speed', peer=given['peer'], runs=given['runs'])
    config.update(changes)
    globals().update(config)
    check_choice(config, 'what', tuple(PARTS))
    check_range(config, 1, math.inf, 'runs', 'rows', 'steps', 'num_samples', 'batch_size')
    check_range(config, 2, math.inf, 'length', 'vocab_size')
    check_range(config, 66, block_size, 'new_tokens')
    runtime.Runtime(device, dtype)  # as each script of ours starts: what it sets for the machine counts
    return PARTS[what]()


if __name__ == '__main__':
    results = measure()
    for result in results:
        say(f'  {result}')
    raise SystemExit(0 if all(result.reached for result in results) else 1)
