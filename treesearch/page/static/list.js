// The runs below the folder, the newest first.

import { ago, ask, count, el, figure, fill } from "./dom.js";

const EVERY = 2000; // milliseconds

export class RunList {
  constructor(main, link) {
    this.link = link;
    this.rows = el("tbody");
    this.root = el("code");
    this.none = el("p", { class: "note", hidden: true }, "No runs here yet: treesearch run makes one under runs/. They appear by themselves.");
    const head = ["run", "method", "kernel", "reward", "tasks", "NFE", "best", "status", "changed"];
    const numbers = new Set(["tasks", "NFE", "best"]);
    const cells = head.map((name) => el("th", { class: numbers.has(name) ? "number" : "" }, name));
    const table = el("table", { class: "runs" }, el("thead", {}, el("tr", {}, ...cells)), this.rows);
    main.append(el("section", { class: "panel" }, el("h2", {}, "Runs in ", this.root), el("div", { class: "scroll" }, table), this.none));
  }

  async start() {
    await this.refresh();
    this.timer = setInterval(() => document.hidden || this.refresh().catch(() => {}), EVERY);
  }

  close() {
    clearInterval(this.timer);
  }

  async refresh() {
    const { root, runs } = await ask("runs");
    this.root.textContent = root;
    this.none.hidden = runs.length > 0;
    fill(this.rows, ...runs.map((run) => this.row(run)));
  }

  row(run) {
    const name = el("a", { href: this.link(run.run) }, run.run === "." ? "this folder" : run.run);
    if (run.error) return el("tr", { class: "broken" }, el("td", {}, name), el("td", { colSpan: 7, class: "error" }, run.error), el("td", {}, ago(run.changed)));
    return el("tr", {},
      el("td", {}, name),
      el("td", {}, run.method),
      el("td", { class: "words" }, run.kernel),
      el("td", { class: "words", title: run.reward }, run.reward),
      el("td", { class: "number" }, count(run.tasks)),
      el("td", { class: "number" }, spent(run)),
      el("td", { class: "number" }, figure(run.best)),
      el("td", {}, el("span", { class: `pill ${run.status.split(" ")[0]}` }, run.status)),
      el("td", { class: "quiet" }, ago(run.changed)));
  }
}

function spent(run) {
  if (!run.limit) return count(run.nfe);
  return el("span", {}, `${count(run.nfe)} / ${count(run.limit)} `, el("progress", { max: run.limit, value: Math.min(run.nfe, run.limit) }));
}
