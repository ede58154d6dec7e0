// What stands around the tree: figures, the chosen node, gallery, certificate, workers, how to go on, what was asked.

import { count, duration, el, figure, fill, picture, words } from "./dom.js";

/** How the time is split, as far as it is known. */
function split(history, last) {
  const [kernel, reward] = [history.model_seconds[last], history.reward_seconds[last]];
  return kernel + reward > 0 ? `, ${Math.round((100 * reward) / (kernel + reward))} % in the reward` : "";
}

const panel = (title, ...inner) => el("section", { class: "panel" }, el("h2", {}, title), ...inner);

export class Panels {
  constructor(run, about, choose) {
    Object.assign(this, { run, about, choose_: choose });
    this.tile = {};
    this.tiles = el("div", { class: "tiles" }, ...["best reward", "NFE", "nodes", "samples", "ESS", "log Z", "time"].map((name) => this.makeTile(name)));
    this.about_ = el("div", { class: "chosen" }, el("p", { class: "quiet" }, "Click a dot, or a sample below, to look at it."));
    this.chosen = panel("Node", this.about_);
    this.cells = el("div", { class: "gallery", id: "gallery" }, el("p", { class: "quiet" }, "No samples yet."));
    this.gallery = panel("Best samples", this.cells);
    this.claims = el("ul", { class: "claims", id: "certificate" }, el("li", { class: "quiet" }, "not read yet"));
    this.certificate = panel("Certificate", this.claims);
    this.rows = el("tbody");
    this.together = el("p", { class: "quiet" });
    const head = ["", "machine", "device", "busy", "full", "NFE", "NFE/s", "rows", "memory"].map((name) => el("th", {}, name));
    this.workers = panel("Workers", this.together, el("div", { class: "scroll" }, el("table", { id: "workers" }, el("thead", {}, el("tr", {}, ...head)), this.rows)));
    this.workers.hidden = true;
    this.resume = this.howToGoOn();
    this.asked = this.settings();
  }

  makeTile(name) {
    const [value, below] = [el("b"), el("span", { class: "quiet" })];
    this.tile[name] = (text, more = "") => fill(value, text) || fill(below, more);
    return el("div", { class: "tile" }, el("span", { class: "label" }, name), value, below);
  }

  howToGoOn() {
    const text = el("code", { id: "resume" }, this.about.resume);
    const button = el("button", { type: "button", onclick: () => copy(this.about.resume, button) }, "copy");
    const { nfe } = this.about.budget;
    const more = nfe ? `, such as --nfe ${2 * nfe}` : "";
    return panel("Go on with it", el("p", { class: "quiet" }, `It goes on where its log ends; a finished run with a larger budget${more}.`),
      el("div", { class: "command" }, text, button));
  }

  settings() {
    const { method, kernel, reward, seed, budget, num_steps, state_shape, created, versions } = this.about;
    const { name, ...rest } = method;
    const limits = Object.fromEntries(Object.entries(budget).filter(([, limit]) => limit !== null));
    const shown = { method: name, settings: rest, kernel, steps: num_steps, state: state_shape, reward, budget: limits, seed, begun: created, versions };
    const rows = Object.entries(shown).map(([key, value]) => el("tr", {}, el("th", {}, key), el("td", {}, words(value))));
    return panel("Asked", el("table", { class: "asked" }, el("tbody", {}, ...rows)));
  }

  /** After every wave. */
  progress(state, history, task) {
    this.resume.hidden = state.status.startsWith("running"); // nobody can go on with it meanwhile
    const last = history.nfe.length - 1;
    const limit = this.about.budget.nfe;
    const nfe = last < 0 ? 0 : history.nfe[last];
    this.tile["NFE"](count(nfe), limit ? el("progress", { max: limit, value: Math.min(nfe, limit) }) : "");
    this.tile["best reward"](figure(last < 0 ? null : history.best_reward[last]), this.about.prompts?.length > 1 ? "of all tasks" : "");
    this.tile["nodes"](count(state.nodes[task]), `${count(state.waves)} waves`);
    const seconds = last < 0 ? null : history.seconds[last];
    this.tile["time"](duration(seconds), seconds > 0 ? `${figure(nfe / seconds, 3)} NFE/s${split(history, last)}` : "");
    this.table(state.workers);
  }

