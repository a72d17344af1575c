"""Optimizers, the running average of the weights, and what else depends on the step: learning rate, beliefs, mask."""

import math
from contextlib import contextmanager
from types import SimpleNamespace

import torch

from lm.configurator import require
from lm.kernels import has_bfloat16
from lm.rng import ANNEAL, BELIEF, BLOCKS, torch_seed, uniform
from model import ARCHITECTURES

# Passes that a step's beliefs come from: each further one with probability P_DEEPER, up to MAX_PASSES. With
# probability P_STALE the first of them sees up to MAX_STALE more of a row masked.
P_DEEPER, MAX_PASSES, P_STALE, MAX_STALE = 0.7, 4, 0.75, 0.3


class Optimizer:
    """One or two torch optimizers, by name, that step together, perhaps with a WeightAverage, not in state_dict()."""

    def __init__(self, parts):
        self.parts, self.average = parts, None

    def set_lr(self, lr):
        for part in self.parts.values():
            for group in part.param_groups:
                group['lr'] = lr

    def step(self, scaler, parameters, grad_clip):
        """Clip the gradients to a norm of at most grad_clip (0: any), step, and return what the norm was.

        A gradient that overflows in float16 makes the norm of all of them nan: the scaler has to skip every part.
        """
        parts = self.parts.values()
        groups = [group for part in parts for group in part.param_groups]
        together = SimpleNamespace(param_groups=groups, step=lambda: [part.step() for part in parts])
        scaler.unscale_(together)
        norm = torch.nn.utils.clip_grad_norm_(parameters, grad_clip or math.inf)
        scaler.step(together)
        scaler.update()
        for part in parts:
            part.zero_grad(set_to_none=True)
        return norm.full_tensor() if hasattr(norm, 'full_tensor') else norm  # of sharded gradients

    def state_dict(self):
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, states):
        """Load moments and step counts; the settings of the groups stay this run's."""
        for name, part in self.parts.items():
            part.load_state_dict({**part.state_dict(), 'state': states[name]['state']})


