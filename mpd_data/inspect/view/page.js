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
  kl: ["divergence in training, nats per token", (row) => row.x.divergence],
  surprise: ["teacher's surprise: mean −ln p", (row) => row.v && meanOf(row.v.q)],
  worst: ["teacher's surprise: largest −ln p", (row) => row.v && Math.max(...row.v.q.map(nats))],
  entropy: ["teacher's largest entropy", (row) => row.v && Math.max(...row.v.h) / 100],
};
// What is known of a row, by the names that the filters use.
const NAMES = { compression_ratio: "length ratio", draft_overlap: "share copied from the draft", pass_rate: "student's pass rate", answer_support: "support of the answer", weakest_step: "weakest step", divergence: "divergence in training, nats per token" };
// Measures that a round may lack, and what makes them.
const MADE_BY = { support: "mpd-gen rewrite --support", kl: "mpd-gen view --training" };
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
const numeral = (number) => number.toLocaleString("en");
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
    const text = printable(words.slice(i, end).join("")), bare = text.trimEnd();
    parts.push(...(isCommon[i] ? [text] : [element(tag, bare), text.slice(bare.length)]));
    i = end;
  }
  return parts;
}

function compared(draft, rewrite) {
  const left = wordsOf(draft), right = wordsOf(rewrite), found = common(left, right);
  if (found === null) return [[printable(draft)], [printable(rewrite)]];
  return [marked(left, found[0], "del"), marked(right, found[1], "ins")];
}

// -- where the rows come from --------------------------------------------------------------------
//
// Of a file, all of them are in the page; of a server, it asks for those that it shows. Both have
//   facets(mode)               what there is to choose among: the number of rows (`size`), `statuses` with their counts,
//                              the `measures` that any row has, `metadata` as names with their values
//   find(mode, given, wanted)  of the rows that pass the filters `given`, in order, how many there are (`total`) and a
//                              list of them: `rows`, from number `offset` on. It is the one with the row `wanted.key`
//                              or number `wanted.number`, else the first.
//   whole(row)                 a row of such a list with its texts
// and `pause`: after how many milliseconds without a further letter to search for what was typed.

class Embedded {
  pause = 0;

  constructor(data) {
    this.rounds = data.rounds;
    this.names = data.names;
    this.pairs = data.pairs.map((pair) => ({ ...pair, key: `pair-${pair.i}`, isPair: true }));
    this.rows = data.rounds.flatMap((round, at) => (round.rows ?? []).map((row) => ({ ...row, key: row.i, at })));
  }

  facets(mode) {
    const items = this[mode], statuses = new Map(), metadata = new Map();
    for (const row of items) {
      statuses.set(row.s, (statuses.get(row.s) || 0) + 1);
      for (const [name, value] of Object.entries(row.m)) metadata.set(name, (metadata.get(name) ?? new Set()).add(String(value)));
    }
    const measures = Object.entries(MEASURES).filter(([, [, of]]) => mode === "rows" && items.some((row) => Number.isFinite(of(row))));
    return { size: items.length, statuses: [...statuses], measures: measures.map(([name]) => name), metadata: [...metadata].map(([name, values]) => [name, [...values].sort()]) };
  }

  async find(mode, given) {
    const words = (given.search || "").toLowerCase();
    const [, isOf] = CHANGES[given.change || ""], [, isRight] = VERDICTS[given.verdict || ""], [, measure] = MEASURES[given.measure || ""];
    const least = Number(given.least ?? -Infinity), most = Number(given.most ?? Infinity);
    const bounded = least > -Infinity || most < Infinity;
    const metadata = Object.entries(given).filter(([name]) => name.startsWith("meta:"));
    const isShown = (row) => {
      if (row.isPair ? !isOf(row) : !isRight(row)) return false;
      if (given.status && row.s !== given.status) return false;
      if (given.at && row.at !== Number(given.at)) return false;
      if (metadata.some(([name, value]) => String(row.m[name.slice(5)]) !== value)) return false;
      if (given.measure && bounded) {
        const value = measure(row);
        if (!Number.isFinite(value) || value < least || value > most) return false;
      }
      return !words || this.textOf(row).includes(words);
    };
    let rows = this[mode].filter(isShown);
    if (mode === "pairs" && given.change) {
      // The largest change first.
      rows.sort((a, b) => Math.abs(b.c) - Math.abs(a.c));
    } else if (given.measure) {
      const sign = given.order === "down" ? -1 : 1, last = (value) => (Number.isFinite(value) ? 0 : 1);
      rows = rows.map((row) => [measure(row), row])
        .sort(([a], [b]) => last(a) - last(b) || sign * (a - b)).map(([, row]) => row);
    }
    return { rows, offset: 0, total: rows.length };
  }

