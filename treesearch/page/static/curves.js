// A curve against NFE or seconds on a canvas.

import { colour, count, duration, figure } from "./dom.js";

const SIDE = { left: 60, right: 12, top: 10, bottom: 22 };

/** About `n` round numbers between two. */
export function ticks(low, high, n) {
  const rough = (high - low) / n || 1;
  const unit = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].find((k) => k * unit >= rough) * unit;
  const found = [];
  for (let at = Math.ceil(low / step); at * step <= high + step * 1e-9; at++) found.push(at * step);
  return found;
}

export class Curve {
  /** `steps`: the value holds until the next one. */
  constructor(canvas, told, { steps = false } = {}) {
    [this.canvas, this.told, this.steps] = [canvas, told, steps];
    [this.x, this.y, this.clock] = [[], [], false];
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("pointermove", (event) => this.point(event));
    canvas.addEventListener("pointerleave", () => this.point(null));
  }

  show(x, y, clock) {
    [this.x, this.y, this.clock] = [x, y, clock];
    this.draw();
  }

  draw() {
    if (this.frame) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.paint();
    });
  }

  px = (x) => SIDE.left + ((x - this.from) / (this.to - this.from)) * this.width;
  py = (y) => SIDE.top + (1 - (y - this.low) / (this.high - this.low)) * this.height;

  paint() {
    const ratio = window.devicePixelRatio || 1;
    const box = this.canvas.getBoundingClientRect();
    if (!box.width) return;
    [this.canvas.width, this.canvas.height] = [Math.round(box.width * ratio), Math.round(box.height * ratio)];
    const pen = this.canvas.getContext("2d");
    pen.scale(ratio, ratio);
    [this.width, this.height] = [box.width - SIDE.left - SIDE.right, box.height - SIDE.top - SIDE.bottom];
    const known = [];
    for (let i = 0; i < this.x.length; i++) if (this.y[i] !== null) known.push(i);
    this.known = known;
    if (!known.length) {
      this.told.textContent = "nothing yet";
      return;
    }
    this.frameOf(known);
    this.axes(pen);
    this.line(pen, known);
    this.say(known[known.length - 1], false);
    if (this.at !== undefined && this.at !== null) this.mark(pen);
  }

  frameOf(known) {
    let [low, high] = [Infinity, -Infinity];
    for (const i of known) [low, high] = [Math.min(low, this.y[i]), Math.max(high, this.y[i])];
    const room = (high - low) * 0.06 || Math.abs(high) * 0.1 || 0.5;
    [this.low, this.high] = [low - room, high + room];
    this.from = 0;
    this.to = this.x[this.x.length - 1] || 1;
  }

  axes(pen) {
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    for (const y of ticks(this.low, this.high, this.height / 34)) {
      pen.fillStyle = colour("faint");
      pen.fillRect(SIDE.left, Math.round(this.py(y)), this.width, 1);
      pen.fillStyle = colour("pale");
      pen.textAlign = "right";
      pen.fillText(figure(y, 3), SIDE.left - 8, this.py(y));
    }
    pen.fillStyle = colour("pale");
    pen.textAlign = "center";
    const all = ticks(this.from, this.to, this.width / 90);
    for (const x of all) {
      const at = Math.min(this.px(x), SIDE.left + this.width - 16);
      pen.fillText(this.clock ? figure(x, 3) : short(x), at, SIDE.top + this.height + 13);
    }
  }

  line(pen, known) {
    pen.strokeStyle = pen.fillStyle = colour("line");
    pen.lineWidth = 1.8;
    pen.lineJoin = "round";
    pen.beginPath();
    known.forEach((i, k) => {
      if (k && this.steps) pen.lineTo(this.px(this.x[i]), this.py(this.y[known[k - 1]]));
      pen[k ? "lineTo" : "moveTo"](this.px(this.x[i]), this.py(this.y[i]));
    });
    pen.stroke();
    const last = known[known.length - 1];
    pen.beginPath();
    pen.arc(this.px(this.x[last]), this.py(this.y[last]), 3, 0, 7);
    pen.fill();
  }

  mark(pen) {
    let near = this.known[0];
    for (const i of this.known) if (Math.abs(this.px(this.x[i]) - this.at) < Math.abs(this.px(this.x[near]) - this.at)) near = i;
    pen.fillStyle = colour("ink");
    pen.fillRect(Math.round(this.px(this.x[near])), SIDE.top, 1, this.height);
    pen.beginPath();
    pen.arc(this.px(this.x[near]), this.py(this.y[near]), 3.5, 0, 7);
    pen.fill();
    this.say(near, true);
  }

  say(i, at) {
    const where = this.clock ? duration(this.x[i]) : `${count(this.x[i])} NFE`;
    this.told.textContent = at ? `${figure(this.y[i])} at ${where}` : figure(this.y[i]);
  }

  point(event) {
    this.at = event && event.clientX - this.canvas.getBoundingClientRect().left;
    this.draw();
  }
}

const short = (n) => (n >= 1e6 ? `${figure(n / 1e6, 3)}M` : n >= 1e4 ? `${figure(n / 1e3, 3)}k` : count(n));
