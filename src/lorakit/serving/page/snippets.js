// A request as a command for a shell, and as Python.

const SHOWN = new Set(["stream", "stream_options", "logprobs", "top_logprobs"]);

function shown(body) {
  return Object.fromEntries(Object.entries(body).filter(([name]) => !SHOWN.has(name)));
}

export function asCurl(path, body, withKey) {
  const data = JSON.stringify(shown(body), null, 2).replaceAll("'", "'\\''");
  const lines = [`curl ${location.origin}${path}`, "-H 'Content-Type: application/json'"];
  if (withKey) lines.push('-H "Authorization: Bearer $LORAKIT_KEY"');
  return `${lines.join(" \\\n  ")} \\\n  -d '${data}'\n`;
}

export function asPython(path, body, withKey) {
  const { adapters, ...rest } = shown(body);
  const given = Object.entries(rest).map(([name, value]) => `${name}=${JSON.stringify(value)}`);
  if (adapters) given.push(`extra_body=${JSON.stringify({ adapters })}`);
  const chat = path.includes("chat");
  return [
    ...(withKey ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url="${location.origin}/v1", api_key=${withKey ? 'os.environ["LORAKIT_KEY"]' : '"none"'})`,
    `answer = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...given.map((each) => `    ${each},`),
    ")",
    `print(answer.choices[0].${chat ? "message.content" : "text"})`,
    "",
  ].join("\n");
}

export async function copy(text, button) {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Browsers lend the clipboard to secure pages alone.
    const area = document.createElement("textarea");
    area.value = text;
    document.body.append(area);
    area.select();
    document.execCommand("copy");
    area.remove();
    button.focus();
  }
  const label = button.textContent;
  button.textContent = "Copied";
  setTimeout(() => { button.textContent = label; }, 1200);
}
