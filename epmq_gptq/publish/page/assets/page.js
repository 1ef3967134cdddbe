"use strict";
// The charts and the table of the regret report. Texts of the data are anybody's: into the page they
// go as text, into plotly, which reads a little HTML, through `safe`.
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const experts = data.experts.length;
  const modules = data.modules.module.length;
  const by = (id) => document.getElementById(id);
  const NAMES = {
    rounded: "after",
    merged: "before",
    change: "change: after − before",
    gptq: "under plain GPTQ",
    over_gptq: "after − plain GPTQ",
    quantization: "rounding part",
    cross: "cross term",
    solved: "target, before rounding",
    aim_merged: "aim: before",
    aim_rounded: "aim: after",
    aim_change: "aim: after − before",
  };
  const SIGNED = new Set(["change", "over_gptq", "cross", "aim_change"]);
  // Figures of one kind share their colours, so that two of them can be compared.
  const LEVELS = ["rounded", "merged", "gptq", "solved", "aim_merged", "aim_rounded"];
  const known = Object.keys(NAMES).filter((key) => data.by_layer[key]);

  // ---- texts ------------------------------------------------------------------------------------

  const safe = (text) =>
    String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;").replace(/\n/g, " ");
  function cut(text, length) {
    const chars = Array.from(text);
    if (chars.length <= length) return text;
    const head = Math.ceil((length - 1) / 2);
    return chars.slice(0, head).join("") + "…" + chars.slice(chars.length - (length - 1 - head)).join("");
  }
  function digits(value) {
    const size = Math.abs(value);
    if (size >= 999.5) return Math.round(value).toLocaleString("en-US");
    if (size > 0 && size < 0.0005) return "< 0.001";
    return size ? value.toPrecision(3).replace(/\.$/, "") : "0";
  }
  const percent = (value) => (value == null ? "–" : digits(100 * value) + "\u00a0%");
  const sign = (value) => (value > 0 ? "+" : value < 0 ? "−" : "");
  const points = (value) => (value == null ? "–" : sign(value) + digits(Math.abs(100 * value)));
  const shown = (key, value) =>
    value == null ? "not measured" : SIGNED.has(key) ? points(value) + " points" : percent(value);
  const short = (value) => (value == null ? "–" : String(Number(value.toPrecision(3))));
  const plain = (value) =>
    value == null ? "–" : Number.isInteger(value) ? value.toLocaleString("en-US") : digits(value);

  // ---- colours and layout -----------------------------------------------------------------------

  const probe = document.createElement("span");
  probe.hidden = true;
  document.body.append(probe);
  function colour(name) {
    probe.style.color = `var(--${name})`;
    return getComputedStyle(probe).color;
  }
  const narrow = matchMedia("(max-width: 40rem)");
  const hovers = matchMedia("(hover: hover)");
  const coarse = matchMedia("(pointer: coarse)");
  const VIRIDIS = "Viridis";
  // ColorBrewer's RdBu, blue for better.
  const AROUND_ZERO = ["#053061", "#2166ac", "#4393c3", "#92c5de", "#d1e5f0", "#f7f7f7", "#fddbc7",
    "#f4a582", "#d6604d", "#b2182b", "#67001f"].map((one, place) => [place / 10, one]);
  const LINES = ["#0a72c4", "#d4740b", "#1a9850", "#c0392b", "#8e63c7", "#8c6d31", "#d1559f", "#7f8893",
    "#9aa81a", "#16a3b5"];
  const DASHES = ["solid", "dash", "dashdot", "longdash"];

  function axis(more) {
    return Object.assign({
      gridcolor: colour("grid"), linecolor: colour("line"), zerolinecolor: colour("line"),
      tickcolor: colour("line"), automargin: true, fixedrange: coarse.matches,
    }, more);
  }
  function layout(more) {
    return Object.assign({
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, -apple-system, Segoe UI, Roboto, Arial, sans-serif", size: narrow.matches ? 11 : 12.5,
        color: colour("text") },
      margin: { l: 8, r: 8, t: 10, b: 8 },
      // A finger that scrolls the page should not zoom a chart.
      dragmode: coarse.matches ? false : "zoom",
      hoverlabel: { bgcolor: colour("hover"), bordercolor: colour("line"), font: { color: colour("text") }, align: "left" },
      legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom" },
      // Of the colours that plotly would give to the buttons above a chart.
      modebar: { bgcolor: "rgba(0,0,0,0)", color: colour("quiet"), activecolor: colour("accent") },
    }, more);
  }
  // The title under an x axis, at a fixed distance: plotly would measure the ticks before the margins.
  const under = (text) => (text ? [{ text: safe(text), showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0, yanchor: "top", yshift: -24 }] : []);
  const ruler = document.createElement("canvas").getContext("2d");
  // Pixels of the widest of some labels.
  function widest(labels) {
    ruler.font = `${narrow.matches ? 11 : 12.5}px system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif`;
    return labels.reduce((most, label) => Math.max(most, ruler.measureText(label).width), 0);
  }
  // Room of fixed sizes, so that a chart looks alike whatever is in it.
  const margins = (labels, top) => ({ l: Math.ceil(widest(labels)) + 16, r: narrow.matches ? 14 : 24, t: top, b: 50, autoexpand: false });
  const CONFIG = {
    responsive: true, displaylogo: false, plotlyServerURL: "",
    // Named one by one: among plotly's own is one that would send a chart to its maker.
    modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]],
  };
  function draw(id, traces, more) {
    const config = Object.assign({ displayModeBar: hovers.matches && !narrow.matches ? "hover" : false }, CONFIG);
    config.toImageButtonOptions = { filename: `regret-${id}`, scale: 2 };
    const drawn = layout(more);
    // When the window changes plotly takes the height of the box, which is that of nothing.
    by(id).style.height = drawn.height ? `${drawn.height}px` : "";
    Plotly.react(by(id), traces, drawn, config);
  }

  // Ticks that have room: the first place of each of some labels, evenly chosen.
  function ticks(labels, room, length) {
    const texts = labels.map((one) => cut(one, length));
    const firsts = labels.map((_, place) => place).filter((place) => !place || labels[place] !== labels[place - 1]);
    const step = nice(firsts.length * (Math.max(1, widest(texts)) + 12) / Math.max(room, 1));
    const places = firsts.filter((_, number) => number % step === 0);
    return { tickmode: "array", tickvals: places, ticktext: places.map((place) => safe(texts[place])), tickangle: 0 };
  }
  function nice(step) {
    for (const size of [1, 2, 4, 5, 10, 20, 25, 50, 100, 200, 500]) if (step <= size) return size;
    return Math.ceil(step / 1000) * 1000;
  }
  const width = (id) => by(id).clientWidth - (narrow.matches ? 110 : 220);

  // Per-cent ticks of an axis, or a colour bar, whose values are logarithms of shares.
  function decades(low, high) {
    const steps = high - low > 3.5 ? [1] : high - low > 2.2 ? [1, 3] : [1, 2, 5];
    const values = [];
    for (let power = Math.floor(low); power <= Math.ceil(high); power++) {
      for (const step of steps) {
        const value = Math.log10(step) + power;
        if (value >= low - 1e-9 && value <= high + 1e-9) values.push(value);
      }
    }
    return { tickmode: "array", tickvals: values, ticktext: values.map((value) => tick(10 ** value)) };
  }
  const tick = (share) => Number((100 * share).toPrecision(2)).toLocaleString("en-US", { maximumSignificantDigits: 2, maximumFractionDigits: 8 }) + " %";
  function spread(values) {
    const some = values.filter((value) => value != null && value > 0);
    // Math.min(...some) would put a hundred thousand arguments on the stack.
    const low = some.reduce((a, b) => Math.min(a, b), Infinity);
    const high = some.reduce((a, b) => Math.max(a, b), 0);
    return { low, high, log: high / low > 30 };
  }

  // ---- heat map ---------------------------------------------------------------------------------

  // Of one expert: kinds of module by layer; several modules of a kind as the means elsewhere are.
  function inside(key, expert) {
    const kinds = data.kinds.length, layers = data.layers.length;
    const sums = new Float64Array(kinds * layers), masses = new Float64Array(kinds * layers);
    for (let m = 0; m < modules; m++) {
      const cell = m * experts + expert, value = data.cells[key][cell];
      if (value == null) continue;
      const mass = data.cells.energy[cell] * (data.cells.tokens[cell] || data.cells.rows[cell]);
      const place = data.modules.kind[m] * layers + data.modules.layer[m];
      sums[place] += mass * value;
      masses[place] += mass;
    }
    return Array.from(sums, (sum, place) => (masses[place] > 0 ? sum / masses[place] : null));
  }
  // rows, columns, and value(figure) -> values row by row.
  function view(name) {
    const turned = (values, columns) => {
      const result = [];
      for (let e = 0; e < experts; e++) for (let c = 0; c < columns; c++) result.push(values[c * experts + e]);
      return result;
    };
    if (name === "modules") return {
      rows: data.experts, columns: data.modules.module, title: "modules in forward order, by layer",
      labels: data.modules.layer.map((layer) => data.layers[layer]),
      values: (key) => turned(data.cells[key], modules),
    };
    if (name === "kinds") return {
      rows: data.kinds, columns: data.experts, title: "", labels: data.experts, values: (key) => data.by_kind[key],
    };
    if (name === "inside") {
      const expert = Number(by("map-expert").value);
      return { rows: data.kinds, columns: data.layers, title: "layer", labels: data.layers, values: (key) => inside(key, expert) };
    }
    return { rows: data.experts, columns: data.layers, title: "layer", labels: data.layers,
      values: (key) => turned(data.by_layer[key], data.layers.length) };
  }
  function quantile(values, share) {
    const sorted = values.filter((value) => value != null).map(Math.abs).sort((a, b) => a - b);
    return sorted.length ? sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))] : 0;
  }
  function drawMap() {
    const key = by("map-figure").value, name = by("map-view").value;
    by("map-expert-label").hidden = name !== "inside";
    const { rows, columns, labels, title, values } = view(name);
    const flat = values(key), signed = SIGNED.has(key);
    const notes = [];
    if (flat.some((value) => value == null)) notes.push("Grey: not measured.");
    const bar = { orientation: "h", x: 1, xanchor: "right", y: 1, yanchor: "bottom", len: narrow.matches ? 1 : 0.5,
      thickness: 10, outlinewidth: 0, ticks: "outside", tickcolor: colour("line"), tickfont: { color: colour("text") } };
    let z, colours;
    if (signed) {
      const most = quantile(flat, 1) || 1e-6, usual = quantile(flat, 0.98);
      const end = most > 3 * usual && usual > 0 ? usual : most;
      if (end < most) notes.push(`Colours end at ±${digits(100 * end)} points; the largest is ${digits(100 * most)}.`);
      z = flat.map((value) => (value == null ? null : 100 * value));
      colours = { colorscale: AROUND_ZERO, zmin: -100 * end, zmax: 100 * end };
      bar.title = { text: key === "cross" ? "percentage points" : "percentage points, blue is better", side: "top" };
    } else {
      const group = LEVELS.includes(key) ? known.filter((one) => LEVELS.includes(one)) : [key];
      const range = spread([].concat(...group.map(values)));
      if (range.log) {
        const low = Math.log10(range.low), high = Math.log10(range.high);
        z = flat.map((value) => (value == null ? null : Math.log10(Math.max(value, range.low))));
        colours = { colorscale: VIRIDIS, zmin: low, zmax: high };
        Object.assign(bar, decades(low, high));
      } else {
        z = flat.map((value) => (value == null ? null : 100 * value));
        colours = { colorscale: VIRIDIS, zmin: 0, zmax: 100 * range.high || 1 };
        bar.ticksuffix = " %";
      }
      bar.title = { text: "% of output energy" + (range.log ? ", logarithmic" : ""), side: "top" };
      notes.push("Bright is far from the expert." + (group.length > 1 ? " One scale for all figures before and after, so that they can be compared." : ""));
    }
    const cols = columns.length, matrix = [], text = [];
    for (let r = 0; r < rows.length; r++) {
      matrix.push(z.slice(r * cols, (r + 1) * cols));
      text.push(columns.map((column, c) => `${safe(cut(rows[r], 60))}<br>` +
        (name === "layers" || name === "inside" ? "layer " : "") +
        `${safe(cut(column, 70))}<br><b>${shown(key, flat[r * cols + c])}</b>`));
    }
    const gap = cols * rows.length > 3000 || cols > 100 ? 0 : 1;
    const row = Math.max(6, Math.min(30, 560 / rows.length));
    // Names of experts under a map are all told, aslant where they have no room.
    let below = ticks(labels, width("map"), narrow.matches ? 10 : 18), foot = 50;
    if (name === "kinds" && below.tickvals.length < cols && cols < 60) {
      const names = labels.map((one) => cut(one, 16));
      below = { tickmode: "array", tickvals: names.map((_, place) => place), ticktext: names.map(safe), tickangle: -45 };
      foot = 30 + Math.ceil(0.72 * widest(names));
    }
    const shownRows = rows.map((one) => cut(one, narrow.matches ? 14 : 30));
    draw("map", [Object.assign({
      type: "heatmap", z: matrix, text, hovertemplate: "%{text}<extra></extra>", xgap: gap, ygap: gap,
      hoverongaps: false, colorbar: bar,
    }, colours)], {
      height: Math.max(44, rows.length * row) + 76 + foot,
      plot_bgcolor: colour("gap"),
      margin: { ...margins(shownRows, 76), b: foot }, annotations: under(title),
      xaxis: axis({ showgrid: false, zeroline: false, automargin: false,
        range: [-0.5, cols - 0.5], ...below }),
      yaxis: axis({ showgrid: false, zeroline: false, range: [rows.length - 0.5, -0.5], ticks: "",
        automargin: false, tickmode: "array", ...every(shownRows, row) }),
    });
    by("map-note").textContent = notes.join(" ");
  }
  function every(labels, height) {
    const step = nice(14 / height);
    const places = labels.map((_, place) => place).filter((place) => place % step === 0);
    return { tickvals: places, ticktext: places.map((place) => safe(labels[place]) + " ") };
  }

  // ---- over depth -------------------------------------------------------------------------------

  // A line that is broken where another stack begins.
  function line(values) {
    const x = [], y = [];
    values.forEach((value, place) => {
      if (place && data.stacks[place] !== data.stacks[place - 1]) { x.push(place - 0.5); y.push(null); }
      x.push(place);
      y.push(value == null || value <= 0 ? null : 100 * value);
    });
    return { x, y };
  }
  function drawCurve() {
    const chosen = by("curve-expert").value, all = chosen === "all";
    const numbers = all ? data.experts.map((_, e) => e) : [Number(chosen)];
    const aims = by("curve-against") && by("curve-against").value === "aim";
    const last = aims ? "aim_rounded" : "rounded";
    const keys = aims ? ["aim_merged", "aim_rounded"] : ["merged", "gptq", "rounded"].filter((key) => known.includes(key));
    const traces = [], seen = [];
    for (const e of numbers) {
      for (const key of all ? [last] : keys) {
        const values = data.layers.map((_, layer) => data.by_layer[key][layer * experts + e]);
        seen.push(...values);
        const tint = all ? LINES[e % LINES.length] : colour({ merged: "before", aim_merged: "before", gptq: "gptq" }[key] || "after");
        const dash = all ? DASHES[Math.floor(e / LINES.length) % DASHES.length] : { merged: "dot", aim_merged: "dot", gptq: "dash" }[key] || "solid";
        traces.push({
          type: "scatter", mode: data.layers.length > 60 ? "lines" : "lines+markers", ...line(values),
          name: safe(cut(all ? data.experts[e] : NAMES[key], narrow.matches ? 16 : 28)),
          line: { color: tint, width: 2, dash }, marker: { color: tint, size: 5 },
          text: line(values).x.map((place) => Number.isInteger(place) ?
            `${safe(cut(data.experts[e], 60))}, ${NAMES[key]}<br>layer ${safe(cut(data.layers[place], 60))}<br><b>${percent(values[place])}</b>` : ""),
          hovertemplate: "%{text}<extra></extra>",
        });
      }
    }
    const range = spread(seen);
    const borders = data.stacks.map((_, place) => place).filter((place) => place && data.stacks[place] !== data.stacks[place - 1]);
    draw("curve", traces, {
      height: narrow.matches ? 320 : 380, hovermode: "closest", showlegend: true,
      margin: { l: 8, r: narrow.matches ? 14 : 24, t: 10, b: 50 }, annotations: under("layer"),
      xaxis: axis({ zeroline: false, range: [-0.5, data.layers.length - 0.5], automargin: false,
        ...ticks(data.layers, width("curve"), narrow.matches ? 10 : 18) }),
      yaxis: axis({ title: { text: "% of output energy", standoff: 6 }, rangemode: "tozero",
        ...(range.log ? logAxis(range) : { ticksuffix: " %" }) }),
      shapes: borders.map((place) => ({ type: "line", xref: "x", yref: "paper", x0: place - 0.5, x1: place - 0.5, y0: 0, y1: 1,
        line: { color: colour("quiet"), width: 1, dash: "dot" } })),
    });
  }
  function logAxis(range) {
    const low = Math.log10(range.low), high = Math.log10(range.high);
    const { tickvals, ticktext } = decades(low - 0.1, high + 0.1);
    return { type: "log", range: [low + 1.9, high + 2.1], tickmode: "array",
      tickvals: tickvals.map((value) => 100 * 10 ** value), ticktext };
  }

  // ---- bars -------------------------------------------------------------------------------------

  // Bars from left to right, the first row on top; series: {name, colour, values, texts, hover}.
  function drawBars(id, rows, series, more) {
    const room = Math.max(20, Math.floor(by(id).clientWidth / 20));
    const traces = series.map((one) => ({
      type: "bar", orientation: "h", name: one.name, y: rows.map((_, place) => place), x: one.values,
      marker: { color: colour(one.colour) }, text: one.texts, textposition: one.texts ? "outside" : "none",
      cliponaxis: false, textfont: { color: colour("text") }, customdata: one.hover, hovertemplate: "%{customdata}<extra></extra>",
    }));
    const legend = series.length + (more.traces || []).length;
    const labels = rows.map((one) => cut(one, room));
    // On a phone a legend has a line for each entry.
    const top = legend < 2 ? 10 : narrow.matches ? 20 * legend + 14 : 34;
    draw(id, traces.concat(more.traces || []), {
      height: Math.max(30, rows.length * Math.max(26, series.length * 13 + 10)) + top + 50,
      barmode: "group", bargap: 0.25, showlegend: legend > 1, hovermode: "closest",
      margin: { ...margins(labels, top), r: more.room || 24 }, annotations: under(more.title),
      legend: { orientation: narrow.matches ? "v" : "h", x: 0, xanchor: "left", y: 1, yanchor: "bottom", traceorder: "normal", maxheight: top },
      xaxis: axis({ automargin: false, ticksuffix: more.suffix === undefined ? " %" : more.suffix, rangemode: "tozero", nticks: narrow.matches ? 5 : 10, ...(more.xaxis || {}) }),
      yaxis: axis({ range: [rows.length - 0.5, -0.5], showgrid: false, zeroline: false, tickmode: "array", automargin: false,
        tickvals: rows.map((_, place) => place), ticktext: labels.map((one) => safe(one) + " "), ticks: "" }),
      shapes: more.shapes || [],
    });
  }
  function drawWorst() {
    const key = by("worst-by").value, cells = data.cells;
    const order = [];
    for (let cell = 0; cell < modules * experts; cell++) if (cells[key] && cells[key][cell] != null) order.push(cell);
    order.sort((a, b) => cells[key][b] - cells[key][a]);
    const top = order.slice(0, 15);
    const rows = top.map((cell) => label(Math.floor(cell / experts), cell % experts));
    const text = (cell) => `${safe(cut(data.modules.module[Math.floor(cell / experts)], 90))}<br>${safe(cut(data.experts[cell % experts], 60))}<br>` +
      ["merged", "gptq", "rounded", "change", "aim_merged", "aim_rounded"].filter((one) => known.includes(one)).map((one) => `${NAMES[one]}: ${shown(one, cells[one][cell])}`).join("<br>") +
      `<br>share of the expert's deviation: ${percent(cells.share[cell])}`;
    const hover = top.map(text);
    const main = key === "change" ? "rounded" : key;
    const marked = key === "share" ? [] : key === "aim_rounded" ? ["aim_merged"] : ["merged", "gptq"];
    const markers = marked.filter((one) => known.includes(one)).map((one) => ({
      type: "scatter", mode: "markers", name: NAMES[one], x: top.map((cell) => percentOf(cells[one][cell])), y: top.map((_, place) => place),
      marker: { color: colour(one === "gptq" ? "gptq" : "before"), size: 9, symbol: one === "gptq" ? "x" : "diamond",
        line: { color: colour("card"), width: 1 } },
      customdata: hover, hovertemplate: "%{customdata}<extra></extra>",
    }));
    drawBars("worst", rows, [{ name: NAMES[main] || main, colour: "after", hover,
      values: top.map((cell) => percentOf(cells[main][cell])), texts: markers.length ? undefined : top.map((cell) => percent(cells[main][cell])) }],
    { traces: markers, room: markers.length ? 24 : 64,
      title: key === "share" ? "% of the expert's whole deviation" : key === "aim_rounded" ? "% of the energy of the aim" : "% of the expert's output energy" });
  }
  const percentOf = (value) => (value == null ? null : 100 * value);
  // A module in few characters: layer and the last part of its kind.
  function label(m, e) {
    const name = data.modules.module[m], layer = data.layers[data.modules.layer[m]];
    if (narrow.matches) return `${cut(layer, 6)} ${cut(name.split(".").pop(), 9)} ${cut(data.experts[e], 7)}`;
    return `${cut(name, 44)} · ${cut(data.experts[e], 16)}`;
  }
  function drawParts() {
    const keys = ["merged", "quantization", "cross", "rounded", "gptq"].filter((key) => known.includes(key));
    const tints = { merged: "before", quantization: "part", cross: "cross", rounded: "after", gptq: "gptq" };
    const names = { merged: "before (merging part)", rounded: "after (the sum)" };
    drawBars("parts", data.experts, keys.map((key) => ({
      name: names[key] || NAMES[key], colour: tints[key], values: data.by_expert[key].map(percentOf),
      hover: data.by_expert[key].map((value, e) => `${safe(cut(data.experts[e], 60))}<br>${names[key] || NAMES[key]}<br><b>${shown(key, value)}</b>`),
    })), { title: "% of the expert's output energy" });
  }
  function drawRetention() {
    const rows = data.experts.map((_, e) => e).filter((e) => data.retention[e]);
    const stages = [["merged", "before", "merged"], ["gptq", "gptq", "plain GPTQ"], ["quantized", "after", "quantized"]]
      .filter(([stage]) => rows.some((e) => data.retention[e][stage] != null));
    const most = Math.max(100, ...rows.flatMap((e) => stages.map(([stage]) => data.retention[e][stage] || 0)));
    drawBars("retention", rows.map((e) => data.experts[e]), stages.map(([stage, tint, name]) => ({
      name, colour: tint, values: rows.map((e) => data.retention[e][stage]),
      texts: rows.map((e) => { const value = data.retention[e][stage]; return value == null ? "" : digits(value) + "\u00a0%"; }),
      hover: rows.map((e) => `${safe(cut(data.experts[e], 60))}, ${name}<br><b>${percent(data.retention[e][stage] == null ? null : data.retention[e][stage] / 100)}</b> of the expert's own`),
    })), { title: "% of the expert's own figure", xaxis: { range: [0, 1.15 * most] },
      shapes: [{ type: "line", layer: "below", x0: 100, x1: 100, y0: 0, y1: 1, xref: "x", yref: "paper", line: { color: colour("text"), width: 1, dash: "dot" } }] });
  }
  function drawPhases() {
    const rows = Object.entries(data.phases).sort((a, b) => b[1] - a[1]);
    const all = rows.reduce((sum, one) => sum + one[1], 0);
    const held = (name) => (data.phase_memory[name] ? ", " + data.phase_memory[name] : "");
    drawBars("phases", rows.map(([name]) => name.replace(/_/g, " ")), [{
      name: "seconds", colour: "after", values: rows.map((one) => one[1]),
      texts: rows.map(([name, seconds]) => plain(seconds) + " s" + held(name)),
      hover: rows.map(([name, seconds]) => `${safe(cut(name, 60))}<br><b>${plain(seconds)} s</b>, ${percent(all ? seconds / all : null)}${held(name)}`),
    }], { title: "seconds", suffix: "", room: Object.keys(data.phase_memory).length ? 130 : 64 });
  }
  function drawAlpha() {
    const found = data.modules.alpha.map((_, m) => m).filter((m) => data.modules.alpha[m] != null);
    if (new Set(found.map((m) => data.modules.alpha[m])).size < 2) return;
    by("alpha-box").hidden = false;
    // The modules of a layer stand beside one another.
    const inLayer = new Map(), place = [];
    data.modules.layer.forEach((layer, m) => { place[m] = inLayer.get(layer) || 0; inLayer.set(layer, place[m] + 1); });
    const beside = (m) => data.modules.layer[m] + 0.7 * ((place[m] + 0.5) / inLayer.get(data.modules.layer[m]) - 0.5);
    draw("alpha", [{
      type: "scatter", mode: "markers", x: found.map(beside), y: found.map((m) => data.modules.alpha[m]),
      marker: { color: colour("after"), size: modules > 300 ? 4 : 6, opacity: 0.75 },
      text: found.map((m) => `${safe(cut(data.modules.module[m], 90))}<br><b>α = ${short(data.modules.alpha[m])}</b>`),
      hovertemplate: "%{text}<extra></extra>",
    }], {
      height: 280, hovermode: "closest",
      margin: { l: 8, r: narrow.matches ? 14 : 24, t: 10, b: 50 }, annotations: under("layer"),
      xaxis: axis({ zeroline: false, range: [-0.5, data.layers.length - 0.5], automargin: false,
        ...ticks(data.layers, width("alpha"), narrow.matches ? 10 : 18) }),
      yaxis: axis({ title: { text: "α", standoff: 6 }, ...(found.some((m) => data.modules.alpha[m] <= 0) ? {} : { type: "log", tickmode: "array",
        tickvals: [1e-4, 1e-3, 1e-2, 0.1, 1, 10, 100], ticktext: ["0.0001", "0.001", "0.01", "0.1", "1", "10", "100"] }) }),
    });
  }

  // ---- table ------------------------------------------------------------------------------------

  const size = () => Number(by("size").value);
  const cell = (key) => (row) => (row.cell == null || !data.cells[key] ? null : data.cells[key][row.cell]);
  const of = (key) => (row) => data.modules[key][row.m];
  const share = (title, key) => ({ title, key, get: cell(key), show: SIGNED.has(key) ? points : percent, number: true });
  const TARGETS = { experts: "experts", merged: "kept merged", rtn: "rounded to nearest" };
  const target = (value) => TARGETS[value] || value;
  const COLUMNS = [
    { title: "Module", key: "module", get: (row) => row.m, show: (m) => data.modules.module[m] },
    { title: "Expert", key: "expert", get: (row) => row.e, show: (e) => (e == null ? "–" : data.experts[e]) },
    share("Before", "merged"), share("After", "rounded"), share("Change, points", "change"), share("Plain GPTQ", "gptq"),
    share("After − GPTQ, points", "over_gptq"), share("Rounding part", "quantization"), share("Cross term, points", "cross"),
    share("Target, unrounded", "solved"), share("Aim: before", "aim_merged"), share("Aim: after", "aim_rounded"), share("Share of expert", "share"),
    { title: "Weight", key: "weight", get: cell("weight"), show: short, number: true },
    { title: "Tokens", key: "tokens", get: cell("tokens"), show: plain, number: true },
    { title: "Layer", key: "layer", get: (row) => data.modules.layer[row.m], show: (layer) => data.layers[layer] },
    { title: "α", key: "alpha", get: of("alpha"), show: short, number: true },
    { title: "Bits", key: "bits", get: of("bits"), show: plain, number: true },
    { title: "Target", key: "target", get: of("target"), show: target },
    { title: "Held-out gain", key: "held_out_gain", get: of("held_out_gain"), show: plain, number: true },
    { title: "Reason", key: "reason", get: of("reason"), show: (text) => text || "–", long: true },
  ];
  const rows = [];
  for (let m = 0; m < modules; m++) {
    const before = rows.length;
    for (let e = 0; e < experts; e++) {
      const place = m * experts + e;
      if (data.cells.tokens[place] != null || (data.cells.rounded && data.cells.rounded[place] != null)) rows.push({ m, e, cell: place });
    }
    if (rows.length === before) rows.push({ m, e: null, cell: null });
  }
  const columns = COLUMNS.filter((column) => rows.some((row) => { const value = column.get(row); return value != null && value !== ""; }));
  // Texts to look in, made once.
  for (const row of rows) row.text = [data.modules.module[row.m], row.e == null ? "" : data.experts[row.e], target(data.modules.target[row.m]), data.modules.reason[row.m]].join("\n").toLowerCase();
  const order = { key: columns.some((one) => one.key === "rounded") ? "rounded" : "module", down: columns.some((one) => one.key === "rounded") };
  let page = 0, found = rows;

  function compare(column) {
    const turn = order.down ? -1 : 1;
    return (a, b) => {
      const one = column.get(a), other = column.get(b);
      // What is not known comes last, whichever way.
      if (one == null || other == null) return (one == null) - (other == null) || a.m - b.m;
      const way = typeof one === "string" ? one.localeCompare(other) : one - other;
      return turn * way || a.m - b.m || a.e - b.e;
    };
  }
  function select() {
    const words = by("filter").value.toLowerCase().split(/\s+/).filter(Boolean);
    const expert = by("filter-expert").value, wanted = by("filter-target").value, worse = by("filter-worse").checked;
    found = rows.filter((row) => words.every((word) => row.text.includes(word)) &&
      (expert === "" || String(row.e) === expert) && (wanted === "" || data.modules.target[row.m] === wanted) &&
      (!worse || (row.cell != null && data.cells.change && data.cells.change[row.cell] > 0)));
    found.sort(compare(columns.find((one) => one.key === order.key)));
    page = 0;
    fill();
  }
  function fill() {
    const body = document.createElement("tbody");
    for (const row of found.slice(page * size(), (page + 1) * size())) {
      const line = body.insertRow();
      columns.forEach((column, place) => {
        const box = place ? line.insertCell() : line.appendChild(document.createElement("th"));
        if (!place) { box.scope = "row"; box.className = "path"; }
        const value = column.get(row);
        box.textContent = column.show(value);
        if (column.number) box.className = "n";
        if (column.long) box.className = value ? "long" : "";
        if (["change", "over_gptq", "aim_change"].includes(column.key) && value) box.classList.add(value > 0 ? "worse" : "better");
      });
    }
    by("modules").tBodies[0].replaceWith(body);
    const pages = Math.max(1, Math.ceil(found.length / size()));
    by("page").textContent = `page ${page + 1} of ${pages}`;
    by("previous").disabled = page === 0;
    by("next").disabled = page >= pages - 1;
    by("previous").parentElement.hidden = found.length <= Number(by("size").options[0].value);
    const column = columns.find((one) => one.key === order.key);
    by("count").textContent = `${found.length.toLocaleString("en-US")} of ${rows.length.toLocaleString("en-US")} rows, ` +
      (column.number ? `by ${column.title.toLowerCase()}, ${order.down ? "largest" : "smallest"} first`
        : `in ${order.down ? "reverse " : ""}order of ${column.title.toLowerCase()}`);
    for (const head of by("modules").tHead.rows[0].cells) {
      const is = head.dataset.key === order.key;
      head.setAttribute("aria-sort", is ? (order.down ? "descending" : "ascending") : "none");
    }
  }
  function buildTable() {
    for (const column of columns) {
      const head = document.createElement("th"), button = document.createElement("button");
      head.scope = "col";
      head.dataset.key = column.key;
      if (column.number) head.className = "n";
      button.type = "button";
      button.textContent = column.title;
      button.addEventListener("click", () => {
        // Numbers start with the largest, names with the first.
        order.down = order.key === column.key ? !order.down : Boolean(column.number);
        order.key = column.key;
        select();
      });
      head.append(button);
      by("modules").tHead.rows[0].append(head);
    }
    const turn = (step) => () => { page += step; fill(); by("modules").parentElement.scrollIntoView({ block: "nearest" }); };
    by("previous").addEventListener("click", turn(-1));
    by("next").addEventListener("click", turn(1));
    by("size").addEventListener("change", () => { page = 0; fill(); });
    options("filter-expert", [["", "all"], ...data.experts.map((name, e) => [e, name])]);
    options("filter-target", [["", "all"], ...Array.from(new Set(data.modules.target), (one) => [one, target(one)])]);
    by("filter-worse").parentElement.hidden = !data.cells.change;
    by("filter").addEventListener("input", select);
    for (const id of ["filter-expert", "filter-target", "filter-worse"]) by(id).addEventListener("change", select);
    select();
  }
  function options(id, pairs) {
    for (const [value, text] of pairs) by(id).add(new Option(cut(text, 48), value));
  }

  // ---- the whole --------------------------------------------------------------------------------

  const charts = [["map", drawMap], ["curve", drawCurve], ["worst", drawWorst], ["parts", drawParts],
    ["retention", drawRetention], ["phases", drawPhases], ["alpha", drawAlpha]].filter(([id]) => by(id));
  const drawAll = () => charts.forEach(([, one]) => one());

  if (by("map")) {
    options("map-figure", known.map((key) => [key, NAMES[key]]));
    options("map-expert", data.experts.map((name, e) => [e, name]));
    options("curve-expert", [...(experts > 1 ? [["all", "all, after"]] : []), ...data.experts.map((name, e) => [e, name])]);
    // Of many experts the one that lost most is shown first.
    const after = data.by_expert[data.judged_by] || [];
    const worst = after.reduce((best, value, e) => (value != null && (best < 0 || value > after[best]) ? e : best), -1);
    if (worst >= 0) by("curve-expert").value = by("map-expert").value = String(worst);
    for (const id of ["map-figure", "map-view", "map-expert"]) by(id).addEventListener("change", drawMap);
    by("curve-expert").addEventListener("change", drawCurve);
    if (by("curve-against")) by("curve-against").addEventListener("change", drawCurve);
    by("worst-by").addEventListener("change", drawWorst);
  }

  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  function paint() {
    const isDark = chosen === null ? dark.matches : chosen;
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    by("theme").setAttribute("aria-pressed", String(isDark));
    drawAll();
  }
  by("theme").addEventListener("click", () => {
    chosen = document.documentElement.dataset.theme !== "dark";
    paint();
  });
  dark.addEventListener("change", paint);
  narrow.addEventListener("change", drawAll);
  buildTable();
  paint();
})();
