"""One file a model family: what a small random checkpoint of it looks like, for scripts/oracle.py.

A module says
    WHAT        what is special about it, for the table of results
    CONFIG      config.json, without vocab_size and the ids of special tokens
    VOCABULARY  the name of the `ggml-vocab-NAME.gguf` of llama.cpp that it takes its vocabulary from; None: SmolLM2's
    PRE         the pre-tokenizer's name that upstream's converter is told; None: its own hash knows it
    tensors     a function (config) → {name: shape}, only where transformers cannot make the model
    BYTES       with it: endings of the names of U8 tensors, and the smallest and largest byte of each
    DTYPE       torch's name of the weights' type, if not bfloat16
    STANDS_IN   True if that vocabulary is another family's, because llama.cpp carries none of its own kind
    REQUANTIZE  True if both sides are told to quantize again what is quantized already
and, where the family needs it,
    FILES       {path: JSON content} of more files in the folder
    write_tokenizer     a function (folder, vocabulary, context_length) for another kind of tokenizer
    write_checkpoint    a function (folder) that writes it all, in place of CONFIG and VOCABULARY
"""
