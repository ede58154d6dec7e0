// One page, two views: the list of runs, and a run. The part of the address behind # says which.

import { el, fill } from "./dom.js";
import { RunList } from "./list.js";
import { RunView } from "./run.js";

const main = document.getElementById("main");
const where = document.getElementById("where");
const pill = document.getElementById("pill");
let shown = null;

export const link = (run) => `#${encodeURIComponent(run)}`;

function open() {
  shown?.close();
  pill.hidden = true;
  fill(main);
  const run = decodeURIComponent(location.hash.slice(1));
  document.title = run ? `${run} – treesearch` : "treesearch";
  where.textContent = run;
  shown = run ? new RunView(main, run, pill) : new RunList(main, link);
  shown.start().catch((error) => fill(main, el("p", { class: "error" }, error.message)));
}

window.addEventListener("hashchange", open);
open();
