/* Plays "You are the router": words in rows, experts in columns, one choice a row. All rivals' results came with the page.
   One source, two hosts, as explorer.js: a classic script on a published page, the anywidget module of a notebook. */
const MoeGame = (() => {
  const script = document.currentScript; // null in a module: then there is no page of ours to mount
  const NOBODY = -1, BEST = "the balanced answer";
  const COLUMN = { ArrowLeft: -1, ArrowRight: 1 }, ROW = { ArrowUp: -1, ArrowDown: 1 };

  const make = (tag, properties = {}, ...children) => {
    const { data, style, aria, ...rest } = properties;
    const element = Object.assign(document.createElement(tag), rest);
    Object.assign(element.dataset, data);
    for (const [key, value] of Object.entries(style ?? {})) element.style.setProperty(key, value);
    for (const [key, value] of Object.entries(aria ?? {})) element.setAttribute("aria-" + key, value);
    element.append(...children);
    return element;
  };
  const number = (value) => value.toFixed(2).replace("-", "−");

  /* ---- the rules: the same as moe_core's, position decides who gets in ---- */
  function judge(puzzle, experts) {
    const load = puzzle.scores[0].map(() => 0);
    let score = 0, dropped = 0;
    const kept = experts.map((e, t) => {
      if (e === NOBODY) return false;
      const inside = load[e]++ < puzzle.capacity;
      if (inside) score += puzzle.scores[t][e]; else dropped++;
      return inside;
    });
    const total = load.reduce((sum, n) => sum + n, 0);
    return { kept, load, score, dropped, imbalance: total ? (Math.max(...load) * load.length) / total - 1 : 0, open: experts.filter((e) => e === NOBODY).length };
  }

  /* ---- black or white on an expert's colour, whichever is easier to read ---- */
  function inkOn(color) {
    const [r, g, b] = [1, 3, 5].map((i) => parseInt(color.slice(i, i + 2), 16) / 255).map((v) => (v <= 0.04 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
    const light = 0.2126 * r + 0.7152 * g + 0.0722 * b;
    return (light + 0.05) / 0.055 > 1.05 / (light + 0.05) ? "#111111" : "#ffffff";
  }

  function render({ model, el }) {
    const payload = model.get("payload"), { puzzles, colors } = payload, memory = puzzles.map((p) => p.words.map(() => NOBODY));
    let n = 0, shown = null, cells = [], tiles = [], heads = [], at = [0, 0];
    const puzzle = () => puzzles[n], experts = () => memory[n];

    const intro = make("p", { className: "moe-game-intro" });
    const board = make("table", { className: "moe-board", role: "grid" });
    const said = make("p", { className: "moe-game-said", role: "status", ariaLive: "polite" });
    const button = (textContent, onclick) => make("button", { type: "button", textContent, onclick, data: { lmSuppressShortcuts: "true" } });
    const reset = button("Reset", () => { memory[n].fill(NOBODY); shown = null; at = [0, at[1]]; update("The board is empty again."); store(); });
    const next = button("Next puzzle", () => { go((n + 1) % puzzles.length); });
    const answer = button("Show the balanced answer", () => show(BEST));
    const results = make("table", { className: "moe-results" });
    const root = make("figure", { className: "moe-game" }, make("figcaption", { textContent: payload.title }), intro, board, said,
      make("div", { className: "moe-game-buttons" }, reset, next, answer), results);
    el.append(root);

    const store = () => { model.set("state", { puzzle: n, experts: [...experts()] }); model.save_changes(); };
    const current = () => experts().indexOf(NOBODY); // one by one: the word that is to be sent now
    const hidden = (t) => puzzle().oneByOne && current() >= 0 && t > current();
    const fixed = (t) => puzzle().oneByOne && t !== current();

    /* ---- moves ---- */
    function send(t, e) {
      const { words, oneByOne } = puzzle();
      focus(t, e);
      if (fixed(t)) return update(hidden(t) ? "This word has not come yet." : `“${words[t]}” has been sent: in this puzzle a choice is final.`);
      const back = experts()[t] === e;
      experts()[t] = back ? NOBODY : e;
      const now = judge(puzzle(), experts());
      const what = back ? "has no expert again" : now.kept[t] ? `goes to expert ${e} and scores ${number(puzzle().scores[t][e])}` : `is dropped: expert ${e} was full before it`;
      update(`“${words[t]}” ${what}. ${summary(now)}`);
      if (oneByOne && current() > 0) focus(current(), e);
      store();
    }
    const summary = ({ score, dropped, open }) => open ? `Your score ${number(score)}, dropped ${dropped}, still to send ${open}.` : verdict(score, dropped);
    function verdict(score, dropped) {
      const rival = (name) => puzzle().rivals.find((r) => r.name === name).score;
      const [first, best] = [score - rival("first come, first served"), rival(BEST) - score];
      const versus = (difference) => (Math.abs(difference) < 0.005 ? "as much as" : `${number(Math.abs(difference))} ${difference > 0 ? "more" : "less"} than`);
      return `All are sent. Your score is ${number(score)}, ${versus(first)} first come, first served; dropped ${dropped}. ` +
        (best < 0.005 ? "No assignment scores more." : `The best possible is ${number(best)} higher.`);
    }
    function show(name) {
      shown = shown === name ? null : name;
      update(shown ? `The board marks the choices of ${name}: ◆ kept, ◇ dropped.` : "The marks are gone.");
    }
    function go(to) {
      n = to; shown = null; at = [0, 0];
      build(); update(`Puzzle ${n + 1} of ${puzzles.length}: ${puzzle().title}. ${puzzle().words.length} words, ${puzzle().capacity} places per expert.`); store();
    }

    /* ---- focus: one cell of the board is in the tab order, arrow keys move it ---- */
    function focus(t, e, take = true) {
      cells[at[0]]?.[at[1]]?.setAttribute("tabindex", "-1");
      at = [t, e];
      cells[t][e].setAttribute("tabindex", "0");
      if (take) cells[t][e].focus();
    }
    board.onkeydown = (event) => {
      if (event.ctrlKey || event.altKey || event.metaKey || !event.target.matches(".moe-board button")) return;
      const [t, e] = at, T = puzzle().words.length, E = colors.length, { key } = event;
      const clamp = (v, top) => Math.min(Math.max(v, 0), top - 1);
      if (key in COLUMN) focus(t, clamp(e + COLUMN[key], E));
      else if (key in ROW) focus(clamp(t + ROW[key], T), e);
      else if (key === "Home" || key === "End") focus(key === "Home" ? 0 : T - 1, e);
      else if (/^\d$/.test(key) && +key < E) {
        if (experts()[t] !== +key || fixed(t)) send(t, +key);
        if (!puzzle().oneByOne) focus(clamp(t + 1, T), +key);
      } else if (key === "Backspace" || key === "Delete") { if (experts()[t] !== NOBODY) send(t, experts()[t]); focus(t, e); }
      else return;
      event.preventDefault(); event.stopPropagation();
    };

    /* ---- the board of one puzzle, made once ---- */
    function build() {
      const { title, says, words, scores, capacity } = puzzle(), unit = words.length > 8 ? 9 : 12;
      intro.replaceChildren(make("strong", { textContent: `Puzzle ${n + 1} of ${puzzles.length}: ${title}.` }), " " + says);
      root.style.setProperty("--moe-unit", unit + "px");
      root.style.setProperty("--moe-rows", words.length);
      root.style.setProperty("--moe-capacity", capacity);
      heads = colors.map((color, e) => ({ stack: make("span", { className: "moe-stack", aria: { hidden: "true" } }), count: make("span", { className: "moe-count" }), color, e }));
      const line = make("span", { className: "moe-stack", aria: { hidden: "true" } }, make("span", { className: "moe-line", textContent: `capacity ${capacity}` }));
      const top = make("tr", {}, make("th", { scope: "col" }, line, make("span", { className: "moe-name", textContent: "word" }), make("span", { className: "moe-count", textContent: "places" })),
        ...heads.map(({ stack, count, color, e }) => make("th", { scope: "col" }, stack, make("span", { className: "moe-name" },
          make("span", { className: "moe-disc", style: { background: color }, aria: { hidden: "true" } }), `expert ${e}`), count)));
      tiles = words.map((word) => make("span", { className: "moe-tile", aria: { hidden: "true" } }));
      cells = words.map((_, t) => colors.map((color, e) => {
        const cell = make("button", { type: "button", tabIndex: -1, onclick: () => send(t, e), data: { lmSuppressShortcuts: "true" },
          style: { "--moe-color": color, "--moe-on": inkOn(color), "--moe-part": 100 * scores[t][e] + "%" } });
        return cell;
      }));
      const rows = words.map((word, t) => make("tr", {}, make("th", { scope: "row" }, make("div", {}, tiles[t], make("span", { className: "moe-label", textContent: word }))),
        ...cells[t].map((cell) => make("td", {}, cell))));
      board.replaceChildren(make("thead", {}, top), make("tbody", {}, ...rows));
      board.setAttribute("aria-label", `Puzzle ${n + 1}: ${title}. Arrow keys move, Enter or the number of an expert sends the word, Delete takes it back.`);
      root.dataset.puzzle = n;
      focus(0, 0, false);
    }

    /* ---- what the choices have changed ---- */
    function update(words) {
      const { words: tokens, scores, capacity, rivals } = puzzle(), now = judge(puzzle(), experts()), marked = rivals.find((r) => r.name === shown);
      tokens.forEach((word, t) => {
        const chosen = experts()[t];
        tiles[t].dataset.state = chosen === NOBODY ? "open" : now.kept[t] ? "kept" : "dropped";
        tiles[t].style.setProperty("--moe-color", colors[chosen] ?? "currentColor");
        tiles[t].nextSibling.textContent = hidden(t) ? "?" : word;
        cells[t].forEach((cell, e) => {
          const mark = !hidden(t) && marked?.experts[t] === e ? (marked.kept[t] ? "◆" : "◇") : "";
          cell.dataset.state = chosen !== e ? "open" : now.kept[t] ? "kept" : "dropped";
          cell.textContent = hidden(t) ? "·" : number(scores[t][e]);
          cell.dataset.mark = mark;
          cell.dataset.hidden = hidden(t);
          cell.setAttribute("aria-pressed", chosen === e);
          cell.setAttribute("aria-disabled", fixed(t));
          cell.setAttribute("aria-label", hidden(t) ? `word ${t + 1} has not come yet` : `${word}, expert ${e}, score ${number(scores[t][e])}` +
            (chosen !== e ? "" : now.kept[t] ? ", chosen" : ", chosen, dropped") + (mark && `, chosen by ${shown}`));
        });
      });
      for (const { stack, count, color, e } of heads) {
        const squares = Array.from({ length: now.load[e] }, (_, i) => make("span", { className: "moe-square", data: { kept: i < capacity }, style: { "--moe-color": color } }));
        stack.replaceChildren(make("span", { className: "moe-line" }), ...squares);
        count.textContent = `${now.load[e]} of ${capacity}`;
      }
      fillResults(now);
      answer.setAttribute("aria-pressed", shown === BEST);
      answer.textContent = shown === BEST ? "Hide the balanced answer" : "Show the balanced answer";
      Object.assign(root.dataset, { score: now.score, dropped: now.dropped, imbalance: now.imbalance, open: now.open });
      said.textContent = words;
    }

    function fillResults(now) {
      const { rivals } = puzzle(), best = rivals.find((r) => r.name === BEST).score, focused = results.contains(document.activeElement) && document.activeElement.textContent;
      const row = (name, { score, dropped, imbalance }, mine) => {
        const label = mine ? make("span", { textContent: "you" + (now.open ? ` (${now.open} to go)` : "") }) : button(name, () => show(name));
        if (!mine) label.setAttribute("aria-pressed", shown === name);
        const bar = make("span", { className: "moe-bar", aria: { hidden: "true" }, style: { width: (100 * score) / best + "%" } });
        return make("tr", { className: mine ? "moe-mine" : "" }, make("th", { scope: "row" }, label), make("td", {}, number(score)),
          make("td", { className: "moe-bars" }, bar), make("td", { textContent: dropped }), make("td", { textContent: number(imbalance) }));
      };
      const head = make("tr", {}, ...["router", "score", "", "dropped", "MaxVio"].map((text) => text ? make("th", { scope: "col", textContent: text }) : make("td", { className: "moe-bars" })));
      results.replaceChildren(make("caption", { textContent: "The same words, five routers. Press a name to mark its choices on the board." }), make("thead", {}, head),
        make("tbody", {}, row("you", now, true), ...rivals.map((r) => row(r.name, r))));
      if (focused) [...results.querySelectorAll("button")].find((b) => b.textContent === focused)?.focus();
    }

    const read = () => {
      const state = model.get("state") ?? {};
      if (!puzzles[state.puzzle] || state.experts?.length !== puzzles[state.puzzle].words.length) return;
      const other = n !== state.puzzle || !cells.length;
      n = state.puzzle;
      memory[n] = [...state.experts];
      if (other) build();
      if (other || JSON.stringify(read.last) !== JSON.stringify(state)) update(summary(judge(puzzle(), experts())));
      read.last = state;
    };
    const onState = () => { const { puzzle: p, experts: x } = model.get("state"); if (p !== n || x.some((e, t) => e !== experts()[t])) read(); };
    read();
    model.on("change:state", onState);
    return () => model.off("change:state", onState);
  }

  /* ---- a published page: the payload stands in the page, and a stub answers for the kernel ---- */
  function mount(figure) {
    const payload = JSON.parse(figure.querySelector("script").textContent), el = make("div");
    const traits = { payload, state: { puzzle: 0, experts: payload.puzzles[0].words.map(() => NOBODY) } };
    figure.replaceWith(el);
    render({ el, model: { get: (name) => traits[name], set: (name, value) => { traits[name] = value; }, save_changes() {}, on() {}, off() {} } });
  }

  if (script) addEventListener("DOMContentLoaded", () => document.querySelectorAll("figure.moe-game").forEach(mount));
  return { render };
})();
