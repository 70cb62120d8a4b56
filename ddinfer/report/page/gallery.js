// --- gallery.js: a grid of which only what is seen is in the page, for any number of images. ---

const GAP = 10, CAPTION = 42;
/** Browsers limit an element's height; beyond this the scroll bar covers more than its pixels. */
const MAX_HEIGHT = 8_000_000;

class Gallery {
  /** `open(row)` is called for the image that is chosen. */
  constructor(open) {
    this.open = open;
    this.box = byId("gallery");
    this.space = byId("space");
    this.rows = [];
    this.cells = new Map(); // position in `rows` → element
    this.focused = 0;
    this.box.addEventListener("scroll", () => this.draw(), { passive: true });
    this.space.addEventListener("keydown", (event) => this._key(event));
    new ResizeObserver(() => this.layout()).observe(this.box);
  }

  show(table, rows) {
    const isSame = this.table === table && this.rows.length === rows.length;
    this.table = table;
    this.rows = rows;
    for (const cell of this.cells.values()) cell.remove();
    this.cells.clear();
    this.focused = Math.min(this.focused, Math.max(0, rows.length - 1));
    if (!isSame) this.box.scrollTop = Math.min(this.box.scrollTop, this.space.offsetHeight);
    byId("nothing").hidden = rows.length > 0;
    this.box.hidden = rows.length === 0;
    this.layout();
  }

  /** Recompute columns and heights; the image at the top stays there. */
  layout() {
    const width = this.box.clientWidth - 2 * GAP;
    if (!this.table || width <= 0) return;
    const top = this.columns ? this._firstLine() * this.columns : 0;
    const least = parseFloat(getComputedStyle(document.documentElement).getPropertyValue("--cell"));
    const columns = Math.max(1, Math.floor((width + GAP) / (least + GAP)));
    const hasChanged = columns !== this.columns;
    this.columns = columns;
    this.cellWidth = (width - (columns - 1) * GAP) / columns;
    this.cellHeight = Math.round(this.cellWidth + CAPTION);
    this.lines = Math.ceil(this.rows.length / columns);
    const height = this.lines * (this.cellHeight + GAP) + GAP;
    this.realHeight = height;
    this.space.style.height = `${Math.min(height, MAX_HEIGHT)}px`;
    if (hasChanged && top > 0) this._scrollToLine(Math.floor(top / columns));
    this.draw();
  }

  /** Pixels of the whole grid above the view; more than scrollTop where the grid is too high. */
  _offset() {
    const seen = this.box.clientHeight, height = Math.min(this.realHeight, MAX_HEIGHT);
    if (this.realHeight <= MAX_HEIGHT) return this.box.scrollTop;
    return (this.box.scrollTop / Math.max(1, height - seen)) * (this.realHeight - seen);
  }

  _firstLine() { return Math.floor(this._offset() / (this.cellHeight + GAP)); }

  _scrollToLine(line) {
    const seen = this.box.clientHeight, height = Math.min(this.realHeight, MAX_HEIGHT);
    const wanted = line * (this.cellHeight + GAP);
    this.box.scrollTop = this.realHeight <= MAX_HEIGHT
      ? wanted : (wanted / (this.realHeight - seen)) * (height - seen);
  }

  draw() {
    if (!this.columns) return;
    const offset = this._offset(), shift = this.box.scrollTop - offset;
    const each = this.cellHeight + GAP;
    const firstLine = Math.max(0, Math.floor(offset / each) - 1);
    const lastLine = Math.ceil((offset + this.box.clientHeight) / each) + 1;
    const first = firstLine * this.columns;
    const last = Math.min(this.rows.length, lastLine * this.columns);
    for (const [position, cell] of this.cells) {
      if ((position < first || position >= last) && cell !== document.activeElement) {
        cell.remove();
        this.cells.delete(position);
      }
    }
    for (let position = first; position < last; position += 1) {
      if (!this.cells.has(position)) {
        const cell = this._cell(position);
        this.cells.set(position, cell);
        this.space.append(cell);
      }
    }
    for (const [position, cell] of this.cells) {
      const line = Math.floor(position / this.columns), column = position % this.columns;
      cell.style.width = `${this.cellWidth}px`;
      cell.style.height = `${this.cellHeight}px`;
      cell.style.transform =
        `translate(${GAP + column * (this.cellWidth + GAP)}px, ${GAP + line * each + shift}px)`;
      cell.tabIndex = position === this.focused ? 0 : -1;
    }
  }

  _cell(position) {
    const row = this.rows[position], table = this.table;
    const frame = h("div", { class: "frame" });
    if (table.status[row] === MADE) {
      frame.append(h("span", { class: "why" }, table.unreadable(row) ?? ""), thumbnail(table, row));
    } else {
      const error = table.errorOf(row);
      frame.append(h("span", { class: "why" },
        error ? `${error.type}: ${error.message}`.slice(0, 300) : STATUS_NAMES[table.status[row]]));
    }
    frame.append(h("div", { class: "marks" }, ...marks(table, row)));
    return h("button", {
      class: `cell ${STATUS_NAMES[table.status[row]]}`, type: "button", "data-row": row,
      title: table.promptText(row).slice(0, 1000),
      onclick: () => { this.focused = position; this.open(row); },
      onfocus: () => { this.focused = position; },
    },
    frame,
    h("div", { class: "caption" },
      h("span", {}, table.promptText(row).slice(0, 300)),
      h("span", { class: "soft" }, `${table.idOf(row)} · seed ${table.seed[row]}`)));
  }

  _key(event) {
    const page = this.columns * Math.max(1, Math.floor(this.box.clientHeight / this.cellHeight));
    const step = {
      ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns,
      PageUp: -page, PageDown: page, Home: -Infinity, End: Infinity,
    }[event.key];
    if (step === undefined || event.altKey || event.ctrlKey || event.metaKey) return;
    event.preventDefault();
    this.focus(Math.max(0, Math.min(this.rows.length - 1, this.focused + step)));
  }

  /** Scroll to a position and put the focus there. */
  focus(position) {
    this.focused = position;
    const line = Math.floor(position / this.columns), each = this.cellHeight + GAP;
    const offset = this._offset();
    if (line * each < offset) this._scrollToLine(line);
    else if ((line + 1) * each + GAP > offset + this.box.clientHeight) {
      const lines = Math.max(1, Math.floor((this.box.clientHeight - GAP) / each));
      this._scrollToLine(line - lines + 1);
    }
    this.draw();
    this.cells.get(position)?.focus({ preventScroll: true });
  }

  focusRow(row) {
    const position = this.rows.indexOf(row);
    if (position >= 0) this.focus(position);
  }
}

/** A small picture; where the thumbnail is gone, the image itself. */
function thumbnail(table, row) {
  if (table.isSound(row)) return h("span", { class: "note" }, "♪");
  if (table.isVideo(row) && !table.thumbnail[row]) return h("video", { src: table.imageFile(row), preload: "metadata" });
  const image = h("img", { src: table.thumbnailFile(row), alt: "", loading: "lazy", decoding: "async" });
  image.addEventListener("error", () => {
    if (image.getAttribute("src") !== table.imageFile(row)) image.src = table.imageFile(row);
    else image.remove();
  });
  return image;
}

/** Badges of what is unusual about an image. */
function marks(table, row) {
  const found = table.flagsOf(row).map((flag) => h("span", { class: "badge bad" }, flag));
  if (!table.isExact(row)) found.push(h("span", { class: "badge warn" }, "inexact"));
  if (table.framesOf(row) > 1) found.push(h("span", { class: "badge" }, `▶ ${table.framesOf(row)}`));
  return found;
}
