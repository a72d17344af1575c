"""The process that a training script runs in: settings, ranks, device, precision, signals, evaluation."""

import contextlib
import ctypes
import math
import os
import signal
import sys
import time
from datetime import timedelta

import torch

from lm import optim
from lm.configurator import UserError, check_choice, check_range, report_idle, require
from lm.kernels import has_bfloat16
from lm.rng import torch_seed
from model import architecture_name

DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}
CHOICES = {'optimizer': ('adamw', 'muon'), 'schedule': ('cosine', 'linear', 'wsd', 'constant')}
CHOICES |= {'pool': ('', 'last', 'mean'), 'best_by': ('loss', 'accuracy', 'macro_f1')}
CHOICES |= {'model_type': ('normal', 'ipa')}
RANGES = [  # settings that are at least the first number and below the second
    (1, math.inf, 'batch_size gradient_accumulation_steps eval_batch_size sequence_length'),
    (2, math.inf, 'block_size'),
    (0, 2**63, 'seed'),
    (1, math.inf, 'eval_every log_every sample_tokens peft_lora_r num_classes noisy_every depth'),
    (0, math.inf, 'num_epochs learning_rate min_lr warmup_steps decay_ratio weight_decay'),
    (0, math.inf, 'eval_tokens eval_examples early_stopping save_every save_total_limit sample_every'),
    (0, math.inf, 'num_samples anneal_steps grad_clip k_warmup_steps'),
    (0, math.inf, 'lora_rank num_layers_to_finetune val_set_size'),
    (0, 1, 'beta1 beta2 ema_decay dropout token_dropout label_smoothing peft_lora_dropout'),
    (0, 1, 'warmup_ratio lora_dropout'),
]
NEEDS = {  # settings that have no effect where the first one is not set
    'out_dir': 'overwrite',
    'save_every': 'save_total_limit',
    'sample_every': 'num_samples sample_tokens',
    'num_samples': 'sample_tokens',
    'use_peft': 'peft_lora_r peft_lora_alpha peft_lora_dropout peft_targets',
    'lora_rank': 'lora_alpha lora_dropout',
}
WITHOUT = {  # settings and the samplers that do not read them
    'threshold': 'first_hitting ancestral confidence blocks remdm speculative ar',
    'eta': 'first_hitting ancestral confidence blocks threshold entropy speculative ar',
}
TOGETHER = 0.3  # seconds in which signals come from one cause


def report_idle_settings(config, *models):
    """Report the settings that were given although none of the models has what they set."""
    causal, idle = [model.causal for model in models], ''
    if not any(model.has_beliefs for model in models):
        idle = 'k k_schedule k_warmup_steps p_belief fresh_beliefs'
    if not any(causal):
        idle += ' token_dropout'
    if all(causal):
        idle += ' mask_ratio noisy_every draws bound_steps exact steps sampler block_length threshold eta'
    report_idle(config, 'on ' + ', '.join(sorted({architecture_name(model) for model in models})), idle)
    if 'sampler' in config and not all(causal):
        sampler = config['sampler'] or 'first_hitting'
        unused = ' '.join(key for key, names in WITHOUT.items() if sampler in names.split())
        report_idle(config, f'with sampler={config["sampler"]!r}', unused)
    lengths = set().union(*(model.config.block_length for model in models if not model.causal))
    if lengths == {0}:
        of_blocks = 'block_length' * (config.get('sampler', 'blocks') not in ('blocks', 'speculative'))
        report_idle(config, 'on whole rows', f'noisy_every {of_blocks}')
    if lengths == {1}:  # each is masked
        report_idle(config, 'on blocks of 1', 'mask_ratio')
    if config.get('k') == 0:
        report_idle(config, 'at k=0', 'fresh_beliefs')
    if config.get('temperature') == 0:
        report_idle(config, 'at temperature=0', 'top_k top_p')


