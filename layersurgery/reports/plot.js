"use strict";
// A plot: choices of view and metric, spots to point at or to step through with the keyboard, and a box with values.
// What is drawn is said by a kind (curves, maps):
//   keys(view): what the arrow keys do
//   draw(plot): returns the drawing's root, its spots, a ring to put around one of them, legend entries and a note
//   find(spots, x, y): the spot for a pointer; moves(spots, at): the spot that each key leads to
//   describe(plot, spot): what the box shows
// A spot has x, y, a title, and `plan` if its title is a plan to copy.

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
const least = (spots, cost) => spots.reduce((best, spot) => (best === null || cost(spot) < cost(best) ? spot : best), null);

const plot = (holder, kinds) => {
  const all = JSON.parse(document.getElementById(holder.dataset.of).textContent);
  const kind = kinds[all.kind];
  const now = { view: all.views[0], metric: all.views[0].metrics[0], at: null };
  const controls = el("div", { class: "controls" });
  const caption = el("p", { class: "axis" });
  const tip = el("div", { class: "tip", role: "status", hidden: true });
  const frame = el("div", { class: "frame" });
  const area = el("div", { class: "plot", tabindex: 0, role: "application" }, frame, tip);
  const legend = el("ul", { class: "legend" });
  const note = el("p", { class: "note" });
  holder.append(controls, caption, area, legend, note);
  let drawing = { spots: [] };

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

  const state = () => ({ all, view: now.view, metric: now.metric, about: all.metrics[now.metric], id: holder.id });

  const draw = () => {
    const width = Math.max(240, Math.round(frame.clientWidth || 720));
    drawing = kind.draw({ ...state(), width });
    const { about } = state();
    const words = [about.unit, drawing.scale].filter(Boolean).join(", ");
    const title = `${about.label[0].toUpperCase()}${about.label.slice(1)}${words ? ` (${words})` : ""}`;
    caption.replaceChildren(el("b", {}, title), all.views.length > 1 ? ` \u00b7 ${now.view.label}` : "");
    area.setAttribute("aria-label", `Chart: ${title}, ${now.view.label}. Arrow keys: ${kind.keys(now.view)}; Escape closes.`);
    drawing.ring.setAttribute("class", "ring");
    drawing.root.append(drawing.ring);
    frame.replaceChildren(drawing.root);
    legend.replaceChildren(...drawing.legend);
    note.textContent = drawing.note;
    hide();
  };

  const show = (spot) => {
    now.at = spot;
    tip.replaceChildren(el("b", {}, spot.title), ...kind.describe(state(), spot));
    tip.hidden = false;
    drawing.ring.setAttribute("transform", `translate(${spot.x} ${spot.y})`);
    drawing.ring.setAttribute("visibility", "visible");
    const drawn = drawing.root.viewBox.baseVal;
    const zoom = frame.clientWidth / drawn.width;
    const [x, y, width, height] = [zoom * spot.x, zoom * spot.y, tip.offsetWidth, tip.offsetHeight];
    const [across, down] = [spot.halfWidth, spot.halfHeight].map((half) => 12 + zoom * (half || 0));
    const side = spot.x > drawn.width / 2 ? x - across - width : x + across;
    const inside = within(side, 0, frame.clientWidth - width);
    tip.style.left = `${inside}px`;
    // Where neither side has room, the box is above or below the spot.
    const under = y + down + height <= frame.clientHeight || y < height + down ? y + down : y - down - height;
    tip.style.top = `${inside === side ? within(y - height / 2, 0, Math.max(0, frame.clientHeight - height)) : under}px`;
  };
  const hide = () => {
    tip.hidden = true;
    now.at = null;
    drawing.ring.setAttribute("visibility", "hidden");
  };
  const take = async (spot) => {
    if (!spot || !spot.plan) return;
    const done = await copy(tip.firstChild);
    if (now.at === spot) tip.append(el("span", { class: "done" }, done === "Copied" ? "Copied" : "Selected; copy it with the keys of your system"));
  };

  const point = (event) => {
    const box = frame.getBoundingClientRect();
    const zoom = drawing.root.viewBox.baseVal.width / box.width;
    const spot = kind.find(drawing.spots, (event.clientX - box.left) * zoom, (event.clientY - box.top) * zoom);
    if (!spot) hide();
    else if (spot !== now.at) show(spot);
  };
  frame.addEventListener("pointermove", point);
  frame.addEventListener("pointerdown", point);
  frame.addEventListener("click", () => take(now.at));
  frame.addEventListener("pointerleave", () => document.activeElement !== area && hide());
  const first = () => drawing.spots.find((spot) => spot.best) || drawing.spots[0];
  area.addEventListener("focus", () => first() && !now.at && area.matches(":focus-visible") && show(first()));
  area.addEventListener("blur", hide);
  area.addEventListener("keydown", (event) => {
    const at = now.at || first();
    if (!at) return;
    const next = kind.moves(drawing.spots, at)[event.key];
    if (event.key === "Escape") hide();
    else if (event.key === "Enter" && at.plan) {
      if (!now.at) show(at);
      take(at);
    } else if (next) show(next());
    else return;
    event.preventDefault();
  });
  let drawn = 0;
  new ResizeObserver(() => {
    if (frame.clientWidth && frame.clientWidth !== drawn && !matchMedia("print").matches) {
      drawn = frame.clientWidth;
      draw();
    }
  }).observe(area);
  renew();
};
