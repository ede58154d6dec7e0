// A tree as growing typed arrays, and where its nodes stand.
//
// A node spans the places of the leaves below it. Siblings of a small tree stand in order of creation, so that it grows
// without being shuffled; of a large one, whose neighbours share marks, with the best in the middle, so that good regions
// stand together. Node 0 is the root; parents have smaller numbers than their children.

const SMALL = 2000; // nodes
const ROWS = 48; // levels that are told apart; beyond, neighbours share a row

export class Tree {
  constructor(steps) {
    this.n = 1;
    this.reserve(1024);
    this.parent[0] = -1;
    this.t[0] = steps + 1;
    this.reward[0] = NaN;
    this.levels = [];
    this.known = new Float32Array(0);
  }

  reserve(size) {
    if (this.t && this.t.length >= size) return;
    const room = Math.max(size, 2 * (this.t?.length ?? 512));
    for (const [name, Kind] of [["parent", Int32Array], ["t", Int16Array], ["reward", Float32Array]]) {
      const grown = new Kind(room);
      if (this[name]) grown.set(this[name].subarray(0, this.n));
      this[name] = grown;
    }
    for (const name of ["x", "below"]) this[name] = new Float32Array(room);
    for (const name of ["wide", "free"]) this[name] = new Int32Array(room);
    this.row = new Uint8Array(room);
  }

  /** Add nodes from columns: parent (int32), reward (float32), t (int16). */
  append(buffer) {
    const more = buffer.byteLength / 10;
    this.reserve(this.n + more);
    this.parent.set(new Int32Array(buffer, 0, more), this.n);
    this.reward.set(new Float32Array(buffer, 4 * more, more), this.n);
    this.t.set(new Int16Array(buffer, 8 * more, more), this.n);
    this.n += more;
  }

  /** Places x in 0..1, rows, the best reward below each node, and the best leaf. */
  place() {
    const { n, parent, t, reward, wide, free, below, x } = this;
    wide.fill(0, 0, n);
    this.best = -1;
    for (let i = 0; i < n; i++) below[i] = t[i] === 0 ? reward[i] : NaN;
    for (let i = n - 1; i > 0; i--) {
      if (t[i] === 0 && reward[i] >= (this.best < 0 ? -Infinity : reward[this.best])) this.best = i;
      wide[i] = wide[i] || 1;
      const above = parent[i];
      wide[above] += wide[i];
      if (!(below[above] >= below[i])) below[above] = below[i] === below[i] ? below[i] : below[above];
    }
    const whole = Math.max(wide[0], 1);
    free[0] = 0;
    x[0] = 0.5;
    const order = n > SMALL ? this.outwards() : null;
    for (let k = 1; k < n; k++) {
      const i = order ? order[k - 1] : k;
      const start = free[parent[i]];
      free[parent[i]] = start + wide[i];
      free[i] = start;
      x[i] = (start + wide[i] / 2) / whole;
    }
    this.rank();
  }

  /** Nodes below the root by parent; siblings with the best in the middle, the next ones left and right of it. */
  outwards() {
    const { n, parent, below } = this;
    const start = new Int32Array(n + 1);
    for (let i = 1; i < n; i++) start[parent[i] + 1]++;
    for (let i = 0; i < n; i++) start[i + 1] += start[i];
    const at = start.slice(0, n);
    const order = new Int32Array(n - 1);
    for (let i = 1; i < n; i++) order[at[parent[i]]++] = i;
    const [low, high] = this.extremes();
    for (let p = 0; p < n; p++) {
      const group = order.subarray(start[p], start[p + 1]);
      if (group.length < 3) continue;
      const keys = Float64Array.from(group, (i, k) => {
        const part = Number.isFinite(below[i]) ? (high - below[i]) / (high - low || 1) : 1;
        return Math.round(part * 2 ** 24) * 2 ** 26 + k; // sorted as numbers, without a function to compare them
      }).sort();
      const old = group.slice();
      const middle = group.length >> 1;
      keys.forEach((key, rank) => {
        const side = (rank + 1) >> 1;
        group[rank % 2 ? middle - side : middle + side] = old[key % 2 ** 26];
      });
    }
    return order;
  }

