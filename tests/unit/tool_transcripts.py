"""What models of each family write, as their templates and cards show it, and what is to be read in it."""

from __future__ import annotations

from typing import Any, NamedTuple

from app.chat.answer_parser import AnswerParser
from app.chat.events import CallArguments, CallBegin, Event, Reasoning, Text
from app.chat.formats import ToolForm

WEATHER = {"type": "object", "properties": {"place": {"type": "string"}, "days": {"type": "integer"}}}
TEXT = {"type": "object", "properties": {"text": {"type": "string"}, "tags": {"type": "array"}}}
SCHEMAS: dict[str, dict[str, Any]] = {"get_weather": WEATHER, "save": TEXT, "now": {}}
THINK = ("<think>", "</think>")


class Answer(NamedTuple):
    content: str = ""
    calls: tuple[tuple[str, str], ...] = ()  # name and arguments, as text
    reasoning: str = ""


class Transcript(NamedTuple):
    form: ToolForm
    text: str
    answer: Answer
    reasoning: tuple[str, str] | None = None
    prompt_end: str = ""


KOELN = ("get_weather", '{"place": "Köln", "days": 2}')
SAVE = ("save", '{"text": "a } \\" ] </tool_call> \\\\", "tags": [1, {"b": null}]}')
NOW = ("now", "{}")


def call(name: str, arguments: str, key: str = "arguments") -> str:
    return f'{{"name": "{name}", "{key}": {arguments}}}'


