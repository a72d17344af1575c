"""Keys and values of what a model has read: for decoding from left to right, and for blocks. Torch only."""

import torch
import torch.nn.functional as F


class KVCache:
    """Keys and values of each row so far, `lengths` (B,) tokens, in buffers of `size` tokens.

    Rows start together at position 0, padded on the right to one length; what lies beyond a row's own length is
    masked until it is overwritten. Once `fixed`, it always gives whole buffers and a mask, and all that changes is in
    tensors that stay where they are: one compiled decode step serves all.
    """

    def __init__(self, rows, size, device):
        self.buffers = {}  # by layer: keys and values, (B, H, size, D) each
        self.embeddings = None  # (B, N + size, C), N zeros first, where layers read N before each
        self.size = size
        self.lengths = torch.zeros(rows, dtype=torch.long, device=device)
        self.even, self.longest = True, 0  # whether all lengths are equal: known without asking the device
        self.fixed = False

    def fix(self):
        """Prepare for a compiled decode step."""
        self.fixed = True
        embeddings = [] if self.embeddings is None else [self.embeddings]
        for tensor in (self.lengths, *embeddings, *(x for pair in self.buffers.values() for x in pair)):
            torch._dynamo.mark_static_address(tensor)

    def positions(self, length):
        """Return the positions of `length` new tokens: a slice, or (B, length) where rows differ."""
        if not self.fixed and (self.even or self.longest == 0):
            return slice(self.longest, self.longest + length)
        return self.lengths[:, None] + torch.arange(length, device=self.lengths.device)

    def extend(self, layer, k, v):
        """Store a layer's new keys and values (B, H, T, D); return all of them so far, a mask, and is_causal."""
        if layer not in self.buffers:
            self.buffers[layer] = [x.new_zeros(x.size(0), x.size(1), self.size, x.size(3)) for x in (k, v)]
        keys, values = self.buffers[layer]
        if self.fixed:
            return self.put(keys, values, k, v, self.size)
        if self.longest == 0:
            keys[:, :, : k.size(2)], values[:, :, : v.size(2)] = k, v
            return k, v, None, True
        end = self.longest + 1
        if not self.even:
            return self.put(keys, values, k, v, end)
        keys[:, :, end - 1 : end], values[:, :, end - 1 : end] = k, v
        return keys[:, :, :end], values[:, :, :end], None, False

    def near(self, x, offsets):
        """Store embeddings x (B, T, C); return those that stand 1, 2, ... N before each, for offsets -1, -2, ... -N."""
        far = len(offsets)
        if self.embeddings is None:
            self.embeddings = x.new_zeros(x.size(0), far + self.size, x.size(2))
        if not self.fixed and self.longest == 0:
            self.embeddings[:, far : far + x.size(1)] = x
            return [self.embeddings[:, far + offset : far + offset + x.size(1)] for offset in offsets]
        rows, here = torch.arange(len(x), device=x.device), far + self.lengths
        self.embeddings[rows, here] = x[:, 0]
        before = here - torch.arange(1, far + 1, device=x.device).unsqueeze(1)  # (N, B)
        return self.embeddings[rows, before].unsqueeze(2).unbind()

    def put(self, keys, values, k, v, end):
        """Store one token of each row at its own position; each row attends to its own tokens below `end`."""
        rows = torch.arange(len(k), device=k.device)
        keys[rows, :, self.lengths], values[rows, :, self.lengths] = k[:, :, 0], v[:, :, 0]
        mask = (torch.arange(end, device=k.device) <= self.lengths[:, None])[:, None, None]  # (B, 1, 1, S)
        return keys[:, :, :end], values[:, :, :end], mask, False

    def advance(self, lengths):
        """Count new tokens: a number of each row, or the same for all."""
        if isinstance(lengths, int):
            self.lengths += lengths
            if not self.fixed:  # a number that changes would be compiled into the step
                self.longest += lengths
            return
        self.lengths += torch.tensor(lengths, device=self.lengths.device)
        self.even = self.even and len(set(lengths)) == 1
        self.longest += max(lengths)


class BlockCache:
    """Keys and values of `length` clean tokens; a pass reads clean tokens that follow, a noisy block, or both."""

    def __init__(self, size, device):
        """size: the most that it holds, the clean tokens and the noisy block of a pass included."""
        self.buffers = {}  # by layer: keys and values, or the embeddings, (B, H, size, D) each
        self.waiting = None  # clean tokens (B, T) that follow what is kept, for the next `read`
        self.length, self.size, self.device = 0, size, device

    def plan(self, clean, begin, size):
        """Prepare for a pass over `clean` tokens and a noisy block of `size` that begins at position `begin`."""
        position = torch.arange(self.length + clean, device=self.device)  # of clean keys
        noisy = torch.arange(begin, begin + size, device=self.device)
        self.index = torch.cat([position[self.length :], noisy])
        causal = position <= position[self.length :, None]
        before = (position < begin).expand(size, -1)
        see_noisy = torch.zeros(clean + size, size, dtype=torch.bool, device=self.device)
        see_noisy[clean:] = True
        self.mask = torch.cat([torch.cat([causal, before]), see_noisy], 1)  # (queries, keys)
        end = self.length + clean
        self.slots = begin, range(self.length, end), range(end, end + size)

    def positions(self, length):
        return self.index

    def extend(self, layer, k, v):
        k, v = self.put(layer, k, v)
        return k, v, self.mask, False

    def put(self, layer, *new):
        """Store what a pass adds (B, H, T, D) behind what is kept, and return all of it so far."""
        if layer not in self.buffers:
            self.buffers[layer] = [x.new_empty(*x.shape[:2], self.size, x.size(3)) for x in new]
        end = self.length + new[0].size(2)
        for buffer, x in zip(self.buffers[layer], new):
            buffer[:, :, self.length : end] = x
        return [buffer[:, :, :end] for buffer in self.buffers[layer]]

    def near(self, x, offsets):
        (all_x,) = self.put('embeddings', x.unsqueeze(1))  # (B, 1, T, C): kept like keys and values
        x = F.pad(all_x.squeeze(1), (0, 0, 0, 1))  # 0 behind clean and noisy ones
        index = torch.tensor([self.beside(offset, *self.slots) for offset in offsets], device=self.device)
        return x[:, index].unbind(1)  # (B, N, T, C)

    def beside(self, offset, begin, clean, noisy):
        """List where, in clean tokens, noisy ones and a 0, that stands which is beside each of a pass's positions."""
        slots = [i + offset if offset < 0 <= i + offset else noisy.stop for i in clean]
        for i in noisy:
            in_text = begin + i - noisy.start + offset if offset < 0 else -1
            slots.append(i + offset if i + offset in noisy else in_text if in_text >= 0 else noisy.stop)
        return slots

    def keep(self, count):
        """Keep the first `count` clean tokens of the last pass; the next one overwrites the others."""
        self.length += count

    def read(self, model, x_t, clean=None, belief=None):
        """Compute the states (B, T, C) of a noisy block x_t (B, T) behind all clean tokens, and those of `clean`: none.

        Clean tokens that wait are read in the same pass, which is the first of a block and has no belief.
        """
        if self.waiting is None:
            return model.hidden(x_t, cache=self, belief=belief), None
        waiting, self.waiting = self.waiting, None
        count = waiting.size(1)
        self.plan(count, self.length + count, x_t.size(1))
        hidden = model.hidden(torch.cat([waiting, x_t], 1), cache=self)[:, count:]
        self.keep(count)
        self.plan(0, self.length, x_t.size(1))  # for the other passes of the block
        return hidden, None
