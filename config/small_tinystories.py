# A small model on TinyStories, 22.9M parameters at a 32k vocabulary.
include('tinystories.py')
model_size = 'small'
batch_size = 64
gradient_accumulation_steps = 1
learning_rate = 1e-3
min_lr = learning_rate / 10
max_steps = 10000
