"use strict";
/*
 * One request, rebuilt from its events, which are those of `nemodiff run --trace`. Nothing here touches the page.
 *
 * `answer` holds the emitted tokens in order. `passes` holds a snapshot after each pass: how many tokens were emitted,
 * the tail after them (masks, drafts, refused drafts), and the counts so far. Emitted tokens never change.
 */

const FILLING = ["denoise", "draft"];

class Run {
  constructor(name = "") {
    this.name = name; // of its file
    this.mode = "";
    this.started = null;
    this.finished = null; // the Finished event
    this.error = ""; // one line if it failed
    this.stopped = false; // cancelled by the reader
    this.answer = [];
    this.passes = [];
    this.pieces = { text: {}, bytes: {}, special: {} };
    this.decided = new Map(); // tokens of causal passes that are not emitted yet, by index in the answer
    this.block = null; // { kind, start, cells }
    this.decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    this.nfe = {};
    this.verified = 0; // verify passes, and tokens they emitted
    this.accepted = 0;
  }

  push(event) {
    if (event.event === "started") {
      this.started = event;
      this.mode = event.mode;
    } else if (event.event === "pieces") {
      for (const kind of ["text", "bytes", "special"]) Object.assign(this.pieces[kind], event[kind]);
    } else if (event.event === "step") {
      this.#step(event);
    } else if (event.event === "finished") {
      this.#finish(event);
    }
  }

  get ended() {
    return Boolean(this.finished || this.error || this.stopped);
  }

  /** The prompt's tokens, if the events have them. */
  get prompt() {
    const tokens = (this.started?.prompt ?? []).map((id) => ({ id, special: this.pieces.special[id] }));
    return this.#spell(tokens);
  }

  /** Counts after a pass, 0 before the first; after the last pass those of the Finished event. */
  metrics(pass) {
    if (pass > this.passes.length && this.finished) return finalMetrics(this.finished.generation);
    const at = this.passes[Math.min(pass, this.passes.length) - 1];
    if (!at) return { tokens: 0, passes: 0, nfe: {}, perPass: null, perSecond: null, accepted: null, ms: 0 };
    const passes = Object.values(at.nfe).reduce((a, b) => a + b, 0);
    const decoding = passes - (at.nfe.prefill ?? 0);
    return {
      tokens: at.emitted,
      passes,
      nfe: at.nfe,
      perPass: decoding ? at.emitted / decoding : null,
      perSecond: at.until > 0 ? at.emitted / at.until : null,
      accepted: at.verified ? at.accepted / at.verified : null,
      ms: at.until * 1e3,
    };
  }

