"""How fast and how large is finetune.py beside TRL's SFTTrainer, on the CPU?

    python benchmarks/sft.py --input=alpaca_1k.json --peer_python=PATH/bin/python    # an environment with trl and peft

Both sides tune the same llama, made by transformers with random weights, in float32, on the same tokens, each example
once and in a row of its own, with AdamW, the loss on the answers only, and gradient checkpointing. Tokens per second
are those of the examples without padding; memory is the largest resident size of the process.
"""

import functools
import json
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.timing import Target, say
from lm.configurator import ROOT, configure, require

input = ''  # instruction data, as prepare/instruct.py takes them
peer_python = ''  # the python of an environment that has trl, peft and transformers
runs = 3  # pairs of each kind, all weights and LoRA
max_examples = 400  # of the data; nine tenths are trained on
block_size = 512  # tokens per row, at most
warmup_steps = 5  # steps at the start that are not timed
side = ''  # for the script itself: model, full or lora on the side of TRL
folder = ''  # for the script itself: where the data and the model are
config = configure(globals())

BATCH_SIZE, RANK = 8, 16  # rank of the adapters
SHAPE = dict(hidden_size=256, intermediate_size=682, num_hidden_layers=4, num_attention_heads=4)


# ---------------------------------------------------------------------------- the side of TRL, in its environment


def make_llama():
    """Write a llama with random weights and the tokenizer of the prepared data, as transformers does."""
    import torch
    import transformers

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    end, size = tokenizer.eos_token_id, dict(vocab_size=len(tokenizer), max_position_embeddings=block_size)
    llama = transformers.LlamaConfig(**SHAPE, **size, bos_token_id=end, eos_token_id=end)
    transformers.LlamaForCausalLM(llama).save_pretrained(f'{folder}/llama')
    shutil.copy(f'{folder}/data/tokenizer.json', f'{folder}/llama')


def load_tokenizer():
    import transformers

    special = dict(eos_token='<|endoftext|>', pad_token='<|endoftext|>')
    return transformers.PreTrainedTokenizerFast(tokenizer_file=f'{folder}/data/tokenizer.json', **special)


def examples():
    """Yield the examples of the prepared folder, as finetune.py reads them."""
    form = json.loads(Path(folder, 'data/config.json').read_text())
    kinds = {'tokens': form['dtype'], 'masks': np.uint8, 'index': np.uint64}
    ids, masks, index = (np.fromfile(f'{folder}/data/train_{name}.bin', kinds[name]) for name in kinds)
    for start, end in zip(index.astype(int), index[1:].astype(int)):
        tokens, mask = [form['start_token'], *ids[start:end].tolist()], [0, *masks[start:end].tolist()]
        yield {'input_ids': tokens, 'completion_mask': mask}


def train_with_trl():
    """Tune that llama by the SFTTrainer, with the lines of progress that finetune.py prints."""
    import datasets
    import transformers
    import trl
    from peft import LoraConfig

    class Progress(transformers.TrainerCallback):
        def on_log(self, args, state, control, logs, **rest):
            if 'loss' in logs:
                say(f'step {state.global_step}: loss {logs["loss"]},')

    batches = dict(per_device_train_batch_size=BATCH_SIZE, num_train_epochs=1, max_length=block_size)
    optimizer = dict(learning_rate=1e-3, lr_scheduler_type='constant', adam_beta2=0.95, weight_decay=0.01)
    checkpointing = dict(gradient_checkpointing=True, gradient_checkpointing_kwargs={'use_reentrant': False})
    logging = dict(save_strategy='no', report_to=[], disable_tqdm=True, logging_steps=1)
    precision = dict(use_cpu=True, bf16=False, completion_only_loss=True, max_grad_norm=1.0)
    trainer = trl.SFTTrainer(
        transformers.AutoModelForCausalLM.from_pretrained(f'{folder}/llama', dtype='float32'),
        trl.SFTConfig(f'{folder}/trl', **batches, **optimizer, **checkpointing, **logging, **precision),
        train_dataset=datasets.Dataset.from_list(list(examples())),
        peft_config=LoraConfig(r=RANK, lora_alpha=RANK, target_modules='all-linear')
        if side == 'lora'
        else None,
        processing_class=load_tokenizer(),
        callbacks=[Progress()],
    )
    trained = sum(p.numel() for p in trainer.model.parameters() if p.requires_grad)
    say(f'{trained:,} of {trainer.model.num_parameters():,} parameters trained')
    trainer.train()


