"use strict";
// Tables are sorted by what a cell holds exactly, filtered by words.
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