def hermes(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


TWO = f"[{call(*KOELN)}, {call(*SAVE)}]"
CHANNEL = "<|channel|>"
TRANSCRIPTS = [
    # Hermes, Qwen
    Transcript("hermes", "Just text, with { and <tool.", Answer("Just text, with { and <tool.")),
    Transcript("hermes", hermes(call(*KOELN)), Answer(calls=(KOELN,))),
    Transcript("hermes", f"Let me see.\n\n{hermes(call(*KOELN))}\n", Answer("Let me see.", (KOELN,))),
    Transcript("hermes", f"{hermes(call(*KOELN))}\n{hermes(call(*SAVE))}", Answer(calls=(KOELN, SAVE))),
    Transcript("hermes", f"{hermes(call(*KOELN))}\nDone.", Answer("\nDone.", (KOELN,))),
    Transcript("hermes", f"<tool_call>{call(*KOELN)}", Answer(calls=(KOELN,))),
    Transcript("hermes", f"<tool_call>{TWO}</tool_call>", Answer(calls=(KOELN, SAVE))),
    Transcript(
        "hermes", '<tool_call>{"arguments": {"a": 1}, "name": "now"}</tool_call>', Answer(calls=(("now", '{"a": 1}'),))
    ),
    Transcript("hermes", '<tool_call>{"name": "now"}</tool_call>', Answer(calls=(NOW,))),
    Transcript(
        "hermes",
        '<tool_call>{"name":"now","arguments":"{\\"a\\": 1}"}</tool_call>',
        Answer(calls=(("now", '{"a": 1}'),)),
    ),
    Transcript(
        "hermes",
        f"<think>\nIs it <tool_call>?\n</think>\n\n{hermes(call(*KOELN))}",
        Answer(calls=(KOELN,), reasoning="Is it <tool_call>?"),
        THINK,
    ),
    Transcript(
        "hermes",
        "Yes\n\nor no</think>\n\n  Good.",
        Answer("Good.", reasoning="Yes\n\nor no"),
        THINK,
        "assistant\n<think>\n",
    ),
    Transcript("hermes", "<think>\nand so on </thi", Answer(reasoning="and so on </thi"), THINK),
    Transcript("hermes", "No <think>ing</think> here", Answer("No <think>ing</think> here"), THINK),
    # malformed calls are content
    Transcript("hermes", "<tool_call>\n{no}\n</tool_call>", Answer("<tool_call>\n{no}\n</tool_call>")),
    Transcript("hermes", hermes(call("unknown", "{}")), Answer(hermes(call("unknown", "{}")))),
    Transcript("hermes", hermes(call("now", "[1]")), Answer(hermes(call("now", "[1]")))),
    Transcript("hermes", hermes(call("now", '{"a": }')), Answer(hermes(call("now", '{"a": }')))),
    Transcript("hermes", "<tool_call>{} and </tool_call>", Answer("<tool_call>{} and </tool_call>")),
    Transcript("hermes", '<tool_call>\n{"name": "now", "argu', Answer('<tool_call>\n{"name": "now", "argu')),
    Transcript("hermes", f"<tool_call>oh {hermes(call(*KOELN))}", Answer("<tool_call>oh", (KOELN,))),
    # Qwen3-Coder, Qwen 3.5
    Transcript(
        "qwen_xml",
        "I look.\n<tool_call>\n<function=get_weather>\n<parameter=place>\nKöln\n</parameter>\n<parameter=days>\n2\n"
        "</parameter>\n</function>\n</tool_call>",
        Answer("I look.", (KOELN,)),
    ),
    Transcript(
        "qwen_xml",
        "<tool_call>\n<function=save>\n<parameter=text>\n12\nlines\n</parameter>\n<parameter=tags>\n[1, true]\n"
        "</parameter>\n</function>\n</tool_call>\n<tool_call>\n<function=now>\n</function>\n</tool_call>",
        Answer(calls=(("save", '{"text": "12\\nlines", "tags": [1, true]}'), NOW)),
    ),
    Transcript(
        "qwen_xml",
        "<tool_call>\n<function=other>\n</function>\n</tool_call>",
        Answer("<tool_call>\n<function=other>\n</function>\n</tool_call>"),
    ),
    Transcript("qwen_xml", hermes(call(*KOELN)), Answer(calls=(KOELN,))),
    # Llama 3.x
    Transcript("llama", call(*KOELN, key="parameters"), Answer(calls=(KOELN,))),
    Transcript("llama", "<|python_tag|>" + call(*KOELN, key="parameters"), Answer(calls=(KOELN,))),
    Transcript("llama", f"{call(*KOELN)}; {call(*SAVE, key='parameters')}", Answer(calls=(KOELN, SAVE))),
    Transcript("llama", "It is {warm}.", Answer("It is {warm}.")),
    Transcript("llama", '{"answer": 42}', Answer('{"answer": 42}')),
    Transcript("llama", f"{call(*KOELN)} is the call", Answer(" is the call", (KOELN,))),
    # Mistral
    Transcript("mistral", f"[TOOL_CALLS]{TWO}", Answer(calls=(KOELN, SAVE))),
    Transcript("mistral", f'[TOOL_CALLS] [{call(*KOELN)[:-1]}, "id": "abcdefghi"}}]', Answer(calls=(KOELN,))),
    Transcript("mistral", "Yes.[TOOL_CALLS]get_weather[ARGS]" + KOELN[1], Answer("Yes.", (KOELN,))),
    Transcript(
        "mistral",
        f"[TOOL_CALLS]get_weather[CALL_ID]abc123xyz[ARGS]{KOELN[1]}[TOOL_CALLS]save[ARGS]{SAVE[1]}",
        Answer(calls=(KOELN, SAVE)),
    ),
    Transcript("mistral", "[TOOL_CALLS]get_weather" + KOELN[1], Answer(calls=(KOELN,))),
    Transcript("mistral", "[TOOL_CALLS]what is this", Answer("[TOOL_CALLS]what is this")),
    Transcript("mistral", "[TOOL_CALLS]now[ARGS]{a}", Answer("[TOOL_CALLS]now[ARGS]{a}")),
    Transcript("mistral", "[THINK]Hm.[/THINK]Hello", Answer("Hello", reasoning="Hm."), ("[THINK]", "[/THINK]")),
    # Gemma
    Transcript(
        "gemma", '<|tool_call>call:get_weather{place:<|"|>Köln<|"|>,days:2}<tool_call|>', Answer(calls=(KOELN,))
    ),
    Transcript(
        "gemma",
        'One\n<|tool_call>call:save{tags:[1,<|"|>x, }<|"|>,{<|"|>k<|"|>:null}],text:<|"|><|"|>}<tool_call|>'
        "<|tool_call>call:now{}<tool_call|>",
        Answer("One", (("save", '{"tags": [1, "x, }", {"k": null}], "text": ""}'), NOW)),
    ),
    Transcript(
        "gemma",
        "<start_function_call>call:get_weather{place:<escape>Köln<escape>,days:2}<end_function_call>",
        Answer(calls=(KOELN,)),
    ),
    Transcript("gemma", f"<|tool_call>call:get_weather{KOELN[1]}<tool_call|>", Answer(calls=(KOELN,))),
    Transcript("gemma", "<|tool_call>call:now{a:}<tool_call|>", Answer("<|tool_call>call:now{a:}<tool_call|>")),
    Transcript(
        "gemma",
        "<|channel>thought\nHm.<channel|>Hello",
        Answer("Hello", reasoning="Hm."),
        ("<|channel>thought\n", "<channel|>"),
    ),
    # gpt-oss
    Transcript(
        "harmony",
        f"{CHANNEL}analysis<|message|>Need weather.<|end|><|start|>assistant{CHANNEL}commentary "
        f"to=functions.get_weather <|constrain|>json<|message|>{KOELN[1]}",
        Answer(calls=(KOELN,), reasoning="Need weather."),
    ),
    Transcript(
        "harmony", f" to=functions.save{CHANNEL}commentary json<|message|>{SAVE[1]}<|call|>", Answer(calls=(SAVE,))
    ),
    Transcript(
        "harmony",
        f"{CHANNEL}analysis<|message|>A < B<|end|><|start|>assistant{CHANNEL}final<|message|>Warm <b>.",
        Answer("Warm <b>.", reasoning="A < B"),
    ),
    Transcript(
        "harmony",
        f"{CHANNEL}commentary<|message|>I look.<|end|><|start|>assistant{CHANNEL}commentary to=functions.now"
        "<|message|>{}",
        Answer("I look.", (NOW,)),
    ),
    Transcript("harmony", "No channel", Answer("No channel")),
    Transcript(
        "harmony",
        f"{CHANNEL}commentary to=functions.now<|message|>{{a",
        Answer(f"{CHANNEL}commentary to=functions.now<|message|>{{a"),
    ),
    # Phi
    Transcript("phi", f"<|tool_call|>{TWO}<|/tool_call|>", Answer(calls=(KOELN, SAVE))),
    Transcript("phi", f"functools[{call(*KOELN)}]", Answer(calls=(KOELN,))),
    Transcript("phi", "I use functools daily", Answer("I use functools daily")),
    # Granite
    Transcript("granite", f"<|tool_call|>{TWO}", Answer(calls=(KOELN, SAVE))),
    Transcript("granite", f"<|tool_call|> {call(*KOELN)}", Answer(calls=(KOELN,))),
    Transcript("granite", "<|tool_call|>[]", Answer("")),
    # LFM2
    Transcript(
        "lfm2", '<|tool_call_start|>[get_weather(place="Köln", days=2)]<|tool_call_end|>', Answer(calls=(KOELN,))
    ),
    Transcript(
        "lfm2",
        "<|tool_call_start|>[save(text='it\\'s', tags=[true, None, {'a': -1.5}]), now()]<|tool_call_end|>Looking.",
        Answer("Looking.", (("save", '{"text": "it\'s", "tags": [true, null, {"a": -1.5}]}'), NOW)),
    ),
    Transcript("lfm2", f"<|tool_call_start|>{TWO}<|tool_call_end|>", Answer(calls=(KOELN, SAVE))),
    Transcript(
        "lfm2", "<|tool_call_start|>[now(1)]<|tool_call_end|>", Answer("<|tool_call_start|>[now(1)]<|tool_call_end|>")
    ),
    Transcript(
        "lfm2",
        "<|tool_call_start|>[__import__('os')]<|tool_call_end|>",
        Answer("<|tool_call_start|>[__import__('os')]<|tool_call_end|>"),
    ),
    # no form of its own
    Transcript("generic", f'{{"tool_calls": {TWO}}}', Answer(calls=(KOELN, SAVE))),
    Transcript("generic", f'```json\n{{"tool_calls": [{call(*KOELN)}]}}\n```', Answer(calls=(KOELN,))),
    Transcript("generic", call(*KOELN), Answer(calls=(KOELN,))),
    Transcript("generic", TWO, Answer(calls=(KOELN, SAVE))),
    Transcript("generic", "```json\n{}\n```", Answer("```json\n{}\n```")),
    Transcript("generic", '{"tool_calls": "none"}', Answer('{"tool_calls": "none"}')),
    Transcript("generic", '{"tool_calls": [{"name": "x"}]}', Answer('{"tool_calls": [{"name": "x"}]}')),
    Transcript("generic", '{"tool', Answer('{"tool')),
    Transcript("generic", " Hello\n", Answer(" Hello\n")),
    Transcript("generic", "", Answer("")),
]


def read(transcript: Transcript, pieces: list[str], **options: Any) -> Answer:
    """Return what a parser reads in these pieces; checks that arguments follow calls."""
    parser = AnswerParser(transcript.form, transcript.reasoning, SCHEMAS, prompt_end=transcript.prompt_end, **options)
    events = [event for piece in pieces for event in parser.feed(piece)] + parser.close()
    return gathered(events)


def gathered(events: list[Event]) -> Answer:
    texts: dict[type, str] = {Text: "", Reasoning: ""}
    calls: list[list[str]] = []
    for event in events:
        if isinstance(event, CallBegin):
            calls.append([event.name, ""])
        elif isinstance(event, CallArguments):
            calls[-1][1] += event.text
        else:
            texts[type(event)] += event.text
    return Answer(texts[Text], tuple((name, arguments) for name, arguments in calls), texts[Reasoning])
