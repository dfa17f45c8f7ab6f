// What OpenAI's client for Node does with a gateway: node node_client.mjs BASE_URL KEY. Exits with 0 if all of it holds.
import assert from "node:assert/strict";
import { setTimeout as sleep } from "node:timers/promises";
import OpenAI, { toFile } from "openai";

const [baseURL, apiKey] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey, maxRetries: 0 });
const POLL_MILLISECONDS = 50;

async function until(look, done) {
  let found = await look();
  while (!done(found)) {
    await sleep(POLL_MILLISECONDS);
    found = await look();
  }
  return found;
}

// in the background
let response = await client.responses.create({ model: "slow", input: "Hello there", background: true });
assert.equal(response.status, "queued");
response = await until(
  () => client.responses.retrieve(response.id),
  (one) => !["queued", "in_progress"].includes(one.status),
);
assert.equal(response.output_text, "Hello there");

// streams, the client's own accumulator, and told again from an event on
const events = [];
for await (const event of await client.responses.create({ model: "slow", input: "Hello there", background: true, stream: true }))
  events.push(event);
assert.deepEqual(events.map((event) => event.sequence_number), [...events.keys()]);
const again = [];
for await (const event of await client.responses.retrieve(events[0].response.id, { stream: true, starting_after: 5 }))
  again.push(event);
assert.deepEqual(again, events.slice(6));
const final = await client.responses.stream({ model: "slow", input: "Hello there" }).finalResponse();
assert.equal(final.output_text, "Hello there");
const chat = client.chat.completions.stream({ model: "slow", messages: [{ role: "user", content: "Hello" }] });
assert.equal((await chat.finalChatCompletion()).choices[0].message.content, "Hello");

// conversations
const conversation = await client.conversations.create({ items: [{ role: "user", content: "before" }] });
await client.responses.create({ model: "echo", input: "now", conversation: conversation.id });
const said = [];
for await (const item of client.conversations.items.list(conversation.id, { order: "asc", limit: 1 }))
  said.push(item.content[0].text);
assert.deepEqual(said, ["before", "now", "now"]);

// files and batches
const lines = ["a", "b"].map((name) =>
  JSON.stringify({ custom_id: name, method: "POST", url: "/v1/responses", body: { model: "echo", input: name } }),
);
const file = await client.files.create({ file: await toFile(Buffer.from(lines.join("\n")), "in.jsonl"), purpose: "batch" });
let batch = await client.batches.create({ input_file_id: file.id, endpoint: "/v1/responses", completion_window: "24h" });
batch = await until(
  () => client.batches.retrieve(batch.id),
  (one) => ["completed", "failed", "expired", "cancelled"].includes(one.status),
);
assert.equal(batch.status, "completed");
const output = (await (await client.files.content(batch.output_file_id)).text()).trim().split("\n").map(JSON.parse);
assert.deepEqual(output.map((line) => line.custom_id).sort(), ["a", "b"]);

// errors
await assert.rejects(client.responses.create({ model: "nobody's", input: "x" }), (error) => {
  assert.equal(error.status, 404);
  assert.equal(error.code, "model_not_found");
  assert.match(error.requestID, /^req_/);
  return error instanceof OpenAI.NotFoundError;
});
await assert.rejects(client.responses.create({ model: "echo", input: "x", temperature: 9 }), OpenAI.BadRequestError);
await assert.rejects(client.batches.cancel(batch.id), OpenAI.ConflictError);
await assert.rejects(new OpenAI({ baseURL, apiKey: "hr-x", maxRetries: 0 }).models.list(), OpenAI.AuthenticationError);
