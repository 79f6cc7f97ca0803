"use strict";
/*
 * One run on the page: its figures, its passes as bars, and its text as it stood after any pass.
 *
 * The elements of emitted tokens are made once and then only shown or hidden, so that scrubbing costs as much as what
 * changes. The model's text always goes in as text, never as markup.
 */

const MODES = {
  auto: "Automatic",
  ar: "Autoregressive",
  diffusion: "Diffusion",
  linear_spec: "Self-speculation",
  quadratic_spec: "Quadratic self-speculation",
};
const ENDS = { stop: "finished", length: "token limit reached", cancelled: "cancelled" };
const KINDS = {
  prefill: "reads the prompt",
  decode: "decides the next token",
  denoise: "denoises the block",
  draft: "drafts a block",
  commit: "commits the block",
};
const MANY_SPECIAL = 6; // tokens of a prompt in a row that are not all shown
const LEVELS = [0.5, 0.7, 0.9, 0.99]; // least confidence of the colours c1 to c4; page.css has c0 too

class Lane {
  /** `seek(x)` is called when the reader clicks on the bars, with the place in their unit. */
  constructor(run, seek) {
    this.run = run;
    this.element = document.getElementById("lane").content.cloneNode(true).firstElementChild;
    const find = (selector) => this.element.querySelector(selector);
    this.answer = find(".answer");
    this.tail = find(".tail");
    this.strip = find(".strip");
    this.readout = find(".readout");
    this.text = find(".text");
    this.visible = 0; // emitted tokens that are shown
    this.marked = []; // of these, those that the pass on show decided
    this.chosen = null; // the token that the readout describes
    this.drawn = -1;
    this.strip.addEventListener("pointerdown", (event) => {
      const box = this.strip.getBoundingClientRect();
      seek(((event.clientX - box.left) / box.width) * this.extent);
    });
    this.text.addEventListener("pointerover", (event) => this.#choose(event.target.closest(".token")));
    this.text.addEventListener("keydown", (event) => this.#key(event));
    this.text.addEventListener("blur", () => this.#choose(null));
  }

  /** Show the run after a pass: 0 is before the first pass, one more than the number of passes is the end. */
  draw(pass, follow = false) {
    const run = this.run;
    const at = run.passes[pass - 1];
    const emitted = pass > run.passes.length ? run.answer.length : (at?.emitted ?? 0);
    while (this.answer.childElementCount < run.answer.length) {
      this.answer.append(this.#token(run.answer[this.answer.childElementCount]));
    }
    const spans = this.answer.children;
    for (let i = this.visible; i < emitted; i++) spans[i].hidden = false;
    for (let i = emitted; i < this.visible; i++) spans[i].hidden = true;
    this.visible = emitted;
    for (const span of this.marked) span.classList.remove("fresh", "kept");
    this.marked = (at?.fresh ?? []).filter((i) => i < emitted && run.answer[i].pass === pass).map((i) => spans[i]);
    for (const span of this.marked) span.classList.add("fresh", ...(span.token.kept ? ["kept"] : []));
    const tail = (at?.tail ?? []).map((token) => this.#token(token, pass));
    this.tail.replaceChildren(...(pass > run.passes.length ? [] : tail));
    this.#figures(pass);
    this.drawn = pass;
    if (follow) this.text.scrollTop = this.text.scrollHeight;
    else this.#reveal();
  }

  /** Keep the current height of the text, so that scrubbing moves nothing below it. */
  reserve(keep) {
    this.text.style.minHeight = keep ? `${this.text.offsetHeight}px` : "";
  }

  /** Draw the bars. extent: the value at the right edge, in passes or seconds. most: the tokens of the highest bar. */
  bars(byTime, extent, most) {
    const paths = { reads: "", proposes: "", decides: "" };
    const height = (n) => Math.log2(1 + n) / Math.log2(1 + most);
    this.run.passes.forEach((pass, i) => {
      const count = pass.fresh.length;
      const [x, width] = byTime ? [pass.from, pass.until - pass.from] : [i, 1];
      const gap = extent > 300 * width ? 0 : width * 0.14;
      const high = Math.max(0.06, height(count));
      const path = pass.kind === "prefill" ? "reads" : pass.kind === "draft" ? "proposes" : "decides";
      paths[path] += `M${x} 1v${-high}h${width - gap}v${high}z`;
    });
    for (const [name, path] of Object.entries(paths)) this.strip.querySelector(`.${name}`).setAttribute("d", path);
    this.extent = extent;
    this.strip.setAttribute("viewBox", `0 0 ${extent} 1`);
    this.strip.setAttribute("aria-label", `Tokens that each of ${this.run.passes.length} passes decided or proposed`);
  }

  /** Mark the moment on show, in the unit of the bars. */
  head(x) {
    const line = this.strip.querySelector(".head");
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
  }

  #token(token, pass = null) {
    const span = document.createElement("span");
    span.token = token;
    span.className = `token ${token.state ?? "final"}`;
    span.textContent = token.text;
    if (pass === null) span.hidden = true;
    else if (token.pass === pass && token.state !== "mask") span.classList.add("fresh");
    if (token.special !== undefined) span.dataset.mark = token.special;
    if (token.cut) span.dataset.mark = token.cut;
    if (token.confidence !== null && token.special === undefined) {
      span.classList.add(`c${LEVELS.filter((bound) => token.confidence >= bound).length}`);
    }
    return span;
  }

  #figures(pass) {
    const { run } = this;
    const metrics = run.metrics(pass);
    for (const cell of this.element.querySelectorAll("[data-figure]")) {
      const value = metrics[cell.dataset.figure];
      cell.dataset.value = value ?? "";
      cell.textContent = formatFigure(cell.dataset.figure, value);
    }
    const at = run.passes[pass - 1];
    const kinds = Object.entries(metrics.nfe).filter(([, count]) => count);
    let line = kinds.map(([kind, count]) => `${count} ${kind}`).join(", ") || "no pass yet";
    if (at) {
      const verdict = `${at.kept} drafted kept, ${at.refused} refused`;
      line = `Pass ${pass}, ${at.kind}: ${at.kind === "verify" ? verdict : KINDS[at.kind]}`;
    }
    this.element.querySelector(".pass").textContent = line;
    const status = this.element.querySelector(".status");
    const state = run.error
      ? "failed"
      : run.finished
        ? ENDS[run.finished.generation.finish_reason]
        : run.stopped
          ? "cancelled"
          : run.started
            ? "running"
            : "waiting";
    if (status.textContent !== state) status.textContent = state;
    this.element.dataset.state = run.ended ? "ended" : "open";
    const name = this.element.querySelector(".mode");
    if (!name.textContent && run.mode) {
      name.textContent = MODES[run.mode] ?? run.mode;
      this.element.setAttribute("aria-label", `${MODES[run.mode] ?? run.mode}, run`);
    }
    const error = this.element.querySelector(".error");
    error.hidden = !run.error;
    if (error.textContent !== run.error) error.textContent = run.error;
    if (run.finished) this.#notes(run.finished.generation);
  }

  /** What stands beside the text of a finished run: its calls, and what of the request was ignored. */
  #notes({ tool_calls: calls = [], warnings = [] }) {
    const lines = { calls: calls.map((call) => `${call.name} ${spaced(call.arguments)}`), warnings };
    for (const [name, texts] of Object.entries(lines)) {
      const list = this.element.querySelector(`.${name}`);
      if (list.childElementCount === texts.length) continue;
      list.hidden = false;
      list.replaceChildren(
        ...texts.map((text) => Object.assign(document.createElement("li"), { textContent: text })),
      );
    }
  }

  /** Scroll only the text, so that its newest token is visible. */
  #reveal() {
    const last = this.tail.lastElementChild ?? this.answer.children[this.visible - 1];
    if (!last || this.text.scrollHeight <= this.text.clientHeight) return;
    const top = last.offsetTop - this.text.offsetTop;
    const { scrollTop, clientHeight } = this.text;
    if (top < scrollTop + 8 || top + last.offsetHeight > scrollTop + clientHeight - 8) {
      this.text.scrollTop = top - clientHeight * 0.7;
    }
  }

  #key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    const tokens = [...this.text.querySelectorAll(".token:not([hidden])")];
    const now = tokens.indexOf(this.chosen);
    const last = tokens.length - 1;
    const next = now < 0 ? (step > 0 ? 0 : last) : Math.max(0, Math.min(last, now + step));
    this.#choose(tokens[next] ?? null);
  }

