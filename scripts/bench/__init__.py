"""The load generator's rooms: client (wire), workload (prompts), load (loops), report (figures), peer (paired runs)."""
