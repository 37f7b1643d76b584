"use strict";
// What all parts of the page use, and how they are started; the other files are put after this one.

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

// Copy a node's text; where the browser forbids it, select the text.
const copy = async (node) => {
  try {
    await navigator.clipboard.writeText(node.textContent);
    return "Copied";
  } catch {
    getSelection().selectAllChildren(node);
    return "Selected";
  }
};
const copyable = (code) => {
  const button = el("button", { type: "button", class: "copy" }, "Copy");
  button.addEventListener("click", async () => {
    button.textContent = await copy(code);
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

addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("[data-of]").forEach((holder) => plot(holder, { curves, maps }));
  document.querySelectorAll("table").forEach(sortable);
  document.querySelectorAll("pre.command > code").forEach(copyable);
  matchMedia("print").addEventListener("change", (event) => unfold(event.matches));
  addEventListener("beforeprint", () => unfold(true));
  addEventListener("afterprint", () => unfold(false));
});
