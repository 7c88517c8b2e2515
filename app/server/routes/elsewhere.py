"""OpenAI's routes for what Pestle does not do: each gets an honest 404 in place of a riddle."""

_NOT_DONE = {
    "assistants": "assistants",
    "audio": "audio",
    "batches": "batches",
    "chatkit": "ChatKit",
    "containers": "containers",
    "conversations": "stored conversations",
    "edits": "edits",
    "evals": "evaluations",
    "files": "files",
    "fine_tuning": "fine-tuning",
    "images": "images",
    "moderations": "moderation",
    "organization": "organizations and their keys",
    "realtime": "realtime sessions",
    "skills": "skills",
    "threads": "assistants",
    "uploads": "uploads",
    "vector_stores": "vector stores",
    "videos": "videos",
}


def not_done(path: str) -> str | None:
    """Return what a path of OpenAI's is for, in words, if Pestle does not do it; None for every other path."""
    parts = path.strip("/").split("/")
    return _NOT_DONE.get(parts[1]) if len(parts) > 1 and parts[0] == "v1" else None
