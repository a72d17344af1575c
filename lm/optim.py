"""Optimizers, the learning-rate curve, and the running average of the weights."""

import math
from contextlib import contextmanager

import torch

from lm.configurator import UserError
from lm.rng import random_bits

OPTIMIZERS = ('adamw', 'muon')
SCHEDULES = ('cosine', 'linear', 'wsd', 'constant')
MASTER_WEIGHTS = ('float32', 'bfloat16')
CHUNK = 1 << 22  # elements that StochasticAdamW has in float32 at once


def make_optimizers(model, optimizer, learning_rate, beta1, beta2, weight_decay, seed=0, rank=0):
    """{name: optimizer} over the model's trainable parameters, each of them in exactly one.

    Weights in bfloat16 get `StochasticAdamW`; seed is for its rounding, and rank where weights are sharded.

    'adamw' alone; or 'muon' for the matrices of the blocks and AdamW for the rest. Muon (Jordan et al. 2024)
    orthogonalises a matrix's momentum; its update is scaled to the size of AdamW's (Liu et al. 2025), so that
    one learning rate serves both. Weight decay is for matrices, not for gains and biases.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def for_muon(name, p):
        return optimizer == 'muon' and 'blocks.' in name and p.dim() == 2

    to_muon = [p for name, p in named if for_muon(name, p)]
    rest = [p for name, p in named if not for_muon(name, p)]
    groups = [
        {'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
        {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0},
    ]
    groups = [group for group in groups if group['params']]
    if any(p.dtype == torch.bfloat16 for p in rest):
        return {'adamw': StochasticAdamW(groups, learning_rate, (beta1, beta2), seed, rank)}
    optimizers = {'adamw': torch.optim.AdamW(groups, lr=learning_rate, betas=(beta1, beta2), fused=True)}
    if to_muon:
        optimizers['muon'] = BatchedMuon(
            to_muon,
            lr=learning_rate,
            weight_decay=weight_decay,
            momentum=0.95,
            adjust_lr_fn='match_rms_adamw',
        )
    return optimizers


def check_bfloat16_weights(**settings):
    """A UserError for each setting that does not go with them; those that are given as true are the wrong ones."""
    for name, wrong in settings.items():
        if wrong:
            raise UserError(f'master_weights=bfloat16 does not go with {name}; leave one of them out.')


class StochasticAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter 2019) whose weights and two moments are bfloat16, rounded stochastically.

    Rounded to the nearest, an update of less than half the gap between two bfloat16 numbers (2⁻⁸ of the weight) is
    lost, in every step anew. Here it is made with a probability of its share of the gap, so the weight's expectation
    is the exact one (Zamirai et al. 2020). The random bits depend on (seed, step, parameter, rank) alone.
    """

    def __init__(self, params, lr, betas, seed=0, rank=0, eps=1e-8):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, weight_decay=0.0))
        self.key = seed, rank

    @torch.no_grad()
    def step(self, closure=None):
        parameters = [(p, group) for group in self.param_groups for p in group['params']]
        for number, (p, group) in enumerate(parameters):
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state.update(
                    step=torch.zeros(()), exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p)
                )
            state['step'] += 1
            step = int(state['step'])
            generator = torch.Generator(p.device).manual_seed(int(random_bits(*self.key, step, number)) >> 1)
            parts = (p, p.grad, state['exp_avg'], state['exp_avg_sq'])
            for part in zip(*(local(x).view(-1).split(CHUNK) for x in parts)):
                self.update(*part, step, group, generator)

    @staticmethod
    def update(weight, gradient, average, square, step, group, generator):
        """One step of AdamW, in float32, for bfloat16 tensors (N,); all but the gradient are changed in place."""
        (beta1, beta2), rate = group['betas'], group['lr']
        gradient = gradient.float()
        new_average = average.float().lerp_(gradient, 1 - beta1)
        new_square = square.float().mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
        size = (new_square / (1 - beta2**step)).sqrt_().add_(group['eps'])
        new_weight = weight.float().mul_(1 - rate * group['weight_decay'])
        new_weight.addcdiv_(new_average, size, value=-rate / (1 - beta1**step))
        for old, new in ((weight, new_weight), (average, new_average), (square, new_square)):
            old.copy_(stochastically_rounded(new, generator))


def local(tensor):
    """A rank's own part of a sharded tensor; any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, 'to_local') else tensor


def stochastically_rounded(x, generator):
    """float32 to bfloat16, up or down, by how near they are: 16 random bits are added to the 16 that are cut off."""
    bits = torch.randint(1 << 16, x.shape, dtype=torch.int32, device=x.device, generator=generator)
    return ((x.view(torch.int32) + bits) & -65536).view(torch.float32).bfloat16()


class BatchedMuon(torch.optim.Muon):
    """PyTorch's Muon with 'match_rms_adamw', all matrices of one shape, or its transpose, in one product: small ones
    take half the time so, large ones as long. Its state is the same."""

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            shapes = {}
            for p in group['params']:
                if p.grad is not None:
                    shapes.setdefault((min(p.shape), max(p.shape)), []).append(p)
            for (_, longer), matrices in shapes.items():
                update = orthogonalised(
                    self.momenta(matrices, group['momentum']), group
                )  # (n, shorter, longer)
                torch._foreach_mul_(matrices, 1 - group['lr'] * group['weight_decay'])
                torch._foreach_add_(
                    matrices,
                    [u.mT if p.size(0) > p.size(1) else u for u, p in zip(update, matrices)],
                    alpha=-group['lr'] * 0.2 * math.sqrt(longer),
                )

    def momenta(self, matrices, momentum):
        """The gradients, led on by Nesterov's momentum: (n, shorter, longer)."""
        for p in matrices:
            if 'momentum_buffer' not in self.state[p]:
                self.state[p]['momentum_buffer'] = torch.zeros_like(p.grad)
        buffers, gradients = [self.state[p]['momentum_buffer'] for p in matrices], [p.grad for p in matrices]
        torch._foreach_lerp_(buffers, gradients, 1 - momentum)
        led = torch._foreach_lerp(gradients, buffers, momentum)
        return torch.stack([x.mT if x.size(0) > x.size(1) else x for x in led])


def orthogonalised(x, group):
    """Newton-Schulz iterations of matrices (n, R, C), in bfloat16: all their singular values go to about 1."""
    a, b, c = group['ns_coefficients']
    x = x.bfloat16()
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=group['eps'])
    for _ in range(group['ns_steps']):
        gram = x @ x.mT  # (n, R, R)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def learning_rate_at(step, max_steps, learning_rate, min_lr, warmup_steps, schedule, decay_ratio):
    """Learning rate of step `step`, counted from 0: a linear warm-up, then `schedule` down to min_lr.

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


class WeightAverage:
    """Exponential moving average of a model's weights: average ← d · average + (1 − d) · weights.

    d is `decay`, or (1 + step) / (10 + step) while that is less: the random start is soon forgotten.
    """

    def __init__(self, model, decay):
        self.weights, self.decay = dict(model.named_parameters()), decay
        self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}

    def load(self, average):
        for name, weight in self.average.items():
            weight.copy_(average[name])

    @torch.no_grad()
    def update(self, step):
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.average.values()), list(self.weights.values()), 1 - decay)

    @contextmanager
    def in_place(self):
        """While the context lasts, the model's weights are the average."""
        trained = {name: weight.detach().clone() for name, weight in self.weights.items()}
        try:
            self.put(self.average)
            yield
        finally:
            self.put(trained)

    @torch.no_grad()
    def put(self, values):
        for name, weight in self.weights.items():
            weight.copy_(values[name])
