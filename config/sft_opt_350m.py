# Instruction tuning of OPT-350m, as in the SFT script of TRL 0.7.4.
#   python prepare/instruct.py --source=timdettmers/openassistant-guanaco --field=text --name=guanaco --tokenizer=FOLDER
dataset = 'guanaco'
init_from = 'facebook/opt-350m'
block_size = 512
batch_size = 64
gradient_accumulation_steps = 16
num_epochs = 3
learning_rate = 1.41e-5
log_every = 1
save_every = 100
save_total_limit = 10
