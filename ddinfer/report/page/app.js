// --- app.js: the page as a whole: header, tabs, filters, keys. ---

const TABS = { pictures: "Images", failures: "Failures", times: "Times", job: "Job" };
const KEYS = {
  "/": "search", "1 2 3 4": "images, failures, times, job", "← ↑ → ↓": "move in the gallery; previous and next image",
  "Page ↑ ↓, Home, End": "faster", "Enter": "open the image", "c": "side by side: all images of its prompt",
  "Esc": "close", "t": "light or dark", "?": "these keys",
};
const CLEAR = { text: "", filter: "all", rank: "", parameter: "", value: "", sort: "index" };

let table = null;
let rows = [];
const wanted = { ...CLEAR };
const gallery = new Gallery((row) => picture.open(table, row));
const comparison = new Comparison((other, row) => picture.open(other, row));
const picture = new Picture(
  () => rows,
  (other, row) => comparison.show(other, row),
  (row) => {
    history.replaceState(null, "", "#");
    gallery.focusRow(row);
  },
);

/** Show a job's data. */
function load(data) {
  table = new Table(data);
  showHeader();
  showFilters();
  search();
  showTab(currentTab());
}

function showHeader() {
  const { data } = table, made = table.count(MADE), failed = table.count(FAILED);
  const left = table.size - made - failed;
  const name = data.output.split("/").at(-1) || data.output;
  document.title = `${name} – ddinfer report`;
  byId("title").textContent = name;
  byId("title").title = data.output;
  byId("state").textContent = data.shard === null ? data.state : `${data.state}, part ${data.shard}`;
  byId("state").className = `badge ${data.state}`;
  byId("counts").textContent = [
    `${made.toLocaleString("en")} of ${plural(table.size, "image")}`,
    failed ? `${failed.toLocaleString("en")} failed` : "", left ? `${left.toLocaleString("en")} to do` : "",
  ].filter(Boolean).join(", ");
  byId("progress").max = table.size || 1;
  byId("progress").value = made + failed;
  const notices = [...data.notices];
  if (data.state === "running") notices.push(`The job was running when this page was written (${written(data)}).`);
  if (data.state === "stopped") notices.push("The job was stopped. The same command makes the rest.");
  if (data.state === "interrupted") {
    notices.push("The job was killed, or its machine went down, before it was complete. The same command makes the rest.");
  }
  if (table.size === 0) notices.push("This folder is to hold no images: its part of the job is empty.");
  byId("notices").replaceChildren(...notices.map((text) => h("li", {}, text)));
  byId("tabs").replaceChildren(...Object.entries(TABS).map(([key, label]) => h("button", {
    type: "button", role: "tab", id: `tab-${key}`, "aria-controls": key, onclick: () => showTab(key),
  }, key === "failures" && failed ? `${label} (${failed.toLocaleString("en")})` : label)));
}

const written = (data) => new Date(data.written * 1000).toLocaleString("sv");

// --- tabs ---

const currentTab = () => Object.keys(TABS).find((key) => !byId(key).hidden);

function showTab(key) {
  for (const other of Object.keys(TABS)) {
    byId(other).hidden = other !== key;
    byId(`tab-${other}`).setAttribute("aria-selected", String(other === key));
  }
  if (key === "pictures") gallery.layout();
  if (key === "failures") showFailures(byId(key), table, (row) => picture.open(table, row));
  if (key === "times") showTimes(byId(key), table);
  if (key === "job") showJob(byId(key));
}

function showJob(box) {
  const { data } = table;
  const filled = Object.fromEntries(Object.entries(data.identity).filter(([, value]) => value !== null));
  box.replaceChildren(
    h("h2", {}, "Job"), factTable({ folder: data.output, state: data.state, "page written": written(data), ...filled }),
    h("h2", {}, "Libraries"), factTable(data.versions),
    h("h2", {}, "Ranks"), h("div", { class: "wide" }, h("table", {},
      h("tr", {}, ...["attempt", "rank", "began", "ended"].map((name) => h("th", { scope: "col" }, name))),
      ...data.runs.map((run) => h("tr", {}, h("td", {}, String(run.attempt + 1)), h("td", {}, String(run.rank)),
        h("td", {}, run.begin === null ? "–" : new Date((data.begin + run.begin) * 1000).toLocaleString("sv")),
        h("td", {}, run.reason ?? (data.state === "running" ? "at work" : "died")))))));
}

// --- search and filters ---

