"use strict";
/*
 * The page itself: it shows the trace that an exported file carries, or sends the form's request to its server.
 *
 * A run is one POST to `events` per mode, whose server-sent events are the lines of a trace. Closing the connection
 * cancels it. `saveHtml` writes a run into a file like that of `nemodiff trace view`.
 */

const byId = (id) => document.getElementById(id);
const player = new Player(byId("player"));

/** Make lanes for runs and put them on the page. */
function layOut(runs) {
  const lanes = runs.map((run) => new Lane(run, (x) => player.seek(x)));
  byId("lanes").replaceChildren(...lanes.map((lane) => lane.element));
  byId("runs").hidden = !lanes.length;
  byId("runs").dataset.count = lanes.length;
  return lanes;
}

function showPrompts(lanes, together) {
  const key = ({ run }) => JSON.stringify(run.started?.prompt ?? null);
  const same = lanes.every((lane) => key(lane) === key(lanes[0]));
  if (same && !together) return;
  const places = same ? [[byId("shared-prompt"), lanes[0]]] : lanes.map((lane) => [lane.element.querySelector(".prompt-box"), lane]);
  for (const [place, lane] of places) {
    if (!lane.run.prompt.length) continue;
    place.hidden = false;
    place.querySelector(".prompt").replaceChildren(
      ...folded(lane.run.prompt).map((token) => {
        const span = document.createElement("span");
        span.textContent = token.text;
        if (token.special !== undefined) span.dataset.mark = token.special;
        return span;
      }),
    );
  }
}

/** The page of an exported trace. */
function showTrace(traces) {
  const lanes = layOut(runsOf(traces));
  const several = new Set(lanes.map((lane) => lane.run.mode)).size < lanes.length;
  lanes.forEach((lane, i) => {
    lane.draw(lane.run.passes.length + 1);
    if (several) lane.element.querySelector(".which").textContent = `request ${lane.run.started.request}`;
    if (!lane.run.finished) lane.element.querySelector(".status").textContent = "not finished";
  });
  showPrompts(lanes, true);
  player.open(lanes);
}

