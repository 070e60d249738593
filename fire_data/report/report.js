"use strict";
(() => {
  const byId = (id) => document.getElementById(id);
  const index = JSON.parse(byId("index").textContent);
  const blocks = document.querySelectorAll("script.trajectory");
  const STEPS = { up: 9, down: 9, signed: 6 };
  const state = { order: [], at: 0, signal: 0, token: null, begun: false, side: "a" };

  // Whatever is shown goes through here: as text, never as markup.
  function make(tag, text, className) {
    const element = document.createElement(tag);
    if (text !== undefined && text !== null) element.textContent = text;
    if (className) element.className = className;
    return element;
  }

  function isolated(text) { return make("bdi", text); }

  function six(value) {
    if (value === null || value === undefined) return "–";
    const rounded = Number(Number(value).toPrecision(6));
    return rounded && Math.abs(rounded) < 1e-4 ? rounded.toExponential() : String(rounded);
  }

  function short(value) { return six(Number(value).toPrecision(3)); }

  // The class that colours a value; none for what is nearest to nothing.
  function shade(signal, value) {
    if (value === undefined || value === null) return "";
    const count = STEPS[signal.way];
    if (signal.way === "signed") {
      const part = signal.high ? Math.min(1, Math.abs(value) / signal.high) : 0;
      const step = Math.round(part * count);
      return step ? (value < 0 ? "n" : "p") + step : "";
    }
    const range = signal.high - signal.low;
    const part = range ? (signal.way === "down" ? signal.high - value : value - signal.low) / range : 0;
    const step = Math.round(Math.min(1, Math.max(0, part)) * count);
    return step ? "u" + step : "";
  }

  const parsed = new Map();
  function trajectory(number) {
    if (!parsed.has(number)) {
      const read = JSON.parse(blocks[number].textContent);
      if (read.b && index.same) {
        read.b = { ...read.a, facts: { ...read.a.facts, ...read.b.facts }, columns: { ...read.a.columns, ...read.b.columns } };
      }
      parsed.set(number, read);
    }
    return parsed.get(number);
  }

  // --- which trajectories are listed, in which order
  const FILTERS = [
    ["f-keep", "all", (e) => (e.keep === null ? "not weighed" : e.keep ? "kept" : "dropped")],
    ["f-outcome", "all", (e) => e.outcome],
    ["f-teacher", "all", (e) => e.teacher],
  ];

  function fill(select, values) {
    for (const value of values) {
      const option = make("option", value);
      option.value = value;
      select.append(option);
    }
  }

  function arrange(keep) {
    const wanted = FILTERS.map(([id, , of]) => [byId(id).value, of]);
    state.order = index.entries.map((_, i) => i).filter((i) =>
      wanted.every(([value, of]) => value === "all" || of(index.entries[i]) === value));
    const order = index.orders[byId("sort").value];
    if (order) {
      const [key, descending] = order;
      const value = (i) => {
        const found = index.entries[i].sort[key];
        return found === null || found === undefined ? (descending ? -Infinity : Infinity) : found;
      };
      state.order.sort((a, b) => (descending ? value(b) - value(a) : value(a) - value(b)) || a - b);
    }
    state.at = Math.max(0, state.order.indexOf(keep));
    list();
    show();
  }

  function list() {
    const items = state.order.map((number, i) => {
      const entry = index.entries[number];
      const item = make("li");
      item.id = "trajectory-" + i;
      item.setAttribute("role", "option");
      const row = make("div", null, "row");
      if (entry.keep !== null) row.append(make("span", entry.keep ? "kept" : "dropped", entry.keep ? "kept" : "dropped"));
      if (entry.outcome !== "unknown") row.append(make("span", entry.outcome));
      if (entry.finish === "length") row.append(make("span", "cut"));
      row.append(make("b", entry.length.toLocaleString("en")));
      item.append(row, isolated(entry.prompt || "(no prompt)"));
      item.addEventListener("click", () => { state.at = i; show(); });
      return item;
    });
    byId("list").replaceChildren(...items);
    byId("counted").textContent = `${state.order.length} of ${index.entries.length} shown, of ${index.total.toLocaleString("en")} in the round`;
    byId("empty").hidden = state.order.length > 0;
    byId("reader").hidden = byId("numbers").hidden = state.order.length === 0;
  }

  // --- one trajectory
  function current() { return trajectory(state.order[state.at]); }

  function show() {
    if (!state.order.length) return;
    const items = byId("list").children;
    for (let i = 0; i < items.length; i++) items[i].setAttribute("aria-selected", String(i === state.at));
    byId("list").setAttribute("aria-activedescendant", "trajectory-" + state.at);
    const item = items[state.at], box = byId("list");
    if (item.offsetTop < box.offsetTop + box.scrollTop || item.offsetTop + item.offsetHeight > box.offsetTop + box.scrollTop + box.clientHeight) {
      box.scrollTop = item.offsetTop - box.offsetTop - box.clientHeight / 3;
    }
    const { a, b } = current();
    facts(a);
    prompt(a);
    const sides = [side("a", a, index.names && index.names[0])];
    if (index.names) sides.push(b ? side("b", b, index.names[1]) : lonely());
    byId("sides").replaceChildren(...sides);
    byId("sides").className = index.names ? "two" : "";
    state.token = null;
    close();
    paint();
    point("a", 0, false);
  }

  function lonely() {
    const box = make("div");
    const title = make("h3");
    title.append(isolated(index.names[1]));
    box.append(title, make("p", "There is none like it in that round.", "gap"));
    return box;
  }

  function facts(a) {
    const f = a.facts;
    const rows = [["trajectory", f.id], ["prompt", f.prompt_id], ["sample", f.sample], ["teacher", f.teacher],
      ["tokens", f.length.toLocaleString("en")], ["ended", f.finish === "length" ? "cut by max_new_tokens" : f.finish]];
    if (f.step !== undefined) rows.push(["step", f.step]);
    if (f.reward !== null) rows.push(["reward", six(f.reward) + " (" + (f.verdict || f.outcome) + ")"]);
    if (f.extracted !== null) rows.push(["found answer", f.extracted]);
    if (f.answer !== null) rows.push(["answer", f.answer]);
    byId("facts").replaceChildren(...rows.map(([name, value]) => {
      const row = make("div"), cell = make("dd");
      cell.append(isolated(value));
      row.append(make("dt", name), cell);
      return row;
    }));
  }

  function prompt(a) {
    const lines = a.prompt.map(([role, text]) => {
      const line = make("p"), words = isolated(text);
      words.dir = "auto";
      line.append(make("b", role), words);
      return line;
    });
    if (a.prompt_cut) lines.push(make("p", "The rest of the prompt is not shown."));
    byId("prompt").lastElementChild.replaceChildren(...lines);
    byId("prompt").open = a.prompt.reduce((sum, [, text]) => sum + text.length, 0) < 600;
  }

  function side(key, data, name) {
    const box = make("div"), title = make("h3"), text = make("div", null, "tokens");
    if (name) { const bold = make("b"); bold.append(isolated(name)); title.append(bold, " "); }
    const f = data.facts;
    if (f.keep !== undefined) {
      title.append(f.keep ? "kept" : "dropped: ");
      if (!f.keep) title.append(isolated(f.reason || "no reason given"));
    }
    text.tabIndex = 0;
    text.dir = "auto";
    text.id = "tokens-" + key;
    text.setAttribute("role", "listbox");
    text.setAttribute("aria-label", "Tokens of the response" + (name ? ", " + name : ""));
    let first = 0;
    data.pieces.forEach(([words, count], i) => {
      const token = make("span", words.replaceAll("\n", "↵\n").replaceAll("\t", "⇥\t") || "∅");
      token.id = key + i;
      token.setAttribute("role", "option");
      token.dataset.at = i;
      token.first = first;
      token.count = count;
      first += count;
      text.append(token);
    });
    if (key === "b" && !index.same) title.append(other(data));
    if (!data.pieces.length) text.append(make("span", "The response is empty.", "none"));
    // A finger that scrolls goes over tokens, too, and chooses none.
    text.addEventListener("pointerover", (e) => { if (e.pointerType === "mouse" && e.target.dataset.at) open(key, Number(e.target.dataset.at), false); });
    text.addEventListener("click", (e) => { if (e.target.dataset.at) open(key, Number(e.target.dataset.at), narrow.matches); });
    text.addEventListener("keydown", (e) => move(e, key));
    text.addEventListener("focus", () => { if (text.matches(":focus-visible")) open(key, state.side === key && state.token !== null ? state.token : 0, false); });
    box.append(title, text);
    if (f.keep === false) box.className = "dim";
    if (first < f.length) box.append(make("p", `${first.toLocaleString("en")} of ${f.length.toLocaleString("en")} tokens are shown.`));
    return box;
  }

  // What of another round's trajectory is not said above: its outcome and, if it answers another prompt, that.
  function other(data) {
    const { a } = current(), words = isolated(data.prompt.map(([, text]) => text).join(" "));
    const box = make("span", ` · ${data.facts.outcome} · ${data.facts.length.toLocaleString("en")} tokens`);
    if (data.facts.prompt_id !== a.facts.prompt_id) box.append(" · ", words);
    return box;
  }

  function spans(key) {
    const box = byId("tokens-" + key);
    return box ? box.querySelectorAll("span[data-at]") : [];
  }

  // Of several tokens that make one character, the value furthest from nothing colours it.
  function valueOf(column, span) {
    let found;
    for (let i = span.first; i < span.first + span.count; i++) {
      if (found === undefined || Math.abs(column[i]) > Math.abs(found)) found = column[i];
    }
    return found;
  }

  function paint() {
    const signal = index.signals[state.signal];
    [...byId("signals").children].forEach((button, i) => {
      button.setAttribute("aria-checked", String(i === state.signal));
      button.tabIndex = i === state.signal ? 0 : -1;
    });
    if (!signal || !state.order.length) return;
    const both = current();
    for (const key of ["a", "b"]) {
      const column = both[key] && both[key].columns[signal.key];
      for (const span of spans(key)) {
        const look = [column ? shade(signal, valueOf(column, span)) : "", span.classList.contains("at") ? "at" : ""];
        span.className = look.filter(Boolean).join(" ");
      }
    }
    legend(signal);
    numbers();
  }

  function legend(signal) {
    if (signal.low === signal.high) {
      byId("legend").replaceChildren(make("b", short(signal.low)), "everywhere");
      byId("legend").setAttribute("aria-label", `${signal.label}: ${short(signal.low)} everywhere`);
      return;
    }
    const steps = [], scale = make("span");
    if (signal.way === "signed") for (let i = -6; i <= 6; i++) steps.push(i ? (i < 0 ? "n" : "p") + Math.abs(i) : "");
    else for (let i = 0; i <= 9; i++) steps.push(i ? "u" + i : "");
    scale.append(...steps.map((name) => make("i", null, name)));
    const unit = (index.numbers.find((n) => n.key === signal.key) || {}).unit || "";
    const ends = signal.way === "down" ? [signal.high, signal.low] : [signal.low, signal.high];
    const marks = signal.way === "down" ? ["", "≤ "] : ["≤ ", "≥ "];
    byId("legend").replaceChildren(make("b", marks[0] + short(ends[0])), scale, make("b", marks[1] + short(ends[1])), make("em", unit));
    byId("legend").setAttribute("aria-label", `${signal.label}, from ${short(ends[0])} to ${short(ends[1])} ${unit}`);
  }

  // --- one token
  function point(key, at, scroll) {
    const all = spans(key);
    for (const old of document.querySelectorAll(".tokens .at")) { old.classList.remove("at"); old.removeAttribute("aria-selected"); }
    if (!all.length) { state.token = null; numbers(); return; }
    state.side = key;
    state.token = Math.max(0, Math.min(at, all.length - 1));
    const sides = index.same ? ["a", "b"] : [key];
    for (const s of sides) {
      const span = spans(s)[state.token];
      if (!span) continue;
      span.classList.add("at");
      span.setAttribute("aria-selected", "true");
      byId("tokens-" + s).setAttribute("aria-activedescendant", span.id);
      if (scroll) span.scrollIntoView({ block: "nearest" });
    }
    numbers();
  }

  // A narrow window has no column for the numbers: there they cover the page, from when a token is chosen.
  const narrow = matchMedia("(max-width: 78rem)");

  function open(key, at, scroll) {
    byId("numbers").classList.add("open");
    point(key, at, scroll);
  }

  function close() { byId("numbers").classList.remove("open"); }

  function numbers() {
    const box = byId("numbers").lastElementChild;
    const both = state.order.length ? current() : null;
    if (!both || state.token === null) { box.replaceChildren(make("p", "There is no token to show numbers of.", "where")); return; }
    const data = both[state.side], span = spans(state.side)[state.token];
    const text = make("p", null, "text"), where = make("p", null, "where");
    text.append(isolated(data.pieces[state.token][0] || "(no text of its own)"));
    const at = [...Array(span.count).keys()].map((i) => span.first + i);
    where.textContent = (span.count > 1 ? `tokens ${at[0]} to ${at[at.length - 1]}` : `token ${at[0]}`) + `, id ${at.map((i) => data.ids[i]).join(", ")}`;
    const columns = [];
    for (const i of at) {
      if (index.same && both.b) columns.push([index.names[0], both.a, i], [index.names[1], both.b, i]);
      else columns.push([at.length > 1 ? String(i) : "", data, i]);
    }
    const table = make("table"), body = make("tbody");
    if (columns.length > 1) {
      const head = make("thead"), row = make("tr");
      row.append(make("th"));
      for (const [name] of columns) { const cell = make("th"); cell.append(isolated(name)); row.append(cell); }
      head.append(row);
      table.append(head);
    }
    for (const { key, unit, meaning } of index.numbers) {
      if (!columns.some(([, d]) => d.columns[key])) continue;
      const row = make("tr"), name = make("th", key.replaceAll("_", " "));
      name.title = meaning + (unit ? " (" + unit + ")" : "");
      name.scope = "row";
      row.dataset.key = key;
      if (index.signals[state.signal] && index.signals[state.signal].key === key) row.className = "on";
      const values = columns.map(([, d, i]) => (d.columns[key] ? six(d.columns[key][i]) : "–"));
      const cells = (at.length === 1 && new Set(values).size === 1 ? values.slice(0, 1) : values).map((value) => make("td", value));
      if (cells.length < values.length) cells[0].colSpan = values.length;
      row.append(name, ...cells);
      body.append(row);
    }
    table.append(body);
    box.replaceChildren(text, where, table);
  }

  function move(event, key) {
    const all = spans(key), at = state.token === null ? 0 : state.token;
    const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: all.length - 1 }[event.key];
    if (to !== undefined) open(key, to, true);
    else if (event.key === "ArrowUp" || event.key === "ArrowDown") open(key, onLine(all, at, event.key === "ArrowUp" ? -1 : 1), true);
    else return;
    event.preventDefault();
  }

  // The token of the next line that lies nearest below, or above.
  function onLine(all, at, way) {
    if (!all.length) return 0;
    const here = all[at].getClientRects()[0] || all[at].getBoundingClientRect();
    const x = here.left + Math.min(here.width, 20) / 2;
    let best = at, line = null, gap = Infinity;
    for (let i = at + way; i >= 0 && i < all.length; i += way) {
      const rect = all[i].getClientRects()[0];
      if (!rect || Math.abs(rect.top - here.top) < here.height / 2) continue;
      if (line === null) line = rect.top;
      if (Math.abs(rect.top - line) > here.height / 2) break;
      const distance = x < rect.left ? rect.left - x : x > rect.right ? x - rect.right : 0;
      if (distance < gap) { gap = distance; best = i; }
    }
    return best;
  }

  function go(way) {
    if (!state.order.length) return;
    state.at = Math.max(0, Math.min(state.at + way, state.order.length - 1));
    const inTokens = document.activeElement && document.activeElement.closest(".tokens");
    show();
    if (inTokens) byId("tokens-a").focus();
  }

  function choose(signal, focus) {
    if (signal < 0 || signal >= index.signals.length) return;
    state.signal = signal;
    paint();
    if (focus) byId("signals").children[signal].focus();
  }

  function start() {
    byId("theme").addEventListener("click", () => {
      const root = document.documentElement;
      const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
      root.dataset.theme = dark ? "light" : "dark";
    });
    for (const [id, all, of] of FILTERS) {
      const values = [...new Set(index.entries.map(of))].sort();
      fill(byId(id), [all, ...values]);
      byId(id).disabled = values.length < 2;
      byId(id).addEventListener("change", () => arrange(state.order[state.at]));
    }
    fill(byId("sort"), ["as chosen", ...Object.keys(index.orders)]);
    byId("sort").addEventListener("change", () => arrange());
    index.signals.forEach((signal, i) => {
      const button = make("button");
      button.type = "button";
      button.setAttribute("role", "radio");
      button.append(make("small", i + 1), signal.label);
      button.addEventListener("click", () => choose(i));
      byId("signals").append(button);
    });
    byId("signals").addEventListener("keydown", (e) => {
      const way = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[e.key];
      if (!way) return;
      choose((state.signal + way + index.signals.length) % index.signals.length, true);
      e.preventDefault();
    });
    byId("list").addEventListener("keydown", (e) => {
      const to = { ArrowUp: state.at - 1, ArrowDown: state.at + 1, Home: 0, End: state.order.length - 1 }[e.key];
      if (to === undefined) return;
      go(to - state.at);
      e.preventDefault();
    });
    document.addEventListener("keydown", (e) => {
      if (e.ctrlKey || e.metaKey || e.altKey || /^(INPUT|SELECT|TEXTAREA)$/.test(e.target.tagName)) return;
      if (e.key === "Escape") close();
      if (/^[jks1-9]$/.test(e.key)) begin();
      if (e.key === "j") go(1);
      else if (e.key === "k") go(-1);
      else if (e.key === "s" && index.signals.length) choose((state.signal + 1) % index.signals.length);
      else if (/^[1-9]$/.test(e.key)) choose(Number(e.key) - 1);
    });
    byId("close").addEventListener("click", () => {
      byId("tokens-" + state.side).focus({ preventScroll: true });
      close();
    });
    byId("browser").hidden = false;
    if (!index.signals.length) byId("reader").querySelector(".tools").hidden = true;
    // Trajectories are put into the page when it is there and idle, so that loading does not wait for them.
    addEventListener("load", () => (window.requestIdleCallback || setTimeout)(begin));
    addEventListener("beforeprint", begin);
  }

  function begin() {
    if (state.begun) return;
    state.begun = true;
    arrange();
  }

  start();
})();
