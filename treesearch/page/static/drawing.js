// The tree on a canvas: curved edges, a dot a node, the path of the best; wheel and drag look closer.

import { colour, count, figure } from "./dom.js";
import { marks } from "./tree.js";

const SCALE = ["#440154", "#482878", "#3e4a89", "#31688e", "#26828e", "#1f9e89", "#35b779", "#5ec962", "#8bd646", "#bddf26"];
const BINS = 40;
const SIDE = { left: 46, right: 18, top: 22, bottom: 20 };
const SPACE = 5; // pixels between two marks of a row

export class Drawing {
  /** `chosen` is called with a node, or null. */
  constructor(canvas, chosen) {
    this.canvas = canvas;
    this.chosen = chosen;
    this.view = { left: 0, right: 1 };
    this.tree = null;
    this.held = null;
    this.node = null;
    this.range = [0, 1];
    new ResizeObserver(() => this.draw()).observe(canvas);
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
    canvas.addEventListener("wheel", (event) => this.zoom(event), { passive: false });
    canvas.addEventListener("pointerdown", (event) => this.hold(event));
    canvas.addEventListener("pointermove", (event) => this.move(event));
    canvas.addEventListener("pointerup", (event) => this.release(event));
    canvas.addEventListener("dblclick", () => this.whole());
    canvas.addEventListener("keydown", (event) => this.key(event));
  }

  show(tree) {
    this.tree = tree;
    this.range = tree.range();
    this.draw();
  }

  /** The ends of the scale in words. */
  labels() {
    return this.range.map((value, i) => (i ? figure(value, 3) : `≤ ${figure(value, 3)}`));
  }

  choose(node) {
    this.node = node;
    this.draw();
  }

  whole() {
    this.view = { left: 0, right: 1 };
    this.draw();
  }

  /** Pixels of a place. */
  px(x) {
    return SIDE.left + ((x - this.view.left) / (this.view.right - this.view.left)) * this.width;
  }

  py(row) {
    return SIDE.top + (row / Math.max(1, this.tree.levels.length - 1)) * this.height;
  }

  bin(value) {
    if (value !== value) return BINS;
    const part = (value - this.range[0]) / (this.range[1] - this.range[0]);
    return Math.max(0, Math.min(BINS - 1, Math.floor(part * BINS)));
  }

  draw() {
    if (this.frame || !this.tree) return;
    this.frame = requestAnimationFrame(() => {
      this.frame = null;
      this.paint();
    });
  }

  paint() {
    const { canvas, tree } = this;
    const ratio = window.devicePixelRatio || 1;
    const box = canvas.getBoundingClientRect();
    if (!box.width) return;
    if (canvas.width !== Math.round(box.width * ratio) || canvas.height !== Math.round(box.height * ratio)) {
      canvas.width = Math.round(box.width * ratio);
      canvas.height = Math.round(box.height * ratio);
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, box.width, box.height);
    this.width = box.width - SIDE.left - SIDE.right;
    this.height = box.height - SIDE.top - SIDE.bottom;
    this.marks = marks(tree, this.view, Math.max(8, Math.floor(this.width / SPACE)));
    this.levels(pen);
    pen.save();
    pen.beginPath();
    pen.rect(SIDE.left - 8, 0, this.width + 16, box.height);
    pen.clip();
    this.edges(pen);
    this.dots(pen);
    if (tree.best > 0) this.path(pen, tree.best, colour("best"), true);
    if (this.node !== null && this.node < tree.n && this.node !== tree.best) this.path(pen, this.node, colour("ink"), false);
    pen.restore();
    this.canvas.dispatchEvent(new CustomEvent("painted"));
  }

  levels(pen) {
    const { levels } = this.tree;
    pen.font = "11px system-ui, sans-serif";
    pen.textBaseline = "middle";
    pen.textAlign = "right";
    pen.lineWidth = 1;
    const step = Math.ceil(levels.length / Math.max(2, Math.floor(this.height / 18)));
    levels.forEach((level, row) => {
      if (row % step && row !== levels.length - 1) return;
      pen.fillStyle = colour("faint");
      pen.fillRect(SIDE.left, Math.round(this.py(row)), this.width, 1);
      pen.fillStyle = colour("pale");
      pen.fillText(row === 0 ? "root" : `t ${level}`, SIDE.left - 12, this.py(row));
    });
  }

  curve(pen, x0, y0, x1, y1) {
    const half = (y0 + y1) / 2;
    pen.moveTo(x0, y0);
    pen.bezierCurveTo(x0, half, x1, half, x1, y1);
  }

  /** Call `put` for each of `items` in the colour of its value, the best last. */
  inColours(pen, items, put, stroke) {
    const bins = Array.from({ length: BINS + 1 }, () => []);
    for (const [item, value] of items) bins[this.bin(value)].push(item);
    for (const b of [BINS, ...Array(BINS).keys()]) {
      if (!bins[b].length) continue;
      const shade = b === BINS ? colour("unknown") : SCALE[Math.floor((b * SCALE.length) / BINS)];
      pen.beginPath();
      for (const item of bins[b]) put(item);
      if (stroke) {
        pen.strokeStyle = shade;
        pen.stroke();
      } else {
        pen.fillStyle = shade;
        pen.fill();
      }
    }
  }

