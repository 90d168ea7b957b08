// The prediction page: one picture in, one answer out. Nothing here is needed by the service itself.
import { useCamera } from "./camera.js";
import { takeChosen, takeFiles } from "./files.js";
import { bar, classify, make, percent, ranking, Trouble } from "./service.js";

const find = (id) => document.getElementById(id);
const DOUBTS = ["low_confidence", "unlike_training"];
const maxBytes = Number(find("drop").dataset.maxBytes);
let pending = null; // the request under way: whatever is given next replaces it
let last = null; // the picture that was asked for last

function show(state) {
  for (const id of ["idle", "busy", "answer", "trouble"]) find(id).hidden = id !== state;
  find(state).scrollIntoView({ block: "nearest" }); // on a phone it is below the picture
}

function row(share) {
  const item = make("li");
  const [name, number] = [make("span", "name", share.label), make("span", "number", percent(share.probability))];
  item.append(name, number, bar(share.probability));
  return item;
}

function showClass(found) {
  find("verdict").textContent = found.uncertain ? "My best guess" : "This looks like";
  find("label").textContent = found.label;
  find("sure").textContent = `${percent(found.confidence)} sure`;
  find("confidence").style.width = `${100 * found.confidence}%`;
  return ranking(found).slice(1);
}

// Each label has a threshold of its own, so one that was not found may be more probable than one that was.
function showLabels(found) {
  const names = found.labels.map((share) => share.label);
  find("found").replaceChildren(...found.labels.map(row));
  find("none").hidden = names.length > 0;
  return ranking(found).filter((share) => !names.includes(share.label));
}

function showAnswer(found) {
  const others = found.labels ? showLabels(found) : showClass(found);
  find("shares").replaceChildren(...others.map(row));
  find("others").hidden = !others.length;
  for (const id of DOUBTS) find(id).hidden = !found.uncertain || found.reason !== id;
  find("answer").classList.toggle("unsure", Boolean(found.uncertain));
  find("notes").textContent = (found.notes ?? []).map((note) => `Note: ${note}.`).join(" ");
  show("answer");
}

function showTrouble(title, detail, { requestId, passes } = {}) {
  find("trouble-title").textContent = title;
  find("trouble-detail").textContent = detail;
  find("trouble-id").textContent = requestId ? `Request ${requestId}` : "";
  find("trouble-id").hidden = !requestId || !passes; // only worth a report where the service is to blame
  find("again").hidden = !passes;
  show("trouble");
}

function showPicture(file) {
  const image = find("preview");
  if (image.src) URL.revokeObjectURL(image.src);
  image.hidden = false;
  image.src = URL.createObjectURL(file);
  find("name").textContent = file.name;
  find("prompt").hidden = true;
  find("given").hidden = false;
}

async function answer(file) {
  showPicture((last = file));
  const { signal } = (pending = new AbortController());
  show("busy");
  try {
    const found = await classify(file, { topK: 5, maxBytes, signal });
    if (!signal.aborted) showAnswer(found);
  } catch (error) {
    if (signal.aborted) return;
    const trouble = error instanceof Trouble ? error : new Trouble("The answer could not be read", "Try again.", { passes: true });
    showTrouble(trouble.title, trouble.detail, trouble);
  }
}

function take(items) {
  pending?.abort();
  if (items.length === 1) answer(items[0].file);
  else if (items.length) showTrouble("One picture at a time", "Drop a single file, or send many on the page Batch.");
  else showTrouble("That was no file", "Save the picture on your computer first, then drop the file here.");
}

takeFiles(find("drop"), take);
takeChosen(find("file"), take);
takeChosen(find("capture"), take);
useCamera(take, showTrouble);
find("again").addEventListener("click", () => answer(last));

// TIFF and damaged pictures cannot be shown; the file's name stays.
find("preview").addEventListener("error", () => { find("preview").hidden = true; });

for (const button of document.querySelectorAll("[data-copies]")) {
  button.hidden = !navigator.clipboard; // browsers give it to secure addresses only
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(find(button.dataset.copies).textContent.trim());
    button.firstChild.textContent = "Copied";
  });
}