  textOf(row) {
    const traces = row.isPair ? [...row.b, ...row.a].map((sample) => sample.d) : [row.d, row.w];
    return (row.text ??= [row.f, row.g, row.i, ...traces].join("\n").toLowerCase());
  }

  async whole(row) {
    return row;
  }
}

class Served extends Embedded {
  pause = 400;

  constructor(data) {
    super(data);
    this.known = data.facets;
  }

  // Pairs are few: they are in the page.
  facets(mode) {
    return mode === "pairs" ? super.facets(mode) : this.known;
  }

  async find(mode, given, wanted) {
    if (mode === "pairs") return super.find(mode, given);
    // The server need not finish what nobody waits for.
    if (this.asked) this.asked.abort();
    this.asked = new AbortController();
    const found = await this.ask("rows", { ...given, ...wanted }, this.asked.signal);
    for (const row of found.rows) row.key = row.i;
    return found;
  }

  async whole(row) {
    if (row.isPair || "d" in row) return row;
    const { row: whole, pieces } = await this.ask("row", { key: row.key });
    this.rounds[row.at].pieces = { ...this.rounds[row.at].pieces, ...pieces };
    return Object.assign(row, whole);
  }

  async ask(what, given, signal) {
    const answer = await fetch(`${what}?${new URLSearchParams(given)}`, { signal }).catch((error) => {
      throw error.name === "AbortError" ? error : new Error("The server does not answer: mpd-gen view --serve has ended.");
    });
    const said = await answer.json();
    if (!answer.ok) throw new Error(said.error);
    return said;
  }
}

// -- the page -----------------------------------------------------------------------------------

class Page {
  constructor(source) {
    this.source = source;
    this.colour = "difference";
    this.turn = 0; // of what was asked of the source: an answer to something older is dropped
    const notes = source.rounds.flatMap((round) => [
      round.rows && round.total > round.rows.length ? `${round.name}: ${numeral(round.rows.length)} of ${numeral(round.total)} rows.` : "",
      round.note,
    ]);
    this.notes = [...new Set(notes)].filter(Boolean);
    byId("token-keys").hidden = source.rounds.every((round) => round.note);
    const tabs = [["rows", "Drafts and rewrites"], ["pairs", "Before and after"]];
    for (const [mode, label] of tabs) {
      const { size } = source.facets(mode);
      if (!size) continue;
      const tab = element("button", `${label} (${numeral(size)})`, { type: "button", role: "tab", id: `tab-${mode}` });
      tab.setAttribute("aria-controls", "panel");
      tab.addEventListener("click", () => this.show(mode, [], {}, "push"));
      byId("tabs").append(tab);
    }
    byId("filters").addEventListener("input", (event) => this.change(event.target));
    byId("filters").addEventListener("submit", (event) => event.preventDefault());
    byId("list").addEventListener("click", (event) => {
      const line = event.target.closest("li");
      if (!line) return;
      this.choose(this.shown.findIndex((item) => item.key === line.dataset.key));
      // On a narrow screen the row is below the list.
      if (getComputedStyle(byId("panel")).display === "block") byId("row").scrollIntoView();
    });
    document.addEventListener("keydown", (event) => this.press(event));
    window.addEventListener("hashchange", () => this.follow());
    byId("notes").textContent = printable(this.notes.join(" "));
    if (!byId("tabs").children.length) byId("count").textContent = "There are no rows.";
    else this.follow();
  }

