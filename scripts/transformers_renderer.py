"""Renders chats with transformers' `apply_chat_template`; runs in an environment that has transformers.

    python transformers_renderer.py < jobs.jsonl > results.jsonl

A job: {"template", "special": {...}, "messages", "tools", "documents", "arguments", ...};
a result: {"text"} or {"error"}.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast  # type: ignore[import-not-found,unused-ignore]


def render(job: dict[str, Any]) -> dict[str, str]:
    """Return the text of one job's prompt, or what was raised."""
    bare = Tokenizer(WordLevel({"a": 0}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bare, chat_template=job["template"], **job["special"])
    try:
        text = tokenizer.apply_chat_template(
            job["messages"],
            tools=job["tools"] or None,
            documents=job["documents"] or None,
            add_generation_prompt=job["add_generation_prompt"],
            continue_final_message=job["continue_final_message"],
            tokenize=False,
            **job["arguments"],
        )
    except Exception as error:  # a template can raise anything
        return {"error": f"{type(error).__name__}: {error}"}
    return {"text": text}


if __name__ == "__main__":
    for line in sys.stdin:
        print(json.dumps(render(json.loads(line))), flush=True)
