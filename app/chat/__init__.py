"""Pure text: how models write tool calls and reasoning, read while it streams. No I/O, no llama.cpp."""
