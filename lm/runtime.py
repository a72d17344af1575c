"""Where a script runs: process group, device, precision, signals, logs."""

import contextlib
import csv
import ctypes
import math
import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from lm import kernels
from lm.configurator import UserError
from lm.files import save_atomically
from lm.optim import local
from lm.rng import random_bits

DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}


# ---------------------------------------------------------------------------- device, precision, ranks


class Runtime:
    """This process: `rank` of `world_size`, its `device`, and the `dtype` that autocast computes in."""

    def __init__(self, device='auto', dtype='auto'):
        self.rank, self.world_size = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
        self.is_main = self.rank == 0
        self.device = pick_device(device)
        self.dtype = pick_dtype(dtype, self.device)
        if self.device.type == 'cuda':
            torch.cuda.set_device(self.device)
            torch.set_float32_matmul_precision('high')  # TF32 where float32 matrices meet
        if self.device.type == 'cpu':
            keep_freed_memory()
            kernels.install()
        if self.world_size > 1:  # gloo carries what the ranks agree on, from the CPU, beside nccl's gradients
            dist.init_process_group('cpu:gloo,cuda:nccl' if self.device.type == 'cuda' else 'gloo')

    def autocast(self):
        """Context in which matrix products run in `dtype`; the weights stay float32."""
        if self.dtype == 'float32':
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, DTYPES[self.dtype])

    def wrap(self, model):
        """The model whose forward and backward synchronise gradients over the ranks."""
        if self.world_size == 1:
            return model
        return torch.nn.parallel.DistributedDataParallel(model, gradient_as_bucket_view=True)

    def total(self, values):
        """Sums over all ranks of a dict of numbers or 0-d tensors, as floats."""
        sums = torch.stack([torch.as_tensor(value).detach().cpu().double() for value in values.values()])
        if self.world_size > 1:
            dist.all_reduce(sums)
        return dict(zip(values, sums.tolist()))

    def sum(self, array):
        """The sum over all ranks of a float tensor on the CPU, in place."""
        if self.world_size > 1:
            dist.all_reduce(array)
        return array

    def any(self, flag):
        """Whether `flag` is true on any rank."""
        return self.total({'flag': bool(flag)})['flag'] > 0 if self.world_size > 1 else bool(flag)

    def from_main(self, call):
        """What `call` returns on rank 0, on every rank; the others do not call it."""
        box = [str(call())] if self.is_main else [None]
        if self.world_size > 1:
            dist.broadcast_object_list(box, src=0)
        return box[0]

    def close(self):
        """Leaves the group and, where there is one, the process: the last line of a script.

        Something in torch (DDP, a device mesh, default arguments) refers to the group to the end, so that gloo's
        threads outlive it, and one that lets go of a tensor while the interpreter shuts down aborts a process that
        has done all its work (pytorch#179291).
        """
        if self.world_size > 1:
            dist.destroy_process_group()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)

    def exit(self, message):
        """Ends the script with status 0, as where there is nothing left to do."""
        if self.is_main:
            print(message)
        self.close()
        raise SystemExit(0)


def clip_gradients(parameters, limit):
    """Scales the gradients of `parameters` to a norm of at most `limit` (0: any) and returns what it was."""
    norm = torch.nn.utils.clip_grad_norm_(parameters, limit or math.inf)
    return norm.full_tensor() if hasattr(norm, 'full_tensor') else norm  # of gradients that are sharded


def means(split, sums):
    """The metrics `split`/loss, /accuracy and /perplexity from the sums that a model's forward returns."""
    loss = sums['loss'] / max(1, sums['count'])
    return {
        f'{split}/loss': loss,
        f'{split}/accuracy': sums['correct'] / max(1, sums['predicted']),
        f'{split}/perplexity': math.exp(min(loss, 700)),
    }


def training_means(sums, beliefs):
    """The metrics train/ of a step from its sums; beliefs: how it came to them, empty but for `sdd`."""
    values = means('train', sums)
    if beliefs:
        values['train/k'] = beliefs['k']
    if sums.get(
        'ignore_targets'
    ):  # filler that was hidden in these rows: how much was found, how much is none
        values['train/ignore_acc'] = sums['ignore_correct'] / sums['ignore_targets']
        values['train/ignore_precision'] = sums['ignore_correct'] / max(1, sums['ignore_guesses'])
    return values


@torch.no_grad()
def evaluate(model, batches, run, tokens_per_byte):
    """The metrics val/ over the batches of all ranks. tokens_per_byte: None where there is no text to speak of."""
    names = (
        'loss',
        'count',
        'correct',
        'predicted',
        'text_loss',
        'ignore_correct',
        'ignore_targets',
        'ignore_guesses',
    )
    sums, plain = dict.fromkeys(names, 0.0), dict.fromkeys(names, 0.0)  # a rank may have no batch
    model.eval()
    for batch in batches:
        with run.autocast():
            add(sums, *model(*batch))
            if model.believes:  # without beliefs, at the same masks
                add(plain, *model(*batch, k=0))
    model.train()
    sums = run.total(sums)
    values = means('val', sums)
    if sums['ignore_targets']:  # val/loss without the nats of filler, over the same tokens
        values['val/text_loss'] = sums['text_loss'] / max(1, sums['count'])
    values['val/bpb'] = values['val/loss'] / math.log(2) * (tokens_per_byte or math.nan)
    if model.believes:
        values['val/loss_k0'] = means('val', run.total(plain))['val/loss']
    return values


