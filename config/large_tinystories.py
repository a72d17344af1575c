# A large model on TinyStories, 109.5M parameters at a 32k vocabulary.
include('tinystories.py')
model_size = 'large'
batch_size = 32
gradient_accumulation_steps = 2
learning_rate = 6e-4
min_lr = learning_rate / 10
max_steps = 20000
