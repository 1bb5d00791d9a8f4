// Off the page's own thread, so that the text appears while the model runs.

import { load } from "./model.js";

let model = null;
let stopped = false;

const say = (kind, more) => postMessage({ kind, ...more });
const fail = (error) => say("failed", { text: String(error?.message ?? error) });

async function generate(prompt, count) {
  stopped = false;
  const tokens = [];
  const started = performance.now();
  let first = 0;
  for await (const { token, text } of model.stream(prompt, count, () => stopped)) {
    tokens.push(token);
    first ||= performance.now();
    const seconds = (performance.now() - first) / 1000;
    say("piece", { text, speed: seconds ? (tokens.length - 1) / seconds : 0 });
  }
  say("done", { tokens, first: first - started });
}

onmessage = ({ data }) => {
  if (data.kind === "stop") stopped = true;
  if (data.kind === "generate") generate(data.prompt, data.count).catch(fail);
};

const threads = Number(new URLSearchParams(location.search).get("threads"));
load("/model/", { threads, progress: (text) => say("progress", { text }) })
  .then((loaded) => {
    model = loaded;
    say("ready", { text: `Ready: ${model.about}` });
  })
  .catch(fail);