def check_settings(config):
    """Raise a UserError for values that no training script takes, and report those without effect."""
    for key in CHOICES.keys() & config.keys():
        check_choice(config, key, CHOICES[key])
    for low, high, keys in RANGES:
        check_range(config, low, high, *keys.split())
    for key, names in NEEDS.items():
        if key in config and not config[key]:
            report_idle(config, f'without {key}', names)
    idle = {'wsd': '', 'constant': 'decay_ratio min_lr'}.get(config['schedule'], 'decay_ratio')
    report_idle(config, f'with schedule={config["schedule"]}', idle)
    report_idle(config, 'beside out_dir', 'run_suffix' * bool(config['out_dir']))
    report_idle(config, 'beside no_wandb', 'wandb_project wandb_run_name' * config['no_wandb'])
    report_idle(config, 'without resume_from', 'changed_data' * (not config['resume_from']))
    starts = any(config.get(key) for key in ('init_from', 'model', 'model_prefix'))
    report_idle(config, 'without init_from', 'revision anneal_steps' * (not starts))
    report_idle(config, 'of local weights', 'revision' * os.path.exists(config.get('init_from') or ''))
    is_adamw = config['optimizer'] != 'muon' and config.get('depth') is None
    report_idle(config, 'without muon', 'decay_embedding' * is_adamw)
    if 'p_belief' in config:
        optim.check_beliefs(config['p_belief'], config['k_schedule'])
    if 'mask_ratio' in config:
        window = config['mask_ratio']
        numbers = len(window) == 2 and all(isinstance(x, (int, float)) for x in window)
        fits = numbers and 0 <= window[0] < window[1] <= 1
        require(fits, f'mask_ratio is {window}; give the lowest and the highest, from 0 to 1, as (0.2, 0.8).')
    is_odd = config.get('fsdp') and pick_dtype(config['dtype'], pick_device(config['device'])) == 'float16'
    require(not is_odd, 'fsdp does not go with dtype=float16; give --dtype=float32.')


def check_blocks(config, block_size):
    """Raise a UserError for blocks that do not fill a row: the bound of the last one is not of what is written."""
    for length in config.block_length:
        fits = not length or length >= block_size or block_size % length == 0
        remedy = f'choose block_size={block_size // max(1, length) * length}, or another length'
        require(fits, f'Blocks of {length} do not fill rows of block_size={block_size}; {remedy}.')


def plan_steps(config, num_rows, rows_per_step):
    """Return the number of steps and how many of them warm up, by those of the competing settings that came last."""
    max_steps, num_epochs, warmup = config['max_steps'], config['num_epochs'], config['warmup_steps']
    if max_steps is None or max_steps <= 0:
        require(num_epochs, f'max_steps is {max_steps}, num_epochs {num_epochs}: nothing to do; give one.')
        max_steps = max(1, math.ceil(round(num_epochs * num_rows / rows_per_step, 6)))  # of 1.1 too
    if warmup is None and config['warmup_ratio'] is None:
        warmup = min(100, max_steps // 10)
    return max_steps, round(config['warmup_ratio'] * max_steps) if warmup is None else warmup


class Runtime:
    """This process: `rank` of `world_size`, its `device`, and the `dtype` that autocast computes in."""

    def __init__(self, device='auto', dtype='auto'):
        self.rank, self.world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        alone = self.world_size == 1 or 'RANK' in os.environ
        require(alone, f'WORLD_SIZE is {self.world_size} without a RANK; use torchrun, or unset WORLD_SIZE.')
        self.is_main = self.rank == 0
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
            # TF32 for what autocast leaves in float32; who asks for float32 gets it.
            torch.set_float32_matmul_precision('highest' if self.dtype == 'float32' else 'high')
        if self.device.type == 'cpu':
            keep_freed_memory()
        if self.world_size > 1:  # gloo for what the ranks agree on, from the CPU, beside nccl's gradients
            backend = 'cpu:gloo,cuda:nccl' if self.device.type == 'cuda' else 'gloo'
            seconds, self.excepthook = os.environ.get('RANK_TIMEOUT', '1800'), sys.excepthook
            require(seconds.isdigit(), f'RANK_TIMEOUT is {seconds!r}; give a number of seconds.')
            self.timeout = int(seconds)
            torch.distributed.init_process_group(backend, timeout=timedelta(seconds=self.timeout))
            sys.excepthook = self.end_without_the_others

    def end_without_the_others(self, kind, error, trace):
        """End this process, as the sys.excepthook, with a sentence where another rank hangs or has ended."""
        if 'gloo' not in str(error) and not issubclass(kind, torch.distributed.DistError):
            return self.excepthook(kind, error, trace)
        problem = f'rank {self.rank} has lost another one, which ended or hung for {self.timeout} s'
        remedy = 'look at what that one said, and continue with --resume_from'
        print(f'error: {problem} ({str(error).splitlines()[0]}); {remedy}.', file=sys.stderr, flush=True)
        os._exit(1)  # gloo waits for the others as the interpreter shuts down

    def autocast(self):
        """Return a context in which matmuls run in `dtype`; the weights stay float32."""
        if self.dtype == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    def scaler(self):
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == 'float16')

    def wrap(self, model, compile=None, fsdp=False):
        """Return the model whose backward sums gradients over the ranks; compile=None: on CUDA without FSDP."""
        self.compiles = bool(compile or compile is None and self.device.type == 'cuda' and not fsdp)
        if self.compiles:
            torch._dynamo.config.recompile_limit = 64  # a graph for each kind of pass; the default is 8
            model.compile()
        if self.world_size == 1 or fsdp:
            return model
        buffers = [name for name, _ in model.named_buffers()]  # alike on all ranks: none has to be sent
        model._ddp_params_and_buffers_to_ignore = buffers
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def eager(self):
        """Return a context in which nothing is compiled: samples have a length in each pass."""
        return torch.compiler.set_stance('force_eager') if self.compiles else contextlib.nullcontext()

    def total(self, values):
        """Sum a dict of numbers or 0-d tensors over all ranks, as floats."""
        sums = torch.tensor([float(value) for value in values.values()], dtype=torch.float64)
        return dict(zip(values, self.sum(sums).tolist()))

    def sum(self, array):
        """Sum a float tensor on the CPU over all ranks, in place."""
        if self.world_size > 1:
            torch.distributed.all_reduce(array)
        return array

    def any(self, flag):
        """Say whether `flag` is true on any rank."""
        return self.total({'flag': bool(flag)})['flag'] > 0

    def from_main(self, call):
        """Return on every rank what `call` returns on rank 0, as a text; the others do not call it."""
        box = [str(call())] if self.is_main else [None]
        if self.world_size > 1:
            torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def close(self):
        """Leave the group and, where there is one, the process: the last line of a script.

        Something in torch (DDP, a device mesh, default arguments) refers to the group to the end, so gloo's threads
        outlive it, and one that frees a tensor while the interpreter shuts down aborts the process (pytorch#179291).
        """
        if self.world_size > 1:
            torch.distributed.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def exit(self, message):
        """End the script with status 0, as where there is nothing left to do."""
        if self.is_main:
            print(message)
        self.close()
        raise SystemExit(0)


