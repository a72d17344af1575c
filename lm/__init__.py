import os

# Read at PyTorch's first tensor: large ones begin on huge pages, which leaves fewer holes in the heap of a CPU.
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
