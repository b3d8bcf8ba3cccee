// The table of adapters: what each is, and buttons that load and unload.

import { call } from "./api.js";

const rows = document.getElementById("rows");
const failed = document.getElementById("adapters-error");
const form = document.getElementById("loading");

function size(bytes) {
  const units = ["bytes", "kB", "MB", "GB"];
  const step = bytes < 1000 ? 0 : Math.min(3, Math.floor(Math.log10(bytes) / 3));
  return `${(bytes / 1000 ** step).toFixed(step ? 1 : 0)} ${units[step]}`;
}

function line(name, cells, button) {
  const made = document.createElement("tr");
  const head = document.createElement("th");
  head.scope = "row";
  head.textContent = name;
  made.append(head);
  for (const [label, text, kind] of cells) {
    const cell = made.insertCell();
    cell.textContent = text;
    cell.dataset.label = label;
    if (kind) cell.className = kind;
  }
  const last = made.insertCell();
  if (button) last.append(button);
  return made;
}

function action(word, name, act) {
  const made = document.createElement("button");
  made.className = "quiet";
  made.textContent = word;
  made.setAttribute("aria-label", `${word} ${name}`);
  made.addEventListener("click", () => act(made));
  return made;
}

function kindOf(each) {
  const ranks = each.ranks.length ? ` r ${each.ranks.join("/")}` : "";
  return `${each.method}${ranks}, ${each.updates} layers`;
}

function baseOf(each) {
  if (each.base === "same") return ["trained on this base", "yes", "good"];
  if (each.base === "unknown") return ["trained on this base", "not recorded", ""];
  return ["trained on this base", `no: ${each.base}`, "wary"];
}

export class Adapters {
  constructor(changed) {
    this.changed = changed;
    form.addEventListener("submit", (event) => {
      event.preventDefault();
      const { path, name, inplace } = form.elements;
      const folder = path.value.trim();
      const last = folder.replace(/\/+$/, "").split("/").pop();
      this.load(name.value.trim() || last, folder, inplace.checked, form.querySelector("button"));
    });
  }

  async refresh() {
    try {
      this.show(await (await call("/v1/adapters")).json());
    } catch (error) {
      failed.textContent = error.message;
      failed.hidden = false;
    }
  }

  show(found) {
    const blank = ["", ""];
    rows.replaceChildren(
      line(found.base.name, [["kind", "the base"], blank, blank, ["requests", found.base.requests]]),
      ...found.data.map((each) => line(each.name, [
        ["kind", kindOf(each)],
        ["size", size(each.size_bytes) + (each.in_memory ? "" : ", on disk")],
        baseOf(each),
        ["requests", each.requests],
      ], found.loads && action("Unload", each.name, (button) => this.unload(each.name, button)))),
      ...found.not_loaded.map((name) => line(name, [["kind", "not loaded"], blank, blank, blank],
        found.loads && action("Load", name, (button) => this.load(name, name, false, button)))),
    );
    form.hidden = !found.loads;
    this.changed(found.base.name, found.data.map((each) => each.name));
  }

  load(name, path, inplace, button) {
    return this.post("/v1/load_lora_adapter", { lora_name: name, lora_path: path, load_inplace: inplace }, button);
  }

  unload(name, button) {
    return this.post("/v1/unload_lora_adapter", { lora_name: name }, button);
  }

  async post(path, body, button) {
    button.disabled = true;
    failed.hidden = true;
    try {
      await (await call(path, body)).text();
      if (button.form === form) form.reset();
    } catch (error) {
      failed.textContent = error.message;
      failed.hidden = false;
    }
    button.disabled = false;
    await this.refresh();
  }
}
