// A run that grows: what the server says of it goes to the tree, the curves and the panels.

import { ask, count, el, fill, listen } from "./dom.js";
import { Curve } from "./curves.js";
import { Drawing, strip } from "./drawing.js";
import { Panels } from "./panels.js";
import { Tree } from "./tree.js";

const CURVES = ["nfe", "seconds", "model_seconds", "reward_seconds", "best_reward", "ess", "nodes"];

export class RunView {
  constructor(main, run, pill) {
    Object.assign(this, { main, run, pill, task: 0, readout: -1, busy: false });
    this.history = Object.fromEntries(CURVES.map((name) => [name, []]));
  }

  async start() {
    this.about = await ask("about", { run: this.run });
    this.tree = new Tree(this.about.num_steps);
    this.build();
    this.source = listen("events", { run: this.run });
    this.source.addEventListener("state", (event) => this.hear(JSON.parse(event.data)));
    this.source.addEventListener("gone", (event) => this.gone(JSON.parse(event.data).error));
  }

  close() {
    this.source?.close();
    this.closed = true;
  }

  gone(why) {
    this.close();
    fill(this.main, el("p", { class: "error" }, why));
  }

  build() {
    const canvas = el("canvas", { id: "tree", class: "tree", tabIndex: 0 });
    canvas.setAttribute("aria-label", "the tree: after a click the wheel looks closer; drag moves it, a click chooses a node");
    this.drawing = new Drawing(canvas, (node) => this.choose(node));
    const colours = el("canvas", { class: "strip" });
    strip(colours);
    this.low = el("span");
    this.high = el("span");
    this.size = el("span", { class: "quiet", id: "size" });
    this.panels = new Panels(this.run, this.about, (node) => this.choose(node));
    const button = (label, title, onclick) => el("button", { type: "button", title, onclick }, label);
    const tools = el("span", { class: "tools" },
      button("−", "further away", () => this.drawing.closer(1.6)),
      button("+", "closer", () => this.drawing.closer(0.6)),
      button("whole tree", "double click does it, too", () => this.drawing.whole()));
    const key = el("div", { class: "key" }, el("span", { class: "star" }, "★"), "best sample and its path",
      el("span", { class: "grow" }), this.low, colours, this.high, el("span", { class: "quiet" }, "value (without one: best reward below)"));
    this.main.append(this.panels.tiles,
      el("div", { class: "columns" },
        el("section", { class: "panel wide" }, el("h2", {}, "Tree ", this.size, this.tasks(), tools), canvas, key),
        el("div", { class: "side" }, this.curves(), this.panels.chosen)),
      this.panels.gallery,
      el("div", { class: "columns even" }, this.panels.certificate, el("div", { class: "side" }, this.panels.resume, this.panels.workers, this.panels.asked)));
  }

  /** The choice of a task, where there are several. */
  tasks() {
    const { prompts } = this.about;
    if (!prompts) return null;
    const label = (prompt) => (typeof prompt === "string" ? prompt : JSON.stringify(prompt));
    if (prompts.length === 1) return el("span", { class: "prompt" }, label(prompts[0]));
    const choice = el("select", { id: "task", title: "task" });
    prompts.forEach((prompt, i) => choice.append(el("option", { value: i }, `${i}: ${label(prompt)}`)));
    choice.addEventListener("change", () => this.change(Number(choice.value)));
    return choice;
  }

  curves() {
    const panel = (name, title, options = {}) => {
      const told = el("b", { class: "told" });
      const canvas = el("canvas", { class: "curve", id: `curve-${name}` });
      this[name] = new Curve(canvas, told, options);
      return [el("h3", {}, title, " ", told), canvas];
    };
    this.clock = el("select", { title: "against" }, el("option", { value: "nfe" }, "against NFE"), el("option", { value: "seconds" }, "against seconds"));
    this.clock.addEventListener("change", () => this.plot());
    return el("section", { class: "panel" }, el("h2", {}, "Progress ", this.clock), ...panel("best", "best reward so far", { steps: true }),
      ...(this.about.greedy ? [] : panel("ess", this.about.prompts?.length > 1 ? "ESS, all tasks" : "ESS")));
  }

  plot() {
    const clock = this.clock.value === "seconds";
    const x = this.history[this.clock.value];
    this.best.show(x, this.history.best_reward, clock);
    this.ess?.show(x, this.history.ess, clock);
  }

  change(task) {
    this.task = task;
    this.tree = new Tree(this.about.num_steps);
    this.readout = -1;
    this.drawing.whole();
    this.choose(null);
    this.update();
  }

  /** A state event: enter the waves since, then fetch what there is more of. */
  hear(state) {
    if (state.id !== this.about.id) return void location.reload();
    for (const name of CURVES) {
      const known = this.history[name];
      known.length = state.since;
      for (const value of state.history[name]) known.push(value);
    }
    this.state = state;
    this.pill.hidden = false;
    this.pill.className = `pill ${state.status.split(" ")[0]}`;
    this.pill.textContent = state.status;
    this.plot();
    this.panels.progress(state, this.history, this.task);
    this.update();
  }

  /** Fetch new nodes and draw them, then a new read-out; what is asked meanwhile is done afterwards. */
  async update() {
    if (this.busy) return void (this.again = true);
    this.busy = true;
    try {
      do {
        this.again = false;
        await this.grow();
      } while (this.again && !this.closed);
    } catch (error) {
      if (!this.closed) this.panels.fault(error.message);
    } finally {
      this.busy = false;
    }
  }

  async grow() {
    const { tree, task, state, run } = this;
    const here = () => tree === this.tree && !this.closed;
    if (state.nodes[task] >= tree.n) {
      const nodes = await ask("nodes", { run, task, since: tree.n - 1 }, "bytes");
      if (!here()) return;
      const began = performance.now();
      tree.append(nodes);
      this.redraw(began);
    }
    if (state.readout !== this.readout || this.readout <= 0) {
      const summary = await ask("summary", { run, task });
      const values = await ask("values", { run, task }, "bytes");
      if (!here()) return;
      const began = performance.now();
      tree.known = new Float32Array(values);
      this.readout = Math.max(1, state.readout);
      this.redraw(began);
      this.panels.summary(summary);
      const samples = await ask("gallery", { run, task });
      if (here()) this.panels.pictures(samples, task);
    }
  }

  redraw(began) {
    const { tree } = this;
    tree.place();
    this.drawing.show(tree);
    this.size.textContent = `${count(tree.n - 1)} nodes`;
    [this.low.textContent, this.high.textContent] = this.drawing.labels();
    this.drawing.canvas.addEventListener("painted", () => performance.measure("update", { start: began, end: performance.now() }), { once: true });
  }

  async choose(node) {
    this.drawing.choose(node);
    if (node === null) return this.panels.choose(null);
    try {
      const leaf = await ask("leaf", { run: this.run, task: this.task, node });
      if (this.drawing.node === node) this.panels.choose(leaf, this.task, this.tree.value(node), this.tree.path(node).length - 1);
    } catch (error) {
      this.panels.fault(error.message);
    }
  }
}
