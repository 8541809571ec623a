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
  "": ["nothing", () => null],
  ratio: ["length ratio", (row) => row.x.compression_ratio],
  saved: ["tokens saved", (row) => (row.t === null ? null : row.n - row.t)],
  rewrite: ["tokens of the rewrite", (row) => row.t],
  draft: ["tokens of the draft", (row) => row.n],
  overlap: ["share copied from the draft", (row) => row.x.draft_overlap],
  repetition: ["repetition", (row) => row.x.repetition],
  support: ["support of the answer", (row) => row.x.answer_support],
  step: ["weakest step", (row) => row.x.weakest_step],
  pass: ["student's pass rate", (row) => row.x.pass_rate],
  surprise: ["teacher's surprise: mean −ln p", (row) => row.v && meanOf(row.v.q)],
  worst: ["teacher's surprise: largest −ln p", (row) => row.v && Math.max(...row.v.q.map(nats))],
  entropy: ["teacher's largest entropy", (row) => row.v && Math.max(...row.v.h) / 100],
};
// What is known of a row, by the names that the filters use.
const NAMES = { compression_ratio: "length ratio", draft_overlap: "share copied from the draft", pass_rate: "student's pass rate", answer_support: "support of the answer", weakest_step: "weakest step" };
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
  same: ["unchanged", (pair) => pair.c === 0],
};
const MOST_VALUES = 60; // of a metadata key that becomes a filter
const MOST_CELLS = 4e6; // of a comparison of two traces

