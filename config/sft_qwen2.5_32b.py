# Instruction tuning of all weights of Qwen2.5-32B. Prepare the data with its own tokenizer and format:
#   python prepare/instruct.py --source=alpaca --name=NAME --tokenizer=FOLDER --prompt_format=chatml
#   torchrun --standalone --nproc_per_node=8 finetune.py config/sft_qwen2.5_32b.py --dataset=NAME
# On four GPUs: --nproc_per_node=4 --master_weights=bfloat16, about 80 GB on each (an estimate, not measured).
init_from = 'Qwen/Qwen2.5-32B-Instruct'
max_steps = 1000
batch_size = 1
gradient_accumulation_steps = 8
learning_rate = 4e-6
block_size = 2048
fsdp = True