  #step(e) {
    const pass = this.passes.length + 1;
    const first = this.started.prompt_tokens;
    const fresh = [];
    const filling = FILLING.includes(e.kind);
    if (filling) this.#fill(e, pass);
    else this.block = null;
    for (const { position, token, confidence } of e.committed) {
      const index = position - first;
      const made = { id: token, special: this.pieces.special[token], confidence, pass, kind: e.kind, index };
      if (filling) this.block.cells[position - e.start] = made;
      else this.decided.set(index, made);
      fresh.push(index);
    }
    if (e.kind === "verify") {
      e.committed.slice(0, e.kept).forEach((c) => (this.decided.get(c.position - first).kept = true));
      this.verified += 1;
      this.accepted += e.committed.length;
    }
    this.#emit(e.emitted);
    this.nfe = { ...this.nfe, [e.kind]: (this.nfe[e.kind] ?? 0) + 1 };
    this.passes.push({
      kind: e.kind,
      emitted: this.answer.length,
      fresh,
      tail: this.#tail(e),
      kept: e.kept,
      refused: e.refused.length,
      nfe: this.nfe,
      verified: this.verified,
      accepted: this.accepted,
      from: e.at - this.started.at, // seconds since the request began
      until: e.at + e.seconds - this.started.at,
    });
  }

  /** Read the block before this pass: cells may have been closed after an end token, or forced by a grammar. */
  #fill(e, pass) {
    if (this.block?.start !== e.start || this.block.kind !== e.kind) {
      this.block = { kind: e.kind, start: e.start, cells: [] };
    }
    e.before.forEach((id, i) => {
      if (this.block.cells[i]?.id === id) return;
      const index = e.start + i - this.started.prompt_tokens;
      const known = this.decided.get(index); // decided by the pass that committed the block before
      if (known?.id === id) return (this.block.cells[i] = known);
      const mask = id === this.started.mask_id;
      const special = mask ? undefined : this.pieces.special[id];
      this.block.cells[i] = { id, mask, special, confidence: null, pass: pass - 1, index };
    });
  }

  #emit(count) {
    while (this.answer.length < count) {
      const index = this.answer.length;
      const cell = this.block?.cells[index + this.started.prompt_tokens - this.block.start];
      const token = this.decided.get(index) ?? (cell?.mask ? null : cell);
      if (!token) return; // it comes with the Finished event
      this.decided.delete(index);
      this.#append(token);
    }
  }

  #append(token) {
    token.text = token.special === undefined ? this.decoder.decode(this.#bytes(token.id), { stream: true }) : "";
    this.answer.push(token);
  }

  /** The next draft, if a deciding pass has made it too. */
  #proposed(e) {
    const first = this.started.prompt_tokens;
    const pass = this.passes.length + 1;
    return (e.proposed ?? []).map(({ position, token: id, confidence }) => ({
      id,
      special: this.pieces.special[id],
      confidence,
      pass,
      kind: e.kind,
      index: position - first,
      state: "draft",
    }));
  }

  #tail(e) {
    if (e.kind === "verify") {
      const refused = e.refused.map((id) => ({ id, special: this.pieces.special[id], confidence: null }));
      const drafts = upToEnd(refused).map((token) => ({ ...token, state: "refused" }));
      return [...this.#spell(drafts, true), ...this.#spell(this.#proposed(e), true)];
    }
    if (!this.block) return this.#spell(this.#proposed(e), true);
    const cells = this.block.cells.slice(this.answer.length + this.started.prompt_tokens - this.block.start);
    return this.#spell(
      upToEnd(cells).map((c) => ({ ...c, state: c.mask ? "mask" : e.kind === "draft" ? "draft" : "ahead" })),
      true,
    );
  }

  #finish(event) {
    this.finished = event;
    const { token_ids: ids, text } = event.generation;
    for (let index = this.answer.length; index < ids.length; index++) {
      this.#append({ id: ids[index], special: this.pieces.special[ids[index]], confidence: null, pass: null, index });
    }
    const last = this.passes.at(-1);
    if (last && FILLING.includes(last.kind)) last.tail = []; // masks after the end
    const rest = this.decoder.decode();
    if (rest && this.answer.length) this.answer.at(-1).text += rest;
    this.#cut(text.length);
  }

  /** Cut the text after a stop string; what is cut stays visible as a mark. */
  #cut(length) {
    let at = 0;
    for (const token of this.answer) {
      const keep = Math.max(0, Math.min(token.text.length, length - at));
      at += token.text.length;
      if (keep < token.text.length) {
        token.cut = token.text.slice(keep);
        token.text = token.text.slice(0, keep);
      }
    }
  }

  #bytes(id) {
    const hex = this.pieces.bytes[id];
    if (hex !== undefined) return Uint8Array.from(hex.match(/../g) ?? [], (digits) => parseInt(digits, 16));
    return new TextEncoder().encode(this.pieces.text[id] ?? `\u27e8${id}\u27e9`);
  }

  /** Give tokens in a row their text; characters spread over several belong to the last of them. */
  #spell(tokens, afterAnswer = false) {
    const decoder = new TextDecoder("utf-8", { ignoreBOM: true });
    if (afterAnswer) {
      let i = this.answer.length;
      while (i > 0 && this.answer[i - 1].special === undefined && !this.answer[i - 1].text) i--;
      for (; i < this.answer.length; i++) decoder.decode(this.#bytes(this.answer[i].id), { stream: true });
    }
    let open = null;
    for (const token of tokens) {
      if (token.mask || token.special !== undefined) {
        if (open) open.text += decoder.decode();
        token.text = "";
        open = null;
      } else {
        token.text = decoder.decode(this.#bytes(token.id), { stream: true });
        open = token;
      }
    }
    if (open) open.text += decoder.decode();
    return tokens;
  }
}

/** Tokens up to the first that ends the answer; those after it would not be emitted. */
function upToEnd(tokens) {
  const end = tokens.findIndex((token) => token.special !== undefined);
  return end < 0 ? tokens : tokens.slice(0, end + 1);
}

/** The figures of a finished request, as its Finished event has them. */
function finalMetrics(generation) {
  const tokens = generation.token_ids.length;
  const ms = generation.timings_ms.total;
  return {
    tokens,
    passes: Object.values(generation.nfe).reduce((a, b) => a + b, 0),
    nfe: generation.nfe,
    perPass: generation.decode_tpf,
    perSecond: ms > 0 ? (tokens / ms) * 1e3 : null,
    accepted: generation.acceptance.mean,
    ms,
  };
}

/** Runs from the events of traces, each `{ name, events }`: one run per request, in the order they began. */
function runsOf(traces) {
  return traces.flatMap(({ name, events }) => {
    const runs = new Map();
    for (const event of events.filter((e) => e.event !== "trace")) {
      if (!runs.has(event.request)) runs.set(event.request, new Run(name));
      runs.get(event.request).push(event);
    }
    return [...runs.values()].sort((a, b) => a.started.request - b.started.request);
  });
}
