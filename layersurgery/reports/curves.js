"use strict";
// Curves: values over depth.

const MARKERS = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,
  (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
  (r) => `M0 ${-1.2 * r}L${1.15 * r} ${0.9 * r}H${-1.15 * r}Z`,
  (r) => `M0 ${-1.3 * r}L${1.1 * r} 0L0 ${1.3 * r}L${-1.1 * r} 0Z`,
  (r) => `M0 ${1.2 * r}L${1.15 * r} ${-0.9 * r}H${-1.15 * r}Z`,
  (r) => `M${-r / 2} ${-1.2 * r}H${r / 2}V${-r / 2}H${1.2 * r}V${r / 2}H${r / 2}V${1.2 * r}H${-r / 2}V${r / 2}H${-1.2 * r}V${-r / 2}H${-r / 2}Z`,
  (r) => `M${-r} ${-r}L${r} ${r}M${-r} ${r}L${r} ${-r}`,
];
const marker = (place, radius) => svg("path", { d: MARKERS[place % 7](radius), class: `mark c${place % 7}` });

// The lines of a view in one metric, as numbers to draw.
const linesOf = (view, name, about) =>
  view.lines.filter((line) => line.values[name]).map((line) => ({
    ...line,
    points: line.values[name].map((value, index) => {
      const error = line.errors[name] ? line.errors[name][index] : null;
      const drawn = value !== null && !(about.log && value <= 0);
      const title = line.name ? line.name[index] : `layer ${line.layer[index]}`;
      return { index, value, error, drawn, title, y: value * about.times, spread: (error || 0) * about.times };
    }),
  }));

const scale = (lines, about) => {
  const points = lines.flatMap((line) => line.points.filter((point) => point.drawn));
  if (!points.length) return null;
  let low = Math.min(...points.map((point) => (about.log && point.y <= point.spread ? point.y : point.y - point.spread)));
  let high = Math.max(...points.map((point) => point.y + point.spread));
  if (about.log) {
    [low, high] = [low / 1.15, high * 1.15];
    const at = (value) => Math.log(Math.max(value, low) / low) / Math.log(high / low);
    return { at, ticks: logTicks(low, high) };
  }
  if (about.unit === "%" && about.times === 100) [low, high] = [0, 100];
  else {
    if (low > 0 && low < high / 2) low = 0;
    const room = (high - low || Math.abs(high) || 1) * 0.05;
    [low, high] = [low === 0 ? 0 : low - room, high + room];
  }
  return { at: (value) => (value - low) / (high - low), ticks: linearTicks(low, high, 5), zero: low < 0 && high > 0 };
};

