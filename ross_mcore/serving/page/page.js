// One picture and one question for all models of this server; their answers and reconstructions side by side.

const PURE_NOISE = 1000;
const SMALL_PIXELS = 128;
const get = (id) => document.getElementById(id);

let picture = null; // a data: URL
let limits = { body_bytes: Infinity };
let columns = [];
let asking = null; // an AbortController while answers are written

/** fetch of JSON with the key. Throws an Error whose message is the server's. */
async function call(path, body, signal) {
  const headers = { Authorization: `Bearer ${sessionStorage.getItem("key") ?? ""}` };
  const options = body ? { method: "POST", body: JSON.stringify(body) } : {};
  if (body) headers["Content-Type"] = "application/json";
  let response;
  try {
    response = await fetch(path, { ...options, headers, signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : new Error("the server cannot be reached; is it running?");
  }
  if (response.ok) return response;
  if (response.status === 401) {
    get("key-field").hidden = false;
    if (!sessionStorage.getItem("key")) throw new Error("");
  }
  const problem = await response.json().catch(() => null);
  throw new Error(problem?.error?.message ?? `the server answered ${response.status}`);
}

/** The objects of a stream of server-sent events, without its last mark. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    const parts = text.split("\n\n");
    text = parts.pop();
    for (const part of parts) {
      const data = part.replace(/^data: /, "");
      if (data !== "[DONE]") yield JSON.parse(data);
    }
  }
}

/** A model's part of the page. */
class Column {
  constructor(model) {
    this.model = model;
    this.turns = [];
    this.running = null; // an AbortController while a reconstruction is computed
    this.isCurrent = false; // whether the pictures shown are those asked for
    this.root = get("model").content.cloneNode(true).firstElementChild;
    this.find(".name").textContent = model.name;
    this.find("h2 small").textContent = `iteration ${model.iteration}`;
    this.clear();
    get("models").append(this.root);
  }

  find(selector) {
    return this.root.querySelector(selector);
  }

  clear() {
    this.turns = [];
    this.log = this.find(".log").cloneNode(); // what still arrives for the old one is not shown
    this.find(".log").replaceWith(this.log);
    if (!this.model.reconstructs) this.say("This model has no denoiser, so it reconstructs no pictures.");
  }

  say(text) {
    this.find(".status").textContent = text;
  }

  write(kind, text) {
    const line = document.createElement("p");
    line.className = kind;
    line.textContent = text;
    this.log.append(line);
    this.log.scrollTop = this.log.scrollHeight;
    return line;
  }

  async ask(question, signal) {
    const content = [{ type: "text", text: question }];
    if (picture && !this.turns.length) content.unshift({ type: "image_url", image_url: { url: picture } });
    const messages = [...this.turns, { role: "user", content }];
    const log = this.log;
    this.write("asked", question);
    const line = this.write("answer waiting", "");
    let answer = "";
    let end = null;
    try {
      const temperature = Number(get("temperature").value);
      const asked = { model: this.model.name, messages, temperature, max_tokens: Number(get("tokens").value) };
      const response = await call("v1/chat/completions", { ...asked, stream: true }, signal);
      for await (const chunk of events(response)) {
        if (chunk.error) throw new Error(chunk.error.message);
        const choice = chunk.choices[0];
        answer += choice?.delta.content ?? "";
        end = choice?.finish_reason ?? end;
        line.textContent = answer;
        log.scrollTop = log.scrollHeight;
      }
      if (end === "length") this.write("remark", "ended at the most tokens");
      if (!answer) this.write("remark", "the model ended without a word");
      this.turns = [...messages, { role: "assistant", content: answer }];
    } catch (error) {
      if (log !== this.log) return;
      const stopped = error.name === "AbortError";
      this.write(stopped ? "remark" : "wrong", stopped ? "stopped" : error.message);
    } finally {
      line.classList.remove("waiting");
    }
  }

  stopReconstructing() {
    this.running?.abort();
    this.running = null;
  }

  async reconstruct() {
    this.stopReconstructing();
    this.isCurrent = false;
    if (!picture || !this.model.reconstructs) return;
    const mine = (this.running = new AbortController());
    this.find(".pictures").classList.add("stale");
    this.say("reconstructing …");
    const start = Number(get("start").value);
    const numbers = { steps: Number(get("steps").value), seed: Number(get("seed").value) };
    const from = start < PURE_NOISE ? start : null;
    try {
      const asked = { model: this.model.name, picture, start_timestep: from, ...numbers };
      const found = await (await call("api/reconstruct", asked, mine.signal)).json();
      for (const kind of ["original", "reconstruction", "difference"]) {
        const image = this.find(`.${kind}`);
        image.src = found[kind];
        await image.decode();
        image.classList.toggle("small", image.naturalWidth < SMALL_PIXELS);
      }
      this.find(".scale").textContent = `difference × ${found.difference_scale}`;
      this.find(".pictures").hidden = false;
      this.find(".pictures").classList.remove("stale");
      this.say(found.psnr === null ? "identical" : `PSNR ${found.psnr.toFixed(1)} dB`);
      this.isCurrent = true;
    } catch (error) {
      if (error.name !== "AbortError") {
        this.find(".pictures").hidden = true;
        this.say(error.message);
      }
    } finally {
      if (this.running === mine) this.running = null;
    }
  }
}

function problem(text) {
  get("problem").textContent = text;
  get("problem").hidden = !text;
}

function newConversation() {
  asking?.abort();
  for (const column of columns) column.clear();
  get("question").focus();
}

async function take(file) {
  if (!file) return;
  if (file.size * 1.34 > limits.body_bytes) {
    problem(`${file.name} is larger than this server takes (${limits.body_bytes >> 20} MiB with its encoding)`);
    return;
  }
  problem("");
  const url = await new Promise((resolve) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.readAsDataURL(file);
  });
  picture = url.replace(/^data:(?!image\/)[^;,]*/, "data:image/unknown"); // a browser may not know the format
  const preview = get("preview");
  preview.src = picture;
  preview.hidden = false;
  preview.alt = file.name || "the picture";
  preview.onload = () => preview.classList.toggle("small", preview.naturalWidth < SMALL_PIXELS);
  get("hint").textContent = file.name || "pasted picture";
  newConversation();
  for (const column of columns) {
    column.find(".pictures").hidden = true; // they are of another picture
    column.reconstruct();
  }
}

async function ask() {
  const question = get("question").value.trim();
  if (!question || asking) return;
  asking = new AbortController();
  get("ask").disabled = true;
  get("stop").disabled = false;
  get("question").value = "";
  for (const column of columns) column.stopReconstructing(); // answers come first
  await Promise.all(columns.map((column) => column.ask(question, asking.signal)));
  asking = null;
  get("ask").disabled = false;
  get("stop").disabled = true;
  for (const column of columns) if (!column.isCurrent) column.reconstruct();
}

function shown(slider) {
  const value = get(slider).value;
  const isPure = slider === "start" && Number(value) === PURE_NOISE;
  get(`${slider}-is`).textContent = isPure ? "pure noise" : value;
}

function connect() {
  get("panel").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  get("question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
  document.addEventListener("keydown", (event) => {
    if (event.key === "Escape") asking?.abort();
  });
  get("stop").addEventListener("click", () => asking?.abort());
  get("clear").addEventListener("click", newConversation);
  get("file").addEventListener("change", (event) => take(event.target.files[0]));
  document.addEventListener("paste", (event) => take(event.clipboardData.files[0]));
  for (const kind of ["dragover", "dragleave", "drop"]) {
    document.addEventListener(kind, (event) => {
      event.preventDefault();
      get("drop").classList.toggle("over", kind === "dragover");
      if (kind === "drop") take(event.dataTransfer.files[0]);
    });
  }
  for (const slider of ["temperature", "tokens", "start", "steps", "seed"]) {
    shown(slider);
    get(slider).addEventListener("input", () => shown(slider));
  }
  for (const slider of ["start", "steps", "seed"]) {
    get(slider).addEventListener("change", () => columns.forEach((column) => column.reconstruct()));
  }
  get("key").addEventListener("change", () => {
    sessionStorage.setItem("key", get("key").value);
    load();
  });
}

async function load() {
  try {
    const found = await (await call("api/models")).json();
    limits = found.limits;
    get("tokens").max = limits.new_tokens;
    get("steps").max = Math.min(limits.steps, 100);
    shown("tokens");
    get("models").replaceChildren();
    columns = found.models.map((model) => new Column(model));
    get("key-field").hidden = true;
    problem("");
  } catch (error) {
    problem(error.message);
  }
}

connect();
load();
