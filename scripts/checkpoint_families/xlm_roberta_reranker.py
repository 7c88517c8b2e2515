"""XLM-RoBERTa as a reranker: a head of two layers with one class, and tokenizer.json alone."""

from checkpoint_unigram import write_unigram_json

from checkpoint_families import xlm_roberta

WHAT = "XLM-RoBERTa with a head of two layers and one class; its vocabulary in tokenizer.json alone"
VOCABULARY = "nomic-bert-moe"
PRE = None
CONFIG = {
    **xlm_roberta.CONFIG,
    "architectures": ["XLMRobertaForSequenceClassification"],
    "id2label": {"0": "LABEL_0"},
    "label2id": {"LABEL_0": 0},
    "num_hidden_layers": 1,
}
write_tokenizer = write_unigram_json
