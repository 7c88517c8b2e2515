"""ModernBERT as it was trained: with a head that llama.cpp takes, and none of the bias that upstream cannot map."""

from checkpoint_modern_bert import write_modern_bert

from checkpoint_families import modern_bert

WHAT = "ModernBERT with the head of its training, without the decoder's bias, at which upstream's converter fails"
VOCABULARY = "gpt-neox"
PRE = None
CONFIG = {
    **modern_bert.CONFIG,
    "architectures": ["ModernBertForMaskedLM"],
    "decoder_bias": False,
    "hidden_size": 96,
    "num_hidden_layers": 2,
}
write_tokenizer = write_modern_bert