const byId = (id) => document.getElementById(id);
const nats = (q) => (q < 0 ? 0 : q / 1000);
const meanOf = (q) => q.reduce((sum, value) => sum + nats(value), 0) / Math.max(q.length, 1);

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
    this.notes = notes.filter(Boolean);
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
      // Bounds of one measure mean nothing for another.
      if (event.target.name === "measure") for (const name of ["least", "most"]) byId("filters").elements[name].value = "";
      this.filter();
    });
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("list").addEventListener("click", (event) => {
      const line = event.target.closest("li");
      if (line) this.choose(this.shown.findIndex((item) => item.key === line.dataset.key));
    });
    document.addEventListener("keydown", (event) => this.press(event));
    window.addEventListener("hashchange", () => this.follow());
    const asked = location.hash;
    if (!this.rows.length && !this.pairs.length) byId("count").textContent = "There are no rows.";
    else if (!this.follow()) {
      if (asked.length > 1) this.notes.push(`The row of this address is not on the page: ${asked}`);
      this.show(this.rows.length ? "rewrites" : "pairs");
    }
    byId("notes").textContent = printable(this.notes.join(" "));
  }

  get items() {
    return this.mode === "pairs" ? this.pairs : this.rows;
  }

  // Show the row that the page's address names, among those that pass its filters. Return whether
  // there is one.
  follow() {
    const [first, ...rest] = location.hash.slice(1).split("&");
    const key = decodeURIComponent(first);
    const row = [...this.rows, ...this.pairs].find((item) => item.key === key);
    if (!row) return false;
    if (this.current && this.current.key === key) return true;
    const mode = row.isPair ? "pairs" : "rewrites";
    if (this.mode !== mode || !this.shown.includes(row)) this.show(mode, new URLSearchParams(rest.join("&")));
    if (!this.shown.includes(row)) this.show(mode);
    this.choose(this.shown.indexOf(row));
    return true;
  }

  show(mode, given = []) {
    this.mode = mode;
    for (const tab of byId("tabs").children) tab.setAttribute("aria-selected", tab.id === `tab-${mode}`);
    byId("filters").replaceChildren(...this.controls());
    for (const [name, value] of given) {
      const field = byId("filters").elements[name];
      if (field) field.value = value;
    }
    byId("list").scrollTop = 0;
    this.filter();
  }

  select(name, label, choices) {
    const options = choices.map(([value, text]) => element("option", text, { value }));
    return element("label", [label, element("select", options, { name })]);
  }

  controls() {
    const items = this.items, made = [];
    const sought = this.mode === "pairs" ? "problem, samples" : "problem, traces";
    made.push(element("label", ["Search", element("input", [], { type: "search", name: "search", placeholder: sought })]));
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
      for (const [name, label] of [["least", "At least"], ["most", "At most"]]) made.push(element("label", [label, element("input", [], { type: "number", name, step: "any" })]));
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
    for (const name of ["least", "most", "order"]) {
      const field = byId("filters").elements[name];
      if (field) field.disabled = !given("measure");
    }
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
    if (this.mode === "pairs" && given("change")) {
      // The largest change first.
      this.shown.sort((a, b) => Math.abs(b.c) - Math.abs(a.c));
    } else if (given("measure")) {
      const sign = given("order") === "down" ? -1 : 1, last = (value) => (Number.isFinite(value) ? 0 : 1);
      this.shown = this.shown.map((row) => [measure(row), row])
        .sort(([a], [b]) => last(a) - last(b) || sign * (a - b)).map(([, row]) => row);
    }
    byId("list").replaceChildren(...this.shown.map((row) => this.line(row)));
    const of = this.items.length.toLocaleString("en");
    byId("count").textContent = `${this.shown.length.toLocaleString("en")} of ${of} ${this.mode === "pairs" ? "problems" : "rows"}`;
    const kept = this.shown.indexOf(this.current);
    if (this.shown.length) this.choose(Math.max(kept, 0));
    else byId("row").replaceChildren(element("p", "No row passes these filters."));
  }

  textOf(row) {
    const traces = row.isPair ? [...row.b, ...row.a].map((sample) => sample.d) : [row.d, row.w];
    return (row.text ??= [row.f, row.g, row.i, ...traces].join("\n").toLowerCase());
  }

  line(row) {
    if (row.line) return row.line;
    const head = row.isPair
      ? [`${changeOf(row)}${row.c === null ? "" : ` ${right(row.b)} → ${right(row.a)}`}`, `${mean(row.b)} → ${mean(row.a)} tokens`]
      : [row.s, `${row.t === null ? row.n : `${row.n} → ${row.t}`} tokens`];
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
    const given = new URLSearchParams([...new FormData(byId("filters"))].filter(([name, value]) => value && name !== "order"));
    if (given.has("measure")) given.set("order", byId("filters").elements.order.value);
    history.replaceState(null, "", `#${encodeURIComponent(this.current.key)}${given.size ? `&${given}` : ""}`);
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
    if (row.v && this.colour !== "difference") {
      const meaning = this.colour === "entropy" ? "The darker a token, the less sure the teacher was there" : "The darker a token, the less likely the teacher finds it";
      parts.push(element("p", `${meaning} (darkest: ${this.colour === "entropy" ? "1 nat" : "13%"} and ${this.colour === "entropy" ? "more" : "less"}). Point at one, or press ← and →: what the teacher would have written.`, { id: "token", "aria-live": "polite" }));
    }
    if (row.w !== null && !row.v && !round.note) parts.push(element("p", "It was not kept, so the teacher did not score its tokens.", { className: "facts" }));
    const known = { ...row.m, ...row.x };
    if (row.a !== null && row.a !== undefined) known["keeps the draft's answer"] = row.a ? "yes" : "no";
    known.row = row.i;
    known.prompt = row.p;
    const lines = Object.entries(known).filter(([, value]) => value !== null).flatMap(([name, value]) => [element("dt", printable(NAMES[name] ?? name.replaceAll("_", " "))), element("dd", printable(value))]);
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
    const change = row.c === null ? "no gold answer" : `${changeOf(row)}: ${right(row.b)} right before, ${right(row.a)} after`;
    return [element("h2", change), element("p", `before: ${this.names[0]} · after: ${this.names[1]}`, { className: "facts" }), ...this.question(row), element("div", traces, { className: "traces" })];
  }

  trace(title, isRight, facts, content) {
    const verdict = isRight === null || isRight === undefined ? [] : [element("span", isRight ? "right" : "wrong", { className: isRight ? "right" : "wrong" })];
    return element("section", [element("h3", [title, ...verdict, element("span", facts, { className: "facts" })]), element("pre", content)], { className: "trace" });
  }

  tokens(values, pieces) {
    const show = (id) => JSON.stringify(pieces[id] ?? `<${id}>`);
    const chance = (q) => (q < 0 ? "below those stored" : Math.exp(-nats(q)).toFixed(3));
    const spans = values.ids.map((id, at) => {
      // The root makes a small doubt visible.
      const doubt = this.colour === "entropy" ? values.h[at] / 100 : values.q[at] < 0 ? 1 : nats(values.q[at]) / 2;
      const heat = Math.sqrt(Math.max(doubt, 0));
      const piece = pieces[id] ?? `<${id}>`;
      // A token's text is known as it stands after another.
      const span = element("span", printable(at ? piece : piece.trimStart()), { className: "token" });
      span.style.background = `rgba(var(--heat), ${Math.min(heat, 1).toFixed(2)})`;
      span.dataset.at = at;
      return span;
    });
    const box = element("span", spans);
    const tell = (span) => {
      if (!span) return;
      const at = Number(span.dataset.at), best = values.top[at], lines = [];
      for (let i = 0; i < best.length; i += 2) lines.push(`${chance(best[i + 1])}  ${printable(show(best[i]))}`);
      byId("token").textContent = `${printable(show(values.ids[at]))}: probability ${chance(values.q[at])}, entropy ${(values.h[at] / 100).toFixed(2)} nats\n${lines.join("\n")}`;
      for (const other of box.querySelectorAll(".pinned")) other.classList.remove("pinned");
      span.classList.add("pinned");
    };
    for (const kind of ["mouseover", "click"]) box.addEventListener(kind, (event) => tell(event.target.closest(".token")));
    this.step = (by) => {
      const pinned = box.querySelector(".pinned"), at = pinned ? spans.indexOf(pinned) + by : 0;
      tell(spans[Math.min(Math.max(at, 0), spans.length - 1)]);
    };
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
    else if (inList && event.key === "Home") this.choose(0);
    else if (inList && event.key === "End") this.choose(this.shown.length - 1);
    else if (/^Arrow(Left|Right)$/.test(event.key) && byId("token")) this.step(event.key === "ArrowLeft" ? -1 : 1);
    else if (event.key === "/") byId("filters").elements.search.focus();
    else if (event.key === "t" && this.current && this.current.v) {
      this.colour = { difference: "probability", probability: "entropy", entropy: "difference" }[this.colour];
      this.draw();
    } else return;
    event.preventDefault();
  }
}

function right(samples) {
  return `${samples.filter((sample) => sample.o).length}/${samples.length}`;
}

function changeOf(pair) {
  return pair.c === null ? "no gold answer" : pair.c < 0 ? "lost" : pair.c > 0 ? "won" : "unchanged";
}

// The mean number of tokens.
function mean(samples) {
  return Math.round(samples.reduce((sum, sample) => sum + sample.n, 0) / samples.length);
}

readData().then((data) => new Page(data), (error) => {
  byId("count").textContent = `The rows cannot be read: ${error}. Is the file whole, and the browser of 2023 or newer?`;
});
