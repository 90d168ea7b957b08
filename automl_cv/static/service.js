// How a page asks the service, and how it says what came back.

/** An answer that is no answer: what the service, or the way to it, says is wrong. */
export class Trouble extends Error {
  constructor(title, detail, more = {}) {
    super(detail);
    Object.assign(this, { title, detail, ...more });
  }
}

const unreachable = () =>
  new Trouble("The service did not answer", "Check your connection and try again.", { code: "no_answer", passes: true });

/** Tell whether a header can carry a key: Latin-1 only, and a browser refuses to send anything else. */
export const isKey = (text) => /^[\x20-\x7e\xa0-\xff]+$/.test(text);

let kept = ""; // where a browser lends no storage, the key lasts for the page

/** Keep a key for as long as the tab is open. */
export function keep(key) {
  kept = key;
  try {
    sessionStorage.setItem("key", key);
  } catch {} // it is kept above
}

/** The header that carries the key, where there is one. */
export function keyHeader() {
  let key = kept;
  try {
    key ||= sessionStorage.getItem("key") ?? "";
  } catch {} // there is none but the one above
  return isKey(key) ? { "X-API-Key": key } : {};
}

const locked = () =>
  new Trouble("The key is missing or wrong", "Type the key of this service above, then try again.", { code: "no_key", passes: true });

// What stands in front of a service may take less than the service, and says so in words of its own.
const TOO_LARGE = {
  title: "The file is too large",
  detail: "Something on the way to the service takes no file of this size. Give a smaller one; of a zip, the unpacked folder.",
};

/** Turn a problem+json answer into a Trouble. */
async function explain(reply) {
  if (reply.status === 401) return locked();
  const problem = await reply.json().catch(() => (reply.status === 413 ? TOO_LARGE : {}));
  const title = problem.title ?? (reply.status === 502 ? "The service did not answer" : "The service failed");
  return new Trouble(title, problem.detail ?? `The answer has the status ${reply.status}. Try again.`, {
    code: problem.code ?? `http_${reply.status}`,
    requestId: problem.request_id,
    passes: reply.status >= 500 || [408, 429].includes(reply.status), // the same file may do better next time
    busy: [429, 502, 503].includes(reply.status), // 502 is a proxy's word for a service that restarts
    seconds: Number(reply.headers.get("retry-after")) || 1,
  });
}

/** Post files in one form field. Throws Trouble; an abort is passed on as it is. */
export async function post(address, field, files, signal) {
  const form = new FormData();
  for (const file of files) form.append(field, file, file.name);
  let reply;
  try {
    reply = await fetch(address, { method: "POST", body: form, headers: keyHeader(), signal });
  } catch (error) {
    throw error.name === "AbortError" ? error : unreachable();
  }
  if (!reply.ok) throw await explain(reply);
  return reply;
}

const page = document.getElementById("drop")?.dataset; // of the model that the page was made for
const known = new Set(JSON.parse(page?.classes ?? "[]"));

/** Return an answer that the page can show. Throws Trouble where the service has another model by now. */
export function readable(found) {
  if (known.size && (!known.has(found.label) || Boolean(found.labels) !== (page.task === "multilabel"))) {
    throw new Trouble("The model has changed", "Reload this page: it was made for the model before.", { code: "model_changed" });
  }
  return found;
}

/** Ask for one picture. Throws Trouble; what is too large for the service is not sent. */
export async function classify(file, { topK, maxBytes, signal }) {
  if (file.size > maxBytes) {
    const [size, limit] = [file.size, maxBytes].map((bytes) => (bytes / 1e6).toFixed(1));
    const detail = `The file has ${size} MB. The limit is ${limit} MB.`;
    throw new Trouble("The file is too large", detail, { code: "file_too_large" });
  }
  const reply = await post(`predict?top_k=${topK}&notes=true`, "file", [file], signal);
  return readable(await reply.json());
}

/** The probabilities of an answer, the highest first. */
export const ranking = (found) => found.top_k ?? found.probabilities ?? [];

/** Rounding up to 100 % would claim a certainty that no model has. */
export function percent(share) {
  if (share >= 0.995) return "over 99 %";
  return share < 0.005 ? "under 1 %" : `${Math.round(100 * share)} %`;
}

/** Make an element with a class and a text. */
export function make(tag, kind = "", text = "") {
  const element = document.createElement(tag);
  if (kind) element.className = kind;
  element.textContent = text;
  return element;
}

/** Draw a share as a bar. The number beside it says the same to a screen reader. */
export function bar(share) {
  const frame = make("div", "bar");
  frame.setAttribute("aria-hidden", "true");
  frame.append(make("span"));
  frame.firstChild.style.width = `${100 * share}%`;
  return frame;
}
