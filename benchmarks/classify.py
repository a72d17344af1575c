"""How fast does classify.py train beside a plain loop over transformers, on the CPU?

    python benchmarks/classify.py                                    # minutes on two idle cores
    python benchmarks/classify.py --n_layer=1 --runs=1 --steps=10    # a rehearsal

Both sides train Qwen3-0.6B's blocks, as many as --n_layer says, from the same weights, under a head of one logit on
the last token, on rows of digits, with float32 weights, AdamW and clipped gradients, each side a process of its own.
"""

import math
import sys
import tempfile
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path[0] = str(Path(__file__).resolve().parent.parent)  # not this folder, whose names are those of scripts
from benchmarks import timing
from benchmarks.timing import Target, say
from lm import runtime, tasks
from lm.configurator import ROOT, check_range, configure

n_layer = 2  # blocks of the 28
sequence_length = 50  # digits per row
batch_size = 20  # rows per step, as in the published quick run
steps = 20  # of each run
runs = 5  # pairs
dtype = 'bfloat16'  # what both sides compute in: bfloat16, float32
folder = ''  # for the script itself: be the side of transformers, on the model in this folder
config = configure(globals())

WARMUP = 5  # steps at the start that are not timed
QWEN = dict(  # Qwen3-0.6B's
    hidden_size=1024, intermediate_size=3072, num_attention_heads=16, num_key_value_heads=8, head_dim=128
)


def make_qwen(place):
    """Write a model with random weights and the tokenizer of digits, as transformers does."""
    import transformers

    torch.manual_seed(0)
    size = dict(num_hidden_layers=n_layer, vocab_size=64, max_position_embeddings=sequence_length + 1)
    qwen = transformers.Qwen3Config(**QWEN, **size)
    transformers.Qwen3ForCausalLM(qwen).save_pretrained(place)
    Path(place, 'tokenizer.json').write_text(tasks.digit_tokenizer('fn_a').to_json())


def train_with_transformers():
    """Train it, with the lines of progress that classify.py prints."""
    import transformers

    dist = runtime.Runtime('cpu', dtype)
    head = dict(num_labels=1, pad_token_id=63)  # no row has 63
    kind = transformers.Qwen3ForSequenceClassification
    model = kind.from_pretrained(folder, dtype='float32', **head).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=1e-5, fused=True)
    for step in range(1, steps + 1):
        rows = torch.randint(2, (batch_size, sequence_length + 1))
        with dist.autocast():
            logits = model(input_ids=rows, use_cache=False).logits[:, 0]
        loss = F.binary_cross_entropy_with_logits(logits.float(), (rows.sum(1) % 2).float())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        say(f'step {step}: loss {loss.item():.4f},')


def main():
    check_range(config, 1, math.inf, 'n_layer', 'sequence_length', 'batch_size', 'runs')
    check_range(config, WARMUP + 2, math.inf, 'steps')
    runtime.pick_dtype(dtype, timing.CPU)  # or say which there are
    with tempfile.TemporaryDirectory(prefix='bench-') as place:
        make_qwen(place)
        words = f"""--init_from={place} --out_dir={place}/run --overwrite --target_func=fn_a --pool=last
            --sequence_length={sequence_length} --train_set_size=200 --test_set_size=2 --batch_size={batch_size}
            --max_steps={steps} --learning_rate=1e-5 --weight_decay=1e-5 --eval_every=1000000 --log_every=1
            --device=cpu --dtype={dtype} --no_wandb""".split()
        ours = [sys.executable, ROOT / 'classify.py', *words]
        theirs = [sys.executable, __file__, *sys.argv[1:], f'--folder={place}']
        sides = {
            'transformers': lambda: timing.seconds_per_step(timing.run(theirs).lines, WARMUP),
            'ours': lambda: timing.seconds_per_step(timing.run(ours).lines, WARMUP),
        }
        timing.describe_machine()
        ratio = timing.compare_rates(dtype, sides, batch_size * (sequence_length + 1), runs)
    timing.finish([Target(f"our tokens/s / transformers', median of {runs}", ratio, '>=', 1.0)])


if __name__ == '__main__':
    train_with_transformers() if folder else main()
