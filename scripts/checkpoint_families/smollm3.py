"""SmolLM3: rotary positions in three layers of four, tied embeddings."""

import dataclasses
from pathlib import Path

from checkpoint_vocabulary import Vocabulary
from checkpoint_vocabulary import write_tokenizer as write_byte_level_bpe

WHAT = "SmolLM3: tied embeddings that config.json is silent about, Llama 3's vocabulary without a BOS"
VOCABULARY = "llama-bpe"
PRE = None
CONFIG = {
    "architectures": ["SmolLM3ForCausalLM"],
    "model_type": "smollm3",
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 65536,
    "rms_norm_eps": 1e-06,
    "rope_theta": 5000000.0,
    "pad_token_id": 2,
    "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0],
}


def write_tokenizer(folder: Path, vocabulary: Vocabulary, *, context_length: int) -> None:
    """Write the tokenizer's files: nothing is put before a text."""
    write_byte_level_bpe(folder, dataclasses.replace(vocabulary, add_bos=False), context_length=context_length)
