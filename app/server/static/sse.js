// Server-sent events from a fetch body. Handles characters and line ends split between reads, CRLF and CR, comments
// (heartbeats), and several data lines in one event.

/**
 * Yield the data of each event.
 * @param {ReadableStream<Uint8Array>} body
 */
export async function* readEvents(body) {
  const reader = body.getReader();
  const decoder = new TextDecoder();
  let unread = "";
  let data = [];

  function* take(final) {
    let start = 0;
    for (let at = 0; at < unread.length; at += 1) {
      const character = unread[at];
      if (character !== "\n" && character !== "\r") continue;
      // A CR at the very end may be half of a CRLF: wait for the next read.
      if (character === "\r" && at + 1 === unread.length && !final) break;
      const line = unread.slice(start, at);
      if (character === "\r" && unread[at + 1] === "\n") at += 1;
      start = at + 1;
      if (line === "") {
        if (data.length) yield data.join("\n");
        data = [];
      } else {
        takeLine(line);
      }
    }
    unread = unread.slice(start);
  }

  function takeLine(line) {
    if (line === "data") data.push("");
    else if (line.startsWith("data:")) data.push(line.slice(line[5] === " " ? 6 : 5));
  }

  try {
    for (;;) {
      const { done, value } = await reader.read();
      unread += done ? decoder.decode() : decoder.decode(value, { stream: true });
      yield* take(done);
      if (done) break;
    }
    // A last event without its blank line still counts: it may be the error that ended the stream.
    if (unread) takeLine(unread);
    if (data.length) yield data.join("\n");
  } finally {
    reader.cancel().catch(() => {});
  }
}

/** What the server said was wrong, with the HTTP status and the seconds after which to try again. */
export class ServerError extends Error {
  constructor(message, { status = 0, code = "", retryAfter = 0 } = {}) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

/** Read an error answer, whatever its form. */
export async function errorOf(response) {
  const text = await response.text().catch(() => "");
  const retryAfter = Number(response.headers.get("retry-after")) || 0;
  try {
    const { error } = JSON.parse(text);
    const message = typeof error === "string" ? error : error.message;
    return new ServerError(message, { status: response.status, code: error.code ?? "", retryAfter });
  } catch {
    const words = text.trim().slice(0, 300) || response.statusText;
    return new ServerError(`The server answered ${response.status}. ${words}`.trim(), { status: response.status, retryAfter });
  }
}

// Calmer than the API's default of 1, at which small models wander.
const SAMPLING = { temperature: 0.5, top_p: 0.95 };

/**
 * Ask for a chat completion and yield {text, reasoning, finish, usage} as they come.
 * Throws ServerError for what the server reports, TypeError when it can't be reached, AbortError when stopped.
 */
export async function* streamChat({ model, messages, signal }) {
  const response = await fetch("v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json", Accept: "text/event-stream" },
    body: JSON.stringify({ model, messages, ...SAMPLING, stream: true, stream_options: { include_usage: true } }),
    signal,
  });
  if (!response.ok) throw await errorOf(response);
  let finished = false;
  for await (const data of readEvents(response.body)) {
    if (data.trim() === "[DONE]") return;
    let event;
    try {
      event = JSON.parse(data);
    } catch {
      throw new ServerError("The server sent an event that is not JSON.");
    }
    if (event.error) throw new ServerError(event.error.message ?? String(event.error), { code: event.error.code ?? "" });
    const choice = event.choices?.[0];
    if (choice?.finish_reason) finished = true;
    yield {
      text: choice?.delta?.content ?? "",
      reasoning: choice?.delta?.reasoning_content ?? "",
      finish: choice?.finish_reason ?? null,
      usage: event.usage ?? null,
    };
  }
  if (!finished) throw new ServerError("The connection ended before the answer did.");
}
