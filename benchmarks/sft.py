"""Instruction tuning, side by side: speed and memory of finetune.py and of TRL's SFTTrainer on the CPU.

    python benchmarks/sft.py --input=alpaca_1k.json --peer_python=PATH/bin/python    # an environment with trl and peft

Both sides tune the same llama, made by transformers with random weights, in float32, on the same examples, each of
them once, with equal rows per step, AdamW, learning rate and clipping, the loss on the answers only, and gradient
checkpointing (or not) on both. The data are tokens already: prepared by prepare/instruct.py, which also
trains the tokenizer, and handed to TRL as `input_ids` and `completion_mask`. One example per row, padded to the
longest of the batch (--packing: several per row on both sides, isolated; TRL then makes one sequence of the batch).

Tokens per second are those of the examples, without padding, over the time between the ends of steps, the first ones
left out; memory is the largest resident size of the process. Each side is a process of its own, in pairs, so that
what slows the machine down for a while slows both down. 4-bit is ours alone. Targets that are missed make the exit
status 1.
"""

import csv
import json
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from lm.configurator import ROOT, UserError, check_range, configure

input = ''  # instruction data, as prepare/instruct.py takes them
peer_python = ''  # the python of an environment that has trl, peft and transformers
what = 'full,lora,4bit'  # of full, lora, 4bit (ours alone)
runs = 3  # pairs
max_examples = 400  # of the data; nine tenths are trained on
batch_size = 8
block_size = 512  # tokens per row, at most
packing = False  # several examples per row
gradient_checkpointing = True  # the default of both sides
vocab_size = 2048  # of the tokenizer, and so of the model
n_layer = 4
n_head = 4
n_embd = 256
lora_r = 16
learning_rate = 1e-3
side = ''  # for the script itself: model, full or lora on the side of TRL, in the folder --input
config = configure(globals())
check_range(
    config,
    1,
    math.inf,
    'runs',
    'max_examples',
    'batch_size',
    'block_size',
    'n_layer',
    'n_head',
    'n_embd',
    'lora_r',
)

WHAT = ('full', 'lora', '4bit')
LOG_EVERY = 5  # steps of TRL (ours logs each one); the first ones only warm up, and are not timed
SECONDS_BETWEEN_LOOKS = 0.1


# ---------------------------------------------------------------------------- the side of TRL, in its environment


def make_llama(folder):
    """A llama with random weights and the tokenizer of the prepared data, as transformers writes them."""
    import torch
    import transformers

    tokenizer = tokenizer_of(folder)
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=n_embd,
            intermediate_size=8 * n_embd // 3,
            num_hidden_layers=n_layer,
            num_attention_heads=n_head,
            num_key_value_heads=n_head,
            max_position_embeddings=block_size,
            bos_token_id=tokenizer.eos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )
    model.save_pretrained(f'{folder}/llama')
    shutil.copy(f'{folder}/data/tokenizer.json', f'{folder}/llama')


def tokenizer_of(folder):
    import transformers

    return transformers.PreTrainedTokenizerFast(
        tokenizer_file=f'{folder}/data/tokenizer.json', eos_token='<|endoftext|>', pad_token='<|endoftext|>'
    )


