// --- failures.js: what went wrong, equal errors together. ---

const MOST_NAMED = 200;

function showFailures(box, table, open) {
  const groups = new Map(); // type and message → rows
  for (const index of Object.keys(table.data.error_of)) {
    const row = Number(index) - table.first, error = table.errorOf(row);
    const key = JSON.stringify([error.type, error.message]);
    if (!groups.has(key)) groups.set(key, []);
    groups.get(key).push(row);
  }
  const parts = [...groups.values()].sort((a, b) => b.length - a.length)
    .map((rows) => failureGroup(table, rows, open));
  if (table.data.deaths) {
    parts.unshift(h("p", {}, `${plural(table.data.deaths, "time")} a process was killed during a batch.`));
  }
  if (table.data.error) parts.unshift(h("pre", {}, `The job ended with: ${table.data.error}`));
  box.replaceChildren(h("h2", {}, "Failures"),
    ...(parts.length ? parts : [h("p", { class: "soft" }, "No prompt failed.")]));
}

function failureGroup(table, rows, open) {
  const error = table.errorOf(rows[0]);
  return h("div", { class: "failure" },
    h("h3", {}, `${error.type}: ${error.message}`),
    h("p", { class: "soft" }, plural(rows.length, "prompt"),
      rows.length > MOST_NAMED ? `, the first ${MOST_NAMED} of them:` : ":"),
    h("ul", {}, ...rows.slice(0, MOST_NAMED).map((row) => h("li", {},
      h("button", { type: "button", "data-row": row, onclick: () => open(row) }, table.idOf(row)), " ",
      table.promptText(row).slice(0, 200)))),
    error.traceback
      ? h("details", {}, h("summary", {}, "Traceback"), h("pre", {}, error.traceback))
      : null);
}
