# Instruction tuning of all weights of Qwen2.5-7B, as sft_qwen2.5_1.5b.py says.
include('sft_qwen2.5_1.5b.py')
init_from = 'Qwen/Qwen2.5-7B-Instruct'
