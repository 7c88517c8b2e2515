// A small, safe subset of Markdown: fenced code, inline code, bold, italic, headings, lists, quotes, rules. It builds
// nodes and sets textContent only; nothing a model writes is ever parsed as HTML.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const INLINE = /(`+)([\s\S]*?[^`])\1(?!`)|\*\*(?=\S)([\s\S]*?\S)\*\*|(?<![\w*])\*(?=[^\s*])([^*\n]*?[^\s*])\*(?![\w*])/g;

/** Cut text into blocks: {kind, source, ...}. Two equal sources of a kind draw the same node. */
export function splitBlocks(text) {
  const lines = text.split("\n");
  const blocks = [];
  let at = 0;
  const gather = (kind, belongs) => {
    const start = at;
    while (at < lines.length && belongs(lines[at], at - start)) at += 1;
    blocks.push({ kind, source: lines.slice(start, at).join("\n") });
  };
  while (at < lines.length) {
    const line = lines[at];
    if (!line.trim()) at += 1;
    else if (FENCE.test(line)) at = takeFence(lines, at, blocks);
    else if (HEADING.test(line)) gather("heading", (_, index) => index === 0);
    else if (RULE.test(line)) gather("rule", (_, index) => index === 0);
    else if (QUOTE.test(line)) gather("quote", (next) => QUOTE.test(next));
    else if (ITEM.test(line)) gather("list", (next) => ITEM.test(next) || /^\s+\S/.test(next));
    else gather("paragraph", (next, index) => index === 0 || (next.trim() && !startsBlock(next)));
  }
  return blocks;
}

function startsBlock(line) {
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || ITEM.test(line);
}

function takeFence(lines, start, blocks) {
  const [, fence, language] = FENCE.exec(lines[start]);
  let end = start + 1;
  while (end < lines.length && !(lines[end].trim().startsWith(fence) && /^\s*[`~]+\s*$/.test(lines[end]))) end += 1;
  // No end yet: the model is still writing it.
  blocks.push({ kind: "code", language, source: lines.slice(start + 1, end).join("\n"), open: end >= lines.length });
  return end + 1;
}

/** Draw text into `parent`, keeping the nodes of blocks that have not changed, and with them selection and focus. */
export function draw(parent, text) {
  const blocks = splitBlocks(text);
  const before = parent.drawnBlocks ?? [];
  let same = 0;
  while (same < blocks.length && same < before.length && isSame(blocks[same], before[same])) same += 1;
  const [next, last] = [blocks[same], before[same]];
  if (next?.kind === "code" && last?.kind === "code" && next.language === last.language) {
    // Code that grows keeps its node, so that its own scrolling stays where it is.
    parent.childNodes[same].querySelector("code").textContent = next.source;
    same += 1;
  }
  while (parent.childNodes.length > same) parent.lastChild.remove();
  for (const block of blocks.slice(same)) parent.append(nodeOf(block));
  parent.drawnBlocks = blocks;
}

function isSame(one, other) {
  return one.kind === other.kind && one.source === other.source && one.language === other.language;
}

function nodeOf({ kind, source, language }) {
  if (kind === "code") return codeBlock(source, language);
  if (kind === "rule") return document.createElement("hr");
  if (kind === "list") return list(source.split("\n"));
  if (kind === "quote") return withInline("blockquote", source.split("\n").map((line) => line.replace(QUOTE, "")).join("\n"));
  if (kind === "heading") {
    const [, marks, words] = HEADING.exec(source);
    return withInline(`h${Math.min(6, marks.length + 2)}`, words);
  }
  return withInline("p", source);
}

function codeBlock(source, language) {
  const figure = document.createElement("figure");
  figure.className = "code";
  const caption = document.createElement("figcaption");
  caption.textContent = language || "text";
  const code = document.createElement("code");
  code.textContent = source;
  const pre = document.createElement("pre");
  pre.tabIndex = 0;
  pre.append(code);
  figure.append(caption, pre);
  return figure;
}

/** Lists nest by indentation; a line that is no item belongs to the item before it. */
function list(lines) {
  const [, firstIndent, firstMark] = ITEM.exec(lines[0]);
  const parent = document.createElement(/\d/.test(firstMark) ? "ol" : "ul");
  if (parent.tagName === "OL") parent.start = Number.parseInt(firstMark, 10);
  const depth = firstIndent.length;
  let at = 0;
  while (at < lines.length) {
    let words = ITEM.exec(lines[at])?.[3] ?? lines[at].trim();
    at += 1;
    const nested = [];
    while (at < lines.length) {
      const next = ITEM.exec(lines[at]);
      if (next ? next[1].length <= depth + 1 : nested.length === 0) {
        if (next) break;
        words += `\n${lines[at].trim()}`;
      } else {
        nested.push(lines[at]);
      }
      at += 1;
    }
    const item = withInline("li", words);
    if (nested.length) item.append(list(nested));
    parent.append(item);
  }
  return parent;
}

function withInline(tag, text) {
  const node = document.createElement(tag);
  appendInline(node, text);
  return node;
}

function appendInline(node, text) {
  let last = 0;
  for (const match of text.matchAll(INLINE)) {
    node.append(text.slice(last, match.index));
    const [whole, ticks, code, bold, italic] = match;
    const child = document.createElement(ticks ? "code" : bold ? "strong" : "em");
    if (ticks) child.textContent = code;
    else appendInline(child, bold ?? italic);
    node.append(child);
    last = match.index + whole.length;
  }
  node.append(text.slice(last));
}
