"""What becomes of every field of a request for embeddings or a ranking, as `fields` has it for completions."""

from __future__ import annotations

from app.server.schema.fields import Field

MAX_INPUTS = 2048  # OpenAI's

EMBEDDINGS: dict[str, Field] = {
    "model": Field("honoured", "the id of a served model, as GET /v1/models lists it"),
    "input": Field(
        "honoured",
        "a string, an array of strings, an array of token ids (taken as they are), or an array of such arrays; at most "
        f"{MAX_INPUTS}, each of at most the model's context length",
    ),
    "encoding_format": Field("honoured", '"float" (default) or "base64": float32, little-endian'),
    "dimensions": Field(
        "honoured", "an integer from 1 to the model's own size (default): so many numbers, of length 1 together"
    ),
    "user": Field("no effect", "a string"),
    "embd_normalize": Field("refused", "2 (length 1, as always here); llama-server's", (None, 2)),
    "normalize": Field("refused", "true (length 1, as always here); vLLM's", (None, True)),
    "truncate_prompt_tokens": Field("refused", "null: nothing is cut off here; vLLM's", (None,)),
}

RERANK: dict[str, Field] = {
    "model": Field("honoured", "the id of a served model, as GET /v1/models lists it"),
    "query": Field("honoured", "a string"),
    "documents": Field("honoured", f'an array of 1 to {MAX_INPUTS} strings, or objects such as {{"text": "..."}}'),
    "top_n": Field("honoured", "an integer from 1: so many results at most; default: all"),
    "return_documents": Field("honoured", "true (default) or false: whether results repeat their documents"),
    "use_activation": Field(
        "honoured", "true (default): scores from 0 to 1; false: as the model gives them, as llama-server does; vLLM's"
    ),
    "user": Field("no effect", "a string"),
    "truncate_prompt_tokens": Field("refused", "null: nothing is cut off here; vLLM's", (None,)),
    "max_tokens_per_doc": Field("refused", "null: nothing is cut off here; Cohere's", (None,)),
    "max_chunks_per_doc": Field("refused", "null; Cohere's", (None,)),
    "rank_fields": Field("refused", "null; Cohere's", (None,)),
}
