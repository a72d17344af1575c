# Stories as they are asked for, from random weights: an instruction, then its answer, in each row. A quarter of an hour
# of two slow cores, in which no request comes twice. The data are of
#   python prepare/instruct.py --source=stories --name=story_requests --max_examples=50000 --vocab_size=1536 \
#     --tokenizer_sample_mb=2
include('stories.py')
dataset = 'story_requests'
block_size = 208
max_steps = 2400
learning_rate = 8e-3
decay_embedding = False
