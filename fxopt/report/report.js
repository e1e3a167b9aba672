"use strict";
(() => {
const DATA = JSON.parse(document.getElementById("data").textContent);
const CHUNK = 200;  // lines drawn at once; the rest on demand, so that a graph of any size opens at once
const KIND = {"=": "same", "~": "changed", "-": "removed", "+": "added", ">": "moved"};

// ---- small tools: everything from the data becomes text, never HTML
function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name === "class") element.className = value;
    else if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (value !== undefined && value !== null) element.setAttribute(name, value);
  }
  element.append(...children.filter(child => child !== null && child !== undefined));
  return element;
}
const plural = (count, word) => `${count.toLocaleString("en")} ${word}${count === 1 ? "" : "s"}`;

// ---- a graph: its lines, its states and what happened to each node
class Graph {
  constructor(data, number) {
    this.data = data;
    this.number = number;
    this.steps = data.steps;
    this.shown = this.steps.map((step, i) => i).filter(i => this.steps[i].rows);
    this.states = [data.start];  // numbers of lines; state k is that before the k-th step shown
    this.keys = new Map();
  }
  text(line) { return this.data.lines[line][0]; }
  keyNumber(line) { return this.data.lines[line][1]; }
  key(line) { return this.data.strings[this.keyNumber(line)]; }
  module(line) { return this.data.strings[this.data.lines[line][2]]; }
  shape(line) { return this.data.strings[this.data.lines[line][3]]; }
  source(line) { return this.data.strings[this.data.lines[line][4]]; }
  reads(line) { return this.data.lines[line][5]; }
  heading(line) {
    const at = this.key(line).lastIndexOf("::");
    return (at < 0 ? "" : `${this.key(line).slice(0, at)}: `) + (this.module(line) || "(the model)");
  }
  before(step) { return this.shown.indexOf(step); }
  state(k) {
    for (let i = this.states.length; i <= k; i++)
      this.states.push(this.rows(this.shown[i - 1]).map(row => row[2]).filter(line => line >= 0));
    return this.states[k];
  }
  last() { return this.state(this.shown.length); }
  rows(step) {  // all rows of a step as [sign, line before, line after]
    const rows = [], from = this.state(this.before(step));
    let at = 0;
    for (const row of this.steps[step].rows) {
      if (typeof row === "number") {
        for (let i = 0; i < row; i++, at++) rows.push(["=", from[at], from[at]]);
      } else {
        if (row[1] >= 0) at++;
        rows.push(row);
      }
    }
    return rows;
  }
  byKey(k) {  // of state k: number of key -> line, and -> lines that read it
    if (!this.keys.has(k)) {
      const lines = new Map(), users = new Map();
      for (const line of this.state(k)) {
        lines.set(this.keyNumber(line), line);
        for (const read of this.reads(line)) {
          if (!users.has(read)) users.set(read, []);
          users.get(read).push(line);
        }
      }
      if (this.keys.size > 6) this.keys.clear();
      this.keys.set(k, {lines, users});
    }
    return this.keys.get(k);
  }
  happened(key) {  // what each step did to a node: [step, what, rewrite]
    if (!this.fates) {
      this.fates = new Map();
      this.steps.forEach((step, s) => step.rewrites.forEach((rewrite, r) => {
        for (const what of ["removed", "created", "changed"])
          for (const k of rewrite[what]) {
            if (!this.fates.has(k)) this.fates.set(k, []);
            this.fates.get(k).push([s, rewrite.active ? what : `${what} (since undone)`, r]);
          }
      }));
    }
    return this.fates.get(key) || [];
  }
}
const graphs = DATA.graphs.map((data, number) => new Graph(data, number));

