"use strict";
// The table of the page: filtered, sorted, one part of its rows shown at a time. Texts are set as text, never as markup.
(() => {
  const { columns, part } = JSON.parse(document.getElementById("data").textContent);
  const table = document.getElementById("table");
  const form = document.getElementById("filters");
  const pages = document.getElementById("pages");
  const told = document.getElementById("told");
  const count = columns[0].values.length;
  const all = Uint32Array.from({ length: count }, (_, row) => row);
  const chosen = new Map();
  let sorted = all;
  let found = all;
  let first = 0;
  let texts = null;

  const value = (column, row) => (column.words ? column.words[column.values[row]] : column.values[row]);

  const size = (bytes) => {
    let left = bytes;
    for (const unit of ["B", "kB", "MB", "GB"]) {
      if (left < 999.5) return unit === "B" ? `${left} B` : `${left.toFixed(1)} ${unit}`;
      left /= 1000;
    }
    return `${left.toFixed(1)} TB`;
  };

  const shown = (column, row) => {
    const it = value(column, row);
    if (it === null || it === "") return "\u2013";
    return column.kind === "size" ? size(it) : column.kind === "number" ? it.toLocaleString("en-US") : it;
  };

  const element = (name, text) => {
    const made = document.createElement(name);
    made.textContent = text;
    return made;
  };

  const show = () => {
    const body = document.createElement("tbody");
    for (const row of found.subarray(first, first + part)) {
      const line = body.insertRow();
      for (const column of columns) {
        const cell = line.insertCell();
        cell.textContent = shown(column, row);
        if (column.kind !== "text") cell.className = "number";
      }
    }
    table.tBodies[0].replaceWith(body);
    const last = Math.min(first + part, found.length);
    const range = found.length ? `${(first + 1).toLocaleString("en-US")} to ${last.toLocaleString("en-US")} of ` : "";
    told.textContent = `${range}${found.length.toLocaleString("en-US")} adapters`;
    document.getElementById("back").disabled = first === 0;
    document.getElementById("on").disabled = last === found.length;
  };

  const filter = () => {
    const words = document.getElementById("words").value.toLowerCase().split(/\s+/).filter(Boolean);
    if (words.length && texts === null) {
      const searched = columns.filter((column) => column.kind === "text");
      texts = Array.from(all, (row) => searched.map((column) => value(column, row)).join("\n").toLowerCase());
    }
    const wanted = [...chosen].filter(([, word]) => word !== null);
    found = sorted.filter(
      (row) => wanted.every(([column, word]) => column.values[row] === word) && words.every((word) => texts[row].includes(word)),
    );
    first = 0;
    show();
  };

  // What is not known comes last, in both directions; equal values keep the order of the data.
  const sort = (column, sign) => {
    const order = column.words ? column.words.map((_, word) => word) : null;
    if (order) {
      const byWord = [...order].sort((a, b) => (column.words[a] < column.words[b] ? -1 : 1));
      byWord.forEach((word, place) => { order[word] = column.words[word] === "" ? null : place; });
    }
    const keys = order ? column.values.map((word) => order[word]) : column.values;
    sorted = all.slice().sort((a, b) => {
      const [one, other] = [keys[a], keys[b]];
      if (one === other) return a - b;
      if (one === null || other === null) return one === null ? 1 : -1;
      return one < other ? -sign : sign;
    });
    filter();
  };

  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, place) => {
    const button = element("button", head.textContent);
    button.type = "button";
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const before = head.getAttribute("aria-sort");
      const down = before ? before === "ascending" : columns[place].kind !== "text";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      sort(columns[place], down ? -1 : 1);
    });
  });

  for (const column of columns.filter((one) => one.choice)) {
    const counts = new Array(column.words.length).fill(0);
    for (const word of column.values) counts[word] += 1;
    const select = document.createElement("select");
    select.append(new Option("all", ""));
    // The commonest ones; the search finds the others.
    const common = counts.map((_, word) => word).sort((a, b) => counts[b] - counts[a]).slice(0, 100);
    for (const word of common) {
      select.append(new Option(`${column.words[word] || "\u2013"} (${counts[word].toLocaleString("en-US")})`, word));
    }
    select.addEventListener("change", () => {
      chosen.set(column, select.value === "" ? null : Number(select.value));
      filter();
    });
    const label = element("label", column.title);
    label.append(select);
    form.append(label);
  }

  let waiting = 0;
  document.getElementById("words").addEventListener("input", () => {
    clearTimeout(waiting);
    waiting = setTimeout(filter, 100);
  });
  form.addEventListener("submit", (event) => event.preventDefault());
  for (const [name, step] of [["back", -part], ["on", part]]) {
    document.getElementById(name).addEventListener("click", () => {
      first += step;
      show();
    });
  }
  form.hidden = pages.hidden = false;
  show();
})();