  // Show the row that the page's address names: among the rows that pass its filters, else among all.
  async follow() {
    const given = new URLSearchParams(`key=${location.hash.slice(1)}`), key = given.get("key");
    const mode = key.startsWith("pair-") ? "pairs" : "rows";
    given.delete("key");
    // Of filters that no row passes.
    if (given.size && (key === "" || key === "pair-") && byId(`tab-${mode}`)) return this.show(mode, given);
    const missing = key ? [`The row of this address is not here: ${location.hash}`] : [];
    if (key && byId(`tab-${mode}`)) {
      for (const filters of [given, []]) if (await this.show(mode, filters, { key }, "follow") !== false) return;
    }
    byId("notes").textContent = printable([...this.notes, ...missing].join(" "));
    this.show(byId("tabs").firstChild.id.slice(4));
  }

  // Show the rows of a tab that pass the filters `given`. Return like `filter`.
  show(mode, given = [], wanted = {}, step = "replace") {
    this.mode = mode;
    for (const tab of byId("tabs").children) {
      const isChosen = tab.id === `tab-${mode}`;
      tab.setAttribute("aria-selected", isChosen);
      tab.tabIndex = isChosen ? 0 : -1;
    }
    byId("panel").setAttribute("aria-labelledby", `tab-${mode}`);
    byId("filters").replaceChildren(...this.controls());
    for (const [name, value] of given) {
      const field = byId("filters").elements[name];
      if (field) field.value = value;
    }
    return this.filter(wanted, step);
  }

  select(name, label, choices) {
    const options = choices.map(([value, text]) => element("option", text, { value }));
    return element("label", [label, element("select", options, { name })]);
  }

  controls() {
    const { statuses, measures, metadata } = this.source.facets(this.mode), made = [];
    const sought = this.mode === "pairs" ? "problem, samples" : "problem, traces";
    made.push(element("label", ["Search", element("input", [], { type: "search", name: "search", placeholder: sought })]));
    if (this.mode === "pairs") {
      const count = (test) => numeral(this.source.pairs.filter(test).length);
      made.push(this.select("change", "Answers", Object.entries(CHANGES).map(([value, [text, test]]) => [value, `${text} (${count(test)})`])));
    } else {
      const known = [...statuses].sort((a, b) => b[1] - a[1]).map(([s, n]) => [s, `${s} (${numeral(n)})`]);
      made.push(this.select("status", "Status", [["", "all"], ...known]));
      made.push(this.select("verdict", "Answers", Object.entries(VERDICTS).map(([value, [text]]) => [value, text])));
      if (this.source.rounds.length > 1) made.push(this.select("at", "Round", [["", "all"], ...this.source.rounds.map((round, at) => [String(at), round.name])]));
      const sorts = this.select("measure", "Sort by", ["", ...measures].map((value) => [value, MEASURES[value][0]]));
      if (statuses.some(([status]) => status !== "draft")) {
        const missing = Object.entries(MADE_BY).filter(([name]) => !measures.includes(name));
        sorts.lastChild.append(...missing.map(([name, command]) => element("option", `${MEASURES[name][0]}: not known, see ${command}`, { disabled: true })));
      }
      made.push(sorts);
      made.push(this.select("order", "Order", [["up", "smallest first"], ["down", "largest first"]]));
      for (const [name, label] of [["least", "At least"], ["most", "At most"]]) made.push(element("label", [label, element("input", [], { type: "number", name, step: "any" })]));
    }
    for (const [name, values] of metadata) {
      if (values.length > 1 && values.length <= MOST_VALUES) made.push(this.select(`meta:${name}`, printable(name), [["", "all"], ...values.map((value) => [value, printable(value)])]));
    }
    return made;
  }

  // A filter was changed.
  change(field) {
    // Who sorts wants to see what comes first.
    const stays = !/^(measure|order)$/.test(field.name) && this.current;
    // Bounds of one measure mean nothing for another.
    if (field.name === "measure") for (const name of ["least", "most"]) byId("filters").elements[name].value = "";
    const pause = field.tagName === "INPUT" ? this.source.pause : 0;
    const ask = () => this.filter(stays ? { key: stays.key } : {});
    clearTimeout(this.timer);
    byId("list").setAttribute("aria-busy", "true");
    if (pause) this.timer = setTimeout(ask, pause);
    else ask();
  }

