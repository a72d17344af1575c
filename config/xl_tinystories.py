# An xl model on TinyStories, 347.5M parameters at a 32k vocabulary.
include('tinystories.py')
model_size = 'xl'
batch_size, gradient_accumulation_steps = 16, 4
gradient_checkpointing = True
learning_rate, min_lr = 4e-4, 4e-4 / 10
max_steps = 20000