const curves = {
  keys: () => "left and right along the layers, up and down from curve to curve",

  draw({ all, view, metric, about, width }) {
    const lines = linesOf(view, metric, about);
    const vertical = scale(lines, about);
    const absent = lines.flatMap((line) => line.points.filter((point) => point.value !== null && !point.drawn)).length;
    const height = within(Math.round(width * 0.42), 250, 400);
    const [left, right, top, bottom] = [54, width - 12, 10, height - 42];
    const across = (depth) => left + (right - left) * (0.015 + 0.97 * depth);
    const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", focusable: "false" });
    const drawing = {
      root, spots: [], legend: [], scale: about.log ? "log scale" : "", ring: svg("g", {}, svg("circle", { r: 7 })),
      note: absent ? `${absent} value${absent > 1 ? "s" : ""} of zero or less ha${absent > 1 ? "ve" : "s"} no place on a logarithmic scale.` : "",
    };
    if (!vertical) {
      root.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no values to draw"));
      return drawing;
    }
    const down = (value) => bottom - (bottom - top) * within(vertical.at(value), 0, 1);
    for (const tick of vertical.ticks) {
      const y = down(tick);
      root.append(svg("line", { x1: left, x2: right, y1: y, y2: y, class: vertical.zero && Math.abs(tick) < 1e-12 ? "zero" : "grid" }));
      root.append(svg("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, rounded(tick, 3)));
    }
    // Models of one depth have layers in common; others only a relative depth.
    const most = all.deepest || 1;
    const ticks = all.deepest ? linearTicks(0, most, Math.min(most, width / 60)).filter(Number.isInteger) : [0, 0.2, 0.4, 0.6, 0.8, 1];
    for (const tick of ticks) {
      const x = across(tick / most);
      root.append(svg("line", { x1: x, x2: x, y1: bottom, y2: bottom + 4, class: "tick" }));
      root.append(svg("text", { x, y: bottom + 18, "text-anchor": "middle" }, rounded(tick, 3)));
    }
    root.append(svg("line", { x1: left, x2: right, y1: bottom, y2: bottom, class: "tick" }));
    root.append(svg("text", { x: (left + right) / 2, y: height - 5, "text-anchor": "middle" }, all.deepest ? all.axis : `relative depth of the ${all.axis}`));

    const bands = svg("g");
    const strokes = svg("g");
    root.append(bands, strokes);
    lines.forEach((line, number) => {
      const spot = (point) => ({ point, line, number, title: point.title, x: across(line.x[point.index]), y: down(point.y) });
      const pieces = [[]];
      for (const point of line.points) point.drawn ? pieces.at(-1).push(spot(point)) : pieces.push([]);
      for (const piece of pieces.filter((piece) => piece.length)) {
        const path = (spots, of) => spots.map((spot) => `${spot.x.toFixed(1)} ${of(spot).toFixed(1)}`).join("L");
        if (piece.some(({ point }) => point.spread)) {
          const low = ({ point }) => down(about.log ? Math.max(point.y - point.spread, point.y / 100) : point.y - point.spread);
          const around = `M${path(piece, ({ point }) => down(point.y + point.spread))}L${path([...piece].reverse(), low)}Z`;
          bands.append(svg("path", { d: around, class: `band c${line.place % 7}` }));
        }
        strokes.append(svg("path", { d: `M${path(piece, (spot) => spot.y)}`, class: `curve c${line.place % 7}` }));
        for (const spot of piece) {
          const mark = marker(line.place, 2.6);
          mark.setAttribute("transform", `translate(${spot.x.toFixed(1)} ${spot.y.toFixed(1)})`);
          strokes.append(mark);
        }
        drawing.spots.push(...piece);
      }
    });
    drawing.legend = lines.map((line) => {
      const mark = svg("g", { transform: "translate(13 6)" }, marker(line.place, 3));
      const stroke = svg("path", { d: "M1 6H25", class: `curve c${line.place % 7}` });
      return el("li", {}, svg("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" }, stroke, mark), line.label);
    });
    return drawing;
  },

  find: (spots, x, y) => least(spots, (spot) => (spot.x - x) ** 2 + ((spot.y - y) ** 2) / 4),

  moves(spots, at) {
    const mine = spots.filter((spot) => spot.number === at.number);
    const place = mine.indexOf(at);
    const other = (step) => {
      const numbers = [...new Set(spots.map((spot) => spot.number))];
      const next = numbers[(numbers.indexOf(at.number) + step + numbers.length) % numbers.length];
      return least(spots.filter((spot) => spot.number === next), (spot) => Math.abs(spot.x - at.x));
    };
    return {
      ArrowRight: () => mine[Math.min(place + 1, mine.length - 1)],
      ArrowLeft: () => mine[Math.max(place - 1, 0)],
      ArrowDown: () => other(1),
      ArrowUp: () => other(-1),
      Home: () => mine[0],
      End: () => mine.at(-1),
    };
  },

  describe({ about }, { point, line }) {
    const [value, spread] = measured(point.y, point.error === null ? null : point.spread);
    return [
      el("span", {}, line.label),
      el("span", { class: "value" }, `${value}${spread}${about.unit ? ` ${about.unit}` : ""}`),
      el("span", { class: "exact" }, `exactly ${point.value}`),
    ];
  },
};
