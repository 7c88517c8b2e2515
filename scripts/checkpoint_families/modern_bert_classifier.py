"""ModernBERT as a reranker: a head with one class, pooled by the mean, and silent about much."""

from checkpoint_modern_bert import write_modern_bert

from checkpoint_families import modern_bert

WHAT = "ModernBERT with a head of one class, whose config.json leaves much to the config class"
VOCABULARY = "gpt-neox"
PRE = None
CONFIG = {
    **{name: value for name, value in modern_bert.CONFIG.items() if not name.startswith(("local_", "global_"))},
    "architectures": ["ModernBertForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "classifier_pooling": "mean",
    "hidden_activation": "silu",
    "num_hidden_layers": 2,
}
write_tokenizer = write_modern_bert
