"""The text child: chat template and tokenizer of one model, vocabulary only."""