def add(sums, loss, count, metrics):
    """Adds what a model's forward returns to `sums`, without the graph behind it."""
    for name, value in {'loss': loss, 'count': count, **metrics}.items():
        exact = torch.float32 if value.device.type == 'mps' else torch.float64  # mps has no float64
        sums[name] = sums.get(name, 0) + value.detach().to(exact)


def pick_device(name):
    """'auto': cuda, else mps, else cpu. Each rank of a node takes the GPU of its local rank."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f'device is {name!r}; choose auto, cpu, cuda, cuda:N or mps.') from error
    available = {'cpu': True, 'cuda': torch.cuda.is_available(), 'mps': torch.backends.mps.is_available()}
    if not available.get(device.type, False):
        raise UserError(
            f'device is {name!r}, but PyTorch finds none on this machine; use --device=cpu or auto.'
        )
    if device.type != 'cuda':
        return device
    index = int(os.environ.get('LOCAL_RANK', 0)) if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise UserError(
            f'GPU number {index} is asked for, but there are {torch.cuda.device_count()}; start at most '
            'as many processes per node as it has GPUs.'
        )
    return torch.device('cuda', index)


def pick_dtype(name, device):
    """'auto': bfloat16 where the processor multiplies in it, float16 on older GPUs, else float32."""
    if name == 'auto':
        if device.type == 'cuda':
            return 'bfloat16' if torch.cuda.is_bf16_supported(including_emulation=False) else 'float16'
        instructions = getattr(torch.cpu, 'get_capabilities', dict)() if device.type == 'cpu' else {}
        return 'bfloat16' if instructions.get('avx512_bf16') or instructions.get('amx_bf16') else 'float32'
    if name not in DTYPES:
        raise UserError(f'dtype is {name!r}; choose auto, {", ".join(DTYPES)}.')
    return name


def keep_freed_memory():
    """Tells glibc to keep what is freed instead of handing it back to the kernel.

    Each step allocates the same megabytes; fetching them from the kernel anew costs a tenth of a small
    model's step in page faults, and ten times the work itself for some element-wise operations. Its heap is then up
    to three times as large as what is in use; with MALLOC_MMAP_THRESHOLD_=65536 in the environment it is not.
    """
    if 'MALLOC_MMAP_THRESHOLD_' in os.environ:
        return
    with contextlib.suppress(OSError, AttributeError):  # other C libraries have no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        m_trim_threshold, m_mmap_threshold = -1, -3  # <malloc.h>
        mallopt(m_mmap_threshold, 32 << 20)
        mallopt(m_trim_threshold, (1 << 31) - 1)


def seed_dropout(*key):
    """Seeds torch's generators by (seed, step, micro-step, rank): a resumed run drops the same units."""
    torch.manual_seed(int(random_bits(*key)) >> 1)


def measure_peak_flops(device, dtype):
    """Floating-point operations per second of a large matrix product here: what `train/mfu` is a share of."""
    size = 8192 if device.type == 'cuda' else 1024
    a = torch.randn(size, size, device=device, dtype=DTYPES[dtype])
    best, total = float('inf'), 0.0
    while total < 0.2:  # seconds
        synchronize(device)
        start = time.perf_counter()
        a @ a
        synchronize(device)
        best = min(best, time.perf_counter() - start)
        total += time.perf_counter() - start
    return 2 * size**3 / best