// ---- lines side by side, drawn in chunks; unchanged runs and modules fold
class Rows {
  constructor(graph, rows, {fold = true, context = 1, columns = 2, state = 0, label = "diff"} = {}) {
    Object.assign(this, {graph, rows, columns, state});
    this.box = make("div", {class: "diff", role: "group", "aria-label": label});
    this.items = fold ? this.folded(context) : [[0, rows.length, true]];  // [from, to, shown]
    this.open();
    this.box.addEventListener("click", event => this.clicked(event.target));
    this.box.addEventListener("keydown", event => this.pressed(event));
  }
  folded(context) {
    const items = [], n = this.rows.length, near = new Uint8Array(n);
    for (let i = 0; i < n; i++)
      if (this.rows[i][0] !== "=") near.fill(1, Math.max(0, i - context), Math.min(n, i + context + 1));
    for (let i = 1; i + 1 < n; i++) if (near[i - 1] && near[i + 1]) near[i] = 1;
    for (let i = 0; i < n;) {
      let j = i;
      while (j < n && near[j] === near[i]) j++;
      items.push([i, j, near[i] === 1]);
      i = j;
    }
    return items;
  }
  open() {
    this.box.replaceChildren();
    this.item = 0;
    this.at = this.items.length ? this.items[0][0] : 0;
    this.heading = null;
    this.more(CHUNK);
  }
  more(count) {
    this.rest?.remove();
    const part = document.createDocumentFragment();
    while (this.item < this.items.length && count > 0) {
      const [from, to, shown] = this.items[this.item];
      if (!shown) {
        part.append(this.foldButton(from, to));
        this.heading = null;
        count--;
        this.next();
        continue;
      }
      for (; this.at < to && count > 0; this.at++, count--) this.append(part, this.at);
      if (this.at >= to) this.next();
    }
    const left = this.items.slice(this.item).reduce((sum, [from, to, shown]) => sum + (shown ? to - Math.max(from, this.at) : 0), 0);
    if (this.item < this.items.length) {
      this.rest = make("button", {class: "more-rows", type: "button"}, `${plural(left, "more line")}; show the next ${Math.min(CHUNK, left) || ""}`);
      part.append(this.rest);
    }
    this.box.append(part);
  }
  next() {
    this.item++;
    this.at = this.item < this.items.length ? this.items[this.item][0] : this.rows.length;
  }
  foldButton(from, to) {
    const button = make("button", {class: "fold", type: "button"}, `… ${(to - from).toLocaleString("en")} unchanged`);
    Object.assign(button, {from, to});
    return button;
  }
  append(part, index) {
    const row = this.rows[index], heading = this.graph.heading(row[2] >= 0 ? row[2] : row[1]);
    if (heading !== this.heading) {
      this.heading = heading;
      part.append(make("button", {class: "head", type: "button", "aria-expanded": "true"}, heading));
    }
    part.append(this.row(index));
  }
  row(index) {
    const [sign, a, b] = this.rows[index], kind = KIND[sign];
    const element = make("div", {class: `row ${kind}${this.columns === 1 ? " one" : ""}`, tabindex: index === 0 || !this.stop ? "0" : "-1", role: "button"});
    if (!this.stop) this.stop = element;
    element.index = index;
    element.append(make("span", {class: "sign"}, sign === "=" ? " " : sign));
    const [left, right] = kind === "changed" ? marked(this.graph.text(a), this.graph.text(b)) : [a, b].map(line => line < 0 ? null : [this.graph.text(line)]);
    if (this.columns === 2) element.append(make("span", {class: left ? "a" : "a absent"}, ...(left || [])));
    element.append(make("span", {class: right ? "b" : "b absent"}, ...(right || [])));
    const said = {same: "", changed: "changed: ", removed: "removed: ", added: "added: ", moved: "moved: "}[kind];
    element.setAttribute("aria-label", said + [a, b].filter((l, i, all) => l >= 0 && all.indexOf(l) === i).map(l => this.graph.text(l)).join(" became "));
    return element;
  }
  clicked(target) {
    const element = target.closest(".row, .fold, .head, .more-rows");
    if (!element) return;
    if (element.classList.contains("more-rows")) this.showMore();
    else if (element.classList.contains("fold")) this.unfold(element);
    else if (element.classList.contains("head")) this.toggle(element);
    else this.chosen(element);
  }
  showMore() {
    const last = this.rest.previousElementSibling;
    this.more(CHUNK);
    last.nextElementSibling?.focus();
  }
  unfold(button) {
    const to = Math.min(button.to, button.from + CHUNK), part = document.createDocumentFragment(), kept = this.heading;
    this.heading = null;
    for (let i = button.from; i < to; i++) this.append(part, i);
    this.heading = kept;
    if (to < button.to) part.append(this.foldButton(to, button.to));
    const first = part.firstElementChild;
    button.replaceWith(part);
    first.focus();
  }
  toggle(head) {
    const open = head.getAttribute("aria-expanded") === "false";
    head.setAttribute("aria-expanded", String(open));
    for (let next = head.nextElementSibling; next && next.matches(".row"); next = next.nextElementSibling) next.hidden = !open;
  }
  chosen(element) {
    const [, a, b] = this.rows[element.index];
    showNode(this.graph, b >= 0 ? b : a, b >= 0 ? this.state + (this.columns === 2 ? 1 : 0) : this.state, element);
  }
  pressed(event) {
    const row = event.target.closest(".row, .head, .fold, .more-rows");
    if (!row) return;
    if (row.matches(".row") && (event.key === "Enter" || event.key === " ")) {
      event.preventDefault();
      this.chosen(row);
    } else if (event.key === "ArrowDown" || event.key === "ArrowUp") {
      event.preventDefault();
      const step = event.key === "ArrowDown" ? "nextElementSibling" : "previousElementSibling";
      let next = row[step];
      while (next && next.hidden) next = next[step];
      if (next) next.focus();
    }
  }
  reveal(key) {  // draw as far as the line of a node, and light it
    const index = this.rows.findIndex(([, a, b]) => [a, b].some(line => line >= 0 && this.graph.keyNumber(line) === key));
    if (index < 0) return;
    for (;;) {
      const fold = [...this.box.querySelectorAll(".fold")].find(f => f.from <= index && index < f.to);
      if (!fold) break;
      if (index - fold.from >= CHUNK) {  // cut the fold so that the line is near
        const rest = this.foldButton(Math.max(fold.from, index - 20), fold.to), head = this.foldButton(fold.from, rest.from);
        fold.replaceWith(head, rest);
        this.unfold(rest);
      } else this.unfold(fold);
    }
    let row = [...this.box.querySelectorAll(".row")].find(r => r.index === index);
    while (!row && this.rest?.isConnected) {
      const here = this.item < this.items.length && index - this.at;
      this.more(here > 0 ? here + CHUNK : CHUNK);
      if (this.item < this.items.length && !this.items[this.item][2]) this.more(1);
      const fold = [...this.box.querySelectorAll(".fold")].find(f => f.from <= index && index < f.to);
      if (fold) return this.reveal(key);
      row = [...this.box.querySelectorAll(".row")].find(r => r.index === index);
    }
    if (!row) return;
    row.hidden = false;
    document.querySelectorAll(".row.lit").forEach(lit => lit.classList.remove("lit"));
    row.classList.add("lit");
    row.scrollIntoView({block: "center"});
    return row;
  }
}

