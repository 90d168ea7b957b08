// The prediction page: one picture in, one answer out. Nothing here is needed by the service itself.
"use strict";

const find = (id) => document.getElementById(id);
const drop = find("drop");
const input = find("file");
const maxBytes = Number(drop.dataset.maxBytes);
let pending = null; // the request under way: a newer picture replaces it

// Behind a proxy only the browser knows the address that people see.
document.querySelectorAll(".origin").forEach((spot) => { spot.textContent = location.origin; });

function show(state) {
  for (const id of ["idle", "busy", "answer", "trouble"]) find(id).hidden = id !== state;
}

// Rounding up to 100 % would claim a certainty that no model has.
function percent(share) {
  if (share >= 0.995) return "over 99 %";
  return share < 0.005 ? "under 1 %" : `${Math.round(100 * share)} %`;
}

function bar(share) {
  const frame = document.createElement("div");
  frame.className = "bar";
  frame.setAttribute("aria-hidden", "true"); // the number beside it says the same
  frame.append(document.createElement("span"));
  frame.firstChild.style.width = `${100 * share}%`;
  return frame;
}

function row(share) {
  const item = document.createElement("li");
  const [name, number] = ["name", "number"].map((kind) => {
    const part = document.createElement("span");
    part.className = kind;
    return part;
  });
  name.textContent = share.label;
  number.textContent = percent(share.probability);
  item.append(name, number, bar(share.probability));
  return item;
}

function showClass(found) {
  find("label").textContent = found.label;
  find("sure").textContent = `${percent(found.confidence)} sure`;
  find("confidence").style.width = `${100 * found.confidence}%`;
  return found.probabilities.slice(1);
}

// Each label has a threshold of its own, so one that was not found may be more probable than one that was.
function showLabels(found) {
  const names = found.labels.map((share) => share.label);
  find("found").replaceChildren(...found.labels.map(row));
  find("none").hidden = names.length > 0;
  return found.probabilities.filter((share) => !names.includes(share.label));
}

function showAnswer(found) {
  const others = found.labels ? showLabels(found) : showClass(found);
  find("shares").replaceChildren(...others.map(row));
  find("others").hidden = !others.length;
  find("notes").textContent = found.notes.map((note) => `Note: ${note}.`).join(" ");
  show("answer");
}

function showTrouble(title, detail) {
  find("trouble-title").textContent = title;
  find("trouble-detail").textContent = detail;
  show("trouble");
}

function showPicture(file) {
  const image = find("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.hidden = false;
  image.src = URL.createObjectURL(file);
  image.alt = `Your picture ${file.name}`;
  find("name").textContent = file.name;
  find("prompt").hidden = true;
  find("figure").hidden = false;
}

async function classify(file) {
  showPicture(file);
  pending?.abort();
  const mine = (pending = new AbortController());
  if (file.size > maxBytes) {
    const [size, limit] = [file.size, maxBytes].map((bytes) => (bytes / 1e6).toFixed(1));
    return showTrouble("The file is too large", `The file has ${size} MB. The limit is ${limit} MB.`);
  }
  show("busy");
  const form = new FormData();
  form.append("file", file, file.name);
  try {
    const options = { method: "POST", body: form, signal: mine.signal };
    const reply = await fetch("predict?top_k=5&notes=true", options);
    const found = await reply.json();
    if (mine.signal.aborted) return;
    if (reply.ok) showAnswer(found);
    else showTrouble(found.title, found.detail);
  } catch (error) {
    if (mine.signal.aborted) return;
    showTrouble("The service did not answer", "Check your connection and try again.");
  }
}

function take(files) {
  if (files.length === 1) classify(files[0]);
  else if (files.length) showTrouble("One picture at a time", "Please drop a single file.");
  else showTrouble("That was no file", "Save the picture on your computer first, then drop the file here.");
}

input.addEventListener("change", () => {
  if (input.files.length) take(input.files);
  input.value = ""; // the same file may be chosen again
});

// The whole page takes a dropped file, so that nobody can miss, and the browser never leaves the page for it.
document.addEventListener("dragover", (event) => {
  event.preventDefault();
  drop.classList.add("over");
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) drop.classList.remove("over");
});
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  take(event.dataTransfer.files);
});
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) take(event.clipboardData.files);
});

// TIFF and damaged pictures cannot be shown; the file's name stays.
find("preview").addEventListener("error", () => { find("preview").hidden = true; });

find("copy").hidden = !navigator.clipboard; // browsers give it to secure addresses only
find("copy").addEventListener("click", async () => {
  await navigator.clipboard.writeText(find("command").textContent.trim());
  find("copy").textContent = "Copied";
});
