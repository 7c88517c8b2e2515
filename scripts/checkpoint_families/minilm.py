"""all-MiniLM-L6-v2: a real embedding model, and not a random one."""

from embedding_checkpoint import write_embedding_checkpoint

WHAT = "all-MiniLM-L6-v2 as published: f32 source, rows of 384, WordPiece, pooling by the mean, model card"
PRE = None
write_checkpoint = write_embedding_checkpoint
