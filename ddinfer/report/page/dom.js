// --- dom.js: elements from values. Text is always text: nothing here or elsewhere makes HTML. ---

/** An element with properties and children; a string becomes a text node. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "class") element.className = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** The same for SVG. */
function svg(tag, properties = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(properties)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const byId = (id) => document.getElementById(id);

/** A button that copies `text` and says so. */
function copyButton(label, text) {
  const button = h("button", { type: "button" }, label);
  button.addEventListener("click", async () => {
    button.textContent = (await copyText(text)) ? "Copied" : "Not allowed here";
    setTimeout(() => { button.textContent = label; }, 1200);
  });
  return button;
}

/** Copy to the clipboard → whether the browser let us. A page from disk may need the old way. */
async function copyText(text) {
  if (navigator.clipboard) {
    const worked = await navigator.clipboard.writeText(text).then(() => true, () => false);
    if (worked) return true;
  }
  const area = h("textarea", {});
  area.value = text;
  (document.querySelector("dialog[open]") || document.body).append(area);
  area.select();
  const worked = document.execCommand("copy");
  area.remove();
  return worked;
}

const plural = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** Seconds for people. */
function duration(seconds) {
  if (seconds < 10) return `${seconds.toFixed(2)} s`;
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  const minutes = Math.round(seconds / 60);
  return minutes < 120 ? `${minutes} min` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
}

/** A parameter's value as text. */
const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));