def memory_estimate(model, batch_size, length, run):
    """Bytes that training takes, by what for: an estimate, before anything of it is there.

    Of each trained weight there are its gradient and two moments, in its own precision. A block keeps about 13
    numbers per token and channel of its stream, and three or four per channel of its MLP; with checkpointing this is
    one block at a time, and of the others their inputs. The head's logits are there about five times. Autocast has
    copies of float32 weights, and of sharded ones the root's and those of two blocks are gathered.
    """
    config, parameters = model.config, list(model.parameters())
    trained, weights = (
        sum(x.numel() * x.element_size() for x in map(local, tensors))
        for tensors in ([p for p in parameters if p.requires_grad], [*parameters, *model.buffers()])
    )
    number = 4 if run.dtype == 'float32' else 2
    copies = (
        0
        if run.dtype == 'float32'
        else number * sum(p.numel() for p in parameters if p.dtype == torch.float32)
    )
    if any(local(p) is not p for p in parameters):  # sharded: what is gathered at a time
        blocks = sum(p.numel() for p in model.blocks.parameters())
        copies = number * (sum(p.numel() for p in parameters) - blocks + 2 * blocks // config.n_layer)
    tokens = batch_size * length
    block = tokens * number * (13 * config.n_embd + (3 + (config.mlp == 'swiglu')) * config.mlp_width)
    if run.device.type == 'cpu' and run.dtype == 'bfloat16':  # attention is written out
        block += tokens * number * 3 * config.n_head * length
    blocks = config.n_layer * (tokens * 4 * config.n_embd if config.gradient_checkpointing else block)
    head = 5 * 4 * min(tokens, model.head_rows(model.never)) * config.padded_vocab_size
    peak = max(head, block if config.gradient_checkpointing else 0)
    return {
        'weights': weights + copies,
        'gradients': trained,
        'optimizer': 2 * trained,
        'activations': blocks + peak,
    }


def synchronize(device):
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    if device.type == 'mps':
        torch.mps.synchronize()


class StopSignal:
    """Set by the first SIGTERM, SIGINT or SIGUSR1; a second one ends the process at once."""

    def __init__(self):
        self.received = None
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if self.received is not None:
            os._exit(128 + number)
        self.received = signal.Signals(number).name
        os.write(2, f'\n{self.received}: saving at the next step; once more to quit at once\n'.encode())


# ---------------------------------------------------------------------------- logs

METRICS = (
    'train/loss',
    'train/accuracy',
    'train/perplexity',
    'train/lr',
    'train/tokens_per_sec',
    'train/grad_norm',
    'train/mfu',
    'train/epoch',
    'val/loss',
    'val/accuracy',
    'val/perplexity',
    'val/bpb',
    'val/loss_k0',
    'train/k',
    'train/ignore_acc',
    'train/ignore_precision',
    'val/text_loss',
)


class Logger:
    """Console, logs.log, metrics.csv and W&B under one set of names. On ranks other than 0 it is silent."""

    def __init__(self, folder, is_main, step, wandb_settings=None):
        self.is_main, self.wandb, self.wandb_run_id, self.line_open = is_main, None, None, False
        if not is_main:
            return
        self.log_file = open(folder / 'logs.log', 'a', buffering=1, encoding='utf-8')
        forget_rows_after(folder / 'metrics.csv', step)
        self.csv_file = open(folder / 'metrics.csv', 'a', buffering=1, newline='', encoding='utf-8')
        if self.csv_file.tell() == 0:
            self.write_row(('step',) + METRICS)
        if wandb_settings is not None:
            self.wandb = self.attempt(lambda: self.start_wandb(folder, **wandb_settings))

    def print(self, *lines):
        for line in lines if self.is_main else ():
            print(('\n' if self.line_open else '') + line, flush=True)
            self.line_open = False
            self.log_file.write(line + '\n')

    def progress(self, line):
        """A line that the next one replaces on a terminal, and follows elsewhere."""
        if not self.is_main:
            return
        self.log_file.write(line + '\n')
        if sys.stdout.isatty():
            print('\r\033[K' + line, end='', flush=True)
            self.line_open = True
        else:
            print(line, flush=True)

    def write_row(self, cells):
        csv.writer(self.csv_file, lineterminator='\n').writerow(cells)

    def metrics(self, step, values):
        """A row of metrics.csv and a step of W&B. values: {name: float}, of the names in METRICS."""
        if not self.is_main:
            return
        self.write_row([step] + [values.get(name, '') for name in METRICS])
        if self.wandb:
            self.attempt(lambda: self.wandb.log(values, step=step))

    def start_wandb(self, folder, project, name, run_id, config):
        import wandb  # takes seconds to import: only where it is wanted

        mode = os.environ.get('WANDB_MODE')
        if mode is None and not wandb.login(prompt=False):
            mode = 'offline'
            self.print('W&B: not logged in, so the run is kept offline; `wandb login` first, or --no_wandb.')
        run = wandb.init(
            project=project, name=name, id=run_id, resume='allow', config=config, dir=folder, mode=mode
        )
        self.wandb_run_id = run.id  # kept for the next resume, even if W&B fails later
        return run

    def attempt(self, call):
        """Calls W&B; a failure there is reported once and never stops the training."""
        try:
            return call()
        except Exception as error:  # whatever a service does, the run goes on
            self.wandb = None
            self.print(f'W&B failed ({type(error).__name__}: {error}); the run goes on without it.')

    def close(self):
        if self.is_main:
            if self.wandb:
                self.attempt(self.wandb.finish)
            self.log_file.close()
            self.csv_file.close()


def forget_rows_after(path, step):
    """Drops the rows of metrics.csv that a resumed run writes again, and a last one that was cut short."""
    if not path.exists():
        return
    header, *lines = path.read_text(encoding='utf-8').splitlines(keepends=True) or ['']
    whole = [line for line in lines if line.endswith('\n') and int(line.split(',')[0]) <= step]
    save_atomically(path, lambda file: file.write(''.join([header, *whole]).encode()))


def duration(seconds):
    """1:02:03 or 2:03."""
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f'{hours}:{minutes:02}:{seconds:02}' if hours else f'{minutes}:{seconds:02}'
