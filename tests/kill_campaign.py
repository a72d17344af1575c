"""Kill runs at random moments, resume them, and compare their ends bit for bit to those of runs that were not killed.

python tests/kill_campaign.py --kills=200

A run is lost where it cannot be resumed, and differs where it ends with another state, other metrics or results.
"""

import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from conftest import write_folder
from helpers import CPU, TINY, assert_same_run, load, start_ranks, write_base, write_examples

from lm.configurator import configure

kills = 200
seed = 0
only = ''  # a part of the names of the cases; empty: all
config = configure(globals())

STEPS = '--max_steps=50 --eval_every=16 --save_every=5 --log_every=3'.split()
TRAIN = ['train.py', *TINY, *CPU, *STEPS, '--block_size=16', '--dataset=PLACE/letters']
TUNE = ['finetune.py', *CPU, *STEPS, '--batch_size=4', '--learning_rate=0.01', '--dataset=PLACE/examples']
TUNE += ['--num_samples=1', '--sample_tokens=4']
CLASSIFY = ['classify.py', *CPU, *STEPS, '--batch_size=4', '--target_func=fn_a', '--sequence_length=10']
CLASSIFY += ['--train_set_size=40', '--test_set_size=40', '--dropout=0.1']
SHAPE = '--n_layer=1 --n_head=2 --n_embd=16'.split()
SHARDED = [*TRAIN, '--fsdp', '--batch_size=2']
CASES = {  # ranks, the command
    'train ar, muon, copies': (1, [*TRAIN, '--optimizer=muon', '--save_total_limit=2', '--dropout=0.1']),
    'train diffusion, average': (
        1,
        [*TRAIN, '--architecture=diffusion', '--ema_decay=0.9', '--sample_every=16'],
    ),
    'train sdd, documents': (1, [*TRAIN, '--architecture=sdd', '--mode=documents', '--k_warmup_steps=30']),
    'train ar, two ranks': (2, [*TRAIN, '--batch_size=2', '--gradient_accumulation_steps=2']),
    'train ar, sharded': (1, SHARDED),
    'train diffusion, sharded, two ranks': (2, [*SHARDED, '--architecture=diffusion']),
    'finetune diffusion': (1, [*TUNE, '--init_from=PLACE/diffusion']),
    'finetune ar as sdd': (1, [*TUNE, '--init_from=PLACE/ar', '--architecture=sdd', '--packing=False']),
    'finetune ar, LoRA': (1, [*TUNE, '--init_from=PLACE/ar', '--use_peft', '--peft_lora_dropout=0.1']),
    'finetune sdd, two ranks': (2, [*TUNE, '--init_from=PLACE/sdd', '--batch_size=2']),
    'classify ar': (1, [*CLASSIFY, *SHAPE]),
    'classify diffusion, validation rows': (
        1,
        [*CLASSIFY, *SHAPE, '--architecture=diffusion', '--val_set_size=8'],
    ),
    'classify sdd, LoRA': (1, [*CLASSIFY, '--init_from=PLACE/sdd', '--lora_rank=2', '--lora_dropout=0.1']),
    'classify ar, two ranks': (2, [*CLASSIFY, *SHAPE, '--batch_size=2']),
}


def end(processes, seconds=120):
    """Wait for processes; return whether all end with status 0."""
    for process in processes:
        process.join(seconds)
        process.kill()  # where it hangs
        process.join()
    return all(process.exitcode == 0 for process in processes)


def strike(draw, processes, seconds):
    """Send SIGKILL, to one rank a moment before the others, or SIGTERM to one, after so many seconds.

    Returns None where the run had ended before, else whether it ended as it should.
    """
    processes[0].join(seconds)
    if processes[0].exitcode is not None:
        return None
    first = draw.choice(processes)
    if draw.random() < 0.3:
        first.terminate()
        ended = end(processes)
        return ended or any(
            process.exitcode == -signal.SIGTERM for process in processes
        )  # before it was prepared
    for process in [first, *processes]:
        process.kill()
        time.sleep(0.02)
    end(processes)
    return True


def campaign(place, draw, name, wanted):
    """Strike runs of a case so often; return the Counter of what became of them."""
    ranks, (script, *words) = CASES[name]
    words = [word.replace('PLACE', str(place)) for word in words]
    reference, out, log, outcomes = place / 'reference', place / 'run', place / 'log', Counter()
    began = time.time()
    if not end(start_ranks(script, *words, f'--out_dir={reference}', ranks=ranks, log=log)):
        raise SystemExit(f'{name} does not run:\n{log.read_text()}')
    whole = time.time() - began
    while outcomes['kills'] < wanted:
        shutil.rmtree(out, ignore_errors=True)
        command = [script, *words, f'--out_dir={out}', '--resume_from=auto']
        for _ in range(draw.randint(1, 8)):
            struck = strike(draw, start_ranks(*command, ranks=ranks, log=log), draw.uniform(0.1, whole))
            outcomes['kills'] += struck is not None
            outcomes['lost'] += struck is False
            if not struck:
                break
        processes = start_ranks(*command, ranks=ranks, log=log)
        outcomes['lost'] += not end(processes)
        outcomes['runs'] += 1
        try:
            assert_same_run(out, reference)
            if 'head_state_dict' in load(out):
                assert (out / 'metrics.py').read_text() == (reference / 'metrics.py').read_text()
                assert (out / 'predictions.npz').exists()
        except (AssertionError, OSError, RuntimeError) as error:
            outcomes['differing'] += 1
            shutil.copytree(out, Path(tempfile.gettempdir()) / f'differing-{os.getpid()}-{outcomes["runs"]}')
            print(f'{name}: {error!r:.300}\n{log.read_text()[-600:]}', flush=True)
    shutil.rmtree(reference)
    return outcomes


def main():
    draw, total, names = random.Random(seed), Counter(), [name for name in CASES if only in name]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        write_folder(place / 'letters')
        write_examples(place / 'examples')
        for architecture in ('ar', 'diffusion', 'sdd'):
            write_base(place / architecture, architecture)
        for name in names:
            outcomes = campaign(place, draw, name, -(-kills // len(names)))
            total += outcomes
            figures = ', '.join(f'{outcomes[key]} {key}' for key in ('kills', 'runs', 'lost', 'differing'))
            print(f'{name}: {figures}', flush=True)
    print(', '.join(f'{total[key]} {key}' for key in ('kills', 'runs', 'lost', 'differing')))
    return total['lost'] + total['differing']


if __name__ == '__main__':
    sys.exit(bool(main()))
