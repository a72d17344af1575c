# Instruction tuning of all weights of Qwen2.5-14B. Prepare the data as sft_qwen2.5_1.5b.py says, then:
#   torchrun --standalone --nproc_per_node=4 finetune.py config/sft_qwen2.5_14b.py --dataset=NAME
include('sft_qwen2.5_1.5b.py')
init_from = 'Qwen/Qwen2.5-14B-Instruct'
learning_rate = 4e-6
fsdp = True