  #choose(span) {
    this.chosen?.classList.remove("chosen");
    this.chosen = span;
    span?.classList.add("chosen");
    this.readout.textContent = span ? describe(span.token) : "";
  }
}

/** The arguments of a call with space in them; those of a call that was cut as they are. */
function spaced(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text;
  }
}

/** A prompt's tokens; of many special ones in a row, which are an image's, the first, their number and the last. */
function folded(tokens) {
  const shown = [];
  for (let i = 0; i < tokens.length; i++) {
    shown.push(tokens[i]);
    let end = i;
    while (end < tokens.length && tokens[end].special !== undefined) end++;
    if (end - i < MANY_SPECIAL) continue;
    shown.push({ special: `${end - i - 2}\u00a0more`, text: "" });
    i = end - 2; // the last one is next
  }
  return shown;
}

/** A token in words: its text, confidence and pass. */
function describe(token) {
  if (token.state === "mask") return "undecided";
  const name = token.special ?? JSON.stringify(token.text + (token.cut ?? ""));
  if (token.state === "refused") return `${name}: draft, refused by verify`;
  const parts = [];
  if (token.confidence !== null) parts.push(`confidence ${token.confidence.toFixed(3)}`);
  if (token.kind) parts.push(`${token.state === "draft" ? "drafted" : "decided"} in pass ${token.pass} (${token.kind})`);
  if (token.kept) parts.push("draft, kept");
  if (token.cut) parts.push("after the stop string");
  return `${name}: ${parts.join(", ") || `token ${token.id}`}`;
}

/** A figure as text, with its unit. */
function formatFigure(figure, value) {
  if (value === null || value === undefined) return "–";
  if (figure === "ms") return value < 1000 ? `${value.toFixed(value < 100 ? 1 : 0)} ms` : `${(value / 1e3).toFixed(2)} s`;
  if (figure === "perSecond") return value.toFixed(value < 100 ? 1 : 0);
  return Number.isInteger(value) && ["tokens", "passes"].includes(figure) ? String(value) : value.toFixed(2);
}