def pick_device(name):
    """Return the torch.device of a name; 'auto': cuda, else mps, else cpu. Ranks take the GPU of their local rank."""
    available = {'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available(), 'cpu': True}
    if name == 'auto':
        name = next(kind for kind, is_there in available.items() if is_there)
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'device is {name!r}; choose auto, cpu, cuda, cuda:N or mps.') from error
    require(available.get(device.type), f'device is {name!r}, but PyTorch finds none here; use --device=cpu.')
    if device.type != 'cuda':
        return device
    index, count, ranks = device.index, torch.cuda.device_count(), int(os.environ.get('WORLD_SIZE', 1))
    require(
        index is None or ranks == 1, f'device={name} is for one process, not {ranks}; write --device=cuda.'
    )
    index = int(os.environ.get('LOCAL_RANK', 0)) if index is None else index
    require(index < count, f'There is no GPU {index}, only {count}; start at most one process per GPU.')
    return torch.device('cuda', index)


def pick_dtype(name, device):
    """Return a name of DTYPES; 'auto': bfloat16 where the device has it, float16 on older GPUs, else float32."""
    if name == 'auto':
        fallback = 'float16' if device.type == 'cuda' else 'float32'
        return 'bfloat16' if has_bfloat16(device) else fallback
    require(name in DTYPES, f'dtype is {name!r}; choose auto, {", ".join(DTYPES)}.')
    return name


def keep_freed_memory():
    """Tell glibc to keep freed memory instead of handing it back to the kernel.

    Each step allocates the same megabytes; page faults for them cost a tenth to a half of a step. The heap is then
    about twice what is in use; with MALLOC_MMAP_THRESHOLD_=65536 in the environment it is not.
    """
    if 'MALLOC_MMAP_THRESHOLD_' in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-3, 32 << 20)  # M_MMAP_THRESHOLD of <malloc.h>
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def seed_dropout(*key):
    """Seed torch's generators by (seed, step, micro-step, rank): a resumed run drops the same units."""
    torch.manual_seed(torch_seed(*key))


def synchronize(device):
    if device.type != 'cpu':
        getattr(torch, device.type).synchronize()


def seconds(call, device):
    """Return the seconds that `call` takes, its work on the device included."""
    synchronize(device)
    start = time.perf_counter()
    call()
    synchronize(device)
    return time.perf_counter() - start


class StopSignal:
    """Set by the first SIGTERM, SIGINT, SIGUSR1 or SIGHUP; a second one ends the process at once, but for SIGHUP, of
    which a terminal that is closed sends two, and for one that comes with the first, as Slurm and torchrun forward it.
    """

    def __init__(self):
        self.received, self.time = None, 0.0
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup has it
            signal.signal(signal.SIGHUP, self.receive)

    def receive(self, number, frame):
        if self.received is not None:
            if number == signal.SIGHUP or time.monotonic() < self.time + TOGETHER:
                return
            os._exit(128 + number)
        self.time = time.monotonic()
        self.received = signal.Signals(number).name
        with contextlib.suppress(OSError):  # the terminal is gone
            os.write(2, f'\n{self.received}: saving at the next step; once more to quit at once\n'.encode())