  edges(pen) {
    const { from, to, x, row, value } = this.marks;
    pen.lineWidth = from.length < 600 ? 1.1 : 0.6;
    pen.globalAlpha = from.length < 2000 ? 0.55 : 0.4;
    const put = (e) => this.curve(pen, this.px(x[from[e]]), this.py(row[from[e]]), this.px(x[to[e]]), this.py(row[to[e]]));
    this.inColours(pen, from.map((_, e) => [e, value[to[e]]]), put, true);
    pen.globalAlpha = 1;
  }

  radius(mark) {
    const alone = this.marks.x.length < 400 ? 3.4 : this.marks.x.length < 1500 ? 2.6 : 1.8;
    return alone + Math.min(1.4, 0.45 * Math.log10(this.marks.count[mark]));
  }

  dots(pen) {
    const { x, row, value } = this.marks;
    const put = (m) => {
      const r = this.radius(m);
      pen.moveTo(this.px(x[m]) + r, this.py(row[m]));
      pen.arc(this.px(x[m]), this.py(row[m]), r, 0, 7);
    };
    this.inColours(pen, x.map((_, m) => [m, value[m]]), put, false);
  }

  path(pen, node, shade, star) {
    const { tree } = this;
    const path = tree.path(node);
    pen.strokeStyle = shade;
    pen.lineWidth = star ? 2 : 1.4;
    pen.setLineDash(star ? [] : [4, 3]);
    pen.beginPath();
    for (let i = 0; i + 1 < path.length; i++) {
      const [low, high] = [path[i], path[i + 1]];
      this.curve(pen, this.px(tree.x[high]), this.py(tree.row[high]), this.px(tree.x[low]), this.py(tree.row[low]));
    }
    pen.stroke();
    pen.setLineDash([]);
    const [x, y] = [this.px(tree.x[node]), this.py(tree.row[node])];
    pen.beginPath();
    if (star) for (let k = 0; k < 10; k++) pen.lineTo(x + (k % 2 ? 3.6 : 8.5) * Math.sin((k * Math.PI) / 5), y - (k % 2 ? 3.6 : 8.5) * Math.cos((k * Math.PI) / 5));
    else pen.arc(x, y, 5, 0, 7);
    pen.closePath();
    pen.fillStyle = shade;
    pen.fill();
    pen.strokeStyle = colour("paper");
    pen.lineWidth = 1;
    pen.stroke();
  }

  /** The mark nearest to the pointer, at most a finger away. */
  near(event) {
    if (!this.marks) return -1;
    const box = this.canvas.getBoundingClientRect();
    const [mx, my] = [event.clientX - box.left, event.clientY - box.top];
    let [found, least] = [-1, 14 * 14];
    for (let m = 0; m < this.marks.x.length; m++) {
      const far = (this.px(this.marks.x[m]) - mx) ** 2 + (this.py(this.marks.row[m]) - my) ** 2;
      if (far < least) [found, least] = [m, far];
    }
    return found;
  }

  told(mark) {
    const { count: many, value, row } = this.marks;
    const level = row[mark] === 0 ? "root" : `t = ${this.tree.levels[row[mark]]}`;
    return many[mark] === 1 ? `${level}, value ${figure(value[mark])}` : `${level}, ${count(many[mark])} nodes, best ${figure(value[mark])}`;
  }

  /** The wheel moves the page until the tree was clicked, or with Ctrl. */
  zoom(event) {
    if (document.activeElement !== this.canvas && !event.ctrlKey) return;
    event.preventDefault();
    const box = this.canvas.getBoundingClientRect();
    const at = Math.max(0, Math.min(1, (event.clientX - box.left - SIDE.left) / this.width));
    this.closer(Math.exp(event.deltaY * 0.0015), at);
  }

  closer(factor, at = 0.5) {
    const { left, right } = this.view;
    const span = Math.min(1, Math.max(1e-5, (right - left) * factor));
    this.shift(left + at * (right - left) - at * span, span);
  }

  shift(left, span = this.view.right - this.view.left) {
    const start = Math.max(0, Math.min(1 - span, left));
    this.view = { left: start, right: start + span };
    this.draw();
  }

  hold(event) {
    this.held = { x: event.clientX, left: this.view.left, moved: false };
    this.canvas.setPointerCapture(event.pointerId);
  }

  move(event) {
    if (this.held) {
      const by = event.clientX - this.held.x;
      this.held.moved ||= Math.abs(by) > 3;
      if (this.held.moved) this.shift(this.held.left - (by / this.width) * (this.view.right - this.view.left));
      return;
    }
    const mark = this.near(event);
    this.canvas.title = mark < 0 ? "" : this.told(mark);
    this.canvas.classList.toggle("pointing", mark >= 0);
  }

  release(event) {
    const moved = this.held?.moved;
    this.held = null;
    if (moved) return;
    const mark = this.near(event);
    this.chosen(mark < 0 || this.marks.node[mark] === 0 ? null : this.marks.node[mark]);
  }

  key(event) {
    const span = this.view.right - this.view.left;
    const does = {
      "+": () => this.closer(0.7), "=": () => this.closer(0.7), "-": () => this.closer(1.4), "0": () => this.whole(),
      ArrowLeft: () => this.shift(this.view.left - span / 5), ArrowRight: () => this.shift(this.view.left + span / 5),
    }[event.key];
    if (does) {
      event.preventDefault();
      does();
    }
  }
}

/** The colours of values, low to high, as a strip of pixels on a canvas. */
export function strip(canvas) {
  [canvas.width, canvas.height] = [SCALE.length, 1];
  const pen = canvas.getContext("2d");
  SCALE.forEach((shade, i) => {
    pen.fillStyle = shade;
    pen.fillRect(i, 0, 1, 1);
  });
}
