"use strict";
// Maps: a value for each pair of blocks, as a matrix of colors. The scales come with the data.

const colorOf = ({ kind, low, high, bend, colors }, palettes) => {
  const stops = palettes[colors].map((color) => [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16)));
  const along = {
    linear: (value) => value,
    log: (value) => Math.log(Math.max(value, low * 1e-9)),
    signed: (value) => Math.sign(value) * Math.log1p(Math.abs(value) / bend),
  }[kind];
  const at = (value) => within((along(value) - along(low)) / (along(high) - along(low)), 0, 1);
  const color = (value) => {
    const place = at(value) * (stops.length - 1);
    const before = Math.min(Math.floor(place), stops.length - 2);
    return `rgb(${stops[before].map((part, index) => Math.round(part + (place - before) * (stops[before + 1][index] - part))).join(" ")})`;
  };
  return { at, color };
};

// The cells of a view by column and line. A band along the diagonal is turned, so that it lies along the horizontal axis.
const cellsOf = (view) => {
  const cells = view.from.map((from, index) => {
    const to = view.to[index];
    return view.band ? { index, column: from, line: from - to } : { index, column: to, line: from };
  });
  const mirrored = view.symmetric && !view.band ? cells.map(({ index, column, line }) => ({ index, column: line, line: column, mirrored: true })) : [];
  return [...cells, ...mirrored.filter(({ column, line }) => column !== line)];
};