  // List the rows that pass the filters and open the one that is `wanted`, else the first; who follows an address wants no
  // other. Return whether it is among them, nothing where the answer came too late or is an error.
  async filter(wanted, step = "replace") {
    const given = this.given = {};
    for (const name of ["least", "most", "order"]) {
      const field = byId("filters").elements[name];
      if (field) field.disabled = !byId("filters").elements.measure.value;
    }
    for (const [name, value] of new FormData(byId("filters"))) if (value) given[name] = value;
    const turn = ++this.turn;
    byId("list").setAttribute("aria-busy", "true");
    byId("count").textContent = given.search ? "Searching the texts of all rows …" : "Reading the rows …";
    let found;
    try {
      found = await this.source.find(this.mode, given, wanted);
    } catch (error) {
      if (turn === this.turn) this.fail(error, true);
      return undefined;
    }
    if (turn !== this.turn) return undefined;
    const at = wanted.number === undefined ? found.rows.findIndex((row) => row.key === wanted.key) : wanted.number - found.offset;
    if (step === "follow" && at < 0) return false;
    this.shown = found.rows;
    this.offset = found.offset;
    this.total = found.total;
    byId("list").replaceChildren(...this.shown.map((row) => this.line(row, given.measure)));
    byId("list").setAttribute("aria-busy", "false");
    byId("list").scrollTop = 0;
    const isPart = this.total > this.shown.length, last = this.offset + this.shown.length;
    const part = isPart ? `: ${numeral(this.offset + 1)} to ${numeral(last)}` : "";
    byId("count").textContent = `${numeral(this.total)} of ${numeral(this.source.facets(this.mode).size)} ${this.mode === "pairs" ? "problems" : "rows"}${part}`;
    byId("pages").replaceChildren(...(isPart ? [this.turner("← rows before", this.offset - 1), this.turner("rows after →", last)] : []));
    if (this.shown.length) this.choose(Math.max(at, 0), step);
    else {
      this.current = null;
      history.replaceState(null, "", `#${this.mode === "pairs" ? "pair-" : ""}&${new URLSearchParams(given)}`);
      const button = element("button", "Clear the filters", { type: "button" });
      button.addEventListener("click", () => this.show(this.mode, [], {}, "push"));
      byId("row").replaceChildren(element("p", `No ${this.mode === "pairs" ? "problem" : "row"} passes these filters.`), button);
    }
    return at >= 0;
  }

  turner(text, number) {
    const button = element("button", text, { type: "button", disabled: number < 0 || number >= this.total });
    button.addEventListener("click", () => {
      this.go(number);
      byId("list").focus(); // the button is about to go
    });
    return button;
  }

  // Say what went wrong in place of the row, or of the whole list.
  fail(error, isList) {
    if (isList) {
      this.shown = [];
      this.total = 0;
      byId("list").replaceChildren();
      byId("list").setAttribute("aria-busy", "false");
      byId("count").textContent = "The rows cannot be read.";
    }
    byId("row").replaceChildren(element("p", printable(error.message), { role: "alert" }));
    byId("row").setAttribute("aria-busy", "false");
  }

  // The line of a row in the list, with what the list is sorted by.
  line(row, measure) {
    if (row.line) {
      row.line.querySelector(".value").textContent = this.valueOf(row, measure);
      return row.line;
    }
    const head = row.isPair
      ? [`${changeOf(row)}${row.c === null ? "" : ` ${right(row.b)} → ${right(row.a)}`}`, `${mean(row.b)} → ${mean(row.a)} tokens`]
      : [row.s, `${row.t === null ? row.n : `${row.n} → ${row.t}`} tokens`];
    const value = element("span", this.valueOf(row, measure), { className: "value" });
    const line = element("li", [
      element("div", [element("span", head[0]), value, element("span", head[1])], { className: "head" }),
      element("div", printable(row.f).slice(0, 160), { className: "text" }),
    ], { role: "option" });
    line.dataset.key = row.key;
    line.id = `line-${row.key}`;
    return (row.line = line);
  }