function marked(a, b) {  // two texts, with what differs in the middle of each marked
  let head = 0, tail = 0;
  const least = Math.min(a.length, b.length);
  while (head < least && a[head] === b[head]) head++;
  while (head > 0 && /[\w.]/.test(a[head - 1])) head--;
  while (tail < least - head && a[a.length - 1 - tail] === b[b.length - 1 - tail]) tail++;
  while (tail > 0 && /[\w.]/.test(a[a.length - tail])) tail--;
  return [a, b].map(text => {
    const middle = text.slice(head, text.length - tail);
    return [text.slice(0, head), middle ? make("mark", {}, middle) : null, text.slice(text.length - tail)].filter(x => x !== null);
  });
}

// ---- drawings: the nodes around a rewrite, by rank
const SVG = "http://www.w3.org/2000/svg";
function drawn(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const MOST_DRAWN = 24;
const short = (text, most) => text.length > most ? `${text.slice(0, most - 1)}…` : text;
const ending = (text, most) => text.length > most ? `…${text.slice(1 - most)}` : text;  // the names of one module differ there
function operation(text) {
  const said = text.startsWith("return") ? "return" : text.slice(text.indexOf(" = ") + 3);
  return said.split(/[( ]/, 1)[0];
}

function drawing(graph, k, classes, caption) {
  const {lines, users} = graph.byKey(k);
  const core = [...classes.keys()].filter(key => lines.has(key));
  if (!core.length) return null;
  const chosen = new Set(core.slice(0, MOST_DRAWN));
  const isParameter = line => / = get_attr /.test(graph.text(line));
  for (const key of [...chosen]) {
    for (const near of [...graph.reads(lines.get(key)), ...(users.get(key) || []).slice(0, 4).map(line => graph.keyNumber(line))])
      if (chosen.size < MOST_DRAWN + 10 && lines.has(near) && !isParameter(lines.get(near))) chosen.add(near);
  }
  const order = graph.state(k).filter(line => chosen.has(graph.keyNumber(line))), rank = new Map(), columns = [];
  for (const line of order) {
    const above = graph.reads(line).filter(key => rank.has(key)).map(key => rank.get(key).row + 1);
    const row = Math.max(0, ...above);
    columns[row] = (columns[row] || 0) + 1;
    rank.set(graph.keyNumber(line), {row, column: columns[row] - 1});
  }
  const W = 158, H = 36, X = 16, Y = 26, widest = Math.max(...columns);
  const place = key => {
    const {row, column} = rank.get(key);
    return [2 + (column + (widest - columns[row]) / 2) * (W + X), 2 + row * (H + Y)];
  };
  const svg = drawn("svg", {class: "graph", width: widest * (W + X) - X + 4, height: columns.length * (H + Y) - Y + 4, role: "group", "aria-label": caption});
  for (const line of order)
    for (const read of graph.reads(line).filter(key => rank.has(key))) {
      const [x, y] = place(read), [u, v] = place(graph.keyNumber(line)), bend = Math.max(12, (v - y - H) / 2);
      svg.append(drawn("path", {d: `M${x + W / 2},${y + H} C${x + W / 2},${y + H + bend} ${u + W / 2},${v - bend} ${u + W / 2},${v}`}));
    }
  for (const line of order) {
    const [x, y] = place(graph.keyNumber(line)), key = graph.key(line).split("::").pop();
    const title = drawn("title", {}, graph.text(line));
    const box = drawn("g", {class: `box ${classes.get(graph.keyNumber(line)) || ""}`, tabindex: "0", role: "button", "aria-label": graph.text(line)}, title,
      drawn("rect", {x, y, width: W, height: H}),
      drawn("text", {x: x + 8, y: y + 15}, short(operation(graph.text(line)), 20)),
      drawn("text", {class: "name", x: x + 8, y: y + 29}, ending(key, 24)));
    const chose = () => showNode(graph, line, k, box);
    box.addEventListener("click", chose);
    box.addEventListener("keydown", event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); chose(); } });
    svg.append(box);
  }
  const rest = core.length - MOST_DRAWN;
  return make("figure", {}, make("figcaption", {}, rest > 0 ? `${caption} (the first ${MOST_DRAWN} of ${plural(core.length, "node")})` : caption), svg);
}

