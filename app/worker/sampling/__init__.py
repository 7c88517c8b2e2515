"""Drawing the next token of every row of a step's logits, in numpy, with the filters of llama.cpp's default chain."""
