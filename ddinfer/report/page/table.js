// --- table.js: the job's data, one list a column. A row is a number from 0; an image's index is
// --- `first` + row.

const PENDING = 0, FAILED = 1, MADE = 2, MISSING = 3;
const STATUS_NAMES = ["pending", "failed", "made", "missing"];

class Table {
  constructor(data) {
    Object.assign(this, data.columns);
    this.data = data;
    this.first = data.first;
    this.prompts = data.prompts;
    this.promptOf = data.prompt;
    this.parameterSets = data.parameter_sets;
    this.parametersOf = data.parameters;
    this.size = this.status.length;
    this.parameterNames = [...new Set(this.parameterSets.flatMap((set) => Object.keys(set)))];
    this.ranks = [...new Set(data.runs.map((run) => run.rank))].sort((a, b) => a - b);
    this._rowsOfPrompt = null;
  }

  indexOf(row) { return this.first + row; }
  idOf(row) { return this.id[row] ?? this.nameOf(row); }
  nameOf(row) { return String(this.indexOf(row)).padStart(8, "0"); }
  promptText(row) { return this.prompts[this.promptOf[row]]; }
  parameters(row) { return this.parameterSets[this.parametersOf[row]]; }
  runOf(row) { return this.data.runs[this.run[row]] ?? null; }
  flagsOf(row) { return this.data.flags[this.indexOf(row)] ?? []; }
  isExact(row) { return !(this.indexOf(row) in this.data.inexact); }
  framesOf(row) { return this.data.frames[this.indexOf(row)] ?? 1; }
  unreadable(row) { return this.data.unreadable[this.indexOf(row)] ?? null; }

  errorOf(row) {
    const number = this.data.error_of[this.indexOf(row)];
    return number === undefined ? null : this.data.errors[number];
  }

  _folder(row) { return String(Math.floor(this.indexOf(row) / 10000)).padStart(4, "0"); }
  imageFile(row) { return `images/${this._folder(row)}/${this.nameOf(row)}.${this.ending[row]}`; }
  isVideo(row) { return ["mp4", "webm"].includes(this.ending[row]); }
  isSound(row) { return ["wav", "flac"].includes(this.ending[row]); }

  /** Where the small picture is: the image itself where there is no thumbnail. */
  thumbnailFile(row) {
    if (!this.thumbnail[row]) return this.imageFile(row);
    const frames = this.framesOf(row);
    const end = frames > 1 ? `-${frames}` : "";
    return `thumbnails/${this._folder(row)}/${this.nameOf(row)}-${this.hash[row]}${end}.webp`;
  }

  count(status) { return this.status.reduce((sum, value) => sum + (value === status), 0); }

  /** Rows with the same prompt as this one, in order. */
  samePrompt(row) {
    if (this._rowsOfPrompt === null) {
      this._rowsOfPrompt = new Map();
      this.promptOf.forEach((prompt, k) => {
        if (!this._rowsOfPrompt.has(prompt)) this._rowsOfPrompt.set(prompt, []);
        this._rowsOfPrompt.get(prompt).push(k);
      });
    }
    return this._rowsOfPrompt.get(this.promptOf[row]);
  }

  /** Rows that shared the pipeline call with this one, itself included. */
  batchOf(row) {
    const other = this.data.inexact[this.indexOf(row)];
    if (other !== undefined && other.length) return other.map((index) => index - this.first);
    let begin = row, end = row;
    while (begin > 0 && this.batch[begin - 1] === this.batch[row]) begin -= 1;
    while (end + 1 < this.size && this.batch[end + 1] === this.batch[row]) end += 1;
    return Array.from({ length: end - begin + 1 }, (_, k) => begin + k);
  }

  /** A field of a row, for searching and sorting; `undefined` where it has none. */
  value(row, field) {
    switch (field) {
      case "index": return this.indexOf(row);
      case "id": return this.idOf(row);
      case "prompt": return this.promptText(row);
      case "seed": return this.seed[row];
      case "status": return STATUS_NAMES[this.status[row]];
      case "rank": return this.runOf(row)?.rank;
      case "attempt": return this.runOf(row)?.attempt;
      case "seconds": return this.seconds[row];
      case "bytes": return this.bytes[row];
      case "time": return this.end[row];
      case "flag": return this.flagsOf(row).join(" ") || undefined;
      case "exact": return this.isExact(row);
      case "frames": return this.framesOf(row);
      default: return this.parameters(row)[field];
    }
  }
}

/** Fields that every row has, beside its parameters. */
const OWN_FIELDS = [
  "index", "id", "prompt", "seed", "status", "rank", "attempt", "seconds", "bytes", "time", "flag",
  "exact", "frames",
];