function showFilters() {
  const form = byId("filters");
  const choice = (name, label, options) => h("select", {
    name, "aria-label": label, onchange: (event) => change({ [name]: event.target.value }),
  }, ...options.map(([value, text]) => h("option", { value, selected: wanted[name] === value }, text)));
  const field = h("input", {
    type: "search", name: "text", placeholder: "Search prompts, or seed=5, steps>20 …", value: wanted.text,
    "aria-label": "Search", oninput: (event) => change({ text: event.target.value }),
  });
  const chips = Object.keys(FILTERS).map((key) => h("button", {
    type: "button", "data-filter": key, "aria-pressed": String(wanted.filter === key),
    onclick: () => change({ filter: key }),
  }, key));
  const parts = [field, ...chips];
  if (table.ranks.length > 1) {
    parts.push(choice("rank", "Rank", [["", "every rank"], ...table.ranks.map((rank) => [String(rank), `rank ${rank}`])]));
  }
  if (table.parameterNames.length) {
    parts.push(choice("parameter", "Parameter", [["", "any parameter"], ...table.parameterNames.map((name) => [name, name])]));
  }
  if (wanted.parameter !== "") {
    const values = [...new Set(table.parameterSets.map((set) => shownOrNone(set[wanted.parameter])))].slice(0, 1000);
    values.sort((a, b) => a.localeCompare(b, "en", { numeric: true }));
    parts.push(choice("value", "Value", [["", "any value"], ...values.map((value) => [value, value.slice(0, 80)])]));
  }
  parts.push(choice("sort", "Order", Object.entries(SORTS)), h("span", { id: "found", class: "soft", role: "status" }));
  const hadFocus = form.contains(document.activeElement) ? document.activeElement.name : "";
  form.replaceChildren(...parts);
  if (hadFocus) form.elements[hadFocus]?.focus();
}

function change(what) {
  Object.assign(wanted, what);
  if ("parameter" in what) {
    wanted.value = "";
    showFilters();
  }
  for (const chip of document.querySelectorAll("#filters [data-filter]")) {
    chip.setAttribute("aria-pressed", String(chip.dataset.filter === wanted.filter));
  }
  gallery.focused = 0;
  byId("gallery").scrollTop = 0;
  search();
}

function search() {
  rows = select(table, wanted);
  byId("found").textContent = rows.length === table.size
    ? plural(rows.length, "image") : `${rows.length.toLocaleString("en")} of ${plural(table.size, "image")}`;
  gallery.show(table, rows);
}

// --- keys and theme ---

function toggleTheme() {
  const root = document.documentElement;
  const isDark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  root.dataset.theme = isDark ? "light" : "dark";
  if (!byId("times").hidden) showTimes(byId("times"), table);
}

function showKeys() {
  byId("keys").replaceChildren(
    h("h2", {}, "Keys"),
    h("table", {}, ...Object.entries(KEYS).map(([key, text]) => h("tr", {}, h("td", {}, h("kbd", {}, key)), h("td", {}, text)))),
    h("h2", {}, "Search"),
    h("p", {}, "Words are searched in prompts, negative prompts and ids; all must be there. ",
      h("code", {}, "\"two words\""), " is one, ", h("code", {}, "-word"), " must not be there. ",
      h("code", {}, "seed=5"), ", ", h("code", {}, "steps>20"), ", ", h("code", {}, "rank:1"), ", ",
      h("code", {}, "width!=512"), ": any field or parameter, with = != < > <= >= or : for “contains”."),
    h("button", { type: "button", onclick: () => byId("keys").close() }, "Close"));
  byId("keys").showModal();
}

document.addEventListener("keydown", (event) => {
  const isTyping = event.target.matches?.("input, select, textarea");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (isTyping) {
    if (event.key === "Enter" && event.target.type === "search" && rows.length) {
      event.preventDefault();
      gallery.focus(0);
    }
    return;
  }
  if (document.querySelector("dialog[open]")) return;
  const tab = Object.keys(TABS)[Number(event.key) - 1];
  if (event.key === "/") {
    showTab("pictures");
    byId("filters").elements.text.focus();
  } else if (event.key === "?") showKeys();
  else if (event.key === "t") toggleTheme();
  else if (event.key === "c" && event.target.matches?.(".cell")) comparison.show(table, Number(event.target.dataset.row));
  else if (tab) showTab(tab);
  else return;
  event.preventDefault();
});
byId("filters").addEventListener("submit", (event) => event.preventDefault());
byId("theme").addEventListener("click", toggleTheme);
byId("help").addEventListener("click", showKeys);

load(JSON.parse(byId("data").textContent));
const asked = /^#image=(\d+)$/.exec(location.hash);
if (asked && table.status[asked[1] - table.first] !== undefined) picture.open(table, asked[1] - table.first);
