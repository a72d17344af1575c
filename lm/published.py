"""The shapes of published models, to train them from scratch, and where their weights are."""

PUBLISHED = {  # what their config.json says
    'llama3': dict(  # meta-llama/Llama-3.2-1B
        model_type='llama',
        num_hidden_layers=16,
        hidden_size=2048,
        intermediate_size=8192,
        num_attention_heads=32,
        num_key_value_heads=8,
        head_dim=64,
        vocab_size=128256,
        rms_norm_eps=1e-5,
        rope_theta=5e5,
        rope_scaling=dict(
            rope_type='llama3',
            factor=32.0,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
            original_max_position_embeddings=8192,
        ),
        tie_word_embeddings=True,
    ),
    'deepseek': dict(  # deepseek-ai/deepseek-coder-1.3b-base
        model_type='llama',
        num_hidden_layers=24,
        hidden_size=2048,
        intermediate_size=5504,
        num_attention_heads=16,
        num_key_value_heads=16,
        head_dim=128,
        vocab_size=32256,
        rms_norm_eps=1e-6,
        rope_theta=1e5,
        rope_scaling=dict(rope_type='linear', factor=4.0),
        tie_word_embeddings=False,
    ),
    'qwen0.6B': dict(  # Qwen/Qwen3-0.6B
        model_type='qwen3',
        num_hidden_layers=28,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
    'qwen1.7B': dict(  # Qwen/Qwen3-1.7B
        model_type='qwen3',
        num_hidden_layers=28,
        hidden_size=2048,
        intermediate_size=6144,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        vocab_size=151936,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
    ),
}
FINETUNED = {
    'llama3_finetune': 'meta-llama/Llama-3.2-1B',
    'qwen3_finetune': 'Qwen/Qwen3-1.7B',
    'deepseek_finetune': 'deepseek-ai/deepseek-coder-1.3b-base',
}


def shape_of(model, block_size):
    """ModelConfig's fields for a model of PUBLISHED, but for its vocabulary: that is of the data."""
    from lm.families import switches  # only where it is wanted

    shape = switches({**PUBLISHED[model], 'max_position_embeddings': block_size}, model)
    del shape['pretrained_rows']
    return {**shape, 'tied': True}  # a head for tokens of its own would never be trained
