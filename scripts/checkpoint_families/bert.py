"""BERT as an embedding model: WordPiece, learned positions, pooled as sentence-transformers says."""

from checkpoint_wordpiece import write_wordpiece

WHAT = "BERT: WordPiece, learned positions, segments, pooling by the mean, a head of the training left out"
VOCABULARY = "bert-bge"
PRE = None
CONFIG = {
    "architectures": ["BertForMaskedLM"],
    "model_type": "bert",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
    "hidden_size": 256,
    "intermediate_size": 1056,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
    "hidden_act": "gelu",
}
FILES = {
    "modules.json": [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ],
    "1_Pooling/config.json": {
        "word_embedding_dimension": 256,
        "pooling_mode_cls_token": False,
        "pooling_mode_mean_tokens": True,
        "pooling_mode_max_tokens": False,
    },
}
write_tokenizer = write_wordpiece