def measure_peak_flops(device, dtype):
    """Measure the operations per second of a large matmul here: what `train/mfu` is a share of."""
    size = 8192 if device.type == 'cuda' else 1024
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    times = []
    while sum(times) < 0.2:
        times.append(seconds(lambda: a @ a, device))
    return 2 * size**3 / min(times)


def flops_per_token(model, length=None, predicted=1.0, passes=0.0):
    """Estimate the operations of a training step per token (Chowdhery et al. 2022, appendix B).

    A weight of a matmul takes 2 in the forward pass, 2 for the gradient of its input and, if it is trained, 2 for its
    own; a position of a row of `length` 12 per layer and channel. predicted: the share of tokens that get logits;
    passes: of `SDD`, those that give beliefs: forward only. Two streams (blocks, ar_weight) are a longer row, of which
    the clean part has logits for ar_weight.
    """
    c, tables = model.config, ('embedding', 'unembedding', 'positions')
    matrices = {name: p for name, p in model.named_parameters() if p.dim() == 2 and p.is_floating_point()}
    matrices = [p for name, p in matrices.items() if name.split('.')[0] not in tables]
    weights = sum(m.in_features * m.out_features for m in model.modules() if hasattr(m, 'codes'))  # quantized
    weights += sum(p.numel() for p in matrices)
    trained = sum(p.numel() for p in matrices if p.requires_grad)
    table, streams = model.unembedding or model.embedding, 2 if c.ar_weight else 1
    if any(c.block_length):
        streams = 1 + 1 / model.noisy_blocks[0]
    head = c.padded_vocab_size * c.embedding_width * (predicted + (c.ar_weight > 0))
    attention = 4 * c.n_layer * c.n_head * c.head_dim * (length or c.block_size) * streams**2
    weights, trained = streams * weights, streams * trained
    forward = 2 * (weights + head) + attention
    trained += head * any(p.requires_grad for p in table.parameters())
    backward = 2 * (weights + trained + head) + 2 * attention
    return (1 + passes) * forward + backward


