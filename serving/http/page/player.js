"use strict";
/*
 * Scrubbing and replaying all runs together.
 *
 * The slider counts moments. By pass, moment n shows every run after its pass n. By time, each moment is the end of a
 * pass of one run, on clocks that start with each run. The last moment is the end, with the final figures.
 */

const SPEEDS = {
  pass: [[1, "1 pass/s"], [4, "4 passes/s"], [15, "15 passes/s"], [60, "60 passes/s"]],
  time: [[0.001, "1000 × slower"], [0.01, "100 × slower"], [0.1, "10 × slower"], [1, "real speed"]],
};
const LONGEST = 12; // seconds that a replay may take, if one of the speeds allows it

class Player {
  constructor(element) {
    this.element = element;
    const find = (selector) => element.querySelector(selector);
    this.slider = find("#moment");
    this.where = find("#where");
    this.button = find("#play");
    this.speed = find("#speed");
    this.lanes = [];
    this.times = [];
    this.frame = 0;
    this.slider.addEventListener("input", () => {
      this.pause();
      this.#draw();
    });
    this.button.addEventListener("click", () => (this.frame ? this.pause() : this.play()));
    window.addEventListener("resize", () => this.lanes.forEach((lane) => lane.reserve(false)));
    for (const radio of element.querySelectorAll("[name=by]")) {
      radio.addEventListener("change", () => {
        const end = this.moment === this.last;
        this.pause();
        this.#measure();
        this.go(end ? this.last : 0);
      });
    }
  }

  get byTime() {
    return this.element.querySelector("[name=by]:checked").value === "time";
  }

  get moment() {
    return this.slider.valueAsNumber;
  }

  get last() {
    return Number(this.slider.max);
  }

  /** Take lanes whose runs have ended and show their end. */
  open(lanes) {
    this.lanes = lanes.filter((lane) => lane.run.passes.length);
    this.element.hidden = !this.lanes.length;
    this.#measure();
    this.go(this.last);
    for (const lane of this.lanes) lane.reserve(true);
  }

  close() {
    this.pause();
    this.element.hidden = true;
    this.lanes = [];
  }

  go(moment) {
    this.slider.value = moment;
    this.#draw();
  }

  /** Show the moment at a place of the bars. */
  seek(x) {
    if (!this.lanes.length) return;
    this.pause();
    this.go(this.byTime ? countUpTo(this.times, x) + 1 : Math.ceil(x));
  }

  play() {
    const start = this.moment >= this.last ? 0 : this.moment;
    const speed = Number(this.speed.value);
    const from = this.byTime ? (this.times[start - 1] ?? 0) : start;
    let began = null;
    const tick = (now) => {
      began ??= now;
      const x = from + ((now - began) / 1e3) * speed;
      const moment = Math.min(this.last, this.byTime ? countUpTo(this.times, x) : Math.floor(x));
      if (moment !== this.moment) this.go(moment);
      if (moment >= this.last || (this.byTime && moment >= this.times.length)) {
        this.go(this.last);
        this.pause();
      } else {
        this.frame = requestAnimationFrame(tick);
      }
    };
    this.go(start);
    this.frame = requestAnimationFrame(tick);
    this.#label();
  }

  pause() {
    cancelAnimationFrame(this.frame);
    this.frame = 0;
    this.#label();
  }

  #label() {
    this.button.textContent = this.frame ? "Pause" : "Replay";
    this.element.dataset.playing = String(Boolean(this.frame));
  }

  #measure() {
    const runs = this.lanes.map((lane) => lane.run);
    this.times = [...new Set(runs.flatMap((run) => run.passes.map((pass) => pass.until)))].sort((a, b) => a - b);
    const passes = Math.max(0, ...runs.map((run) => run.passes.length));
    this.slider.max = (this.byTime ? this.times.length : passes) + 1;
    layBars(this.lanes, this.byTime);
    const length = this.byTime ? (this.times.at(-1) ?? 0) : passes;
    const speeds = SPEEDS[this.byTime ? "time" : "pass"];
    const preset = speeds.find(([rate]) => length / rate <= LONGEST) ?? speeds.at(-1);
    this.speed.replaceChildren(
      ...speeds.map(([rate, label]) => new Option(label, rate, rate === preset[0], rate === preset[0])),
    );
  }

  #draw() {
    const { moment, last, byTime } = this;
    const time = this.times[moment - 1] ?? 0;
    for (const lane of this.lanes) {
      const { passes } = lane.run;
      let pass = byTime ? countUpTo(lane.run.passes.map((p) => p.until), time) : moment;
      if (moment === last || (byTime && pass === passes.length && time > passes.at(-1).until)) pass = passes.length + 1;
      if (moment === 0) pass = 0;
      if (pass !== lane.drawn) lane.draw(Math.min(pass, passes.length + 1));
      lane.head(moment === last ? lane.extent : byTime ? time : Math.min(moment, lane.extent));
    }
    const text = byTime ? `${(time * 1e3).toFixed(1)} ms` : `pass ${moment} of ${last - 1}`;
    this.where.textContent = moment === last ? "end" : moment === 0 ? "start" : text;
    this.slider.setAttribute("aria-valuetext", this.where.textContent);
  }
}

/** How many of the sorted numbers are at most x. */
function countUpTo(sorted, x) {
  let low = 0;
  let high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] <= x) low = middle + 1;
    else high = middle;
  }
  return low;
}

/** Draw the bars of lanes on one scale, wide enough for at least `least` passes. */
function layBars(lanes, byTime, least = 1) {
  const runs = lanes.map((lane) => lane.run);
  const passes = runs.flatMap((run) => run.passes);
  const extent = byTime ? Math.max(...passes.map((p) => p.until), 0) : Math.max(...runs.map((r) => r.passes.length), least);
  const most = Math.max(1, ...passes.map((pass) => pass.fresh.length));
  for (const lane of lanes) lane.bars(byTime, extent || 1, most);
}