const maps = {
  keys: (view) => `to the next cell; Home and End to the ends of a row${view.plans ? "; Enter copies the plan" : ""}`,

  draw({ all, view, metric, about, width, id }) {
    const cells = cellsOf(view);
    const scale = view.scales[metric];
    const { at, color } = colorOf(scale, all.colors);
    const ends = (key) => [Math.min(...cells.map((cell) => cell[key])), Math.max(...cells.map((cell) => cell[key]))];
    const [[first, last], [upper, lower]] = [ends("column"), ends("line")];
    const [columns, lines] = [last - first + 1, lower - upper + 1];
    const [left, top] = [52, 8];
    const cellWidth = Math.min((width - left - 66) / columns, view.band ? 28 : Math.min(560 / lines, 48));
    const cellHeight = view.band ? within(cellWidth, 12, 24) : cellWidth;
    const [right, bottom] = [left + columns * cellWidth, top + lines * cellHeight];
    const height = bottom + 42;
    const x = (column) => left + (column - first + 0.5) * cellWidth;
    const y = (line) => top + (line - upper + 0.5) * cellHeight;
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", focusable: "false", class: view.plans ? "map takes" : "map" });
    const box = { x: left, y: top, width: right - left, height: bottom - top };
    const hatch = svg("pattern", { id: `${id}-hatch`, width: 6, height: 6, patternUnits: "userSpaceOnUse" }, svg("path", { d: "M-1 7L7 -1M-1 1L1 -1M5 7L7 5", class: "hatch" }));
    const gradient = svg("linearGradient", { id: `${id}-colors`, x1: 0, y1: 1, x2: 0, y2: 0 },
      ...all.colors[scale.colors].map((stop, index, stops) => svg("stop", { offset: index / (stops.length - 1), "stop-color": stop })));
    root.append(svg("defs", {}, hatch, gradient), svg("rect", { ...box, fill: `url(#${id}-hatch)` }));

    const crosses = svg("g", { class: "cross" });
    const rings = svg("g", { class: "best" });
    const spots = cells.map((cell) => {
      const spot = { ...cell, x: x(cell.column), y: y(cell.line), halfWidth: cellWidth / 2, halfHeight: cellHeight / 2 };
      spot.plan = view.plans ? view.plans[cell.index] : null;
      spot.title = spot.plan || `${view.rows} ${view.from[cell.index]}, ${view.columns} ${view.to[cell.index]}`;
      spot.best = view.best.includes(cell.index) && !cell.mirrored;
      const value = view.values[metric][cell.index];
      const [r, u] = [Math.min(3, cellWidth / 3), [spot.x - cellWidth / 2, spot.y - cellHeight / 2]];
      if (value === null) crosses.append(svg("path", { d: `M${spot.x - r} ${spot.y - r}l${2 * r} ${2 * r}m0 ${-2 * r}l${-2 * r} ${2 * r}` }));
      else root.append(svg("rect", { x: u[0].toFixed(2), y: u[1].toFixed(2), width: cellWidth.toFixed(2), height: cellHeight.toFixed(2), fill: color(about.times * value), class: "cell" }));
      if (spot.best) for (const part of ["under", "over"]) rings.append(svg("circle", { cx: spot.x, cy: spot.y, r: 5.5, class: part }));
      return spot;
    });
    root.append(crosses, rings, svg("rect", { ...box, class: "edge" }));

    for (const tick of linearTicks(first, last, Math.min(columns, (right - left) / 40)).filter(Number.isInteger)) {
      root.append(svg("line", { x1: x(tick), x2: x(tick), y1: bottom, y2: bottom + 4, class: "tick" }));
      root.append(svg("text", { x: x(tick), y: bottom + 17, "text-anchor": "middle" }, rounded(tick)));
    }
    for (const tick of linearTicks(upper, lower, Math.min(lines, (bottom - top) / 24)).filter(Number.isInteger)) {
      root.append(svg("line", { x1: left - 4, x2: left, y1: y(tick), y2: y(tick), class: "tick" }));
      root.append(svg("text", { x: left - 7, y: y(tick) + 4, "text-anchor": "end" }, rounded(view.band ? 0 - tick : tick)));
    }
    const [across, down] = view.band ? [view.rows, `${view.columns} \u2212 ${view.rows}`] : [view.columns, view.rows];
    root.append(svg("text", { x: (left + right) / 2, y: height - 6, "text-anchor": "middle" }, across));
    if (!view.band) root.append(svg("text", { transform: `translate(14 ${(top + bottom) / 2}) rotate(-90)`, "text-anchor": "middle" }, down));

    root.append(svg("rect", { x: right + 12, y: top, width: 12, height: bottom - top, fill: `url(#${id}-colors)` }));
    let above = Infinity;
    for (const tick of scale.ticks) {
      const place = bottom - (bottom - top) * at(tick);
      if (above - place < 13) continue;
      above = place;
      root.append(svg("text", { x: right + 28, y: place + 4 }, rounded(tick, 3)));
    }

    const values = view.values[metric];
    const crossed = values.filter((value) => value === null).length;
    const under = values.filter((value) => value !== null && about.times * value < scale.low);
    const limit = under.every((value) => value <= 0) ? "of zero or less" : `below ${rounded(scale.low, 2)}`;
    const notes = [
      view.band ? `Upwards: ${down}.` : "",
      crossed ? `\u00d7: not a finite number (${crossed}).` : "",
      under.length ? `${under.length} cell${under.length > 1 ? "s" : ""} ${limit} in the lowest color.` : "",
    ];
    const half = { x: -cellWidth / 2 - 1, y: -cellHeight / 2 - 1, width: cellWidth + 2, height: cellHeight + 2 };
    const ring = svg("g", {}, svg("rect", { ...half, class: "under" }), svg("rect", half));
    return { root, spots, ring, legend: [], scale: scale.kind === "linear" ? "" : "log scale", note: notes.filter(Boolean).join(" ") };
  },

  find: (spots, x, y) => spots.find((spot) => Math.abs(spot.x - x) <= spot.halfWidth && Math.abs(spot.y - y) <= spot.halfHeight),

  moves(spots, at) {
    const beyond = (along, across, sign) => {
      const ahead = spots.filter((spot) => spot[across] === at[across] && sign * (spot[along] - at[along]) > 0);
      return least(ahead, (spot) => sign * spot[along]) || at;
    };
    const end = (sign) => least(spots.filter((spot) => spot.line === at.line), (spot) => sign * spot.column);
    return {
      ArrowRight: () => beyond("column", "line", 1),
      ArrowLeft: () => beyond("column", "line", -1),
      ArrowDown: () => beyond("line", "column", 1),
      ArrowUp: () => beyond("line", "column", -1),
      Home: () => end(1),
      End: () => end(-1),
    };
  },

  describe({ all, view, metric }, { index }) {
    const of = (table, name) => (table[name] ? table[name][index] : null);
    const line = (name) => {
      const { times, unit } = all.metrics[name];
      const [exact, error] = [of(view.values, name), of(view.errors, name)];
      if (exact === null) return ["not a finite number", "", ""];
      const [value, spread] = measured(times * exact, error === null ? null : times * error);
      return [value, spread, unit ? ` ${unit}` : ""];
    };
    const interval = (name) => {
      const [low, high] = (view.intervals[name] || [[], []]).map((side) => side[index]);
      const { times } = all.metrics[name];
      return typeof low === "number" && typeof high === "number" ? `${rounded(times * low, 3)} to ${rounded(times * high, 3)}` : "";
    };
    const [value, spread, unit] = line(metric);
    return [
      el("span", {}, view.label),
      el("span", { class: "value" }, `${value}${spread}${unit}`),
      of(view.values, metric) === null ? null : el("span", { class: "exact" }, `exactly ${of(view.values, metric)}`),
      interval(metric) && el("span", { class: "also" }, `interval: ${interval(metric)}${unit}`),
      ...view.metrics.filter((name) => name !== metric).map((name) => {
        const [shown, , its] = line(name);
        return el("span", { class: "also" }, `${all.metrics[name].label}: ${shown}${its}${interval(name) && ` (${interval(name)})`}`);
      }),
    ].filter(Boolean);
  },
};
