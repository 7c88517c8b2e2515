"""BERT with a head that names three classes, pooled by its first token."""

from checkpoint_wordpiece import write_wordpiece

from checkpoint_families.bert import CONFIG as BERT

WHAT = "BERT with a classification head of three named classes, pooled by the first token"
VOCABULARY = "bert-bge"
PRE = None
CONFIG = {
    **BERT,
    "architectures": ["BertForSequenceClassification"],
    "hidden_size": 96,
    "intermediate_size": 384,
    "id2label": {"0": "contradiction", "1": "entailment", "2": "neutral"},
    "label2id": {"contradiction": 0, "entailment": 1, "neutral": 2},
}
FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ],
    "1_Pooling/config.json": {"word_embedding_dimension": 96, "pooling_mode": "cls"},
}
write_tokenizer = write_wordpiece
