/* Draws an Explorer: native controls above a passage of text, a plotly figure or both; a sentence and a table below.
   One source, two hosts. As a classic script (file:// forbids modules) it mounts each <figure class="moe-explorer"> of a published page;
   with an export appended by explorer.py it is the anywidget module of a notebook. */
const MoeExplorer = (() => {
  const PLOT_CONFIG = { staticPlot: true, displayModeBar: false, responsive: false };
  const script = document.currentScript; // null in a module: then there is no page of ours to mount

  const make = (tag, properties = {}, ...children) => {
    const element = Object.assign(document.createElement(tag), properties);
    element.append(...children);
    return element;
  };

  /* ---- plotly: one copy a page, fetched when the first figure comes near ---- */
  function plotly(model) {
    if (window.Plotly) return Promise.resolve(window.Plotly);
    window.moePlotly ??= script ? fromDisk() : fromKernel(model);
    return window.moePlotly;
  }
  const fromDisk = () => new Promise((resolve, reject) => {
    const src = new URL("plotly.min.js", script.src).href;
    document.head.append(make("script", { src, onload: () => resolve(window.Plotly), onerror: () => reject(new Error("cannot load " + src)) }));
  });
  const fromKernel = (model) => new Promise((resolve, reject) => {
    const receive = async (message, buffers) => {
      if (message.plotly !== "gzip") return;
      model.off("msg:custom", receive);
      try {
        const bytes = new Blob([buffers[0]]).stream().pipeThrough(new DecompressionStream("gzip"));
        // A function of its own, so that a RequireJS on the page (classic notebooks) does not swallow the library.
        new Function("define", "module", "exports", await new Response(bytes).text())();
        resolve(window.Plotly);
      } catch (error) { window.moePlotly = undefined; reject(error); }
    };
    model.on("msg:custom", receive);
    model.send({ get: "plotly" });
  });

  /* ---- frames: the first one whole, and what varies ---- */
  const show = (value, unit = "") => (value === true ? "on" : value === false ? "off" : String(value)) + (unit && " " + unit);

  function put(tree, path, value) {
    const last = path.length - 1;
    for (let i = 0; i < last; i++) tree = tree[path[i]] ??= {};
    if (value === null) delete tree[path[last]];
    else tree[path[last]] = value;
  }

  /* Frames name ink, muted and grid by fixed colours; here they become the reader's text colour, whole or faint. */
  const PAPER_INK = "rgb(31, 35, 40)";
  const inkOf = (host) => getComputedStyle(host).color || PAPER_INK; // no color yet: JupyterLab renders before it attaches
  function themed(payload, ink) {
    const [r, g, b] = ink.match(/[\d.]+/g);
    const colors = Object.entries(payload.colors).map(([from, alpha]) => [from, alpha === 1 ? `rgb(${r},${g},${b})` : `rgba(${r},${g},${b},${alpha})`]);
    let text = JSON.stringify({ base: payload.base, varying: payload.varying, template: payload.template });
    for (const [from, to] of colors) text = text.replaceAll(from, to);
    return JSON.parse(text);
  }

  /* ---- one explorer ---- */
  let count = 0;
  function render({ model, el }) {
    const id = "moe-" + ++count;
    let payload = model.get("payload"), frames, Plotly, alive = true;
    const plot = make("div", { className: "moe-plot", role: "img", ariaLabel: payload.alt });
    const text = make("div", { className: "moe-text", role: "group", ariaLabel: payload.alt });
    const drawn = make("div", { className: "moe-drawn" }, text, plot);
    const said = make("p", { className: "moe-said", role: "status", ariaLive: "polite" });
    const table = make("div", { className: "moe-table", role: "region", tabIndex: 0, ariaLabel: "Data of the figure: " + payload.title });
    const details = make("details", {}, make("summary", { textContent: "The numbers in this figure" }), table);
    const controls = make("div", { className: "moe-controls" });
    const root = make("figure", { className: "moe-explorer" }, make("figcaption", { textContent: payload.title }), controls, drawn, said, details);
    el.append(root);

    let ink = inkOf(root);
    const index = {}; // name -> which of its values
    const readState = () => {
      const state = model.get("state") ?? {};
      for (const c of payload.controls) {
        const at = c.values.indexOf(state[c.name]);
        index[c.name] = at < 0 ? c.start : at;
      }
    };
    const frameNumber = () => payload.controls.reduce((n, c) => n * c.values.length + index[c.name], 0);

    const settle = (changed) => { // words first: they need no plotly
      const n = frameNumber();
      frames ??= { ...themed(payload, ink), shown: -1 };
      if (frames.shown !== n) for (const { path, values, at } of frames.varying) put(frames.base, path, values[at[n]]);
      frames.shown = n;
      for (const update of updates) update();
      said.classList.toggle("moe-heard", !frames.base.said); // the controls show their values already: repeat them to the ear alone
      const words = frames.base.said || payload.controls.map((c) => `${c.label}: ${show(c.values[index[c.name]], c.unit)}`).join(", ");
      if (said.textContent !== words) said.textContent = words;
      if (details.open) fillTable(table, frames.base);
      if (changed) { model.set("state", Object.fromEntries(payload.controls.map((c) => [c.name, c.values[index[c.name]]]))); model.save_changes(); }
    };
    const paint = () => {
      if (!alive) return;
      if (frames.base.text) fillText(text, frames.base.text);
      if (payload.height && !paintPlot()) return;
      drawn.dataset.frame = frames.shown; // what is drawn now; tests and print styles read it
    };
    const paintPlot = () => {
      if (!Plotly || !plot.clientWidth) return false;
      const { layout } = frames.base;
      // customdata and meta are for the table; plotly would lay the whole figure out again when they change.
      const data = frames.base.data.map(({ customdata, meta, ...trace }) => trace);
      Plotly.react(plot, data, { ...layout, template: frames.template, width: plot.clientWidth, height: payload.height, autosize: false }, PLOT_CONFIG);
      return true;
    };
    // At most one drawing per screen refresh: the first at once, later ones when the screen has caught up.
    let busy = false, again = false;
    const draw = () => {
      if (busy) { again = true; return; }
      busy = true;
      paint();
      requestAnimationFrame(() => { busy = false; if (again) { again = false; draw(); } });
    };
    const choose = (name, value) => { index[name] = value; settle(true); draw(); };

    const updates = [], stops = [];
    const buildControls = () => {
      controls.replaceChildren(); updates.length = 0;
      for (const c of payload.controls) controls.append(BUILD[c.kind](c, `${id}-${c.name}`, () => index[c.name], (i) => choose(c.name, i), updates, stops));
      // JupyterLab takes arrow keys for moving between cells, except from elements that say so themselves.
      for (const element of root.querySelectorAll("input, select, button, summary, .moe-table")) element.dataset.lmSuppressShortcuts = "true";
    };

    const reload = () => { payload = model.get("payload"); plot.style.height = plot.style.minHeight = payload.height + "px"; plot.hidden = !payload.height; text.hidden = !payload.base.text; frames = undefined; readState(); buildControls(); settle(false); draw(); };
    const restate = () => { readState(); settle(false); draw(); };
    const recolor = () => { if (ink !== (ink = inkOf(root))) { frames = undefined; settle(false); draw(); } };
    reload();
    model.on("change:payload", reload);
    model.on("change:state", restate);
    details.addEventListener("toggle", () => details.open && fillTable(table, frames.base));

    const near = new IntersectionObserver(async (entries) => {
      if (!entries.some((entry) => entry.isIntersecting)) return;
      near.disconnect();
      if (!payload.height) return; // text alone
      try { Plotly = await plotly(model); draw(); } catch (error) { plot.textContent = String(error.message); throw error; }
    }, { rootMargin: "600px" });
    near.observe(drawn);
    // On paper every figure stands, in dark ink, wherever the reader has been; the library comes when the page has nothing else to do.
    const print = () => { Plotly ??= window.Plotly; ink = PAPER_INK; frames = undefined; settle(false); paint(); };
    addEventListener("beforeprint", print);
    addEventListener("afterprint", () => recolor());
    if (script && payload.height) (window.requestIdleCallback ?? setTimeout)(() => plotly(model).catch(() => {}), { timeout: 5000 });
    let width = 0;
    const resized = new ResizeObserver(() => { recolor(); if (drawn.clientWidth !== width) { width = drawn.clientWidth; draw(); } });
    resized.observe(drawn);
    const theme = new MutationObserver(recolor);
    for (const node of [document.documentElement, document.body]) theme.observe(node, { attributes: true });

    return () => {
      alive = false;
      removeEventListener("beforeprint", print);
      model.off("change:payload", reload); model.off("change:state", restate);
      for (const observer of [near, resized, theme]) observer.disconnect();
      for (const stop of stops) stop();
      Plotly?.purge(plot);
    };
  }

  /* ---- controls: build(control, id, get, set, updates, stops) -> element ---- */
  const field = (c, id, kind, ...children) =>
    make("div", { className: "moe-control moe-" + kind }, make("label", { htmlFor: id, textContent: c.label }), ...children);

  function slider(c, id, get, set, updates) {
    const range = make("input", { type: "range", id, min: 0, max: c.values.length - 1, step: 1 });
    const value = make("output", { htmlFor: id });
    range.oninput = () => set(+range.value);
    updates.push(() => {
      range.value = get();
      value.textContent = show(c.values[get()], c.unit);
      range.setAttribute("aria-valuetext", value.textContent);
    });
    return [range, value];
  }

  const BUILD = {
    range: (c, id, ...rest) => field(c, id, "range", ...slider(c, id, ...rest)),

    select(c, id, get, set, updates) {
      const select = make("select", { id }, ...c.values.map((v) => make("option", { textContent: show(v, c.unit) })));
      select.onchange = () => set(select.selectedIndex);
      updates.push(() => { select.selectedIndex = get(); });
      return field(c, id, "select", select);
    },

    switch(c, id, get, set, updates) {
      const box = make("input", { type: "checkbox", id, role: "switch" });
      box.onchange = () => set(c.values.indexOf(box.checked));
      updates.push(() => { box.checked = c.values[get()]; });
      return field(c, id, "switch", box);
    },

    step(c, id, get, set, updates, stops) {
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches; // then each press is one step
      const button = make("button", { type: "button", className: "moe-play" });
      let timer;
      const face = () => {
        const playing = timer !== undefined;
        button.textContent = still ? "Next" : playing ? "Pause" : "Play";
        button.setAttribute("aria-label", `${button.textContent}: ${c.label}`);
        button.dataset.playing = playing;
      };
      const stop = () => { clearInterval(timer); timer = undefined; face(); };
      const next = () => set((get() + 1) % c.values.length);
      const tick = () => { next(); if (get() === c.values.length - 1) stop(); };
      button.onclick = () => {
        if (still) return next();
        if (timer !== undefined) return stop();
        timer = setInterval(tick, 1000 * c.seconds);
        if (get() === c.values.length - 1) set(0); else tick();
        face();
      };
      stops.push(stop);
      face();
      return field(c, id, "step", button, ...slider(c, id, get, set, updates));
    },
  };

  /* ---- a passage: tiles made once, recoloured afterwards ---- */
  const tile = ({ words, experts, kept, amount, amount_label }, t) =>
    [experts && `expert ${experts[t]}`, amount && `${amount[t]} ${amount_label}`, kept && !kept[t] && "dropped"].filter(Boolean).join(", ");

  function fillText(host, passage) {
    const { words, groups, experts, colors, kept, amount, amount_max, legend } = passage;
    const same = host.passage && host.passage.words === words && host.passage.groups === groups && host.passage.legend === legend;
    if (!same) {
      let t = 0;
      const lines = make("p", { className: "moe-words" });
      for (const size of groups) {
        lines.append(make("span", { className: "moe-word" }, ...words.slice(t, (t += size)).map((word) => make("span", { textContent: word }))));
        if (words[t - 1].endsWith("⏎")) lines.append(make("br"));
      }
      host.replaceChildren(lines, make("p", { className: "moe-legend", innerHTML: legend })); // escaped by passage.py
    }
    host.passage = { words, groups, legend };
    host.querySelectorAll(".moe-word > span").forEach((span, t) => {
      const kind = "moe-token" + (amount ? " moe-tinted" : "") + (kept && !kept[t] ? " moe-hollow" : ""), says = `${words[t]}: ${tile(passage, t)}`;
      if (span.className !== kind) span.className = kind;
      if (span.title === says) return;
      span.title = says;
      if (experts) span.style.setProperty("--c", colors[experts[t]]);
      if (amount) span.style.setProperty("--a", Math.round(70 * Math.min(amount[t] / amount_max, 1)) + "%");
    });
  }

  /* ---- the figure as a table: one row a point (or a bar, a cell of a heatmap, a tile of a treemap) ---- */
  const ENTITIES = { "&lt;": "<", "&gt;": ">", "&amp;": "&" };
  const plain = (text) => String(text ?? "").replace(/<\/?(?:a|b|br|em|i|span|sub|sup)\b[^>]*>/gi, "").replace(/&(?:lt|gt|amp);/g, (name) => ENTITIES[name]).trim();

  function fillTable(host, { data, layout, text }) {
    const cells = (tag, values) => make("tr", {}, ...values.map((v) => make(tag, { textContent: v, ...(tag === "th" && { scope: "col" }) })));
    const sheet = (head, rows) => make("table", {}, make("thead", {}, cells("th", head)), make("tbody", {}, ...rows.map((values) => cells("td", values))));
    const sheets = [];
    if (text) {
      const columns = [["token", text.words], ["expert", text.experts], [text.amount_label, text.amount], ["kept", text.kept?.map((k) => (k ? "yes" : "dropped"))]].filter(([, values]) => values);
      sheets.push(sheet(columns.map(([name]) => name), text.words.map((_, t) => columns.map(([, values]) => values[t]))));
    }
    if (data.length) sheets.push(sheet(...points(data, layout)));
    host.replaceChildren(...sheets);
  }

  function points(data, layout) {
    const axis = (trace, which) => layout[which + "axis" + (trace[which + "axis"] ?? "").slice(1)] ?? {};
    const heading = (trace, which, other) => plain(axis(trace, which).title?.text ?? axis(trace, which).title) || other;
    const first = data[0] ?? {};
    const named = data.some((trace) => trace.name), extra = data.some((trace) => trace.customdata || trace.z || trace.values);
    const head = [...(named ? ["series"] : []), heading(first, "x", "x"), heading(first, "y", "y"), ...(extra ? [plain(first.meta) || "value"] : [])];
    const rows = [];
    for (const trace of data) {
      if (trace.hoverinfo === "skip") continue; // guides and labels, not data
      const label = (which, value) => {
        const { tickvals, ticktext } = axis(trace, which);
        const i = tickvals?.indexOf(value) ?? -1;
        return i < 0 ? value : plain(ticktext?.[i] ?? value);
      };
      const row = (x, y, value) => rows.push([...(named ? [plain(trace.name)] : []), label("x", x), label("y", y), ...(extra ? [value ?? ""] : [])]);
      const n = Math.max(trace.x?.length ?? 0, trace.y?.length ?? 0);
      if (trace.z) trace.z.forEach((line, j) => line.forEach((z, i) => row(trace.x?.[i] ?? i, trace.y?.[j] ?? j, z)));
      else if (trace.values) trace.values.forEach((value, i) => row(trace.parents[i], trace.labels[i], value));
      else for (let i = 0; i < n; i++) if (trace.y?.[i] !== null) row(trace.x?.[i] ?? i, trace.y?.[i] ?? i, trace.customdata?.[i]);
    }
    return [head, rows];
  }

  /* ---- a published page: the payload stands in the page, and a stub answers for the kernel ---- */
  function mount(figure) {
    const payload = JSON.parse(figure.querySelector("script").textContent), el = make("div");
    const state = Object.fromEntries(payload.controls.map((c) => [c.name, c.values[c.start]]));
    const traits = { payload, state };
    figure.replaceWith(el);
    render({ el, model: { get: (name) => traits[name], set: (name, value) => { traits[name] = value; }, save_changes() {}, on() {}, off() {} } });
  }

  if (script) { // a page in dark colours is printed in light ones
    const { dataset } = document.documentElement;
    let theme;
    addEventListener("beforeprint", () => { theme = dataset.theme; dataset.theme = "light"; });
    addEventListener("afterprint", () => { dataset.theme = theme; });
  }
  if (script) addEventListener("DOMContentLoaded", () => {
    for (const figure of document.querySelectorAll("figure.moe-explorer")) {
      try { mount(figure); } catch (error) { console.error(error); } // the others of the page still come
    }
  });
  return { render };
})();
