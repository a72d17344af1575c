# A large model on TinyStories, 113.1M parameters at a 32k vocabulary.
include('tinystories.py')
model_size = 'large'
batch_size, gradient_accumulation_steps = 32, 2
learning_rate, min_lr = 6e-4, 6e-4 / 10
max_steps = 20000