def make_optimizer(model, optimizer, lr, beta1, beta2, weight_decay, dtype='float32', decay_embedding=True):
    """Make the Optimizer of a model's trainable parameters, each of them in exactly one part.

    'adamw' alone; or 'muon' for the matrices of the blocks and AdamW for the rest. Muon (Jordan et al. 2024)
    orthogonalises a matrix's momentum; its update is scaled to the size of AdamW's (Liu et al. 2025), so that one
    learning rate serves both. Weight decay is for matrices, not for gains and biases. dtype: what the run computes in.
    decay_embedding: whether beside Muon it is for those outside the blocks too (docs/LOG.md).
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    muon = [p for name, p in named if optimizer == 'muon' and 'blocks.' in name and p.dim() == 2]
    others = [p for _, p in named if not any(p is matrix for matrix in muon)]
    outside = weight_decay if decay_embedding or not muon else 0.0
    matrices, vectors = [p for p in others if p.dim() >= 2], [p for p in others if p.dim() < 2]
    groups = [{'params': matrices, 'weight_decay': outside}, {'params': vectors, 'weight_decay': 0.0}]
    groups, parts = [group for group in groups if group['params']], {}
    if groups:
        parts['adamw'] = torch.optim.AdamW(groups, lr=lr, betas=(beta1, beta2), fused=True)
    if muon:
        options = {'weight_decay': weight_decay, 'momentum': 0.95, 'adjust_lr_fn': 'match_rms_adamw'}
        parts['muon'] = Muon(muon, lr=lr, **options)
        if dtype == 'bfloat16' and has_bfloat16(muon[0].device):
            parts['muon'].dtype = torch.bfloat16
    return Optimizer(parts)


class Muon(torch.optim.Muon):
    """PyTorch's Muon with 'match_rms_adamw', for all matrices of one shape, or its transpose, at once.

    Many small matmuls take twice the time of one batched one. And PyTorch's computes in bfloat16, on a CPU that has to
    emulate it a hundred times slower than float32. Of sharded matrices, each rank orthogonalises some.
    """

    dtype = torch.float32  # of the iterations

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                if p.grad is not None:
                    split_dim = (2 if p.size(0) > p.size(1) else 1) if hasattr(p, 'device_mesh') else None
                    shapes.setdefault((*sorted(p.shape), split_dim), []).append(p)
            for (_, longer, split_dim), matrices in shapes.items():
                momenta = self.momenta(matrices, group['momentum']).to(self.dtype)
                update = orthogonalise_parts(momenta, split_dim, matrices[0], group)  # (n, shorter, longer)
                updates = [u.mT if p.size(0) > p.size(1) else u for u, p in zip(update, matrices)]
                matrices = [local(p) for p in matrices]
                torch._foreach_mul_(matrices, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_add_(matrices, updates, alpha=-group['lr'] * 0.2 * math.sqrt(longer))

    def momenta(self, matrices, momentum):
        """Update the momentum buffers and return Nesterov's momentum: (n, shorter, longer), or a rank's part of it."""
        for p in matrices:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
        buffers = [local(self.state[p]['momentum_buffer']) for p in matrices]
        grads = [local(p.grad) for p in matrices]
        torch._foreach_lerp_(buffers, grads, 1 - momentum)
        nesterov = torch._foreach_lerp(grads, buffers, momentum)
        return torch.stack([x.mT if p.size(0) > p.size(1) else x for x, p in zip(nesterov, matrices)])


def orthogonalise(x, group):
    """Bring all singular values of matrices (n, R, C) to about 1, by Newton-Schulz iterations."""
    a, b, c = group['ns_coefficients']
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group['eps'])
    for _ in range(group['ns_steps']):
        gram = x @ x.mT  # (n, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def orthogonalise_parts(parts, dim, matrix, group):
    """Orthogonalise n matrices, of each of which a rank has a part along dim of (n, shorter, longer), as FSDP splits
    `matrix`: each rank gets n / ranks of them whole, and gives back the others' parts. dim=None: all are whole."""
    if dim is None:
        return orthogonalise(parts, group)
    from torch.distributed.tensor import DTensor, Shard  # slow to import

    mesh, shape = matrix.device_mesh, torch.Size([len(parts), *sorted(matrix.shape)])
    layout = dict(shape=shape, stride=(shape[1] * shape[2], shape[2], 1), run_check=False)
    own = DTensor.from_local(parts.contiguous(), mesh, [Shard(dim)], **layout).redistribute(mesh, [Shard(0)])
    update = orthogonalise(own.to_local(), group)
    return DTensor.from_local(update, mesh, [Shard(0)], **layout).redistribute(mesh, [Shard(dim)]).to_local()


