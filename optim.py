"""Optimizers, the learning-rate curve, and the running average of the weights."""
import math
from contextlib import contextmanager

import torch

OPTIMIZERS = ('adamw', 'muon')
SCHEDULES = ('cosine', 'linear', 'wsd', 'constant')


def make_optimizers(model, optimizer, learning_rate, beta1, beta2, weight_decay):
    """{name: optimizer} over the model's trainable parameters, each of them in exactly one.

    'adamw' alone; or 'muon' for the matrices of the blocks and AdamW for the rest. Muon (Jordan et al. 2024)
    orthogonalises a matrix's momentum; its update is scaled to the size of AdamW's (Liu et al. 2025), so that
    one learning rate serves both. Weight decay is for matrices, not for gains and biases.
    """
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]

    def for_muon(name, p):
        return optimizer == 'muon' and 'blocks.' in name and p.dim() == 2

    to_muon = [p for name, p in named if for_muon(name, p)]
    rest = [p for name, p in named if not for_muon(name, p)]
    groups = [{'params': [p for p in rest if p.dim() >= 2], 'weight_decay': weight_decay},
              {'params': [p for p in rest if p.dim() < 2], 'weight_decay': 0.0}]
    optimizers = {'adamw': torch.optim.AdamW([group for group in groups if group['params']], lr=learning_rate,
                                             betas=(beta1, beta2), fused=True)}
    if to_muon:
        optimizers['muon'] = torch.optim.Muon(to_muon, lr=learning_rate, weight_decay=weight_decay,
                                              momentum=0.95, adjust_lr_fn='match_rms_adamw')
    return optimizers


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
