// The page: one prompt for two columns, whose requests share the server's batch.

import { Adapters } from "./adapters.js";
import { call, key, setKey } from "./api.js";
import { Column } from "./column.js";
import { hide } from "./tokens.js";

const at = (id) => document.getElementById(id);
const asking = at("asking");
const send = at("send");
const shared = () => ({ prompt: at("prompt").value, form: asking.elements.form.value });
const columns = ["A", "B"].map((letter) => new Column(letter, shared));
at("columns").append(...columns.map((each) => each.root));
let running = null;
let offered = false;

const adapters = new Adapters((base, names) => {
  at("base").textContent = base;
  document.title = `${base} · lorakit`;
  const wanted = offered ? [] : ["base:", names.length ? `adapter:${names[0]}` : "base:"];
  columns.forEach((each, index) => each.offer(base, names, wanted[index]));
  offered = true;
});

// Mark the first token in which two answers differ.
function compare() {
  const [a, b] = columns.map((each) => each.pieces);
  const texts = (pieces) => pieces.map((each) => each.textContent);
  const [left, right] = [texts(a), texts(b)];
  const place = left.findIndex((text, index) => text !== right[index]);
  if (place < 0 && left.length === right.length) return left.length ? "Both answers are the same." : "";
  const first = place < 0 ? left.length : place;
  for (const pieces of [a, b]) pieces[first]?.classList.add("parts");
  return `The answers part after ${first} tokens.`;
}

async function ask() {
  if (running || !asking.reportValidity()) return;
  running = new AbortController();
  send.textContent = "Stop";
  send.classList.add("stop");
  at("status").textContent = "Asking.";
  const told = await Promise.all(columns.map((each) => each.ask(running.signal)));
  running = null;
  send.textContent = "Ask";
  send.classList.remove("stop");
  at("status").textContent = [...told, compare()].join(" ");
  adapters.refresh();
}

asking.addEventListener("submit", (event) => {
  event.preventDefault();
  if (running) running.abort();
  else ask();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
    event.preventDefault();
    ask();
  } else if (event.key === "Escape") {
    running?.abort();
    hide();
    at("keybox").open = false;
  }
});

at("keyform").addEventListener("submit", (event) => {
  event.preventDefault();
  setKey(at("key").value.trim());
  at("keybox").open = false;
  start();
});
document.addEventListener("no-key", () => {
  at("keybox").open = true;
  at("key").focus();
});

async function start() {
  at("keybox").classList.toggle("set", Boolean(key()));
  at("adapters-error").hidden = true;
  await adapters.refresh();
  try {
    const info = await (await call("/tokenizer_info")).json();
    if (!info.chat_template) asking.elements.form.value = "text";
  } catch { /* The table has told what is wrong. */ }
}

start();
