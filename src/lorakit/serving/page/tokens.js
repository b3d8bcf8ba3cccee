// The tokens of an answer, and what is told of the one under the pointer or the focus.

const tip = document.getElementById("tip");
const about = new WeakMap();

export function visible(text) {
  if (text === "") return "(nothing)";
  return text.replace(/\n/g, "↵").replace(/\t/g, "→").replace(/^ | $/g, "␣");
}

export function percent(logprob) {
  const share = 100 * Math.exp(logprob);
  if (share > 99.95 && share < 100) return "> 99.9 %";
  return share < 0.1 ? "< 0.1 %" : `${share.toFixed(1)} %`;
}

// What both forms of a stream say of their tokens: text, log-probability, rivals.
export function tokensOf(choice) {
  const told = choice.logprobs;
  if (!told) return [];
  if (told.content) {
    return told.content.map((each) => ({
      text: each.token,
      logprob: each.logprob,
      rivals: each.top_logprobs.map((other) => [other.token, other.logprob]),
    }));
  }
  return told.tokens.map((text, at) => ({
    text,
    logprob: told.token_logprobs[at],
    rivals: Object.entries(told.top_logprobs[at] ?? {}),
  }));
}

// A piece of an answer: text that became certain with these tokens.
export function piece(text, tokens) {
  const span = document.createElement("span");
  span.textContent = text;
  span.tabIndex = -1;
  const doubts = tokens.map((token) => 1 - Math.exp(token.logprob));
  if (doubts.length) span.style.setProperty("--d", Math.max(...doubts).toFixed(2));
  about.set(span, tokens);
  return span;
}

function row(text, logprob, own) {
  const line = document.createElement("div");
  line.className = own ? "own" : "";
  line.style.setProperty("--p", Math.exp(logprob).toFixed(3));
  const name = document.createElement("code");
  name.textContent = visible(text);
  const share = document.createElement("span");
  share.textContent = percent(logprob);
  line.append(name, share);
  return line;
}

function show(span) {
  const tokens = about.get(span);
  if (!tokens?.length) return hide();
  const lines = tokens.flatMap((token) => {
    const rivals = token.rivals.filter(([text]) => text !== token.text);
    return [[token.text, token.logprob, true], ...rivals.map((each) => [...each, false])];
  });
  tip.replaceChildren(...lines.slice(0, 14).map((line) => row(...line)));
  tip.style.setProperty("--own", getComputedStyle(span).getPropertyValue("--own"));
  tip.hidden = false;
  const [place] = span.getClientRects();
  const { width, height } = tip.getBoundingClientRect();
  const left = Math.min(Math.max(8, place.left), innerWidth - width - 8);
  const below = place.bottom + 6 + height <= innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? place.bottom + 6 : Math.max(8, place.top - height - 6)}px`;
  span.setAttribute("aria-describedby", "tip");
}

export function hide() {
  tip.hidden = true;
}

function move(answer, from, key) {
  const spans = [...answer.children];
  const steps = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const at = { Home: 0, End: spans.length - 1 }[key] ?? spans.indexOf(from) + (steps[key] ?? 0);
  const next = spans[Math.min(Math.max(0, at), spans.length - 1)];
  if (!(key in steps || key === "Home" || key === "End") || !next) return false;
  from.tabIndex = -1;
  next.tabIndex = 0;
  next.focus();
  return true;
}

// Have an answer tell of its tokens; one of them is a stop of Tab, arrows go on from there.
export function listen(answer) {
  const of = (event) => (event.target.parentElement === answer ? event.target : null);
  answer.addEventListener("pointerover", (event) => (of(event) ? show(of(event)) : hide()));
  answer.addEventListener("pointerleave", hide);
  answer.addEventListener("focusin", (event) => of(event) && show(of(event)));
  answer.addEventListener("focusout", hide);
  answer.addEventListener("scroll", hide, { passive: true });
  answer.addEventListener("keydown", (event) => {
    if (of(event) && move(answer, of(event), event.key)) event.preventDefault();
  });
}
