"use strict";
(() => {
  // Text from results gets into the page as text only: textContent and attributes, never markup.
  const fill = (node, attributes, children) => {
    for (const [key, value] of Object.entries(attributes)) if (value !== null && value !== false) node.setAttribute(key, value === true ? "" : value);
    node.append(...children.filter((child) => child !== null));
    return node;
  };
  const el = (name, attributes = {}, ...children) => fill(document.createElement(name), attributes, children);
  const svg = (name, attributes = {}, ...children) =>
    fill(document.createElementNS("http://www.w3.org/2000/svg", name), attributes, children);
  const minus = (text) => text.replace("-", "\u2212");
  const rounded = (value, digits = 4) => {
    const whole = Math.abs(value) < 1e9 ? String(Math.trunc(Math.abs(value))).length : 0;
    return minus(String(Number(value.toPrecision(Math.max(digits, whole)))));
  };
  // As many digits as the error leaves a value.
  const measured = (value, error) => {
    const places = error > 0 ? 1 - Math.floor(Math.log10(error)) : 99;
    if (places < 0 || places > 7) return [rounded(value), error === null ? "" : ` \u00b1 ${rounded(error, 2)}`];
    return [minus(value.toFixed(places)), ` \u00b1 ${error.toFixed(places)}`];
  };
  const within = (value, low, high) => Math.min(high, Math.max(low, value));

  // Charts: values over depth, with toggles, hover and arrow keys.

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

  const linearTicks = (low, high, count) => {
    const raw = (high - low) / count;
    const power = 10 ** Math.floor(Math.log10(raw));
    const step = [1, 2, 5, 10].find((times) => times * power >= raw) * power;
    const ticks = [];
    for (let number = Math.ceil(low / step - 1e-9); number * step <= high + step * 1e-9; number++) ticks.push(number * step);
    return ticks;
  };
  const logTicks = (low, high) => {
    const steps = high / low > 1e5 ? [1] : high / low > 1e3 ? [1, 3] : [1, 2, 5];
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
      for (const step of steps) if (step * 10 ** power >= low * 0.999 && step * 10 ** power <= high * 1.001) ticks.push(step * 10 ** power);
    return ticks;
  };

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

  const chart = (holder) => {
    const all = JSON.parse(document.getElementById(holder.dataset.of).textContent);
    const now = { view: all.views[0], metric: all.views[0].metrics[0], at: null };
    const controls = el("div", { class: "controls" });
    const caption = el("p", { class: "axis" });
    const tip = el("div", { class: "tip", role: "status", hidden: true });
    const frame = el("div", { class: "frame" });
    const plot = el("div", { class: "plot", tabindex: 0, role: "application" }, frame, tip);
    const legend = el("ul", { class: "legend" });
    const note = el("p", { class: "note" });
    holder.append(controls, caption, plot, legend, note);

    let lines = [];
    let places = [];

    const choices = (title, key, options, chosen, choose) => {
      if (options.length < 2) return null;
      const name = `${holder.id}-${key}`;
      return el("fieldset", {}, el("legend", {}, title), ...options.map(([value, label], number) => {
        const input = el("input", { type: "radio", name, value: number, id: `${name}-${number}`, checked: value === chosen });
        input.addEventListener("change", () => choose(value));
        return el("span", { class: "choice" }, input, el("label", { for: input.id }, label));
      }));
    };

    const renew = (focused) => {
      const metrics = now.view.metrics.map((name) => [name, all.metrics[name].label]);
      const views = all.views.map((view) => [view, view.label]);
      controls.replaceChildren(...[
        choices(all.choice, "view", views, now.view, (view) => {
          if (!view.metrics.includes(now.metric)) now.metric = view.metrics[0];
          Object.assign(now, { view, at: null });
          renew("view");
        }),
        choices("Metric", "metric", metrics, now.metric, (metric) => {
          Object.assign(now, { metric, at: null });
          renew("metric");
        }),
      ].filter((child) => child));
      if (focused) controls.querySelector(`input[name="${holder.id}-${focused}"]:checked`).focus();
      draw();
    };

    const draw = () => {
      const about = all.metrics[now.metric];
      lines = linesOf(now.view, now.metric, about);
      const vertical = scale(lines, about);
      const words = [about.unit, about.log ? "log scale" : ""].filter(Boolean).join(", ");
      const title = `${about.label[0].toUpperCase()}${about.label.slice(1)}${words ? ` (${words})` : ""}`;
      caption.replaceChildren(el("b", {}, title), all.views.length > 1 ? ` \u00b7 ${now.view.label}` : "");
      const keys = "Arrow keys: left and right along the layers, up and down from curve to curve; Escape closes.";
      plot.setAttribute("aria-label", `Chart: ${title}, ${now.view.label}. ${keys}`);
      const absent = lines.flatMap((line) => line.points.filter((point) => point.value !== null && !point.drawn)).length;
      note.textContent = absent ? `${absent} value${absent > 1 ? "s" : ""} of zero or less ha${absent > 1 ? "ve" : "s"} no place on a logarithmic scale.` : "";

      const width = Math.max(240, Math.round(frame.clientWidth || 720));
      const height = within(Math.round(width * 0.42), 250, 400);
      const [left, right, top, bottom] = [54, width - 12, 10, height - 42];
      const across = (depth) => left + (right - left) * (0.015 + 0.97 * depth);
      const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true", focusable: "false" });
      places = [];
      frame.replaceChildren(root);
      hide();
      if (!vertical) {
        root.append(svg("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "no values to draw"));
        return;
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
      const curves = svg("g");
      root.append(bands, curves);
      lines.forEach((line, number) => {
        const spot = (point) => ({ point, line, number, x: across(line.x[point.index]), y: down(point.y) });
        const pieces = [[]];
        for (const point of line.points) point.drawn ? pieces.at(-1).push(spot(point)) : pieces.push([]);
        for (const piece of pieces.filter((piece) => piece.length)) {
          const path = (spots, of) => spots.map((spot) => `${spot.x.toFixed(1)} ${of(spot).toFixed(1)}`).join("L");
          if (piece.some(({ point }) => point.spread)) {
            const low = ({ point }) => down(about.log ? Math.max(point.y - point.spread, point.y / 100) : point.y - point.spread);
            const around = `M${path(piece, ({ point }) => down(point.y + point.spread))}L${path([...piece].reverse(), low)}Z`;
            bands.append(svg("path", { d: around, class: `band c${line.place % 7}` }));
          }
          curves.append(svg("path", { d: `M${path(piece, (spot) => spot.y)}`, class: `curve c${line.place % 7}` }));
          for (const spot of piece) {
            const mark = marker(line.place, 2.6);
            mark.setAttribute("transform", `translate(${spot.x.toFixed(1)} ${spot.y.toFixed(1)})`);
            curves.append(mark);
          }
          places.push(...piece);
        }
      });
      root.append(svg("circle", { class: "ring", r: 7, visibility: "hidden" }));
      legend.replaceChildren(...lines.map((line) => {
        const mark = svg("g", { transform: "translate(13 6)" }, marker(line.place, 3));
        const stroke = svg("path", { d: "M1 6H25", class: `curve c${line.place % 7}` });
        return el("li", {}, svg("svg", { viewBox: "0 0 26 12", "aria-hidden": "true" }, stroke, mark), line.label);
      }));
    };

    const show = (spot) => {
      const about = all.metrics[now.metric];
      const { point, line } = spot;
      now.at = spot;
      const unit = about.unit ? ` ${about.unit}` : "";
      const [value, spread] = measured(point.y, point.error === null ? null : point.spread);
      tip.replaceChildren(
        el("b", {}, point.title),
        el("span", {}, line.label),
        el("span", { class: "value" }, `${value}${spread}${unit}`),
        el("span", { class: "exact" }, `exactly ${point.value}`),
      );
      tip.hidden = false;
      const ring = frame.querySelector(".ring");
      ring.setAttribute("cx", spot.x);
      ring.setAttribute("cy", spot.y);
      ring.setAttribute("visibility", "visible");
      const drawn = frame.firstChild.viewBox.baseVal;
      const zoom = frame.clientWidth / drawn.width;
      const over = spot.x > drawn.width / 2;
      tip.style.left = `${within(zoom * spot.x + (over ? -12 - tip.offsetWidth : 12), 0, frame.clientWidth - tip.offsetWidth)}px`;
      tip.style.top = `${within(zoom * spot.y - tip.offsetHeight / 2, 0, frame.clientHeight - tip.offsetHeight)}px`;
    };
    const hide = () => {
      tip.hidden = true;
      now.at = null;
      const ring = frame.querySelector(".ring");
      if (ring) ring.setAttribute("visibility", "hidden");
    };

    const least = (spots, cost) => spots.reduce((best, spot) => (best === null || cost(spot) < cost(best) ? spot : best), null);
    const point = (event) => {
      const box = frame.getBoundingClientRect();
      const zoom = frame.firstChild.viewBox.baseVal.width / box.width;
      const [x, y] = [(event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom];
      const near = least(places, (spot) => (spot.x - x) ** 2 + ((spot.y - y) ** 2) / 4);
      if (near) show(near);
    };
    frame.addEventListener("pointermove", point);
    frame.addEventListener("pointerdown", point);
    frame.addEventListener("pointerleave", () => document.activeElement !== plot && hide());
    plot.addEventListener("focus", () => places.length && !now.at && plot.matches(":focus-visible") && show(places[0]));
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const at = now.at || places[0];
      if (!at) return;
      const mine = places.filter((spot) => spot.number === at.number);
      const place = mine.indexOf(at);
      const other = (step) => {
        const numbers = [...new Set(places.map((spot) => spot.number))];
        const next = numbers[(numbers.indexOf(at.number) + step + numbers.length) % numbers.length];
        return least(places.filter((spot) => spot.number === next), (spot) => Math.abs(spot.x - at.x));
      };
      const next = {
        ArrowRight: () => mine[Math.min(place + 1, mine.length - 1)],
        ArrowLeft: () => mine[Math.max(place - 1, 0)],
        ArrowDown: () => other(1),
        ArrowUp: () => other(-1),
        Home: () => mine[0],
        End: () => mine.at(-1),
      }[event.key];
      if (event.key === "Escape") hide();
      else if (next) show(next());
      else return;
      event.preventDefault();
    });
    let drawn = 0;
    new ResizeObserver(() => {
      if (frame.clientWidth && frame.clientWidth !== drawn && !matchMedia("print").matches) {
        drawn = frame.clientWidth;
        draw();
      }
    }).observe(plot);
    renew();
  };

  // Tables: sorted by what a cell holds exactly, filtered by words.

  const sortable = (table) => {
    const body = table.tBodies[0];
    const rows = [...body.rows];
    const value = (row, column) => {
      const cell = row.cells[column];
      return "v" in cell.dataset ? Number(cell.dataset.v.replace("inf", "Infinity")) : NaN;
    };
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = el("button", { type: "button" });
      button.append(...head.childNodes);
      head.append(button);
      const numeric = "n" in head.dataset;
      button.addEventListener("click", () => {
        const order = { none: "ascending", ascending: "descending", descending: "none" }[head.getAttribute("aria-sort") || "none"];
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        if (order !== "none") head.setAttribute("aria-sort", order);
        const sign = order === "descending" ? -1 : 1;
        const compare = (one, other) => {
          if (!numeric) return sign * one.cells[column].textContent.localeCompare(other.cells[column].textContent, "en", { numeric: true });
          const [first, second] = [value(one, column), value(other, column)];
          if (Number.isNaN(first) || Number.isNaN(second)) return Number.isNaN(first) - Number.isNaN(second);
          return first === second ? 0 : sign * (first < second ? -1 : 1);
        };
        body.append(...(order === "none" ? rows : [...rows].sort(compare)));
      });
    });
    table.addEventListener("pointerover", (event) => {
      const cell = event.target.closest("td[data-v]");
      if (cell) cell.title = cell.dataset.v;
    });
    if (rows.length < 10) return;
    const texts = rows.map((row) => [...row.cells].map((cell) => cell.textContent).join("\n").toLowerCase());
    const count = el("output", {}, `${rows.length} rows`);
    const input = el("input", { type: "search", autocomplete: "off", spellcheck: "false", "aria-controls": table.id });
    input.addEventListener("input", () => {
      // "drop 2" is a name, not every drop with a 2 in a number; "gpt2 drop" stands in no cell, but both words do in rows.
      const phrase = input.value.toLowerCase().trim().replace(/\s+/g, " ");
      const words = texts.some((text) => text.includes(phrase)) ? [phrase] : phrase.split(" ");
      let shown = 0;
      rows.forEach((row, place) => {
        row.hidden = !words.every((word) => texts[place].includes(word));
        shown += !row.hidden;
      });
      count.textContent = shown === rows.length ? `${rows.length} rows` : `${shown} of ${rows.length} rows`;
    });
    table.parentElement.before(el("div", { class: "controls filter" }, el("label", {}, "Filter ", input), count));
  };

  const copyable = (code) => {
    const button = el("button", { type: "button", class: "copy" }, "Copy");
    button.addEventListener("click", async () => {
      const range = document.createRange();
      range.selectNodeContents(code);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      try {
        await navigator.clipboard.writeText(code.textContent);
        button.textContent = "Copied";
      } catch {
        button.textContent = "Selected";
      }
    });
    code.parentElement.before(button);
  };

  // What is folded up is printed all the same.
  const unfold = (on) => {
    for (const fold of document.querySelectorAll("details")) {
      if (on && !fold.open) fold.dataset.folded = "";
      fold.open = on || (fold.open && !("folded" in fold.dataset));
      if (!on) delete fold.dataset.folded;
    }
  };

  document.querySelectorAll("[data-of]").forEach(chart);
  document.querySelectorAll("table").forEach(sortable);
  document.querySelectorAll("pre.command > code").forEach(copyable);
  matchMedia("print").addEventListener("change", (event) => unfold(event.matches));
  addEventListener("beforeprint", () => unfold(true));
  addEventListener("afterprint", () => unfold(false));
})();
