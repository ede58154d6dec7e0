// Elements and numbers. Text of a run becomes text here and nothing else: no markup is ever parsed.

/** An element with properties, classes and children; a string child is text. */
export function el(name, given = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(given)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (key in node) node[key] = value;
    else node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child !== null).map((child) => (child instanceof Node ? child : String(child))));
  return node;
}

/** Replace what is in an element. */
export const fill = (node, ...children) => node.replaceChildren(...children.filter((child) => child !== null));

export const count = (n) => (n === null || n === undefined ? "–" : Math.round(n).toLocaleString("en"));

/** A number of a few digits. */
export function figure(x, digits = 4) {
  if (x === null || x === undefined || Number.isNaN(x)) return "–";
  if (!Number.isFinite(x)) return x > 0 ? "∞" : "−∞";
  const size = Math.abs(x);
  if (size >= 1000 && size < 1e9) return Math.round(x).toLocaleString("en").replace("-", "−");
  const text = size !== 0 && (size < 1e-3 || size >= 1e9) ? x.toExponential(2).replace(/\.?0+e/, "e") : String(Number(x.toPrecision(digits)));
  return text.replace("-", "−");
}

export function duration(seconds) {
  if (seconds === null || seconds === undefined) return "–";
  if (seconds < 60) return `${seconds.toFixed(seconds < 10 ? 1 : 0)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} min ${Math.round(seconds % 60)} s`;
  return `${Math.floor(seconds / 3600)} h ${Math.round((seconds % 3600) / 60)} min`;
}

export function ago(stamp) {
  const seconds = Math.max(0, Date.now() / 1000 - stamp);
  if (seconds < 5) return "now";
  if (seconds < 90) return `${Math.round(seconds)} s ago`;
  if (seconds < 5400) return `${Math.round(seconds / 60)} min ago`;
  if (seconds < 129600) return `${Math.round(seconds / 3600)} h ago`;
  return `${Math.round(seconds / 86400)} d ago`;
}

/** Data of any depth as a person reads it. */
export function words(value) {
  if (value === null || value === undefined) return "none";
  if (typeof value === "string") return value;
  if (Array.isArray(value)) return `[${value.map(words).join(", ")}]`;
  if (typeof value === "object") return Object.entries(value).map(([key, inner]) => `${key}=${words(inner)}`).join(", ");
  return String(value);
}

const address = (what, given) => `api/${what}?${new URLSearchParams(given)}`;

/** What the server says; an Error with its words where it refuses. */
export async function ask(what, given = {}, kind = "json") {
  const answer = await fetch(address(what, given));
  if (!answer.ok) {
    const told = await answer.json().catch(() => ({}));
    throw new Error(told.error ?? `the server answered ${answer.status}`);
  }
  return kind === "json" ? answer.json() : answer.arrayBuffer();
}

export const listen = (what, given) => new EventSource(address(what, given));

/** A picture of a node, fetched when it comes into view. */
export const picture = (given) => el("img", { loading: "lazy", decoding: "async", alt: "", src: address("picture", given) });

/** A colour of the style sheet. */
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
