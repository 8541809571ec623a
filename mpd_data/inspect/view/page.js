"use strict";
// The names of a row's fields are explained in rows.py.

const REASONS = {
  ok: "kept",
  draft: "a draft; the round has no rewrites",
  draft_truncated: "the draft was cut off, so the teacher was not asked",
  draft_rejected: "the draft is not of the kind that is rewritten",
  too_long: "does not fit the context",
  truncated: "the rewrite hit its length limit",
  malformed: "the teacher's turn has not the template's form",
  check_failed: "the checker failed on it",
  answer_changed: "its answer is not the draft's",
  longer: "longer than the filter allows",
  too_short: "shorter than the filter allows",
  copied: "it copies the draft",
  repetitive: "it repeats itself",
  incorrect: "its answer is wrong",
  unsupported: "it does not carry its answer",
  not_chosen: "another candidate was chosen",
};
const MEASURES = {
  "": ["order of the keys", () => null],
  ratio: ["length ratio", (row) => row.x.compression_ratio],
  rewrite: ["tokens of the rewrite", (row) => row.t],
  draft: ["tokens of the draft", (row) => row.n],
  overlap: ["share copied from the draft", (row) => row.x.draft_overlap],
  repetition: ["repetition", (row) => row.x.repetition],
  support: ["support of the answer", (row) => row.x.answer_support],
  step: ["weakest step", (row) => row.x.weakest_step],
  pass: ["student's pass rate", (row) => row.x.pass_rate],
  surprise: ["teacher's mean −ln p", (row) => row.v && meanOf(row.v.q)],
  worst: ["teacher's largest −ln p", (row) => row.v && Math.max(...row.v.q.map(tenth))],
};
const VERDICTS = {
  "": ["any", () => true],
  kept: ["draft right, rewrite right", (row) => row.o === true && row.k === true],
  broke: ["draft right, rewrite wrong", (row) => row.o === true && row.k === false],
  mended: ["draft wrong, rewrite right", (row) => row.o === false && row.k === true],
  both: ["both wrong", (row) => row.o === false && row.k === false],
  right: ["draft right", (row) => row.o === true],
  wrong: ["draft wrong", (row) => row.o === false],
  unknown: ["no gold answer", (row) => row.g === null || row.g === undefined],
};
const CHANGES = {
  "": ["all problems", () => true],
  lost: ["answers lost", (pair) => pair.c < 0],
  won: ["answers won", (pair) => pair.c > 0],
  same: ["neither", (pair) => pair.c === 0],
};
const MOST_VALUES = 60; // of a metadata key that becomes a filter
const MOST_CELLS = 4e6; // of a comparison of two traces

const byId = (id) => document.getElementById(id);
const tenth = (q) => (q < 0 ? 0 : q / 10);
const meanOf = (q) => q.reduce((sum, value) => sum + tenth(value), 0) / Math.max(q.length, 1);

function element(tag, content, properties = {}) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in made) made[name] = value;
    else made.setAttribute(name, value);
  }
  made.append(...(Array.isArray(content) ? content : [content]));
  return made;
}

// Control characters, and those that turn the direction of writing, as escapes.
function printable(text) {
  return String(text).replace(/[\u0000-\u0009\u000b-\u001f\u007f-\u009f\u200b-\u200f\u2028-\u202e\u2066-\u2069\ufeff]/g, (c) =>
    c === "\t" ? "    " : "\\u" + c.charCodeAt(0).toString(16).padStart(4, "0"));
}

