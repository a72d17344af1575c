# Stories as they are asked for, from random weights: an instruction, then its answer, in each row. The data are of
#   python prepare/instruct.py --source=stories --name=story_requests --vocab_size=1536 --tokenizer_sample_mb=2
include('stories.py')
dataset = 'story_requests'
block_size = 208
max_steps = 1000
