// --- picture.js: one image with all that is known of it, and several side by side. ---

const MOST_COMPARED = 200;

class Picture {
  /** `rows()` gives the rows that are being looked at, in order. */
  constructor(rows, compare, closed) {
    Object.assign(this, { rows, compare, closed, box: byId("picture") });
    this.box.addEventListener("keydown", (event) => this._key(event));
    this.box.addEventListener("close", () => {
      if (this.box.open) return; // opened again, before this event came
      this.box.replaceChildren(); // a video stops
      this.closed(this.row);
    });
  }

  open(table, row) {
    this.table = table;
    this.row = row;
    this.box.replaceChildren(this._stage(), this._details());
    if (!this.box.open) this.box.showModal();
    history.replaceState(null, "", `#image=${table.indexOf(row)}`);
  }

  move(step) {
    const rows = this.rows(), at = rows.indexOf(this.row);
    const next = rows[at + step];
    if (at >= 0 && next !== undefined) {
      this.open(this.table, next);
      this.box.querySelector(step < 0 ? ".previous" : ".next").focus();
    }
  }

  _stage() {
    const { table, row } = this, rows = this.rows(), at = rows.indexOf(row);
    const holder = h("div", { class: "holder" });
    const line = h("div", { class: "line" },
      h("button", { type: "button", class: "previous", title: "Previous (←)", onclick: () => this.move(-1) }, "←"),
      h("span", { class: "soft" }, at < 0 ? "not in the selection"
        : `${(at + 1).toLocaleString("en")} of ${rows.length.toLocaleString("en")}`),
      h("button", { type: "button", class: "next", title: "Next (→)", onclick: () => this.move(1) }, "→"));
    if (table.status[row] === MADE) {
      const media = mediaElement(table, row);
      media.addEventListener("error", () => holder.replaceChildren(
        h("p", {}, table.unreadable(row) ?? "The file cannot be shown; is it still there?")));
      media.addEventListener(media.tagName === "IMG" ? "load" : "loadedmetadata", () => {
        const size = this.box.querySelector(".size");
        const width = media.naturalWidth ?? media.videoWidth;
        if (size && width) size.textContent = `${width} × ${media.naturalHeight ?? media.videoHeight}`;
      });
      holder.append(media);
      if (table.framesOf(row) > 1 && table.ending[row] === "png") line.append(this._playButton(media));
      line.append(h("a", { href: table.imageFile(row), target: "_blank" }, "open the file"));
    } else {
      holder.append(h("p", {}, `This image is ${STATUS_NAMES[table.status[row]]}.`));
    }
    line.append(h("button", { type: "button", title: "Close (Esc)", onclick: () => this.box.close() }, "✕"));
    return h("div", { class: "stage" }, holder, line);
  }

  /** An animated image plays by itself; paused it is its thumbnail, which is its first frame. */
  _playButton(image) {
    const { table, row } = this;
    const button = h("button", { type: "button", class: "play", "aria-pressed": "true" }, "❚❚ Pause");
    button.addEventListener("click", () => {
      const plays = button.getAttribute("aria-pressed") !== "true";
      button.setAttribute("aria-pressed", String(plays));
      button.textContent = plays ? "❚❚ Pause" : "▶ Play";
      image.src = plays ? table.imageFile(row) : table.thumbnailFile(row);
    });
    return button;
  }

  _details() {
    const { table, row } = this;
    const command = againCommand(table, row);
    const error = table.errorOf(row);
    const neighbours = table.batchOf(row).filter((other) => other !== row);
    const same = table.samePrompt(row);
    return h("div", { class: "details" },
      h("p", { class: "prompt" }, table.promptText(row)),
      h("p", { class: "line" },
        copyButton("Copy prompt", table.promptText(row)),
        copyButton("Copy parameters", JSON.stringify(asPrompt(table, row))),
        same.length > 1
          ? h("button", { type: "button", class: "side", title: "Side by side (c)",
            onclick: () => this.compare(table, row) }, `Side by side (${same.length})`)
          : null),
      error ? h("h2", {}, `${error.type}: ${error.message}`) : null,
      error && error.traceback ? h("pre", {}, error.traceback) : null,
      factTable(facts(table, row)),
      h("h2", {}, error ? "Try the failed ones again" : "Make it again"),
      h("pre", { class: "command" }, command),
      copyButton("Copy command", command),
      neighbours.length ? h("h2", {}, `Made in one batch with ${plural(neighbours.length, "other")}`) : null,
      neighbours.length ? this._strip(neighbours) : null,
      same.length > 1 ? h("h2", {}, `The same prompt, ${plural(same.length, "image")}`) : null,
      same.length > 1 ? this._strip(same.filter((other) => other !== row)) : null);
  }