// ---- plots: plotly is unpacked when the first one comes into view
let plotly;
function loadPlotly() {
  plotly ??= (async () => {
    await new Promise(idle => window.requestIdleCallback ? requestIdleCallback(idle, {timeout: 500}) : setTimeout(idle));
    const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent), c => c.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    const script = document.createElement("script");
    script.textContent = await new Response(stream).text();
    document.head.append(script);
    return window.Plotly;
  })();
  return plotly;
}
const colour = name => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const plots = new Map();  // element -> what makes its traces and layout
async function draw(element) {
  const library = await loadPlotly();
  const {traces, layout} = plots.get(element)();
  const axis = {gridcolor: colour("--line"), zeroline: false, linecolor: colour("--line"), automargin: true};
  element.classList.remove("wait");
  await library.react(element, traces, {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", height: 210, margin: {l: 50, r: 14, t: 32, b: 40},
    font: {color: colour("--ink"), size: 12, family: "system-ui, sans-serif"}, showlegend: false, hovermode: "closest", ...layout,
    title: {text: layout.title, font: {size: 13}, x: 0, xref: "paper"},
    xaxis: {...axis, ...layout.xaxis}, yaxis: {...axis, ...layout.yaxis},
  }, {displayModeBar: false});
  if (!element.dataset.drawn) resized.observe(element);
  element.dataset.drawn = "1";
}
const resized = new ResizeObserver(entries => {
  for (const {target} of entries) if (target.isConnected && target.offsetParent) window.Plotly.Plots.resize(target);
});
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
}, {rootMargin: "200px"});
function plot(about, recipe) {
  const element = make("div", {class: "plot wait", role: "img", "aria-label": about});
  plots.set(element, recipe);
  seen.observe(element);
  return element;
}
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  for (const element of plots.keys()) if (element.dataset.drawn && element.isConnected) draw(element);
});

