"""XLM-RoBERTa as an embedding model: unigrams, and positions that begin after the padding token's."""

from checkpoint_unigram import SIZE, write_unigram

from checkpoint_families import bert

WHAT = "XLM-RoBERTa: unigram vocabulary, position table cut, one kind of segment, pooling by the mean"
VOCABULARY = "nomic-bert-moe"
PRE = None
CONFIG = {
    **bert.CONFIG,
    "architectures": ["XLMRobertaModel"],
    "model_type": "xlm-roberta",
    "vocab_size": SIZE,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 1,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 514,
    "type_vocab_size": 1,
    "layer_norm_eps": 1e-05,
}
FILES = bert.FILES
write_tokenizer = write_unigram