# ---------------------------------------------------------------------------- both sides


def command_of(name, kind, place):
    """Return the command of a side on the model and the examples in `place`."""
    if name == 'TRL':
        return [peer_python, __file__, *sys.argv[1:], f'--side={kind}', f'--folder={place}']
    words = f"""--init_from={place}/llama --dataset={place}/data --out_dir={place}/ours --overwrite --no_wandb
        --device=cpu --dtype=float32 --packing=False --batch_size={BATCH_SIZE} --block_size={block_size}
        --num_epochs=1 --learning_rate=1e-3 --schedule=constant --warmup_steps=0 --log_every=1
        --eval_every=1000000 --eval_batches=1 --num_samples=0""".split()
    lora = ['--use_peft', f'--peft_lora_r={RANK}', f'--peft_lora_alpha={RANK}']
    return [sys.executable, ROOT / 'finetune.py', *words, *lora * (kind == 'lora')]


def measure(kind, place, results, name):
    """Run a side, add its figures to `results`, and return its seconds per step."""
    done = timing.run(command_of(name, kind, place), HF_HUB_OFFLINE='1')
    text = '\n'.join(line for _, line in done.lines)
    losses = [float(loss) for loss in re.findall(r'^step [\d/]+: loss ([\d.]+),', text, re.M)]
    trained = re.search(r'[\d,]+(?= of [\d,]+ parameters trained)', text)[0]
    results[name].append((trained, len(losses), statistics.mean(losses), done.peak_mb))
    say(
        '  {}, {}: {} parameters, {} steps, mean loss {:.3f}, {:,.0f} MB'.format(
            kind, name, *results[name][-1]
        )
    )
    return timing.seconds_per_step(done.lines, warmup_steps)


def compare(kind, place, tokens):
    """Run pairs of a kind of tuning; return targets."""
    results = {'TRL': [], 'ours': []}
    sides = {name: functools.partial(measure, kind, place, results, name) for name in results}
    ratio = timing.compare_rates(kind, sides, tokens, runs)
    (*work, loss, _), (*our_work, our_loss, _) = results['TRL'][0], results['ours'][0]
    same = work == our_work and abs(our_loss / loss - 1) < 0.03
    require(
        same,
        f'The sides of {kind} did different work; see which versions of trl and transformers were tested.',
    )
    memory = statistics.median(b[-1] / a[-1] for a, b in zip(results['TRL'], results['ours']))
    return [
        Target(f"{kind}: our tokens/s / TRL's, median", ratio, '>=', 1.2),
        Target(f"{kind}: our peak memory / TRL's, median", memory, '<=', 1.0),
    ]


def main():
    require(
        input and shutil.which(peer_python), 'Give --input=FILE, instruction data, and --peer_python=PATH.'
    )
    with tempfile.TemporaryDirectory(prefix='bench-') as place:
        words = f'--output_dir={place}/data --tokenizer=bpe --vocab_size=2048 --max_seq_len={block_size - 1}'
        words = [f'--source={input}', f'--max_examples={max_examples}', *words.split()]
        timing.run([sys.executable, ROOT / 'prepare/instruct.py', *words])
        timing.run(command_of('TRL', 'model', place), HF_HUB_OFFLINE='1')
        size = json.loads(Path(place, 'data/config.json').read_text())['splits']['train']
        tokens = BATCH_SIZE * (size['tokens'] / size['documents'] + 1)  # of a step, a start token in each row
        timing.describe_machine()
        targets = compare('full', place, tokens) + compare('lora', place, tokens)
    timing.finish(targets)


if __name__ == '__main__':
    {'': main, 'model': make_llama, 'full': train_with_trl, 'lora': train_with_trl}[side]()