async function readData() {
  const bytes = Uint8Array.from(atob(byId("data").textContent), (c) => c.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return JSON.parse(await new Response(stream).text());
}

// -- two traces, word by word ----------------------------------------------------------------

function wordsOf(text) {
  return text.match(/[\p{L}\p{N}_]+\s*|[^\p{L}\p{N}_\s]\s*|\s+/gu) || [];
}

// Return for each word of both sides whether it is in their longest common subsequence; null where
// the traces are too long to compare.
function common(left, right) {
  const a = left.map((word) => word.trim()), b = right.map((word) => word.trim());
  const inLeft = new Array(a.length).fill(false), inRight = new Array(b.length).fill(false);
  let start = 0, endA = a.length, endB = b.length;
  while (start < endA && start < endB && a[start] === b[start]) inLeft[start] = inRight[start++] = true;
  while (endA > start && endB > start && a[endA - 1] === b[endB - 1]) inLeft[--endA] = inRight[--endB] = true;
  const rows = endA - start, columns = endB - start;
  if (rows * columns > MOST_CELLS) return null;
  const table = new Uint16Array((rows + 1) * (columns + 1)), width = columns + 1;
  for (let i = rows - 1; i >= 0; i--)
    for (let j = columns - 1; j >= 0; j--)
      table[i * width + j] = a[start + i] === b[start + j]
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
  for (let i = 0, j = 0; i < rows && j < columns; ) {
    if (a[start + i] === b[start + j]) inLeft[start + i++] = inRight[start + j++] = true;
    else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i++;
    else j++;
  }
  return [inLeft, inRight];
}

function marked(words, isCommon, tag) {
  const parts = [];
  for (let i = 0; i < words.length; ) {
    let end = i;
    while (end < words.length && isCommon[end] === isCommon[i]) end++;
    const text = printable(words.slice(i, end).join(""));
    parts.push(isCommon[i] ? text : element(tag, text));
    i = end;
  }
  return parts;
}

function compared(draft, rewrite) {
  const left = wordsOf(draft), right = wordsOf(rewrite), found = common(left, right);
  if (found === null) return [[printable(draft)], [printable(rewrite)]];
  return [marked(left, found[0], "del"), marked(right, found[1], "ins")];
}

// -- the page -----------------------------------------------------------------------------------

class Page {
  constructor(data) {
    this.pairs = data.pairs.map((pair) => ({ ...pair, key: `pair-${pair.i}`, isPair: true }));
    this.rounds = data.rounds;
    this.rows = data.rounds.flatMap((round, at) => round.rows.map((row) => ({ ...row, key: row.i, at })));
    this.names = data.names;
    this.colour = "difference";
    const notes = data.rounds.flatMap((round) => [
      round.total > round.rows.length ? `${round.name}: ${round.rows.length.toLocaleString("en")} of ${round.total.toLocaleString("en")} rows.` : "",
      round.note,
    ]);
    byId("notes").textContent = notes.filter(Boolean).join(" ");
    const tabs = [["rewrites", "Drafts and rewrites", this.rows], ["pairs", "Before and after", this.pairs]];
    for (const [mode, label, items] of tabs) {
      if (!items.length) continue;
      const tab = element("button", `${label} (${items.length.toLocaleString("en")})`, { type: "button", role: "tab", id: `tab-${mode}` });
      tab.addEventListener("click", () => this.show(mode));
      byId("tabs").append(tab);
    }
    byId("filters").addEventListener("input", (event) => {
      // Who sorts wants to see what comes first.
      if (/^(measure|order)$/.test(event.target.name)) this.current = this.deselected();
      this.filter();
    });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("list").addEventListener("click", (event) => {
      const line = event.target.closest("li");
      if (line) this.choose(this.shown.findIndex((item) => item.key === line.dataset.key));
    });
    document.addEventListener("keydown", (event) => this.press(event));
    window.addEventListener("hashchange", () => this.follow());
    if (!this.rows.length && !this.pairs.length) byId("count").textContent = "There are no rows.";
    else if (!this.follow()) this.show(this.rows.length ? "rewrites" : "pairs");
  }

  get items() {
    return this.mode === "pairs" ? this.pairs : this.rows;
  }

  // Show the row that the page's address names. Return whether there is one.
  follow() {
    const key = decodeURIComponent(location.hash.slice(1));
    const row = [...this.rows, ...this.pairs].find((item) => item.key === key);
    if (!row) return false;
    if (this.current && this.current.key === key) return true;
    const mode = row.isPair ? "pairs" : "rewrites";
    if (this.mode !== mode || !this.shown.includes(row)) this.show(mode);
    this.choose(this.shown.indexOf(row));
    return true;
  }

  show(mode) {
    this.mode = mode;
    for (const tab of byId("tabs").children) tab.setAttribute("aria-selected", tab.id === `tab-${mode}`);
    byId("filters").replaceChildren(...this.controls());
    this.filter();
  }

  select(name, label, choices) {
    const options = choices.map(([value, text]) => element("option", text, { value }));
    return element("label", [label, element("select", options, { name })]);
  }

  controls() {
    const items = this.items, made = [];
    made.push(element("label", ["Search", element("input", [], { type: "search", name: "search", placeholder: "problem, draft, rewrite" })]));
    if (this.mode === "pairs") {
      const count = (test) => items.filter(test).length.toLocaleString("en");
      made.push(this.select("change", "Answers", Object.entries(CHANGES).map(([value, [text, test]]) => [value, `${text} (${count(test)})`])));
    } else {
      const statuses = new Map();
      for (const row of items) statuses.set(row.s, (statuses.get(row.s) || 0) + 1);
      const known = [...statuses].sort((a, b) => b[1] - a[1]).map(([s, n]) => [s, `${s} (${n.toLocaleString("en")})`]);
      made.push(this.select("status", "Status", [["", "all"], ...known]));
      made.push(this.select("verdict", "Answers", Object.entries(VERDICTS).map(([value, [text]]) => [value, text])));
      if (this.rounds.length > 1) made.push(this.select("at", "Round", [["", "all"], ...this.rounds.map((round, at) => [String(at), round.name])]));
      const usable = Object.entries(MEASURES).filter(([name, [, of]]) => !name || items.some((row) => Number.isFinite(of(row))));
      made.push(this.select("measure", "Sort by", usable.map(([value, [text]]) => [value, text])));
      made.push(this.select("order", "Order", [["up", "smallest first"], ["down", "largest first"]]));
      for (const [name, label] of [["least", "From"], ["most", "To"]]) made.push(element("label", [label, element("input", [], { type: "number", name, step: "any" })]));
    }
    for (const name of new Set(items.flatMap((row) => Object.keys(row.m)))) {
      const values = [...new Set(items.map((row) => row.m[name]).filter((value) => value !== undefined).map(String))].sort();
      if (values.length > 1 && values.length <= MOST_VALUES) made.push(this.select(`meta:${name}`, printable(name), [["", "all"], ...values.map((value) => [value, printable(value)])]));
    }
    return made;
  }

  filter() {
    const form = new FormData(byId("filters")), given = (name) => form.get(name) || "";
    const words = given("search").toLowerCase();
    const [, isOf] = CHANGES[given("change")], [, isRight] = VERDICTS[given("verdict")], [, measure] = MEASURES[given("measure")];
    const least = given("least") === "" ? -Infinity : Number(given("least"));
    const most = given("most") === "" ? Infinity : Number(given("most"));
    const bounded = least > -Infinity || most < Infinity;
    const metadata = [...form].filter(([name, value]) => name.startsWith("meta:") && value);
    const isShown = (row) => {
      if (this.mode === "pairs" ? !isOf(row) : !isRight(row)) return false;
      if (given("status") && row.s !== given("status")) return false;
      if (given("at") && row.at !== Number(given("at"))) return false;
      if (metadata.some(([name, value]) => String(row.m[name.slice(5)]) !== value)) return false;
      if (given("measure") && bounded) {
        const value = measure(row);
        if (!Number.isFinite(value) || value < least || value > most) return false;
      }
      return !words || this.textOf(row).includes(words);
    };
    this.shown = this.items.filter(isShown);
    if (given("measure")) {
      const sign = given("order") === "down" ? -1 : 1, last = (value) => (Number.isFinite(value) ? 0 : 1);
      this.shown = this.shown.map((row) => [measure(row), row])
        .sort(([a], [b]) => last(a) - last(b) || sign * (a - b)).map(([, row]) => row);
    }
    byId("list").replaceChildren(...this.shown.map((row) => this.line(row)));
    const of = this.items.length.toLocaleString("en");
    byId("count").textContent = `${this.shown.length.toLocaleString("en")} of ${of} ${this.mode === "pairs" ? "problems" : "rows"}`;
    const kept = this.shown.indexOf(this.current);
    if (this.shown.length) this.choose(Math.max(kept, 0), false);
    else byId("row").replaceChildren(element("p", "No row passes these filters."));
  }

  textOf(row) {
    const traces = row.isPair ? [...row.b, ...row.a].map((sample) => sample.d) : [row.d, row.w];
    return (row.text ??= [row.f, row.g, row.i, ...traces].join("\n").toLowerCase());
  }

  line(row) {
    if (row.line) return row.line;
    const head = row.isPair
      ? [row.c === null ? "no gold answer" : row.c < 0 ? "lost" : row.c > 0 ? "won" : "same", `${mean(row.b)} → ${mean(row.a)}`]
      : [row.s, row.t === null ? `${row.n}` : `${row.n} → ${row.t}`];
    const line = element("li", [
      element("div", head.map((text) => element("span", text)), { className: "head" }),
      element("div", printable(row.f).slice(0, 160), { className: "text" }),
    ], { role: "option" });
    line.dataset.key = row.key;
    line.id = `line-${row.key}`;
    return (row.line = line);
  }

  deselected() {
    if (this.current && this.current.line) this.current.line.setAttribute("aria-selected", "false");
    return null;
  }

  choose(at, scroll = true) {
    if (at < 0 || at >= this.shown.length) return;
    this.deselected();
    this.current = this.shown[at];
    this.current.line.setAttribute("aria-selected", "true");
    byId("list").setAttribute("aria-activedescendant", this.current.line.id);
    if (scroll) this.current.line.scrollIntoView({ block: "nearest" });
    history.replaceState(null, "", `#${encodeURIComponent(this.current.key)}`);
    this.draw();
  }

  draw() {
    const row = this.current;
    byId("row").replaceChildren(...(row.isPair ? this.pair(row) : this.rewrite(row)));
    byId("row").scrollTop = 0;
  }

  question(row) {
    const gold = row.g === null || row.g === undefined ? [] : [element("p", `gold answer: ${printable(row.g)}`, { className: "facts" })];
    return [element("p", printable(row.f), { className: "problem" }), ...gold];
  }

  rewrite(row) {
    const round = this.rounds[row.at];
    const parts = [element("h2", `${row.s}: ${REASONS[row.s] || ""}`), ...this.question(row)];
    const colours = [["difference", "difference"], ["probability", "teacher's probability"], ["entropy", "teacher's entropy"]];
    if (row.v) {
      const buttons = colours.map(([name, text]) => {
        const button = element("button", text, { type: "button" });
        button.setAttribute("aria-pressed", this.colour === name);
        button.addEventListener("click", () => { this.colour = name; this.draw(); });
        return button;
      });
      parts.push(element("p", ["Colours: ", ...buttons], { className: "colours" }));
    }
    const [before, after] = row.w === null ? [[printable(row.d)], []] : compared(row.d, row.w);
    const traces = [this.trace("draft", row.o, `${row.n} tokens`, before)];
    if (row.w !== null) {
      const isColoured = row.v && this.colour !== "difference";
      const facts = [row.t === null ? "" : `${row.t} tokens`, row.x.compression_ratio === undefined ? "" : `${Math.round(100 * row.x.compression_ratio)}% of the draft`];
      traces.push(this.trace("rewrite", row.k, facts.filter(Boolean).join(" · "), isColoured ? this.tokens(row.v, round.pieces) : after));
    }
    parts.push(element("div", traces, { className: "traces" }));
    if (row.v && this.colour !== "difference") parts.push(element("p", "Point at a token: what the teacher would have written there.", { id: "token" }));
    const known = { ...row.m, ...row.x };
    if (row.a !== null && row.a !== undefined) known["keeps the draft's answer"] = row.a ? "yes" : "no";
    known.row = row.i;
    known.prompt = row.p;
    const lines = Object.entries(known).filter(([, value]) => value !== null).flatMap(([name, value]) => [element("dt", printable(name.replaceAll("_", " "))), element("dd", printable(value))]);
    parts.push(element("dl", lines));
    const limits = Object.entries(round.limits).filter(([, value]) => value !== null).map(([name, value]) => `${name.replaceAll("_", " ")} ${value}`);
    if (limits.length) parts.push(element("p", `Filters: ${limits.join(", ")}`, { className: "facts" }));
    return parts;
  }

  pair(row) {
    const side = (samples, name) => samples.map((sample, at) =>
      this.trace(`${name}${samples.length > 1 ? `, sample ${at + 1}` : ""}`, sample.o, `${sample.n} tokens${sample.cut ? " · cut off at the limit" : ""}`, [printable(sample.d)]));
    const [base, now] = [side(row.b, "before"), side(row.a, "after")];
    const traces = [];
    for (let i = 0; i < Math.max(base.length, now.length); i++) traces.push(base[i] || element("div", ""), now[i] || element("div", ""));
    const change = row.c === null ? "no gold answer" : row.c < 0 ? "answers lost" : row.c > 0 ? "answers won" : "as many right answers as before";
    return [element("h2", change), element("p", `before: ${this.names[0]} · after: ${this.names[1]}`, { className: "facts" }), ...this.question(row), element("div", traces, { className: "traces" })];
  }

  trace(title, isRight, facts, content) {
    const verdict = isRight === null || isRight === undefined ? [] : [element("span", isRight ? "right" : "wrong", { className: isRight ? "right" : "wrong" })];
    return element("section", [element("h3", [title, ...verdict, element("span", facts, { className: "facts" })]), element("pre", content)], { className: "trace" });
  }

  tokens(values, pieces) {
    const show = (id) => JSON.stringify(pieces[id] ?? `<${id}>`);
    const chance = (q) => (q < 0 ? "below those stored" : Math.exp(-q / 10).toFixed(3));
    const spans = values.ids.map((id, at) => {
      const heat = this.colour === "entropy" ? values.h[at] / 200 : values.q[at] < 0 ? 1 : Math.min(values.q[at] / 40, 1);
      const piece = pieces[id] ?? `<${id}>`;
      // A token's text is known as it stands after another.
      const span = element("span", printable(at ? piece : piece.trimStart()), { className: "token" });
      span.style.background = `rgba(var(--heat), ${Math.min(heat, 1).toFixed(2)})`;
      span.dataset.at = at;
      return span;
    });
    const box = element("span", spans);
    const tell = (event) => {
      const span = event.target.closest(".token");
      if (!span) return;
      const at = Number(span.dataset.at), best = values.top[at], lines = [];
      for (let i = 0; i < best.length; i += 2) lines.push(`${chance(best[i + 1])}  ${printable(show(best[i]))}`);
      byId("token").textContent = `${printable(show(values.ids[at]))}: probability ${chance(values.q[at])}, entropy ${(values.h[at] / 100).toFixed(2)} nats\n${lines.join("\n")}`;
      for (const other of box.querySelectorAll(".pinned")) other.classList.remove("pinned");
      span.classList.add("pinned");
    };
    box.addEventListener("mouseover", tell);
    box.addEventListener("click", tell);
    return [box];
  }

  press(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Escape") return byId("list").focus();
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const at = this.shown ? this.shown.indexOf(this.current) : -1;
    const inList = event.target.id === "list";
    if (event.key === "j" || (inList && event.key === "ArrowDown")) this.choose(at + 1);
    else if (event.key === "k" || (inList && event.key === "ArrowUp")) this.choose(at - 1);
    else if (event.key === "/") byId("filters").elements.search.focus();
    else if (event.key === "t" && this.current && this.current.v) {
      this.colour = { difference: "probability", probability: "entropy", entropy: "difference" }[this.colour];
      this.draw();
    } else return;
    event.preventDefault();
  }
}

function mean(samples) {
  return Math.round(samples.reduce((sum, sample) => sum + sample.n, 0) / samples.length);
}

readData().then((data) => new Page(data), (error) => {
  byId("count").textContent = `The rows cannot be read: ${error}. Is the file whole, and the browser of 2023 or newer?`;
});