function latencyPlot(comparison, title) {
  return plot(`${title}: ${comparison.summary}`, () => {
    const unit = comparison.a.median < 1e-3 ? [1e6, "µs"] : comparison.a.median < 1 ? [1e3, "ms"] : [1, "s"];
    const trace = (measured, name, edge) => ({
      type: "box", x: measured.latencies.map(t => t * unit[0]), name, boxpoints: "all", jitter: .6, pointpos: 0, orientation: "h",
      marker: {color: colour(edge), size: 4, opacity: .55}, line: {color: colour(edge), width: 1.5}, fillcolor: "rgba(0,0,0,0)", hoverinfo: "x",
    });
    const traces = [trace(comparison.b, "after", "--new-edge"), trace(comparison.a, "before", "--faint")];
    const all = [...comparison.a.latencies, ...comparison.b.latencies], least = Math.min(...all);
    const most = Math.min(Math.max(...all), 3 * Math.max(comparison.a.median, comparison.b.median));  // a stall or two would hide the rest
    const beyond = all.filter(t => t > most).length, room = (most - least || least) * .05;
    const range = [least - room, most + room].map(t => t * unit[0]);
    return {traces, layout: {title: `${title}: ${comparison.ratio.toFixed(3)} ×, ${comparison.verdict}`, xaxis: {range, title: {text: `latency, ${unit[1]}${beyond ? ` (${beyond} slower beyond; double-click)` : ""}`}}}};
  });
}

function memoryPlot(before, after, title) {
  if (before.why || after.why) return make("p", {class: "fact"}, `no memory curve: ${before.why || after.why}`);
  return plot(`${title}: the peak was ${before.peak} bytes and is ${after.peak} bytes`, () => {
    const most = Math.max(before.peak, after.peak), unit = most < 2048 ? [1, "bytes"] : most < 1 << 20 ? [1024, "KiB"] : [1 << 20, "MiB"];
    const trace = (curve, name, edge, dash) => ({
      type: "scatter", mode: "lines", name, x: curve.bytes.map((_, i) => i * curve.stretch), y: curve.bytes.map(b => b / unit[0]), text: curve.names,
      line: {shape: "hv", color: colour(edge), width: 1.6, dash}, hovertemplate: `${name}: %{y:.2f} ${unit[1]} at %{text}<extra></extra>`,
    });
    const say = curve => String(+(curve.peak / unit[0]).toPrecision(4));
    const traces = [trace(before, "before", "--faint", "dot"), trace(after, "after", "--new-edge", "solid")];
    return {traces, layout: {title: `${title}: peak ${say(before)} (dotted) → ${say(after)} ${unit[1]}`, xaxis: {title: {text: "node, in the order of the schedule"}}, yaxis: {title: {text: unit[1]}, range: [0, 1.06 * most / unit[0] || 1]}}};
  });
}

// ---- a step: everything is made when it is unfolded
function verificationTable(found) {
  const table = make("table", {}, make("thead", {}, make("tr", {}, ...["output", "max abs", "max rel", "mean abs", "× own", "verdict"].map((name, i) => make("th", {class: i && i < 5 ? "n" : ""}, name)))));
  const body = make("tbody"), say = x => x === null ? "" : typeof x === "string" ? x : x === 0 ? "0" : x.toExponential(1);
  for (const output of found.outputs)
    body.append(make("tr", {class: output.ok ? "" : "bad"}, make("td", {}, output.name.replace(/^output\./, "")), ...[output.max_abs, output.max_rel, output.mean_abs].map(x => make("td", {class: "n"}, say(x))), make("td", {class: "n"}, output.own_units === null ? "" : String(+output.own_units.toPrecision(3))), make("td", {}, output.reason || "ok")));
  table.append(body);
  return make("div", {}, make("p", {class: found.ok ? "good" : "bad"}, found.summary), make("div", {class: "scroll"}, table));
}

