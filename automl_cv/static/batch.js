// The batch page: many pictures in, a table out. Pictures go one by one, so that each fails or succeeds alone;
// a zip goes as it is, and its rows come back in one stream. They take the place of its own row, which stays only
// where the zip failed.
import { save, writeCsv } from "./csv.js";
import { takeChosen, takeFiles, visible } from "./files.js";
import { bar, classify, make, percent, post, ranking, readable, Trouble } from "./service.js";

const find = (id) => document.getElementById(id);
const drop = find("drop");
const maxBytes = Number(drop.dataset.maxBytes);
const classes = JSON.parse(drop.dataset.classes);
const PATIENCE = 5; // how often a busy server is asked for the same file
const THUMBNAIL = 56; // side, CSS pixels
const ROOM = 200; // rows drawn at once: a browser lays all of them out again for each answer
let rows = []; // {name, file?, found?, trouble?, parts?, element}
const queue = []; // jobs that wait: functions
let room = ROOM;
let atOnce = 4; // enough to keep a small server's cores busy; one, where the line is too slow for more
let running = 0;
let stop = new AbortController();
let leftOut = 0; // files of the operating system, in folders

const isZip = (name) => name.toLowerCase().endsWith(".zip");
const pause = (seconds) => new Promise((done) => setTimeout(done, 1000 * seconds));

function complain(title = "", detail = "") {
  find("message-title").textContent = title;
  find("message-detail").textContent = detail;
  find("message").hidden = !title;
}

// --- The table

async function drawThumbnail(canvas, file) {
  const side = THUMBNAIL * Math.min(2, devicePixelRatio);
  try {
    const image = await createImageBitmap(file);
    const scale = side / Math.min(image.width, image.height);
    [canvas.width, canvas.height] = [side, side];
    const [width, height] = [image.width * scale, image.height * scale];
    canvas.getContext("2d").drawImage(image, (side - width) / 2, (side - height) / 2, width, height);
    image.close();
  } catch {
    canvas.classList.add("gone"); // a damaged picture, or a format that this browser does not show
  }
}

function addRow(name, file) {
  const [picture, place, answer, share] = ["picture", "file", "answer", "share"].map((kind) => make("td", kind));
  const canvas = make("canvas", file && !isZip(name) ? "" : "gone");
  canvas.setAttribute("aria-hidden", "true");
  picture.append(canvas);
  place.textContent = name;
  const element = make("tr");
  element.append(picture, place, answer, share);
  element.hidden = rows.length >= room;
  const row = { name, file, element };
  rows.push(row);
  find("rows").append(element);
  drawRow(row);
  return row;
}

function removeRows(gone) {
  const all = new Set(gone);
  rows = rows.filter((row) => !all.has(row));
  for (const { element } of all) element.remove();
}

function names(found) {
  if (!found.labels) return found.label;
  return found.labels.map((share) => share.label).join(", ") || "none of the labels";
}

function drawRow({ element, found, trouble }) {
  const [, , answer, share] = element.children;
  element.className = trouble ? "failed" : found ? "" : "waiting";
  answer.replaceChildren(found ? names(found) : make("span", "soft", trouble ? "" : "waiting"));
  share.replaceChildren();
  [share.hidden, answer.colSpan] = [Boolean(trouble), trouble ? 2 : 1]; // what is wrong needs the room
  // The confidence is that of the best label: beside "none of the labels" it would say the opposite.
  if (found && found.labels?.length !== 0) {
    share.append(make("span", "number", percent(found.confidence)), bar(found.confidence));
  }
  if (found?.uncertain) { // the space keeps the words apart where only the text counts
    answer.append(" ", make("span", "tag", found.reason === "unlike_training" ? "unlike the training" : "not sure"));
  }
  if (trouble) answer.replaceChildren(make("strong", "", trouble.title), make("span", "", trouble.detail));
}

// --- The filter

const KINDS = {
  "!failed": ({ trouble }) => Boolean(trouble),
  "!unsure": ({ found }) => Boolean(found?.uncertain),
  "!none": ({ found }) => found?.labels?.length === 0,
};

function passes(row) {
  const wanted = find("label").value;
  const [low, high] = ["low", "high"].map((id) => find(id).valueAsNumber / 100);
  const { found } = row;
  if (wanted in KINDS && !KINDS[wanted](row)) return false;
  if (wanted.startsWith("=")) {
    const labels = found?.labels?.map((share) => share.label) ?? [found?.label];
    if (!labels.includes(wanted.slice(1))) return false;
  }
  const narrowed = low > 0 || high < 1; // a row without an answer has no confidence
  return found ? !(found.confidence < low || found.confidence > high) : !narrowed;
}

