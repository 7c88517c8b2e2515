// The chat page: one conversation, kept for this tab; answers are streamed and can be stopped.

import { Clock } from "./clock.js";
import { draw } from "./markdown.js";
import { errorOf, streamChat } from "./sse.js";

const STORE = "pestle-chat";
const LOADING_POLL_MS = 1000;
const LOST_POLL_MS = 2500;
const NEAR_BOTTOM_PX = 48;

const at = (id) => document.getElementById(id);
const [log, scroll, prompt, send, banner] = ["log", "scroll", "prompt", "send", "banner"].map(at);

/** @type {{role: string, content: string, reasoning?: string, note?: string}[]} */
let turns = [];
let model = "";
let ready = false;
let answering = null;
let pollTimer = 0;
let followsEnd = true;

// --- Is the server there? ---

async function checkHealth() {
  clearTimeout(pollTimer);
  try {
    const response = await fetch("health", { cache: "no-store" });
    if (response.ok) {
      await learnModel();
      setReady(true);
      return;
    }
    const error = await errorOf(response);
    setReady(false, response.status === 503 ? error.message || "The model is loading." : error.message, response.status === 503);
    pollTimer = setTimeout(checkHealth, LOADING_POLL_MS);
  } catch {
    setReady(false, "The server can't be reached. Trying again.");
    pollTimer = setTimeout(checkHealth, LOST_POLL_MS);
  }
}

async function learnModel() {
  const response = await fetch("v1/models", { cache: "no-store" });
  if (!response.ok) throw await errorOf(response);
  model = (await response.json()).data?.[0]?.id ?? "";
  at("model").textContent = model;
  at("model").title = model;
  at("model").hidden = !model;
  document.title = model ? `${model} · Pestle` : "Pestle";
}

function setReady(isReady, words = "", isWaiting = false) {
  ready = isReady;
  if (banner.textContent !== words) banner.textContent = words;
  banner.hidden = isReady;
  banner.classList.toggle("waiting", isWaiting);
  refreshButtons();
}

// --- Drawing ---

function element(tag, className, text = "") {
  const node = document.createElement(tag);
  node.className = className;
  node.textContent = text;
  return node;
}

function drawTurn(turn) {
  const node = element("article", `turn ${turn.role}`);
  node.setAttribute("aria-label", turn.role === "user" ? "You" : model || "Answer");
  const body = element("div", "body");
  node.append(body);
  if (turn.role === "user") {
    body.textContent = turn.content;
  } else {
    const meta = element("footer", "meta");
    meta.append(element("span", "stats", turn.note ?? ""));
    node.append(meta);
    if (turn.content) {
      draw(body, turn.content);
      meta.append(copyButton(turn));
    }
    if (turn.reasoning) drawReasoning(node, turn.reasoning);
  }
  log.append(node);
  at("welcome").hidden = true;
  return node;
}

function drawReasoning(node, text) {
  let details = node.querySelector("details");
  if (!details) {
    details = element("details", "reasoning");
    details.append(element("summary", "", "Reasoning"), element("div", "reasoning-text"));
    node.prepend(details);
  }
  details.lastChild.textContent = text;
}

function copyButton(turn) {
  const button = element("button", "quiet small", "Copy");
  button.type = "button";
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(turn.content);
    button.textContent = "Copied";
    setTimeout(() => (button.textContent = "Copy"), 1500);
  });
  return button;
}

function drawError(node, error, canRetry) {
  const box = element("div", "problem");
  box.setAttribute("role", "alert");
  box.append(element("p", "", error.message));
  if (canRetry) {
    const again = element("button", "quiet small", "Try again");
    again.type = "button";
    again.addEventListener("click", () => {
      if (answering || !ready) return;
      node.remove();
      answer();
    });
    box.append(again);
  }
  node.append(box);
}

function refreshButtons() {
  const label = answering ? "Stop" : "Send";
  send.classList.toggle("stopping", Boolean(answering));
  send.setAttribute("aria-label", label);
  send.title = answering ? "Stop (Esc)" : "Send (Enter)";
  send.disabled = !answering && (!ready || !prompt.value.trim());
  at("new-chat").hidden = turns.length === 0;
}

function fitPrompt() {
  prompt.style.height = "auto";
  prompt.style.height = `${prompt.scrollHeight}px`;
}

// --- Scrolling: follow the end, unless the reader has gone up ---

const isAtEnd = () => scroll.scrollHeight - scroll.scrollTop - scroll.clientHeight < NEAR_BOTTOM_PX;