def memory_estimate(model, batch_size, length, dist):
    """Estimate the bytes that training takes, by purpose, before it starts.

    Of each trained weight there are its gradient and two moments, in its own precision. A block keeps about 13 numbers
    per token and channel, and three or four per channel of its MLP; with checkpointing this is one block at a time, and
    of the others their inputs. The head's logits are there about five times. Autocast has copies of float32 weights,
    and of sharded ones the root's and those of two blocks are gathered.
    """
    config, parameters = model.config, list(model.parameters())
    weights = sum(optim.local(x).nbytes for x in (*parameters, *model.buffers()))
    trained = sum(optim.local(p).nbytes for p in parameters if p.requires_grad)
    size = 4 if dist.dtype == 'float32' else 2
    copies = sum(p.numel() for p in parameters if p.dtype == torch.float32) * (0 if size == 4 else 2)
    if any(optim.local(p) is not p for p in parameters):  # sharded: what is gathered at a time
        blocks = sum(p.numel() for p in model.blocks.parameters())
        copies = size * (sum(p.numel() for p in parameters) - blocks + 2 * blocks // config.n_layer)
    tokens = batch_size * length
    block = tokens * size * (13 * config.n_embd + (3 + (config.mlp == 'swiglu')) * config.mlp_width)
    if dist.device.type == 'cpu' and dist.dtype == 'bfloat16':  # attention is in float32
        block += tokens * 4 * 4 * config.n_embd
    blocks = config.n_layer * (tokens * 4 * config.n_embd if config.gradient_checkpointing else block)
    head = 5 * 4 * min(tokens, model.head_rows(model.logit_bias)) * config.padded_vocab_size
    peak = max(head, block if config.gradient_checkpointing else 0)
    sizes = {'weights': weights + copies, 'gradients': trained, 'optimizer': 2 * trained}
    return {**sizes, 'activations': blocks + peak}


def check_memory(estimate, dist):
    """Raise a UserError where training would not fit even if half as much again as there is were enough."""
    on_host = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    room = torch.cuda.mem_get_info(dist.device)[1] if dist.device.type == 'cuda' else on_host
    needed = sum(estimate.values())
    remedy = 'lower batch_size or block_size, or train adapters: --use_peft, with --load_in_4bit for less'
    problem = f'Training takes about {needed / 1e9:.0f} GB, and there are {room / 1e9:.0f}'
    require(needed <= 1.5 * room, f'{problem}; {remedy}.')


def add(sums, loss, count, metrics):
    """Add what a model's forward returns to `sums`, without its graph; a metric 'loss' stands for the loss."""
    for name, value in {'loss': loss, 'count': count, **metrics}.items():
        exact = torch.float32 if value.device.type == 'mps' else torch.float64  # mps has no float64
        sums[name] = sums.get(name, 0) + value.detach().to(exact)


def means(split, sums):
    """Compute a split's metrics from a forward's sums; one that is not named here is a mean over the counted tokens."""
    sums = dict(sums)
    loss, count = sums.pop('loss'), max(1, sums.pop('count'))
    correct, predicted = sums.pop('correct', None), sums.pop('predicted', 0)
    values = {f'{split}/loss': loss / count, f'{split}/perplexity': math.exp(min(loss / count, 700))}
    if correct is not None:
        values[f'{split}/accuracy'] = correct / max(1, predicted)
    found, targets, guesses = (sums.pop(f'ignore_{name}', 0) for name in ('correct', 'targets', 'guesses'))
    without_padding = sums.pop('loss_without_padding', 0)
    if targets and split == 'train':  # masked padding in these rows: recall and precision
        values['train/ignore_acc'] = found / targets
        values['train/ignore_precision'] = found / max(1, guesses)
    if targets and split == 'val':  # no bound: visible padding tells how long the text is
        values['val/loss_without_padding'] = without_padding / count
    return values | {f'{split}/{name}': value / count for name, value in sums.items()}


@torch.no_grad()
def evaluate(model, batches, dist):
    """Compute the val/ metrics over the batches of all ranks, a data.EvaluationBatches."""
    sums, sums_k0 = {}, {}
    model.eval()
    for batch in batches:
        with dist.autocast():
            add(sums, *model(*batch))
            if model.has_beliefs:  # and without beliefs, at the same masks
                add(sums_k0, *model(*batch, k=0))
    model.train()
    totals, num_bytes = dist.total(sums), dist.total({'bytes': batches.num_bytes})['bytes']
    values = means('val', totals)
    values['val/bpb'] = totals['loss'] / math.log(2) / num_bytes if num_bytes else math.nan
    if model.has_beliefs:
        values['val/loss_k0'] = means('val', dist.total(sums_k0))['val/loss']
    return values


def describe_loss(model):
    """Say what the loss of a model, or of its class, is the nll of or bounds."""
    kinds = {'exact': 'the nll', 'upper': 'an upper bound of the nll', 'none': 'no bound of the nll'}
    return f'{kinds[model.bound]} of texts that are written {model.order}'


class Speed:
    """Tokens per second and their share of the peak (MFU) since the last log; length: of a row."""

    def __init__(self, model, dist, tokens_per_step, step, length):
        self.model, self.length = model, float(length)  # numpy's numbers would keep ckpt.pt from loading
        self.tokens = float(tokens_per_step) / dist.world_size  # of a rank
        self.peak_flops, self.world_size = measure_peak_flops(dist.device, dist.dtype), dist.world_size
        self.seconds = 0.0  # of training, without evaluations and checkpoints
        self.restart(step)

    def restart(self, step):
        self.step, self.start, self.predicted, self.passes, self.k = step, time.perf_counter(), 0, 0, None

    def count(self, sums, k=None, passes=1, stale=0.0):
        """Note of a step at how many tokens it had logits, and how many passes gave its beliefs, of k candidates."""
        self.k = k
        self.predicted += sums.get('predicted', sums['count']) + sums.get('ignore_targets', 0)
        self.passes += passes if k else 0

    def metrics(self, step):
        steps = step - self.step
        seconds = time.perf_counter() - self.start
        self.seconds += seconds
        self.seconds_per_step = seconds / steps
        predicted = float(self.predicted) / (steps * self.tokens)
        flops = flops_per_token(self.model, self.length, predicted, self.passes / steps)
        tokens_per_sec = self.tokens / self.seconds_per_step
        mfu = tokens_per_sec * flops / self.peak_flops
        metrics = {'train/tokens_per_sec': tokens_per_sec * self.world_size, 'train/mfu': mfu}
        return metrics if self.k is None else {**metrics, 'train/k': self.k}


def check_finite(loss, step, learning_rate):
    remedy = f'try a lower learning_rate than {learning_rate}, a longer warm-up, or --dtype=float32'
    require(math.isfinite(loss), f'The loss is {loss} at step {step}; the last checkpoint is kept; {remedy}.')