/** The page of a server. */
class LivePage {
  constructor(form) {
    this.form = form;
    this.abort = null;
    this.traces = [];
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      this.run();
    });
    form.addEventListener("keydown", (event) => {
      const composing = event.isComposing || event.keyCode === 229; // Safari ends a composition before this event
      if (event.key !== "Enter" || composing) return;
      const inPrompt = event.target === byId("prompt") && !event.shiftKey;
      if (!inPrompt && !event.ctrlKey && !event.metaKey) return;
      event.preventDefault();
      if (!event.repeat) form.requestSubmit();
    });
    byId("picture").addEventListener("change", (event) => {
      this.show([...event.target.files]);
      event.target.value = "";
    });
    form.addEventListener("paste", (event) => this.show([...event.clipboardData.files]));
    form.addEventListener("dragover", (event) => event.preventDefault());
    form.addEventListener("drop", (event) => {
      if (!event.dataTransfer.files.length) return;
      event.preventDefault();
      this.show([...event.dataTransfer.files]);
    });
    byId("cancel").addEventListener("click", () => this.abort?.abort());
    byId("save").addEventListener("click", () => this.save());
    byId("save").hidden = false;
  }

  headers() {
    const key = byId("key").value.trim();
    return { "Content-Type": "application/json", ...(key && { Authorization: `Bearer ${key}` }) };
  }

  /** The form as the body of a request; the server chooses a number that was left empty. */
  body() {
    const text = byId("prompt").value;
    const pictures = [...byId("pictures").querySelectorAll("img")].map(({ src }) => ({ type: "image_url", image_url: { url: src } }));
    const body = pictures.length
      ? { messages: [{ role: "user", content: [...pictures, { type: "text", text }] }] }
      : { prompt: text };
    for (const field of this.form.querySelectorAll("input[type=number]")) {
      if (field.value !== "") body[field.name] = field.valueAsNumber;
    }
    return body;
  }

  /** Put pictures before the prompt; a click takes one away. */
  show(files) {
    for (const file of files) {
      const reader = new FileReader();
      reader.addEventListener("load", () => {
        const button = document.createElement("button");
        button.type = "button";
        button.title = "Take this picture away";
        const picture = document.createElement("img");
        picture.src = reader.result;
        picture.alt = file.name;
        button.append(picture);
        button.addEventListener("click", () => button.remove());
        byId("pictures").append(button);
      });
      reader.readAsDataURL(file);
    }
  }

  /** Show one line under the form, as a note or as an error. */
  say(text, isError = false) {
    byId("note").textContent = isError ? "" : text;
    byId("error").textContent = isError ? text : "";
  }

  async run() {
    const modes = [...this.form.querySelectorAll("[name=mode]:checked")].map((box) => box.value);
    if (this.abort) return;
    if (!byId("prompt").value.trim()) return this.say("Type a prompt first.", true);
    if (!modes.length) return this.say("Choose at least one mode.", true);
    player.close();
    const runs = modes.map((mode) => Object.assign(new Run(mode), { mode }));
    this.traces = runs.map((run) => ({ name: run.name, events: [] }));
    const lanes = layOut(runs);
    lanes.forEach((lane) => lane.draw(0));
    this.abort = new AbortController();
    this.busy(true);
    let frame = 0;
    const redraw = () => {
      frame = 0;
      const going = lanes.filter((lane) => lane.run.started);
      for (const lane of lanes) lane.draw(lane.run.passes.length + (lane.run.finished ? 1 : 0), true);
      layBars(going, false, 24);
      for (const lane of going) lane.head(lane.run.passes.length);
    };
    const began = performance.now();
    await Promise.all(
      runs.map((run, i) =>
        this.follow(run, (event) => {
          this.traces[i].events.push(event);
          frame ||= requestAnimationFrame(redraw);
        }),
      ),
    );
    cancelAnimationFrame(frame);
    const quick = performance.now() - began < 3000;
    this.abort = null;
    this.busy(false);
    this.showEnd(runs);
    redraw();
    lanes.forEach((lane) => lane.draw(lane.run.passes.length + 1));
    player.open(lanes);
    const reducedMotion = matchMedia("(prefers-reduced-motion: reduce)").matches;
    if (quick && !reducedMotion && runs.every((run) => run.finished)) player.play(); // it was too fast to watch
  }

  /** Send one request and push its events into the run; at the end the run is finished, stopped or failed. */
  async follow(run, onEvent) {
    try {
      const response = await fetch("events", {
        method: "POST",
        headers: this.headers(),
        body: JSON.stringify({ ...this.body(), mode: run.mode }),
        signal: this.abort.signal,
      });
      if (!response.ok) {
        if (response.status === 401) byId("key-field").hidden = false;
        throw new Error(errorText(await response.json().catch(() => null)) ?? `the server answers ${response.status}`);
      }
      for await (const event of eventsOf(response.body)) {
        if (event.error) throw new Error(errorText(event) ?? "the server failed");
        if (event.event === "trace") byId("engine").textContent = event.engine;
        run.push(event);
        onEvent(event);
      }
      if (!run.finished) throw new Error("the answer broke off; see the server's log");
    } catch (error) {
      if (this.abort.signal.aborted) run.stopped = true;
      else run.error = error instanceof TypeError ? "no answer; is nemodiff serve running?" : error.message;
    }
  }

  busy(on) {
    byId("run").disabled = on;
    byId("cancel").hidden = !on;
    byId("lanes").ariaBusy = String(on);
    this.say(on ? "Running" : "");
  }

  /** Show how the runs ended in one line; an error that all of them share is shown once. */
  showEnd(runs) {
    const errors = [...new Set(runs.map((run) => run.error))];
    if (errors.length === 1 && errors[0]) {
      this.say(errors[0], true);
      layOut([]);
    } else if (runs.some((run) => run.stopped)) this.say("Cancelled");
    else this.say("Finished");
  }

  async save() {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([await saveHtml(this.traces)], { type: "text/html" }));
    link.download = "nemodiff-run.html";
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1e4);
  }
}

/** The message of an error object in one line. */
function errorText(body) {
  const error = body?.error;
  const text = typeof error === "string" ? error : error?.message;
  return text?.replace(/\s+/g, " ");
}

/** The JSON objects of a stream of server-sent events. */
async function* eventsOf(body) {
  let open = "";
  for await (const piece of body.pipeThrough(new TextDecoderStream())) {
    const blocks = (open + piece).split(/\r?\n\r?\n/);
    open = blocks.pop();
    for (const block of blocks) {
      const data = block.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      const text = data.map((line) => line.slice(5).trimStart()).join("\n");
      if (text && text !== "[DONE]") yield JSON.parse(text);
    }
  }
}

/** This page with its styles and scripts inside and traces in place of the form, as serving/http/page_export.py does. */
async function saveHtml(traces) {
  const read = async (path) => (await fetch(path)).text();
  const nonce = [...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("");
  const files = Object.fromEntries(
    await Promise.all(["page.css", "run.js", "lane.js", "player.js", "page.js"].map(async (f) => [f, await read(f)])),
  );
  const data = JSON.stringify(traces).replaceAll("<", "\\u003c");
  return (await read("."))
    .replace(/<!-{2} live -->.*?<!-{2} \/live -->/gs, "")
    .replaceAll("'self'", `'nonce-${nonce}'`)
    .replace(/<link rel="stylesheet" href="(.*?)">/g, (_, file) => `<style nonce="${nonce}">${files[file]}</style>`)
    .replace(/<script src="(.*?)"><\/script>/g, (_, file) => `<script nonce="${nonce}">${files[file]}<\/script>`)
    .replace(/(<script type="application\/json" id="trace">)/, (start) => start + data);
}

const trace = byId("trace").textContent.trim();
if (trace) showTrace(JSON.parse(trace));
else new LivePage(byId("request"));