  summary(found) {
    this.tile["samples"](count(found.samples), `${count(found.roots)} roots`);
    this.tile["ESS"](found.log_z === null ? "–" : figure(found.ess, 3), found.log_z === null ? "greedy: no weights" : "");
    const { low, high } = found.interval;
    this.tile["log Z"](figure(found.log_z), high === null ? (found.log_z === null ? "" : "no interval") : `${figure(low ?? -Infinity)} … ${figure(high)}`);
    const claim = (line) => {
      const at = line.indexOf(":");
      return el("li", { class: line.startsWith("bias, ") ? "bias" : "" }, el("b", {}, line.slice(0, at)), line.slice(at));
    };
    fill(this.claims, ...found.certificate.map(claim), ...found.warnings.map((text) => el("li", { class: "bias" }, el("b", {}, "note"), `: ${text}`)));
  }

  pictures(samples, task) {
    if (samples.length) fill(this.cells, ...samples.map((sample, i) => this.cell(sample, task, i)));
  }

  cell(sample, task, i) {
    return el("button", { type: "button", class: "cell", title: `node ${sample.node}`, onclick: () => this.choose_(sample.node) },
      this.seen(sample, task), el("span", { class: i === 0 ? "first" : "" }, (i === 0 ? "★ " : "") + figure(sample.reward)));
  }

  /** What there is to see of a node. */
  seen(leaf, task) {
    if (leaf.kind === "picture") return picture({ run: this.run, task, node: leaf.node });
    return el("div", { class: "text" }, leaf.kind === "nothing" ? "not kept" : leaf.text);
  }

  choose(leaf, task, value, depth) {
    if (leaf === null) return fill(this.about_, el("p", { class: "quiet" }, "Click a dot, or a sample below, to look at it."));
    const facts = { node: leaf.node, t: leaf.t, reward: figure(leaf.reward, 6), value: figure(value, 6), depth, key: leaf.key };
    const rows = Object.entries(facts).map(([key, fact]) => el("tr", {}, el("th", {}, key), el("td", {}, fact)));
    const state = leaf.kind === "picture" && leaf.of === "state";
    const what = state ? (leaf.t ? "the state x_t as it is stored, with its noise" : "the state as it is stored, not decoded") : "";
    return fill(this.about_, this.seen(leaf, task), el("table", {}, el("tbody", {}, ...rows)), el("p", { class: "quiet" }, what));
  }

  table(workers) {
    this.workers.hidden = !workers;
    if (!workers) return;
    const { busy, fill: filled, queue, mb_in, mb_out, workers: up } = workers.together;
    this.together.textContent = `${words(up)} up, ${share(busy)} busy, passes ${share(filled)} full, queue ${words(queue)}, ${figure(mb_in, 3)} MB in, ${figure(mb_out, 3)} MB out`;
    fill(this.rows, ...Object.entries(workers.each).map(([number, one]) => el("tr", {}, ...[
      number, el("span", { title: one.node }, one.node.slice(0, 12)), one.device, share(one.busy), share(one.fill), count(one.nfe), count(one.nfe_per_second), count(one.batch_size),
      one.memory_mb === null ? "–" : `${count(one.memory_mb)} MB`].map((cell) => el("td", {}, cell)))));
  }

  fault(text) {
    fill(this.about_, el("p", { class: "error" }, text));
  }
}

const share = (part) => (typeof part === "number" ? `${Math.round(100 * part)} %` : "–");

async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "copied";
  } catch {
    button.textContent = "select it by hand";
  }
  setTimeout(() => (button.textContent = "copy"), 2000);
}
