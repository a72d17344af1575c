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
        self.longest = 0
        # Whether new tokens have one position in all rows, `longest`: known without asking the device.
        self.aligned = True
        self.fixed = False

    def fix(self):
        """Prepare for a compiled decode step."""
        self.aligned, self.fixed = False, True
        tensors = self.lengths, self.embeddings, *(x for pair in self.buffers.values() for x in pair)
        for tensor in filter(torch.is_tensor, tensors):
            torch._dynamo.mark_static_address(tensor)

    def positions(self, length):
        """Return the positions of `length` new tokens: a slice, or (B, length) where rows differ."""
        if self.aligned:
            return slice(self.longest, self.longest + length)
        return self.lengths[:, None] + torch.arange(length, device=self.lengths.device)

    def extend(self, layer, k, v):
        """Store a layer's new keys and values (B, H, T, D); return all of them so far, a mask, and is_causal."""
        if layer not in self.buffers:
            self.buffers[layer] = [x.new_zeros(x.size(0), x.size(1), self.size, x.size(3)) for x in (k, v)]
        keys, values = self.buffers[layer]
        if self.aligned:
            here = self.positions(k.size(2))
            keys[:, :, here], values[:, :, here] = k, v
            return keys[:, :, : here.stop], values[:, :, : here.stop], None, self.longest == 0
        rows = torch.arange(len(k), device=k.device)  # of one new token each
        keys[rows, :, self.lengths], values[rows, :, self.lengths] = k[:, :, 0], v[:, :, 0]
        end = self.size if self.fixed else self.longest + 1
        mask = (torch.arange(end, device=k.device) <= self.lengths[:, None])[:, None, None]  # (B, 1, 1, S)
        return keys[:, :, :end], values[:, :, :end], mask, False

    def near(self, x, offsets):
        """Store embeddings x (B, T, C); return those that stand 1, 2, ... N before each, for offsets -1, -2, ... -N."""
        far, length = len(offsets), x.size(1)
        if self.embeddings is None:
            self.embeddings = x.new_zeros(x.size(0), far + self.size, x.size(2))
        if self.aligned:
            begin = far + self.longest
            self.embeddings[:, begin : begin + length] = x
            return [self.embeddings[:, begin + offset : begin + offset + length] for offset in offsets]
        rows, here = torch.arange(len(x), device=x.device), far + self.lengths
        self.embeddings[rows, here] = x[:, 0]
        before = here - torch.arange(1, far + 1, device=x.device).unsqueeze(1)  # (N, B)
        return self.embeddings[rows, before].unsqueeze(2).unbind()

    def advance(self, lengths):
        """Count new tokens: a number of each row, or the same for all."""
        if isinstance(lengths, int):
            self.lengths += lengths
            if not self.fixed:  # a number that changes would be compiled into the step
                self.longest += lengths
            return
        self.lengths += torch.tensor(lengths, device=self.lengths.device)
        self.aligned = self.aligned and len(set(lengths)) == 1
        self.longest += max(lengths)


class BlockCache:
    """Keys and values of `length` clean tokens; a pass reads clean tokens that follow, a noisy block, or both.

    Clean tokens are kept by counting them in `length` after their pass; the next pass overwrites the others.
    """

    def __init__(self, size, device):
        """size: the most that it holds, the clean tokens and the noisy block of a pass included."""
        self.buffers = {}  # by layer: keys and values, or the embeddings, (B, H, size, D) each
        self.waiting = None  # clean tokens (B, T) that follow what is kept, for the next `read`
        self.length, self.size, self.device = 0, size, device

    def plan(self, clean, begin, size):
        """Prepare for a pass over `clean` tokens and a noisy block of `size` that begins at position `begin`."""
        self.block, self.end = range(begin, begin + size), self.length + clean
        position = torch.arange(self.end, device=self.device)  # of clean keys
        noisy = torch.arange(begin, begin + size, device=self.device)
        self.index = torch.cat([position[self.length :], noisy])
        self.is_noisy = torch.arange(clean + size, device=self.device) >= clean
        seen = F.pad(position[self.length :] + 1, (0, size), value=begin)  # clean keys, of each query
        self.mask = torch.cat([position < seen[:, None], self.is_noisy[:, None].expand(-1, size)], 1)

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
        """Return what stands beside each token x (B, T, C): a noisy one of the same block, or a clean one before it."""
        (all_x,) = self.put('embeddings', x.unsqueeze(1))  # (B, 1, S, C): kept like keys and values
        x = F.pad(all_x.squeeze(1), (0, 0, 0, 1))  # a 0 at the end, for what stands beside nothing
        offsets = torch.tensor(offsets, device=self.device)
        beside = self.index + offsets[:, None]  # (N, T), positions in the text
        slots = torch.where((beside >= 0) & (beside < self.index), beside, -1)
        in_block = self.is_noisy & (beside >= self.block.start) & (beside < self.block.stop)
        slots = torch.where(in_block, self.end + beside - self.block.start, slots)
        return x[:, slots].unbind(1)  # (B, N, T, C)

    def read(self, model, x_t, clean=None, belief=None):
        """Compute the states (B, T, C) of a noisy block x_t (B, T) behind all clean tokens, and those of `clean`: none.

        Clean tokens that wait are read in the same pass, which is the first of a block and has no belief.
        """
        count = self.waiting.size(1)
        self.plan(count, self.length + count, x_t.size(1))
        hidden = model.hidden(torch.cat([self.waiting, x_t], 1), cache=self, belief=belief)[:, count:]
        self.length += count
        self.waiting = self.waiting[:, :0]
        return hidden, None