function fillStep(details) {
  const graph = graphs[details.dataset.graph], number = +details.dataset.step, step = graph.steps[number], body = details.querySelector(".body");
  if (step.equation) body.append(make("pre", {}, step.equation));
  if (step.summary) body.append(make("p", {class: "fact"}, ...step.summary.split("``").map((part, i) => i % 2 ? make("code", {}, part) : part)));
  if (step.note) body.append(make("p", {class: step.kept ? "fact" : "bad"}, step.note));
  const pictures = make("div", {class: "plots"});
  if (step.in_sequence) pictures.append(latencyPlot(step.in_sequence, "this step against before it"));
  if (step.alone) pictures.append(latencyPlot(step.alone, "this step alone on the original"));
  if (step.curves) pictures.append(memoryPlot(graph.data.curves[step.curves[0]], graph.data.curves[step.curves[1]], "memory in use"));
  if (pictures.children.length) body.append(make("h3", {}, "Time and memory"), pictures);
  if (step.verification) body.append(make("h3", {}, "Verification"), verificationTable(step.verification));
  if (step.rows) {
    details.view = new Rows(graph, graph.rows(number), {state: graph.before(number), label: `what ${step.label} changed`});
    body.append(make("h3", {}, "Diff ", make("small", {}, step.difference)), details.view.box);
    if (step.tensors.length) body.append(folding(plural(step.tensors.length, "tensor"), () => make("pre", {}, step.tensors.join("\n"))));
  } else body.append(make("p", {class: "fact"}, `no diff: ${step.why_no_rows}`));
  if (step.rewrites.length) body.append(make("h3", {}, "Rewrites ", make("small", {}, plural(step.rewrites.length, "independent rewrite"))), rewriteList(graph, number));
}

function folding(title, content) {
  const details = make("details", {class: "rewrite"}, make("summary", {}, title));
  details.addEventListener("toggle", () => { if (details.open && !details.filled) { details.filled = true; details.append(make("div", {class: "body"}, content())); } });
  return details;
}

function rewriteList(graph, number) {
  const box = make("div"), all = graph.steps[number].rewrites;
  let at = 0;
  const more = () => {
    box.querySelector(":scope > button")?.remove();
    for (const end = Math.min(all.length, at + 50); at < end; at++) box.append(rewriteEntry(graph, number, at));
    if (at < all.length) box.append(make("button", {type: "button", onclick: more}, `${plural(all.length - at, "more rewrite")}`));
  };
  more();
  return box;
}

function rewriteEntry(graph, number, r) {
  const rewrite = graph.steps[number].rewrites[r];
  const counts = [["−", "removed"], ["+", "created"], ["~", "changed"]].filter(([, what]) => rewrite[what].length).map(([sign, what]) => sign + rewrite[what].length).join(" ");
  const details = folding("", () => {
    const inside = make("div");
    const keys = new Set([...rewrite.removed, ...rewrite.created, ...rewrite.changed]);
    const k = graph.before(number);
    if (k < 0) return inside;
    const mine = graph.rows(number).filter(([, a, b]) => [a, b].some(line => line >= 0 && keys.has(graph.keyNumber(line))));
    inside.append(new Rows(graph, mine, {fold: false, state: k, label: `the rewrite ${rewrite.id}`}).box);
    const classes = (mine, css) => new Map([...mine.map(key => [key, css]), ...rewrite.changed.map(key => [key, "changed"])]);
    const pictures = [drawing(graph, k, classes(rewrite.removed, "old"), "before"), drawing(graph, k + 1, classes(rewrite.created, "new"), "after")];
    inside.append(make("div", {class: "drawings"}, ...pictures.filter(Boolean)));
    if (rewrite.tensors.length) inside.append(make("p", {class: "fact"}, `tensors: ${rewrite.tensors.join(", ")}`));
    return inside;
  });
  details.id = `g${graph.number}s${number}r${r}`;
  details.querySelector("summary").append(make("b", {}, rewrite.module || "(the model)"), make("span", {}, `${counts} nodes${rewrite.active ? "" : ", undone"}`), " ", make("code", {}, rewrite.source));
  return details;
}

function fillWhole(details) {
  const graph = graphs[details.dataset.graph], lines = graph.last();
  details.view = new Rows(graph, lines.map(line => ["=", line, line]), {fold: false, columns: 1, state: graph.shown.length, label: "the graph now"});
  details.querySelector(".body").append(details.view.box);
}

function fill(details) {
  if (details.filled) return;
  details.filled = true;
  if (details.dataset.whole) fillWhole(details);
  else fillStep(details);
}
document.querySelectorAll("details.step").forEach(details => details.addEventListener("toggle", () => { if (details.open) fill(details); }));
function unfold(details) { fill(details); details.open = true; }

