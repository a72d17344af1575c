# Stories as they are asked for, from random weights. The data are of
#   python prepare/instruct.py --source=stories --max_examples=50000 --vocab_size=1536 --name=story_requests
include('stories.py')
dataset = 'story_requests'
block_size = 208
