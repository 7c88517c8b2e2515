"""The only door to llama.cpp: nothing else imports llama_cpp or opens a ggml library."""
