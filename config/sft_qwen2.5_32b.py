# Instruction tuning of all weights of Qwen2.5-32B. Prepare the data as sft_qwen2.5_1.5b.py says, then:
#   torchrun --standalone --nproc_per_node=8 finetune.py config/sft_qwen2.5_32b.py --dataset=NAME
include('sft_qwen2.5_14b.py')
init_from = 'Qwen/Qwen2.5-32B-Instruct'
