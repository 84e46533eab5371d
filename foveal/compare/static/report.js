// Draws the comparison from the JSON in #data. Strings in it are untrusted: they reach the page as text nodes only.
(() => {
  "use strict";
  const data = JSON.parse(document.getElementById("data").textContent);
  const at = (id) => document.getElementById(id);
  const INK = {
    light: { text: "#1d2329", soft: "#586069", line: "#e2e5e8", card: "#ffffff",
      lines: ["#0b6bb5", "#c4520a", "#0a8463", "#a3478f", "#866a00", "#cf2b48", "#4b5bc4", "#5f6b73"] },
    dark: { text: "#e4e7ea", soft: "#a2abb5", line: "#2e343b", card: "#1b1f24",
      lines: ["#5db2f2", "#f29559", "#4fcfa5", "#e08fce", "#d9bd4a", "#ff8296", "#9aa6ff", "#aab6be"] },
  };
  // Shape tells lines apart where colour does not; 8 colours and 7 shapes repeat together only after 56 methods.
  const SHAPES = [
    "M12 6A6 6 0 1 1 0 6A6 6 0 1 1 12 6Z", "M0.5 0.5H11.5V11.5H0.5Z", "M6 0L12 11H0Z", "M6 0L12 6L6 12L0 6Z",
    "M0 1H12L6 12Z", "M4 0H8V4H12V8H8V12H4V8H0V4H4Z", "M3 0.5H9L12 6L9 11.5H3L0 6Z",
  ];
  const BASELINE_SHAPE = "M6 0L7.6 4.2L12 4.6L8.6 7.4L9.7 12L6 9.4L2.3 12L3.4 7.4L0 4.6L4.4 4.2Z";
  const state = { view: "all", task: null, share: "kv", sort: null, hidden: new Set(), map: null };

  // ---- words and numbers
  const has = (v) => typeof v === "number" && Number.isFinite(v);
  const fixed = (v, digits) => v.toLocaleString("en", { minimumFractionDigits: digits, maximumFractionDigits: digits });
  const number = (v) => (has(v) ? fixed(v, Math.abs(v) >= 100 ? 0 : Math.abs(v) >= 10 ? 1 : 2) : "–");
  const percent = (v) => (has(v) ? fixed(100 * v, Math.abs(v) < 0.0995 ? 1 : 0).replace(/\.0$/, "") + "%" : "–");
  const amount = (b) => (b > 1 ? `${tokens(b)} tokens` : percent(b)); // a share of the tokens seen, or a number of them
  const size = (v) => (has(v) ? (v >= 1e9 ? fixed(v / 1e9, 2) + " GB" : fixed(v / 1e6, 0) + " MB") : "–");
  const megabytes = (v) => (has(v) ? `${number(v / 1e6)} MB` : "");
  const range = (low, high, form) => (has(low) && has(high) ? `${form(low)}–${form(high)}` : "");
  const tokens = (n) => Number(n).toLocaleString("en");
  const shown = (v) => (v === null || v === undefined ? "" : typeof v === "object" ? JSON.stringify(v) : String(v));

  function make(tag, attributes, ...children) {
    const el = document.createElement(tag);
    for (const [key, value] of Object.entries(attributes || {})) {
      if (key.startsWith("on")) el.addEventListener(key.slice(2), value);
      else if (value !== null && value !== undefined) el.setAttribute(key, value);
    }
    el.append(...children.filter((c) => c !== null && c !== "").map((c) => (c instanceof Node ? c : String(c))));
    return el;
  }

  const rows = () => data.views[state.view];
  const allRows = data.views.all;
  const tasks = [...new Set(allRows.flatMap((r) => Object.keys(r.tasks)))];
  const series = [...new Set(allRows.filter((r) => !r.baseline).map((r) => r.series))];
  const hasAttention = allRows.some((r) => has(r.attention_ms)); // a CPU's
  const hasReads = allRows.some((r) => has(r.read_share));
  const better = (task) => allRows.map((r) => r.tasks[task]).find(Boolean)?.better;
  function usual(task) { // the sample count most rows share: it stands in the header, others in their cells
    const counts = rows().map((r) => r.tasks[task]?.n).filter(Boolean);
    return counts.sort((a, b) => counts.filter((c) => c === b).length - counts.filter((c) => c === a).length)[0];
  }
  const readShare = (r) => (has(r.read_share) ? r.read_share : r.kv_share);
  const theme = () => document.documentElement.dataset.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  const colour = (name) => INK[theme()].lines[series.indexOf(name) % 8];
  const shape = (name) => SHAPES[series.indexOf(name) % SHAPES.length];

  function swatch(name) {
    const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    const path = document.createElementNS("http://www.w3.org/2000/svg", "path");
    svg.setAttribute("viewBox", "0 0 12 12");
    svg.setAttribute("class", "swatch");
    svg.setAttribute("aria-hidden", "true");
    path.setAttribute("d", shape(name));
    path.setAttribute("fill", colour(name));
    svg.append(path);
    return svg;
  }

  function segments(id, options, chosen, pick) {
    const group = at(id);
    group.replaceChildren();
    if (options.length < 2) return;
    for (const [value, label] of options) {
      group.append(make("button", { type: "button", "aria-pressed": value === chosen, onclick: (event) => {
        for (const other of group.children) other.setAttribute("aria-pressed", other === event.currentTarget);
        pick(value);
      } }, label));
    }
  }

  const brief = (name) => (name.length > 20 ? `${name.slice(0, 19)}…` : name); // beside a point; whole in the legend
  const ruler = document.createElement("canvas").getContext("2d");
  function written(text) { // its width in a plot, in pixels
    ruler.font = `12px ${getComputedStyle(document.body).fontFamily}`;
    return ruler.measureText(text).width;
  }

  // ---- table
  function columns() {
    const at_length = rows().find((r) => r.speed_length)?.speed_length;
    const where = at_length ? `at ${tokens(at_length)}` : "";
    const held = { head: "KV resident", sub: "of dense", key: (r) => r.kv_share, text: (r) => percent(r.kv_share) };
    // Where weights bound the speed of a small model these two say what a method saves, so there they stand first.
    const costs = [
      { ...held, small: (r) => megabytes(r.kv_bytes) },
      { head: "attention, ms", sub: where, key: (r) => r.attention_ms, text: (r) => number(r.attention_ms),
        small: (r) => (has(r.attention_share) && !r.baseline ? `${percent(r.attention_share)} of dense` : "") },
    ];
    return [
      { head: "method", key: (r) => r.series, text: (r) => r.series },
      { head: "budget", key: (r) => r.budget, text: (r) => amount(r.budget) },
      ...(hasAttention ? costs : []),
      { head: "score", sub: "of dense, 95%", down: true, key: (r) => r.quality, text: (r) => percent(r.quality),
        small: (r) => (r.baseline ? "" : range(r.quality_low, r.quality_high, percent)) },
      ...tasks.map((task) => ({
        head: task, sub: `${better(task) === "lower" ? "↓" : "↑"}${usual(task) ? ` n=${tokens(usual(task))}` : ""}`, down: better(task) !== "lower",
        title: `${better(task) === "lower" ? "lower" : "higher"} is better`,
        key: (r) => r.tasks[task]?.value, text: (r) => number(r.tasks[task]?.value),
        small: (r) => r.tasks[task] && [range(r.tasks[task].low, r.tasks[task].high, number), r.tasks[task].n !== usual(task) ? `n=${tokens(r.tasks[task].n)}` : ""].filter(Boolean).join(", "),
      })),
      ...(hasAttention ? [] : [held]),
      ...(hasReads ? [{ head: "KV read", sub: "of dense", key: readShare, text: (r) => percent(readShare(r)) }] : []),
      { head: "peak memory", sub: where, key: (r) => r.peak_bytes, text: (r) => size(r.peak_bytes) },
      { head: "prefill, s", sub: where, key: (r) => r.prefill_s, text: (r) => number(r.prefill_s) },
      { head: "decode, tok/s", sub: where, down: true, key: (r) => r.decode_tok_s, text: (r) => number(r.decode_tok_s) },
    ];
  }

  function sorted(list, column) {
    if (!state.sort || !column) return list;
    const sign = state.sort.down ? -1 : 1;
    const known = (v) => v !== null && v !== undefined;
    return [...list].sort((a, b) => {
      const [x, y] = [column.key(a), column.key(b)];
      if (!known(x) || !known(y)) return known(y) - known(x); // unknown values last, whichever way
      return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
    });
  }

  function drawTable() {
    const table = at("table");
    const cols = columns();
    if (!rows().length) {
      at("table").replaceWith(make("p", { id: "table", class: "empty" }, "No records yet."));
      return;
    }
    const head = make("tr", {});
    for (const column of cols) {
      const active = state.sort?.head === column.head;
      head.append(make("th", { scope: "col", "aria-sort": active ? (state.sort.down ? "descending" : "ascending") : null },
        make("button", { type: "button", title: `Sort by ${column.head}${column.title ? ` (${column.title})` : ""}`, onclick: () => sortBy(column) },
          column.head, column.sub ? make("small", {}, column.sub) : null)));
    }
    table.replaceChildren(make("thead", {}, head));
    const key = cols.find((c) => c.head === state.sort?.head);
    for (const row of sorted(rows(), key)) table.append(tableBody(row, cols));
    const partial = rows().some((r) => r.done && !r.complete);
    at("table-note").textContent = partial ? "* not every task and length of this row finished; its numbers cover those that did." : "";
  }

  function tableBody(row, cols) {
    const line = make("tr", { class: row.baseline ? "baseline" : null });
    cols.forEach((column, i) => {
      const star = i === 0 && row.done && !row.complete ? "*" : "";
      const small = column.small?.(row);
      line.append(make(i ? "td" : "th", i ? {} : { scope: "row", title: row.label }, i === 0 && !row.baseline ? swatch(row.series) : null,
        column.text(row) + star, small ? make("small", {}, small) : null));
    });
    const body = make("tbody", {}, line);
    if (row.problems.length) {
      body.append(make("tr", { class: "problem" }, make("td", { colspan: cols.length }, make("div", {}, row.problems.join("; ")))));
    }
    return body;
  }

  function sortBy(column) {
    const first = Boolean(column.down);
    if (state.sort?.head !== column.head) state.sort = { head: column.head, down: first };
    else if (state.sort.down === first) state.sort.down = !first;
    else state.sort = null; // third press: back to the order of the run
    drawTable();
    const order = state.sort ? `${column.head}, ${state.sort.down ? "descending" : "ascending"}` : "run order";
    at("said").textContent = `Sorted by ${order}`;
    [...document.querySelectorAll("#table thead button")][columns().findIndex((c) => c.head === column.head)].focus();
  }

  // ---- plots
  function quality(row) {
    if (state.task === null) return { y: row.quality, low: row.quality_low, high: row.quality_high };
    const score = row.tasks[state.task];
    return { y: score?.value, low: score?.low, high: score?.high };
  }

  function tip(row) {
    const box = make("div", { class: "tip" }, make("b", {}, row.label));
    const line = (name, value) => { if (value && value !== "–") box.append(make("span", {}, name), make("span", {}, value)); };
    const span = (low, high, form) => (range(low, high, form) ? ` (${range(low, high, form)})` : "");
    line("of dense", percent(row.quality) + (row.baseline ? "" : span(row.quality_low, row.quality_high, percent)));
    for (const [task, s] of Object.entries(row.tasks)) line(task, number(s.value) + span(s.low, s.high, number));
    line("KV resident", percent(row.kv_share) + (has(row.kv_bytes) ? ` (${megabytes(row.kv_bytes)})` : ""));
    line("attention", has(row.attention_ms) ? `${number(row.attention_ms)} ms${has(row.attention_share) ? ` (${percent(row.attention_share)} of dense)` : ""}` : "");
    if (hasReads) line("KV read", percent(readShare(row)));
    line("peak memory", size(row.peak_bytes));
    line("prefill", has(row.prefill_s) ? `${number(row.prefill_s)} s` : "");
    line("decode", has(row.decode_tok_s) ? `${number(row.decode_tok_s)} tok/s` : "");
    if (!row.complete) line("finished", `${row.done} of ${row.planned}`);
    return box;
  }

  function whisker(params, api) {
    const [x, low, high] = [api.value(0), api.value(1), api.value(2)];
    const [top, bottom] = [api.coord([x, high]), api.coord([x, low])];
    const line = (x1, y1, x2, y2) => ({ type: "line", shape: { x1, y1, x2, y2 }, style: { stroke: api.visual("color"), lineWidth: 1.2, opacity: 0.5 } });
    return { type: "group", silent: true, children: [
      line(top[0], top[1], bottom[0], bottom[1]),
      line(top[0] - 4, top[1], top[0] + 4, top[1]),
      line(bottom[0] - 4, bottom[1], bottom[0] + 4, bottom[1]),
    ] };
  }

  function plotOption(xOf, xName, xForm, byShare) {
    const ink = INK[theme()];
    const yForm = state.task === null ? percent : number;
    const points = (list) => list.filter((r) => has(xOf(r)) && has(quality(r).y)).map((r) => ({ value: [xOf(r), quality(r).y], row: r }));
    const out = [];
    for (const name of series.filter((s) => !state.hidden.has(s))) {
      const mine = points(rows().filter((r) => r.series === name)).sort((a, b) => a.row.budget - b.row.budget);
      if (!mine.length) continue;
      const shared = { name, color: colour(name), z: 3 };
      const named = mine.reduce((a, b) => (b.value[0] > a.value[0] ? b : a));
      named.label = { show: true, position: byShare && named.value[0] > 0.75 ? "bottom" : "right" };
      out.push({ ...shared, type: "line", data: mine, symbol: `path://${shape(name)}`, symbolSize: 10, showAllSymbol: true,
        lineStyle: { width: 2, type: series.indexOf(name) >= 8 ? "dashed" : "solid" }, emphasis: { focus: "series", scale: 1.4 },
        label: { formatter: () => brief(name), distance: 7, color: colour(name), fontSize: 12, textBorderColor: ink.card, textBorderWidth: 3 } });
      const bars = mine.map((p) => [p.value[0], quality(p.row).low, quality(p.row).high]).filter((b) => has(b[1]) && has(b[2]));
      out.push({ ...shared, z: 2, type: "custom", renderItem: whisker, data: bars, encode: { x: 0, y: [1, 2] }, silent: true, tooltip: { show: false } });
    }
    const dense = points(rows().filter((r) => r.baseline));
    for (const point of dense) point.label = { show: true, position: "top" };
    if (dense.length) {
      out.push({ name: "dense", type: "line", color: ink.soft, data: dense, symbol: `path://${BASELINE_SHAPE}`, symbolSize: 16, z: 4,
        label: { formatter: () => "dense", color: ink.text, fontSize: 12, textBorderColor: ink.card, textBorderWidth: 3 },
        markLine: { silent: true, symbol: "none", label: { show: false }, lineStyle: { color: ink.soft, type: [4, 4], width: 1 }, data: [{ yAxis: dense[0].value[1] }] } });
    }
    if (byShare && state.share === "kv" && state.task === null) {
      const best = points(rows().filter((r) => r.front)).sort((a, b) => a.value[0] - b.value[0]).map((p) => p.value);
      const limits = [has(data.limits.memory) ? { xAxis: data.limits.memory } : null, has(data.limits.max_drop) ? { yAxis: 1 - data.limits.max_drop } : null];
      out.push({ name: "Pareto front", type: "line", silent: true, showSymbol: false, z: 1, color: ink.text, data: best, tooltip: { show: false },
        lineStyle: { width: 7, opacity: 0.13 }, label: { show: false },
        markLine: { silent: true, symbol: "none", label: { show: false }, lineStyle: { color: ink.text, type: [2, 3], width: 1 }, data: limits.filter(Boolean) } });
    }
    const axis = { axisLabel: { color: ink.soft, fontSize: 12 }, axisLine: { lineStyle: { color: ink.line } }, axisTick: { show: false },
      splitLine: { lineStyle: { color: ink.line } }, nameTextStyle: { color: ink.soft, fontSize: 12 } };
    const inverse = state.task !== null && better(state.task) === "lower";
    const ends = rows().flatMap((r) => [quality(r).low, quality(r).y, quality(r).high]).filter(has);
    return {
      animationDuration: 250, aria: { enabled: false }, textStyle: { fontFamily: "inherit" },
      grid: { left: 54, right: byShare ? 26 : 20 + 5 * Math.min(14, Math.max(...series.map((s) => s.length), 4)), top: 52, bottom: 48 },
      xAxis: { ...axis, type: "value", name: xName, nameLocation: "middle", nameGap: 30, scale: !byShare, min: byShare ? 0 : null,
        axisLabel: { ...axis.axisLabel, formatter: xForm, hideOverlap: true } },
      yAxis: { ...axis, type: "value", scale: true, min: state.task === null && Math.min(...ends) < 0.6 ? 0 : null,
        name: state.task === null ? "mean score, % of dense" : `${state.task}, ${inverse ? "lower" : "higher"} is better`,
        inverse, // up is better in every plot
        // Above the name of a point at the very top.
        nameGap: 33, nameLocation: inverse ? "start" : "end", nameTextStyle: { ...axis.nameTextStyle, align: "left", padding: [0, 0, 0, -40] },
        axisLabel: { ...axis.axisLabel, formatter: yForm } },
      tooltip: { trigger: "item", confine: true, backgroundColor: ink.card, borderColor: ink.line, padding: [8, 11],
        textStyle: { color: ink.text, fontSize: 13 }, formatter: (p) => (p.data?.row ? tip(p.data.row) : "") },
      series: out,
    };
  }

  const charts = {};
  function drawPlots() {
    const where = state.view === "all" ? "" : ` at ${tokens(state.view)} tokens`;
    const speedAt = rows().find((r) => r.speed_length)?.speed_length;
    const what = state.task === null ? "Quality" : state.task;
    const reads = state.share === "read";
    at("memory-title").textContent = `${what} against ${reads ? "keys read" : "resident memory"}${where}`;
    at("speed-title").textContent = `${what} against decode speed${speedAt ? `, timed at ${tokens(speedAt)} tokens` : ""}`;
    draw("memory", plotOption(reads ? readShare : (r) => r.kv_share, reads ? "KV cache read a step, % of dense" : "resident KV cache, % of dense", percent, true));
    draw("speed", plotOption((r) => r.decode_tok_s, "decode, tokens/s", (v) => tokens(v), false));
  }

  function draw(id, option) {
    const box = at(id);
    if (!charts[id]) {
      charts[id] = echarts.init(box, null, { renderer: "svg" });
      new ResizeObserver(() => { charts[id].resize(); spreadLabels(charts[id]); }).observe(box);
    }
    charts[id].setOption(option, { notMerge: true });
    charts[id].labelled = option.series.flatMap((s, i) => (s.data || []).filter((d) => d.label?.show).map((point) => ({ i, name: s.name, point, data: s.data })));
    spreadLabels(charts[id]);
  }

  function spreadLabels(chart) { // a name that would cover a point or another name moves up or down to the nearest free place
    const pixel = (point) => chart.convertToPixel({ gridIndex: 0 }, point.value);
    const taken = chart.labelled.flatMap((l) => l.data).map(pixel).map(([x, y]) => ({ left: x - 5, right: x + 5, y, half: 5 }));
    const changed = [];
    for (const { i, name, point, data } of [...chart.labelled].sort((a, b) => pixel(a.point)[1] - pixel(b.point)[1])) {
      const [x, y] = pixel(point);
      const [beside, wide] = [point.label.position === "right", written(brief(name))];
      const box = { left: beside ? x + 8 : x - wide / 2, right: beside ? x + 14 + wide : x + wide / 2, half: 7 };
      const inward = Math.min(0, chart.getWidth() - 2 - box.right); // never over the right edge
      box.left += inward;
      box.right += inward;
      const free = (dy) => taken.every((t) => Math.abs(t.y - box.y - dy) >= t.half + box.half || t.right <= box.left || t.left >= box.right);
      box.y = y + { right: 0, bottom: 18, top: -19 }[point.label.position];
      const shift = [0, 8, -8, 15, -15, 23, -23, 30, -30, 45, -45].find(free) ?? 0;
      taken.push({ ...box, y: box.y + shift });
      point.label.offset = [inward, shift];
      changed[i] = { data };
    }
    chart.setOption({ series: Array.from(chart.getOption().series, (_, i) => changed[i] || {}) });
  }

  function drawLegend() {
    const box = at("legend");
    box.replaceChildren();
    for (const name of series) {
      const spot = (type) => () => Object.values(charts).forEach((c) => c.dispatchAction({ type, seriesName: name }));
      box.append(make("button", { type: "button", "aria-pressed": !state.hidden.has(name), onmouseenter: spot("highlight"),
        onmouseleave: spot("downplay"), onfocus: spot("highlight"), onblur: spot("downplay"), onclick: (event) => {
          if (!state.hidden.delete(name)) state.hidden.add(name);
          event.currentTarget.setAttribute("aria-pressed", !state.hidden.has(name));
          drawPlots();
        } }, swatch(name), name));
    }
  }

  // ---- heat maps
  function drawMaps() {
    const list = data.grids.filter((g) => g.task === state.map);
    const names = [...new Set(list.map((g) => g.series))];
    at("panels").replaceChildren(...names.map((name) => make("div", { class: "map-row" }, make("h3", {}, name),
      make("div", {}, ...list.filter((g) => g.series === name).map(heatMap)))));
  }

  function heatMap(grid) {
    const up = (a, b) => a - b;
    const turns = grid.cells.some((c) => has(c.turn)); // of a conversation; else depths in the context
    const place = (c) => (turns ? c.turn : c.depth);
    const named = (p) => (turns ? `turn ${p + 1}` : `depth ${percent(p)}`);
    const places = [...new Set(grid.cells.map(place))].sort(up);
    const task = data.grids.filter((g) => g.task === grid.task); // every length of the task, so that failures leave a gap
    const lengths = [...new Set(task.flatMap((g) => g.cells.map((c) => c.length)))].sort(up);
    const table = make("table", { class: "map" }, make("caption", {}, `${amount(grid.budget)} of the cache`),
      make("thead", {}, make("tr", {}, make("td", { class: "none" }), ...places.map((p) => make("th", { scope: "col" }, turns ? p + 1 : fixed(100 * p, 0))))));
    const body = make("tbody", {});
    for (const length of lengths) {
      body.append(make("tr", {}, make("th", { scope: "row" }, tokens(length)), ...places.map((where) => {
        const cell = grid.cells.find((c) => c.length === length && place(c) === where);
        if (!has(cell?.score)) return make("td", { class: "none" }, "–");
        const p = Math.max(0, Math.min(1, cell.score));
        const td = make("td", { class: p > 0.7 ? "strong" : p > 0.55 ? "middle" : null, title: `${tokens(length)} tokens, ${named(where)}: ${percent(cell.score)}${cell.n ? `, n=${cell.n}` : ""}` },
          fixed(100 * cell.score, 0));
        td.style.setProperty("--p", `${100 * p}%`);
        return td;
      })));
    }
    table.append(body);
    return table;
  }

  // ---- the run
  function drawRun() {
    const meta = data.meta;
    const hw = meta.hardware || {};
    const join = (...parts) => parts.filter(Boolean).join(", ");
    const machine = join(hw.gpu, hw.cpu, hw.cores && `${hw.cores} cores`, hw.threads && `${hw.threads} threads`, hw.memory_gb && `${number(hw.memory_gb)} GB memory`);
    const date = meta.date && !Number.isNaN(Date.parse(meta.date)) ? new Date(meta.date).toLocaleString("en-GB", { dateStyle: "long", timeStyle: "short" }) : shown(meta.date);
    const seconds = meta.elapsed_s;
    const elapsed = !has(seconds) ? "" : seconds < 120 ? `${number(seconds)} s` : `${fixed(seconds / 60, 0)} min`;
    const pairs = (object) => Object.entries(object || {}).map(([k, v]) => `${k} ${shown(v)}`).join(", ");
    at("facts").textContent = [shown(meta.model), shown(hw.gpu || hw.cpu), shown(meta.dtype), date].filter(Boolean).join(" · ");
    at("command").textContent = shown(meta.command);
    at("notes").replaceChildren(...(Array.isArray(meta.notes) ? meta.notes : []).map((note) => make("li", {}, shown(note))));
    const facts = { model: shown(meta.model), identity: pairs(meta.model_identity), device: join(shown(meta.device), shown(meta.dtype)),
      hardware: machine, versions: pairs(meta.versions), seed: shown(meta.seed), date, elapsed };
    for (const [name, value] of Object.entries(facts)) if (value) at("run").append(make("dt", {}, name), make("dd", {}, value));
    at("interrupted").hidden = !meta.interrupted;
    if (meta.interrupted) at("interrupted").textContent = "This run was interrupted before its end. The page shows what had finished.";
    at("answer").textContent = data.answer;
  }

  function copy(text, button) {
    const label = button.textContent;
    const done = (worked) => {
      button.textContent = worked ? "Copied" : "Press Ctrl+C";
      at("said").textContent = button.textContent;
      setTimeout(() => { button.textContent = label; }, 1600);
    };
    const byHand = () => { // without the clipboard API (some browsers on file://): select it in a text box
      const box = make("textarea", { "aria-label": "Text to copy" });
      box.value = text;
      document.body.append(box);
      box.select();
      const worked = document.execCommand("copy");
      if (worked) box.remove();
      else box.addEventListener("blur", () => box.remove());
      done(worked);
    };
    if (navigator.clipboard) navigator.clipboard.writeText(text).then(() => done(true), byHand);
    else byHand();
  }

  function drawColours() { // what carries a theme's colours outside CSS
    at("theme").textContent = theme() === "dark" ? "Light" : "Dark";
    drawTable();
    if (!at("plots").hidden) { drawLegend(); drawPlots(); }
  }

  drawRun();
  segments("length-pick", Object.keys(data.views).length < 2 ? [] : [["all", "All lengths"], ...data.lengths.map((n) => [String(n), `${tokens(n)} tokens`])], "all",
    (view) => { state.view = view; drawTable(); drawPlots(); });
  segments("task-pick", tasks.length < 1 ? [] : [[null, "Mean"], ...tasks.map((t) => [t, t])], null, (task) => { state.task = task; drawPlots(); });
  segments("share-pick", hasReads ? [["kv", "Bytes resident"], ["read", "Keys read"]] : [], "kv", (share) => { state.share = share; drawPlots(); });
  const mapTasks = [...new Set(data.grids.map((g) => g.task))];
  state.map = mapTasks[0];
  segments("map-pick", mapTasks.map((t) => [t, t]), state.map, (task) => { state.map = task; drawMaps(); });
  drawMaps();
  at("maps").hidden = !data.grids.length;
  at("plots").hidden = !allRows.some((r) => r.done);
  at("copy-command").parentElement.hidden = !data.meta.command;
  at("copy-table").hidden = !allRows.length;
  drawColours();
  at("theme").addEventListener("click", () => {
    document.documentElement.dataset.theme = theme() === "dark" ? "light" : "dark";
    drawColours();
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", drawColours);
  at("copy-command").addEventListener("click", (event) => copy(shown(data.meta.command), event.currentTarget));
  at("copy-table").addEventListener("click", (event) => copy(data.markdown, event.currentTarget));
})();