def local(tensor):
    """Return a rank's own part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


class WeightAverage:
    """Exponential moving average of a model's weights: ema ← d · ema + (1 − d) · weights.

    d is `decay`, or (1 + step) / (10 + step) while that is less: the random start is soon forgotten.
    """

    def __init__(self, model, decay):
        self.model, self.weights, self.decay = model, dict(model.named_parameters()), decay
        self.ema = {name: weight.detach().clone() for name, weight in self.weights.items()}

    @torch.no_grad()
    def load(self, ema):
        for name, weight in self.ema.items():
            weight.copy_(ema[name])

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        ema, weights = ([local(x) for x in each.values()] for each in (self.ema, self.weights))
        torch._foreach_lerp_(ema, weights, 1 - decay)

    @contextmanager
    def in_place(self):
        """Put the average into the model while the context lasts."""
        try:
            self.swap()
            yield
        finally:
            self.swap()

    @torch.no_grad()
    def swap(self):
        for name, weight in self.weights.items():  # in place: FSDP and compiled graphs have the address
            weight, ema = local(weight), local(self.ema[name])
            kept = weight.clone()
            weight.copy_(ema)
            ema.copy_(kept)
        if hasattr(self.model, 'reshard'):  # FSDP keeps the root gathered, as it was before
            self.model.reshard()


def learning_rate_at(step, max_steps, learning_rate, min_lr, warmup_steps, schedule, decay_ratio):
    """Compute the learning rate of step `step`, counted from 0: a linear warm-up, then `schedule` down to min_lr.

    cosine, linear    from the warm-up's end to the last step
    wsd               stable, then linear over the last `decay_ratio` of the steps (Hu et al. 2024)
    constant          stays at learning_rate
    """
    if step < warmup_steps:
        return learning_rate * (step + 1) / warmup_steps
    start = max(warmup_steps, (1 - decay_ratio) * max_steps) if schedule == 'wsd' else warmup_steps
    done = min(1.0, max(0.0, (step - start) / max(1, max_steps - start)))  # of the way down
    share = {'cosine': 0.5 * (1 + math.cos(math.pi * done)), 'constant': 1.0}.get(schedule, 1 - done)
    return min_lr + (learning_rate - min_lr) * share


def check_beliefs(p_belief, k_schedule):
    """Raise a UserError for settings that `draw_beliefs` cannot follow."""
    positive = k_schedule and all(type(k) is int and k >= 1 for k in k_schedule)
    require(positive, f'k_schedule is {k_schedule}; give numbers of candidates, as (1, 2, 4, 8).')
    pairs = all(isinstance(pair, (tuple, list)) and len(pair) == 2 for pair in p_belief)
    fits = pairs and all(isinstance(x, (int, float)) and 0 <= x <= 1 for pair in p_belief for x in pair)
    fits = fits and list(p_belief) == sorted(p_belief, key=tuple)
    remedy = 'give (fraction of training, probability from there on) from 0 to 1 in order, as ((0.5, 0.5),)'
    require(fits, f'p_belief is {p_belief}; {remedy}.')


def draw_beliefs(model, step, max_steps, seed, p_belief, k_schedule, k_warmup_steps):
    """Draw how a step gets its beliefs: k, passes and stale of `SDD.earlier_passes`, alike on all ranks; else {}.

    p_belief: ((fraction of training, probability that a step uses beliefs from there on), ...). k is drawn from
    k_schedule; or, over the first k_warmup_steps, goes through it in equal parts and stays at its last. Sampling
    passes beliefs on from step to step, so training has to see old ones: a model that was trained on fresh ones only
    takes its own second thoughts for news and grows too sure.
    """
    if not model.has_beliefs:
        return {}
    use, which, deeper, is_stale, stale = (float(uniform(BELIEF, seed, step, i)) for i in range(5))
    p = max((pair for pair in p_belief if pair[0] <= step / max_steps), default=(0, 0))[1]
    if use >= p:
        return {'k': 0}
    position = min(step / k_warmup_steps, 1 - 1e-9) if k_warmup_steps else which
    passes = next((n for n in range(1, MAX_PASSES) if deeper >= P_DEEPER**n), MAX_PASSES)
    stale = MAX_STALE * stale if is_stale < P_STALE else 0.0
    return {'k': k_schedule[int(position * len(k_schedule))], 'passes': passes, 'stale': stale}


def draw_blocks(model, step, seed, noisy_every=1):
    """Draw the block length of a step from those of the model's config, and which blocks have a noisy copy, every n-th.

    Returns it and (n, a number below 1 that says which of n is the first): the same on all ranks.
    """
    length, first = (float(uniform(BLOCKS, seed, step, i)) for i in range(2))
    lengths = model.config.block_length
    return lengths[int(length * len(lengths))], (noisy_every, first)


def default_anneal_steps(anneal_steps, model, start, max_steps):
    """Return anneal_steps, or where it is None a tenth of max_steps for a model that starts from causal weights."""
    if anneal_steps is None:
        source = ARCHITECTURES.get(start.get('converted_from'))
        return max_steps // 10 if source and source.causal and model.config.shift else 0
    problem = f'anneal_steps is {anneal_steps}, but the attention of this model does not change'
    is_idle = anneal_steps and (model.causal or model.config.has_two_streams)
    require(not is_idle, f'{problem}; leave it out.')
    return anneal_steps


def annealed_mask(step, anneal_steps, length, seed, device='cpu'):
    """Return the attention mask (T, T) of a step on the way from causal to bidirectional; None at its end.

    Each later position is visible with a probability that grows by 1 / anneal_steps per step (Gong et al. 2025,
    DiffuLLaMA). It depends on (seed, step) only, so that all ranks and rows share it.
    """
    if step >= anneal_steps:
        return None
    generator = torch.Generator().manual_seed(torch_seed(ANNEAL, seed, step))
    later = torch.rand(length, length, generator=generator) < step / anneal_steps
    return (later | torch.ones(length, length, dtype=torch.bool).tril()).to(device)
