"""Does a chat give the same prompt as transformers' `apply_chat_template`? For every template of a folder.

    TRANSFORMERS_PYTHON=<an environment's python> python scripts/compare_chat_templates.py <folder of *.jinja>

transformers is given each chat as its documentation wants it: arguments of calls as an object or, second, as a string,
and a call's missing text as null or "". Prints a row a template: how many of the chats are equal, and what differs.
Needs transformers, which Pestle itself does not; for development only.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from chat_template_cases import CASES

from app.errors import TemplateRefusedError
from app.messages import RenderChat
from app.text.chat_renderer import ChatRenderer
from app.text.template import ChatTemplate
from app.text.template_needs import TemplateNeeds

SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
_NO_TOOLS = "tools are told in the system message: the template has no place for them"
_NO_CALLS = "calls are written into the text: the template shows none, or fails on them"
_NO_PARTS = "parts are joined by line feeds: the template does not read them"
_NO_DOCUMENTS = "refused by name: the template does not look at documents"


def main() -> int:
    """Compare; return 1 when a difference has no reason."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("templates", type=Path, help="a folder of *.jinja")
    parser.add_argument("--show", default="", help="print both texts of differing chats of templates with this name")
    options = parser.parse_args()
    files = sorted(options.templates.glob("*.jinja"))
    theirs = _transformers([file.read_text("utf-8") for file in files])
    unexplained = equal = 0
    print(f"| template | tool calls | equal of {len(CASES)} | differs, and why |\n|---|---|---|---|")
    for file in files:
        source = file.read_text("utf-8")
        reasons: dict[str, list[str]] = {}
        form, same = ChatRenderer(ChatTemplate(source, "", SPECIAL)).tool_form, 0
        for name, case in CASES.items():
            references, ours = next(theirs), _ours(source, case)
            if ours in references or (ours.startswith("!") and all(text.startswith("!") for text in references)):
                same += 1
                continue
            reason = _reason(source, name, ours)
            unexplained += reason is None
            reasons.setdefault(reason or "UNEXPLAINED", []).append(name)
            if options.show and options.show in file.name:
                print(f"--- {name}: ours\n{ours}\n--- theirs", *dict.fromkeys(references), sep="\n")
        equal += same
        why = "; ".join(f"{', '.join(names)}: {reason}" for reason, names in reasons.items())
        print(f"| {file.stem} | {form} | {same} | {why} |")
    print(f"\n{equal} of {len(files) * len(CASES)} chats are equal; {unexplained} differ without a reason")
    return 1 if unexplained else 0


def _ours(source: str, case: dict[str, Any]) -> str:
    """Return our text, or "!" and our refusal."""
    try:
        return ChatRenderer(ChatTemplate(source, "", SPECIAL)).text(RenderChat(0, **case))
    except TemplateRefusedError as error:
        return f"!{error.message}"


def _reason(source: str, name: str, ours: str) -> str | None:
    template = ChatTemplate(source, "", SPECIAL)
    needs = TemplateNeeds(template)
    if name == "documents" and ours.startswith("!'documents'"):
        return _NO_DOCUMENTS
    if name == "parts" and not needs.reads_parts:
        return _NO_PARTS
    if "tools" in CASES[name] and not needs.lists_tools:
        return _NO_TOOLS
    if name in ("call", "two calls", "after") and not (needs.calls and needs.shows_results):
        return _NO_CALLS
    return None


def _transformers(sources: list[str]) -> Any:
    """Yield for each template and case the texts that transformers gives, one for each way to write its messages."""
    python = os.environ.get("TRANSFORMERS_PYTHON")
    if not python:
        sys.exit("set TRANSFORMERS_PYTHON to the python of an environment with transformers")
    jobs: list[str] = []
    counts: list[int] = []
    for source, case in itertools.product(sources, CASES.values()):
        variants = _variants(case["messages"])
        counts.append(len(variants))
        for messages in variants:
            job = {"template": source, "special": SPECIAL, "messages": messages}
            job |= {"tools": case.get("tools"), "documents": case.get("documents")}
            job |= {"arguments": case.get("template_arguments", {})}
            job |= {"add_generation_prompt": case.get("add_generation_prompt", True)}
            job |= {"continue_final_message": case.get("continue_final_message", False)}
            jobs.append(json.dumps(job))
    command = [python, str(Path(__file__).with_name("transformers_renderer.py"))]
    said = subprocess.run(command, input="\n".join(jobs), stdout=subprocess.PIPE, text=True, check=True).stdout
    results = iter(map(json.loads, said.splitlines()))
    for count in counts:
        yield [found["text"] if "text" in found else f"!{found['error']}" for found in itertools.islice(results, count)]


def _variants(messages: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    if not any("tool_calls" in message for message in messages):
        return [messages]
    return [
        [_as_wanted(message, read=read, text=text) for message in messages]
        for read, text in itertools.product((True, False), (None, ""))
    ]


def _as_wanted(message: dict[str, Any], *, read: bool, text: str | None) -> dict[str, Any]:
    if "tool_calls" not in message:
        return message
    calls = [
        {**call, "function": {**call["function"], "arguments": json.loads(call["function"]["arguments"])}}
        for call in message["tool_calls"]
    ]
    return {**message, "content": text, **({"tool_calls": calls} if read else {})}


if __name__ == "__main__":
    sys.exit(main())