// ---- one node: what it is, where it comes from, what happened to it
const panel = document.getElementById("node");
let opener = null;
function showNode(graph, line, k, from) {
  if (from) opener = from;
  const key = graph.keyNumber(line), {lines, users} = graph.byKey(k);
  const chips = found => found.map(l => make("button", {class: "chip", type: "button", title: graph.text(l), onclick: () => showNode(graph, l, k)}, graph.key(l)));
  const list = make("dl"), add = (name, ...content) => { if (content.length && content[0] !== "") list.append(make("dt", {}, name), make("dd", {}, ...content)); };
  add("computes", graph.text(line));
  add("value", graph.shape(line));
  add("module", graph.module(line));
  add("source", graph.source(line));
  add("reads", ...chips(graph.reads(line).map(r => lines.get(r)).filter(l => l !== undefined)));
  const readers = users.get(key) || [];
  add("read by", ...chips(readers.slice(0, 24)), ...(readers.length > 24 ? [`and ${readers.length - 24} more`] : []));
  const fates = graph.happened(key), story = make("ol", {class: "provenance"});
  if (graph.data.start.some(l => graph.keyNumber(l) === key)) story.append(make("li", {}, "in the original graph"));
  for (const [s, what, r] of fates) {
    const link = make("a", {href: `#g${graph.number}s${s}`}, graph.steps[s].label);
    link.addEventListener("click", event => { event.preventDefault(); goTo(graph, s, key); });
    story.append(make("li", {}, `${what} by `, link, ` in ${graph.steps[s].rewrites[r].module || "the model"}`));
  }
  const now = graph.byKey(graph.shown.length).lines;
  story.append(make("li", {}, now.has(key) ? "" : "not in the graph any more", now.has(key) ? make("a", {href: `#g${graph.number}all`, onclick: event => { event.preventDefault(); goToWhole(graph, key); }}, "in the graph now") : null));
  const picture = drawing(graph, k, new Map([[key, "self"]]), "its neighbours");
  panel.replaceChildren(make("button", {class: "close", type: "button", "aria-label": "close", onclick: closePanel}, "×"), make("h2", {}, graph.key(line)), list, make("h3", {}, "Provenance"), story, ...(picture ? [make("h3", {}, "Neighbourhood"), picture] : []));
  panel.hidden = false;
  panel.scrollTop = 0;
  panel.focus({preventScroll: true});
}
function closePanel() {
  panel.hidden = true;
  if (opener?.isConnected) opener.focus();
}
function goTo(graph, step, key) {
  const details = document.getElementById(`g${graph.number}s${step}`);
  if (!details) return;
  unfold(details);
  opener = details.view?.reveal(key) || details.querySelector("summary");
}
function goToWhole(graph, key) {
  const details = document.getElementById(`g${graph.number}all`);
  unfold(details);
  opener = details.view.reveal(key) || opener;
}