function refresh() {
  const shown = rows.filter(passes);
  const drawn = new Set(shown.slice(0, room));
  for (const row of rows) row.element.hidden = !drawn.has(row);
  const done = rows.filter((row) => row.found || row.trouble).length;
  const failed = rows.filter((row) => row.trouble).length;
  const parts = [running ? `${done} of ${rows.length} done` : `${done} ${done === 1 ? "file" : "files"} done`];
  if (failed) parts.push(`${failed} failed`);
  if (leftOut) parts.push(`${leftOut} hidden ${leftOut === 1 ? "file" : "files"} left out`);
  if (shown.length < rows.length) parts.push(`${shown.length} shown`);
  find("status").textContent = parts.join(", ");
  find("said").textContent = running ? "" : parts.join(", "); // read aloud once, not for every file
  [find("progress").max, find("progress").value] = [rows.length || 1, done];
  find("progress").hidden = !running;
  find("stop").hidden = !running;
  find("retry").hidden = running > 0 || !rows.some((row) => row.trouble && row.file);
  find("download").disabled = running > 0 || !shown.length;
  find("download").textContent =
    shown.length < rows.length ? `Download CSV (${shown.length} of ${rows.length} rows)` : "Download CSV";
  find("results").hidden = !rows.length && !running;
  find("empty").hidden = rows.length > 0;
  drop.classList.toggle("slim", rows.length > 0); // the table is what matters now
  find("more").hidden = shown.length <= room;
  find("more").textContent = `Show ${Math.min(ROOM, shown.length - room)} more of ${shown.length} rows`;
  find("nothing").hidden = shown.length > 0 || !rows.length;
  return shown;
}

// One look over all rows for all that happened since the last: thousands of rows would cost too much one by one.
let planned = false;
function plan() {
  if (planned) return;
  planned = true;
  setTimeout(() => {
    planned = false;
    refresh();
  }, 100);
}

// --- The work

function toTrouble(error) {
  if (error instanceof Trouble) return error;
  if (error.name === "AbortError") return new Trouble("Stopped", "Retry it when you like.", { code: "stopped" });
  return new Trouble("The answer could not be read", "Try again.", { code: "broken_answer" });
}

async function patiently(send, signal) {
  for (let turn = 1; ; turn += 1) {
    try {
      return await send();
    } catch (error) {
      if (!error.busy || turn === PATIENCE || signal.aborted) throw error;
      await pause(Math.min(error.seconds, 10)); // a busy server says when to come back
    }
  }
}

async function workPicture(row, signal) {
  const beside = atOnce - 1; // others that may share the line
  const drawn = signal.aborted || drawThumbnail(row.element.querySelector("canvas"), row.file);
  const send = () => classify(row.file, { topK: classes.length || 1, maxBytes, signal });
  try {
    [row.found, row.trouble] = [await patiently(send, signal), undefined];
  } catch (error) {
    if (error.code === "too_slow" && beside) {
      atOnce = 1;
      return queue.unshift(() => workPicture(row, signal));
    }
    [row.found, row.trouble] = [undefined, toTrouble(error)];
  }
  drawRow(row);
  await drawn; // no more pictures in memory than are under way
}

function readLine(text) {
  const { file, code, detail, title, ...found } = JSON.parse(text);
  const outcome = code ? { trouble: new Trouble(title, detail, { code }) } : { found: readable(found) };
  const row = Object.assign(addRow(file), outcome);
  drawRow(row);
  plan();
  return row;
}

async function workZip(row, signal) {
  removeRows(row.parts ?? []); // of a try that broke off
  row.parts = [];
  const send = () => post(`predict/batch?top_k=${classes.length || 1}`, "files", [row.file], signal);
  try {
    const reply = await patiently(send, signal);
    const lines = reply.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { value, done } = await lines.read();
      const parts = (rest + (value ?? "")).split("\n");
      rest = done ? "" : parts.pop();
      for (const part of parts) if (part.trim()) row.parts.push(readLine(part));
      if (done) return removeRows([row]);
    }
  } catch (error) {
    row.trouble = toTrouble(error);
    drawRow(row);
  }
}

const work = (row) => (signal) => (isZip(row.name) ? workZip : workPicture)(row, signal);

async function run() {
  if (running >= atOnce || !queue.length) return plan();
  running += 1;
  plan();
  while (queue.length && running <= atOnce) {
    await queue.shift()();
    plan();
  }
  running -= 1;
  plan();
}

function start(jobs) {
  if (stop.signal.aborted) stop = new AbortController();
  const { signal } = stop; // the one of now: what was stopped stays so when more is dropped
  for (const job of jobs) queue.push(() => job(signal)); // spread, a hundred thousand would be too many
  for (let i = 0; i < atOnce; i += 1) run();
  refresh();
}

function take(items) {
  complain();
  const wanted = visible(items);
  leftOut += items.length - wanted.length;
  if (!wanted.length) return complain("That was no file", "Drop pictures, a folder with pictures, or a zip of them.");
  start(wanted.map(({ file, name }) => work(addRow(name, file))));
}

takeFiles(drop, take);
takeChosen(find("files"), take);
takeChosen(find("folder"), take);
find("choose-folder").addEventListener("click", () => find("folder").click());
find("stop").addEventListener("click", () => stop.abort());
find("retry").addEventListener("click", () => {
  const failed = rows.filter((row) => row.trouble && row.file);
  for (const row of failed) {
    row.trouble = undefined;
    drawRow(row);
  }
  start(failed.map(work));
});
find("download").addEventListener("click", () => {
  save(writeCsv(refresh(), classes, ranking), "answers.csv", "text/csv");
});
find("more").addEventListener("click", () => {
  room += ROOM;
  refresh();
});
addEventListener("beforeunload", (event) => {
  if (running) event.preventDefault(); // the browser asks whether to leave
});
for (const id of ["label", "low", "high"]) find(id).addEventListener("input", refresh);