def train_with_trl(folder):
    """Tunes that llama by the SFTTrainer and leaves what was measured in trl.json."""
    import datasets
    import transformers
    import trl
    from peft import LoraConfig

    ends, losses = [], []

    class Clock(transformers.TrainerCallback):
        def on_step_end(self, args, state, control, **rest):
            ends.append(time.perf_counter())

        def on_log(self, args, state, control, logs, **rest):
            losses.extend([logs['loss']] if 'loss' in logs else [])

    settings = trl.SFTConfig(
        output_dir=f'{folder}/trl',
        use_cpu=True,
        bf16=False,
        max_length=block_size,
        packing=packing,
        completion_only_loss=True,
        gradient_checkpointing=gradient_checkpointing,
        gradient_checkpointing_kwargs={'use_reentrant': False},
        per_device_train_batch_size=batch_size,
        num_train_epochs=1,
        learning_rate=learning_rate,
        lr_scheduler_type='constant',
        adam_beta2=0.95,
        weight_decay=0.01,
        max_grad_norm=1.0,
        logging_steps=LOG_EVERY,
        save_strategy='no',
        report_to=[],
        disable_tqdm=True,
    )
    lora = LoraConfig(r=lora_r, lora_alpha=lora_r, target_modules='all-linear') if side == 'lora' else None
    model = transformers.AutoModelForCausalLM.from_pretrained(f'{folder}/llama', dtype='float32')
    trainer = trl.SFTTrainer(
        model,
        settings,
        train_dataset=datasets.Dataset.from_json(f'{folder}/examples.jsonl'),
        peft_config=lora,
        processing_class=tokenizer_of(folder),
        callbacks=[Clock()],
    )
    trainer.train()
    timed = range(
        LOG_EVERY - 1, len(ends) // LOG_EVERY * LOG_EVERY
    )  # whole groups of steps, without the first
    result = {
        'steps': len(ends),
        'loss': statistics.mean(losses[: len(ends) // LOG_EVERY]),
        'seconds_per_step': (ends[timed[-1]] - ends[timed[0]]) / (len(timed) - 1),
        'trained': sum(p.numel() for p in trainer.model.parameters() if p.requires_grad),
    }
    Path(folder, 'trl.json').write_text(json.dumps(result))


# ---------------------------------------------------------------------------- our side


def our_command(folder, kind):
    """finetune.py on the same model, examples and settings."""
    adapters = (
        ['--use_peft', f'--peft_lora_r={lora_r}', f'--peft_lora_alpha={lora_r}'] if kind != 'full' else []
    )
    return [
        sys.executable,
        ROOT / 'finetune.py',
        f'--init_from={folder}/llama',
        f'--dataset={folder}/data',
        f'--out_dir={folder}/ours',
        '--overwrite',
        '--device=cpu',
        '--dtype=float32',
        f'--packing={packing}',
        f'--gradient_checkpointing={gradient_checkpointing}',
        f'--batch_size={batch_size}',
        f'--block_size={block_size}',
        '--num_epochs=1',
        f'--learning_rate={learning_rate}',
        '--schedule=constant',
        '--warmup_steps=0',
        '--log_every=1',
        '--eval_every=1000000',
        '--eval_batches=1',
        '--num_samples=0',
        '--no_wandb',
        *adapters,
        *['--load_in_4bit'] * (kind == '4bit'),
    ]


def our_result(folder):
    """The same figures from the run's metrics.csv; tokens per step are the mean over the data, as there."""
    with open(f'{folder}/ours/metrics.csv', newline='') as file:
        rows = [row for row in csv.DictReader(file) if row.get('train/loss')]
    whole = rows[: len(rows) // LOG_EVERY * LOG_EVERY]
    log = Path(folder, 'ours/logs.log').read_text(encoding='utf-8')
    tokens, num_rows, trained = (
        int(part.replace(',', ''))
        for part in re.search(
            r'examples of ([\d,]+) tokens.* in ([\d,]+) rows .* ([\d,]+) of [\d,]+ parameters trained',
            log,
            re.S,
        ).groups()
    )
    per_step = batch_size * tokens / num_rows
    seconds = [per_step / float(row['train/tokens_per_sec']) for row in whole[LOG_EVERY:]]
    return {
        'steps': int(rows[-1]['step']),
        'loss': statistics.mean(float(row['train/loss']) for row in whole),
        'seconds_per_step': statistics.mean(seconds),
        'trained': trained,
    }


# ---------------------------------------------------------------------------- measuring


def run(command):
    """Runs it to its end. Returns the largest resident size in MB that it had."""
    with tempfile.TemporaryFile('w+') as log:
        process, peak = (
            subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, 'HF_HUB_OFFLINE': '1'}),
            0,
        )
        while process.poll() is None:
            status = Path(f'/proc/{process.pid}/status')
            size = re.search(r'VmHWM:\s+(\d+) kB', status.read_text() if status.exists() else '')
            peak = max(peak, int(size[1]) if size else 0)
            time.sleep(SECONDS_BETWEEN_LOOKS)
        log.seek(0)
        if process.returncode:
            raise UserError(
                f'{Path(command[1]).name} ended with status {process.returncode}; repair what it says:\n'
                f'{log.read()[-2000:]}'
            )
    return peak / 1000


def measure(name, kind, folder, tokens):
    """Tokens per second, peak MB and the rest of what a side measured of its run."""
    if name == 'TRL':
        peak = run(peer_command(folder, kind))
        result = json.loads(Path(folder, 'trl.json').read_text())
    else:
        peak, result = run(our_command(folder, kind)), our_result(folder)
    result.update(peak=peak, rate=tokens / result['steps'] / result['seconds_per_step'])
    print(
        f'  {kind:<4} {name:<5} {result["rate"]:8,.0f} tokens/s, peak {peak:,.0f} MB, {result["steps"]} steps, '
        f'{result["trained"]:,} parameters trained, mean loss {result["loss"]:.3f}',
        flush=True,
    )
    return result


def peer_command(folder, kind):
    settings = [
        f'--{key}={config[key]}'
        for key in (
            'packing',
            'gradient_checkpointing',
            'batch_size',
            'block_size',
            'n_layer',
            'n_head',
            'n_embd',
            'lora_r',
            'learning_rate',
        )
    ]
    return [peer_python, ROOT / 'benchmarks/sft.py', f'--side={kind}', f'--input={folder}', *settings]


def prepare(folder):
    """Prepares the data and the model in `folder`. Returns the number of tokens that both sides train over."""
    run(
        [
            sys.executable,
            ROOT / 'prepare/instruct.py',
            f'--source={input}',
            f'--output_dir={folder}/data',
            '--tokenizer=bpe',
            f'--vocab_size={vocab_size}',
            f'--max_seq_len={block_size - 1}',
            f'--max_examples={max_examples}',
        ]
    )
    tokens = 0
    with open(f'{folder}/examples.jsonl', 'w') as file:
        for ids, mask in examples(f'{folder}/data'):
            file.write(json.dumps({'input_ids': ids, 'completion_mask': mask}) + '\n')
            tokens += len(ids)
    run(peer_command(folder, 'model'))
    return tokens


def examples(path):
    """(token ids, 1 where they are trained) of each training example of a prepared folder, as finetune.py reads it."""
    form = json.loads(Path(path, 'config.json').read_text())
    ids, masks, index = (
        np.fromfile(f'{path}/train_{name}.bin', kind)
        for name, kind in (('tokens', form['dtype']), ('masks', np.uint8), ('index', np.uint64))
    )
    for start, end in zip(index.astype(int), index[1:].astype(int)):
        yield [form['start_token'], *ids[start:end].tolist()], [0, *masks[start:end].tolist()]


# ---------------------------------------------------------------------------- comparing


def compare(folder):
    """Pairs of runs for each kind of tuning. Returns targets: (what, value, reached, wanted)."""
    tokens, targets, seen = prepare(folder), [], {}
    print(
        f'{tokens:,} tokens of examples, {os.cpu_count()} cores; the load before is {os.getloadavg()[0]:.1f}',
        flush=True,
    )
    for number in range(runs):
        for kind in what.split(','):
            names = ('TRL', 'ours') if kind != '4bit' else ('ours',)
            for name in names if number % 2 else names[::-1]:
                seen.setdefault((kind, name), []).append(measure(name, kind, folder, tokens))
    for kind in [kind for kind in what.split(',') if kind != '4bit']:
        ours, theirs = seen[kind, 'ours'], seen[kind, 'TRL']
        check_same(kind, ours[0], theirs[0])
        ratio = statistics.median(a['rate'] / b['rate'] for a, b in zip(ours, theirs))
        memory = statistics.median(a['peak'] / b['peak'] for a, b in zip(ours, theirs))
        targets += [
            (f"{kind}: our tokens/s / TRL's, median", ratio, ratio >= 1.2, '>= 1.2'),
            (f"{kind}: our peak memory / TRL's, median", memory, memory <= 1, '<= 1.0'),
        ]
    return targets


def check_same(kind, ours, theirs):
    """That both sides did the same work: as many steps, as many parameters, and about the same loss."""
    for key, room in (('steps', 0), ('trained', 0), ('loss', 0.03)):
        if abs(ours[key] - theirs[key]) > room * theirs[key]:
            raise UserError(
                f'The sides of {kind} differ in {key}, {ours[key]:,} and {theirs[key]:,}, so they cannot '
                'be compared; see whether the versions of trl and transformers are those that were tested.'
            )


def main():
    if not Path('/proc/self/status').exists():
        raise UserError(
            'The memory of a process is read from /proc/PID/status, which is not here; use Linux.'
        )
    if not input or not peer_python:
        raise UserError(
            'Give --input=FILE, instruction data, and --peer_python=PATH, the python of an environment '
            'with trl, peft and transformers.'
        )
    if not shutil.which(peer_python):
        raise UserError(
            f'--peer_python={peer_python} is no program; give the path of a python, such as '
            'ENVIRONMENT/bin/python.'
        )
    if not set(what.split(',')) <= set(WHAT):
        raise UserError(f'what is {what!r}; choose from {", ".join(WHAT)}, with commas between them.')
    with tempfile.TemporaryDirectory(prefix='bench-') as folder:
        targets = compare(folder)
    for name, value, reached, wanted in targets:
        print(f'{"reached" if reached else "MISSED":<8} {name}: {value:,.2f} (wanted {wanted})')
    return int(not all(reached for _, _, reached, _ in targets))


if __name__ == '__main__':
    if side:
        make_llama(input) if side == 'model' else train_with_trl(input)
    else:
        raise SystemExit(main())
