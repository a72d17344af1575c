# The same stories by diffusion or sdd in blocks of four tokens, with an ar model in the same weights: four minutes too.
include('stories.py')
architecture = 'diffusion'
block_length = (4,)
ar_weight = 2.0
max_steps = 585
