// A column: what answers, how, and its answer as it streams.

import { call, events, key } from "./api.js";
import { asCurl, asPython, copy } from "./snippets.js";
import { listen, piece, tokensOf } from "./tokens.js";

const MIX = "mix:";

function options(select, values, wanted) {
  const before = wanted ?? select.value;
  select.replaceChildren(...values.map(([value, label]) => new Option(label, value)));
  if (values.some(([value]) => value === before)) select.value = before;
}

export class Column {
  constructor(letter, shared) {
    const made = document.getElementById("column").content.cloneNode(true);
    this.root = made.firstElementChild;
    this.letter = letter;
    this.shared = shared;
    this.base = "";
    this.names = [];
    this.root.setAttribute("aria-label", `Column ${letter}`);
    this.find(".letter").textContent = letter;
    this.answer = this.find(".answer");
    this.answer.setAttribute("aria-label", `Answer ${letter}, token by token`);
    this.answer.dataset.empty = "No answer yet.";
    this.find(".model").addEventListener("change", () => this.showMix());
    this.find(".add").addEventListener("click", () => this.addTerm());
    this.find(".curl").addEventListener("click", (event) => this.copy(asCurl, event.target));
    this.find(".python").addEventListener("click", (event) => this.copy(asPython, event.target));
    listen(this.answer);
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  // The models that there are now; what was chosen stays chosen, where it still is there.
  offer(base, names, wanted) {
    this.base = base;
    this.names = names;
    const own = names.map((name) => [`adapter:${name}`, name]);
    const mix = names.length ? [[MIX, "A combination of adapters"]] : [];
    options(this.find(".model"), [["base:", `${base} (the base)`], ...own, ...mix], wanted);
    for (const select of this.root.querySelectorAll(".term select")) options(select, names.map((n) => [n, n]));
    this.showMix();
  }

  showMix() {
    const mixed = this.find(".model").value === MIX;
    this.find(".mix").hidden = !mixed;
    if (mixed && !this.find(".term")) this.names.slice(0, 2).forEach((name) => this.addTerm(name, 0.5));
  }

  addTerm(name, weight = 0.5) {
    const term = document.getElementById("term").content.cloneNode(true).firstElementChild;
    const used = [...this.root.querySelectorAll(".term select")].map((each) => each.value);
    const free = name ?? this.names.find((each) => !used.includes(each)) ?? this.names[0];
    const slider = term.querySelector("input");
    const tell = () => { term.querySelector("output").textContent = Number(slider.value).toFixed(2); };
    options(term.querySelector("select"), this.names.map((n) => [n, n]), free);
    slider.value = weight;
    slider.addEventListener("input", tell);
    term.querySelector(".remove").addEventListener("click", () => term.remove());
    tell();
    this.find(".terms").append(term);
  }

  // The request that this column would make: its path and its body.
  request() {
    const { prompt, form } = this.shared();
    const chat = form === "chat";
    const value = this.find(".model").value;
    const number = (name) => (this.find(name).value === "" ? undefined : Number(this.find(name).value));
    const body = { model: value.startsWith("adapter:") ? value.slice(8) : this.base };
    if (value === MIX) {
      body.adapters = [...this.root.querySelectorAll(".term")].map((term) => ({
        name: term.querySelector("select").value,
        weight: Number(term.querySelector("input").value),
      }));
    }
    if (chat) body.messages = [{ role: "user", content: prompt }];
    else body.prompt = prompt;
    Object.assign(body, { temperature: number(".temperature"), seed: number(".seed"), max_tokens: number(".length") });
    Object.assign(body, { stream: true, logprobs: chat ? true : 5, top_logprobs: chat ? 5 : undefined });
    return [chat ? "/v1/chat/completions" : "/v1/completions", body];
  }

  copy(write, button) {
    const [path, body] = this.request();
    const given = Object.fromEntries(Object.entries(body).filter(([, value]) => value !== undefined));
    copy(write(path, given, Boolean(key())), button);
  }

  // Ask, and show the answer as it comes; tells in words how it went.
  async ask(signal) {
    const [path, body] = this.request();
    this.pieces = [];
    this.count = 0;
    this.first = this.last = null;
    this.print = "";
    this.answer.replaceChildren();
    this.answer.classList.add("busy");
    this.answer.setAttribute("aria-busy", "true");
    this.find(".error").hidden = true;
    this.find(".figures").textContent = "waiting";
    this.began = performance.now();
    let end;
    try {
      end = await this.read(await call(path, body, signal));
    } catch (error) {
      end = error.name === "AbortError" ? "stopped" : "failed";
      if (end === "failed") {
        this.find(".error").textContent = error.message;
        this.find(".error").hidden = false;
      }
    }
    this.answer.classList.remove("busy");
    this.answer.setAttribute("aria-busy", "false");
    this.answer.dataset.empty = end === "failed" ? "" : "An empty answer.";
    this.figures(end);
    return `${this.letter}: ${end}, ${this.count} tokens.`;
  }

  async read(response) {
    let end = "ended";
    let waiting = [];
    for await (const event of events(response)) {
      this.print = event.system_fingerprint ?? this.print;
      for (const choice of event.choices) {
        const tokens = tokensOf(choice);
        waiting = waiting.concat(tokens);
        this.count += tokens.length;
        if (tokens.length) {
          this.last = performance.now();
          this.first ??= this.last;
        }
        const text = choice.delta ? (choice.delta.content ?? "") : choice.text;
        if (text) {
          this.add(text, waiting);
          waiting = [];
        }
        if (choice.finish_reason) end = choice.finish_reason === "length" ? "cut at its length" : "ended";
      }
      this.figures();
    }
    return end;
  }

  add(text, tokens) {
    const { answer } = this;
    const follows = answer.scrollHeight - answer.scrollTop - answer.clientHeight < 30;
    const span = piece(text, tokens);
    if (!this.pieces.length) span.tabIndex = 0;
    this.pieces.push(span);
    answer.append(span);
    if (follows) answer.scrollTop = answer.scrollHeight;
  }

  figures(end) {
    const told = this.find(".figures");
    if (this.first === null) {
      told.textContent = end ?? "waiting";
      return;
    }
    const parts = [];
    const figure = (value, unit) => {
      const strong = document.createElement("b");
      strong.textContent = value;
      parts.push(parts.length ? " · " : "", strong, ` ${unit}`);
    };
    const seconds = (this.last - this.first) / 1000;
    if (seconds > 0 && this.count > 1) figure(((this.count - 1) / seconds).toFixed(1), "tokens/s");
    figure(Math.round(this.first - this.began), "ms to the first");
    figure(this.count, this.count === 1 ? "token" : "tokens");
    if (end) parts.push(` · ${end}`);
    told.replaceChildren(...parts);
    told.title = this.print && `The weights that answered: ${this.print}`;
  }
}
