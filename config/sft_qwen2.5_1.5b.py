# Instruction tuning of all weights of Qwen2.5-1.5B. Prepare the data with its own tokenizer and format:
#   python prepare/instruct.py --source=alpaca --name=NAME --tokenizer=FOLDER --prompt_format=chatml
#   python finetune.py config/sft_qwen2.5_1.5b.py --dataset=NAME
init_from = 'Qwen/Qwen2.5-1.5B-Instruct'
max_steps = 1000
batch_size = 1
gradient_accumulation_steps = 8
learning_rate = 2e-5
block_size = 2048