function toEnd() {
  followsEnd = true;
  scroll.scrollTop = scroll.scrollHeight;
  at("latest").hidden = true;
}

function followEnd() {
  if (followsEnd) scroll.scrollTop = scroll.scrollHeight;
  at("latest").hidden = followsEnd || isAtEnd();
}

// --- Answers ---

const END_WORDS = { length: "stopped at the length limit", content_filter: "stopped by a filter" };

async function answer() {
  const messages = turns.map(({ role, content }) => ({ role, content }));
  const turn = { role: "assistant", content: "", reasoning: "", note: "" };
  const node = drawTurn(turn);
  const [body, stats] = [node.querySelector(".body"), node.querySelector(".stats")];
  const clock = new Clock();
  let frame = 0;
  let ending = "";
  let failure = null;
  const paint = () => {
    frame = 0;
    draw(body, turn.content);
    if (turn.reasoning) drawReasoning(node, turn.reasoning);
    stats.textContent = [clock.words(), ending].filter(Boolean).join(" · ");
    followEnd();
  };
  answering = new AbortController();
  node.classList.add("busy");
  node.setAttribute("aria-busy", "true");
  at("announce").textContent = "Answering";
  refreshButtons();
  toEnd();
  try {
    for await (const piece of streamChat({ model, messages, signal: answering.signal })) {
      turn.content += piece.text;
      turn.reasoning += piece.reasoning;
      clock.tick(piece.usage, Boolean(piece.text || piece.reasoning));
      ending = END_WORDS[piece.finish] ?? ending;
      frame ||= requestAnimationFrame(paint);
    }
    if (!turn.content && !turn.reasoning) ending = "the model said nothing";
  } catch (error) {
    if (error.name === "AbortError") ending = "stopped";
    else failure = error;
  }
  cancelAnimationFrame(frame);
  paint();
  finish(turn, node, failure);
}

function finish(turn, node, failure) {
  answering = null;
  node.classList.remove("busy");
  node.removeAttribute("aria-busy");
  if (!node.isConnected) {
    refreshButtons();
    return;
  }
  turn.note = node.querySelector(".stats").textContent;
  if (turn.content) {
    turns.push(turn);
    node.querySelector(".meta").append(copyButton(turn));
  }
  if (failure) {
    const unreachable = failure instanceof TypeError;
    const told = unreachable ? new Error("The connection to the server was lost.") : failure;
    drawError(node, told, !turn.content);
    if (unreachable || failure.status === 503) checkHealth();
  }
  at("announce").textContent = failure ? "" : "Answer complete";
  keep();
  refreshButtons();
  followEnd();
}

function ask(text) {
  const content = text.trim();
  if (!content || answering || !ready) return;
  // A question without an answer (it failed, or was stopped at once) gives way: templates want turns to alternate.
  if (turns.at(-1)?.role === "user") turns.pop();
  const turn = { role: "user", content };
  turns.push(turn);
  drawTurn(turn);
  prompt.value = "";
  fitPrompt();
  keep();
  answer();
}

function newChat() {
  answering?.abort();
  turns = [];
  log.replaceChildren();
  at("welcome").hidden = false;
  at("latest").hidden = true;
  keep();
  refreshButtons();
  prompt.focus();
}

// --- This tab's memory: a reload keeps the conversation ---

function keep() {
  try {
    sessionStorage.setItem(STORE, JSON.stringify(turns));
  } catch {
    // Private windows and full stores: the page works without.
  }
}

function restore() {
  try {
    turns = JSON.parse(sessionStorage.getItem(STORE)) ?? [];
  } catch {
    turns = [];
  }
  turns.forEach(drawTurn);
  toEnd();
}

// --- Wiring ---

at("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (answering) answering.abort();
  else ask(prompt.value);
});
prompt.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  ask(prompt.value);
});
prompt.addEventListener("input", () => {
  fitPrompt();
  refreshButtons();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answering?.abort();
});
scroll.addEventListener("scroll", () => {
  followsEnd = isAtEnd();
  if (followsEnd) at("latest").hidden = true;
});
at("latest").addEventListener("click", toEnd);
at("new-chat").addEventListener("click", newChat);
at("welcome").addEventListener("click", (event) => {
  const idea = event.target.closest("[data-idea]")?.dataset.idea;
  if (!idea) return;
  if (ready) {
    ask(idea);
  } else {
    prompt.value = idea;
    fitPrompt();
  }
  // The button is gone; on a touch screen the focus would raise the keyboard.
  if (matchMedia("(pointer: fine)").matches) prompt.focus();
});

restore();
fitPrompt();
refreshButtons();
checkHealth();