  _strip(rows) {
    const { table } = this;
    return h("div", { class: "strip" }, ...rows.slice(0, 60).map((row) => h("button", {
      type: "button", "data-row": row, title: `${table.idOf(row)}, seed ${table.seed[row]}: ${table.promptText(row).slice(0, 300)}`,
      onclick: () => this.open(table, row),
    }, table.status[row] === MADE ? thumbnail(table, row) : STATUS_NAMES[table.status[row]])));
  }

  _key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") this.move(-1);
    else if (event.key === "ArrowRight") this.move(1);
    else if (event.key === "c") this.compare(this.table, this.row);
    else return;
    event.preventDefault();
  }
}

/** What shows an image, plays a video or a sound; of a zip of frames, the first. */
function mediaElement(table, row) {
  const src = table.imageFile(row);
  if (table.isSound(row)) return h("audio", { src, controls: true });
  if (table.isVideo(row)) return h("video", { src, controls: true, loop: true, preload: "auto" });
  return h("img", {
    src: table.ending[row] === "zip" ? table.thumbnailFile(row) : src,
    alt: table.promptText(row), loading: "lazy", decoding: "async",
  });
}

/** What the panel lists: name → value. */
function facts(table, row) {
  const run = table.runOf(row), end = table.end[row];
  const out = {
    id: table.idOf(row), index: table.indexOf(row), seed: table.seed[row],
    status: STATUS_NAMES[table.status[row]], size: h("span", { class: "size" }, "–"),
    ...table.parameters(row),
  };
  if (table.framesOf(row) > 1) out.frames = table.framesOf(row);
  if (table.flagsOf(row).length) out.flags = table.flagsOf(row).join(", ");
  if (!table.isExact(row)) out.exact = "no: not made in the batch that was planned for it";
  if (table.seconds[row] !== null) out["pipeline time"] = duration(table.seconds[row]);
  if (run !== null) out["made by"] = `rank ${run.rank}, attempt ${run.attempt + 1}`;
  if (end !== null) out.at = new Date((table.data.begin + end) * 1000).toLocaleString("sv");
  if (table.bytes[row]) out.file = `${table.imageFile(row)}, ${table.bytes[row].toLocaleString("en")} bytes`;
  if (table.hash[row]) out["SHA-256"] = `${table.hash[row]}… (all of it is in metadata.jsonl)`;
  return out;
}

const factTable = (values) => h("table", {}, ...Object.entries(values).map(([name, value]) =>
  h("tr", {}, h("th", { scope: "row" }, name), h("td", {}, value instanceof Node ? value : shown(value)))));

/** The row as a line of a jsonl prompt file. */
const asPrompt = (table, row) => ({
  ...(table.promptText(row) && { prompt: table.promptText(row) }), seed: table.seed[row],
  ...table.parameters(row),
});

/** The command that makes an image again; for one that failed, that tries again. */
function againCommand(table, row) {
  const folder = shellQuoted(table.data.output);
  if (table.status[row] === FAILED) return `ddinfer retry-failed ${folder}`;
  if (table.status[row] !== MADE) return "The job's own command makes it.";
  return `ddinfer replay ${folder}/${table.imageFile(row)}`;
}

/** Quoted for a POSIX shell, where it needs to be. */
const shellQuoted = (text) =>
  (/^[\w@%+=:,./-]+$/.test(text) ? text : `'${text.replaceAll("'", "'\\''")}'`);

/** All images of a prompt side by side; each says in what it differs from the others. */
class Comparison {
  constructor(open) {
    this.open = open;
    this.box = byId("compare");
    this.box.addEventListener("close", () => {
      if (!this.box.open) this.box.replaceChildren();
    });
  }

  show(table, row) {
    const rows = table.samePrompt(row);
    if (rows.length < 2) return;
    const names = new Set(rows.flatMap((k) => Object.keys(table.parameters(k))));
    const differing = [...names].filter((name) =>
      new Set(rows.map((k) => JSON.stringify(table.parameters(k)[name]))).size > 1);
    const figures = rows.slice(0, MOST_COMPARED).map((k) => h("figure", {},
      h("button", { type: "button", "data-row": k, onclick: () => { this.box.close(); this.open(table, k); } },
        table.status[k] === MADE
          ? mediaElement(table, k)
          : STATUS_NAMES[table.status[k]]),
      h("figcaption", {}, [`seed ${table.seed[k]}`, ...differing.map((name) =>
        `${name} ${shownOrNone(table.parameters(k)[name])}`)].join(" · "))));
    this.box.replaceChildren(
      h("div", { class: "line" }, h("p", {}, table.promptText(row).slice(0, 500)), h("span", { class: "spring" }),
        h("span", { class: "soft" }, rows.length > MOST_COMPARED
          ? `the first ${MOST_COMPARED} of ${rows.length.toLocaleString("en")} images` : plural(rows.length, "image")),
        h("button", { type: "button", title: "Close (Esc)", onclick: () => this.box.close() }, "✕")),
      h("div", { class: "sheet" }, ...figures));
    this.box.showModal();
  }
}
