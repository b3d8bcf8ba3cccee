// Requests to this server: the key goes along, and errors come back in words.

const NAME = "lorakit-key";
let kept = "";

export function key() {
  try { return sessionStorage.getItem(NAME) ?? kept; } catch { return kept; }
}

export function setKey(value) {
  kept = value;
  try { value ? sessionStorage.setItem(NAME, value) : sessionStorage.removeItem(NAME); } catch { /* Not allowed to. */ }
}

export class ApiError extends Error {
  constructor(message, status = 0) {
    super(message);
    this.status = status;
  }
}

export async function call(path, body, signal) {
  const headers = body ? { "Content-Type": "application/json" } : {};
  if (key()) headers.Authorization = `Bearer ${key()}`;
  const how = { method: body ? "POST" : "GET", headers, signal, cache: "no-store" };
  if (body) how.body = JSON.stringify(body);
  let response;
  try {
    response = await fetch(path, how);
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError("The server can't be reached: it may have ended.");
  }
  if (!response.ok) throw await failure(response);
  return response;
}

async function failure(response) {
  let message = `The server answered ${response.status}.`;
  try { message = (await response.json()).error.message; } catch { /* Not from this server. */ }
  const wait = response.headers.get("Retry-After");
  if (wait) message += ` (again in ${wait} s)`;
  if (response.status === 401) document.dispatchEvent(new CustomEvent("no-key"));
  return new ApiError(message, response.status);
}

// The events of a stream, until its end; one that is an error is thrown.
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    let part;
    try {
      part = await reader.read();
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError("The connection broke off.");
    }
    if (part.done) throw new ApiError("The answer broke off.");
    rest += part.value;
    const found = rest.split("\n\n");
    rest = found.pop();
    for (const each of found) {
      const data = each.replace(/^data: /, "");
      if (data === "[DONE]") return;
      const event = JSON.parse(data);
      if (event.error) throw new ApiError(event.error.message, event.error.code);
      yield event;
    }
  }
}