  valueOf(row, measure) {
    if (!measure || row.isPair) return "";
    const value = row.value === undefined ? MEASURES[measure][1](row) : row.value;
    return Number.isFinite(value) ? numeral(value) : "–";
  }

  // Open the row that is number `number` of those that pass the filters.
  go(number) {
    const at = number - this.offset;
    if (at in this.shown) this.choose(at);
    else if (number >= 0 && number < this.total) this.filter({ number }, "push");
  }

  // Open a row of the list. A row that somebody opens is a step of the browser's history, a letter in a filter is none.
  async choose(at, step = "push") {
    if (this.current && this.current.line) this.current.line.setAttribute("aria-selected", "false");
    const row = this.current = this.shown[at];
    row.line.setAttribute("aria-selected", "true");
    byId("list").setAttribute("aria-activedescendant", row.line.id);
    row.line.scrollIntoView({ block: "nearest" });
    const given = new URLSearchParams(this.given);
    const address = `#${encodeURIComponent(row.key)}${given.size ? `&${given}` : ""}`;
    if (address !== location.hash) history[step === "push" ? "pushState" : "replaceState"](null, "", address);
    byId("row").setAttribute("aria-busy", "true");
    try {
      await this.source.whole(row);
    } catch (error) {
      if (row === this.current) this.fail(error, false);
      return;
    }
    if (row === this.current) this.draw();
  }

  draw() {
    const row = this.current;
    byId("row").replaceChildren(...(row.isPair ? this.pair(row) : this.rewrite(row)));
    byId("row").setAttribute("aria-busy", "false");
    byId("row").scrollTop = 0;
  }

  question(row) {
    const gold = row.g === null || row.g === undefined ? [] : [element("p", `gold answer: ${printable(row.g)}`, { className: "facts" })];
    return [element("p", printable(row.f), { className: "problem" }), ...gold];
  }

  rewrite(row) {
    const round = this.source.rounds[row.at];
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
    if (limits.length) parts.push(element("p", `Settings of the round: ${limits.join(", ")}`, { className: "facts" }));
    return parts;
  }

  pair(row) {
    const side = (samples, name) => samples.map((sample, at) =>
      this.trace(`${name}${samples.length > 1 ? `, sample ${at + 1}` : ""}`, sample.o, `${sample.n} tokens${sample.cut ? " · cut off at the limit" : ""}`, [printable(sample.d)]));
    const [base, now] = [side(row.b, "before"), side(row.a, "after")];
    const traces = [];
    for (let i = 0; i < Math.max(base.length, now.length); i++) traces.push(base[i] || element("div", ""), now[i] || element("div", ""));
    const change = row.c === null ? "no gold answer" : `${changeOf(row)}: ${right(row.b)} right before, ${right(row.a)} after`;
    return [element("h2", change), element("p", `before: ${this.source.names[0]} · after: ${this.source.names[1]}`, { className: "facts" }), ...this.question(row), element("div", traces, { className: "traces" })];
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
    if (event.key === "Escape") {
      event.preventDefault(); // which would empty the search and not say so
      return byId("list").focus();
    }
    if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName)) return;
    const tabs = [...byId("tabs").children], tab = tabs.indexOf(event.target);
    const at = this.shown && this.current ? this.offset + this.shown.indexOf(this.current) : 0;
    const inList = event.target.id === "list" || event.target === document.body;
    if (tab >= 0 && /^(Arrow(Left|Right)|Home|End)$/.test(event.key)) {
      const next = { ArrowLeft: tab - 1, ArrowRight: tab + 1, Home: 0, End: -1 }[event.key];
      const chosen = tabs.at(next % tabs.length);
      chosen.focus();
      chosen.click();
    } else if (event.key === "j" || (inList && event.key === "ArrowDown")) this.go(at + 1);
    else if (event.key === "k" || (inList && event.key === "ArrowUp")) this.go(at - 1);
    else if (inList && event.key === "Home") this.go(0);
    else if (inList && event.key === "End") this.go(this.total - 1);
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

readData().then((data) => new Page(data.facets ? new Served(data) : new Embedded(data)), (error) => {
  byId("count").textContent = `The rows cannot be read: ${error}. Is the file whole, and the browser of 2023 or newer?`;
});
