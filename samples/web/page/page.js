// The page itself: shows what the worker says. `data-state` of the body is loading, ready, running or failed.

const at = (id) => document.getElementById(id);
const worker = new Worker("worker.js" + location.search, { type: "module" });

function enter(state, text) {
  document.body.dataset.state = state;
  at("status").textContent = text;
  at("generate").disabled = state !== "ready";
  at("stop").disabled = state !== "running";
}

worker.onmessage = ({ data }) => {
  if (data.kind === "progress") enter("loading", data.text);
  if (data.kind === "ready") enter("ready", data.text);
  if (data.kind === "piece") {
    at("output").textContent += data.text;
    if (data.speed) at("speed").textContent = `${data.speed.toFixed(1)} tokens/s`;
  }
  if (data.kind === "done") {
    document.body.dataset.tokens = JSON.stringify(data.tokens);
    enter("ready", `${data.tokens.length} tokens, first after ${Math.round(data.first)} ms`);
  }
  if (data.kind === "failed") enter("failed", data.text);
};
worker.onerror = (event) => enter("failed", event.message || "The worker could not be loaded");

at("form").onsubmit = (event) => {
  event.preventDefault();
  at("output").textContent = at("speed").textContent = "";
  enter("running", "");
  worker.postMessage({ kind: "generate", prompt: at("prompt").value, count: Number(at("count").value) });
};
at("stop").onclick = () => worker.postMessage({ kind: "stop" });