// ---- search over every line there ever was
const input = document.getElementById("search"), list = document.getElementById("found");
const MOST_FOUND = 100;
let chosen = -1, hits = [], index = null;
function allLines() {  // [graph, line, text to search], each node once, as it is last
  if (index) return index;
  index = [];
  for (const graph of graphs) {
    const last = new Map();
    graph.data.lines.forEach((line, i) => last.set(line[1], i));
    for (let k = 0; k <= graph.shown.length; k++) for (const line of graph.state(k)) last.set(graph.keyNumber(line), line);
    for (const line of last.values()) index.push([graph, line, `${graph.text(line)} ${graph.module(line)} ${graph.key(line)}`.toLowerCase()]);
  }
  return index;
}
function search() {
  const words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
  chosen = -1;
  list.replaceChildren();
  hits = words.length ? allLines().filter(([, , text]) => words.every(word => text.includes(word))) : [];
  list.hidden = !words.length;
  input.setAttribute("aria-expanded", String(!list.hidden));
  input.removeAttribute("aria-activedescendant");
  hits.slice(0, MOST_FOUND).forEach(([graph, line], i) => {
    const fates = graph.happened(graph.keyNumber(line)).map(([s, what]) => `${what} by ${graph.steps[s].label}`);
    list.append(make("div", {role: "option", id: `hit${i}`, "aria-selected": "false", onmousedown: event => { event.preventDefault(); choose(i); }}, short(graph.text(line), 160), make("small", {}, [graph.module(line), ...fates].filter(Boolean).join(" · "))));
  });
  if (words.length) list.append(make("div", {class: "note"}, hits.length ? `${plural(hits.length, "node")}${hits.length > MOST_FOUND ? `, the first ${MOST_FOUND} shown` : ""}` : "no node is called so, computes this or lies there"));
}
function point(to) {
  const options = list.querySelectorAll("[role=option]");
  if (!options.length) return;
  options[chosen]?.setAttribute("aria-selected", "false");
  chosen = (to + options.length) % options.length;
  options[chosen].setAttribute("aria-selected", "true");
  options[chosen].scrollIntoView({block: "nearest"});
  input.setAttribute("aria-activedescendant", options[chosen].id);
}
function choose(i) {
  if (!hits[i]) return;
  const [graph, line] = hits[i], key = graph.keyNumber(line);
  list.hidden = true;
  input.setAttribute("aria-expanded", "false");
  let k = graph.shown.length;
  while (k > 0 && !graph.byKey(k).lines.has(key)) k--;
  showNode(graph, graph.byKey(k).lines.get(key) ?? line, k, input);
}
let waiting;
input.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(search, 60); });
input.addEventListener("blur", () => { list.hidden = true; input.setAttribute("aria-expanded", "false"); });
input.addEventListener("focus", () => { if (input.value) search(); });
input.addEventListener("keydown", event => {
  if (event.key === "ArrowDown" || event.key === "ArrowUp") {
    event.preventDefault();
    point(chosen < 0 && event.key === "ArrowUp" ? -1 : chosen + (event.key === "ArrowDown" ? 1 : -1));
  } else if (event.key === "Enter") {
    clearTimeout(waiting);
    if (list.hidden || !hits.length) search();
    choose(Math.max(0, chosen));
  } else if (event.key === "Escape") {
    event.stopPropagation();
    if (list.hidden) input.value = "";
    list.hidden = true;
  }
});

// ---- keys, tools, links to a step
const keys = document.getElementById("keys");
document.getElementById("help").addEventListener("click", () => keys.showModal());
document.addEventListener("keydown", event => {
  if (event.target.matches("input, textarea") || event.ctrlKey || event.metaKey || event.altKey || keys.open) return;
  if (event.key === "/") { event.preventDefault(); input.focus(); input.select(); }
  else if (event.key === "?") keys.showModal();
  else if (event.key === "Escape" && !panel.hidden) closePanel();
  else if (event.key === "n" || event.key === "p") {
    const all = [...document.querySelectorAll("details.step > summary")];
    const here = all.findIndex(summary => summary.parentElement.contains(document.activeElement));
    const next = all[event.key === "n" ? here + 1 : here < 0 ? all.length - 1 : here - 1];
    next?.focus();
    next?.scrollIntoView({block: "nearest"});
  }
});
for (const button of document.querySelectorAll("[data-open], [data-close]"))
  button.addEventListener("click", () => {
    const number = button.dataset.open ?? button.dataset.close;
    for (const details of document.querySelectorAll(`details.step[data-graph="${number}"]:not(.all)`)) {
      if (button.dataset.open !== undefined) unfold(details);
      else details.open = false;
    }
  });
function followHash() {
  const target = location.hash.length > 1 && document.getElementById(location.hash.slice(1));
  if (target && target.matches("details")) { unfold(target); target.querySelector("summary").focus(); target.scrollIntoView(); }
}
addEventListener("hashchange", followHash);
document.addEventListener("click", event => {  // the same link twice changes no hash
  const link = event.target.closest("table.steps a[href^='#']");
  if (link && link.getAttribute("href") === location.hash) followHash();
});
followHash();
const overall = document.querySelector("[data-plot=overall]");
if (overall) {
  overall.append(latencyPlot(DATA.comparison, "the result against the original"));
  const graph = graphs.length === 1 ? graphs[0] : null;
  if (graph) overall.append(memoryPlot(graph.data.curves[0], graph.data.curves[graph.data.curves.length - 1], "memory in use"));
}
document.documentElement.dataset.ready = "1";
})();
