"""Training a classifier, side by side: tokens per second here and in transformers, from scratch on fn_a.

    python benchmarks/classify.py                              # minutes on two idle cores
    python benchmarks/classify.py --n_layer=1 --runs=1         # a rehearsal

Both sides train Qwen3-0.6B's blocks, as many as --n_layer says, under a head of one logit on the last token, on the
same rows in the same order and precision: float32 weights, AdamW, gradients clipped. Ours takes the steps that
classify.py takes, theirs those of a plain loop over Qwen3ForSequenceClassification. They start from the same weights,
and it is checked that they give the same logits. Pairs of runs take turns, so that what slows the machine down for a
while slows both down. A target that is missed makes the exit status 1.
"""

import math
import os
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from lm import checkpoints, classification, optim, runtime, tasks
from lm.configurator import UserError, check_choice, check_range, configure
from lm.families import PUBLISHED, hf_name, published_config

n_layer = 2  # blocks of the 28
sequence_length = 50  # digits per row
batch_size = 20  # rows per step, as in the published quick run
train_set_size = 200
dtype = 'bfloat16'  # what both sides compute in: bfloat16, float32
runs = 7  # pairs
steps = 5  # timed steps of each side in a pair
warmup_steps = 2  # steps of each side before
learning_rate = 1e-5
weight_decay = 1e-5
device = 'cpu'
config = configure(globals())
check_choice(config, 'dtype', runtime.DTYPES)
check_range(
    config, 1, math.inf, 'n_layer', 'sequence_length', 'batch_size', 'train_set_size', 'runs', 'steps'
)
check_range(config, 0, math.inf, 'warmup_steps')


# ---------------------------------------------------------------------------- the two sides


def our_side(run, classifier, examples):
    """A function that takes training step `number` as the loop of classify.py does, and returns its loss."""
    weights = classification.weights_of_classes('', examples.labels, 2)
    optimizers = optim.make_optimizers(classifier, 'adamw', learning_rate, 0.9, 0.999, weight_decay)

    def step(number):
        for optimizer in optimizers.values():
            for group in optimizer.param_groups:
                group['lr'] = optim.learning_rate_at(number, 10**6, learning_rate, 0.0, 0, 'cosine', 0.2)
        places = classification.places_of_step(number, batch_size, len(examples), 0)
        weight, sums = weights[examples.labels[places]].sum(), {}
        runtime.seed_dropout(0, number, 0, 0)
        with run.autocast():
            loss, *rest = classifier(*classification.batch_of(examples, places, run.device))
        (loss / weight).backward()
        runtime.add(sums, loss, *rest)
        torch.nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
        for optimizer in optimizers.values():
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return sums['loss'].item() / weight

    return step


def their_side(run, model, examples):
    """The same step on a model of transformers, with nothing around it."""
    rows = torch.from_numpy(np.stack(examples.rows)).to(run.device)
    labels = torch.from_numpy(examples.labels).float().to(run.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, weight_decay=weight_decay, fused=True)

    def step(number):
        places = torch.from_numpy(classification.places_of_step(number, batch_size, len(examples), 0))
        with run.autocast():
            logits = model(input_ids=rows[places], use_cache=False).logits[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits.float(), labels[places])
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


def make_models(device):
    """Our classifier and one of transformers with the same weights."""
    try:
        import transformers
    except ImportError as error:
        raise UserError('transformers is not installed; pip install -r requirements-test.txt.') from error
    torch.manual_seed(0)
    vocabulary = tasks.digit_tokenizer('fn_a')
    trunk = checkpoints.make_model(
        'ar',
        **{
            **published_config('qwen0.6B', sequence_length + 1),
            'n_layer': n_layer,
            'vocab_size': vocabulary.vocab_size,
            'mask_id': vocabulary.mask_id,
            'ignore_id': vocabulary.ignore_id,
        },
    )
    classifier = classification.Classifier(trunk, 1, 'last').to(device)
    rows = trunk.config.padded_vocab_size
    theirs = transformers.Qwen3ForSequenceClassification(
        transformers.Qwen3Config(
            **{
                **PUBLISHED['qwen0.6B'],
                'num_hidden_layers': n_layer,
                'vocab_size': rows,
                'num_labels': 1,
                'max_position_embeddings': sequence_length + 1,
                'pad_token_id': rows - 1,
            }
        )
    )  # no row has this one
    weights = {hf_name(name, 'qwen3')[0]: weight for name, weight in trunk.named_parameters()}
    theirs.load_state_dict({**weights, 'score.weight': classifier.head.weight})
    return classifier, theirs.to(device).train()


def check_same(classifier, theirs, examples, device):
    """A UserError unless both sides give the same logits."""
    tokens, lengths, _ = classification.batch_of(examples, np.arange(batch_size), device)
    with torch.no_grad():
        apart = (classifier.logits(tokens, lengths) - theirs(input_ids=tokens).logits).abs().max().item()
    if not apart < 1e-4:
        raise UserError(
            f'The logits of the two sides differ by {apart:.1e}, so they cannot be compared; see whether '
            'the version of transformers is one that was tested.'
        )


# ---------------------------------------------------------------------------- measuring


def seconds_of(step, start, device):
    runtime.synchronize(device)
    begun = time.perf_counter()
    for number in range(start, start + steps):
        loss = step(number)
    runtime.synchronize(device)
    return time.perf_counter() - begun, loss


def compare():
    """The median of the ratios of pairs of runs, in tokens per second."""
    run = runtime.Runtime(device, dtype)
    parts = tasks.splits('fn_a', sequence_length, train_set_size, 2)
    start = tasks.digit_tokenizer('fn_a').endoftext_id
    examples = classification.Examples(
        list(np.insert(parts['train'][0].astype(np.int64), 0, start, axis=1)), parts['train'][1]
    )
    classifier, theirs = make_models(run.device)
    check_same(classifier, theirs, examples, run.device)
    sides = {'transformers': their_side(run, theirs, examples), 'ours': our_side(run, classifier, examples)}
    print(
        f'{run.dtype}: {sum(p.numel() for p in theirs.parameters()):,} parameters, {n_layer} layers, '
        f'{batch_size} rows of {sequence_length + 1} tokens per step',
        flush=True,
    )
    for step in sides.values():
        for number in range(warmup_steps):
            step(number)
    ratios = []
    for i in range(runs):
        rates, losses = {}, {}
        for name in list(sides)[:: 1 if i % 2 else -1]:  # the first of a pair by turns
            seconds, losses[name] = seconds_of(sides[name], warmup_steps + i * steps, run.device)
            rates[name] = batch_size * (sequence_length + 1) * steps / seconds
        ratios.append(rates['ours'] / rates['transformers'])
        print(
            f'  {rates["transformers"]:8,.0f} tokens/s transformers, {rates["ours"]:8,.0f} ours; loss '
            f'{losses["transformers"]:.4f} and {losses["ours"]:.4f}; ratio {ratios[-1]:.3f}',
            flush=True,
        )
    return statistics.median(ratios)


if __name__ == '__main__':
    print(
        f'{torch.get_num_threads()} threads on {os.cpu_count()} cores, torch {torch.__version__}; the load before is '
        f'{os.getloadavg()[0]:.1f}',
        flush=True,
    )
    ratio = compare()
    verdict = 'reached' if ratio >= 1 else 'MISSED'
    print(f"{verdict:<8} our tokens/s / transformers', median: {ratio:.3f} (wanted >= 1.0)")
    raise SystemExit(int(ratio < 1))
