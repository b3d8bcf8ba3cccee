// OpenAI's client for Node: a whole answer, a stream, and an error of its kind.

import assert from "node:assert/strict";
import { createRequire } from "node:module";

const [url, key, folder] = process.argv.slice(2);
const OpenAI = createRequire(`${folder}/node_modules/`)("openai");
const client = new OpenAI.OpenAI({ baseURL: `${url}/v1`, apiKey: key, maxRetries: 0 });
const how = { model: "small", messages: [{ role: "user", content: "red cat" }], temperature: 0, max_tokens: 6 };

const whole = await client.chat.completions.create(how);
assert.ok(whole.choices[0].message.content);
assert.match(whole.system_fingerprint, /^fp_/);

let text = "";
for await (const chunk of await client.chat.completions.create({ ...how, stream: true })) {
  text += chunk.choices[0].delta.content ?? "";
}
assert.equal(text, whole.choices[0].message.content);

await assert.rejects(client.chat.completions.create({ ...how, model: "nobody" }), OpenAI.NotFoundError);
const names = [];
for await (const model of client.models.list()) names.push(model.id);
assert.deepEqual(names, ["tiny", "small", "wide"]);
