"use strict";
// Makes the drawings of a page answer the pointer. Each <figure class="chart"> holds its numbers as
// JSON, and the same drawing without life, for whoever runs no script.
(() => {
  const NS = "http://www.w3.org/2000/svg";
  const [WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM] = [840, 330, 64, 16, 12, 42];

  function add(parent, name, attributes = {}, text = "") {
    const svg = parent.namespaceURI === NS || name === "svg";
    const one = svg ? document.createElementNS(NS, name) : document.createElement(name);
    for (const [key, value] of Object.entries(attributes)) one.setAttribute(key, value);
    one.textContent = text;
    parent.appendChild(one);
    return one;
  }

  function shown(value) {
    if (value === null) return "–";
    return Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(4)));
  }

  function ends(values) {
    return values.reduce(([a, b], v) => [Math.min(a, v), Math.max(b, v)], [Infinity, -Infinity]);
  }

  function ticks(low, high, log) {
    if (log) {
      const out = [];
      for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++)
        for (const m of [1, 2, 5]) out.push(m * 10 ** e);
      return out.filter((v) => v >= low && v <= high);
    }
    const raw = (high - low) / 8 || 1;
    const unit = 10 ** Math.floor(Math.log10(raw));
    const step = unit * [1, 2, 5, 10].find((m) => m * unit >= raw);
    const out = [];
    for (let v = Math.ceil(low / step) * step; v <= high + step * 1e-9; v += step)
      out.push(Number(v.toPrecision(12)));
    return out;
  }

  function frame(figure) {
    for (const old of figure.querySelectorAll(":scope > svg")) old.remove();
    const bar = add(figure, "div", { class: "legend" });
    const box = add(figure, "div", { class: "drawing" });
    const tip = add(box, "div", { class: "tip", hidden: "" });
    return { bar, box, tip };
  }

  function point(tip, box, event, lines) {
    tip.replaceChildren();
    for (const [colour, text] of lines) {
      const line = add(tip, "div");
      if (colour) add(line, "i", { style: `background:${colour}` });
      add(line, "span", {}, text);
    }
    tip.hidden = false;
    const area = box.getBoundingClientRect();
    const x = event.clientX - area.left;
    tip.style.left = `${x > area.width / 2 ? x - tip.offsetWidth - 14 : x + 14}px`;
    tip.style.top = `${Math.min(event.clientY - area.top, area.height - tip.offsetHeight)}px`;
  }

  function lines(figure, data) {
    const { bar, box, tip } = frame(figure);
    const hidden = new Set();
    let log = false;
    const positive = data.series.every((s) => s.y.every((v) => v === null || v > 0));
    data.series.forEach((one, i) => {
      const button = add(bar, "button", { type: "button", "aria-pressed": "true" });
      add(button, "i", { style: `background:${one.colour}` });
      add(button, "span", {}, one.name);
      button.addEventListener("click", () => {
        if (!hidden.delete(i)) hidden.add(i);
        button.setAttribute("aria-pressed", String(!hidden.has(i)));
        draw();
      });
    });
    if (positive && !data.labels) {
      const button = add(bar, "button", { type: "button", "aria-pressed": "false" }, "log");
      button.addEventListener("click", () => {
        log = !log;
        button.setAttribute("aria-pressed", String(log));
        draw();
      });
    }

    function draw() {
      for (const old of box.querySelectorAll("svg")) old.remove();
      const svg = add(box, "svg", {
        viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": `${data.y} by ${data.x}`,
      });
      const seen = data.series.filter((_, i) => !hidden.has(i));
      const xs = data.series.flatMap((s) => s.x);
      const ys = seen.flatMap((s) => [...s.y, ...(s.low ?? []), ...(s.high ?? [])])
        .filter((v) => v !== null);
      if (!ys.length) return;
      ys.push(...(data.span ?? []).filter((v) => v !== null && (!log || v > 0)));
      const pad = data.labels ? 0.5 : 0;
      const [x0, x1] = ends(xs).map((x, i) => x + (i ? pad : -pad));
      let [y0, y1] = ends(ys);
      if (y0 === y1) [y0, y1] = log ? [y0 / 2, y1 * 2] : [y0 - 0.5, y1 + 0.5];
      const scale = log ? Math.log : (v) => v;
      const px = (x) => LEFT + ((x - x0) / (x1 - x0 || 1)) * (WIDTH - LEFT - RIGHT);
      const py = (y) =>
        TOP + ((scale(y1) - scale(y)) / (scale(y1) - scale(y0))) * (HEIGHT - TOP - BOTTOM);
      for (const v of ticks(y0, y1, log)) {
        add(svg, "line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: py(v), y2: py(v) });
        add(svg, "text", { x: LEFT - 8, y: py(v) + 4, "text-anchor": "end" }, shown(v));
      }
      const marks = data.labels ? data.labels.map((_, i) => i) : ticks(x0, x1, false);
      for (const v of marks.filter((v) => data.labels || Number.isInteger(v)))
        add(svg, "text", { x: px(v), y: HEIGHT - BOTTOM + 18, "text-anchor": "middle" },
          data.labels ? data.labels[v] : shown(v));
      add(svg, "text", { x: WIDTH / 2, y: HEIGHT - 4, "text-anchor": "middle" }, data.x);
      const y = HEIGHT / 2;
      add(svg, "text", { x: 14, y, "text-anchor": "middle", transform: `rotate(-90 14 ${y})` },
        data.y);
      for (const one of seen) {
        let path = "", begun = false;
        one.y.forEach((v, i) => {
          if (v !== null) path += `${begun ? "L" : "M"}${px(one.x[i])} ${py(v)}`;
          begun = v !== null;
        });
        const style = { stroke: one.colour, "stroke-dasharray": one.dash };
        add(svg, "path", { class: "line", d: path, ...style });
        one.y.forEach((v, i) => {
          if (v === null || one.x.length > 60) return;
          add(svg, "circle", { cx: px(one.x[i]), cy: py(v), r: 2.5, fill: one.colour });
          if (one.low)
            add(svg, "line", { class: "span", x1: px(one.x[i]), x2: px(one.x[i]),
              y1: py(one.low[i]), y2: py(one.high[i]), stroke: one.colour });
        });
      }
      const rule = add(svg, "line", { class: "rule", y1: TOP, y2: HEIGHT - BOTTOM });
      svg.addEventListener("pointerleave", () => {
        tip.hidden = true;
        rule.style.display = "none";
      });
      svg.addEventListener("pointermove", (event) => {
        const area = svg.getBoundingClientRect();
        const x = x0 + (((event.clientX - area.left) / area.width) * WIDTH - LEFT) *
          ((x1 - x0) / (WIDTH - LEFT - RIGHT));
        const near = xs.reduce((a, b) => (Math.abs(b - x) < Math.abs(a - x) ? b : a));
        rule.setAttribute("x1", px(near));
        rule.setAttribute("x2", px(near));
        rule.style.display = "";
        const told = [["", data.labels ? data.labels[near] : `${data.x} ${shown(near)}`]];
        for (const one of seen) {
          const i = one.x.indexOf(near);
          if (i < 0) continue;
          const reach = one.low ? ` (${shown(one.low[i])} – ${shown(one.high[i])})` : "";
          told.push([one.colour, `${one.name}: ${shown(one.y[i])}${reach}`]);
        }
        point(tip, box, event, told);
      });
    }
    draw();
  }

  function moments(figure, data) {
    const { bar, box, tip } = frame(figure);
    const last = data.moments.length - 1;
    const label = add(bar, "label");
    const slider = add(label, "input", { type: "range", min: 0, max: last, value: last });
    const name = add(label, "span");
    const [height, width] = [data.rows.length, data.columns.length];
    const cell = Math.max(14, Math.min(46, Math.floor(700 / width)));
    const tall = Math.max(8, Math.min(22, Math.floor(700 / height)));
    const svg = add(box, "svg", {
      viewBox: `0 0 ${WIDTH} ${height * tall + 30}`, role: "img", "aria-label": data.title,
    });
    data.rows.forEach((text, i) =>
      add(svg, "text", { x: LEFT + 22, y: i * tall + tall * 0.7, "text-anchor": "end" }, text));
    data.columns.forEach((text, j) =>
      add(svg, "text", { x: LEFT + 30 + (j + 0.5) * cell, y: height * tall + 18,
        "text-anchor": "middle" }, text));
    const cells = data.rows.map((row, i) => data.columns.map((column, j) => {
      const one = add(svg, "rect", { x: LEFT + 30 + j * cell, y: i * tall, width: cell - 1,
        height: tall - 1, fill: "var(--bar)" });
      one.addEventListener("pointermove", (event) => {
        const value = data.moments[slider.value].values[i][j];
        point(tip, box, event, [["", `${row}, expert ${column}`], ["", shown(value)]]);
      });
      return one;
    }));
    svg.addEventListener("pointerleave", () => { tip.hidden = true; });
    function draw() {
      const { name: text, values } = data.moments[slider.value];
      name.textContent = ` ${text}`;
      values.forEach((row, i) => row.forEach((value, j) =>
        cells[i][j].setAttribute("fill-opacity", 0.04 + 0.96 * (value / (data.most || 1)))));
    }
    slider.addEventListener("input", draw);
    draw();
  }

  for (const figure of document.querySelectorAll("figure.chart")) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    (data.kind === "lines" ? lines : moments)(figure, data);
  }
})();
