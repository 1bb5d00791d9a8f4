// An exported folder as a model: files, tokenizer, and greedy decoding with explicit caches on onnxruntime-web.
//
//   const model = await load("/model/");
//   for await (const { text } of model.stream("Once upon a time", 64)) output.append(text);

import * as ort from "/ort/ort.wasm.min.mjs";
import { Tokenizer } from "/tokenizers/tokenizers.mjs";

const INCOMPLETE = "\uFFFD"; // what bytes of a character are decoded to while more of them are to come

const json = async (url) => {
  const answer = await fetch(url);
  if (!answer.ok) throw new Error(`${url} is not there: ${answer.status}`);
  return answer.json();
};

export async function load(folder, { threads = 0, progress = () => {} } = {}) {
  ort.env.wasm.wasmPaths = "/ort/";
  if (threads) ort.env.wasm.numThreads = threads;
  progress("Reading the configuration …");
  const config = (await json(folder + "genai_config.json")).model;
  const [files, settings] = [await json(folder + "tokenizer.json"), await optional(folder + "tokenizer_config.json")];
  progress("Reading the model …");
  const session = await ort.InferenceSession.create(folder + config.decoder.filename, {
    executionProviders: ["wasm"],
    externalData: [{ path: config.decoder.filename + ".data", data: folder + config.decoder.filename + ".data" }],
  });
  return new Model(session, new Tokenizer(files, settings), config);
}

async function optional(url) {
  const answer = await fetch(url);
  return answer.ok ? answer.json() : {};
}

class Model {
  constructor(session, tokenizer, config) {
    this.session = session;
    this.tokenizer = tokenizer;
    this.decoder = config.decoder;
    this.limit = config.context_length;
    this.ends = new Set([config.eos_token_id].flat());
    this.about = `${config.decoder.num_hidden_layers} layers, ${config.vocab_size} tokens, ${this.limit} of context`;
  }

  // Tokens one after the other, each with the text that it adds; `stopped` is asked before each.
  async *stream(prompt, count, stopped = () => false) {
    let ids = this.tokenizer.encode(prompt).ids;
    if (!ids.length) throw new Error("The prompt holds no token");
    let past = this.empty();
    const made = [];
    let shown = "";
    for (let length = ids.length; made.length < count && length < this.limit && !stopped(); length += 1) {
      const { token, present } = await this.step(ids, length, past);
      if (this.ends.has(token)) return;
      [ids, past] = [[token], present];
      made.push(token);
      const text = this.tokenizer.decode(made, { skip_special_tokens: true });
      const piece = text.endsWith(INCOMPLETE) ? "" : text.slice(shown.length);
      shown += piece;
      yield { token, text: piece };
      await new Promise((resolve) => setTimeout(resolve)); // lets a message to stop come in
    }
  }

  // The likeliest token after `ids`, the last of `length` tokens, and the caches that then hold all of them.
  async step(ids, length, past) {
    const whole = (values) => new ort.Tensor("int64", BigInt64Array.from(values, BigInt), [1, values.length]);
    const names = this.decoder.inputs;
    const feeds = { [names.input_ids]: whole(ids), ...past };
    if (names.attention_mask) feeds[names.attention_mask] = whole(new Array(length).fill(1));
    if (names.position_ids) feeds[names.position_ids] = whole(ids.map((_, index) => length - ids.length + index));
    const found = await this.session.run(feeds);
    const logits = found[this.decoder.outputs.logits];
    const vocabulary = logits.dims.at(-1);
    const token = likeliest(logits.data.subarray(logits.data.length - vocabulary));
    return { token, present: Object.fromEntries(this.caches().map(([to, from]) => [to, found[from]])) };
  }

  // [name of a past tensor, name of the present tensor that is the next step's past]
  caches() {
    const { inputs, outputs } = this.decoder;
    return [...Array(this.decoder.num_hidden_layers).keys()].flatMap((layer) =>
      ["key", "value"].map((kind) => [
        inputs[`past_${kind}_names`].replace("%d", layer),
        outputs[`present_${kind}_names`].replace("%d", layer),
      ]),
    );
  }

  empty() {
    const { num_key_value_heads: heads, head_size: width } = this.decoder;
    const types = new Map(this.session.inputMetadata.map((entry) => [entry.name, entry.type]));
    return Object.fromEntries(
      this.caches().map(([name]) => [name, new ort.Tensor(types.get(name) ?? "float32", [], [1, heads, 0, width])]),
    );
  }
}

function likeliest(row) {
  let best = 0;
  for (let index = 1; index < row.length; index += 1) if (row[index] > row[best]) best = index;
  return best;
}