  extremes() {
    let [low, high] = [Infinity, -Infinity];
    for (let i = 1; i < this.n; i++) {
      if (this.below[i] < low && this.below[i] > -Infinity) low = this.below[i];
      if (this.below[i] > high) high = this.below[i];
    }
    return low <= high ? [low, high] : [0, 1];
  }

  rank() {
    const { n, t, row } = this;
    const there = new Uint8Array(65536);
    for (let i = 0; i < n; i++) there[t[i]] = 1;
    const all = [];
    for (let level = 65535; level >= 0; level--) if (there[level]) all.push(level);
    const rows = Math.min(ROWS, all.length);
    const of = new Uint8Array(65536);
    this.levels = new Array(rows).fill(null);
    all.forEach((level, i) => {
      of[level] = Math.floor((i * rows) / all.length);
      this.levels[of[level]] ??= level;
    });
    for (let i = 0; i < n; i++) row[i] = of[t[i]];
  }

  /** What a node is coloured by: its soft value; without one the best reward below it, or that of its preview. */
  value(i) {
    const value = i > 0 && i <= this.known.length ? this.known[i - 1] : NaN;
    if (value === value) return value;
    return this.below[i] === this.below[i] ? this.below[i] : this.reward[i];
  }

  /** Nodes from a node up to the root. */
  path(node) {
    const path = [];
    for (let i = node; i >= 0; i = this.parent[i]) path.push(i);
    return path;
  }

  /** The 5 % quantile and the highest of the values, from some thousands of them. */
  range() {
    const seen = [];
    const step = Math.max(1, Math.floor(this.n / 4096));
    let high = -Infinity;
    for (let i = 1; i < this.n; i++) {
      const value = this.value(i);
      if (!Number.isFinite(value)) continue;
      if (value > high) high = value;
      if (i % step === 0) seen.push(value);
    }
    if (high === -Infinity) return [0, 1];
    seen.sort((a, b) => a - b);
    const low = seen.length ? seen[Math.floor(seen.length * 0.05)] : high;
    return high > low ? [low, high] : [low - 0.5, high + 0.5];
  }
}

/** Marks for what is in view: nodes of a row that fall into one column share one. */
export function marks(tree, view, columns) {
  const { n, x, row, parent } = tree;
  const stride = columns + 2; // a column left and right of the view stands for what is outside
  const cells = new Int32Array(tree.levels.length * stride).fill(-1);
  const of = new Int32Array(n);
  const found = { x: [], row: [], value: [], count: [], node: [], from: [], to: [], of };
  const scale = columns / (view.right - view.left);
  for (let i = 0; i < n; i++) {
    const at = (x[i] - view.left) * scale;
    const inside = at >= 0 && at <= columns;
    const cell = row[i] * stride + (inside ? 1 + Math.min(columns - 1, Math.floor(at)) : at < 0 ? 0 : columns + 1);
    let mark = cells[cell];
    const value = tree.value(i);
    if (mark < 0) {
      mark = cells[cell] = found.x.length;
      found.x.push(0);
      found.row.push(row[i]);
      found.value.push(value);
      found.count.push(0);
      found.node.push(i);
    } else if (value > found.value[mark] || found.value[mark] !== found.value[mark]) {
      found.value[mark] = value;
      found.node[mark] = i;
    }
    found.x[mark] += x[i];
    found.count[mark]++;
    of[i] = mark;
  }
  for (let m = 0; m < found.x.length; m++) found.x[m] /= found.count[m];
  const size = found.x.length;
  const keys = new Float64Array(n - 1);
  for (let i = 1; i < n; i++) keys[i - 1] = of[parent[i]] * size + of[i];
  keys.sort();
  for (let i = 0, last = -1; i < keys.length; i++) {
    if (keys[i] === last) continue;
    last = keys[i];
    const from = Math.floor(last / size);
    const to = last - from * size;
    if (from !== to) {
      found.from.push(from);
      found.to.push(to);
    }
  }
  return found;
}
