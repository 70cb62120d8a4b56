// --- query.js: what is searched for → rows. ---

const FILTERS = {
  all: () => true,
  made: (table, row) => table.status[row] === MADE,
  failed: (table, row) => table.status[row] === FAILED,
  pending: (table, row) => table.status[row] === PENDING || table.status[row] === MISSING,
  flagged: (table, row) => table.flagsOf(row).length > 0,
  inexact: (table, row) => !table.isExact(row),
};

const SORTS = {
  index: "by index",
  time: "by time, oldest first",
  "-time": "by time, newest first",
  seconds: "by seconds, fastest first",
  "-seconds": "by seconds, slowest first",
};

const CONDITION = /^([\w.]+)(<=|>=|!=|=|:|<|>)(.*)$/s;

/**
 * Words and conditions of a search: `red circle`, `"a red circle"`, `steps>20`, `seed=5`,
 * `-blue`. A word before a sign is a condition only where a field has this name.
 */
function parseQuery(text, table) {
  const names = new Set([...OWN_FIELDS, ...table.parameterNames]);
  const short = { steps: "num_inference_steps", guidance: "guidance_scale" };
  const terms = text.match(/[^\s"]*"[^"]*"?|[^\s"]+/g) ?? [];
  return terms.map((term) => {
    const negated = term.length > 1 && term.startsWith("-");
    const plain = (negated ? term.slice(1) : term).replaceAll('"', "");
    const found = CONDITION.exec(plain);
    const field = found && (short[found[1]] ?? found[1]);
    if (found && names.has(field)) {
      return { negated, field, sign: found[2], value: found[3] };
    }
    return { negated, word: plain.toLowerCase() };
  });
}

/** Whether a field's value fulfils a condition: as numbers where both are, else as text. */
function fulfils(actual, sign, wanted) {
  if (actual === undefined || actual === null) return sign === "!=";
  const isNumber = typeof actual === "number" && wanted.trim() !== "" && !isNaN(Number(wanted));
  const a = isNumber ? actual : shown(actual).toLowerCase();
  const b = isNumber ? Number(wanted) : wanted.toLowerCase();
  switch (sign) {
    case ":": return isNumber ? a === b : a.includes(b);
    case "=": return a === b;
    case "!=": return a !== b;
    case "<": return a < b;
    case ">": return a > b;
    case "<=": return a <= b;
    default: return a >= b;
  }
}

/** For a word: row → whether its prompt, negative prompt or id contains it. Each text once. */
function wordTest(table, word) {
  const inPrompt = table.prompts.map((prompt) => prompt.toLowerCase().includes(word));
  const inParameters = table.parameterSets.map(
    (set) => (set.negative_prompt ?? "").toLowerCase().includes(word));
  return (row) => inPrompt[table.promptOf[row]] || inParameters[table.parametersOf[row]]
    || (table.id[row] !== null && table.id[row].toLowerCase().includes(word));
}

/**
 * The rows that fit, in order.
 * `wanted`: { text, filter, rank, parameter, value, sort }; rank and value "" stand for any.
 */
function select(table, wanted) {
  const tests = [(row) => FILTERS[wanted.filter](table, row)];
  for (const term of parseQuery(wanted.text, table)) {
    const test = term.field === undefined
      ? wordTest(table, term.word)
      : (row) => fulfils(table.value(row, term.field), term.sign, term.value);
    tests.push(term.negated ? (row) => !test(row) : test);
  }
  if (wanted.rank !== "") tests.push((row) => table.runOf(row)?.rank === Number(wanted.rank));
  if (wanted.parameter !== "" && wanted.value !== "") {
    const fits = table.parameterSets.map((set) => shownOrNone(set[wanted.parameter]) === wanted.value);
    tests.push((row) => fits[table.parametersOf[row]]);
  }
  const rows = [];
  for (let row = 0; row < table.size; row += 1) {
    if (tests.every((test) => test(row))) rows.push(row);
  }
  return sorted(table, rows, wanted.sort);
}

/** Rows without a value (not made yet) come last. */
function sorted(table, rows, sort) {
  if (sort === "index") return rows;
  const down = sort.startsWith("-");
  const column = table[{ time: "end", seconds: "seconds" }[sort.replace("-", "")]];
  const known = rows.filter((row) => column[row] !== null);
  known.sort((a, b) => (down ? column[b] - column[a] : column[a] - column[b]) || a - b);
  return [...known, ...rows.filter((row) => column[row] === null)];
}

const shownOrNone = (value) => (value === undefined ? "(none)" : shown(value));
