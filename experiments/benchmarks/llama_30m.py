"""The 30M Llama of the training benchmarks, its adapter and its rows."""

from typing import Any

ROW_LENGTH = 512
LORA_RANK, LORA_ALPHA = 16, 32
MODEL: dict[str, Any] = {
  'architectures': ['LlamaForCausalLM'],
  'model_type': 'llama',
  'vocab_size': 8192,
  'hidden_size': 512,
  'intermediate_size': 1408,
  'num_hidden_layers': 8,
  'num_attention_heads': 8,
  'num_key_value_heads': 4,
  'head_dim': 64,
  'max_position_embeddings': 1024,
  'rms_norm_eps': 1e-5,
  # Tunix's Llama knows no other base.
  'rope_parameters': {'rope_type': 'default', 'rope_theta': 1e6},
  'tie_word_embeddings': False,
  'bos_token_id': 1,
  'eos_token_id': 2,
  'pad_token_id': 0,
  'dtype': 'float32',
}
