"use strict";
// Draws the chosen variant of each chart, and sorts, filters and pages the table of modules.
// Texts are anybody's: into the page they go as text; those for plotly were escaped in Python.
(function () {
  const { charts, table } = JSON.parse(document.getElementById("data").textContent);
  const by = (id) => document.getElementById(id);
  const digits = (value) => {
    const size = Math.abs(value);
    if (size >= 999.5) return Math.round(value).toLocaleString("en-US");
    if (size > 0 && size < 0.0005) return "< 0.001";
    return size ? value.toPrecision(3).replace(/\.$/, "") : "0";
  };
  const SHOW = {
    percent: (value) => digits(100 * value) + "\u00a0%",
    points: (value) => (value > 0 ? "+" : value < 0 ? "−" : "") + digits(Math.abs(100 * value)),
    number: (value) => (Number.isInteger(value) ? value.toLocaleString("en-US") : digits(value)),
  };

  // ---- charts
  const CONFIG = { responsive: true, displaylogo: false, plotlyServerURL: "", modeBarButtons: [["toImage", "zoom2d", "resetScale2d"]] };
  const coarse = matchMedia("(pointer: coarse)").matches; // a finger that scrolls should not zoom
  function heat(base, { trace, low, unit }) {
    const { rows, columns } = base.meta, value = (one) => (one == null ? "not measured" : unit === "%" ? SHOW.percent(one / 100) : SHOW.points(one / 100) + " points");
    const text = trace.z.map((row, r) => row.map((one, c) => `${rows[r]}<br>${columns[c]}<br><b>${value(one)}</b>`));
    const z = low ? trace.z.map((row) => row.map((one) => (one == null ? null : Math.log10(Math.max(one, low))))) : trace.z;
    return { ...base, ...trace, z, text };
  }
  function draw(id) {
    const choice = [...document.querySelectorAll(`select[data-chart=${id}]`)].map((one) => one.value).join(" ");
    const variant = charts[id].variants[choice], { data, layout } = charts[id].figures[variant.figure];
    const font = { ...layout.font, color: getComputedStyle(document.body).color, family: getComputedStyle(document.body).fontFamily };
    by(id).style.height = layout.height + "px";
    Plotly.react(by(id), variant.trace ? [heat(data[0], variant)] : data, { ...layout, font, dragmode: coarse ? false : "zoom" }, CONFIG);
    if (by(id + "-note")) by(id + "-note").textContent = variant.note;
  }
  for (const one of document.querySelectorAll("select[data-chart]")) one.addEventListener("change", () => draw(one.dataset.chart));

  // ---- table
  const { columns, rows } = table, place = (key) => columns.findIndex((one) => one.key === key);
  const shown = (column, value) => (value == null ? "–" : column.names ? column.names[value] : SHOW[column.kind](value));
  const texts = rows.map((row) => columns.map((column, n) => (column.names ? shown(column, row[n]) : "")).join("\n").toLowerCase());
  const known = rows.map((_, number) => number);
  let sorted = place("rounded") < 0 ? place("module") : place("rounded"), down = place("rounded") >= 0, page = 0, found = known;
  function select() {
    const words = by("filter").value.toLowerCase().split(/\s+/).filter(Boolean), change = place("change");
    const chosen = [...document.querySelectorAll("select[data-column]")].filter((one) => one.value !== "").map((one) => [place(one.dataset.column), Number(one.value)]);
    found = known.filter((n) => words.every((word) => texts[n].includes(word)) && chosen.every(([column, value]) => rows[n][column] === value) && (!by("filter-worse").checked || rows[n][change] > 0));
    // What is not known comes last, whichever way.
    found.sort((a, b) => {
      const one = rows[a][sorted], other = rows[b][sorted];
      if (one == null || other == null) return (one == null) - (other == null) || a - b;
      return (down ? other - one : one - other) || a - b;
    });
    page = 0;
    fill();
  }
  function fill() {
    const size = Number(by("size").value), pages = Math.max(1, Math.ceil(found.length / size)), body = document.createElement("tbody");
    for (const n of found.slice(page * size, (page + 1) * size)) {
      const line = body.insertRow();
      columns.forEach((column, c) => {
        const box = c ? line.insertCell() : line.appendChild(document.createElement("th")), value = rows[n][c];
        box.textContent = shown(column, value);
        box.className = c ? (column.names ? (column.key === "reason" && value != null ? "long" : "") : "n") : "path";
        if (!c) box.scope = "row";
        if (["change", "over_gptq"].includes(column.key) && value) box.classList.add(value > 0 ? "worse" : "better");
      });
    }
    by("modules").tBodies[0].replaceWith(body);
    by("page").textContent = `page ${page + 1} of ${pages}`;
    by("previous").disabled = page === 0;
    by("next").disabled = page >= pages - 1;
    const { title, names } = columns[sorted];
    by("count").textContent = `${found.length.toLocaleString("en-US")} of ${rows.length.toLocaleString("en-US")} rows, ` +
      (names ? `in ${down ? "reverse " : ""}order of ${title.toLowerCase()}` : `by ${title.toLowerCase()}, ${down ? "largest" : "smallest"} first`);
    [...by("modules").tHead.rows[0].cells].forEach((head, n) => head.setAttribute("aria-sort", n !== sorted ? "none" : down ? "descending" : "ascending"));
  }
  columns.forEach((column, n) => {
    const head = by("modules").tHead.rows[0].appendChild(document.createElement("th")), button = head.appendChild(document.createElement("button"));
    head.scope = "col";
    head.dataset.key = column.key;
    head.className = column.names ? "" : "n";
    button.type = "button";
    button.textContent = column.title;
    // Numbers start with the largest, names with the first.
    button.addEventListener("click", () => { down = n === sorted ? !down : !column.names; sorted = n; select(); });
  });
  for (const one of document.querySelectorAll("select[data-column]")) {
    const column = columns[place(one.dataset.column)];
    if (column) column.names.forEach((name, value) => one.add(new Option(name.length > 48 ? name.slice(0, 47) + "…" : name, value)));
    one.addEventListener("change", select);
  }
  by("filter").addEventListener("input", select);
  by("filter-worse").addEventListener("change", select);
  by("size").addEventListener("change", () => { page = 0; fill(); });
  for (const [id, step] of [["previous", -1], ["next", 1]]) by(id).addEventListener("click", () => { page += step; fill(); });

  // ---- theme
  const dark = matchMedia("(prefers-color-scheme: dark)");
  function paint(isDark) {
    document.documentElement.dataset.theme = isDark ? "dark" : "light";
    by("theme").setAttribute("aria-pressed", String(isDark));
    Object.keys(charts).forEach(draw);
  }
  by("theme").addEventListener("click", () => paint(document.documentElement.dataset.theme !== "dark"));
  dark.addEventListener("change", () => paint(dark.matches));
  select();
  paint(dark.matches);
})();
