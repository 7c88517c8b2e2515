// Time to first token and tokens per second of one answer, as its reader sees them.

export class Clock {
  constructor() {
    this.started = performance.now();
    this.first = 0;
    this.last = 0;
    this.events = 0;
    this.usage = null;
  }

  /** Note a piece: its usage where it has one, and whether it bore text. */
  tick(usage, hasText) {
    this.usage = usage ?? this.usage;
    if (!hasText) return;
    this.last = performance.now();
    this.first ||= this.last;
    this.events += 1;
  }

  /** Put it in words; `~` marks a count of events, where the server has not counted tokens yet. */
  words() {
    if (!this.first) return "";
    const tokens = this.usage?.completion_tokens ?? this.events;
    const about = this.usage ? "" : "~";
    const seconds = (this.last - this.first) / 1000;
    const parts = [`${about}${tokens} ${tokens === 1 ? "token" : "tokens"}`];
    if (tokens > 1 && seconds > 0) parts.unshift(`${about}${((tokens - 1) / seconds).toFixed(1)} tokens/s`);
    parts.push(`first token after ${duration(this.first - this.started)}`);
    return parts.join(" · ");
  }
}

const duration = (ms) => (ms < 1000 ? `${Math.round(ms)} ms` : `${(ms / 1000).toFixed(1)} s`);
