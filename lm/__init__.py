import os
import sys

if sys.platform == 'win32':
    sys.exit('error: This needs Linux or macOS, for their signals and file locks; on Windows run it in WSL.')

# Read at PyTorch's first tensor: large ones begin on huge pages, which leaves fewer holes in the heap of a CPU.
os.environ.setdefault('THP_MEM_ALLOC_ENABLE', '1')
